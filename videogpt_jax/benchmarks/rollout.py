"""Speed and memory of prediction: `python -m videogpt_jax.benchmarks.rollout`.

    python -m videogpt_jax.benchmarks.rollout --case=laptop
    python -m videogpt_jax.benchmarks.rollout --case=full --steps=20   # on an accelerator

One clip is generated after a history, from latents to latents: the history encoded, then
every denoising step. Beside it, in the same run and with the same attention, the way of the
published sampler, which computes the history again in every step, and a clip of a rolling
window, whose history is in the cache already. The last line printed is one JSON object.
"""

from collections.abc import Callable
import dataclasses
import functools
import itertools
import statistics
import time
from typing import Any

from absl import flags
from flax import traverse_util
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from videogpt_jax import backbone
from videogpt_jax import cli
from videogpt_jax import flops
from videogpt_jax import layout
from videogpt_jax import machine
from videogpt_jax import model
from videogpt_jax import rollout
from videogpt_jax import sampler as sampler_lib
from videogpt_jax import sharding
from videogpt_jax.benchmarks import report

# The published PyTorch sampler on 2 cores of an x86-64 server CPU of about 190 GFLOP/s (float32
# 2048^3 product).
PUBLISHED = {"laptop": {"seconds_per_frame": 4.06, "peak_rss_mib": 798.0}}
REAL_TIME = 7.5  # frames/s: 30 source frames a second, every fourth taken


@dataclasses.dataclass(frozen=True)
class Case:
  """What is generated: a clip of `generated` frames after `history` ones, h x w `cells` each."""

  model: model.Config
  cells: tuple[int, int]
  history: int
  generated: int
  steps: int
  cpu_devices: int = 1  # see `machine.split_cpu`


def laptop() -> Case:
  """Hidden 384, 6 layers, 64 patches a frame, 24 frames given, 8 new, 20 steps, float32."""
  stack = backbone.Config(hidden_size=384, intermediate_size=1024, num_layers=6, num_heads=6,
                          num_kv_heads=6)
  return Case(model.Config(backbone=stack, channels=4), (16, 16), 24, 8, 20,
              cpu_devices=min(2, machine.usable_cores()))


def full() -> Case:
  """The published model at 176 x 320: 56 frames given, 24 new, 50 steps, bfloat16."""
  stack = backbone.Config(hidden_size=3072, intermediate_size=8192, num_layers=32, num_heads=32,
                          num_kv_heads=32, dtype=jnp.bfloat16)
  return Case(model.Config(backbone=stack, channels=4, vocab_size=32_064, img_id=32_012,
                           end_img_id=32_013, diff_id=32_011), (22, 40), 56, 24, 50)


CASES = {"laptop": laptop, "full": full}


@functools.partial(jax.jit, static_argnums=(0, 4))
def recomputed_clip(
    config: model.Config,
    params: Any,
    history: Float[Array, "B h_ h w C"],
    noise: Float[Array, "B g h w C"],
    sampler: sampler_lib.Sampler,
) -> Float[Array, "B g h w C"]:
  """The published sampler: Euler on velocities, everything computed anew in every step."""
  batch, generated = noise.shape[:2]

  def velocity(z: Array, t: Array, past: Array) -> Array:
    blocks = layout.prediction(past.shape[1], generated, batch)
    x1 = model.predict(config, params, past, z, jnp.full((batch, generated), t), blocks)
    return (x1 - z) / (1 - t)

  def step(z: Array, times: Array) -> tuple[Array, None]:
    t, t_next = times
    v = velocity(z, t, history)
    if sampler.guidance != 1:
      unconditional = velocity(z, t, history[:, :0])
      v = unconditional + sampler.guidance * (v - unconditional)
    return z + (t_next - t) * v, None

  grid = sampler_lib.time_grid(sampler.steps, sampler.shift)
  times = jnp.array(list(itertools.pairwise(grid)), jnp.float32)
  return jax.lax.scan(step, noise.astype(jnp.float32), times)[0]


def random_params(config: model.Config, mesh: jax.sharding.Mesh) -> Any:
  """Random parameters in the types of prediction: leaf by leaf, since only the sizes count."""
  boxed = jax.eval_shape(lambda: model.init_params(config, 0))
  shardings = traverse_util.flatten_dict(nn.meta.unbox(sharding.of_tree(mesh, boxed)), sep="/")
  leaves = traverse_util.flatten_dict(model.abstract_params(config), sep="/")

  def create(index: int, name: str) -> Array:
    dtype = config.backbone.dtype if model.rounded(name) else jnp.float32
    draw = lambda: (0.02 * jax.random.normal(jax.random.key(index), leaves[name].shape)
                    + (name.endswith("norm/weight"))).astype(dtype)
    return jax.jit(draw, out_shardings=shardings[name])()

  return traverse_util.unflatten_dict(
    {name: create(i, name) for i, name in enumerate(leaves)}, sep="/")


