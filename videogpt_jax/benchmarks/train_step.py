"""Speed and memory of the train step: `python -m videogpt_jax.benchmarks.train_step`.

    python -m videogpt_jax.benchmarks.train_step --case=laptop
    python -m videogpt_jax.benchmarks.train_step --case=laptop --peer    # beside PyTorch
    python -m videogpt_jax.benchmarks.train_step --case=full_stage4      # one H200
    python -m videogpt_jax.benchmarks.train_step --config=configs/world.py
    python -m videogpt_jax.benchmarks.train_step --growth

The step is the one that training runs, or, for the laptop's cases, forward and backward alone,
as it was measured for the published implementation. `--growth` measures the laptop's model with
8 to 80 frames, one a clip, and draws docs/growth.png. The last line printed is one JSON object;
it is written into benchmarks/results, too (`--out=-`: not).
"""

import contextlib
import functools
import pathlib
import time
from typing import Any

from absl import flags
import flax.linen as nn
import jax
import jax.numpy as jnp

from videogpt_jax import cli
from videogpt_jax import codec
from videogpt_jax import flops
from videogpt_jax import machine
from videogpt_jax import model
from videogpt_jax import objective
from videogpt_jax import sharding
from videogpt_jax import step as step_lib
from videogpt_jax.benchmarks import growth
from videogpt_jax.benchmarks import report
from videogpt_jax.benchmarks import step_peer
from videogpt_jax.benchmarks import train_step_cases
from videogpt_jax.benchmarks.train_step_cases import Case
from videogpt_jax.errors import InputError

_SPREAD = 0.02  # of parameters around their initial values


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


def measure(case: Case, steps: int, beside_torch: bool = False) -> dict[str, Any]:
  """Runs `steps` timed steps after one that compiles; the median step counts.

  Args:
    case: what is measured.
    steps: how many.
    beside_torch: let a step of PyTorch follow on each of ours, see `step_peer`.

  Raises:
    InputError: see `step_peer`; or the case has a whole train step, which the peer has not.
  """
  if beside_torch:
    step_peer.check()
    if case.update:
      raise InputError("--peer: PyTorch makes forward and backward alone, as the laptop's cases "
                       "do; this one has a whole train step")
  mesh = sharding.make_mesh(case.mesh)
  stored = jax.device_put(_latents(case), sharding.rows(mesh))
  with contextlib.ExitStack() as stack:
    stack.enter_context(sharding.use(mesh))
    gradients = None if case.update else _Gradients(case, mesh)
    run, carry = _update(case, mesh) if gradients is None else (gradients, None)
    began = time.perf_counter()
    carry = jax.block_until_ready(run(carry, stored))
    first = time.perf_counter() - began
    seconds, theirs = [], []
    peer, peak = None, None
    if beside_torch and gradients is not None:
      peak = machine.peak_rss_mib()  # before the peer's problem is put together here
      peer = stack.enter_context(gradients.beside_torch(stored))
    for _ in range(steps):
      began = time.perf_counter()
      carry = jax.block_until_ready(run(carry, stored))
      seconds.append(time.perf_counter() - began)
      if peer is not None:
        theirs.append(peer.step())
    beside = {} if peer is None else {"torch": {
      "seconds_per_step": _median(theirs), "fastest_step_s": min(theirs), **peer.end(),
      "largest_gradient_difference": peer.largest_difference}}
  median = _median(seconds)
  cost = flops.training(case.recipe.model, case.recipe.objective, case.latents[0],
                        (*case.latents[1:-1], case.recipe.codec.channels))
  peaks = peak or machine.peak_rss_mib(), _peak_device_mib(mesh)
  return {
    "device": jax.devices()[0].device_kind,
    "devices": mesh.size,
    "jax": jax.__version__,
    "measured": "train step" if case.update else "forward and backward",
    "videos": case.latents[0],
    "frames": case.latents[1],
    "mesh": dict(mesh.shape),
    "accumulation": case.recipe.accumulation,
    "attention": case.recipe.model.backbone.attention,
    "remat": case.recipe.model.backbone.remat,
    "seconds_per_step": median,
    "fastest_step_s": min(seconds),
    "first_step_s": first,
    "steps_per_s": 1 / median,
    "tokens_per_s": cost.sequence / median,
    "useful_tokens_per_s": cost.tokens / median,
    "flops_per_step": cost.total,
    "gflops_per_s": cost.total / median / 1e9,
    **_rates(cost.total / median / mesh.size),
    "peak_rss_mib": peaks[0],
    **({"peak_device_mib": peaks[1]} if peaks[1] else {}),
    **beside,
  }


