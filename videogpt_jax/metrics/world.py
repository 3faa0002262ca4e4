"""Where the objects of a simulated world are, read off its frames.

A pixel of such a world is a mixture: background plus non-negative shares of the objects'
colours. `detect` solves for the shares, so that each object becomes an image of its own
coverage, whatever it touches, and follows that image's centre of mass within a window of
the object's size. The same works on blurred and noisy frames, which models make.

Units and conventions as in `videogpt_jax.data.world`: pixels, x to the right and y down,
the centre of the pixel in row i, column j at (j + 0.5, i + 0.5). Axes: T frames, O
objects, S side of a frame.
"""

from collections.abc import Sequence
import itertools
import math

from jaxtyping import Bool, Float, UInt8
import numpy as np
from scipy import ndimage

from videogpt_jax.data import world
from videogpt_jax.errors import InputError

_SIDES = {"box": 4, "triangle": 3}

LOST = 8.0  # px, what a lost object counts as, and the most any error counts as

_FOREGROUND = 14.0  # least distance from the background's colour, of 255 per channel
_SECOND_COLOUR = 32.0  # of 255 per channel; two objects must explain a pixel so much better
_MARGIN = 2.0  # px that an object's window reaches beyond its radius
_STEPS = 12  # of the window towards the centre of mass; the last ones move it hardly at all
_LEAST_MASS = 0.25  # of an object's area; with less of its colour it is lost
_CUT = 0.03  # share of an object's area that may be missing: whole objects render so


def detect(
  frames: UInt8[np.ndarray, "T S S 3"],
  objects: Sequence[world.Object],
  hidden: Bool[np.ndarray, "S S"] | None = None,
) -> tuple[Float[np.ndarray, "T O 2"], Bool[np.ndarray, "T O"]]:
  """Positions of `objects` (px) in every frame by itself, and which ones were found.

  Sub-pixel: on true frames the mean error is about 0.02 px while the whole object is in
  view. An object cut by the frame's border, or by what `hidden` marks (the occluder), is
  placed where the visible part of a disc of its area would have that centre of mass.

  Args:
    frames: true or predicted frames.
    objects: their looks; every colour must differ from the others.
    hidden: pixels in which no object can be seen.

  Returns:
    positions: float32; NaN where an object is lost.
    found: false where less than a quarter of the object's area shows its colour.

  Raises:
    InputError: frames that are not square uint8 RGB, or objects of the same colour.
  """
  shares = _shares(frames, objects)
  visible = np.ones(frames.shape[1:3], bool) if hidden is None else ~hidden
  shares *= visible
  positions = np.empty((len(frames), len(objects), 2), np.float32)
  found = np.empty((len(frames), len(objects)), bool)
  for i, item in enumerate(objects):
    positions[:, i], mass = _locate(shares[:, i], visible, item)
    found[:, i] = mass >= _LEAST_MASS * area(item)
  positions[~found] = np.nan
  return positions, found


def detect_angles(
  frames: UInt8[np.ndarray, "T S S 3"],
  objects: Sequence[world.Object],
  positions: Float[np.ndarray, "T O 2"],
) -> Float[np.ndarray, "T O"]:
  """Angles (radians) of `objects` at known `positions`; a polygon's up to its symmetry.

  A polygon of k sides has its angle in the phase of the k-th complex moment of its
  coverage. Balls, and objects whose position is NaN, get 0.

  Raises:
    InputError: as `detect`.
  """
  shares = _shares(frames, objects)
  centres = np.arange(frames.shape[1]) + 0.5
  angles = np.zeros(positions.shape[:2], np.float32)
  for i, item in enumerate(objects):
    sides = _SIDES.get(item.shape)
    if sides is None:
      continue
    x, y = np.nan_to_num(positions[:, i]).astype(np.float64).T
    arm = (centres - x[:, None])[:, None, :] + 1j * (centres - y[:, None])[:, :, None]
    near = np.abs(arm) < item.radius + _MARGIN
    moment = np.sum(np.where(near, shares[:, i], 0.0) * arm**sides, axis=(1, 2))
    # Corners, where the moment points, lie half a turn of the symmetry from the sides.
    angles[:, i] = (np.angle(moment) - math.pi) / sides % (2 * math.pi / sides)
  return np.where(np.isnan(positions[..., 0]), np.float32(0), angles)


def position_error(
  predicted: Float[np.ndarray, "*lead 2"],
  found: Bool[np.ndarray, "*lead"],
  truth: Float[np.ndarray, "*lead 2"],
  lost: float = LOST,
) -> Float[np.ndarray, "*lead"]:
  """Distance (px) from the true positions, capped at `lost`, which lost objects get."""
  distance = np.linalg.norm(predicted.astype(np.float64) - truth, axis=-1)
  return np.where(found & (distance < lost), distance, lost)


def area(item: world.Object) -> float:
  """Area of an object, px^2."""
  if item.shape == "ball":
    return math.pi * item.radius**2
  sides = _SIDES[item.shape]
  return 0.5 * sides * item.radius**2 * math.sin(2 * math.pi / sides)


def inner_radius(item: world.Object) -> float:
  """Radius (px) of the greatest circle inside an object."""
  if item.shape == "ball":
    return item.radius
  return item.radius * math.cos(math.pi / _SIDES[item.shape])


def least_turn(item: world.Object, angle: float) -> float:
  """The smallest turn (radians) that looks like a turn by `angle`; 0 for balls."""
  if item.shape == "ball":
    return 0.0
  period = 2 * math.pi / _SIDES[item.shape]
  return (angle + period / 2) % period - period / 2


