"""What lies in the host's memory between its uses changes no number."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_run
from videogpt_jax import backbone
from videogpt_jax import codec
from videogpt_jax import config as config_lib
from videogpt_jax import model
from videogpt_jax import objective
from videogpt_jax import optimizer
from videogpt_jax import sharding
from videogpt_jax import step
from videogpt_jax import train
from videogpt_jax.errors import InputError


def _recipe(offload, remat, **settings):
  pixels = codec.Pixels(block=4)
  stack = backbone.Config(hidden_size=16, intermediate_size=32, num_layers=2, num_heads=2,
                          num_kv_heads=2, remat=remat)
  return step.Recipe(
    model=model.Config(backbone=stack, channels=pixels.channels), codec=pixels,
    objective=objective.next_clip(objective.random_partition),
    optimizer=optimizer.Config(1e-3, 1, 10, **settings), offload=offload)


def _mesh():
  return sharding.make_mesh(dict.fromkeys(sharding.AXES, 1), jax.devices()[:1])


def _stored():
  return jax.random.randint(jax.random.key(1), (2, 4, 4, 4, 48), 0, 256).astype(jnp.uint8)


def _three_steps(offload, remat, **settings):
  recipe, mesh, stored = _recipe(offload, remat, **settings), _mesh(), _stored()
  with sharding.use(mesh):
    state, run = step.create_state(recipe, mesh), step.compile_step(recipe, mesh)
    for _ in range(3):
      state, _ = run(state, stored)
    return state, str(run.trace(state, stored).jaxpr)


@pytest.fixture(scope="module")
def on_the_device():
  return _three_steps("none", "full")


@pytest.mark.parametrize(("offload", "remat"), [("optimizer", "full"), ("activations", "offload")])
def test_the_same_numbers(on_the_device, offload, remat):
  (ours, text), (theirs, without) = _three_steps(offload, remat), on_the_device
  assert "device_put" in text  # arrays change their memory
  assert "device_put" not in without
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_array_equal(a, b)
  kinds = {x.sharding.memory_kind for x in jax.tree.leaves(ours.opt_state) if x.ndim}
  assert kinds == {"pinned_host" if offload == "optimizer" else "device"}


@pytest.mark.parametrize("settings", [{"name": "muon"}, {"clip_norm": 0.01}])
def test_layer_by_layer_is_all_at_once(settings):
  """Matrices are made orthogonal each by itself; gradients are clipped by their joint norm."""
  (ours, _), (theirs, _) = (_three_steps(name, "full", **settings)
                            for name in ("optimizer", "none"))
  for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_a_step_that_is_not_finite_leaves_the_moments():
  recipe, mesh, stored = _recipe("optimizer", "full"), _mesh(), _stored()
  with sharding.use(mesh):
    state, run = step.create_state(recipe, mesh), step.compile_step(recipe, mesh)
    state, _ = run(state, stored)
    before = jax.tree.map(np.asarray, state.opt_state)
    broken = jax.tree.map(lambda x: x * jnp.nan, state.params)
    state, metrics = run(dataclasses.replace(state, params=broken), stored)
  assert metrics["bad_steps"] == 1
  jax.tree.map(np.testing.assert_array_equal, state.opt_state, before)


def test_a_run_with_its_moments_on_the_host_resumes(tiny, tmp_path):
  """Six steps, and six more from the checkpoint, are twelve without a break on the device."""
  tiny.train.steps = 12
  tiny.log.videos = 0
  train.train(tiny, str(tmp_path / "device"))
  tiny.train.offload = "optimizer"
  tiny.train.steps = 6
  train.train(tiny, str(tmp_path / "host"))
  tiny.train.steps = 12
  train.train(tiny, str(tmp_path / "host"))
  tiny_run.assert_same_state(tmp_path / "host", tmp_path / "device")


def test_devices_that_cannot():
  device = types.SimpleNamespace(
    device_kind="abacus", addressable_memories=lambda: [types.SimpleNamespace(kind="beads")])
  mesh = types.SimpleNamespace(devices=np.array([device]))
  with pytest.raises(InputError, match=r"abacus devices cannot .*beads.*offload='none'"):
    sharding.require_host_memory(mesh)


def test_what_makes_no_sense_is_refused(tiny):
  tiny.train.offload = "activations"
  with pytest.raises(InputError, match=r"moves what config.model.remat 'full' keeps"):
    config_lib.validate(tiny)
  tiny.train.offload = "weights"
  with pytest.raises(InputError, match="known: none, optimizer, activations"):
    config_lib.validate(tiny)
  tiny.train.offload = "optimizer"
  tiny.optimizer.name = "adafactor"
  with pytest.raises(InputError, match="adafactor clips the updates of all layers together"):
    config_lib.validate(tiny)
