"""Predictions that a model has to beat: four of pixels and one of positions.

Every baseline has one signature, `(history, objects, fitted) -> frames`: the first frames
of a video `[h, S, S, 3]`, the looks of its objects (only `constant_velocity` uses them: it
is told what moves, not where) and what `fit` learned from training videos. It returns
the `fitted.frames` frames that follow, uint8 `[G, S, S, 3]`.
"""

from collections.abc import Callable, Sequence
import dataclasses

from jaxtyping import Float, UInt8
import numpy as np

from videogpt_jax.data import world
from videogpt_jax.errors import InputError
from videogpt_jax.metrics import world as detector

SCORED_BY_PIXELS = ("copy_last", "scaled_copy", "history_median", "data_mean")


@dataclasses.dataclass(frozen=True)
class Fitted:
  """What the baselines know beyond a history.

  Attributes:
    settings: the world, for drawing objects.
    frames: how many frames to predict, G.
    mean: the mean frame of the training videos, 0..255.
    scales: for each predicted frame the factor on (last frame - mean) with the least
      square error on the training videos.
  """

  settings: world.Settings
  frames: int
  mean: Float[np.ndarray, "S S 3"]
  scales: Float[np.ndarray, " G"]


Baseline = Callable[[np.ndarray, Sequence[world.Object], Fitted], np.ndarray]


def fit(
  settings: world.Settings, videos: UInt8[np.ndarray, "V T S S 3"], history: int, frames: int
) -> Fitted:
  """Fits the data mean and the scales of `scaled_copy` to training videos.

  Raises:
    InputError: no videos, or shorter ones than `history + frames`.
  """
  if not len(videos) or videos.shape[1] < history + frames or history < 1 or frames < 1:
    raise InputError(
      f"the baselines need training videos of {history} + {frames} frames (at least 1 + 1),"
      f" got videos of shape {videos.shape}"
    )
  mean = videos.mean(axis=(0, 1), dtype=np.float64)
  last = videos[:, history - 1] - mean
  power = np.sum(last**2)
  following = range(history, history + frames)
  products = np.array([np.sum((videos[:, i] - mean) * last) for i in following])
  # Motionless worlds without objects have no power; any scale predicts them.
  scales = products / power if power else np.ones(frames)
  return Fitted(settings, frames, mean.astype(np.float32), scales.astype(np.float32))


def copy_last(
  history: UInt8[np.ndarray, "h S S 3"], objects: Sequence[world.Object], fitted: Fitted
) -> UInt8[np.ndarray, "G S S 3"]:
  """The last frame, again and again."""
  del objects
  return _repeat(history[-1], fitted)


def scaled_copy(
  history: UInt8[np.ndarray, "h S S 3"], objects: Sequence[world.Object], fitted: Fitted
) -> UInt8[np.ndarray, "G S S 3"]:
  """The last frame drawn towards the data mean, by the best factor for each frame."""
  del objects
  scales = fitted.scales[:, None, None, None]
  return _to_bytes(fitted.mean + scales * (history[-1] - fitted.mean))


def history_median(
  history: UInt8[np.ndarray, "h S S 3"], objects: Sequence[world.Object], fitted: Fitted
) -> UInt8[np.ndarray, "G S S 3"]:
  """The median of each pixel over the history."""
  del objects
  return _repeat(_to_bytes(np.median(history, axis=0)), fitted)


def data_mean(
  history: UInt8[np.ndarray, "h S S 3"], objects: Sequence[world.Object], fitted: Fitted
) -> UInt8[np.ndarray, "G S S 3"]:
  """The mean frame of the training videos, whatever the history."""
  del history, objects
  return _repeat(_to_bytes(fitted.mean), fitted)


def constant_velocity(
  history: UInt8[np.ndarray, "h S S 3"], objects: Sequence[world.Object], fitted: Fitted
) -> UInt8[np.ndarray, "G S S 3"]:
  """Every object goes on as between the last two frames that show it, then redrawn.

  Positions (detected) and angles move on linearly; walls stop an object, nothing else
  does. An object seen once stays where it is, one never seen is not drawn.
  """
  hidden = detector.hidden_pixels(fitted.settings)
  positions, found = detector.detect(history, objects, hidden)
  angles = detector.detect_angles(history, objects, positions)
  ahead = np.arange(1, fitted.frames + 1)
  paths = np.full((fitted.frames, len(objects), 2), np.nan, np.float32)
  turns = np.zeros((fitted.frames, len(objects)), np.float32)
  for i, item in enumerate(objects):
    seen = np.flatnonzero(found[:, i])
    if not len(seen):
      continue
    last = seen[-1]
    before = seen[max(len(seen) - 2, 0)]
    span = max(last - before, 1)
    since = ahead + len(history) - 1 - last
    velocity = (positions[last, i] - positions[before, i]) / span
    spin = detector.least_turn(item, angles[last, i] - angles[before, i]) / span
    inner = detector.inner_radius(item)
    path = positions[last, i] + since[:, None] * velocity
    paths[:, i] = np.clip(path, inner, fitted.settings.size - inner)
    turns[:, i] = angles[last, i] + since * spin
  frames, _ = world.render(fitted.settings, objects, paths, turns)
  return frames


BASELINES: dict[str, Baseline] = {
  "copy_last": copy_last,
  "scaled_copy": scaled_copy,
  "history_median": history_median,
  "data_mean": data_mean,
  "constant_velocity": constant_velocity,
}


def _repeat(frame: UInt8[np.ndarray, "S S 3"], fitted: Fitted) -> UInt8[np.ndarray, "G S S 3"]:
  return np.repeat(frame[None], fitted.frames, axis=0)


def _to_bytes(values: Float[np.ndarray, "*any"]) -> UInt8[np.ndarray, "*any"]:
  return np.clip(np.rint(values), 0, 255).astype(np.uint8)
