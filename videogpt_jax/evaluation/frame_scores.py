"""Predicted frames against the true ones, by how far ahead they are: MSE, PSNR, SSIM, LPIPS.

Axes: B videos, G predicted frames.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import hashlib
from typing import Any

from jaxtyping import Float, UInt8
import numpy as np

from videogpt_jax.errors import InputError
from videogpt_jax.evaluation import report as report_lib
from videogpt_jax.metrics import frames as frame_metrics
from videogpt_jax.metrics import lpips as lpips_lib
from videogpt_jax.metrics.frames import LABELS


class Comparison:
  """Compares frames; of LPIPS only if there are its weights.

  Attributes:
    identity: JSON-able, what decides the values.
  """

  def __init__(self, lpips: Sequence[str] = ()) -> None:
    """Reads the weights of LPIPS.

    Args:
      lpips: the files `lpips.Lpips` reads (network, channels' weights); empty: it is left out.

    Raises:
      InputError: see `lpips.Lpips`.
    """
    self._lpips = lpips_lib.Lpips(*lpips) if lpips else None
    metrics = [key for key in LABELS if lpips or key != "lpips"]
    self.identity: dict[str, Any] = {"metrics": metrics,
                                     "lpips": [_digest(path) for path in lpips]}

  def check(self, size: tuple[int, int]) -> None:
    """Raises `InputError` if frames of a height and width, px, are too small for LPIPS."""
    if self._lpips is not None:
      lpips_lib.check(size)

  def __call__(self, predicted: UInt8[np.ndarray, "B G H W 3"],
               truth: UInt8[np.ndarray, "B G H W 3"]) -> dict[str, Float[np.ndarray, "B G"]]:
    """By metric; equal frames count as `frames.EQUAL_PSNR` dB.

    SSIM is left out of frames that are smaller than its window.

    Raises:
      InputError: the shapes differ, frames are not uint8 RGB, or too small for LPIPS.
    """
    error = frame_metrics.mse(predicted, truth)
    found = {"mse": error, "psnr": np.minimum(frame_metrics.psnr_from_mse(error),
                                              frame_metrics.EQUAL_PSNR)}
    if min(truth.shape[2:4]) >= frame_metrics.SSIM_WINDOW:
      found["ssim"] = frame_metrics.ssim(predicted, truth)
    return found if self._lpips is None else found | {"lpips": self._lpips(predicted, truth)}


@dataclasses.dataclass(frozen=True)
class Means:
  """Of the predictions of a set.

  Attributes:
    videos: how many.
    by_frame: by metric, over videos.
    by_video: by metric, over frames, of some videos by their number.
  """

  videos: int
  by_frame: Mapping[str, Float[np.ndarray, " G"]]
  by_video: Mapping[int, Mapping[str, float]]


def merge(parts: Iterable[Mapping[str, Any]], shown: int) -> Means:
  """The means over parts of a set, one after the other.

  Args:
    parts: `rows`, the numbers of some videos, and by metric their values, [B, G].
    shown: videos with smaller numbers are kept one by one.
  """
  videos = 0
  totals: dict[str, Any] = {}
  by_video: dict[int, dict[str, float]] = {}
  for part in parts:
    videos += len(part["rows"])
    for key in LABELS.keys() & part.keys():
      values = np.asarray(part[key], np.float64)
      totals[key] = totals.get(key, 0.0) + values.sum(axis=0)
      for row, of_video in zip(part["rows"], values, strict=True):
        if row < shown:
          by_video.setdefault(row, {})[key] = float(of_video.mean())
  return Means(videos, {key: totals[key] / videos for key in LABELS if key in totals}, by_video)


def of_video(found: Mapping[str, Means], row: int) -> dict[str, float]:
  """By the metrics' names, means over sets, of a video that was kept."""
  kept = [means.by_video[row] for means in found.values() if row in means.by_video]
  return {LABELS[key].name: float(np.mean([values[key] for values in kept]))
          for key in LABELS if kept and key in kept[0]}


def tables(found: Mapping[str, Means], note: str) -> list[report_lib.Table]:
  """Of sets by name: all frames together; and by metric, by predicted frame.

  None is marked as best: the sets are of one model, by seed.
  """
  keys = list(next(iter(found.values())).by_frame)
  whole = {name: [float(means.by_frame[key].mean()) for key in keys]
           for name, means in found.items()}
  made = [report_lib.Table(
    "Predicted frames against the true ones, means", ["set", *(LABELS[key].name for key in keys)],
    [[name, *values] for name, values in whole.items()], note)]
  for i, key in enumerate(keys):
    by_frame = np.stack([means.by_frame[key] for means in found.values()], axis=1).tolist()
    made.append(report_lib.Table(
      f"{LABELS[key].title}, by predicted frame", ["frame", *found],
      [*([str(frame), *values] for frame, values in enumerate(by_frame, 1)),
       ["mean", *(values[i] for values in whole.values())]]))
  return made


def plots(found: Mapping[str, Means]) -> list[report_lib.Plot]:
  """By metric, a curve of every set over the predicted frames."""
  return [report_lib.Plot(
    f"{LABELS[key].title}, by predicted frame", list(range(1, len(values) + 1)),
    {name: means.by_frame[key].tolist() for name, means in found.items()}, "predicted frame",
    LABELS[key].name) for key, values in next(iter(found.values())).by_frame.items()]


def _digest(path: str) -> str:
  try:
    with open(path, "rb") as file:
      return hashlib.file_digest(file, "sha256").hexdigest()[:16]
  except OSError as error:
    raise InputError(f"{path}: {error.strerror or error}") from error
