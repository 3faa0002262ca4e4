"""The evidence: scores of predictors whose quality is known, and what is written of them."""

import dataclasses
import json

import numpy as np
from PIL import Image
import pytest

from videogpt_jax.data import world
from videogpt_jax.errors import InputError
from videogpt_jax.metrics import baselines
from videogpt_jax.metrics import evidence as evidence_lib

SETTINGS = world.Settings()
HISTORY, VIDEOS = 4, 6


class Oracle:
  """Knows the held-out videos by their history, and nothing else."""

  def __init__(self):
    samples = [world.simulate(SETTINGS, world.held_out_seed(i)) for i in range(VIDEOS)]
    self.following = {s.frames[:HISTORY].tobytes(): s.frames[HISTORY:] for s in samples}
    self.batches = []

  def __call__(self, histories, count):
    self.batches.append(len(histories))
    return np.stack([self.following[h.tobytes()][:count] for h in histories])


def _copy(histories, count):
  return np.repeat(histories[:, -1:], count, axis=1)


def _evaluate(predict, **kwargs):
  arguments = {"history": HISTORY, "videos": VIDEOS, "fit_videos": 16, "examples": 2} | kwargs
  return evidence_lib.evaluate(predict, SETTINGS, **arguments)


@pytest.fixture(scope="module")
def perfect():
  return _evaluate(Oracle())


def test_perfect_predictions_score_perfectly(perfect):
  summary = perfect.summary()
  assert summary["mse_model"] == 0.0
  assert summary["ssim"]["model"] == pytest.approx([1.0] * 4)
  assert summary["psnr"]["model"] == [100.0] * 4
  assert max(summary["position_error_px"]["model"]) < 0.1


def test_baselines_score_as_their_definition(perfect):
  assert list(perfect.scores) == ["model", *baselines.BASELINES]
  samples = [world.simulate(SETTINGS, world.held_out_seed(i)) for i in range(VIDEOS)]
  errors = [(s.frames[4:] / 255.0 - s.frames[3] / 255.0) ** 2 for s in samples]
  by_frame = np.mean(errors, axis=(0, 2, 3, 4))
  summary = perfect.summary()
  np.testing.assert_allclose(summary["mse_by_frame"]["copy_last"], by_frame, rtol=1e-9)
  assert summary["mse_baselines"]["copy_last"] == pytest.approx(by_frame.mean())
  # A copied object errs by how far the true one has gone.
  gone = [np.linalg.norm(s.positions[4:] - s.positions[3], axis=-1).mean(1) for s in samples]
  np.testing.assert_allclose(
    summary["position_error_px"]["copy_last"], np.mean(gone, axis=0), atol=0.1
  )


def test_a_predictor_that_copies_equals_the_baseline():
  found = _evaluate(_copy)
  for field in ("mse", "psnr", "ssim", "position"):
    np.testing.assert_array_equal(
      getattr(found.scores["model"], field), getattr(found.scores["copy_last"], field)
    )


def test_batches_have_one_size_and_change_nothing(perfect):
  oracle = Oracle()
  found = _evaluate(oracle, batch_size=4)
  assert oracle.batches == [4, 4]
  np.testing.assert_array_equal(found.scores["model"].mse, perfect.scores["model"].mse)
  assert len(found.scores["model"].mse) == VIDEOS


def test_table_is_aligned_and_right():
  found = _evaluate(_copy)
  blocks = found.table().split("\n\n")
  assert blocks[0].startswith("6 held-out videos, 4 frames given, 4 predicted")
  assert len(blocks) == 5
  for block in blocks[1:]:
    lines = block.splitlines()[1:]
    names = lines[0].split()
    assert names == ["frame", "model", *baselines.BASELINES]
    ends = [lines[0].index(name) + len(name) for name in names]
    rows = [line for line in lines[1:] if not line.startswith("-")]
    assert [row.split()[0] for row in rows] == ["1", "2", "3", "4", "mean"]
    for row in rows:
      for end in ends:  # right-aligned under its name: a digit at the end, then no digit
        assert row[end - 1].isalnum() and not row[end : end + 1].isdigit()
      assert row.count("*") == 1
  values = np.array([row.replace("*", "").split()[1:] for row in _rows(blocks[1])], float)
  np.testing.assert_allclose(values[:-1].mean(axis=0), values[-1], atol=2e-5)
  np.testing.assert_allclose(values[0, 0], found.scores["model"].mse[:, 0].mean(), atol=1e-5)


def _rows(block):
  lines = block.splitlines()[2:]
  return [line for line in lines if not line.startswith("-")]


def test_best_of_a_row_is_marked_in_the_right_direction(perfect):
  for block in perfect.table().split("\n\n")[1:]:
    for row in _rows(block):
      assert row.split()[1].endswith("*")


def test_summary_is_json_by_frame(perfect):
  summary = json.loads(json.dumps(perfect.summary(), allow_nan=False))
  assert set(summary["mse_baselines"]) == set(baselines.BASELINES)
  for key in ("mse_by_frame", "psnr", "ssim", "position_error_px"):
    assert set(summary[key]) == {"model", *baselines.BASELINES}
    assert all(len(values) == 4 for values in summary[key].values())


def test_objects_out_of_view_do_not_count():
  sample = world.simulate(SETTINGS, world.held_out_seed(0))
  masks = sample.masks.copy()
  masks[HISTORY] = False  # as if all were hidden in the first predicted frame
  unseen = dataclasses.replace(sample, masks=masks)
  scores = evidence_lib.score(sample.frames[None, HISTORY:], [unseen], HISTORY)
  np.testing.assert_array_equal(np.isnan(scores.position), [[True, False, False, False]])
  found = evidence_lib.Evidence(
    SETTINGS, HISTORY, {"model": scores}, sample.frames[None], {"model": sample.frames[None, 4:]}
  )
  assert found.summary()["position_error_px"]["model"][0] is None
  assert "nan" in found.table().splitlines()[-6]


def test_plot_is_an_image_with_the_curves(perfect, tmp_path):
  path = tmp_path / "new" / "evidence.png"
  evidence_lib.plot(perfect, path)
  with Image.open(path) as picture:
    assert picture.size == (1200, 528)
    pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
  red = np.all(np.abs(pixels.astype(int) - (0xD1, 0x34, 0x2F)) < 8, axis=1)
  assert red.sum() > 1000  # the model's line, in both panels


def test_gifs_show_whole_videos_side_by_side(perfect, tmp_path):
  paths = evidence_lib.write_gifs(perfect, tmp_path / "gifs")
  assert [path.name for path in paths] == ["held_out_000.gif", "held_out_001.gif"]
  with Image.open(paths[0]) as picture:
    assert picture.n_frames == SETTINGS.frames
    assert picture.width > 4 * 4 * SETTINGS.size  # four columns, pixels enlarged four times


def test_bad_input_is_refused():
  with pytest.raises(InputError, match="leave none to predict"):
    _evaluate(_copy, history=8)
  with pytest.raises(InputError, match="at least 1"):
    _evaluate(_copy, videos=0)
  with pytest.raises(InputError, match="instead of uint8"):
    _evaluate(lambda histories, count: _copy(histories, count)[:, :-1])
  with pytest.raises(InputError, match="instead of uint8"):
    _evaluate(lambda histories, count: _copy(histories, count).astype(np.float32))
