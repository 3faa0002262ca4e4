"""The miniature of Physics-IQ: its scenes, and that it ranks predictors as it should."""

import numpy as np

from videogpt_jax import weights as weights_lib
from videogpt_jax.data import world
from videogpt_jax.evaluation import physics_mini
from videogpt_jax.metrics.physics_iq import protocol


def test_takes_begin_alike_and_part():
  settings = world.Settings(size=32, frames=16, objects=(2, 2))
  _, takes = physics_mini.scene(settings, 0, seed=0)
  assert takes.shape == (2, 16, 128, 128, 3)
  apart = np.abs(takes[0].astype(int) - takes[1]).mean((1, 2, 3))
  assert apart[0] == 0 < apart[4] < apart[15]
  _, again = physics_mini.scene(settings, 0, seed=0)
  np.testing.assert_array_equal(takes, again)


def test_cameras_see_the_same_scene_differently():
  frame = np.zeros((1, 64, 64, 3), np.uint8)
  frame[:, 20:44, 8:20] = 255  # on the left
  size = {view: (physics_mini.film(frame, view) > 128).sum() for view in protocol.VIEWS}
  assert size["right"] < size["center"] and abs(size["left"] / size["center"] - 1) < 0.05
  mirrored = physics_mini.film(frame[:, :, ::-1], "left")[:, :, ::-1]
  assert np.abs(mirrored.astype(int) - physics_mini.film(frame, "right")).mean() < 1


def test_truth_model_copy_noise(tmp_path):
  weights = weights_lib.load()
  report = physics_mini.run(weights, tmp_path, physics_mini.Options(scenes=3, batch_size=9))
  scores = report.summary["score"]
  assert list(scores) == ["truth", "model", "copy_last", "noise"]
  assert scores["truth"] > 99 > scores["model"] + 20  # a good model, no perfect one
  assert scores["model"] > scores["copy_last"] + 20
  assert scores["copy_last"] > scores["noise"]
  assert len(report.videos) == 9
