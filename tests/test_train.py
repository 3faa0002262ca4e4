"""The training loop and its step: what they compute, and how they start, stop and go on."""

import dataclasses
import json
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
import numpy as np
import optax
import pytest

import tiny_run
from videogpt_jax import checkpoint
from videogpt_jax import checkpoint_files
from videogpt_jax import config as config_lib
from videogpt_jax import evaluators
from videogpt_jax import recovery
from videogpt_jax import retention
from videogpt_jax import sharding
from videogpt_jax import step as step_lib
from videogpt_jax import telemetry
from videogpt_jax import train
from videogpt_jax import weights as weights_lib
from videogpt_jax.data import pipeline
from videogpt_jax.errors import InputError
from videogpt_jax.errors import StorageError
from videogpt_jax.telemetry import goodput
from videogpt_jax.telemetry import writer as writer_lib

# The step itself --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def steps(tiny_data):
  """Real batches, and the states and metrics of six train steps on them, by hand."""
  c = tiny_run.config(tiny_data)
  recipe, mesh = config_lib.recipe(c), sharding.make_mesh(c.mesh)
  source, _ = train.open_data(c)
  batches = pipeline.batches(source, frames=4, interval=(1, 1), batch_size=8, seed=c.seed)
  stored = [next(batches).latents for _ in range(6)]
  run = step_lib.compile_step(recipe, mesh)
  with sharding.use(mesh):
    state = step_lib.create_state(recipe, mesh)
    states, metrics = [jax.device_get(state)], []
    for batch in stored:
      state, measured = run(state, batch)
      states.append(jax.device_get(state))
      metrics.append(jax.device_get(measured))
  return recipe, mesh, run, stored, states, metrics


def _copy(state):
  """A state that a step may donate."""
  return jax.tree.map(jnp.array, state)


def _assert_equal(ours, theirs):
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_ema_follows_the_parameters_fast_at_first(steps):
  *_, states, _ = steps
  ema = states[0].params
  for n, state in enumerate(states[1:]):
    decay = min(0.999, (1 + n) / (10 + n))
    ema = jax.tree.map(lambda old, new, d=decay: d * old + (1 - d) * new, ema, state.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7),
                 ema, state.ema)


def test_a_step_counts_itself_and_moves_every_parameter(steps):
  *_, states, metrics = steps
  assert [int(state.step) for state in states] == list(range(7))
  moved = jax.tree.map(lambda a, b: bool((a != b).any()), states[0].params, states[6].params)
  still = [jax.tree_util.keystr(path) for path, value in jax.tree.leaves_with_path(moved)
           if not value]
  assert not still
  assert all(int(m["skipped"]) == 0 and np.isfinite(m["grad_norm"]) for m in metrics)


def test_loss_by_noise_and_by_clip_add_up_to_the_loss(steps):
  for m in steps[-1]:
    assert m["loss_count"] == 8 * 4  # every frame of every video once
    for kind in ("noise", "clip"):
      np.testing.assert_allclose(m[f"{kind}_sum"].sum(), m["loss_sum"], rtol=1e-5)
      assert m[f"{kind}_count"].sum() == 32
    assert m["clip_count"][0] >= 8  # every video has a first clip


def test_an_update_that_is_not_finite_is_skipped_and_counted(steps):
  _, mesh, run, stored, states, _ = steps
  good = states[2]
  bad = dataclasses.replace(good, params=jax.tree.map(lambda x: x * np.nan, good.params))
  with sharding.use(mesh):
    once, metrics = run(_copy(bad), stored[2])
    once = jax.device_get(once)
    assert (int(once.bad_steps), int(once.skipped), int(once.step)) == (1, 1, 3)
    assert int(metrics["bad_steps"]) == 1
    _assert_equal((once.params, once.ema, once.opt_state), (bad.params, bad.ema, bad.opt_state))
    twice = jax.device_get(run(_copy(once), stored[3])[0])
    assert (int(twice.bad_steps), int(twice.skipped)) == (2, 2)
    # A good step ends the row of bad ones, not the count of all; it is as if they never were.
    after = jax.device_get(run(_copy(dataclasses.replace(once, params=good.params, step=good.step)),
                               stored[2])[0])
  assert (int(after.bad_steps), int(after.skipped)) == (0, 1)
  _assert_equal((after.params, after.ema, after.opt_state),
                (states[3].params, states[3].ema, states[3].opt_state))


