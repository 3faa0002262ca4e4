"""Predictions that are measured: of numbers alone.

A codec makes bytes of whatever it is given, and of NaN black frames: a model that has diverged
would be measured as one that predicts darkness.
"""

from collections.abc import Iterator
import contextlib

from jaxtyping import PRNGKeyArray, UInt8
import numpy as np

from videogpt_jax import weights as weights_lib
from videogpt_jax.errors import InputError


class DivergedError(InputError):
  """A model predicts what is no number."""


def continued(weights: weights_lib.Weights, frames: UInt8[np.ndarray, "B h_ H W 3"], count: int, *,
              clip_frames: int | None = None, rng: PRNGKeyArray) -> UInt8[np.ndarray, "B n H W 3"]:
  """The `count` frames after `frames`; see `Weights.continue_video`.

  Raises:
    DivergedError: a predicted latent is NaN or infinite.
  """
  made = []
  for index, clip in enumerate(weights.stream(frames, count, clip_frames=clip_frames, rng=rng)):
    bad = ~np.isfinite(clip.latents).all(axis=tuple(range(1, clip.latents.ndim)))
    if bad.any():
      raise DivergedError(
        f"{weights.path} predicts NaN or infinite numbers for {bad.sum()} of {len(bad)} videos, in "
        f"clip {index + 1}: it has diverged, or its numbers are too large for its compute type; "
        "take an earlier checkpoint, or try --dtype=float32")
    made.append(clip.frames)
  return np.concatenate(made, axis=1)


@contextlib.contextmanager
def of(batch: str) -> Iterator[None]:
  """Says which batch it was in whose prediction a model diverged.

  Raises:
    DivergedError: one was raised inside; now it names the batch.
  """
  try:
    yield
  except DivergedError as error:
    raise DivergedError(f"{batch}: {error}") from error
