"""Cuts between scenes: where the picture changes at once.

The measure is the mean absolute change of hue, saturation and value, each of 255, between
neighbouring frames; hue is a circle.
"""

from jaxtyping import Float, UInt8
import numpy as np
from PIL import Image

_SIDE = 64  # px, to which frames are shrunk first: fine motion is no cut


def changes(frames: UInt8[np.ndarray, "T H W 3"]) -> Float[np.ndarray, " T-1"]:
  """The change from every frame to the next, 0..255."""
  small = np.stack([_hsv(frame) for frame in frames])
  difference = np.abs(np.diff(small, axis=0))
  difference[..., 0] = np.minimum(difference[..., 0], 256 - difference[..., 0])
  return difference.mean((1, 2, 3))


def split(frames: UInt8[np.ndarray, "T H W 3"], cut: float
          ) -> list[UInt8[np.ndarray, "t H W 3"]]:
  """The scenes of a video: a change of `cut` or more begins a new one."""
  if len(frames) < 2:
    return [frames]
  return np.split(frames, np.flatnonzero(changes(frames) >= cut) + 1)


def _hsv(frame: UInt8[np.ndarray, "H W 3"]) -> Float[np.ndarray, "h w 3"]:
  picture = Image.fromarray(frame).resize((_SIDE, _SIDE), Image.Resampling.BOX)
  return np.asarray(picture.convert("HSV"), np.float32)