def test_a_gradient_far_larger_than_usual_is_skipped(steps):
  recipe, mesh, _, stored, states, metrics = steps
  run = step_lib.compile_step(dataclasses.replace(recipe, spike=3.0), mesh)
  norm = float(metrics[2]["grad_norm"])
  # (updates so far, skipped of them, typical norm in gradient norms) -> whether it is taken
  cases = {(200, 0, 0.34): True, (200, 0, 0.32): False, (40, 0, 0.1): True, (200, 150, 0.1): True,
           (201, 101, 0.1): False}
  for (seen, skipped, typical), taken in cases.items():
    state = dataclasses.replace(states[2], step=np.int32(seen), skipped=np.int32(skipped),
                                typical_norm=np.float32(typical * norm))
    with sharding.use(mesh):
      # The noise depends on the step, so the norm does too, a little.
      after, measured = jax.device_get(run(_copy(state), stored[2]))
    assert (int(after.bad_steps), int(after.skipped)) == (1 - taken, skipped + 1 - taken)
    moved = any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (after.params, state.params)),
                                               strict=True))
    assert moved == taken
    kept = seen - skipped
    expected = state.typical_norm + taken * (
      float(measured["grad_norm"]) - state.typical_norm) / min(kept + 1, 100)
    np.testing.assert_allclose(after.typical_norm, expected, rtol=1e-5)


def test_the_typical_norm_is_the_mean_at_first(steps):
  *_, states, metrics = steps
  norms = [float(m["grad_norm"]) for m in metrics]
  np.testing.assert_allclose([float(s.typical_norm) for s in states[1:]],
                             np.cumsum(norms) / np.arange(1, 7), rtol=1e-5)


def test_microbatches_give_the_gradient_of_the_whole_batch(steps):
  """Both moments of Adam, after one step, are the gradient and its square."""
  recipe, mesh, _, stored, states, metrics = steps
  split = step_lib.compile_step(dataclasses.replace(recipe, accumulation=2), mesh)
  with sharding.use(mesh):
    state, measured = jax.device_get(split(_copy(states[0]), stored[0]))
  _assert_same_gradient(state.opt_state, states[1].opt_state)
  for name in ("loss_sum", "loss_count", "noise_sum", "noise_count", "clip_sum", "clip_count"):
    np.testing.assert_allclose(measured[name], metrics[0][name], rtol=1e-5, atol=1e-6)


def _assert_same_gradient(opt_state, expected):
  """Compares Adam's moments, for optimizer states one step after the start."""
  for moment in ("mu", "nu"):
    ours, theirs = (optax.tree_utils.tree_get(s, moment) for s in (opt_state, expected))
    scale = max(float(np.abs(x).max()) for x in jax.tree.leaves(theirs))
    assert scale > 1e-6
    jax.tree.map(lambda a, b, s=scale: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * s),
                 ours, theirs)


# The optimizer ----------------------------------------------------------------------------


def test_muon_resumes_bit_for_bit(tiny, tmp_path):
  tiny.optimizer.name = "muon"
  tiny.log.videos = 0
  for workdir, steps in (("whole", 6), ("parts", 3), ("parts", 6)):
    tiny.train.steps = steps
    train.train(tiny, str(tmp_path / workdir))
  tiny_run.assert_same_state(tmp_path / "whole", tmp_path / "parts")


# A whole run ------------------------------------------------------------------------------


def test_the_loop_is_the_step_on_the_pipelines_batches(steps, finished):
  """The command's log has the losses of the steps done by hand."""
  *_, metrics = steps
  lines = telemetry.read_metrics(finished.workdir / telemetry.METRICS_FILE)
  for line in lines[:3]:
    pair = metrics[line["step"] - 2:line["step"]]  # the log has a line for two steps
    loss = sum(m["loss_sum"] for m in pair) / sum(m["loss_count"] for m in pair)
    norm = sum(m["grad_norm"] for m in pair) / 2
    assert (line["loss"], line["grad_norm"]) == pytest.approx((loss, norm), rel=1e-5)


def test_log_lines_and_metrics(finished):
  lines = re.findall(
    r"^step (\d+)/24 +[\d.]+% \| loss ([\d.]+) \| gnorm [\d.]+ \| lr [\d.e-]+ \| [\d.]+ ms "
    r"\| \d+ tok/s (?:\| mfu \d+% )?\| wait [\d.]+% (?:\| save [\d.]+ s )?"
    r"(?:\| eval [\d.]+ s )?\| good \d+% \| rss \d+ MiB \| eta \S+$",
    finished.result.stdout, re.M)
  assert [int(step) for step, _ in lines] == list(range(2, 25, 2))
  records = telemetry.read_metrics(finished.workdir / telemetry.METRICS_FILE)
  training = [r for r in records if "loss" in r]
  assert [r["step"] for r in training] == list(range(2, 25, 2))
  for (_, shown), record in zip(lines, training, strict=True):
    assert float(shown) == pytest.approx(record["loss"], rel=1e-3)
    names = record.keys()
    assert names >= {"loss", "grad_norm", "learning_rate", "skipped", "tokens_per_s",
                     "steps_per_s", "step_s", "data_wait", "host_rss_mib", "train_seconds",
                     "checkpoint_s", "evaluation_s", "goodput",
                     *(f"time/{phase}" for phase in goodput.PHASES)}
    by_noise = [float(record[n]) for n in names if re.fullmatch(r"loss_by_noise/[0-4]", n)]
    by_clip = [float(record[n]) for n in names if re.fullmatch(r"loss_by_clip/[0-7]", n)]
    for group in (by_noise, by_clip):
      assert min(group) <= record["loss"] <= max(group)
  assert [r["step"] for r in records if "validation/loss" in r] == [12, 24]
  assert training[-1]["learning_rate"] == pytest.approx(1e-3)
  assert training[-1]["loss"] < 0.7 * training[0]["loss"]  # it learns