def measure(case: Case, sampler: sampler_lib.Sampler, repeats: int, recomputed: bool
            ) -> dict[str, Any]:
  """Times a clip each way, in turns after one round that compiles; medians count."""
  mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "sequence": 1, "tensor": -1})
  config, cell = case.model, (*case.cells, case.model.channels)
  rate = machine.product_rate(*((8192, jnp.bfloat16) if config.backbone.dtype == jnp.bfloat16
                                else (2048, jnp.float32)))
  with sharding.use(mesh):
    params = random_params(config, mesh)
    rng = jax.random.key(0)
    history = jax.jit(rollout.draw_noise, static_argnums=2)(rng, 0, (1, case.history, *cell))
    noise = rollout.draw_noise(rng, 1, (1, case.generated, *cell))
    encode = lambda: rollout.encode(config, params, history, case.history)
    ways: dict[str, Callable[[], Array]] = {
      "cached": lambda: rollout.denoise_clip(config, params, encode(), noise, sampler)}
    seconds, results = _take_turns(ways, repeats)
    peak_rss, peak_device = machine.peak_rss_mib(), _device_peak_mib()  # of the cached way alone
    more: dict[str, Callable[[], Array]] = {}
    state = [encode()]

    def rolling() -> Array:
      state[0] = rollout.extend(config, params, state[0], noise, case.generated)
      return rollout.denoise_clip(config, params, state[0], noise, sampler)

    more["rolling"] = rolling
    if recomputed:
      more["recomputed"] = lambda: recomputed_clip(config, params, history, noise, sampler)
    again, others = _take_turns({**ways, **more}, repeats)
    seconds |= {f"{name}_again" if name == "cached" else name: x for name, x in again.items()}
    results |= others
  return _figures(case, sampler, seconds, results, rate) | {
    "peak_rss_mib": peak_rss, "peak_device_mib": peak_device}


def _take_turns(ways: dict[str, Callable[[], Array]], repeats: int
                ) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
  results = {name: np.asarray(way()) for name, way in ways.items()}
  seconds: dict[str, list[float]] = {name: [] for name in ways}
  for _ in range(repeats):
    for name, way in ways.items():
      began = time.perf_counter()
      jax.block_until_ready(way())
      seconds[name].append(time.perf_counter() - began)
  return seconds, results


def _figures(case: Case, sampler: sampler_lib.Sampler, seconds: dict[str, list[float]],
             results: dict[str, np.ndarray], rate: float) -> dict[str, Any]:
  """What the times mean."""
  count = functools.partial(
    flops.clip, case.model, case.history, case.generated, case.cells,
    evaluations=sampler.evaluations, guided_evaluations=sampler.guided_evaluations)
  median = {name: statistics.median(times) for name, times in seconds.items()}
  used = rate * jax.device_count() if jax.default_backend() != "cpu" else rate
  figures: dict[str, Any] = {
    "device": jax.devices()[0].device_kind, "devices": jax.device_count(),
    "jax": jax.__version__, "dtype": jnp.dtype(case.model.backbone.dtype).name,
    "history": case.history, "generated": case.generated, **dataclasses.asdict(sampler),
    "seconds_per_frame": median["cached"] / case.generated,
    "fastest_seconds_per_frame": min(seconds["cached"]) / case.generated,
    "frames_per_s": case.generated / median["cached"],
    "flops_per_clip": count(), "product_gflops_per_s": rate / 1e9,
    "utilisation": count() / median["cached"] / used,
    "rolling_seconds_per_frame": median["rolling"] / case.generated,
  }
  if "recomputed" in median:
    ours, theirs = results["cached"], results["recomputed"]
    figures |= {
      "recomputed_seconds_per_frame": median["recomputed"] / case.generated,
      "recomputed_flops_per_clip": count(recomputed=True),
      "speedup_vs_recomputed": median["recomputed"] / median["cached_again"],
      "difference_from_recomputed": float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
    }
  # A step costs what is left when the history is encoded; so many fit into real time.
  per_step = median["rolling"] / sampler.steps
  figures["steps_in_real_time"] = int(case.generated / REAL_TIME / per_step)
  return figures


def _device_peak_mib() -> float | None:
  """The most memory that one accelerator has held, MiB; None where jax does not count it."""
  stats = jax.devices()[0].memory_stats() or {}
  return stats["peak_bytes_in_use"] / 2**20 if "peak_bytes_in_use" in stats else None


def main() -> None:
  """Reads the flags and measures."""
  f = flags.FLAGS
  case = CASES[f.case]()
  devices = f.cpu_devices or case.cpu_devices
  if devices > 1:
    machine.split_cpu(devices)
  machine.free_after_compiling()
  sampler = sampler_lib.Sampler(steps=f.steps or case.steps, guidance=f.guidance, method=f.method)
  result = measure(case, sampler, f.repeats, f.recomputed)
  for key, value in result.items():
    print(f"  {key:<30}{value:.4g}" if isinstance(value, float) else f"  {key:<30}{value}")
  published = PUBLISHED.get(f.case)
  if published and sampler == sampler_lib.Sampler(case.steps, 1.5):
    ratio = published["seconds_per_frame"] / result["seconds_per_frame"]
    result |= {"published": published, "speedup_vs_published": ratio}
    print(f"  {ratio:.2f} times the published sampler's speed (on its own machine)")
  kind = result["device"].replace(" ", "_").lower()
  report.finish({"benchmark": "rollout", "case": f.case, **result}, f.out,
                f"rollout_{f.case}_{kind}.json")


if __name__ == "__main__":
  flags.DEFINE_enum("case", "laptop", sorted(CASES), "What to generate.")
  flags.DEFINE_integer("steps", 0, "Steps of the sampler; 0: the case's.", lower_bound=0)
  flags.DEFINE_float("guidance", 1.5, "Weight of the history; 1: no unconditional branch.")
  flags.DEFINE_enum("method", "euler", sampler_lib.METHODS, "Method of the sampler.")
  flags.DEFINE_integer("repeats", 3, "Timed clips of each way.", lower_bound=1)
  flags.DEFINE_bool("recomputed", True, "Measure the sampler that caches nothing as well.")
  flags.DEFINE_integer("cpu_devices", 0, "On CPU: devices that the cores are shared among; 0: as "
                       "the case says.", lower_bound=0)
  flags.DEFINE_string("out", "-", "Result file; empty: in benchmarks/results; - for none.")
  cli.run(main, computes=True)
