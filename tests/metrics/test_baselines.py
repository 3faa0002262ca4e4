"""Baselines against hand calculation and against the simulator."""

import numpy as np
import pytest

from videogpt_jax.data import world
from videogpt_jax.errors import InputError
from videogpt_jax.metrics import baselines

SETTINGS = world.Settings(size=16, radius=(2.0, 3.0), objects=(1, 1))
RED = world.Object("ball", "red", world.COLOURS["red"], 5.0)


@pytest.fixture(scope="module")
def videos():
  return np.random.default_rng(0).integers(0, 256, (6, 8, 16, 16, 3), dtype=np.uint8)


def _fitted(settings, frames=4):
  shape = (settings.size, settings.size, 3)
  return baselines.Fitted(settings, frames, np.zeros(shape, np.float32), np.ones(frames))


def _drawn(settings, positions, item=RED):
  positions = np.asarray(positions, np.float32)[:, None]
  return world.render(settings, (item,), positions, np.zeros(positions.shape[:2]))[0]


def test_pixel_baselines_by_hand(videos):
  fitted = baselines.fit(SETTINGS, videos, history=3, frames=5)
  history = videos[0, :3]
  for name in baselines.SCORED_BY_PIXELS:
    frames = baselines.BASELINES[name](history, (), fitted)
    assert frames.shape == (5, 16, 16, 3) and frames.dtype == np.uint8
  for frame in baselines.copy_last(history, (), fitted):
    np.testing.assert_array_equal(frame, history[2])
  ordered = np.sort(history, axis=0)
  for frame in baselines.history_median(history, (), fitted):
    np.testing.assert_array_equal(frame, ordered[1])
  mean = videos.reshape(-1, 16, 16, 3).astype(float).mean(axis=0)
  for frame in baselines.data_mean(history, (), fitted):
    assert np.abs(frame - mean).max() <= 0.5 + 1e-3


def test_scales_are_the_least_squares_fit():
  settings = world.Settings(size=24, frames=7, radius=(3.0, 4.0), speed=(0.5, 1.0))
  videos = np.stack([world.simulate(settings, world.train_seed(i)).frames for i in range(20)])
  fitted = baselines.fit(settings, videos, history=4, frames=3)
  mean = videos.mean(axis=(0, 1))
  last = (videos[:, 3] - mean).reshape(-1, 1)
  for i in range(3):
    expected = np.linalg.lstsq(last, (videos[:, 4 + i] - mean).reshape(-1), rcond=None)[0]
    assert fitted.scales[i] == pytest.approx(expected[0], rel=1e-4)
  assert 0 < fitted.scales[2] < fitted.scales[0] < 1  # motion makes the last frame worth less
  frames = baselines.scaled_copy(videos[0, :4], (), fitted)
  by_hand = mean + fitted.scales[1] * (videos[0, 3] - mean)
  assert np.abs(frames[1] - by_hand).max() <= 0.5 + 1e-3


def test_motionless_videos_are_predicted_exactly():
  videos = np.full((2, 8, 16, 16, 3), 40, np.uint8)
  fitted = baselines.fit(SETTINGS, videos, history=4, frames=4)
  for name in baselines.SCORED_BY_PIXELS:
    frames = baselines.BASELINES[name](videos[0, :4], (), fitted)
    np.testing.assert_array_equal(frames, videos[0, 4:])


def test_constant_velocity_predicts_free_flight():
  settings = world.Settings(size=64, spin=0.1, speed=(1.0, 1.5), objects=(1, 3))
  still_best = 0
  for i in range(40):
    sample = world.simulate(settings, world.held_out_seed(i))
    if sample.label != world.LABELS.index("free flight"):
      continue
    predicted = baselines.constant_velocity(sample.frames[:4], sample.objects, _fitted(settings))
    error = np.mean((predicted.astype(float) - sample.frames[4:]) ** 2)
    copied = np.mean((sample.frames[3].astype(float) - sample.frames[4:]) ** 2)
    assert error < 0.15 * copied
    still_best += 1
  assert still_best >= 5


def test_constant_velocity_by_hand_stops_at_the_wall():
  settings = world.Settings(size=32)
  history = _drawn(settings, [[12.0, 10.0], [15.0, 12.0], [18.0, 14.0]])
  predicted = baselines.constant_velocity(history, (RED,), _fitted(settings))
  expected = _drawn(settings, [[21.0, 16.0], [24.0, 18.0], [27.0, 20.0], [27.0, 22.0]])
  assert np.abs(predicted.astype(int) - expected).max() < 40  # of 214: a few hundredths of a px


def test_constant_velocity_uses_the_last_two_frames_that_show_an_object():
  settings = world.Settings(size=32)
  history = _drawn(settings, [[8.0, 16.0], [8.0, 16.0], [12.0, 16.0], [np.nan, np.nan]])
  predicted = baselines.constant_velocity(history, (RED,), _fitted(settings, 1))
  expected = _drawn(settings, [[20.0, 16.0]])
  assert np.abs(predicted.astype(int) - expected).max() < 40


def test_constant_velocity_of_an_object_seen_once_or_never():
  settings = world.Settings(size=32)
  nowhere = [np.nan, np.nan]
  once = _drawn(settings, [nowhere, nowhere, [12.0, 16.0]])
  predicted = baselines.constant_velocity(once, (RED,), _fitted(settings))
  assert np.abs(predicted.astype(int) - once[2]).max() < 40
  never = _drawn(settings, [nowhere, nowhere])
  predicted = baselines.constant_velocity(never, (RED,), _fitted(settings))
  np.testing.assert_array_equal(predicted, np.repeat(never[:1], 4, axis=0))


def test_too_few_frames_or_videos_are_refused(videos):
  with pytest.raises(InputError, match="6 \\+ 4 frames"):
    baselines.fit(SETTINGS, videos, history=6, frames=4)
  with pytest.raises(InputError, match="training videos"):
    baselines.fit(SETTINGS, videos[:0], history=4, frames=4)
