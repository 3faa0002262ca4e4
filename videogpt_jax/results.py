"""What a prediction leaves: its files, written as clips arrive, and its progress."""

from collections.abc import Mapping, Sequence
import pathlib
import statistics
import time
from typing import Any

from jaxtyping import UInt8
import numpy as np

from videogpt_jax import errors
from videogpt_jax import files
from videogpt_jax import telemetry
from videogpt_jax.data import given as given_lib
from videogpt_jax.data import video

_REPORT = "prediction.json"
_GIF_FRAMES = 256  # longer videos get no GIF
_SHEET_FRAMES = 12
_SHOWN = 128  # px, height to which small frames are enlarged where they stand side by side


class Results:
  """The files of a prediction, written as its clips arrive; memory does not grow with them."""

  def __init__(self, out: pathlib.Path, given: given_lib.Given, frames: int, samples: int,
               fps: float) -> None:
    self._out, self._given, self._fps, self._samples = out, given, fps, samples
    self._total = given.history + frames
    self._done = 0
    self.paths: list[pathlib.Path] = []
    self._remove_older()
    names = ["prediction.mp4", *(f"prediction_{i}.mp4" for i in range(1, samples))]
    self._videos = [self._open(name) for name in names]
    self._beside = self._open("side_by_side.mp4")
    self._gif: list[np.ndarray] = []
    self._sheet = set(np.linspace(0, self._total - 1, min(self._total, _SHEET_FRAMES)).astype(int))
    self._sheet.add(given.history - 1)  # the last frame before the future begins
    self._kept: list[tuple[int, list[np.ndarray]]] = []
    self.append(np.repeat(given.frames[None, :given.history], samples, axis=0))

  def _remove_older(self) -> None:
    """What a finished prediction left and this one may not replace, or not before its end."""
    for pattern in (_REPORT, "side_by_side.gif", "contact_sheet.png", "prediction_[0-9]*.mp4"):
      for path in self._out.glob(pattern):
        try:
          path.unlink()
        except OSError as error:
          raise errors.refused(f"cannot remove {path}: {error.strerror or error}",
                               error) from error

  def append(self, frames: UInt8[np.ndarray, "B n H W 3"]) -> None:
    """The next frames of every sample, all given or all predicted."""
    start, count = self._done, frames.shape[1]
    self._done += count
    columns = dict(zip(self._titles(), (*self._truth(start, count), *frames), strict=True))
    is_given = start < self._given.history
    shown = video.side_by_side(columns, scale=max(1, _SHOWN // frames.shape[2]),
                               history=None if is_given else 0)
    self._beside.append(shown)
    for writer, sample in zip(self._videos, frames, strict=True):
      writer.append(sample)
    if self._total <= _GIF_FRAMES:
      self._gif.append(shown)
    self._kept += [(start + i, [x[i] for x in columns.values()]) for i in range(count)
                   if start + i in self._sheet]

  def close(self) -> None:
    """Ends the videos, and writes what is made of them when they are over."""
    for writer in (*self._videos, self._beside):
      writer.close()
    if 0 < self._total <= _GIF_FRAMES:
      self.paths.append(self._out / "side_by_side.gif")
      video.write_gif(self.paths[-1], np.concatenate(self._gif), self._fps)
    self.paths.append(self._out / "contact_sheet.png")
    rows = [np.stack(row) for row in zip(*(frames for _, frames in self._kept), strict=True)]
    titles = [f"{i}" if i >= self._given.history else f"{i} given" for i, _ in self._kept]
    scale = max(1, _SHOWN // 2 // rows[0].shape[1])
    sheet = video.contact_sheet(dict(zip(self._titles(), rows, strict=True)), titles, scale)
    video.write_picture(self.paths[-1], sheet)

  def write_report(self, report: Mapping[str, Any]) -> None:
    """Writes prediction.json."""
    self.paths.append(self._out / _REPORT)
    files.write_json(self.paths[-1], report)

  def _open(self, name: str) -> video.Mp4Writer:
    self.paths.append(self._out / name)
    return video.Mp4Writer(self.paths[-1], self._fps)

  def _titles(self) -> list[str]:
    truth = ["truth"] if len(self._given.frames) > self._given.history else []
    return truth + (["prediction"] if self._samples == 1 else
                    [f"prediction {i}" for i in range(self._samples)])

  def _truth(self, start: int, count: int) -> list[np.ndarray]:
    """The true frames, black after their end; none where no future is known."""
    truth = self._given.frames
    if len(truth) <= self._given.history:
      return []
    part = truth[start:start + count]
    return [np.pad(part, [(0, count - len(part)), (0, 0), (0, 0), (0, 0)])]


class Progress:
  """One line a clip, and the times of all; the first clip's is mostly compilation.

  Args:
    lengths: frames of each clip.
    samples: how many videos are predicted at once.
    done: clips that were finished before.
  """

  def __init__(self, lengths: Sequence[int], samples: int, done: int) -> None:
    self._lengths, self._samples, self._first, self._done = lengths, samples, done, done
    self._seconds: list[float] = []
    self._began = self._last = time.perf_counter()

  def clip(self) -> None:
    """One more clip is finished."""
    now = time.perf_counter()
    self._seconds.append(now - self._last)
    self._last, self._done = now, self._done + 1
    left, rate = sum(self._lengths[self._done:]), self._rate()
    print(f"clip {self._done}/{len(self._lengths)} | "
          f"{sum(self._lengths[:self._done])}/{sum(self._lengths)} frames | "
          f"{rate * self._samples:.2f} frames/s | eta {telemetry.duration(left / rate)}",
          flush=True)

  def _rate(self) -> float:
    """Frames a second of one sample, without the first clip where there are others."""
    skip = 1 if len(self._seconds) > 1 else 0
    frames = sum(self._lengths[self._first + skip:self._done])
    return frames / max(sum(self._seconds[skip:]), 1e-9)

  def timings(self) -> dict[str, Any]:
    """Seconds and rates; of this call, which may have gone on with what another left."""
    if not self._seconds:
      return {"clips": 0}
    later = self._seconds[1:]
    return {
      "clips": len(self._seconds),
      "seconds": round(self._last - self._began, 3),
      "first_clip_s": round(self._seconds[0], 3),  # compilation included
      "seconds_per_clip": round(statistics.median(later), 4) if later else None,
      "frames_per_s": round(self._rate() * self._samples, 3),
    }
