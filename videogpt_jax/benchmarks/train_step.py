"""Speed and memory of the train step: `python -m videogpt_jax.benchmarks.train_step`.

    python -m videogpt_jax.benchmarks.train_step --case=laptop
    python -m videogpt_jax.benchmarks.train_step --config=configs/world.py

The step is the one that training runs, or, for a case, forward and backward alone, as it
was measured for the published implementation. The last line printed is one JSON object.
"""

from collections.abc import Mapping
import dataclasses
import functools
import json
import time
from typing import Any

from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp

from videogpt_jax import backbone
from videogpt_jax import cli
from videogpt_jax import codec
from videogpt_jax import flops
from videogpt_jax import machine
from videogpt_jax import model
from videogpt_jax import objective
from videogpt_jax import optimizer
from videogpt_jax import sharding
from videogpt_jax import step as step_lib

# The published PyTorch implementation with its dense mask, forward and backward on 2 cores of
# an x86-64 server CPU of about 190 GFLOP/s (float32 2048^3 product).
PUBLISHED = {
  "laptop": {"seconds_per_step": 1.63, "useful_tokens_per_s": 1133.0, "peak_rss_mib": 1140.0},
}


@dataclasses.dataclass(frozen=True)
class Case:
  """What is measured: a recipe and the stored latents [B, N, h, w, C or 2C] it is fed."""

  recipe: step_lib.Recipe
  latents: tuple[int, int, int, int, int]
  update: bool  # the whole train step, or forward and backward alone
  mesh: Mapping[str, int]
  cpu_devices: int  # see `machine.split_cpu`


def laptop() -> Case:
  """Hidden 384, 6 layers, 16 frames of 64 patches in clips of 4, batch 1, float32."""
  stack = backbone.Config(hidden_size=384, intermediate_size=1024, num_layers=6, num_heads=6,
                          num_kv_heads=6)
  pixels = codec.Pixels(block=4)
  recipe = step_lib.Recipe(
    model=model.Config(backbone=stack, channels=pixels.channels, patch_size=2),
    codec=pixels,
    objective=objective.fixed((4, 4, 4, 4)),
    optimizer=optimizer.Config(learning_rate=1e-4, warmup_steps=1, total_steps=1))
  mesh = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": -1}  # its batch is one video
  return Case(recipe, (1, 16, 16, 16, pixels.channels), update=False, mesh=mesh,
              cpu_devices=min(2, machine.usable_cores()))


CASES = {"laptop": laptop}


def from_config(config: Any) -> Case:
  """The train step of a configuration file."""
  from videogpt_jax import config as config_lib

  config_lib.validate(config)
  recipe = config_lib.recipe(config)
  side = recipe.codec.downsample
  latents = (config.train.batch_size, config.data.frames, config.data.height // side,
             config.data.width // side, codec.stored_channels(recipe.codec))
  return Case(recipe, latents, update=True, mesh=config.mesh.to_dict(),
              cpu_devices=config.cpu_devices)


def measure(case: Case, steps: int) -> dict[str, Any]:
  """Runs `steps` timed steps after one that compiles; the median step counts."""
  mesh = sharding.make_mesh(case.mesh)
  stored = jax.random.randint(jax.random.key(0), case.latents, 0, 256)
  stored = jax.device_put(stored.astype(case.recipe.codec.dtype), sharding.rows(mesh))
  with sharding.use(mesh):
    run, carry = _update(case, mesh) if case.update else _gradients(case, mesh)
    began = time.perf_counter()
    carry = jax.block_until_ready(run(carry, stored))
    first = time.perf_counter() - began
    seconds = []
    for _ in range(steps):
      began = time.perf_counter()
      carry = jax.block_until_ready(run(carry, stored))
      seconds.append(time.perf_counter() - began)
  median = sorted(seconds)[len(seconds) // 2]
  cost = flops.training(case.recipe.model, case.recipe.objective, case.latents[0],
                        (*case.latents[1:-1], case.recipe.codec.channels))
  peak_rss = machine.peak_rss_mib()
  rate = machine.product_rate()
  return {
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "jax": jax.__version__,
    "measured": "train step" if case.update else "forward and backward",
    "seconds_per_step": median,
    "fastest_step_s": min(seconds),
    "first_step_s": first,
    "steps_per_s": 1 / median,
    "tokens_per_s": cost.sequence / median,
    "useful_tokens_per_s": cost.tokens / median,
    "flops_per_step": cost.total,
    "gflops_per_s": cost.total / median / 1e9,
    "product_gflops_per_s": rate / 1e9,
    "utilisation": cost.total / median / rate,
    "peak_rss_mib": peak_rss,
  }


def _update(case: Case, mesh: jax.sharding.Mesh):
  step = step_lib.compile_step(case.recipe, mesh)
  return lambda state, stored: step(state, stored)[0], step_lib.create_state(case.recipe, mesh)


def _gradients(case: Case, mesh: jax.sharding.Mesh):
  shardings = nn.meta.unbox(step_lib.state_shardings(case.recipe, mesh).params)
  init = lambda: nn.meta.unbox(model.init_params(case.recipe.model, 0))
  params = jax.jit(init, out_shardings=shardings)()
  keys = objective.row_keys(0, jnp.int32(0), case.latents[0])
  grad = jax.jit(functools.partial(step_lib.gradients, case.recipe))

  def run(_: None, stored: jax.Array) -> None:
    jax.block_until_ready(grad(params, keys, stored))  # and dropped, before the next ones come

  return run, None


def main() -> None:
  """Reads the flags and measures."""
  f = flags.FLAGS
  case = from_config(f.config) if f.config is not None else CASES[f.case]()
  devices = case.cpu_devices if f.cpu_devices is None else f.cpu_devices
  if devices:
    machine.split_cpu(devices)
  result = measure(case, f.steps)
  name = f.config.name if f.config is not None else f.case
  for key, value in result.items():
    print(f"  {key:<22}{value:.4g}" if isinstance(value, float) else f"  {key:<22}{value}")
  published = PUBLISHED.get(name) if f.config is None else None
  if published:
    ratio = published["seconds_per_step"] / result["seconds_per_step"]
    result |= {"published": published, "speedup_vs_published": ratio}
    print(f"  {ratio:.2f} times the published implementation's speed (on its own machine)")
  print(json.dumps({"benchmark": "train_step", "case": name, **result}))


if __name__ == "__main__":
  flags.DEFINE_enum("case", "laptop", sorted(CASES), "What to measure, without --config.")
  flags.DEFINE_integer("steps", 5, "Timed steps.", lower_bound=1)
  flags.DEFINE_integer("cpu_devices", None, "On CPU: devices that the cores are shared among; "
                       "default: as the case or the configuration says.", lower_bound=1)
  try:
    from ml_collections import config_flags
  except ImportError:  # the benchmarks run where only jax is installed
    flags.DEFINE_string("config", None, "Needs ml_collections, which is not installed here.")
  else:
    config_flags.DEFINE_config_file("config", None, "Measure the train step of this configuration.")
  cli.run(main)