def _median(seconds: list[float]) -> float:
  return sorted(seconds)[len(seconds) // 2]


def _latents(case: Case) -> jax.Array:
  """Random stored latents: bytes, or for an autoencoder means and log-variances near zero."""
  key, kind = jax.random.key(0), case.recipe.codec.dtype
  if kind.kind == "u":
    return jax.random.randint(key, case.latents, 0, 256).astype(kind)
  return jax.random.normal(key, case.latents).astype(kind)


def _rates(rate: float) -> dict[str, float]:
  """Of a device that does so many needed FLOP/s: MFU, and the share of a measured product's.

  CPU: all devices are parts of one, and the measured rate is what the MFU is measured against.
  """
  if jax.default_backend() == "cpu":
    product = machine.product_rate()
    return {"product_gflops_per_s": product / 1e9,
            "utilisation": rate * jax.device_count() / product}
  product = machine.product_rate(8192, jnp.bfloat16)
  peak = machine.data_sheet_flops(jax.devices()[0].device_kind)
  return {"product_gflops_per_s": product / 1e9, "utilisation": rate / product,
          **({"peak_gflops_per_s": peak / 1e9, "mfu": rate / peak} if peak else {})}


def _peak_device_mib(mesh: jax.sharding.Mesh) -> float:
  """The most memory in use on a device so far; 0 if the platform does not say."""
  stats = [device.memory_stats() or {} for device in mesh.local_devices]
  return max(each.get("peak_bytes_in_use", 0) for each in stats) / 2**20


def _update(case: Case, mesh: jax.sharding.Mesh):
  step = step_lib.compile_step(case.recipe, mesh)
  return lambda state, stored: step(state, stored)[0], step_lib.create_state(case.recipe, mesh)


class _Gradients:
  """Forward and backward alone, as a step that carries nothing.

  Parameters are drawn anew around their initial values: zeros would hide errors of a peer.
  """

  def __init__(self, case: Case, mesh: jax.sharding.Mesh) -> None:
    recipe = case.recipe
    shardings = nn.meta.unbox(step_lib.state_shardings(recipe, mesh).params)

    def init() -> Any:
      params = nn.meta.unbox(model.init_params(recipe.model, 0))
      leaves, tree = jax.tree.flatten(params)
      keys = jax.random.split(jax.random.key(1), len(leaves))
      return jax.tree.unflatten(tree, [x + _SPREAD * jax.random.normal(key, x.shape)
                                       for key, x in zip(keys, leaves, strict=True)])

    self._recipe = recipe
    self._params = jax.jit(init, out_shardings=shardings)()
    self._keys = objective.row_keys(0, jnp.int32(0), case.latents[0])
    self._grad = jax.jit(functools.partial(step_lib.gradients, recipe))

  def __call__(self, _: None, stored: jax.Array) -> None:
    # Dropped before the next ones come.
    jax.block_until_ready(self._grad(self._params, self._keys, stored))

  def beside_torch(self, stored: jax.Array) -> step_peer.Peer:
    """PyTorch with the same numbers, see `step_peer`."""
    return step_peer.Peer(self._recipe, self._params, self._keys, stored,
                          self._grad(self._params, self._keys, stored)[0])


def main() -> None:
  """Reads the flags and measures."""
  f = flags.FLAGS
  if f.growth and f.peer:
    raise InputError("--peer goes with a case, not with --growth")
  if f.growth:
    result = {"benchmark": "train_step_growth", **growth.measure(f.steps)}
    growth.plot(result["lengths"], pathlib.Path(f.plot))
    print(f"wrote {f.plot}")
    report.finish(result, f.out, "train_step_growth_cpu.json")
    return
  case = from_config(f.config) if f.config is not None else train_step_cases.of(f.case)
  devices = case.cpu_devices if f.cpu_devices is None else f.cpu_devices
  if devices:
    machine.split_cpu(devices)
  machine.free_after_compiling()
  result = measure(case, f.steps, f.peer)
  name = f.config.name if f.config is not None else f.case
  for key, value in result.items():
    print(f"  {key:<22}{value:.4g}" if isinstance(value, float) else f"  {key:<22}{value}")
  if torch := result.get("torch"):
    result |= {"speedup_vs_torch": torch["seconds_per_step"] / result["seconds_per_step"],
               "memory_vs_torch": result["peak_rss_mib"] / torch["peak_rss_mib"]}
    print(f"  {result['speedup_vs_torch']:.2f} times the speed of PyTorch in this run, with "
          f"{result['memory_vs_torch']:.2f} of its memory")
  published = train_step_cases.PUBLISHED.get(name) if f.config is None else None
  if published:
    ratio = published["seconds_per_step"] / result["seconds_per_step"]
    machines = train_step_cases.PUBLISHED_PRODUCT_GFLOPS / result["product_gflops_per_s"]
    result |= {"published": published, "speedup_vs_published": ratio,
               "speedup_at_equal_product_rate": ratio * machines}
    print(f"  {ratio:.2f} times the published implementation's speed on its own machine, of about "
          f"{train_step_cases.PUBLISHED_PRODUCT_GFLOPS:.0f} GFLOP/s; {ratio * machines:.2f} times "
          "at the product rate of this one")
  report.finish({"benchmark": "train_step", "case": name, **result}, f.out,
                f"train_step_{name}{'_torch' if f.peer else ''}.json")


if __name__ == "__main__":
  flags.DEFINE_enum("case", "laptop", train_step_cases.NAMES, "What to measure, without --config.")
  flags.DEFINE_bool("growth", False, "Measure the laptop's model by the number of frames.")
  flags.DEFINE_string("plot", "docs/growth.png", "Where --growth draws.")
  flags.DEFINE_string("out", "", "JSON file; default: by case, in benchmarks/results; -: none.")
  flags.DEFINE_bool("peer", False, "Also measure the same in PyTorch, turn by turn; needs "
                    "pip install -e '.[bench]'.")
  flags.DEFINE_integer("steps", 5, "Timed steps.", lower_bound=1)
  flags.DEFINE_integer("cpu_devices", None, "On CPU: devices that the cores are shared among; "
                       "default: as the case or the configuration says.", lower_bound=1)
  try:
    from ml_collections import config_flags
  except ImportError:  # the benchmarks run where only jax is installed
    flags.DEFINE_string("config", None, "Needs ml_collections, which is not installed here.")
  else:
    config_flags.DEFINE_config_file("config", None, "Measure the train step of this configuration.")
  cli.run(main, computes=True)
