"""How far the slowest video of a batch is behind: `python -m videogpt_jax.benchmarks.pace`.

Attention has more to do in some partitions than in others, and a step ends with the slowest
device. Counted, not timed: visible pairs of random partitions, drawn for each video by itself
(`clips.partition="random"`) or with one number of clips for all (`"one_count"`). What that means
for a step is an estimate: attention's share of its arithmetic on GPUs with the run card's remat,
each at the rate that `videogpt_jax.aot.estimate` assumes. The last line printed is one JSON object.
"""

from collections.abc import Callable
from typing import Any

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from videogpt_jax import cli
from videogpt_jax import flops
from videogpt_jax import layout
from videogpt_jax import mask
from videogpt_jax import objective
from videogpt_jax.aot import estimate
from videogpt_jax.benchmarks import report
from videogpt_jax.benchmarks import train_step_cases

_PATCHES = 220  # of a frame of 176x320 px
_PARTITIONS = {
  "random": objective.random_partition,
  "one_count": layout.random_partitions_of_one_count,
}


def measure(partition: Callable[..., Any], frames: int, videos: int, batches: int
            ) -> tuple[float, float]:
  """Mean over batches of the most visible pairs of a video over their mean, and that mean.

  Args:
    partition: of one key a video, and the number of frames.
    frames: N.
    videos: of a batch, each on a device of its own.
    batches: that are drawn.
  """

  @jax.jit
  def pairs(key: jax.Array) -> jax.Array:
    clip = partition(jax.random.split(key, videos), frames)
    ranks = mask.ranks(layout.tokens(layout.training(clip), _PATCHES))
    return jax.lax.map(lambda row: mask.live_pairs(row)[0].astype(jnp.float32),
                       jax.tree.map(lambda x: x[:, None], ranks))

  counts = np.stack([pairs(key) for key in jax.random.split(jax.random.key(0), batches)])
  return float(counts.max(1).mean() / counts.mean()), float(counts.mean())


def main() -> None:
  """Reads the flags and counts."""
  f = flags.FLAGS
  config = train_step_cases.of("full_stage4").recipe.model
  rows = []
  for frames in (16, 48, 80):
    cost = flops.training(config, objective.next_clip(objective.random_partition), 1,
                          (frames, 22, 40, 4))
    dense, pairs = estimate.executed(cost, config.backbone.remat, "gpu")
    share = pairs / estimate.ATTENTION / (dense / estimate.PRODUCTS + pairs / estimate.ATTENTION)
    for name, partition in _PARTITIONS.items():
      slowest, mean = measure(partition, frames, f.videos, f.batches)
      row = {"frames": frames, "partition": name, "attention_share_of_time": share,
             "mean_pairs": mean, "slowest_over_mean_pairs": slowest,
             "step_over_mean_step": 1 + share * (slowest - 1)}
      rows.append(row)
      print(f"  {frames:>3} frames  {name:<10} pairs of the slowest {slowest:.3f} of the mean, "
            f"step {row['step_over_mean_step']:.3f}", flush=True)
  report.finish({"benchmark": "pace", "videos": f.videos, "batches": f.batches,
                 "patches": _PATCHES, "rows": rows}, f.out, "pace.json")


if __name__ == "__main__":
  flags.DEFINE_integer("videos", 64, "Of a batch, each on a device of its own.", lower_bound=2)
  flags.DEFINE_integer("batches", 16, "That are drawn.", lower_bound=1)
  flags.DEFINE_string("out", "", "JSON file; default: benchmarks/results/pace.json; '-': none.")
  cli.run(main)
