"""Whole train steps of the published model compile for pods that are not there, and fit them."""

import importlib.util
import pathlib

import pytest

from videogpt_jax import dry_run
from videogpt_jax.aot import chips
from videogpt_jax.aot import estimate

pytestmark = pytest.mark.aot

_CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
_LAYERS = 32
_ONE = {"mesh.data": 1, "mesh.fsdp": 1}


def _config(stage, **changes):
  spec = importlib.util.spec_from_file_location("card", _CONFIGS / f"stage{stage}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.update_from_flattened_dict(changes)
  return config


def _assert_it_fits(facts, name):
  there, words = dry_run.fits(facts, chips.CHIPS[name])
  assert there, (facts.memory, words)
  assert facts.traffic.unknown_loops == 0
  assert facts.parameters["total"] == 3_762_072_592
  state = 4 * 4 * facts.parameters["total"] / facts.mesh["fsdp"]  # float32, its moments and EMA
  assert state < facts.memory.arguments < 1.1 * state
  assert 0.1 < estimate.of(facts, chips.CHIPS[name]).mfu[0] < 0.6


@pytest.mark.parametrize("topology", ["h100:8x8", "v5p:4x4x4"])
@pytest.mark.parametrize("stage", [1, 2, 3, 4])
def test_a_stage_on_64_chips(train_step, stage, topology):
  """At the published batch of 320 videos."""
  facts, name = train_step(topology, _config(stage)), topology.split(":")[0]
  _assert_it_fits(facts, name)
  assert len(facts.places) == 64
  sent = facts.traffic.by_kind()
  # Every layer's weights come together on each device, forward and backward, and their gradients
  # are summed, in every microbatch.
  turns = _LAYERS * facts.accumulation
  assert sent["all-gather"][0] >= 2 * turns
  assert sent["reduce-scatter"][0] >= turns
  weights = 2 * facts.parameters["backbone"] * (1 - 1 / facts.mesh["fsdp"])  # bfloat16
  assert sent["all-gather"][1] > 1.9 * weights * facts.accumulation
  # Attention forward once: its output is kept. Backward in two kernels, in one on TPU.
  kernels = {"h100": ("mosaic_gpu_v2", 3), "v5p": ("tpu_custom_call", 2)}[name]
  assert facts.traffic.calls[kernels[0]] == kernels[1] * turns


def test_the_last_stage_on_one_gpu(train_step):
  """With the batch that its run card gives for one H200."""
  changes = {**_ONE, "train.batch_size": 8, "train.accumulation": 8}
  facts = train_step("h200:1", _config(4, **changes))
  _assert_it_fits(facts, "h200")
  assert not facts.traffic.collectives


_WIDTH, _DEEP = 768, 16
_THIN = {**_ONE, "model.hidden_size": _WIDTH, "model.intermediate_size": 2048,
         "model.num_layers": _DEEP, "model.num_heads": 8, "model.num_kv_heads": 8,
         "model.remat": "full", "train.batch_size": 2, "train.accumulation": 1}


def test_moments_on_the_host(train_step):
  """A device then holds half of the state; the moments come and go once a step.

  Where activations take more than the moments, as here: these are fetched when those are gone.
  """
  here, there = (train_step("v5p:1x1x1", _config(4, **_THIN, **{"train.offload": name}))
                 for name in ("none", "optimizer"))
  moments = 2 * 4 * here.parameters["total"]
  assert here.memory.arguments - there.memory.arguments == pytest.approx(moments, rel=0.01)
  assert here.memory.total - there.memory.total > 0.8 * moments
  assert there.memory.host >= 0.99 * moments
  assert there.traffic.host_bytes == pytest.approx(2 * moments, rel=0.05)


def test_what_layers_keep_on_the_host(train_step):
  """A device then holds no layer's input but the ones at hand."""
  here, there = (train_step("h200:1", _config(1, **_THIN, **{"train.offload": name}))
                 for name in ("none", "activations"))
  kept = _DEEP * here.cost.sequence * _WIDTH * 2  # layers, tokens, width, bfloat16
  assert there.memory.host == pytest.approx(kept, rel=0.05)
  assert here.memory.total - there.memory.total > 0.7 * kept
  assert there.traffic.host_bytes == pytest.approx(2 * kept, rel=0.05)
