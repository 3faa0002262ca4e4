"""The size and the rate at which videos are compared.

Every frame and mask is stretched to a quarter of the first take's height and width: bilinear,
without antialiasing, rounded to bytes.
"""

from collections.abc import Iterable, Iterator

import cv2
from jaxtyping import Bool, UInt8
import numpy as np

from videogpt_jax.errors import InputError

Size = tuple[int, int]
_QUARTER = 4
_SET = 127  # a resized mask is set above it


def size(height: int, width: int) -> Size:
  """Height and width at which videos are compared with a first take of this size, px.

  Raises:
    InputError: a side is under 4 px.
  """
  if min(height, width) < _QUARTER:
    raise InputError(f"videos of {height}x{width} px are too small to be compared")
  return height // _QUARTER, width // _QUARTER


def resize(frame: UInt8[np.ndarray, "H W *c"], to: Size) -> UInt8[np.ndarray, "h w *c"]:
  """A frame or a mask of 0 and 255 at height x width `to`; proportions are not kept."""
  return cv2.resize(frame, (to[1], to[0]), interpolation=cv2.INTER_LINEAR)


def resize_mask(mask: UInt8[np.ndarray, "H W"], to: Size) -> Bool[np.ndarray, "h w"]:
  """A mask of 0 and 255, resized; a pixel exactly half set is set."""
  return resize(mask, to) > _SET


def change_rate(frames: Iterable[UInt8[np.ndarray, "H W 3"]], count: int, wanted: int
                ) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
  """Blends frames to another number of them over the same time; both ends stay.

  Frame j of the result lies at j (count - 1) / (wanted - 1) among the given ones, blended
  linearly from its neighbours and cut to whole numbers, as the public code does.

  Args:
    frames: read once, two are held at a time.
    count: how many of them are taken.
    wanted: frames of the result.

  Raises:
    InputError: there are fewer.
  """
  source = iter(frames)
  held: list[np.ndarray] = []  # frames `reached - len(held) + 1` to `reached`
  reached = -1
  for j in range(wanted):
    place = j * (count - 1) / max(wanted - 1, 1)
    index = int(place)
    part = place - index
    while reached < min(index + 1, count - 1):
      if (frame := next(source, None)) is None:
        raise InputError(f"{reached + 1} frames, where {count} are needed")
      held, reached = [*held[-1:], frame], reached + 1
    first, second = held[index - reached - 1], held[-1]
    blend = np.float32(1 - part) * first + np.float32(part) * second  # float32: as published
    yield blend.astype(np.uint8)
