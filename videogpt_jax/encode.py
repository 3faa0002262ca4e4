"""Videos to a latent data set, once, before training.

    python -m videogpt_jax.encode --config=configs/tiny.py
    python -m videogpt_jax.encode --config=configs/tiny.py --videos=my_videos --out=data/mine

The videos come from a folder of video files or from the simulated world
(`config.data.source`). A file that cannot be used is listed in `rejected.jsonl` with its
reason and the run goes on. After an interruption of any kind the same command continues
where it stopped, and the data set has the same bytes whatever happened on the way and
however many processes took part.
"""

import collections
from collections.abc import Callable, Sequence
import concurrent.futures
import concurrent.futures.process
import dataclasses
import multiprocessing
from multiprocessing.context import SpawnContext
import os
from pathlib import Path
import sys
import time
from typing import Any

from absl import flags
from ml_collections import config_flags
from ml_collections import ConfigDict

from videogpt_jax import cli
from videogpt_jax import codec as codec_lib
from videogpt_jax import config as config_lib
from videogpt_jax import machine
from videogpt_jax.data import clips
from videogpt_jax.data import store
from videogpt_jax.data import worker
from videogpt_jax.errors import InputError

_POLL_S = 0.5  # between looks at the other processes
_REDRAW_S = {True: 0.2, False: 5.0}  # between progress lines: on a terminal, in a log


# One shard, in whatever process


class _Count:
  """A number that several processes raise."""

  def __init__(self, context: SpawnContext):
    self._value = context.Value("q", 0)

  def take(self) -> int:
    """Raises it by one and returns what it was."""
    with self._value.get_lock():
      self._value.value += 1
      return self._value.value - 1

  @property
  def value(self) -> int:
    return self._value.value


class _Shared:
  """What the processes that write shards tell one another."""

  def __init__(self, context: SpawnContext):
    self.taken = _Count(context)  # shards, which go to whoever is free
    self.done = _Count(context)  # videos
    self.rejected = _Count(context)  # videos
    self.stop = context.Event()


class _Stopped(Exception):
  """Another process failed, or the user gave up."""


@dataclasses.dataclass(frozen=True)
class _Job:
  """All that a process needs to write any shard."""

  videos: clips.Videos
  codec: codec_lib.Codec
  writer: store.Writer
  per_shard: int

  def range(self, split: str, index: int) -> range:
    """The numbers of the videos that belong into a shard."""
    first = index * self.per_shard
    return range(first, min(first + self.per_shard, self.videos.count(split)))

  def write(
    self, split: str, index: int, shared: _Shared, tick: Callable[[], None]
  ) -> None:
    """Writes one shard, less the unusable videos; calls `tick` after each video."""
    with self.writer.shard(split, index) as shard:
      for number in self.range(split, index):
        if shared.stop.is_set():
          raise _Stopped
        try:
          clip = self.videos.load(split, number)
        except InputError as error:
          shard.reject(self.videos.name(split, number), str(error))
          shared.rejected.take()
        else:
          shard.add(
            self.codec.encode(clip.frames),
            fps=clip.fps,
            source=clip.source,
            label=clip.label,
            caption=clip.caption,
            masks=clip.masks,
          )
        shared.done.take()
        tick()


# All shards, in one process or several


class _Progress:
  """One line: redrawn in place on a terminal, now and then a new one in a log."""

  def __init__(self, total: int, before: int, shared: _Shared):
    self._total = total
    self._before = before  # videos that an earlier run has done
    self._shared = shared
    self._start = time.monotonic()
    self._drawn = -float("inf")
    self._tty = sys.stdout.isatty()

  def show(self, final: bool = False) -> None:
    now = time.monotonic()
    if not final and now - self._drawn < _REDRAW_S[self._tty]:
      return
    self._drawn = now
    new = self._shared.done.value
    done = self._before + new
    rate = new / max(now - self._start, 1e-9)
    eta = f"{(self._total - done) / rate:.0f}s" if new else "?"
    line = (
      f"encode {done}/{self._total} videos {100 * done / self._total:5.1f}% | "
      f"{rate:.1f} videos/s | {self._shared.rejected.value} rejected | eta {eta}"
    )
    if self._tty:
      print(f"\r{line}\033[K", end="\n" if final else "", flush=True)
    else:
      print(line, flush=True)


