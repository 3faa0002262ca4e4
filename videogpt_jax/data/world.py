"""A simulated 2-D physics world: coloured balls, boxes and triangles in a walled square.

The same settings and seed give the same bits. Nothing that moves an object is hidden:
mass follows from the visible area, restitution from the visible shape, and by default
nothing has friction (an evenly coloured ball would hide its spin); so a few frames
determine the rest of a video.

Units are pixels and frames. The frame spans [0, size] in x (to the right) and y (down);
the pixel in row i, column j has its centre at (x, y) = (j + 0.5, i + 0.5). Axes: T
frames, O objects, S = size.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import math
import os
import pathlib

from jaxtyping import Bool, Float, UInt8
import numpy as np
import pymunk

from videogpt_jax.data import video
from videogpt_jax.errors import InputError

SHAPES = ("ball", "box", "triangle")
_SIDES = {"box": 4, "triangle": 3}

BACKGROUND = (18, 20, 28)
OCCLUDER = (110, 110, 116)
COLOURS = {
    "red": (232, 52, 48),
    "green": (52, 200, 72),
    "blue": (60, 96, 244),
    "yellow": (244, 208, 52),
    "cyan": (52, 208, 228),
    "magenta": (224, 72, 212),
}

# The class label of a video: what happened in it.
LABELS = ("free flight", "wall bounce", "collision", "wall bounce and collision")
_DEEDS = (
    "never touching anything",
    "bouncing off the walls",
    "hitting each other",
    "bouncing off the walls and hitting each other",
)

_SUBSTEPS = 8  # physics steps per frame: an object then moves well under a pixel per step
_WALL = 16.0  # px, half the thickness of a wall; all of it lies outside the frame
_GAP = 1.0  # px, least distance to walls and other objects at the start
_PLACEMENTS = 1000  # attempts at placing the objects before the world counts as full
_OBJECT_TYPE, _WALL_TYPE = 1, 2  # pymunk collision types


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a world is like; the fields of the configuration's section `world`.

  Raises `InputError` when a value has the wrong type or makes no world.

  Attributes:
    size: side of the square frame, px.
    frames: frames of a video, T.
    fps: frames per second, for playback only: physics counts in frames.
    objects: least and greatest number of objects.
    radius: least and greatest radius of the circle around an object, px.
    speed: least and greatest initial speed, px per frame, in a random direction.
    spin: greatest initial rotation, radians per frame.
    gravity: acceleration downwards, px per frame^2.
    shapes: kinds of objects to draw from, of `SHAPES`.
    elasticity: restitution of an object against a wall: one for all, or one for each of
      `shapes`; between two objects it is the product of theirs.
    friction: coefficient of friction of all contacts.
    occluder: a fixed grey bar hides what passes behind the middle of the frame.
  """

  size: int = 32
  frames: int = 8
  fps: float = 8.0
  objects: tuple[int, int] = (1, 2)
  radius: tuple[float, float] = (4.0, 6.0)
  speed: tuple[float, float] = (1.0, 2.0)
  spin: float = 0.0
  gravity: float = 0.0
  shapes: tuple[str, ...] = SHAPES
  elasticity: tuple[float, ...] = (1.0,)
  friction: float = 0.0
  occluder: bool = False

  def __post_init__(self) -> None:
    for name in ("objects", "radius", "speed", "shapes", "elasticity"):
      value = getattr(self, name)
      if not isinstance(value, (tuple, list)):
        raise InputError(f"world.{name} must be a tuple, got {value!r}")
      object.__setattr__(self, name, tuple(value))
    _check_integer("size", self.size, least=8)
    _check_integer("frames", self.frames, least=1)
    _check_number("fps", self.fps, 0.0, math.inf, open_least=True)
    _check_range("objects", self.objects, 1, len(COLOURS))
    for count in self.objects:
      _check_integer("objects", count, least=1)
    _check_range("radius", self.radius, 1.0, self.size / 2 - _GAP)
    _check_range("speed", self.speed, 0.0, math.inf)
    for name in ("spin", "gravity", "friction"):
      _check_number(name, getattr(self, name), 0.0, math.inf)
    unknown = [shape for shape in self.shapes if shape not in SHAPES]
    if unknown or not self.shapes:
      raise InputError(f"world.shapes must be some of {', '.join(SHAPES)}, got {self.shapes}")
    if len(self.elasticity) not in (1, len(self.shapes)):
      raise InputError(
          f"world.elasticity must hold one value, or one for each of the {len(self.shapes)}"
          f" world.shapes, got {len(self.elasticity)}"
      )
    for value in self.elasticity:
      _check_number("elasticity", value, 0.0, 1.0)
    if not isinstance(self.occluder, bool):
      raise InputError(f"world.occluder must be True or False, got {self.occluder!r}")


