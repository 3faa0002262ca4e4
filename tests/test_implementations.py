"""Training and rollouts do not depend on which implementation attends."""

import functools

import flax.linen as nn
import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
import numpy as np
import pytest

from videogpt_jax import backbone
from videogpt_jax import codec
from videogpt_jax import model
from videogpt_jax import objective
from videogpt_jax import optimizer
from videogpt_jax import rollout
from videogpt_jax import step

_PIXELS = codec.Pixels(block=2)


@pytest.fixture(params=["xla", "tpu"], name="implementation")
def _implementation(request, monkeypatch):
  """The kernel's code, interpreted: remat and rollouts trace it as a device would compile it."""
  if request.param == "tpu":
    monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
  return request.param


def _model(attention):
  stack = backbone.Config(hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2,
                          num_kv_heads=1, attention=attention, remat="dots")
  return model.Config(backbone=stack, channels=_PIXELS.channels, patch_size=2)


def _params():
  """Random ones: the zero layers of a fresh model would hide everything."""
  fresh = nn.meta.unbox(model.init_params(_model("reference"), 0))
  leaves, tree = jax.tree.flatten(fresh)
  return tree.unflatten([x + 0.1 * jax.random.normal(jax.random.key(i), x.shape)
                         for i, x in enumerate(leaves)])


def test_training(implementation):
  stored = jax.random.randint(jax.random.key(0), (2, 6, 8, 8, _PIXELS.channels), 0, 256)
  keys = objective.row_keys(0, jnp.int32(0), 2)

  def gradients(attention):
    recipe = step.Recipe(
      model=_model(attention), codec=_PIXELS,
      objective=objective.next_clip(objective.random_partition),
      optimizer=optimizer.Config(learning_rate=1e-4, warmup_steps=1, total_steps=1))
    return jax.jit(functools.partial(step.gradients, recipe))(
        _params(), keys, stored.astype(_PIXELS.dtype))

  for a, b in zip(jax.tree.leaves(gradients(implementation)),
                  jax.tree.leaves(gradients("reference")), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5 * max(1, float(jnp.abs(b).max())))


def test_rollout(implementation):
  history = jax.random.normal(jax.random.key(0), (2, 3, 8, 8, _PIXELS.channels))

  def generate(attention):
    return rollout.generate(_model(attention), _params(), history, num_frames=4, clip_frames=2,
                            sampler=rollout.Sampler(2, guidance=2.0), window=rollout.Window(4),
                            rng=jax.random.key(1))

  ours, theirs = generate(implementation), generate("reference")
  np.testing.assert_allclose(ours, theirs, atol=1e-4 * float(jnp.abs(theirs).max()))
