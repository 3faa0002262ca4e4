"""The position detector against the simulator's state and against scenes drawn by hand."""

import numpy as np
import pytest
from scipy import ndimage

from videogpt_jax.data import world
from videogpt_jax.errors import InputError
from videogpt_jax.metrics import world as detector

SETTINGS = {
  "tiny": world.Settings(),
  "world": world.Settings(
    size=64, frames=16, objects=(2, 4), radius=(4.0, 8.0), speed=(0.9, 1.4), gravity=0.04
  ),
}


def _object(shape="ball", colour="red", radius=6.0):
  return world.Object(shape, colour, world.COLOURS[colour], radius)


def _clear(sample):
  """Where an object overlaps no other one: their surrounding circles are apart."""
  radii = np.array([item.radius for item in sample.objects])
  apart = np.linalg.norm(sample.positions[:, :, None] - sample.positions[:, None], axis=-1)
  reach = radii[:, None] + radii
  np.fill_diagonal(reach, 0.0)
  return np.all(apart >= reach, axis=-1)


def _spoil(frames, sigma, noise, seed):
  rng = np.random.default_rng(seed)
  blurred = ndimage.gaussian_filter(frames.astype(np.float64), (0, sigma, sigma, 0))
  return np.clip(np.rint(blurred + rng.normal(0, noise, frames.shape)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", ["tiny", "world"])
def test_true_frames_within_a_fifth_of_a_pixel(name):
  clear, touching = [], []
  for i in range(200):
    sample = world.simulate(SETTINGS[name], world.held_out_seed(i))
    positions, found = detector.detect(sample.frames, sample.objects)
    assert found.all()
    error = np.linalg.norm(positions - sample.positions, axis=-1)
    alone = _clear(sample)
    clear.append(error[alone])
    touching.append(error[~alone])
  clear, touching = np.concatenate(clear), np.concatenate(touching)
  assert len(clear) > 2000 and len(touching) > 50
  assert clear.max() < 0.2
  assert np.percentile(clear, 99) < 0.1
  assert clear.mean() < 0.03
  assert np.percentile(touching, 99) < 0.2


@pytest.mark.parametrize(
  ("sigma", "noise", "limit"), [(1.0, 5, 0.05), (2.0, 10, 0.15), (0, 20, 0.15)]
)
def test_blurred_and_noisy_frames(sigma, noise, limit):
  errors = []
  for i in range(10):
    sample = world.simulate(SETTINGS["world"], world.held_out_seed(i))
    frames = _spoil(sample.frames, sigma, noise, seed=i)
    positions, found = detector.detect(frames, sample.objects)
    assert found.all()
    errors.append(np.linalg.norm(positions - sample.positions, axis=-1)[_clear(sample)])
  assert np.concatenate(errors).mean() < limit


def test_scene_drawn_without_the_renderer():
  # Two touching shapes, 16 x 16 samples a pixel; the pixel in column j spans [j, j + 1].
  fine = (np.arange(32 * 16) + 0.5) / 16
  x, y = np.meshgrid(fine, fine)
  picture = np.empty((*x.shape, 3))
  picture[:] = world.BACKGROUND
  picture[(x - 10.3) ** 2 + (y - 12.9) ** 2 < 5.0**2] = world.COLOURS["cyan"]
  picture[(np.abs(x - 19.3) < 4.0) & (np.abs(y - 14.2) < 4.0)] = world.COLOURS["yellow"]
  frame = np.rint(picture.reshape(32, 16, 32, 16, 3).mean(axis=(1, 3))).astype(np.uint8)
  objects = (_object("ball", "cyan", 5.0), _object("box", "yellow", 4.0 * 2**0.5))
  positions, found = detector.detect(frame[None], objects)
  assert found.all()
  np.testing.assert_allclose(positions[0], [[10.3, 12.9], [19.3, 14.2]], atol=0.05)
  # Its sides face along the axes: an angle of 0 in the world's convention.
  angles = detector.detect_angles(frame[None], objects, positions)
  assert abs(detector.least_turn(objects[1], angles[0, 1])) < np.radians(1)


def test_mixed_colours_are_not_a_third_object():
  # Red over green makes edge pixels of yellow's hue, but no yellow object.
  objects = (_object("ball", "red"), _object("ball", "green"), _object("ball", "yellow", 4.0))
  positions = np.array([[[12.0, 16.0], [20.0, 16.0]]])
  frames, _ = world.render(SETTINGS["tiny"], objects[:2], positions, np.zeros((1, 2)))
  _, found = detector.detect(frames, objects)
  np.testing.assert_array_equal(found, [[True, True, False]])


@pytest.mark.parametrize(("shape", "limit"), [("ball", 0.05), ("box", 0.3), ("triangle", 0.5)])
def test_objects_cut_by_the_border(shape, limit):
  rng = np.random.default_rng(1)
  item = _object(shape)
  inside = detector.inner_radius(item)
  positions = np.full((24, 1, 2), 32.0)
  positions[:, 0, 0] = np.linspace(0.1, 0.9, 24) * inside
  settings = SETTINGS["world"]
  frames, _ = world.render(settings, (item,), positions, rng.uniform(0, 6, (24, 1)))
  found_at, found = detector.detect(frames, (item,))
  assert found.all()
  error = np.linalg.norm(found_at - positions, axis=-1)
  assert error.mean() < limit
  # The bare centre of mass of what is visible lies much further inside.
  assert error.mean() < 0.5 * _naive_error(frames, positions)


def _naive_error(frames, positions):
  red = (frames[..., 0].astype(float) - world.BACKGROUND[0]).clip(0)
  centres = np.arange(frames.shape[1]) + 0.5
  x = (red.sum(axis=1) * centres).sum(axis=1) / red.sum(axis=(1, 2))
  y = (red.sum(axis=2) * centres).sum(axis=1) / red.sum(axis=(1, 2))
  return np.linalg.norm(np.stack([x, y], -1) - positions[:, 0], axis=-1).mean()


def test_objects_behind_the_occluder():
  settings = world.Settings(size=64, occluder=True)
  hidden = detector.hidden_pixels(settings)
  assert 0 < hidden.sum() < hidden.size / 4
  assert not detector.hidden_pixels(SETTINGS["world"]).any()
  item = _object("ball", "magenta", 4.0)
  columns = np.flatnonzero(hidden.any(axis=0))
  left, middle = float(columns[0]), columns.mean() + 0.5
  positions = np.array([[[left - 1.0, 20.0]], [[left + 1.0, 30.0]], [[middle, 40.0]]])
  frames, _ = world.render(settings, (item,), positions, np.zeros((3, 1)))
  found_at, found = detector.detect(frames, (item,), hidden)
  np.testing.assert_array_equal(found[:, 0], [True, True, False])
  np.testing.assert_allclose(found_at[:2], positions[:2], atol=0.3)


@pytest.mark.parametrize(("sigma", "noise"), [(0, 0), (1.5, 10)])
def test_an_absent_object_is_lost(sigma, noise):
  settings = SETTINGS["world"]
  for i in range(16):  # enough videos for objects to touch, whose blurred edges mix colours
    sample = world.simulate(settings, world.held_out_seed(i))
    rest, _ = world.render(
      settings, sample.objects[1:], sample.positions[:, 1:], sample.angles[:, 1:]
    )
    positions, found = detector.detect(_spoil(rest, sigma, noise, seed=i), sample.objects)
    assert not found[:, 0].any() and found[:, 1:].all()
    assert np.isnan(positions[:, 0]).all()


def test_angles_are_those_of_the_simulation():
  errors = []
  for i in range(20):
    sample = world.simulate(SETTINGS["world"], world.held_out_seed(i))
    angles = detector.detect_angles(sample.frames, sample.objects, sample.positions)
    clear = _clear(sample)
    for k, item in enumerate(sample.objects):
      if item.shape == "ball":
        assert not angles[:, k].any()
        continue
      turn = [detector.least_turn(item, a) for a in angles[:, k] - sample.angles[:, k]]
      errors.append(np.abs(turn)[clear[:, k]])
  assert np.degrees(np.concatenate(errors)).max() < 3


def test_least_turn_by_hand():
  box = _object("box")
  assert detector.least_turn(box, np.radians(80)) == pytest.approx(np.radians(-10))
  assert detector.least_turn(_object("triangle"), np.radians(80)) == pytest.approx(np.radians(-40))
  assert detector.least_turn(_object("ball"), 1.0) == 0.0


@pytest.mark.parametrize("shape", world.SHAPES)
def test_areas_and_inner_radii_by_sampling(shape):
  item = _object(shape, radius=20.0)
  frames, masks = world.render(SETTINGS["world"], (item,), [[[32.0, 32.0]]], [[0.3]])
  assert detector.area(item) == pytest.approx(masks.sum(), rel=0.01)
  centres = np.arange(64) + 0.5 - 32.0
  distance = np.hypot(centres[:, None], centres)
  assert detector.inner_radius(item) == pytest.approx(distance[~masks[0, 0]].min(), abs=0.8)


def test_position_error_by_hand():
  predicted = np.array([[3.0, 4.0], [30.0, 0.0], [1.0, 0.0], [np.nan, np.nan]])
  found = np.array([True, True, False, False])
  error = detector.position_error(predicted, found, np.zeros((4, 2)))
  np.testing.assert_allclose(error, [5.0, 8.0, 8.0, 8.0])
  np.testing.assert_allclose(detector.position_error(predicted, found, np.zeros((4, 2)), 4.0), 4.0)


def test_bad_input_is_refused():
  frames = np.zeros((2, 32, 32, 3), np.uint8)
  with pytest.raises(InputError, match="same colour"):
    detector.detect(frames, (_object(), _object("box")))
  with pytest.raises(InputError, match="uint8"):
    detector.detect(frames.astype(np.float32), (_object(),))
  with pytest.raises(InputError, match="S, S, 3"):
    detector.detect(frames[:, :20], (_object(),))