def hidden_pixels(settings: world.Settings) -> Bool[np.ndarray, "S S"]:
  """The pixels in which no object can be seen: what stands before an empty background."""
  nothing = np.zeros((1, 0))
  empty, _ = world.render(settings, (), nothing[..., None].repeat(2, axis=-1), nothing)
  return np.any(empty[0] != np.array(world.BACKGROUND, np.uint8), axis=-1)


def _shares(
  frames: UInt8[np.ndarray, "T S S 3"], objects: Sequence[world.Object]
) -> Float[np.ndarray, "T O S S"]:
  """How much of each pixel each object covers, 0..1, by non-negative unmixing.

  The best of all mixtures of background and at most two objects; more do not meet in a
  pixel, and three colour channels could not tell them apart.
  """
  shape = frames.shape
  if frames.dtype != np.uint8 or frames.ndim != 4 or shape[1:] != (shape[1], shape[1], 3):
    raise InputError(f"frames must be uint8 [T, S, S, 3], got {frames.dtype} of shape {shape}")
  if len({item.rgb for item in objects}) < len(objects):
    raise InputError("objects of the same colour cannot be told apart by the detector")
  excess = frames.astype(np.float32) - np.asarray(world.BACKGROUND, np.float32)
  lit = np.sum(excess**2, axis=-1) > _FOREGROUND**2
  pixels = excess[lit]
  colours = np.array([item.rgb for item in objects], np.float32).reshape(-1, 3)
  colours -= np.asarray(world.BACKGROUND, np.float32)
  best = np.full(len(pixels), np.inf, np.float32)
  mixture = np.zeros((len(pixels), len(objects)), np.float32)
  for count in (1, 2):
    for chosen in itertools.combinations(range(len(objects)), count):
      basis = colours[list(chosen)]
      weights = pixels @ np.linalg.pinv(basis)
      misfit = np.sum((pixels - weights @ basis) ** 2, axis=-1)
      misfit += (count - 1) * _SECOND_COLOUR**2
      better = (misfit < best) & np.all(weights >= 0, axis=-1)
      best[better] = misfit[better]
      mixture[better] = 0.0
      mixture[np.ix_(better, chosen)] = weights[better]
  shares = np.zeros((*frames.shape[:3], len(objects)), np.float32)
  shares[lit] = np.minimum(mixture, 1.0)
  return np.ascontiguousarray(np.moveaxis(shares, -1, 1))


def _locate(
  share: Float[np.ndarray, "T S S"], visible: Bool[np.ndarray, "S S"], item: world.Object
) -> tuple[Float[np.ndarray, "T 2"], Float[np.ndarray, " T"]]:
  """Centre (x, y) of one object's coverage, and the mass around it, px^2."""
  reach = item.radius + _MARGIN
  smooth = ndimage.gaussian_filter(
    share, (0.0, item.radius / 2, item.radius / 2), mode="constant", truncate=2.0
  )
  peak = smooth.reshape(len(share), -1).argmax(axis=1)
  rows, columns = np.unravel_index(peak, share.shape[1:])
  # Only a square around the peak is looked at; the padding lets it reach over the border.
  half = math.ceil(reach) + 3
  padded = np.pad(share, ((0, 0), (half, half), (half, half)))
  seen = np.pad(visible, half)
  offset = np.arange(-half, half + 1)
  window = (rows[:, None, None] + half + offset[:, None], columns[:, None, None] + half + offset)
  local = padded[(np.arange(len(share))[:, None, None], *window)].astype(np.float64)
  in_view = seen[window]
  centre = np.zeros((len(share), 2))
  mass = np.zeros(len(share))
  for _ in range(_STEPS):
    apart = np.hypot(offset - centre[:, 0, None, None], offset[:, None] - centre[:, 1, None, None])
    weighted = local * np.clip(reach + 0.5 - apart, 0.0, 1.0)
    mass = weighted.sum(axis=(1, 2))
    correction = _cut_offset(apart, in_view, mass, centre, item, offset)
    centre = np.clip(_first_moment(weighted, offset) + correction, -half, half)
  origin = np.stack([columns, rows], axis=-1) + 0.5
  return (origin + centre).astype(np.float32), mass


def _first_moment(
  weight: Float[np.ndarray, "T k k"], offset: Float[np.ndarray, " k"]
) -> Float[np.ndarray, "T 2"]:
  total = np.maximum(weight.sum(axis=(1, 2)), 1e-6)
  x = (weight.sum(axis=1) * offset).sum(axis=1) / total
  y = (weight.sum(axis=2) * offset).sum(axis=1) / total
  return np.stack([x, y], axis=-1)


def _cut_offset(
  apart: Float[np.ndarray, "T k k"],
  in_view: Bool[np.ndarray, "T k k"],
  mass: Float[np.ndarray, " T"],
  centre: Float[np.ndarray, "T 2"],
  item: world.Object,
  offset: Float[np.ndarray, " k"],
) -> Float[np.ndarray, "T 2"]:
  """From the visible part's centre of mass to the object's, for objects cut off in part.

  A disc of the object's area stands for it. The disc may be cut where a flat side of the
  object is not, so the offset is weighted with the share of the disc's missing area that
  the object really misses.
  """
  disc = np.clip(math.sqrt(area(item) / math.pi) + 0.5 - apart, 0.0, 1.0)
  part = disc * in_view
  missing = disc.sum(axis=(1, 2)) - part.sum(axis=(1, 2))
  lacking = np.maximum(area(item) - mass, 0.0)
  weight = np.minimum(lacking / np.maximum(missing, 1e-6), 1.0) * (missing > 0)
  weight *= np.clip(lacking / (_CUT * area(item)) - 1.0, 0.0, 1.0)
  return weight[:, None] * (centre - _first_moment(part, offset))