@dataclasses.dataclass(frozen=True)
class Object:
  """What one object looks like, which is also all there is to know about it.

  `radius` (px) is that of the circle around the object; `rgb` is its colour as bytes.
  """

  shape: str
  colour: str
  rgb: tuple[int, int, int]
  radius: float


@dataclasses.dataclass(frozen=True)
class State:
  """Where the objects of a video are, at one or more instants (leading axes `...`).

  positions: px, x and y. angles: radians. velocities: px per frame. spins: radians per
  frame.
  """

  positions: Float[np.ndarray, "... O 2"]
  angles: Float[np.ndarray, "... O"]
  velocities: Float[np.ndarray, "... O 2"]
  spins: Float[np.ndarray, "... O"]


@dataclasses.dataclass(frozen=True)
class Sample:
  """One video and everything that is known about it; see `State` for the units.

  `masks` marks the pixels at least half covered by an object and not hidden by another
  one or the occluder. `label` indexes `LABELS`.
  """

  frames: UInt8[np.ndarray, "T S S 3"]
  positions: Float[np.ndarray, "T O 2"]
  angles: Float[np.ndarray, "T O"]
  velocities: Float[np.ndarray, "T O 2"]
  spins: Float[np.ndarray, "T O"]
  masks: Bool[np.ndarray, "T O S S"]
  objects: tuple[Object, ...]
  label: int
  caption: str


def train_seed(index: int) -> int:
  """The seed of training video `index`; no held-out video has it."""
  return 2 * _checked_index(index)


def held_out_seed(index: int) -> int:
  """The seed of held-out video `index`; no training video has it."""
  return 2 * _checked_index(index) + 1


def simulate(settings: Settings, seed: int) -> Sample:
  """Simulates and renders the video of `seed`, the same bits at every call.

  Raises:
    InputError: a negative seed, or objects so large or many that they do not fit.
  """
  rng = np.random.default_rng(_checked_index(seed))
  objects = _draw_objects(settings, rng)
  start = _draw_state(settings, objects, rng)
  states, bounced, collided = trajectories(settings, objects, start)
  frames, masks = render(settings, objects, states.positions, states.angles)
  label = int(bounced) + 2 * int(collided)
  return Sample(
      frames=frames,
      positions=states.positions,
      angles=states.angles,
      velocities=states.velocities,
      spins=states.spins,
      masks=masks,
      objects=objects,
      label=label,
      caption=_caption(settings, objects, label),
  )


def trajectories(
    settings: Settings, objects: Sequence[Object], start: State
) -> tuple[State, bool, bool]:
  """Lets the objects move for `settings.frames` frames from `start` (no leading axis).

  Returns the states at every frame (float32, leading axis T, the first one is `start`),
  whether a wall was touched, and whether two objects touched.
  """
  space, bodies = _build_space(settings, objects, start)
  touched = {"wall": False, "object": False}

  def on_wall(*_) -> None:
    touched["wall"] = True

  def on_object(*_) -> None:
    touched["object"] = True

  space.on_collision(_OBJECT_TYPE, _WALL_TYPE, begin=on_wall)
  space.on_collision(_OBJECT_TYPE, _OBJECT_TYPE, begin=on_object)
  rows = np.empty((settings.frames, len(objects), 6), np.float32)
  for frame in range(settings.frames):
    if frame:
      for _ in range(_SUBSTEPS):
        space.step(1.0 / _SUBSTEPS)
    for i, body in enumerate(bodies):
      rows[frame, i] = (*body.position, body.angle, *body.velocity, body.angular_velocity)
  states = State(rows[..., :2], rows[..., 2], rows[..., 3:5], rows[..., 5])
  return states, touched["wall"], touched["object"]


