"""What was compared, to look at: small videos of the truth, the prediction and both motions.

They are H.264 that browsers play, whatever the generated videos are: those may be MPEG-4 Part 2,
or RGB without loss, or lie where a page that is moved does not find them.
"""

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
TRUTH, PREDICTION, MOTION = NAMES = ("truth", "prediction", "motion")


def write(folder: pathlib.Path, name: str, first: Reduced, generated: Reduced, fps: float) -> None:
  """Writes `NAME_truth.mp4`, `NAME_prediction.mp4` and `NAME_motion.mp4`.

  All have one size: the prediction is stretched as it is to be compared. Motion is blue where it
  is true, orange where it is generated, light where it is both.

  Args:
    folder: is there.
    name: of the view.
    first: the first take, blue channel first.
    generated: the model's video, blue channel first.
    fps: frames a second.

  Raises:
    InputError: they cannot be written.
  """
  truth, prediction = (np.stack([_small(frame) for frame in reduced.frames])[..., ::-1]
                       for reduced in (first, generated))
  for what, frames in ((TRUTH, truth), (PREDICTION, prediction),
                       (MOTION, _motion(truth, first, generated))):
    video.write_mp4(path(folder, name, what), frames, fps)


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
