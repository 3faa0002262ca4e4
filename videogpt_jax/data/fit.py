"""How frames are brought to the sizes that a model is trained on: one rule for all commands.

Shrinking halves by area while the shorter side is at least twice what the longer one shall
be, and does the rest by bicubic interpolation, as the published preprocessing; the centre is
kept. Sizes are height x width, px.
"""

from collections.abc import Mapping
import dataclasses
import math
import re
from typing import Any

from jaxtyping import UInt8
import numpy as np

from videogpt_jax.data import video
from videogpt_jax.errors import InputError

Size = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Fit:
  """Either some sizes, of which a frame takes the one most like it, or a longest side.

  Attributes:
    sizes: (height, width) to choose from, by the least change of proportions.
    longest_side: px, instead of sizes: the proportions stay, and the shorter side is cut to a
      multiple.
    multiple: px, of which both sides are multiples.
  """

  sizes: tuple[Size, ...] = ()
  longest_side: int = 0
  multiple: int = 1

  def __str__(self) -> str:
    if self.longest_side:
      return f"{self.longest_side} px on the longest side, in multiples of {self.multiple}"
    return " or ".join(f"{height}x{width} px" for height, width in self.sizes)

  def size(self, height: int, width: int) -> Size:
    """What a frame of height x width px is brought to."""
    if self.longest_side:
      factor = self.longest_side / max(height, width)
      cut = lambda side: max(1, round(side * factor) // self.multiple) * self.multiple
      return cut(height), cut(width)
    change = lambda size: abs(math.log(size[0] * width / (size[1] * height)))
    return min(self.sizes, key=change)

  def __call__(self, frame: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """A frame at its size."""
    height, width, _ = frame.shape
    return video.resize_and_crop(frame[None], *self.size(height, width))[0]

  def holds(self, size: Size) -> bool:
    """Whether frames of some shape are brought to this size."""
    if self.longest_side:
      return max(size) == self.longest_side and not any(side % self.multiple for side in size)
    return size in self.sizes


def of(data: Mapping[str, Any], cell: int, patch: int = 1) -> Fit:
  """The rule of a configuration's section `data`.

  Args:
    data: height and width, or buckets, or longest_side.
    cell: px of a latent cell.
    patch: cells of a patch of the model.

  Raises:
    InputError: a size that is none, or does not divide into patches.
  """
  multiple, buckets = cell * patch, data.get("buckets", "")
  longest_side = data.get("longest_side", 0)
  if longest_side and buckets:
    raise InputError("data.longest_side and data.buckets exclude each other; set one of them")
  if longest_side:
    if longest_side < 0 or longest_side % multiple:
      raise InputError(f"data.longest_side must be a multiple of {multiple} px (a latent cell of "
                       f"{cell} px times a patch of {patch}), got {longest_side}")
    return Fit(longest_side=longest_side, multiple=multiple)
  sizes = tuple(map(_size, buckets.split(","))) if buckets else ((data["height"], data["width"]),)
  for height, width in sizes:
    if height < 1 or width < 1 or height % multiple or width % multiple:
      raise InputError(f"frames of {height}x{width} px do not divide into latent cells of {cell} px"
                       + (f" and patches of {patch}x{patch} cells" if patch > 1 else "")
                       + "; change data.height and data.width, data.buckets (or world.size)")
  return Fit(sizes=sizes, multiple=multiple)


def _size(text: str) -> Size:
  if not (match := re.fullmatch(r"\s*(\d+)x(\d+)\s*", text)):
    raise InputError(f"data.buckets: {text!r} is no size; sizes are HEIGHTxWIDTH, as in 176x320")
  return int(match[1]), int(match[2])