def test_where_the_time_went(finished):
  """The phases of the metrics add up to the time between the first record and the last."""
  records = telemetry.read_metrics(finished.workdir / writer_lib.TIME_FILE)
  assert [(r["step"], r.get("event")) for r in (records[0], records[-1])] == [
    (0, "start"), (24, "end")]
  wall = records[-1]["time"] - records[0]["time"] + records[0]["seconds"]["start"]
  spent = sum(sum(r["seconds"].values()) for r in records)
  assert spent == pytest.approx(wall, abs=0.1)
  training = [r for r in telemetry.read_metrics(finished.workdir / telemetry.METRICS_FILE)
              if "loss" in r]
  assert all(0 <= r["goodput"] <= 1 for r in training)
  last = training[-1]
  assert last["goodput"] == pytest.approx(last["time/step"] / last["train_seconds"])
  for name in ("checkpoint", "evaluation"):  # what followed the last line is not in it
    told = sum(r[f"{name}_s"] for r in training)
    assert 0 < told == pytest.approx(last[f"time/{name}"], abs=1e-3)
    assert [r["step"] for r in training if r[f"{name}_s"]] == {
      "checkpoint": [4, 8, 10, 14, 16, 20, 22], "evaluation": [14]}[name]
  assert re.search(r"^  all +[\d.]+ s, goodput [\d.]+%$", finished.result.stdout, re.M)


def test_time_of_lost_steps_and_between_processes(finished, tiny, tmp_path, capsys):
  tiny.train.steps, tiny.log.videos = 24, 0
  shutil.copytree(finished.workdir, tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / checkpoint_files.FOLDER / "24")
  path = tmp_path / writer_lib.TIME_FILE
  before = telemetry.read_metrics(path)
  killed = [r for r in before if "event" not in r or r["event"] == "start"]
  path.write_text("".join(json.dumps(r) + "\n" for r in killed))  # before it could say its end
  began = time.time()
  assert train.train(tiny, str(tmp_path)) == 24
  start = telemetry.read_metrics(path)[len(killed)]
  assert (start["step"], start["event"]) == (21, "start")
  assert start["seconds"]["down"] == pytest.approx(began - killed[-1]["time"], abs=0.5)
  step_22_to_24 = sum(r["seconds"].get("step", 0) for r in killed if r["step"] > 21)
  last = [r for r in telemetry.read_metrics(tmp_path / telemetry.METRICS_FILE) if "loss" in r][-1]
  assert last["time/lost"] == pytest.approx(step_22_to_24, rel=1e-3)
  assert last["time/down"] == pytest.approx(start["seconds"]["down"])
  assert "since the first start (2 starts)" in capsys.readouterr().out


def test_held_out_loss_is_repeatable(finished, tiny, tmp_path):
  """The same parameters have the same held-out loss, whenever and how often it is taken."""
  run = _open_run(tiny, tmp_path)
  evaluate = evaluators.HeldOut(run)
  ema = _find_state(tiny, finished.workdir).ema
  with sharding.use(run.mesh):
    evaluate(1, ema)
    evaluate(2, ema)
  run.writer.close()
  first, second = telemetry.read_metrics(tmp_path / telemetry.METRICS_FILE)
  told = telemetry.read_metrics(finished.workdir / telemetry.METRICS_FILE)[-1]
  assert first["validation/loss"] == second["validation/loss"]
  assert first["validation/loss"] == pytest.approx(told["validation/loss"], rel=1e-6)