def render(
    settings: Settings,
    objects: Sequence[Object],
    positions: Float[np.ndarray, "T O 2"],
    angles: Float[np.ndarray, "T O"],
) -> tuple[UInt8[np.ndarray, "T S S 3"], Bool[np.ndarray, "T O S S"]]:
  """Draws the objects, anti-aliased by their distance to each pixel's centre.

  A later object lies over an earlier one. One whose position is not finite, or outside
  the frame, is not seen. Returns frames and masks as in `Sample`.
  """
  positions = np.asarray(positions, np.float32)
  angles = np.asarray(angles, np.float32)
  count, size = positions.shape[0], settings.size
  frames = np.empty((count, size, size, 3), np.float32)
  frames[:] = BACKGROUND
  owner = np.full((count, size, size), -1, np.int8)
  times = np.arange(count)[:, None, None]
  for i, item in enumerate(objects):
    # Only the square around an object is drawn, moved to lie within the frame.
    side = min(size, 2 * math.ceil(item.radius + 1) + 1)
    centre = np.nan_to_num(positions[:, i], nan=-1e6, posinf=1e6, neginf=-1e6)
    centre = np.clip(centre, -1e6, 1e6)
    corner = np.clip(np.floor(centre).astype(np.int64) - side // 2, 0, size - side)
    columns = corner[:, 0, None] + np.arange(side)
    rows = corner[:, 1, None] + np.arange(side)
    dx = (columns + 0.5 - centre[:, 0, None]).astype(np.float32)
    dy = (rows + 0.5 - centre[:, 1, None]).astype(np.float32)
    cover = np.clip(0.5 - _distance(item, dx, dy, angles[:, i]), 0.0, 1.0)
    where = (times, rows[:, :, None], columns[:, None, :])
    under = frames[where]
    frames[where] = under + (np.asarray(item.rgb, np.float32) - under) * cover[..., None]
    owner[where] = np.where(cover >= 0.5, np.int8(i), owner[where])
  if settings.occluder:
    bar = _occluder_columns(settings)
    frames[:, :, bar] = OCCLUDER
    owner[:, :, bar] = -1
  masks = owner[:, None] == np.arange(len(objects), dtype=np.int8)[:, None, None]
  return np.rint(frames).astype(np.uint8), masks


def write_videos(
    settings: Settings, folder: str | os.PathLike[str], seeds: Iterable[int]
) -> list[pathlib.Path]:
  """Writes one mp4 file (lossless H.264) per seed, `world_SEED.mp4`; returns the paths.

  Raises:
    InputError: as `simulate`; or the folder is missing or cannot be written.
  """
  folder = pathlib.Path(folder)
  paths = []
  for seed in seeds:
    path = folder / f"world_{seed:08d}.mp4"
    video.write_mp4(path, simulate(settings, seed).frames, settings.fps, lossless=True)
    paths.append(path)
  return paths


def _draw_objects(settings: Settings, rng: np.random.Generator) -> tuple[Object, ...]:
  count = int(rng.integers(settings.objects[0], settings.objects[1] + 1))
  colours = rng.permutation(len(COLOURS))[:count]
  names = list(COLOURS)
  objects = []
  for colour in colours:
    shape = settings.shapes[int(rng.integers(len(settings.shapes)))]
    radius = float(np.float32(rng.uniform(*settings.radius)))
    objects.append(Object(shape, names[colour], COLOURS[names[colour]], radius))
  return tuple(objects)


def _draw_state(
    settings: Settings, objects: Sequence[Object], rng: np.random.Generator
) -> State:
  count = len(objects)
  turns = np.array([item.shape != "ball" for item in objects], np.float64)
  angles = turns * rng.uniform(0.0, 2 * math.pi, count)
  spins = turns * rng.uniform(-settings.spin, settings.spin, count)
  speeds = rng.uniform(*settings.speed, count)
  headings = rng.uniform(0.0, 2 * math.pi, count)
  velocities = speeds[:, None] * np.stack([np.cos(headings), np.sin(headings)], axis=-1)
  radii = np.array([item.radius for item in objects])
  reach = radii[:, None] + radii + _GAP
  np.fill_diagonal(reach, 0.0)
  low = radii[:, None] + _GAP
  for _ in range(_PLACEMENTS):
    positions = low + rng.random((count, 2)) * (settings.size - 2 * low)
    apart = np.linalg.norm(positions[:, None] - positions, axis=-1)
    if np.all(apart >= reach):
      return State(positions, angles, velocities, spins)
  raise InputError(
      f"{count} objects of radius {radii.min():.1f} to {radii.max():.1f} px do not fit into"
      f" {settings.size}x{settings.size} px; lower world.objects or world.radius"
  )


def _build_space(
    settings: Settings, objects: Sequence[Object], start: State
) -> tuple[pymunk.Space, list[pymunk.Body]]:
  space = pymunk.Space()
  space.gravity = (0.0, settings.gravity)
  space.iterations = 20
  space.collision_slop = 0.02
  friction = math.sqrt(settings.friction)  # chipmunk multiplies the two coefficients
  bodies = []
  for i, item in enumerate(objects):
    mass = _area(item)
    if item.shape == "ball":
      body = pymunk.Body(mass, pymunk.moment_for_circle(mass, 0.0, item.radius))
      shape: pymunk.Shape = pymunk.Circle(body, item.radius)
    else:
      corners = _corners(item)
      body = pymunk.Body(mass, pymunk.moment_for_poly(mass, corners))
      shape = pymunk.Poly(body, corners)
    body.position = (float(start.positions[i, 0]), float(start.positions[i, 1]))
    body.velocity = (float(start.velocities[i, 0]), float(start.velocities[i, 1]))
    body.angle = float(start.angles[i])
    body.angular_velocity = float(start.spins[i])
    shape.elasticity = _restitution(settings, item)
    shape.friction = friction
    shape.collision_type = _OBJECT_TYPE
    space.add(body, shape)
    bodies.append(body)
  low, high = -_WALL, settings.size + _WALL
  ring = [(low, low), (high, low), (high, high), (low, high)]
  for a, b in zip(ring, ring[1:] + ring[:1], strict=True):
    wall = pymunk.Segment(space.static_body, a, b, _WALL)
    wall.elasticity = 1.0
    wall.friction = friction
    wall.collision_type = _WALL_TYPE
    space.add(wall)
  return space, bodies


def _restitution(settings: Settings, item: Object) -> float:
  if len(settings.elasticity) == 1:
    return settings.elasticity[0]
  return settings.elasticity[settings.shapes.index(item.shape)]


def _corners(item: Object) -> list[tuple[float, float]]:
  """Corners of a regular polygon about the origin, one side facing along +x."""
  sides = _SIDES[item.shape]
  turns = [(2 * k + 1) * math.pi / sides for k in range(sides)]
  return [(item.radius * math.cos(turn), item.radius * math.sin(turn)) for turn in turns]


def _area(item: Object) -> float:
  if item.shape == "ball":
    return math.pi * item.radius**2
  sides = _SIDES[item.shape]
  return 0.5 * sides * item.radius**2 * math.sin(2 * math.pi / sides)


def _distance(
    item: Object,
    dx: Float[np.ndarray, "T k"],
    dy: Float[np.ndarray, "T k"],
    angles: Float[np.ndarray, " T"],
) -> Float[np.ndarray, "T k k"]:
  """Signed distance of the points (dx, dy) from the centre to the outline, px, inside < 0.

  For polygons it is the distance to the nearest side's line: exact but beyond a corner.
  """
  if item.shape == "ball":
    return np.sqrt(dx[:, None, :] ** 2 + dy[:, :, None] ** 2) - np.float32(item.radius)
  sides = _SIDES[item.shape]
  lines = []
  for k in range(sides):
    normal = angles + np.float32(2 * math.pi * k / sides)
    along = (np.cos(normal)[:, None] * dx)[:, None, :] + (np.sin(normal)[:, None] * dy)[:, :, None]
    lines.append(along)
  return functools.reduce(np.maximum, lines) - np.float32(item.radius * math.cos(math.pi / sides))


def _occluder_columns(settings: Settings) -> slice:
  width = max(2, settings.size // 8)
  left = (settings.size - width) // 2
  return slice(left, left + width)


def _caption(settings: Settings, objects: Sequence[Object], label: int) -> str:
  names = [f"a {item.colour} {item.shape}" for item in objects]
  listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
  way = "flying under gravity" if settings.gravity else "drifting"
  return f"{listed}, {way}, {_DEEDS[label]}"


def _checked_index(index: int) -> int:
  if index < 0:
    raise InputError(f"seeds and video indices start at 0, got {index}")
  return int(index)


def _check_number(
    name: str, value: object, least: float, greatest: float, open_least: bool = False
) -> None:
  number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if not number or not math.isfinite(value):  # type: ignore[arg-type]
    raise InputError(f"world.{name} must be a finite number, got {value!r}")
  if not least <= value <= greatest or (open_least and value == least):  # type: ignore[operator]
    raise InputError(f"world.{name} must lie in {least:g}..{greatest:g}, got {value!r}")


def _check_integer(name: str, value: object, least: int) -> None:
  if not isinstance(value, int) or isinstance(value, bool) or value < least:
    raise InputError(f"world.{name} must be an integer of at least {least}, got {value!r}")


def _check_range(name: str, value: tuple, least: float, greatest: float) -> None:
  if len(value) != 2:
    raise InputError(f"world.{name} must be a pair (least, greatest), got {value!r}")
  for end in value:
    _check_number(name, end, least, greatest)
  if value[0] > value[1]:
    raise InputError(f"world.{name} must be (least, greatest), got {value!r}")
