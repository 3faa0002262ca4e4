"""What was compared, to look at: small videos of the truth and of both motions."""

import os
import pathlib

from jaxtyping import UInt8
import numpy as np

from videogpt_jax.data import video
from videogpt_jax.metrics.physics_iq import comparison
from videogpt_jax.metrics.physics_iq.measures import Reduced

_SIDE = 320  # px, the longer one, at most
_TRUE, _GENERATED = (60, 130, 230), (235, 130, 40)  # where both move they add up
_DARK = 0.35  # of the frame, beside motion
NAMES = ("truth", "motion")


def write(folder: pathlib.Path, name: str, first: Reduced, generated: Reduced, fps: float) -> None:
  """Writes `NAME_truth.mp4` and `NAME_motion.mp4`: true motion blue, generated orange, both light.

  Args:
    folder: is there.
    name: of the view.
    first: the first take, blue channel first.
    generated: the model's video.
    fps: frames a second.

  Raises:
    InputError: they cannot be written.
  """
  truth = np.stack([_small(frame) for frame in first.frames])[..., ::-1]
  video.write_mp4(path(folder, name, "truth"), truth, fps)
  video.write_mp4(path(folder, name, "motion"), _motion(truth, first, generated), fps)


def path(folder: str | os.PathLike[str], name: str, what: str) -> pathlib.Path:
  """The file of one of `NAMES` of a view."""
  return pathlib.Path(folder) / f"{name}_{what}.mp4"


def _motion(frames: UInt8[np.ndarray, "T h w 3"], first: Reduced, generated: Reduced
            ) -> UInt8[np.ndarray, "T h w 3"]:
  colours = np.zeros((*first.masks.shape, 3), np.int16)
  for masks, colour in ((first.masks, _TRUE), (generated.masks, _GENERATED)):
    colours[masks] += np.array(colour, np.int16)
  colours = np.minimum(colours, 255).astype(np.uint8)
  shown = np.stack([_small(frame) for frame in colours])
  return np.where(shown.any(-1, keepdims=True), shown, (_DARK * frames).astype(np.uint8))


def _small(frame: np.ndarray) -> np.ndarray:
  height, width = frame.shape[:2]
  factor = min(1.0, _SIDE / max(height, width))
  return comparison.resize(frame, (max(2, round(height * factor) // 2 * 2),
                                   max(2, round(width * factor) // 2 * 2)))
