"""The simulated world: physics against laws, pictures against geometry, repeatability."""

import dataclasses
import hashlib
import importlib.util
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from videogpt_jax.data import video
from videogpt_jax.data import world
from videogpt_jax.errors import InputError

_REPOSITORY = pathlib.Path(__file__).parents[2]
FULL = world.Settings(
  size=64, frames=16, objects=(2, 4), radius=(4.0, 8.0), speed=(0.9, 1.4), gravity=0.04
)
FLOATING = dataclasses.replace(FULL, gravity=0.0)


def _frozen(name):
  """The world settings in a file of `configs/`."""
  spec = importlib.util.spec_from_file_location(name, _REPOSITORY / "configs" / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return world.Settings(**module.get_config().world.to_dict())


def _samples(settings, count):
  return [world.simulate(settings, world.held_out_seed(i)) for i in range(count)]


@pytest.fixture(scope="module")
def full():
  return _samples(FULL, 60)


@pytest.fixture(scope="module")
def floating():
  return _samples(FLOATING, 60)


def _area(item):
  """By the textbook, from the radius of the circle around the object."""
  return {
    "ball": math.pi * item.radius**2,
    "box": 2 * item.radius**2,
    "triangle": 3 * math.sqrt(3) / 4 * item.radius**2,
  }[item.shape]


def _inertia(item):
  """Second moment of area about the centre, by the textbook."""
  side = {"ball": 0.0, "box": math.sqrt(2), "triangle": math.sqrt(3)}[item.shape] * item.radius
  factor = {"ball": item.radius**2 / 2, "box": side**2 / 6, "triangle": side**2 / 12}
  return _area(item) * factor[item.shape]


def _corners(item, position, angle):
  """Corners of a box (one side faces `angle`) or triangle (likewise)."""
  sides = {"box": 4, "triangle": 3}[item.shape]
  turns = angle + math.pi / sides + 2 * math.pi * np.arange(sides) / sides
  return position + item.radius * np.stack([np.cos(turns), np.sin(turns)], -1)


def _inside(item, position, angle, x, y):
  """Whether points lie in an object, by the sides of its corner polygon."""
  if item.shape == "ball":
    return (x - position[0]) ** 2 + (y - position[1]) ** 2 <= item.radius**2
  corners = _corners(item, position, angle)
  inside = np.ones(np.broadcast(x, y).shape, bool)
  for (ax, ay), (bx, by) in zip(corners, np.roll(corners, -1, 0), strict=True):
    inside &= (bx - ax) * (y - ay) - (by - ay) * (x - ax) >= 0
  return inside


def _alone(shape, radius=6.0, colour="red"):
  return world.Object(shape, colour, world.COLOURS[colour], radius)


def _still(position, velocity, spin=0.0, angle=0.0):
  return world.State(
    np.array([position]), np.array([angle]), np.array([velocity]), np.array([spin])
  )


# Repeatability.


def _digest(settings, seeds):
  digest = hashlib.sha256()
  for seed in seeds:
    sample = world.simulate(settings, seed)
    for array in (sample.frames, sample.positions, sample.angles, sample.velocities, sample.spins):
      digest.update(array.tobytes())
    digest.update(f"{sample.label} {sample.caption} {sample.objects}".encode())
  return digest.hexdigest()


def test_another_process_in_another_order_gives_the_same_bits():
  code = (
    "import sys; sys.path.insert(0, sys.argv[1]); import test_world as t\n"
    "t._digest(t.FULL, [9, 5])\n"  # what came before must not matter
    "print(t._digest(t.FULL, range(8)))"
  )
  ran = subprocess.run(
    [sys.executable, "-c", code, str(pathlib.Path(__file__).parent)],
    capture_output=True, text=True, check=True, cwd=_REPOSITORY,
  )
  assert ran.stdout.strip() == _digest(FULL, range(8))


def test_seeds_differ_and_training_shares_none_with_held_out():
  train = {world.train_seed(i) for i in range(1000)}
  held_out = {world.held_out_seed(i) for i in range(1000)}
  assert len(train) == len(held_out) == 1000
  assert not train & held_out
  assert len({_digest(FULL, [seed]) for seed in range(10)}) == 10


# What is drawn.


def test_objects_and_start_are_within_the_settings(full):
  seen = {"shape": set(), "colour": set(), "count": set()}
  speeds, radii = [], []
  for sample in full:
    assert len({item.colour for item in sample.objects}) == len(sample.objects)
    seen["count"].add(len(sample.objects))
    for item in sample.objects:
      assert item.rgb == world.COLOURS[item.colour]
      seen["shape"].add(item.shape)
      seen["colour"].add(item.colour)
      radii.append(item.radius)
    speeds.extend(np.linalg.norm(sample.velocities[0], axis=-1))
    r = np.array([item.radius for item in sample.objects])
    apart = np.linalg.norm(sample.positions[0][:, None] - sample.positions[0], axis=-1)
    assert np.all((apart > r[:, None] + r) | np.eye(len(r), dtype=bool))
    assert np.all(sample.positions[0] > r[:, None])
    assert np.all(sample.positions[0] < FULL.size - r[:, None])
  assert seen == {
    "shape": set(world.SHAPES), "colour": set(world.COLOURS), "count": {2, 3, 4}
  }
  # Within the limits, and filling them.
  assert 4.0 <= min(radii) < 4.3 and 7.7 < max(radii) <= 8.0
  assert 0.9 - 1e-6 <= min(speeds) < 0.93 and 1.37 < max(speeds) <= 1.4 + 1e-6


def test_arrays_have_the_stated_shapes_and_types(full):
  sample = full[0]
  count = len(sample.objects)
  assert sample.frames.shape == (16, 64, 64, 3) and sample.frames.dtype == np.uint8
  assert sample.masks.shape == (16, count, 64, 64) and sample.masks.dtype == bool
  for array, shape in (
    (sample.positions, (16, count, 2)), (sample.velocities, (16, count, 2)),
    (sample.angles, (16, count)), (sample.spins, (16, count)),
  ):
    assert array.shape == shape and array.dtype == np.float32


def test_caption_names_every_object_and_the_event(full):
  for sample in full:
    assert all(f"a {item.colour} {item.shape}" in sample.caption for item in sample.objects)
    assert "under gravity" in sample.caption
    assert ("bouncing off the walls" in sample.caption) == (sample.label in (1, 3))
    assert ("hitting each other" in sample.caption) == (sample.label in (2, 3))


# Physics.


def test_free_flight_is_a_parabola_at_constant_spin():
  settings = dataclasses.replace(FULL, spin=0.2, objects=(1, 2))
  free = [s for s in _samples(settings, 60) if world.LABELS[s.label] == "free flight"]
  assert len(free) >= 5
  t = np.arange(settings.frames)[:, None]
  for sample in free:
    path = sample.positions[0] + sample.velocities[0] * t[..., None]
    path[..., 1] += settings.gravity * t**2 / 2
    # Half a physics step of fall is all that the integrator may be off.
    np.testing.assert_allclose(sample.positions, path, atol=0.5 * 0.04 * 15 / 8 + 1e-3)
    np.testing.assert_allclose(
      sample.angles, sample.angles[0] + sample.spins[0] * t, atol=1e-4
    )


def test_energy_is_conserved_by_elastic_contacts(full, floating):
  contacts = 0
  for settings, samples in ((FULL, full), (FLOATING, floating)):
    for sample in samples:
      contacts += sample.label > 0
      mass = np.array([_area(item) for item in sample.objects])
      inertia = np.array([_inertia(item) for item in sample.objects])
      height = settings.size - sample.positions[..., 1]
      energy = np.sum(
        mass * (np.sum(sample.velocities**2, -1) / 2 + settings.gravity * height)
        + inertia * sample.spins**2 / 2,
        axis=-1,
      )
      kinetic = np.sum(mass * np.sum(sample.velocities[0] ** 2, -1) / 2)
      assert np.abs(energy - energy[0]).max() < 0.02 * kinetic
  assert contacts > 80


def test_events_agree_with_momentum(floating):
  """Only walls change the total momentum; without a touch no velocity changes at all."""
  for sample in floating:
    mass = np.array([_area(item) for item in sample.objects])
    momentum = np.sum(mass[:, None] * sample.velocities, axis=1)
    kept = np.abs(momentum - momentum[0]).max() < 1e-3 * mass.min()
    assert kept == (sample.label in (0, 2))
    change = max(np.abs(sample.velocities - sample.velocities[0]).max(),
                 np.abs(sample.spins - sample.spins[0]).max())
    assert (change < 1e-4) == (sample.label == 0)
  assert {sample.label for sample in floating} == {0, 1, 2, 3}


@pytest.mark.parametrize("elasticity", [1.0, 0.6])
def test_a_ball_returns_from_the_wall_slower_by_the_elasticity(elasticity):
  settings = world.Settings(size=32, frames=12, elasticity=(elasticity,))
  states, wall, other = world.trajectories(
    settings, (_alone("ball"),), _still((22.0, 10.0), (1.5, 0.5))
  )
  assert wall and not other
  np.testing.assert_allclose(states.velocities[-1, 0], (-1.5 * elasticity, 0.5), atol=1e-5)
  assert states.positions[:, 0, 0].max() == pytest.approx(26.0, abs=0.6)  # the wall is at 32


def test_elasticity_by_shape_and_the_product_between_two():
  settings = world.Settings(
    size=64, frames=20, shapes=("ball", "box"), elasticity=(0.9, 0.5)
  )
  ball, box = _alone("ball", 5.0), _alone("box", 5.0, "blue")
  for item, factor in ((ball, 0.9), (box, 0.5)):
    states, _, _ = world.trajectories(settings, (item,), _still((54.0, 30.0), (1.0, 0.0)))
    np.testing.assert_allclose(states.velocities[-1, 0], (-factor, 0.0), atol=1e-4)
  start = world.State(
    np.array([[20.0, 32.0], [40.0, 32.0]]), np.zeros(2),
    np.array([[1.0, 0.0], [-1.0, 0.0]]), np.zeros(2),
  )
  states, wall, other = world.trajectories(settings, (ball, box), start)
  assert other and not wall
  before, after = (states.velocities[t, 1, 0] - states.velocities[t, 0, 0] for t in (0, -1))
  assert after == pytest.approx(-0.9 * 0.5 * before, abs=1e-3)


def test_objects_stay_in_the_frame_and_out_of_each_other(full):
  for sample in full:
    for t in range(FULL.frames):
      for i, item in enumerate(sample.objects):
        p, angle = sample.positions[t, i], sample.angles[t, i]
        if item.shape == "ball":
          points = p + item.radius * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])
        else:
          points = _corners(item, p, angle)
        assert points.min() > -0.5 and points.max() < FULL.size + 0.5
        for j, other in enumerate(sample.objects[:i]):
          if item.shape == other.shape == "ball":
            apart = np.linalg.norm(p - sample.positions[t, j])
            assert apart > item.radius + other.radius - 0.5


