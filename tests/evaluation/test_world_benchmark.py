"""The world benchmark: scores of predictors whose quality is known, and what is written of them."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
from PIL import Image
import pytest

import processes
import tiny_run
from videogpt_jax.data import world
from videogpt_jax.errors import InputError
from videogpt_jax.evaluation import world as benchmark
from videogpt_jax.metrics import baselines
from videogpt_jax.metrics import evidence as evidence_lib

SETTINGS = world.Settings()
HISTORY, VIDEOS = 4, 6
OPTIONS = benchmark.Options(videos=VIDEOS, batch_size=6, fit_videos=16)


class Oracle:
  """Knows the held-out videos by their history, and nothing else."""

  def __init__(self):
    samples = [world.simulate(SETTINGS, world.held_out_seed(i)) for i in range(VIDEOS)]
    self.following = {s.frames[:HISTORY].tobytes(): s.frames[HISTORY:] for s in samples}
    self.batches = []

  def __call__(self, histories, count, rng):
    self.batches.append(len(histories))
    return np.stack([self.following[h.tobytes()][:count] for h in histories])


def _copy(histories, count, rng):
  return np.repeat(histories[:, -1:], count, axis=1)


def _measure(predict, out, history=HISTORY, identity=None, **changes):
  options = dataclasses.replace(OPTIONS, **changes)
  return benchmark.measure(predict, SETTINGS, history, out, options, identity or {})[0]


@pytest.fixture(scope="module")
def perfect(tmp_path_factory):
  return _measure(Oracle(), tmp_path_factory.mktemp("perfect"))


def test_perfect_predictions_score_perfectly(perfect):
  summary = perfect.summary()
  assert summary["mse_model"] == 0.0
  assert summary["ssim"]["model"] == pytest.approx([1.0] * 4)
  assert summary["psnr"]["model"] == [100.0] * 4
  assert max(summary["position_error_px"]["model"]) < 0.1
  assert summary["vanished_objects"]["model"] == summary["mistaken_objects"]["model"] == [0.0] * 4
  assert summary["kinetic_energy_drift"]["model"] == pytest.approx([0.0] * 4, abs=0.1)
  assert "mechanical_energy_drift" not in summary  # without gravity there is nothing more


def test_baselines_score_as_their_definition(perfect):
  assert list(perfect.scores) == ["model", *baselines.BASELINES]
  samples = [world.simulate(SETTINGS, world.held_out_seed(i)) for i in range(VIDEOS)]
  errors = [(s.frames[4:] / 255.0 - s.frames[3] / 255.0) ** 2 for s in samples]
  by_frame = np.mean(errors, axis=(0, 2, 3, 4))
  summary = perfect.summary()
  np.testing.assert_allclose(summary["mse_by_frame"]["copy_last"], by_frame, rtol=1e-9)
  assert summary["mse_baselines"]["copy_last"] == pytest.approx(by_frame.mean())
  # A copied object errs by how far the true one has gone, and moves no more.
  gone = [np.linalg.norm(s.positions[4:] - s.positions[3], axis=-1).mean(1) for s in samples]
  np.testing.assert_allclose(
    summary["position_error_px"]["copy_last"], np.mean(gone, axis=0), atol=0.1
  )
  np.testing.assert_allclose(summary["kinetic_energy_drift"]["copy_last"], -1.0, atol=0.01)


def test_a_predictor_that_copies_equals_the_baseline(tmp_path):
  found = _measure(_copy, tmp_path)
  for field in dataclasses.fields(evidence_lib.Scores):
    np.testing.assert_array_equal(
      getattr(found.scores["model"], field.name), getattr(found.scores["copy_last"], field.name)
    )


def test_batches_have_one_size_and_change_nothing(perfect, tmp_path):
  oracle = Oracle()
  found = _measure(oracle, tmp_path, batch_size=4)
  assert oracle.batches == [4, 4]
  np.testing.assert_array_equal(found.scores["model"].mse, perfect.scores["model"].mse)
  assert len(found.scores["model"].mse) == VIDEOS


def test_an_interrupted_evaluation_goes_on_with_the_same_noise(tmp_path):
  """A predictor of noise: what it draws depends on the video alone, not on the interruption."""

  def noise(histories, count, rng):
    draw = np.random.default_rng(np.asarray(jax.random.key_data(rng)))
    return draw.integers(0, 256, (len(histories), count, *histories.shape[2:]), np.uint8)

  calls = []

  def failing(histories, count, rng):
    calls.append(1)
    if len(calls) == 3:
      raise KeyboardInterrupt
    return noise(histories, count, rng)

  sizes = {"batch_size": 2, "samples": 1}
  whole = _measure(noise, tmp_path / "whole", **sizes)
  with pytest.raises(KeyboardInterrupt):
    _measure(failing, tmp_path / "parts", **sizes)
  resumed = _measure(failing, tmp_path / "parts", **sizes)
  assert len(calls) == 4  # two before, the third that failed, and it alone again
  np.testing.assert_array_equal(resumed.scores["model"].mse, whole.scores["model"].mse)
  assert len(np.unique(whole.scores["model"].mse)) == 4 * VIDEOS  # no noise is drawn twice
  with pytest.raises(InputError, match=r"parameters None \(now 1\)"):
    _measure(noise, tmp_path / "parts", identity={"parameters": "1"}, **sizes)


def test_a_restart_with_fewer_videos_leaves_none_of_the_others(tmp_path):
  (tmp_path / "checkpoints").mkdir()  # of the training run whose folder this is
  _measure(_copy, tmp_path)
  assert len(list((tmp_path / "predictions").glob("*_truth.mp4"))) == VIDEOS
  _measure(_copy, tmp_path, videos=2, restart=True)
  for folder, pattern in (("predictions", "*_truth.mp4"), ("gifs", "*.gif")):
    assert len(list((tmp_path / folder).glob(pattern))) == 2
  assert (tmp_path / "checkpoints").exists()


def test_best_and_mean_of_samples(tmp_path):
  """Of three futures the second is perfect for the even videos, the third for the odd ones."""
  oracle, calls = Oracle(), []

  def predict(histories, count, rng):
    calls.append(1)
    frames, copies = oracle(histories, count, rng), _copy(histories, count, rng)
    copies[len(calls) % 2::2] = frames[len(calls) % 2::2] if len(calls) > 1 else \
      copies[len(calls) % 2::2]
    return copies

  found = _measure(predict, tmp_path, samples=3)
  assert len(calls) == 3
  assert found.names()[:3] == ["model", "model_best", "copy_last"]
  copied = found.scores["copy_last"]
  np.testing.assert_array_equal(found.by_video("model_best", "mse"), 0)
  np.testing.assert_array_equal(found.by_frame("model_best", "psnr"), 100)
  np.testing.assert_allclose(found.scores["model"].mse, copied.mse * 2 / 3)
  np.testing.assert_allclose(found.scores["model"].psnr, (copied.psnr * 2 + 100) / 3)
  np.testing.assert_allclose(found.by_frame("model_best", "kinetic"), 0, atol=0.1)
  assert (tmp_path / "predictions" / "00005_model_3.mp4").exists()


def test_best_samples_by_energy_do_not_mix():
  """Gravity: the best sample by kinetic energy is not the best one by all energy."""
  nothing, one = np.zeros((1, 4)), np.ones((1, 4))

  def sample(kinetic, mechanical, followed):
    return evidence_lib.Scores(*[nothing] * 7, one * kinetic, one, one * mechanical, one * 10,
                               one * followed)

  samples = [sample(1.1, 2, 1.0), sample(3, 10.5, 0.6), sample(1, 10, 0.3)]  # the last one: lost
  settings = world.Settings(gravity=0.5)
  mean, best = evidence_lib.of_samples(samples)
  found = evidence_lib.Evidence(settings, HISTORY, {"model": mean}, best)
  assert {"kinetic", "mechanical"} <= set(found.metrics())
  assert best["kinetic"].followed[0, 0] == 1.0 and best["mechanical"].followed[0, 0] == 0.6
  np.testing.assert_allclose(found.by_frame("model_best", "kinetic"), 0.1)
  np.testing.assert_allclose(found.by_frame("model_best", "mechanical"), 0.05)
  # One that lost its objects has no drift, whatever another sample followed, and is best by MSE.
  samples[2] = dataclasses.replace(samples[2], mse=-one)
  assert evidence_lib.of_samples(samples)[1]["mse"].followed[0, 0] == 0.3
  alone = evidence_lib.Evidence(settings, HISTORY, {"model": mean},
                                evidence_lib.of_samples([samples[2], samples[2]])[1])
  assert np.isnan(alone.by_frame("model_best", "kinetic")).all()


def test_summary_is_json_by_frame(perfect):
  summary = json.loads(json.dumps(perfect.summary(), allow_nan=False))
  assert set(summary["mse_baselines"]) == set(baselines.BASELINES)
  for key in ("mse_by_frame", "psnr", "ssim", "position_error_px", "kinetic_energy_drift"):
    assert set(summary[key]) == {"model", *baselines.BASELINES}
    assert all(len(values) == 4 for values in summary[key].values())


def test_objects_out_of_view_do_not_count():
  sample = world.simulate(SETTINGS, world.held_out_seed(0))
  masks = sample.masks.copy()
  masks[HISTORY] = False  # as if all were hidden in the first predicted frame
  unseen = dataclasses.replace(sample, masks=masks)
  scores = evidence_lib.score(SETTINGS, sample.frames[None, HISTORY:], [unseen], HISTORY)
  np.testing.assert_array_equal(np.isnan(scores.position), [[True, False, False, False]])
  summary = evidence_lib.Evidence(SETTINGS, HISTORY, {"model": scores}).summary()
  assert summary["position_error_px"]["model"][0] is None
  assert summary["kinetic_energy_drift"]["model"][0] is None


def test_plot_is_an_image_with_the_curves(perfect, tmp_path):
  path = tmp_path / "new" / "evidence.png"
  evidence_lib.plot(perfect, path)
  with Image.open(path) as picture:
    assert picture.size == (1200, 528)
    pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
  red = np.all(np.abs(pixels.astype(int) - (0xD1, 0x34, 0x2F)) < 8, axis=1)
  assert red.sum() > 1000  # the model's line, in both panels


def test_bad_input_is_refused(tmp_path):
  with pytest.raises(InputError, match="leave none to predict"):
    _measure(_copy, tmp_path, history=8)
  with pytest.raises(InputError, match="at least 1"):
    _measure(_copy, tmp_path, videos=0)
  with pytest.raises(InputError, match="instead of uint8"):
    _measure(lambda *args: _copy(*args)[:, :-1], tmp_path)
  with pytest.raises(InputError, match="instead of uint8"):
    _measure(lambda *args: _copy(*args).astype(np.float32), tmp_path)


def test_the_command_writes_a_report_and_refuses_another_checkpoint(finished, tmp_path):
  out = tmp_path / "out"
  arguments = [f"--checkpoint={finished.workdir}", f"--out={out}", "--videos=2", "--samples=2"]
  result = tiny_run.run("evaluate", *arguments)
  assert result.returncode == 0, result.stderr
  assert "2/2 videos | " in result.stdout
  assert f"wrote {out / 'report.html'}\n" in result.stdout
  assert "Objects mistaken for another" in result.stdout
  results = json.loads((out / "results.json").read_text())
  assert results["summary"]["mse_model"] == json.loads((out / "summary.json").read_text())[
    "mse_model"]
  with Image.open(out / "gifs" / "held_out_001.gif") as picture:
    assert picture.n_frames == 6
  assert len(results["videos"]) == 2
  assert list(results["videos"][0]["files"]) == ["truth", "model", "model 2", "constant_velocity",
                                                 "copy_last"]
  assert all((out / path).stat().st_size for path in results["videos"][1]["files"].values())
  result = tiny_run.run("evaluate", f"--out={out}", "--videos=2", "--samples=2")
  assert result.returncode == 2
  assert "holds results of another evaluation: checkpoint" in result.stderr
  assert json.loads((out / "results.json").read_text()) == results


def test_two_processes_find_what_one_does(finished, tmp_path):
  """Of three batches one process predicts two, the other one; each on its own two devices."""
  arguments = ["-m", "videogpt_jax.evaluate", f"--checkpoint={finished.workdir}", "--videos=34"]
  said = processes.finish(processes.start([*arguments, f"--out={tmp_path / 'two'}"], 2, 2))
  assert "18/18 videos" in said[0] and "report.html" in said[0]
  assert "videos" not in said[1]
  assert sorted(path.name for path in (tmp_path / "two" / "items").iterdir()) == [
    "00000.json", "00016.json", "00032.json"]
  assert len(list((tmp_path / "two" / "predictions").glob("*_truth.mp4"))) == 34
  processes.finish([subprocess.Popen(
    [sys.executable, *arguments, f"--out={tmp_path / 'one'}"], text=True,
    env=processes.environment(2), stdout=subprocess.PIPE, stderr=subprocess.PIPE)])
  one, two = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "two"))
  assert one["tables"] == two["tables"]


@pytest.mark.parametrize(("arguments", "message"), [
  (["--benchmark=loss", "--videos=3"], "Unknown command line flag 'videos'"),
  (["--shift=-1"], "--shift must be positive, got -1.0"),
  (["--out=/proc/none"], "cannot write to"),
])
def test_wrong_command_lines(arguments, message):
  result = tiny_run.run("evaluate", *arguments)
  assert result.returncode == 2
  assert message in result.stderr
  assert "Traceback" not in result.stderr
