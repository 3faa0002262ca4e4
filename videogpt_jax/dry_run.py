"""What a configuration would cost, before anything expensive."""

from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from videogpt_jax import codec as codec_lib
from videogpt_jax import config as config_lib
from videogpt_jax import flops
from videogpt_jax import sharding
from videogpt_jax import step as step_lib


def report(config: ConfigDict) -> str:
  """Resolved configuration, parameters by part, FLOPs per step and memory per device.

  The train step is compiled for the devices there are, so the memory is the compiler's
  own figure; nothing is allocated and no data is read.
  """
  recipe, mesh = config_lib.recipe(config), sharding.make_mesh(config.mesh)
  codec = recipe.codec
  height, width = config_lib.fit(config).size(9, 16)  # where sizes vary, most are like this
  latents = (config.data.frames, height // codec.downsample, width // codec.downsample,
             codec.channels)
  counts = flops.parameters(recipe.model)
  cost = flops.training(recipe.model, recipe.objective, config.train.batch_size, latents)
  state = step_lib.abstract_state(recipe, mesh)
  stored = (*latents[:-1], codec_lib.stored_channels(codec))
  batch = jax.ShapeDtypeStruct((config.train.batch_size, *stored), jnp.dtype(codec.dtype))
  with sharding.use(mesh):
    compiled = step_lib.compile_step(recipe, mesh).lower(state, batch).compile()
  memory: Any = compiled.memory_analysis()
  lines = ["resolved configuration:"]
  leaves = traverse_util.flatten_dict(config.to_dict(), sep=".")
  lines += [f"  --config.{name}={value}" for name, value in leaves.items()]
  lines += ["parameters:"]
  lines += [f"  {name:<12}{count:>16,}" for name, count in counts.items()]
  lines += [
    "a step:",
    f"  needed tokens       {cost.tokens:,.0f}",
    f"  FLOPs, dense        {cost.dense:.3e}",
    f"  FLOPs, attention    {cost.attention:.3e} (visible pairs only)",
    f"  FLOPs, all          {cost.total:.3e}",
    f"devices: {jax.device_count()} x {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}",
    "memory of a device:",
    f"  state and batch     {_size(memory.argument_size_in_bytes)}",
    f"  temporary           {_size(memory.temp_size_in_bytes)}",
    f"  compiled program    {_size(memory.generated_code_size_in_bytes)}",
  ]
  return "\n".join(lines)


def _size(count: float) -> str:
  """Bytes in the largest unit that leaves at least one before the point."""
  for unit in ("B", "KiB", "MiB"):
    if count < 1024:
      return f"{count:.1f} {unit}"
    count /= 1024
  return f"{count:.1f} GiB"
