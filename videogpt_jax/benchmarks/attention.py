"""Speed of attention beside its peers: `python -m videogpt_jax.benchmarks.attention`.

    python -m videogpt_jax.benchmarks.attention --case=laptop
    python -m videogpt_jax.benchmarks.attention --case=stage4     # on an accelerator
    python -m videogpt_jax.benchmarks.attention --case=stage4 --tune

All peers take turns in one run, so that their ratios do not depend on the machine's mood.
TFLOP/s count visible pairs only: 4 E H a pair forward, 10 E H backward (five products). The
result goes to benchmarks/results/ and, as one JSON object, to the last line.
"""

import functools
import itertools
import os
import statistics
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from videogpt_jax import attention
from videogpt_jax import cli
from videogpt_jax import layout
from videogpt_jax import machine
from videogpt_jax import mask
from videogpt_jax import sharding
from videogpt_jax.attention import blocks
from videogpt_jax.attention import gpu
from videogpt_jax.attention import reference
from videogpt_jax.attention import tuning
from videogpt_jax.benchmarks import peers
from videogpt_jax.benchmarks import report as report_lib

# Frames N, patches P, heads H, head size E; laptop: clips of 4, others: a random partition.
CASES = {
  "laptop": (16, 64, 6, 64),
  "stage1": (16, 220, 32, 96),
  "stage2": (48, 220, 32, 96),
  "stage4": (80, 220, 32, 96),
}
# What --tune tries: blocks of queries, blocks of keys (xla: tokens, most frames of either).
CANDIDATES = {
  "xla": ((66, 132, 264, 528, 1024, 2048), (1, 2, 4, 8, 16)),
  "tpu": ((256, 512, 1024), (256, 512, 1024, 2048)),
  "gpu": (gpu.BLOCKS, gpu.BLOCKS),
}
_TOLERANCE = {"bfloat16": 0.02, "float32": 1e-4}


def problem(case: str, mesh: Mesh, seed: int = 0) -> peers.Problem:
  """Random inputs of a case, heads split over the mesh: float32 on CPU, else bfloat16."""
  frames, patches, heads, size = CASES[case]
  if case == "laptop":
    # All 2N frame blocks valid, as many tokens as the figures in the literature are for.
    clip = layout.fixed_partition((4, 4, 4, 4))
    twice = lambda x: jnp.concatenate([x, x])[None]
    stream = jnp.repeat(jnp.array([layout.CLEAN, layout.NOISY]), frames)[None]
    sequence = layout.frame_blocks(stream, twice(clip), twice(jnp.arange(frames)))
  else:
    clip = layout.random_partition(jax.random.key(seed), frames)
    sequence = layout.training(clip[None])
  return _random(sequence, patches, heads, heads, size, mesh, seed)


def _random(sequence: layout.FrameBlocks, patches: int, heads: int, kv_heads: int, size: int,
            mesh: Mesh, seed: int) -> peers.Problem:
  by_head = NamedSharding(mesh, PartitionSpec(None, None, sharding.HEAD_AXES))
  ranks = jax.device_put(mask.ranks(layout.tokens(sequence, patches)), sharding.replicated(mesh))
  dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  q, k, v, grad = (
      jax.device_put(jax.random.normal(key, (*ranks.key.shape, n, size), dtype),
                     by_head if n % mesh.size == 0 else sharding.replicated(mesh))
      for key, n in zip(jax.random.split(jax.random.key(seed + 1), 4),
                        (heads, kv_heads, kv_heads, heads), strict=True))
  return peers.Problem(q, k, v, grad, ranks, patches + layout.MARKERS)


def check(case: str, mesh: Mesh, **ours: Any) -> None:
  """Output and gradients of what will be timed against dense attention in float32.

  On two samples of unequal length, long enough that a kernel uses every slot of its memory
  more than once, with pairs of query heads that share a key/value head.

  Args:
    case: gives heads and their size.
    mesh: as in `problem`.
    **ours: implementation and block map, as in `peers.ours`.

  Raises:
    RuntimeError: they differ by more than the type's rounding explains.
  """
  frames, patches = 12, 60
  heads, size = CASES[case][2:]
  clip = jax.vmap(lambda key: layout.random_partition(key, frames))(
      jax.random.split(jax.random.key(2)))
  valid = jnp.arange(frames) < jnp.array([frames, frames - 3])[:, None]
  small = _random(layout.training(clip, valid), patches, heads, heads // 2, size, mesh, seed=3)
  with sharding.use(mesh):
    out, gradients = peers.ours(small, **ours).both()
  inputs = (x.astype(jnp.float32) for x in (small.q, small.k, small.v))
  dense, pull = jax.vjp(lambda q, k, v: reference.attend(
      q, k, v, small.ranks, small.ranks), *inputs)
  expected = (dense, *pull(small.grad.astype(jnp.float32)))
  for name, a, b in zip(("output", "dq", "dk", "dv"), (out, *gradients), expected, strict=True):
    error = float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
    if not error < _TOLERANCE[str(small.q.dtype)]:
      raise RuntimeError(f"attention is wrong on this device: its {name} differs from dense "
                         f"attention by {error:.2g} of the largest value; not measured")


def set_up(case: peers.Problem, names: list[str]) -> tuple[dict[str, peers.Runner], dict[str, str]]:
  """The peers that run here, and why the others do not.

  A peer may fail in any way its library knows, memory before all: that is its result. Ours
  may not.
  """
  runners: dict[str, peers.Runner] = {}
  missing: dict[str, str] = {}
  for name in names:
    try:
      runner = peers.PEERS[name](case)
      runner.wait(runner.both())
      runners[name] = runner
    except peers.Unsupported as reason:
      missing[name] = str(reason)
    except Exception as error:  # any library's
      if name == "ours":
        raise
      missing[name] = _line(error)
    print(f"  {name:<28}{missing.get(name, 'ready')}", flush=True)
  return runners, missing


def _line(error: Exception) -> str:
  """An error of any library in one line; its message may be empty."""
  return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:150]}"