def test_scores_of_rollouts_are_those_of_the_predicted_frames(finished, tiny, tmp_path, capsys):
  """Of the same videos every time, which are rolled out once for the scores and the pictures."""
  tiny.log.rollouts, tiny.log.videos = 3, 2
  tiny.log.rollouts_every, tiny.log.videos_every, tiny.train.steps = 4, 6, 15
  run = _open_run(tiny, tmp_path)
  ema = _find_state(tiny, finished.workdir).ema
  held_out, scores, videos = evaluators.of_run(run)
  due = lambda evaluator: [step for step in range(1, 16) if evaluator.due(step)]
  assert (due(scores), due(videos), due(held_out)) == ([4, 8, 12, 15], [6, 12, 15], [6, 12, 15])
  with sharding.use(run.mesh):
    for step in (4, 12):
      scores.measure(step, ema)
    first = scores.measure.rolled_out(12, ema)
    videos.measure(12, ema)
  assert videos.measure.rolled_out(12, ema)[1] is first[1]
  run.writer.close()
  told = telemetry.read_metrics(tmp_path / telemetry.METRICS_FILE)
  assert [r["step"] for r in told] == [4, 12]
  same = lambda r: {name: x for name, x in r.items() if name.startswith("rollout/")}
  assert same(told[0]) == same(told[1])
  truth, predicted = (x.astype(np.float64) / 255 for x in first)
  assert len(truth) == 3
  error = ((truth - predicted)[:, 2:] ** 2).mean(axis=(0, 2, 3, 4))
  assert [told[0][f"rollout/mse_by_frame/{i}"] for i in range(2)] == pytest.approx(error.tolist())
  assert told[0]["rollout/mse"] == pytest.approx(error.mean())
  copied = ((truth[:, 2:] - truth[:, 1:2]) ** 2).mean()
  assert told[0]["rollout/mse_copy_last"] == pytest.approx(copied)
  assert "rollout/psnr_by_frame/1" in told[0] and "rollout/mse_by_frame/2" not in told[0]
  assert len(list((tmp_path / "videos").glob("rollout_*_12.gif"))) == 2
  assert re.search(r"step 12 rollouts of 3 videos: MSE 0\.\d+", capsys.readouterr().out)


def _open_run(c, workdir):
  source, validation = train.open_data(c)
  return evaluators.Run(c, str(workdir), config_lib.recipe(c), sharding.make_mesh(c.mesh), source,
                   validation, telemetry.Writer(workdir))


@pytest.fixture
def interrupt(monkeypatch):
  """Makes runs in this process get SIGTERM while a given step is computed."""

  def at(step):
    compile_step = step_lib.compile_step

    def compile_and_interrupt(*arguments):
      run = compile_step(*arguments)

      def run_and_interrupt(state, stored):
        state, metrics = run(state, stored)
        if int(state.step) == step:
          os.kill(os.getpid(), signal.SIGTERM)
        return state, metrics

      return run_and_interrupt

    monkeypatch.setattr(step_lib, "compile_step", compile_and_interrupt)

  return at


def test_a_signal_saves_and_the_resumed_run_ends_with_the_same_bits(
  tiny, tmp_path, interrupt, monkeypatch, capsys, finished
):
  tiny.train.steps, tiny.log.videos, tiny.log.validate_every = 24, 0, 12
  before = signal.getsignal(signal.SIGTERM)
  interrupt(8)
  assert train.train(tiny, str(tmp_path)) == 8  # not a step that the cadence would save
  monkeypatch.undo()
  assert signal.getsignal(signal.SIGTERM) == before
  assert "stopped by a signal after step 8" in capsys.readouterr().out
  assert int(tiny_run.saved_state(tmp_path)["step"]) == 8
  tiny.checkpoint.init_from = str(tmp_path / "not there")  # a resume does not even look
  assert train.train(tiny, str(tmp_path)) == 24
  assert f"resuming {tmp_path} at step 8" in capsys.readouterr().out
  tiny_run.assert_same_state(tmp_path, finished.workdir)
  records = telemetry.read_metrics(tmp_path / telemetry.METRICS_FILE)
  told = telemetry.read_metrics(finished.workdir / telemetry.METRICS_FILE)
  loss = lambda lines: [(r["step"], r.get("loss"), r.get("validation/loss")) for r in lines]
  assert loss(records) == loss(told)


def test_a_finished_run_is_left_as_it_is(finished, tmp_path, tiny, capsys):
  tiny.train.steps = 24
  before = {path: path.stat().st_mtime_ns for path in _files(finished.workdir)}
  assert train.train(tiny, str(finished.workdir)) == 24
  after = {path: path.stat().st_mtime_ns for path in _files(finished.workdir)}
  assert before == after
  assert "first step" not in capsys.readouterr().out


def _files(workdir):
  return [path for path in (workdir / checkpoint_files.FOLDER).rglob("*") if path.is_file()]


# How a run starts -------------------------------------------------------------------------