def _write(job: _Job, shards: Sequence[tuple[str, int]], processes: int) -> None:
  context = multiprocessing.get_context("spawn")  # fork would copy jax's threads' locks
  shared = _Shared(context)
  total = sum(job.videos.count(split) for split in clips.SPLITS)
  todo = sum(len(job.range(*shard)) for shard in job.writer.pending())
  progress = _Progress(total, total - todo, shared)
  others = min(processes, len(shards)) - 1  # this process works too, while they start
  if others:
    with concurrent.futures.ProcessPoolExecutor(
      others, mp_context=context, initializer=_start_worker, initargs=(job, shards, shared)
    ) as executor:
      _write_with([executor.submit(_work) for _ in range(others)], job, shards, shared, progress)
  else:
    _write_some(job, shards, shared, progress.show)
  progress.show(final=True)


def _write_some(
  job: _Job, shards: Sequence[tuple[str, int]], shared: _Shared, tick: Callable[[], None]
) -> None:
  """Writes shards until all are taken."""
  while (number := shared.taken.take()) < len(shards):
    job.write(*shards[number], shared, tick)


def _write_with(
  others: Sequence[concurrent.futures.Future[None]],
  job: _Job,
  shards: Sequence[tuple[str, int]],
  shared: _Shared,
  progress: _Progress,
) -> None:
  """Shares the work with other processes; when one fails, all stop."""

  def tick() -> None:
    progress.show()
    for other in others:
      if other.done():
        other.result()

  try:
    _write_some(job, shards, shared, tick)
    while not all(other.done() for other in others):
      concurrent.futures.wait(others, _POLL_S)
      tick()
    tick()
  except concurrent.futures.process.BrokenProcessPool as error:
    raise InputError(
      "a worker process was killed, perhaps for lack of memory; run the same command again, "
      "with --processes=1 if it happens again"
    ) from error
  finally:
    shared.stop.set()


_worker: dict[str, Any] = {}  # what `_start_worker` was given; in worker processes only


def _start_worker(job: _Job, shards: Sequence[tuple[str, int]], shared: _Shared) -> None:
  _worker.update(job=job, shards=shards, shared=shared)
  worker.obey_parent()  # the parent decides, and sets shared.stop


def _work() -> None:
  _write_some(_worker["job"], _worker["shards"], _worker["shared"], lambda: None)