def measure(runners: dict[str, peers.Runner], rounds: int, calls: int
            ) -> dict[str, dict[str, float]]:
  """Median seconds of forward, and of forward with backward, of each; they take turns."""
  seconds: dict[str, dict[str, list[float]]] = {
      name: {"forward": [], "both": []} for name in runners}
  for _ in range(rounds):
    for name, runner in runners.items():
      for what, call in (("forward", runner.forward), ("both", runner.both)):
        runner.wait(call())  # warm caches, and nothing of another's still under way
        began = time.perf_counter()
        for _ in range(calls):
          out = call()
        runner.wait(out)
        seconds[name][what].append((time.perf_counter() - began) / calls)
  return {name: {what: statistics.median(times) for what, times in both.items()}
          for name, both in seconds.items()}


def differences(case: peers.Problem, runners: dict[str, peers.Runner]) -> dict[str, float]:
  """Largest difference of each peer's output from ours where a token sees anything."""
  valid = np.asarray(case.ranks.a > -(1 << 29))[..., None, None]
  ours = np.where(valid, np.asarray(runners["ours"].forward(), np.float32), 0)
  found = {}
  for name, runner in runners.items():
    if name not in ("ours", "jax_causal"):  # the latter computes something else
      try:
        out = runner.wait(runner.forward())
        host = out.float().cpu().numpy() if hasattr(out, "cpu") else np.asarray(out, np.float32)
      except Exception as error:  # any library's; memory, if it just sufficed before
        print(f"  {name}: {_line(error)}", flush=True)
        continue
      found[name] = float(np.abs(np.where(valid, host, 0) - ours).max())
  return found


def report(case_name: str, mesh: Mesh, rounds: int, calls: int, names: list[str]
           ) -> dict[str, Any]:
  """Measures a case; see the module."""
  check(case_name, mesh)
  case = problem(case_name, mesh)
  batch, length, heads, size = case.q.shape
  pairs = int(mask.live_pairs(case.ranks).sum())
  print(f"{case_name}: {length} tokens, {pairs / length**2:.3f} of all pairs visible, "
        f"{case.q.dtype}", flush=True)
  # Outside of the mesh, in which every device would compute the whole product.
  product = lambda: machine.product_rate(
      8192 if case.q.dtype == jnp.bfloat16 else 2048, case.q.dtype)
  before = product()
  with sharding.use(mesh):
    runners, missing = set_up(case, names)
    wrong = differences(case, runners)
    times = measure(runners, rounds, calls)
  rate = max(before, product())  # a machine that others use, too, is slower at times
  table: dict[str, Any] = {}
  for name, both in times.items():
    seen = batch * length * (length + 1) // 2 if name == "jax_causal" else pairs
    forward, total = (flops * seen * heads * size / seconds for flops, seconds in
                      ((4, both["forward"]), (14, both["both"])))
    table[name] = {
        "forward_s": both["forward"], "forward_backward_s": both["both"],
        "forward_tflops": forward / 1e12, "forward_backward_tflops": total / 1e12,
        "forward_share_of_product_rate": forward / rate,
        "forward_backward_share_of_product_rate": total / rate,
        "temporary_mib": runners[name].temporary_mib, "difference_from_ours": wrong.get(name)}
  implementation = attention.resolve("auto", length, length, size, case.q.dtype)
  result = {
      "benchmark": "attention", "case": case_name, "device": jax.devices()[0].device_kind,
      "devices": mesh.size, "implementation": implementation,
      "block_sizes": tuning.block_sizes(
          implementation, length, length, case.frame_tokens, size),
      "jax": jax.__version__, "dtype": str(case.q.dtype), "batch": batch, "length": length,
      "heads": heads, "head_size": size, "visible_share": pairs / length**2 / batch,
      "product_tflops": rate / 1e12, "rounds": rounds, "peers": table, "not_run": missing}
  for name in ("torch_sdpa", "torch_flex", "jax_dense", "ours_dense"):
    if name in times:
      for what, key in (("both", "speedup_vs"), ("forward", "forward_speedup_vs")):
        result[f"{key}_{name}"] = times[name][what] / times["ours"][what]
  return result


