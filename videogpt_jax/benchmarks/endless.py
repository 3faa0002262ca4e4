"""A rollout without end: does a clip cost the same for ever, and does memory stay flat?

    python -m videogpt_jax.benchmarks.endless --clips=1000

The weights that come with the package roll out one video over a rolling window, every clip
decoded. Afterwards that stream takes turns with a fresh one, so that the machine's mood
cancels: the ratio of their medians is what time adds. The last line printed is one JSON
object.
"""

from collections.abc import Iterator
import statistics
import time
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from videogpt_jax import cli
from videogpt_jax import machine
from videogpt_jax import rollout
from videogpt_jax import sampler as sampler_lib
from videogpt_jax import weights as weights_lib
from videogpt_jax.benchmarks import report
from videogpt_jax.data import given

_WARM_UP = 4  # clips until the window is full and everything is compiled


def measure(weights: weights_lib.Weights, clips: int, steps: int, clip_frames: int, window: int,
            turns: int) -> dict[str, Any]:
  """Rolls out `clips` clips; see the module. Memory is resident, MiB."""
  history = given.of_world(weights.config, 0, weights.config["sample"]["history"])
  latents = weights.codec.normalize(
    jnp.asarray(weights.codec.encode(history.frames[None, :history.history])))

  def stream() -> Iterator[jax.Array]:
    return rollout.clips(
      weights.model, weights.params, latents, clip_frames=clip_frames,
      sampler=sampler_lib.Sampler(steps), window=rollout.Window(window, "rolling"),
      rng=jax.random.key(0))

  def take(clips: Iterator[jax.Array]) -> float:
    began = time.perf_counter()
    frames = weights.codec.start_decode(next(clips))()
    assert frames.dtype == np.uint8
    return time.perf_counter() - began

  long, memory, programs = stream(), [], []
  for index in range(clips):
    take(long)
    if index + 1 in (_WARM_UP, clips) or (index + 1) % max(1, clips // 20) == 0:
      memory.append((index + 1, round(machine.host_rss_mib(), 1)))
      programs.append(sum(f._cache_size() for f in  # type: ignore[attr-defined]
                          (rollout.encode, rollout.extend, rollout.denoise_clip)))
      print(f"clip {index + 1}/{clips} | rss {memory[-1][1]:.0f} MiB", flush=True)
  fresh = stream()
  for _ in range(_WARM_UP):
    take(fresh)
  pairs = [(take(long), take(fresh)) for _ in range(turns)]
  late, early = (statistics.median(times) for times in zip(*pairs, strict=True))
  settled = [mib for index, mib in memory if index >= clips // 10]
  return {
    "benchmark": "endless", "device": jax.devices()[0].device_kind, "jax": jax.__version__,
    "clips": clips, "clip_frames": clip_frames, "window": window, "steps": steps,
    "seconds_per_clip_after_all": late, "seconds_per_clip_fresh": early,
    "time_ratio": late / early, "turns": turns, "rss_mib": dict(memory),
    "rss_growth_mib": settled[-1] - settled[0], "programs": [programs[0], programs[-1]]}


def main() -> None:
  """Reads the flags and measures."""
  f = flags.FLAGS
  result = measure(weights_lib.load(), f.clips, f.steps, f.clip_frames, f.window, f.turns)
  print(f"  a clip after {f.clips} others takes {result['time_ratio']:.3f} times a fresh stream's; "
        f"memory grew by {result['rss_growth_mib']:.1f} MiB")
  report.finish(result, f.out, "endless_rollout.json")


def define_flags() -> None:
  """The command's flags."""
  flags.DEFINE_integer("clips", 1000, "Clips to roll out before time is measured.", lower_bound=8)
  flags.DEFINE_integer("steps", 10, "Steps of the sampler.", lower_bound=1)
  flags.DEFINE_integer("clip_frames", 4, "Frames of a clip.", lower_bound=1)
  flags.DEFINE_integer("window", 16, "Frames of the window.", lower_bound=2)
  flags.DEFINE_integer("turns", 100, "Clips that both streams take in turns.", lower_bound=1)
  flags.DEFINE_string("out", "-", "Result file; empty: in benchmarks/results; - for none.")


if __name__ == "__main__":
  define_flags()
  cli.run(main)
