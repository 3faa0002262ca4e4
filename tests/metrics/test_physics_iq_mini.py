"""The miniature of Physics-IQ: its scenes, and that it ranks predictors as it should."""

import dataclasses
import itertools
import types

import numpy as np
import pytest

from videogpt_jax import weights as weights_lib
from videogpt_jax.data import world
from videogpt_jax.errors import InputError
from videogpt_jax.evaluation import physics_iq
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


@pytest.fixture
def small(tmp_path, monkeypatch):
  """Runs all on a small world, with a model that copies: `small(checkpoint, **options)`."""
  settings = world.Settings(size=16, frames=12, objects=(1, 1), radius=(2.0, 3.0))
  config = {"data": {"source": "world"}, "world": dataclasses.asdict(settings),
            "sample": {"history": 4}}
  monkeypatch.setattr(physics_iq, "of_weights", lambda weights, options: physics_iq.Predictor(
    "any", {"checkpoint": weights.path}, physics_mini.copy_last, lambda h, w: (h, w)))

  def run(checkpoint, **options):
    weights = types.SimpleNamespace(config=config, path=checkpoint)
    return physics_mini.run(weights, tmp_path, physics_mini.Options(batch_size=3, **options))

  return run


def _contents(folder):
  return {path.relative_to(folder): (path.stat().st_mtime_ns, path.read_bytes())
          for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("checkpoint", "options", "message"), [
  ("b", {"scenes": 1}, r"checkpoint a \(now b\)"),
  ("a", {"scenes": 1, "seed": 9}, r"seed 0 \(now 9\)"),
  ("a", {"scenes": 2}, r"scenes 1 \(now 2\)"),
])
def test_a_refused_run_has_changed_nothing(small, tmp_path, checkpoint, options, message):
  small("a", scenes=1)
  before = _contents(tmp_path)
  with pytest.raises(InputError, match=message):
    small(checkpoint, **options)
  assert _contents(tmp_path) == before


def test_a_restart_leaves_nothing_of_the_run_before(small, tmp_path):
  small("a", scenes=2)
  (tmp_path / "notes.txt").write_text("own")
  report = small("a", scenes=1, restart=True)
  assert len(report.videos) == 3
  assert not [path for path in _contents(tmp_path) if "scene-1" in path.name]
  assert len(list((tmp_path / "truth" / "videos").iterdir())) == 3
  assert (tmp_path / "notes.txt").exists()
  again = small("a", scenes=1)
  assert again.summary == report.summary


@pytest.mark.parametrize("name", ["physics-IQ-benchmark", "data"])
@pytest.mark.parametrize("restart", [False, True])
def test_a_real_data_set_in_the_folder_is_left_alone(small, tmp_path, name, restart):
  real = tmp_path / name / "split-videos" / "testing" / "8FPS" / "0001_testing-videos.mp4"
  real.parent.mkdir(parents=True)
  real.write_bytes(b"many GB")
  before = _contents(tmp_path)
  if name == physics_mini.DATA:
    with pytest.raises(InputError, match="holds data, which no evaluation recorded"):
      small("a", scenes=1, restart=restart)
    assert _contents(tmp_path) == before
  else:
    small("a", scenes=1, restart=restart)
    small("a", scenes=1, restart=True)
  assert real.read_bytes() == b"many GB"
  assert list(real.parent.iterdir()) == [real]


def test_truth_model_copy_noise(tmp_path):
  weights = weights_lib.load()
  report = physics_mini.run(weights, tmp_path, physics_mini.Options(scenes=3, batch_size=9))
  scores = report.summary["score"]
  assert list(scores) == ["truth", "model", "copy_last", "noise"]
  assert scores["truth"] > 99 > scores["model"] + 20  # a good model, no perfect one
  assert scores["model"] > scores["copy_last"] + 20
  assert scores["copy_last"] >= scores["noise"]  # both may be 0: a score is cut there
  table = report.tables[0]
  rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
  errors = [row["MSE"] for row in rows.values()]
  assert all(better < worse / 2 for better, worse in itertools.pairwise(errors))
  overlaps = ("spatial IoU", "spatiotemporal IoU", "weighted spatial IoU")
  uncut = [np.mean([row[name] for name in overlaps]) - row["MSE"] for row in rows.values()]
  assert all(better > worse + 0.1 for better, worse in itertools.pairwise(uncut))
  assert len(report.videos) == 9