def tune(case_name: str, mesh: Mesh, rounds: int, calls: int) -> dict[str, Any]:
  """Times all block sizes of this device's implementation and keeps the fastest."""
  case = problem(case_name, mesh)
  length, size = case.q.shape[1], case.q.shape[3]
  name = attention.resolve("auto", length, length, size, case.q.dtype)
  runners: dict[str, peers.Runner] = {}
  entries: dict[str, tuple[int, ...]] = {}
  for entry in itertools.product(*CANDIDATES[name]):
    block_q, block_k = tuning.fitted(name, entry, length, length, case.frame_tokens)
    label = f"{block_q}x{block_k}"
    if label in runners:
      continue  # other entry, same blocks
    build = functools.partial(blocks.block_map, block_q=block_q, block_k=block_k)
    try:
      check(case_name, mesh, implementation=name, build=build)
      with sharding.use(mesh):
        runner = peers.ours(case, name, build)
        runner.wait(runner.both())
    except Exception as error:  # sizes that the compiler or the device refuses, or gets wrong
      print(f"  {label}: {_line(error)}", flush=True)
    else:
      runners[label], entries[label] = runner, entry
  times = measure(runners, rounds, calls)
  for label, both in sorted(times.items(), key=lambda item: item[1]["both"]):
    print(f"  {label:<12}forward {both['forward'] * 1e3:8.3f} ms, with backward "
          f"{both['both'] * 1e3:8.3f} ms", flush=True)
  best = min(times, key=lambda key: times[key]["both"])
  tuning.write(name, jax.devices()[0].device_kind, size, entries[best])
  return {"benchmark": "attention_tune", "case": case_name, "implementation": name,
          "device": jax.devices()[0].device_kind, "devices": mesh.size, "best": best,
          "seconds": times}


def _table(result: dict[str, Any]) -> str:
  lines = [f"  {'':<28}{'forward':>11}{'+ backward':>12}{'TFLOP/s':>10}{'':>9}{'of product':>12}"]
  for name, row in result["peers"].items():
    lines.append(
        f"  {name:<28}{row['forward_s'] * 1e3:8.2f} ms{row['forward_backward_s'] * 1e3:9.2f} ms"
        f"{row['forward_tflops']:10.3f}{row['forward_backward_tflops']:9.3f}"
        f"{row['forward_share_of_product_rate']:7.0%}"
        f"{row['forward_backward_share_of_product_rate']:5.0%}")
  return "\n".join(lines)


def main() -> None:
  """Reads the flags and measures."""
  f = flags.FLAGS
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch wants memory, too
  if f.cpu_devices:
    machine.split_cpu(f.cpu_devices)
  on_cpu = jax.default_backend() == "cpu"
  calls = f.calls or (1 if on_cpu else 10)
  devices = jax.devices()[:f.devices or (None if on_cpu else 1)]
  mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "sequence": 1, "tensor": -1}, devices)
  if f.tune:
    result = tune(f.case, mesh, f.rounds, calls)
  else:
    names = ["ours", *(name for name in f.peers if name != "ours")]
    result = report(f.case, mesh, f.rounds, calls, names)
    print(_table(result))
  kind = result["device"].replace(" ", "_").lower()
  report_lib.finish(result, f.out, f"{result['benchmark']}_{f.case}_{kind}.json")


if __name__ == "__main__":
  flags.DEFINE_enum("case", "laptop", list(CASES), "What to measure.")
  flags.DEFINE_list("peers", list(peers.PEERS), "Whom to measure beside ours.")
  flags.DEFINE_integer("rounds", 9, "Turns that each peer gets.", lower_bound=1)
  flags.DEFINE_integer("calls", 0, "Calls in a turn; 0: 1 on CPU, 10 on accelerators.")
  flags.DEFINE_bool("tune", False, "Time all block sizes and write the fastest into the table.")
  flags.DEFINE_integer("devices", 0, "Devices that the heads are shared among; 0: 1 accelerator, "
                       "as many as torch uses, or all of --cpu_devices.", lower_bound=0)
  flags.DEFINE_integer("cpu_devices", min(2, machine.usable_cores()), "On CPU: devices that the "
                       "cores and the heads are shared among; 0: leave it to jax.")
  flags.DEFINE_string("out", "", "Result file, '-' for none; default: in benchmarks/results/.")
  cli.run(main, computes=True)