def test_four_frames_determine_the_rest(full):
  """A restart from the state after four frames, slightly misjudged, stays close."""
  rng = np.random.default_rng(0)
  settings = dataclasses.replace(FULL, frames=5)
  errors = []
  for sample in full:
    start = world.State(
      sample.positions[3] + rng.normal(0, 0.05, sample.positions[3].shape),
      sample.angles[3], sample.velocities[3], sample.spins[3],
    )
    states, _, _ = world.trajectories(settings, sample.objects, start)
    errors.extend(np.linalg.norm(states.positions[-1] - sample.positions[7], axis=-1))
  assert np.mean(errors) < 0.2


# Pictures.


@pytest.mark.parametrize("shape", world.SHAPES)
def test_rendering_matches_a_count_of_points_inside(shape):
  rng = np.random.default_rng(1)
  settings = world.Settings(size=32)
  fine = 10
  grid = (np.arange(32 * fine) + 0.5) / fine
  centres = np.arange(32) + 0.5
  misplaced = []
  for radius in np.linspace(4.0, 8.0, 10):
    item = _alone(shape, radius)
    position, angle = rng.uniform(10, 22, 2), rng.uniform(0, 6)
    points = _inside(item, position, angle, grid[None, :], grid[:, None])
    cover = points.reshape(32, fine, 32, fine).mean((1, 3))
    frames, _ = world.render(settings, (item,), [[position]], [[angle]])
    drawn = (frames[0, ..., 0] - 18.0) / (232 - 18)  # the share of red
    assert np.abs(drawn - cover).max() < 0.35  # at a corner
    assert np.abs(drawn - cover).sum() < 0.1 * 2 * math.pi * radius  # px, of its outline
    assert drawn.sum() == pytest.approx(_area(item), rel=0.05)
    centre = np.array([np.sum(drawn * centres), np.sum(drawn * centres[:, None])]) / drawn.sum()
    misplaced.append(np.linalg.norm(centre - position))
  assert np.mean(misplaced) < 0.04 and max(misplaced) < 0.1  # px


