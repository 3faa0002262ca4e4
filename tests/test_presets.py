"""The run cards of the four stages say what the published scripts say."""

import importlib.util
import itertools
import json
import pathlib

import pytest

import tiny_run
from videogpt_jax import config as config_lib
from videogpt_jax import flops

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
PARAMETERS = {  # of the published checkpoint
  "backbone": 3_624_078_336, "embeddings": 98_500_608, "patches": 104_448, "time": 20_459_520,
  "final": 18_929_680, "total": 3_762_072_592,
}


def _stage(number, variant=""):
  spec = importlib.util.spec_from_file_location("card", CONFIGS / f"stage{number}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(variant)


@pytest.mark.parametrize(("number", "frames", "interval", "partition", "start"), [
  (1, 16, (4, 4), "single", "runs/phi3"),
  (2, 48, (4, 4), "random", "runs/stage1"),
  (3, 48, (4, 12), "random", "runs/stage2"),
  (4, 80, (4, 12), "random", "runs/stage3"),
])
def test_a_stage_has_the_published_settings(number, frames, interval, partition, start):
  c = _stage(number)
  config_lib.validate(c)
  assert (c.data.frames, c.data.interval, c.clips.partition) == (frames, interval, partition)
  assert c.checkpoint.init_from == start
  o = c.optimizer
  assert (o.learning_rate, o.b1, o.b2, o.eps, o.weight_decay, o.clip_norm, o.warmup_steps,
          o.cooldown_steps) == (1e-4, 0.9, 0.95, 1e-5, 0.1, 1.0, 1000, 0)
  assert (c.train.batch_size, c.clips.beta) == (320, 0.9)
  assert (c.data.height, c.data.width) == (176, 320)
  assert (c.sample.steps, c.sample.guidance) == (50, 1.5)
  assert flops.parameters(config_lib.model(c)) == PARAMETERS


def test_the_small_stages_go_the_same_way():
  small, full = ([_stage(number, variant) for number in range(1, 5)] for variant in ("small", ""))
  for c in small:
    config_lib.validate(c)
    assert config_lib.model(c) == config_lib.model(small[0])
  grows = lambda cards: [(b.data.frames > a.data.frames, b.data.interval != a.data.interval,
                          b.clips.partition) for a, b in itertools.pairwise(cards)]
  assert grows(small) == grows(full)
  assert [c.checkpoint.init_from for c in small[1:]] == [
    f"runs/{c.name}" for c in small[:-1]]


def test_an_unknown_variant_is_refused():
  result = tiny_run.run("main", f"--config={CONFIGS / 'stage2.py'}:medium", "--dry_run")
  assert result.returncode == 2
  assert "the stages know the variant :small, not :medium" in result.stderr


def test_dry_run_of_the_full_model():
  result = tiny_run.run("main", f"--config={CONFIGS / 'stage4.py'}", "--dry_run",
                        "--config.platform=cpu", "--config.mesh.fsdp=1")
  assert result.returncode == 0, result.stderr
  for name, count in PARAMETERS.items():
    assert f"  {name:<12}{count:>16,}" in result.stdout
  state = 4 * 4 * PARAMETERS["total"] / 2**30  # float32: parameters, EMA, two moments
  told = next(line for line in result.stdout.splitlines() if "state and batch" in line)
  assert state < float(told.split()[-2]) < state + 1
  assert told.endswith("GiB")


# Held-out loss of any weights -------------------------------------------------------------


def test_the_loss_of_a_run_is_the_one_it_told(finished, tmp_path):
  """`evaluate --benchmark=loss` on the run's own configuration gives its last held-out loss."""
  result = tiny_run.run("evaluate", "--benchmark=loss", f"--checkpoint={finished.workdir}",
                        f"--config={finished.config_file}", f"--out={tmp_path}")
  assert result.returncode == 0, result.stderr
  said = json.loads((tmp_path / "loss.json").read_text())["held_out"][str(finished.workdir)]
  assert (tmp_path / "loss.png").stat().st_size > 10_000
  lines = (finished.workdir / "metrics.jsonl").read_text().splitlines()
  told = [json.loads(line) for line in lines if "validation/loss" in line][-1]
  for name, value in told.items():
    if name != "step":
      assert said[name.removeprefix("validation/")] == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize(("arguments", "message"), [
  (["--checkpoint={run}"], "--benchmark=loss needs --checkpoint and"),
  (["--config={config}"], "--benchmark=loss needs --checkpoint and"),
  (["--checkpoint={run}", "--config={config}", "--config.model.num_layers=3"],
   "holds another model: the parameter backbone/layers/"),
  (["--checkpoint={run}", "--config={config}", "--config.model.img_id=0"],
   "of other settings; to go on from it, give --config.model.img_id=1 (it is 0 here)"),
])
def test_a_loss_that_cannot_be_taken(finished, tmp_path, arguments, message):
  fill = {"run": finished.workdir, "config": finished.config_file}
  result = tiny_run.run("evaluate", "--benchmark=loss", f"--out={tmp_path}",
                        *(argument.format(**fill) for argument in arguments))
  assert result.returncode == 2
  assert message in result.stderr
  assert result.stderr.startswith("error: ")
