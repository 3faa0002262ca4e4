"""Videos to shards of latents: decoded, encoded and written at the same time.

Decoder processes run ahead in the order of the list; this process gives their clips to the
codec as they come, which only starts the devices; a thread waits for the latents and writes
them. Between the parts are short queues, so that memory is bounded by the longest videos.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import queue
import threading
import time
from typing import Any, Protocol

import numpy as np

from videogpt_jax import codec as codec_lib
from videogpt_jax.data import decoders as decoders_lib
from videogpt_jax.data import load
from videogpt_jax.data import store

_IN_FLIGHT = 8  # videos between the decoders and the disk
_POLL_S = 0.5

Shard = tuple[str, int]  # split, index


class Work(Protocol):
  """Which items a shard is made of."""

  def items(self, shard: Shard) -> Iterator[tuple[str, Any]]:
    """Name and item of every video of a shard, in order."""


@dataclasses.dataclass
class Usage:
  """What has been done, and how long each part was at work; seconds, since the start.

  Attributes:
    processes: that decode.
    videos, rejected, clips, frames: done so far.
    elapsed: since the first video was begun.
    decoding: of all decoder processes together.
    encoding: in which the codec had something to do.
    writing: in which the thread serialised, compressed and wrote.
    starved: in which this process waited for the decoders.
    blocked: in which it waited for the codec and the disk.
  """

  processes: int
  videos: int = 0
  rejected: int = 0
  clips: int = 0
  frames: int = 0
  elapsed: float = 0.0
  decoding: float = 0.0
  encoding: float = 0.0
  writing: float = 0.0
  starved: float = 0.0
  blocked: float = 0.0

  def shares(self) -> str:
    """How busy each part was, for people."""
    share = lambda seconds, of=1.0: f"{100 * seconds / max(self.elapsed * of, 1e-9):.0f}%"
    return (f"decode {share(self.decoding, self.processes)} of {self.processes}, "
            f"encode {share(self.encoding)}, write {share(self.writing)}")


def run(work: Work, shards: Sequence[Shard], writer: store.Writer, codec: codec_lib.Codec,
        loader: load.Loader, *, processes: int, timeout_s: float,
        show: Callable[[Usage], None]) -> Usage:
  """Writes shards; each appears when it is whole, less the videos that cannot be used.

  Args:
    work: what belongs into a shard.
    shards: which are written, in this order.
    writer: of the data set.
    codec: makes latents of frames.
    loader: makes clips of items, in the decoder processes.
    processes: that decode.
    timeout_s: without a new frame for so long, a decoder is ended.
    show: called now and then with what has been done.

  Raises:
    InputError: the disk is full, or decoders cannot be started. Shards that are whole stay.
  """
  usage, start = Usage(processes), time.monotonic()
  items = (((shard, name), item) for shard in shards for name, item in work.items(shard))
  def tick() -> None:
    usage.elapsed = time.monotonic() - start
    usage.decoding = decoders.busy_s
    show(usage)

  decoders = decoders_lib.Decoders[tuple[Shard, str]](loader, processes, timeout_s)
  with (decoders,
        _Thread(writer, shards, usage) as thread):
    loaded = decoders.load(items, tick)
    current = 0
    while True:
      before = time.monotonic()
      try:
        (shard, name), result = next(loaded)
      except StopIteration:
        break
      finally:
        usage.starved += time.monotonic() - before
      while shards[current] != shard:  # the one before is done, or had no videos
        thread.put(None)
        current += 1
      if isinstance(result, decoders_lib.Rejected):
        thread.put(_Video(name, result.reason))
      else:
        started = [_Started(clip, time.monotonic(), codec.start_encode(clip.frames))
                   for clip in result]
        thread.put(_Video(name, "", started))
      tick()
    for _ in shards[current:]:
      thread.put(None)
    thread.finish(tick)
    tick()
  return usage


@dataclasses.dataclass
class _Started:
  """A clip whose latents are being computed."""

  clip: load.Clip
  since: float
  latents: Callable[[], np.ndarray]


@dataclasses.dataclass
class _Video:
  """What becomes of one video: clips, or a reason why there are none."""

  name: str
  reason: str
  clips: Sequence[_Started] = ()


class _Stopped(Exception):
  """The other side gave up."""


class _Thread:
  """Writes what it is given; its failures are raised by `put` and `finish`."""

  def __init__(self, writer: store.Writer, shards: Sequence[Shard], usage: Usage):
    self._writer, self._shards, self._usage = writer, shards, usage
    self._inbox: queue.Queue[_Video | None] = queue.Queue(_IN_FLIGHT)
    self._stop = threading.Event()
    self._failure: Exception | None = None
    self._encoded_until = 0.0
    self._thread = threading.Thread(target=self._run, name="write shards", daemon=True)

  def __enter__(self) -> "_Thread":
    self._thread.start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._stop.set()
    self._thread.join()

  def put(self, video: _Video | None) -> None:
    """Hands over a video, or None: the end of a shard. Waits while there is too much."""
    before = time.monotonic()
    while True:
      self._check()
      with contextlib.suppress(queue.Full):
        self._inbox.put(video, timeout=_POLL_S)
        self._usage.blocked += time.monotonic() - before
        return

  def finish(self, tick: Callable[[], None]) -> None:
    """Waits until all is written."""
    while self._thread.is_alive():
      self._thread.join(_POLL_S)
      tick()
    self._check()

  def _check(self) -> None:
    if self._failure is not None:
      raise self._failure

  def _run(self) -> None:
    try:
      for split, index in self._shards:
        with self._writer.shard(split, index) as shard:
          while (video := self._take()) is not None:
            self._write(shard, video)
    except _Stopped:
      pass
    except Exception as error:  # told to the thread that waits
      self._failure = error

  def _take(self) -> _Video | None:
    while True:
      if self._stop.is_set():
        raise _Stopped
      with contextlib.suppress(queue.Empty):
        return self._inbox.get(timeout=_POLL_S)

  def _write(self, shard: store.ShardWriter, video: _Video) -> None:
    usage = self._usage
    if video.reason:
      shard.reject(video.name, video.reason)
      usage.rejected += 1
    for started in video.clips:
      latents = started.latents()
      now = time.monotonic()
      # Clips overlap on the devices: time counts once.
      usage.encoding += now - max(started.since, self._encoded_until)
      self._encoded_until = now
      clip = started.clip
      shard.add(latents, fps=clip.fps, source=clip.source, label=clip.label,
                caption=clip.caption, masks=clip.masks)
      usage.writing += time.monotonic() - now
      usage.clips += 1
      usage.frames += len(latents)
    usage.videos += 1
