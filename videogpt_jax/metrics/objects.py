"""Whether the objects of a simulated world keep their places, identities and energy.

Colours tell objects apart: an object's identity is its colour, its place that of its colour.
Axes: G frames, O objects.
"""

import dataclasses

from jaxtyping import Bool, Float, UInt8
import numpy as np

from videogpt_jax.data import world
from videogpt_jax.metrics import world as detector

_VISIBLE = 0.5  # share of an object's area that the truth must show for it to count


@dataclasses.dataclass(frozen=True)
class Objects:
  """What became of a video's objects, by predicted frame; only those in view in the truth count.

  Attributes:
    position: mean error of their places, px, lost ones counting 8; NaN where none is in view.
    mistaken: share of them in whose place another one stands; NaN likewise.
    vanished: share of them that are nowhere, and no other one in their place; NaN likewise.
    kinetic, kinetic_true: kinetic energy of those found in this frame and the one before,
      predicted and true, px^4 / frame^2 (a mass is an area).
    mechanical, mechanical_true: with the energy of their heights under gravity.
    followed: share of them of which these energies are; NaN likewise.
  """

  position: Float[np.ndarray, " G"]
  mistaken: Float[np.ndarray, " G"]
  vanished: Float[np.ndarray, " G"]
  kinetic: Float[np.ndarray, " G"]
  kinetic_true: Float[np.ndarray, " G"]
  mechanical: Float[np.ndarray, " G"]
  mechanical_true: Float[np.ndarray, " G"]
  followed: Float[np.ndarray, " G"]


def follow(settings: world.Settings, predicted: UInt8[np.ndarray, "G S S 3"], sample: world.Sample,
           history: int, hidden: Bool[np.ndarray, "S S"] | None = None) -> Objects:
  """Finds the objects of `sample` in the predicted frames after its first `history`.

  Args:
    settings: the world.
    predicted: frames.
    sample: the truth.
    history: frames given, at least 1.
    hidden: as in `detector.detect`.
  """
  truth = sample.positions[history:]
  positions, found = detector.detect(predicted, sample.objects, hidden)
  areas = np.array([detector.area(item) for item in sample.objects])
  in_view = sample.masks[history:].sum(axis=(2, 3)) >= _VISIBLE * areas
  error = detector.position_error(positions, found, truth)
  mistaken, vanished = identities(positions, found, truth,
                                  np.array([item.radius for item in sample.objects]))
  known = found & in_view
  known[1:] &= known[:-1]
  start = sample.positions[history - 1:history]
  energies = []
  for places in (positions, truth):
    path = np.concatenate([start, places]).astype(np.float64)
    speed = np.sum(np.diff(path, axis=0) ** 2, axis=-1)
    height = settings.size - places[..., 1].astype(np.float64)
    kinetic = np.where(known, 0.5 * areas * speed, 0.0)
    potential = np.where(known, areas * settings.gravity * height, 0.0)
    energies.append((kinetic.sum(axis=1), (kinetic + potential).sum(axis=1)))
  (kinetic, mechanical), (kinetic_true, mechanical_true) = energies
  share = lambda values: mean(np.where(in_view, values, np.nan), axis=1)
  return Objects(share(error), share(mistaken), share(vanished), kinetic, kinetic_true, mechanical,
                 mechanical_true, share(known))


def identities(
  positions: Float[np.ndarray, "G O 2"],
  found: Bool[np.ndarray, "G O"],
  truth: Float[np.ndarray, "G O 2"],
  radii: Float[np.ndarray, " O"],
) -> tuple[Bool[np.ndarray, "G O"], Bool[np.ndarray, "G O"]]:
  """Which objects are mistaken for another, and which have vanished.

  An object is in its place if it is found within its radius of where it truly is. It is
  mistaken if it is not, but another one is there that is not in a place of its own either:
  two that swapped are both mistaken, two that meet are none. It has vanished if it is not
  found anywhere and nobody stands in its place. One that is merely elsewhere has kept its
  identity; that is an error of position.

  Args:
    positions, found: as `detector.detect` gives them.
    truth: true positions.
    radii: of the objects, px.
  """
  apart = np.linalg.norm(truth[:, :, None] - positions[:, None].astype(np.float64), axis=-1)
  near = (apart <= radii[:, None]) & found[:, None]  # [G, place, who]
  home = np.diagonal(near, axis1=1, axis2=2)
  strangers = near & ~home[:, None]
  mistaken = ~home & strangers.any(axis=2)
  return mistaken, ~found & ~mistaken


def mean(values: Float[np.ndarray, "*any"], axis: int) -> Float[np.ndarray, "*rest"]:
  """Mean of the numbers along `axis`, NaN where there are none."""
  known = np.isfinite(values)
  total = np.where(known, values, 0.0).sum(axis=axis)
  count = known.sum(axis=axis)
  return np.where(count > 0, total / np.maximum(count, 1), np.nan)