def _find_state(c, workdir):
  """What a run would start from, and its step."""
  source, _ = train.open_data(c)
  checkpoints = checkpoint.Checkpoints(workdir, keep=retention.Retention(2), save_every=3)
  try:
    recipe, mesh = config_lib.recipe(c), sharding.make_mesh(c.mesh)
    return train.find_state(c, recipe, mesh, checkpoints, source.fingerprint)
  finally:
    checkpoints.close()


def test_resume_goes_before_init_from_goes_before_scratch(tiny, finished, steps, tmp_path, capsys):
  tiny.train.steps = 24
  scratch = _find_state(tiny, tmp_path / "new")
  _assert_equal(jax.device_get(scratch), steps[4][0])

  tiny.checkpoint.init_from = str(finished.workdir)
  started = jax.device_get(_find_state(tiny, tmp_path / "new"))
  assert f"starting from the weights of {finished.workdir}" in capsys.readouterr().out
  ema = checkpoint_files.load_params(finished.workdir, "ema")[0]
  _assert_equal((started.params, started.ema), (ema, ema))
  assert int(started.step) == 0
  _assert_equal(started.opt_state, steps[4][0].opt_state)

  tiny.checkpoint.init_from = str(tmp_path / "not there")
  resumed = jax.device_get(_find_state(tiny, finished.workdir))
  assert int(resumed.step) == 24
  _assert_equal(resumed.params, checkpoint_files.load_params(finished.workdir, "params")[0])
  with pytest.raises(InputError, match="not there"):
    _find_state(tiny, tmp_path / "new")


def test_without_an_ema_the_parameters_are_shown(tiny, finished, tmp_path):
  """No copy is kept, in memory or on disk; and a run may begin or cease to keep one."""
  tiny.train.ema_decay, tiny.train.steps = 0.0, 6
  train.train(tiny, str(tmp_path))
  saved = checkpoint_files.saved_tree(tmp_path / checkpoint_files.FOLDER / "6")
  assert set(saved) == {"step", "params", "opt_state", "bad_steps", "skipped", "typical_norm"}
  params = checkpoint_files.load_params(tmp_path, "params")[0]
  _assert_equal(checkpoint_files.load_params(tmp_path)[0], params)
  _assert_equal(weights_lib.load(str(tmp_path)).params, params)
  state = _find_state(tiny, tmp_path)
  assert state.ema is None and state.shown is state.params
  tiny.train.ema_decay = 0.999
  _assert_equal(jax.device_get(_find_state(tiny, tmp_path).ema), params)

  tiny.train.ema_decay = 0.0
  ceased = _find_state(tiny, finished.workdir)
  assert ceased.ema is None
  saved = checkpoint_files.load_params(finished.workdir, "params")[0]
  _assert_equal(jax.device_get(ceased.params), saved)


def test_init_from_another_model_is_refused(tiny, finished, tmp_path):
  tiny.checkpoint.init_from = str(finished.workdir)
  tiny.model.intermediate_size = 48
  with pytest.raises(InputError, match="holds another model"):
    _find_state(tiny, tmp_path)


def test_a_resume_with_another_model_or_other_data_is_refused(tiny, finished, tmp_path):
  tiny.model.num_layers = 3
  with pytest.raises(InputError, match=r"model\.num_layers is 3, in the checkpoint 2.*--workdir"):
    train.train(tiny, str(finished.workdir))
  tiny.model.num_layers, tiny.data.train_videos = 2, 10
  tiny.data.path = str(tmp_path / "other")
  tiny_run.encode.encode(tiny, processes=1)
  with pytest.raises(InputError, match="the data has fingerprint"):
    train.train(tiny, str(finished.workdir))


# What can go wrong on the way -------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch):
  """Makes the loss of chosen steps NaN, by NaN parameters for the length of that step."""

  def at(*bad):
    compile_step = step_lib.compile_step

    def compile_and_poison(*arguments):
      run = compile_step(*arguments)

      def run_poisoned(state, stored):
        if int(state.step) + 1 not in bad:
          return run(state, stored)
        params = jax.tree.map(jnp.array, state.params)
        nan = jax.tree.map(lambda x: x * jnp.nan, params)
        state, metrics = run(dataclasses.replace(state, params=nan), stored)
        return dataclasses.replace(state, params=params), metrics

      return run_poisoned

    monkeypatch.setattr(step_lib, "compile_step", compile_and_poison)

  return at


