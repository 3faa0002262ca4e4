"""How alike the motion and the pixels of two videos are, at the size of comparison.

Motion is compared in three ways, each an intersection over union (IoU, 1 where nothing moves in
either): where anything ever moves (spatial), where something moves at the same time, frame by
frame (spatiotemporal), and where how much moves (weighted spatial). Pixels are compared by the
mean square error of each frame, on values from 0 to 1.
"""

from collections.abc import Mapping
import dataclasses

import cv2
from jaxtyping import Bool, UInt8, UInt16
import numpy as np

from videogpt_jax.errors import InputError

Values = Mapping[str, float | list[float]]


@dataclasses.dataclass(frozen=True)
class Reduced:
  """A video at the size of comparison; colours in any order, the same for all videos."""

  frames: UInt8[np.ndarray, "T h w 3"]
  masks: Bool[np.ndarray, "T h w"]

  def __post_init__(self) -> None:
    if self.frames.shape[:-1] != self.masks.shape:
      raise InputError(f"masks of shape {self.masks.shape} do not belong to frames of shape "
                       f"{self.frames.shape}")


def compare(first: Reduced, second: Reduced, generated: Reduced) -> Values:
  """Everything that is recorded of one view.

  Args:
    first: the first take, whose beginning the model was given.
    second: the same experiment again; what it differs by from the first no model can know.
    generated: the model's.

  Returns:
    By name of the official table without the view: `v1` compares generated with first, `v2`
    with second, and `variance` compares the takes. Lists are by frame.

  Raises:
    InputError: the videos differ in length or size.
  """
  pairs = {"v1": (first, generated), "v2": (second, generated), "variance": (first, second)}
  for name, (a, b) in pairs.items():
    if a.frames.shape != b.frames.shape:
      raise InputError(f"videos of {_shape(a)} and {_shape(b)} cannot be compared ({name})")
  often = {id(x): x.masks.sum(0, dtype=np.uint16) for x in (first, second, generated)}
  values: dict[str, float | list[float]] = {}
  for name, (a, b) in pairs.items():
    values[f"mse_{name}"] = square_errors(a.frames, b.frames)
    values[f"spatial_iou_{name}"] = iou(often[id(a)] > 0, often[id(b)] > 0)
    values[f"spatiotemporal_iou_{name}"] = [iou(x, y) for x, y in zip(a.masks, b.masks,
                                                                      strict=True)]
    values[f"weighted_spatial_iou_{name}"] = weighted_iou(often[id(a)], often[id(b)])
  return {official: values[ours] for official, ours in _OFFICIAL.items()}


_OFFICIAL = {  # in the order of the official table
  "v1_mse": "mse_v1",
  "v2_mse": "mse_v2",
  "variance_spatial": "spatial_iou_variance",
  "variance_weighted_spatial": "weighted_spatial_iou_variance",
  "variance_spatiotemporal_iou": "spatiotemporal_iou_variance",
  "variance_mse": "mse_variance",
  "spatiotemporal_iou_v1": "spatiotemporal_iou_v1",
  "spatiotemporal_iou_v2": "spatiotemporal_iou_v2",
  "spatial_iou_v1": "spatial_iou_v1",
  "spatial_iou_v2": "spatial_iou_v2",
  "weighted_spatial_iou_v1": "weighted_spatial_iou_v1",
  "weighted_spatial_iou_v2": "weighted_spatial_iou_v2",
}


def iou(a: Bool[np.ndarray, "*any"], b: Bool[np.ndarray, "*any"]) -> float:
  """Intersection over union of two masks; 1 where both are empty."""
  union = np.count_nonzero(a | b)
  return np.count_nonzero(a & b) / union if union else 1.0


def weighted_iou(a: UInt16[np.ndarray, "h w"], b: UInt16[np.ndarray, "h w"]) -> float:
  """The same of how many frames each pixel is set in; both videos have as many."""
  union = np.maximum(a, b).sum(dtype=np.int64)
  return float(np.minimum(a, b).sum(dtype=np.int64) / union) if union else 1.0


def square_errors(a: UInt8[np.ndarray, "T h w 3"], b: UInt8[np.ndarray, "T h w 3"]
                  ) -> list[float]:
  """Mean square error of every frame, of pixels / 255."""
  scale = 255.0**2 * a[0].size
  return [cv2.norm(x, y, cv2.NORM_L2SQR) / scale for x, y in zip(a, b, strict=True)]


def _shape(video: Reduced) -> str:
  frames, height, width, _ = video.frames.shape
  return f"{frames} frames of {height}x{width} px"