def test_moving_by_parts_of_a_pixel_shows_and_by_whole_ones_only_shifts():
  item = _alone("ball", 5.0)
  settings = world.Settings(size=32)
  paths = np.array([[[12.0, 12.0]], [[12.3, 12.0]], [[15.0, 10.0]]])
  frames, _ = world.render(settings, (item,), paths, np.zeros((3, 1)))
  assert np.array_equal(np.roll(frames[0], (-2, 3), (0, 1)), frames[2])
  assert not np.array_equal(frames[0], frames[1])
  assert np.array_equal(frames[0, 12, 12], item.rgb)
  assert np.array_equal(frames[0, 0, 0], world.BACKGROUND)
  assert len(np.unique(frames[0, ..., 0])) >= 5  # shades between background and object


def test_objects_out_of_sight_leave_the_background():
  settings = world.Settings(size=32)
  away = np.array([[[np.nan, np.nan]], [[-40.0, 10.0]], [[10.0, np.inf]], [[1e9, 1e9]]])
  frames, masks = world.render(settings, (_alone("box"),), away, np.zeros((4, 1)))
  assert np.all(frames == world.BACKGROUND) and not masks.any()
  half, _ = world.render(settings, (_alone("ball"),), [[[0.0, 16.0]]], [[0.0]])
  red = (half[0, ..., 0] - 18) / (232 - 18)
  assert red.sum() == pytest.approx(_area(_alone("ball")) / 2, rel=0.03)