def test_nan_losses_are_skipped_and_too_many_stop_the_run(tiny, tmp_path, poison, monkeypatch,
                                                          capsys):
  tiny.train.max_bad_steps, tiny.log.videos, tiny.log.every = 3, 0, 1
  tiny.train.max_rollbacks = 0
  poison(2, 3, 7, 8, 9, 10)  # two in a row are borne, three are not
  with pytest.raises(InputError, match=r"3 updates in a row, up to step 9.*step 6.*is intact"):
    train.train(tiny, str(tmp_path))
  records = telemetry.read_metrics(tmp_path / telemetry.METRICS_FILE)
  by_step = {r["step"]: r for r in records if "skipped" in r}
  assert [by_step[n]["skipped"] for n in range(1, 8)] == [0, 1, 2, 2, 2, 2, 3]
  assert by_step[2]["loss"] is None
  lost = [by_step[n]["time/lost"] for n in range(1, 8)]
  assert lost[0] == 0 < lost[1] < lost[2] < lost[6]
  assert lost[3:6] == pytest.approx([lost[2]] * 3, abs=1e-5)
  assert by_step[4]["loss"] is not None
  assert re.search(r"step 3/12 .*\| skipped 2 \|", capsys.readouterr().out)
  state = tiny_run.saved_state(tmp_path)
  assert int(state["step"]) == 6  # none was saved at step 9, within the row
  assert all(np.isfinite(value).all() for value in state.values())
  monkeypatch.undo()
  assert train.train(tiny, str(tmp_path)) == 12  # and it goes on from there


def test_returns_to_the_same_parameters_are_counted(tiny, tmp_path, poison, capsys):
  """Also where each of them was saved under the step at which it happened."""
  tiny.train.steps, tiny.train.max_bad_steps, tiny.train.max_rollbacks = 60, 3, 2
  tiny.log.videos, tiny.log.validate_every = 0, 60
  poison(*range(7, 61))
  with pytest.raises(InputError, match=r"up to step 15.*2 returns .* have not helped"):
    train.train(tiny, str(tmp_path))
  assert "going on from step 12 with the parameters of step 9" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_learning_rate_is_that_of_the_updates(tiny, tmp_path, poison, name):
  """An update that is skipped does not count in it; after a return it is that of the step."""
  tiny.optimizer.name = name
  tiny.train.steps, tiny.train.max_bad_steps, tiny.log.videos, tiny.log.every = 12, 2, 0, 1
  tiny.optimizer.warmup_steps, tiny.optimizer.learning_rate = 100, 1.0
  poison(2, 8, 9)
  train.train(tiny, str(tmp_path))
  records = telemetry.read_metrics(tmp_path / telemetry.METRICS_FILE)
  rates = [100 * r["learning_rate"] for r in records if "learning_rate" in r]
  assert rates == pytest.approx([1, 2, 2, 3, 4, 5, 6, 7, 7, 10, 11, 12])


def test_a_row_of_skipped_updates_leads_back_to_the_last_good_checkpoint(
  tiny, steps, tmp_path, poison, interrupt, monkeypatch, capsys
):
  """Its batches are passed over; the same happens in a run that is stopped on the way."""
  recipe, mesh, step, *_ = steps
  tiny.train.max_bad_steps, tiny.log.videos, tiny.checkpoint.keep = 2, 0, 9
  poison(5, 7, 8, 9)
  assert train.train(tiny, str(tmp_path / "a")) == 12
  assert "going on from step 9 with the parameters of step 6" in capsys.readouterr().out
  end = tiny_run.saved_state(tmp_path / "a")
  assert (int(end["step"]), int(end["bad_steps"]), int(end["skipped"])) == (12, 0, 4)

  shutil.copytree(tmp_path / "a", tmp_path / "copy")
  for later in ("9", "12"):
    shutil.rmtree(tmp_path / "a" / checkpoint_files.FOLDER / later)
  opened = checkpoint.Checkpoints(tmp_path / "a", keep=retention.Retention(9), save_every=3)
  number, state = opened.restore(step_lib.abstract_state(recipe, mesh))
  opened.close()
  assert number == 6
  batches = pipeline.batches(train.open_data(tiny)[0], frames=4, interval=(1, 1), batch_size=8,
                             seed=tiny.seed, start_step=9)
  state = dataclasses.replace(state, step=jnp.int32(9))
  with sharding.use(mesh):
    for _ in range(3):
      state, _ = step(state, next(batches).latents)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.params),
               checkpoint_files.load_params(tmp_path / "copy", "params")[0])

  interrupt(8)  # within the row: what was skipped is not saved
  assert train.train(tiny, str(tmp_path / "b")) == 8
  monkeypatch.undo()
  assert int(tiny_run.saved_state(tmp_path / "b")["step"]) == 6
  poison(5, 7, 8, 9)
  assert train.train(tiny, str(tmp_path / "b")) == 12
  theirs = tiny_run.saved_state(tmp_path / "b")
  for name, value in end.items():
    np.testing.assert_array_equal(value, theirs[name], err_msg=name)