def _plan(config: ConfigDict, videos: clips.Videos, out: Path, masks: bool) -> _Job:
  """Decides what the records and shards are, and opens the folder for writing."""
  codec = config_lib.codec(config)
  height, width = videos.size
  if height % codec.downsample or width % codec.downsample:
    raise InputError(
      f"frames of {height}x{width} px do not divide into latent cells of {codec.downsample} px; "
      "change data.height and data.width (or world.size)"
    )
  per_shard = config.data.videos_per_shard
  if per_shard < 1:
    raise InputError(f"data.videos_per_shard must be at least 1, got {per_shard}")
  spec = store.Spec(
    latent_shape=(height // codec.downsample, width // codec.downsample, codec.channels),
    dtype=codec.dtype.name,
    codec=codec.spec(),
    height=height,
    width=width,
    stride=config.data.stride,
    masks=masks,
  )
  shards = {s: -(-videos.count(s) // per_shard) for s in clips.SPLITS if videos.count(s)}
  writer = store.create(out, spec, shards, {**videos.describe(), "per_shard": per_shard})
  return _Job(videos, codec, writer, per_shard)


def encode(
  config: ConfigDict,
  *,
  out: str | os.PathLike[str] = "",
  processes: int = 0,
  host: int = 0,
  hosts: int = 1,
  masks: bool = False,
) -> Path:
  """Writes the data set that `config` describes, or finishes what an earlier run began.

  Args:
    config: see `videogpt_jax.config`; sections data, codec and (for the world) world.
    out: the folder; default `config.data.path`.
    processes: how many write shards; 0: as many as there are CPU cores.
    host, hosts: write only every hosts-th shard, from number `host` on, so that several
      machines share the work in one folder; who comes last completes the data set.
    masks: store the per-object masks of the simulated world.

  Returns:
    The folder.

  Raises:
    InputError: no video can be used (says why), settings that fit no video, a folder that
      cannot be written or holds something else, a full disk.
  """
  out = out or config.data.path
  if not out:
    raise InputError("no folder to write to: give --out=DIR (or set data.path)")
  if not 0 <= host < hosts:
    raise InputError(f"host {host} of {hosts}: --host goes from 0 to --hosts less one")
  start = time.monotonic()
  job = _plan(config, clips.find(config, masks), Path(out), masks)
  writer = job.writer
  if not writer.complete:
    print(f"encode {job.videos.describe()['source']} to {writer.path}", flush=True)
    pending = set(writer.pending())
    if todo := [shard for shard in writer.every()[host::hosts] if shard in pending]:
      job.codec.prepare()
      _write(job, todo, processes or (1 if job.codec.on_device else machine.usable_cores()))
    if left := writer.pending():
      print(f"encode: {len(left)} shards left to the other hosts; the last one completes it")
      return writer.path
    _refuse_if_empty(job)
    writer.finish()
  _report(writer, time.monotonic() - start)
  return writer.path


def _refuse_if_empty(job: _Job) -> None:
  """Raises `InputError`, after tidying up, if no training video was usable."""
  writer = job.writer
  if writer.num_records("train"):
    return
  rejected = writer.rejected()
  kinds = collections.Counter(entry["reason"].split(":")[0] for entry in rejected)
  counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
  some = "".join(f"\n  {entry['source']}: {entry['reason']}" for entry in rejected[:5])
  writer.abandon()
  raise InputError(
    f"none of {len(rejected)} videos can be used for training ({counts}); all are listed in "
    f"{writer.path / store.REJECTED}, the first are:{some}"
  )


def _report(writer: store.Writer, seconds: float) -> None:
  counts = {split: writer.num_records(split) for split in writer.shards}
  size = sum(file.stat().st_size for file in writer.path.iterdir() if file.is_file())
  held = " and ".join(f"{count} {split}" for split, count in counts.items())
  print(f"encode done: {held} videos in {writer.path}, {size / 2**20:.1f} MiB, {seconds:.1f} s")
  if rejected := writer.rejected():
    print(f"encode left out {len(rejected)} videos, see {writer.path / store.REJECTED}")
  for split, count in counts.items():
    if not count:
      print(f"warning: no usable video in split {split!r}", file=sys.stderr)


def main() -> None:
  """The command; see the module's documentation."""
  config = flags.FLAGS.config
  if flags.FLAGS.vae:
    if config.codec.id != "vae":
      raise InputError(f"config.codec.id is {config.codec.id!r}: leave out --vae, or set it to "
                       "\"vae\"")
    config.codec.path = flags.FLAGS.vae
  if flags.FLAGS.videos:
    config.data.source = "videos"
    config.data.videos = flags.FLAGS.videos
  encode(
    config,
    out=flags.FLAGS.out,
    processes=flags.FLAGS.processes,
    host=flags.FLAGS.host,
    hosts=flags.FLAGS.hosts,
    masks=flags.FLAGS.masks,
  )


def _define_flags() -> None:
  config_flags.DEFINE_config_file("config", None, "The experiment, such as configs/tiny.py.")
  flags.DEFINE_string("videos", "", "Folder of video files; default: config.data.videos.")
  flags.DEFINE_string("vae", "", "Folder (or hub name) of the autoencoder; default: "
                      "config.codec.path.")
  flags.DEFINE_string("out", "", "Folder of the data set; default: config.data.path.")
  flags.DEFINE_integer("processes", 0, "Processes that work; 0: one per CPU core.")
  flags.DEFINE_integer("host", 0, "Number of this machine among those that share the work.")
  flags.DEFINE_integer("hosts", 1, "How many machines share the work.")
  flags.DEFINE_boolean("masks", False, "Store the simulated world's object masks.")
  flags.mark_flag_as_required("config")


if __name__ == "__main__":
  _define_flags()
  cli.run(main)