def test_masks_belong_to_one_object_each_and_cover_it(full):
  for sample in full[:20]:
    assert sample.masks.sum(1).max() <= 1
    for i, item in enumerate(sample.objects):
      covered = sample.masks[:, i].sum((1, 2))
      np.testing.assert_allclose(covered, _area(item), atol=0.25 * _area(item) + 2)
      inner = sample.frames[sample.masks[:, i]].astype(float)
      assert np.abs(inner - item.rgb).mean() < 35


def test_later_objects_and_the_occluder_hide():
  settings = world.Settings(size=32, occluder=True)
  plain = dataclasses.replace(settings, occluder=False)
  pair = (_alone("ball", 6.0, "red"), _alone("ball", 6.0, "blue"))
  positions, angles = np.array([[[8.0, 8.0], [8.0, 8.0]]]), np.zeros((1, 2))
  frames, masks = world.render(plain, pair, positions, angles)
  assert masks[0, 1].any() and not masks[0, 0].any()
  assert np.array_equal(frames[0, 8, 8], world.COLOURS["blue"])
  crossing = np.array([[[16.0, 16.0]]])
  _, whole = world.render(plain, pair[:1], crossing, angles[:, :1])
  frames, masks = world.render(settings, pair[:1], crossing, angles[:, :1])
  bar = np.all(frames[0] == world.OCCLUDER, axis=-1)
  assert bar.all(axis=0).sum() == 4  # columns, from top to bottom
  assert np.array_equal(masks[0, 0], whole[0, 0] & ~bar)