def test_a_damaged_checkpoint_is_not_gone_back_to(tiny, tmp_path, poison, monkeypatch, capsys):
  tiny.train.max_bad_steps, tiny.log.videos, tiny.checkpoint.keep = 2, 0, 9
  poison(7, 8, 9)
  go_back = recovery.Recovery.__call__

  def damage_and_go_back(self, state, log):
    self._checkpoints.wait()  # it is saved in the background
    path = tmp_path / checkpoint_files.FOLDER / "6" / "state" / "manifest.ocdbt"
    path.write_bytes(path.read_bytes()[:-1])
    return go_back(self, state, log)

  monkeypatch.setattr(recovery.Recovery, "__call__", damage_and_go_back)
  assert train.train(tiny, str(tmp_path)) == 12
  assert "with the parameters of step 3" in capsys.readouterr().out
  assert (tmp_path / checkpoint_files.FOLDER / "damaged-6").is_dir()


def test_steps_go_on_while_storage_is_slow(tiny, tmp_path, monkeypatch):
  """No checkpoint is written before the next one is due; all are whole."""
  tiny.train.steps, tiny.log.videos, tiny.checkpoint.keep = 9, 0, 9
  compile_step, write, reached = step_lib.compile_step, checkpoint.Checkpoints._write_checksums, []

  def compile_and_count(*arguments):
    run = compile_step(*arguments)

    def run_and_count(state, stored):
      state, metrics = run(state, stored)
      reached.append(int(state.step))
      return state, metrics

    return run_and_count

  def write_slowly(self):
    due, deadline = min(self._saving + tiny.checkpoint.every, 9), time.monotonic() + 60
    while reached[-1] < due:
      assert time.monotonic() < deadline
      time.sleep(0.01)
    time.sleep(0.3)  # the next save, or the end of the run, comes meanwhile
    assert reached[-1] == due
    write(self)

  monkeypatch.setattr(step_lib, "compile_step", compile_and_count)
  monkeypatch.setattr(checkpoint.Checkpoints, "_write_checksums", write_slowly)
  assert train.train(tiny, str(tmp_path)) == 9
  folder = tmp_path / checkpoint_files.FOLDER
  for step in (3, 6, 9):
    assert checkpoint_files.find(folder / str(step)) == folder / str(step)  # reads every byte
    assert int(checkpoint_files.load_params(folder / str(step), "step")[0]) == step


def test_a_signal_saves_although_storage_hangs_where_the_data_is(tiny, tmp_path, monkeypatch):
  tiny.log.videos, tiny.checkpoint.every = 0, 100
  read, hangs, storage, saved = pipeline.batches, threading.Event(), threading.Event(), []
  (tmp_path / checkpoint_files.FOLDER).mkdir()

  def hanging(*arguments, **named):
    batches = read(*arguments, **named)
    if len(hangs_at) == 1:
      yield from (next(batches) for _ in range(hangs_at.pop()))
      hangs.set()
      storage.wait(60)
    yield from batches

  def interrupt_and_look():
    assert hangs.wait(60)
    time.sleep(1)  # for the steps on the batches that are there
    os.kill(os.getpid(), signal.SIGTERM)
    deadline = time.monotonic() + 40
    folder = tmp_path / checkpoint_files.FOLDER
    while not (found := [path.name for path in folder.iterdir() if path.name.isdigit()]) and (
        time.monotonic() < deadline):
      time.sleep(0.05)
    saved.extend(found)
    storage.set()

  hangs_at = [5]
  monkeypatch.setattr(pipeline, "batches", hanging)
  thread = threading.Thread(target=interrupt_and_look)
  thread.start()
  done = train.train(tiny, str(tmp_path))
  thread.join()
  assert saved == [str(done)] and 0 < done <= 5


def test_a_full_disk_stops_the_run_and_the_last_checkpoint_stays(tiny, tmp_path, finished):
  tiny.train.steps, tiny.log.videos, tiny.checkpoint.failures = 24, 0, 0
  shutil.copytree(finished.workdir, tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / checkpoint_files.FOLDER / "24")
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  # No longer file can be written: enough for the log, too little for the names of the arrays.
  # (How many files the arrays themselves are in differs from save to save.)
  size = (tmp_path / checkpoint_files.FOLDER / "21" / "state" / "_METADATA").stat().st_size - 1
  assert size > 1.5 * (tmp_path / telemetry.METRICS_FILE).stat().st_size
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    with pytest.raises(StorageError, match=r"step 24 could not.*step 21 is whole.*free some space"):
      train.train(tiny, str(tmp_path))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert int(tiny_run.saved_state(tmp_path)["step"]) == 21
  assert train.train(tiny, str(tmp_path)) == 24
  tiny_run.assert_same_state(tmp_path, finished.workdir)


