"""Attention, the train step and rollouts on 8 devices equal one device's, by every axis."""

import os
import pathlib
import subprocess
import sys

import pytest

_PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import test_attention
from videogpt_jax import attention, sharding

assert jax.device_count() == 8
sizes, kv_heads = eval(sys.argv[1]), int(sys.argv[2])
ranks = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), test_attention._ranks(0))  # 4 samples
ranks = test_attention.mask.pad(ranks, 8)  # a length that splits
inputs = test_attention._inputs(0, ranks, ranks, 8, kv_heads)

def run(ranks, *inputs):
  block_map = attention.plan(ranks, ranks, frame_tokens=6, head_size=8, dtype=jnp.float32,
                             implementation="xla")
  layer = lambda q, k, v: attention.attend(q, k, v, ranks, ranks, block_map, implementation="xla")
  return test_attention._with_gradients(layer, *inputs)

alone = jax.jit(run)(ranks, *inputs)
mesh = sharding.make_mesh(dict(zip(sharding.AXES[1:], sizes)))
spec = lambda *axes: NamedSharding(mesh, P(sharding.BATCH_AXES, *axes))
put = lambda x: jax.device_put(x, spec("sequence"))
with sharding.use(mesh):
  program = jax.jit(run, out_shardings=(spec("sequence"),) * 4).lower(
      jax.device_put(ranks, spec()), *(put(x) for x in inputs)).compile()
  together = program(jax.device_put(ranks, spec()), *(put(x) for x in inputs))
for a, b in zip(alone, together, strict=True):
  assert len(b.sharding.device_set) == 8
  np.testing.assert_allclose(b, a, atol=2e-6)
assert ("all-to-all" in program.as_text()) == (sizes[2] > 1)
print("equal")
"""

_STEP = """
import sys
import jax, jax.numpy as jnp, numpy as np
import flax.linen as nn
from videogpt_jax import backbone, codec, model, objective, optimizer, sharding, step

assert jax.device_count() == 8
stack = backbone.Config(hidden_size=64, intermediate_size=96, num_layers=2, num_heads=8,
                        num_kv_heads=4, attention="xla", remat="full")
pixels = codec.Pixels(block=4)
recipe = step.Recipe(
    model=model.Config(backbone=stack, channels=pixels.channels, patch_size=2), codec=pixels,
    objective=objective.next_clip(objective.random_partition),
    optimizer=optimizer.Config(learning_rate=1e-4, warmup_steps=1, total_steps=1))
stored = jax.random.randint(jax.random.key(0), (4, 5, 4, 4, pixels.channels), 0, 256)
stored = stored.astype(pixels.dtype)
keys = objective.row_keys(0, jnp.int32(0), 4)
params = nn.meta.unbox(model.init_params(recipe.model, 0))
noise = lambda x, i: x + 0.1 * jax.random.normal(jax.random.key(i), x.shape)  # no zero layers
leaves, tree = jax.tree.flatten(params)
params = tree.unflatten([noise(x, i) for i, x in enumerate(leaves)])
alone = jax.jit(lambda *x: step.gradients(recipe, *x))(params, keys, stored)
mesh = sharding.make_mesh(dict(zip(sharding.AXES, eval(sys.argv[1]))))
with sharding.use(mesh):
  placed = jax.device_put(params, nn.meta.unbox(step.state_shardings(recipe, mesh).params))
  together = jax.jit(lambda *x: step.gradients(recipe, *x))(
      placed, keys, jax.device_put(stored, sharding.rows(mesh)))
for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
  np.testing.assert_allclose(b, a, atol=1e-5 * max(1, float(jnp.abs(a).max())))
print("equal")
"""

_ROLLOUT = """
import sys
import flax.linen as nn
import jax, jax.numpy as jnp, numpy as np
from videogpt_jax import backbone, model, rollout, sharding

assert jax.device_count() == 8
sizes, kv_heads, mode = eval(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
stack = backbone.Config(hidden_size=64, intermediate_size=96, num_layers=2, num_heads=8,
                        num_kv_heads=kv_heads, attention="xla")
config = model.Config(backbone=stack, channels=4)
params = nn.meta.unbox(model.init_params(config, 0))
noise = lambda x, i: x + 0.1 * jax.random.normal(jax.random.key(i), x.shape)  # no zero layers
leaves, tree = jax.tree.flatten(params)
params = tree.unflatten([noise(x, i) for i, x in enumerate(leaves)])
history = jax.random.normal(jax.random.key(1), (4, 3, 4, 4, 4))

def generate(params, history):
  return rollout.generate(
      config, params, history, num_frames=7, clip_frames=2, sampler=rollout.Sampler(2, 1.5),
      window=rollout.Window(6, mode, 0.1), rng=jax.random.key(0))

alone = generate(params, history)
mesh = sharding.make_mesh(dict(zip(sharding.AXES[1:], sizes)))
with sharding.use(mesh):
  boxed = jax.eval_shape(lambda: model.init_params(config, 0))
  placed = jax.device_put(params, sharding.of_tree(mesh, boxed))
  history = jax.device_put(history, sharding.rows(mesh))
  together = generate(placed, history)
  held = rollout.encode(config, placed, history, 5)
assert len(together.sharding.device_set) == 8
shards = sizes[2] * sizes[3] if kv_heads % (sizes[2] * sizes[3]) == 0 else 1
assert held.keys.addressable_shards[0].data.shape[4] == kv_heads // shards  # by heads
np.testing.assert_allclose(together, alone, atol=1e-5 * float(jnp.abs(alone).max()))
print("equal")
"""


def _on_eight_devices(program, *arguments):
  environment = {
    **os.environ, "PYTHONPATH": str(pathlib.Path(__file__).parent),
    "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=8"}
  return subprocess.run([sys.executable, "-c", program, *arguments], env=environment,
                        capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("sizes,kv_heads", [
  ((1, 1, 8, 1), 8), ((2, 1, 2, 2), 2), ((2, 2, 1, 2), 8), ((1, 1, 4, 2), 1)], ids=str)
def test_forward_and_gradients_equal_one_device(sizes, kv_heads):
  """Ulysses: sequence shards in, heads inside, sequence shards out, by all-to-all."""
  done = _on_eight_devices(_PROGRAM, repr(sizes), str(kv_heads))
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == "equal"


@pytest.mark.parametrize("sizes", [(1, 1, 1, 8, 1), (1, 2, 1, 2, 2), (2, 1, 2, 1, 2)], ids=str)
def test_training_gradients_equal_one_device(sizes):
  """The whole model under remat and scan, on a length that the mesh does not divide."""
  done = _on_eight_devices(_STEP, repr(sizes))
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == "equal"


@pytest.mark.parametrize(("sizes", "kv_heads", "mode"), [
  ((1, 1, 4, 2), 8, "recompute"), ((2, 1, 2, 2), 2, "rolling"), ((2, 2, 1, 2), 4, "rolling")],
  ids=str)
def test_rollouts_equal_one_device(sizes, kv_heads, mode):
  """Samples, heads and tokens split, guided, over a window that moves; heads that do not split."""
  done = _on_eight_devices(_ROLLOUT, repr(sizes), str(kv_heads), mode)
  assert done.returncode == 0, done.stderr
  assert done.stdout.strip() == "equal"
