"""Objects that swap, vanish or change their energy, made by the simulator itself."""

import dataclasses

import numpy as np
import pytest

from videogpt_jax.data import world
from videogpt_jax.metrics import objects

SETTINGS = world.Settings(size=64, frames=8, radius=(5.0, 6.0), gravity=0.05)
HISTORY = 3
LOOKS = (world.Object("ball", "red", world.COLOURS["red"], 6.0),
         world.Object("box", "green", world.COLOURS["green"], 6.0))


def _sample(velocities=((1.0, 0.0), (1.0, 0.5))):
  """Two objects that go their straight ways."""
  start = np.array([[12.0, 15.0], [20.0, 44.0]])
  times = np.arange(SETTINGS.frames)[:, None, None]
  positions = (start + times * np.array(velocities)).astype(np.float32)
  frames, masks = world.render(SETTINGS, LOOKS, positions, np.zeros(positions.shape[:2]))
  zeros = np.zeros(positions.shape[:2], np.float32)
  return world.Sample(frames, positions, zeros, np.zeros_like(positions), zeros, masks, LOOKS, 0,
                      "")


def _follow(positions, looks=LOOKS, sample=None):
  frames, _ = world.render(SETTINGS, looks, positions, np.zeros(positions.shape[:2]))
  return objects.follow(SETTINGS, frames, sample or _sample(), HISTORY)


def test_the_truth_keeps_everything():
  found = _follow(_sample().positions[HISTORY:])
  assert found.position.max() < 0.1
  assert not found.mistaken.any() and not found.vanished.any()
  np.testing.assert_array_equal(found.followed, 1.0)
  np.testing.assert_allclose(found.kinetic, found.kinetic_true, rtol=0.1)
  np.testing.assert_allclose(found.mechanical, found.mechanical_true, rtol=0.05)
  areas = np.pi * 36, 72.0  # of a ball, and of a box in a circle, of radius 6
  np.testing.assert_allclose(found.kinetic_true, 0.5 * (areas[0] + 1.25 * areas[1]), rtol=1e-5)
  height = 64 - _sample().positions[HISTORY:, :, 1]
  np.testing.assert_allclose(found.mechanical_true - found.kinetic_true,
                             0.05 * height @ np.array(areas), rtol=1e-5)


def test_swapped_objects_are_mistaken_for_each_other():
  swapped = _sample().positions[HISTORY:].copy()
  swapped[2:] = swapped[2:, ::-1]
  found = _follow(swapped)
  np.testing.assert_array_equal(found.mistaken, [0, 0, 1, 1, 1])
  np.testing.assert_array_equal(found.vanished, 0)


def test_an_object_that_changes_its_colour_is_mistaken():
  blue = dataclasses.replace(LOOKS[0], colour="green", rgb=LOOKS[1].rgb)
  truth = _sample().positions[HISTORY:]
  found = _follow(truth[:, :1], looks=(blue,))  # green where red was; green's place is empty
  np.testing.assert_array_equal(found.mistaken, 0.5)
  np.testing.assert_array_equal(found.vanished, 0)  # green is found, though elsewhere


def test_vanished_objects():
  positions = _sample().positions[HISTORY:].copy()
  positions[3:, 0] = np.nan
  found = _follow(positions)
  np.testing.assert_array_equal(found.vanished, [0, 0, 0, 0.5, 0.5])
  np.testing.assert_array_equal(found.mistaken, 0)
  np.testing.assert_array_equal(found.followed, [1, 1, 1, 0.5, 0.5])
  assert found.position[4] == pytest.approx(4.0, abs=0.1)  # the mean of 0 and 8 px


def test_objects_that_meet_or_stray_keep_their_identity():
  positions, truth = np.array([[[10.0, 10], [14, 10]]]), np.array([[[10.0, 10], [14, 10]]])
  radii, found = np.array([6.0, 6.0]), np.ones((1, 2), bool)
  for moved in (positions, positions + 2, positions + 30):  # in place, nearly, far away
    mistaken, vanished = objects.identities(moved, found, truth, radii)
    assert not mistaken.any() and not vanished.any()


def test_slower_objects_have_less_energy():
  half = _sample(((0.5, 0.0), (0.5, 0.25))).positions
  start = _sample().positions[HISTORY - 1]
  positions = start + half[1:SETTINGS.frames - HISTORY + 1] - half[0]
  found = _follow(positions.astype(np.float32))
  np.testing.assert_allclose(found.kinetic / found.kinetic_true, 0.25, rtol=0.15)


def test_what_is_out_of_view_does_not_count():
  sample = _sample()
  masks = sample.masks.copy()
  masks[HISTORY + 1] = False
  masks[HISTORY + 3, 0] = False
  unseen = dataclasses.replace(sample, masks=masks)
  found = _follow(sample.positions[HISTORY:], sample=unseen)
  for values in (found.position, found.mistaken, found.vanished, found.followed):
    np.testing.assert_array_equal(np.isnan(values), [False, True, False, False, False])
  # Velocities need two frames: after one that is out of view there is none.
  np.testing.assert_array_equal(found.kinetic_true[1:3], 0.0)
  assert 0 < found.kinetic_true[4] < found.kinetic_true[0]