# Devices ----------------------------------------------------------------------------------

_EIGHT = """
import sys
import jax
import numpy as np
import tiny_run
from videogpt_jax import checkpoint, config, retention, sharding, step, train
from videogpt_jax.errors import InputError

data, workdir, stored, out = sys.argv[1:]
assert jax.device_count() == 8
c = tiny_run.config(data)
c.train.batch_size = 12
try:
  train.train(c, workdir)
except InputError as error:
  print(error)
c.train.batch_size = 8
recipe, mesh = config.recipe(c), sharding.make_mesh(c.mesh)
checkpoints = checkpoint.Checkpoints(workdir, keep=retention.Retention(2), save_every=1)
state = train.find_state(c, recipe, mesh, checkpoints, train.open_data(c)[0].fingerprint)
with sharding.use(mesh):
  run, losses = step.compile_step(recipe, mesh), []
  for batch in np.load(stored):
    state, metrics = run(state, jax.device_put(batch, sharding.rows(mesh)))
    assert len(state.step.sharding.device_set) == 8
    losses.append(metrics["loss_sum"])
    checkpoints.save(int(state.step), state, {"config": c.to_dict()})
checkpoints.close()
np.save(out, np.asarray(losses))
"""


def test_eight_devices_compute_what_one_does(tiny, steps, tmp_path):
  """They go on from a checkpoint of one device, and one device reads theirs."""
  *_, stored, states, metrics = steps
  np.save(tmp_path / "stored.npy", np.stack(stored[:2]))
  start = checkpoint.Checkpoints(tmp_path, keep=retention.Retention(2), save_every=1)
  start.save(0, states[0], {"config": tiny.to_dict(), "fingerprint":
                            train.open_data(tiny)[0].fingerprint})
  start.close()
  environment = {
    "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8",
    "PYTHONPATH": str(pathlib.Path(__file__).parent)}
  result = subprocess.run(
    [sys.executable, "-c", _EIGHT, tiny.data.path, str(tmp_path), str(tmp_path / "stored.npy"),
     str(tmp_path / "losses.npy")],
    env={**os.environ, **environment}, capture_output=True, text=True, timeout=300, check=False)
  assert result.returncode == 0, result.stderr
  refused = "batch_size 12 in 1 microbatch(es) of 12 rows does not divide among 8 devices"
  assert refused in result.stdout
  np.testing.assert_allclose(np.load(tmp_path / "losses.npy"),
                             [m["loss_sum"] for m in metrics[:2]], rtol=1e-5)
  moments = checkpoint_files.load_params(tmp_path / checkpoint_files.FOLDER / "1", "opt_state")[0]
  _assert_same_gradient(moments, states[1].opt_state)


@pytest.mark.parametrize(("batch", "parts", "fits"), [(8, 1, True), (8, 2, False), (16, 2, True),
                                                      (6, 1, False)])
def test_every_microbatch_divides_among_the_devices(tiny, batch, parts, fits):
  tiny.train.batch_size, tiny.train.accumulation = batch, parts
  mesh = AbstractMesh((2, 2, 2, 1, 1), sharding.AXES)
  if fits:
    train.check_devices(tiny, mesh)
  else:
    with pytest.raises(InputError, match=f"{batch // parts} rows does not divide among 8 devices"):
      train.check_devices(tiny, mesh)


@pytest.mark.parametrize(("shape", "heads", "message"), [
  ((1, 1, 1, 1, 4), 2, r"num_heads 2 over 2 heads .*tensor x sequence = 4 x 1"),
  ((1, 1, 1, 4, 1), 2, r"tensor x sequence = 1 x 4"),
  ((1, 1, 5, 1, 1), 2, r"parameter \S+ of shape .* does not divide .* 'fsdp': 5.*config.mesh"),
])
def test_a_model_that_the_mesh_cannot_split_is_refused(tiny, shape, heads, message):
  tiny.model.num_heads = tiny.model.num_kv_heads = heads
  tiny.train.batch_size = 40
  with pytest.raises(InputError, match=message):
    train.check_devices(tiny, AbstractMesh(shape, sharding.AXES))


@pytest.mark.parametrize("name,why", [("tpu", "need a TPU"), ("gpu", "need a Hopper GPU")])
def test_a_kernel_without_its_device_is_refused(tiny, name, why):
  tiny.model.attention = name
  with pytest.raises(InputError, match=rf"config\.model\.attention is '{name}'.*{why}.*use 'auto'"):
    train.check_devices(tiny, AbstractMesh((1, 1, 1, 1, 1), sharding.AXES))