def test_written_videos_hold_the_simulated_frames(tmp_path):
  seeds = [world.train_seed(0), world.held_out_seed(0)]
  paths = world.write_videos(world.Settings(), tmp_path, seeds)
  assert sorted(paths) == video.find_videos(tmp_path)
  for seed, path in zip(seeds, paths, strict=True):
    clip = video.read(path)
    assert np.array_equal(clip.frames, world.simulate(world.Settings(), seed).frames)
    assert clip.fps == world.Settings().fps
  with pytest.raises(InputError, match="nowhere"):
    world.write_videos(world.Settings(), tmp_path / "nowhere", [0])


# The frozen settings.


def test_the_frozen_world_is_as_published():
  settings = _frozen("world")
  assert (settings.size, settings.frames, settings.objects) == (64, 16, (2, 4))
  assert settings.radius == (4.0, 8.0) and settings.gravity > 0 and not settings.occluder
  samples = _samples(settings, 100)
  moved = [np.linalg.norm(s.positions[4:] - s.positions[:-4], axis=-1).ravel() for s in samples]
  assert 4.0 <= np.median(np.concatenate(moved)) <= 6.0
  labels = np.bincount([s.label for s in samples], minlength=4)
  assert labels[1] + labels[3] > 30 and labels[2] + labels[3] > 15 and labels[0] >= 1


def test_the_frozen_tiny_world_moves():
  settings = _frozen("tiny")
  assert (settings.size, settings.frames, settings.objects) == (32, 8, (1, 2))
  samples = _samples(settings, 100)
  moved = [np.linalg.norm(s.positions[4:] - s.positions[:-4], axis=-1).ravel() for s in samples]
  assert np.median(np.concatenate(moved)) >= 4.0


# Bad settings.


@pytest.mark.parametrize(
  ("change", "named"),
  [
    ({"size": 4}, "size"),
    ({"size": 32.0}, "size"),
    ({"frames": 0}, "frames"),
    ({"frames": True}, "frames"),
    ({"fps": 0.0}, "fps"),
    ({"fps": "8"}, "fps"),
    ({"objects": (0, 2)}, "objects"),
    ({"objects": (3, 2)}, "objects"),
    ({"objects": (1, 7)}, "objects"),
    ({"objects": (1.0, 2.0)}, "objects"),
    ({"objects": 2}, "objects"),
    ({"radius": (4.0,)}, "radius"),
    ({"radius": (4.0, 31.5)}, "radius"),
    ({"radius": ("4", 5)}, "radius"),
    ({"speed": (-1.0, 1.0)}, "speed"),
    ({"speed": (1.0, math.inf)}, "speed"),
    ({"gravity": -0.1}, "gravity"),
    ({"gravity": "0.04"}, "gravity"),
    ({"spin": math.nan}, "spin"),
    ({"friction": -1.0}, "friction"),
    ({"shapes": ("ball", "star")}, "shapes"),
    ({"shapes": ()}, "shapes"),
    ({"elasticity": (1.2,)}, "elasticity"),
    ({"elasticity": (1.0, 0.5)}, "elasticity"),
    ({"occluder": 1}, "occluder"),
  ],
)
def test_settings_that_make_no_world_are_refused_by_name(change, named):
  with pytest.raises(InputError, match=rf"world\.{named} "):
    dataclasses.replace(FULL, **change)


def test_too_many_large_objects_and_negative_seeds_are_refused():
  crowded = world.Settings(size=32, objects=(6, 6), radius=(9.0, 10.0))
  with pytest.raises(InputError, match="do not fit into 32x32"):
    world.simulate(crowded, 0)
  for function in (world.train_seed, world.held_out_seed):
    with pytest.raises(InputError, match="-1"):
      function(-1)
  with pytest.raises(InputError, match="-1"):
    world.simulate(FULL, -1)
