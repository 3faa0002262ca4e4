"""The loss on held-out videos: every time the same ones, with the same noise."""

from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import numpy as np

from videogpt_jax import sharding
from videogpt_jax import step as step_lib
from videogpt_jax.data import pipeline


class Loss:
  """Means over `log.validation_batches` batches: all, by noise level, by clip index."""

  def __init__(self, config: ConfigDict, recipe: step_lib.Recipe, mesh: jax.sharding.Mesh,
               videos: pipeline.Mixture) -> None:
    self._config, self._mesh, self._videos = config, mesh, videos
    self._step = step_lib.compile_validation(recipe, mesh)

  def __call__(self, params: Any) -> dict[str, float]:
    config, data = self._config, self._config.data
    rows, batch_size = sharding.rows(self._mesh), config.train.batch_size
    batches = pipeline.to_device(
      pipeline.batches(
        self._videos, frames=data.frames, interval=tuple(data.interval), batch_size=batch_size,
        seed=config.seed, rows=pipeline.local_rows(rows, batch_size)),
      rows, prefetch=1, batch_size=batch_size)
    fetched = [
      jax.device_get(self._step(params, jnp.int32(i), next(batches).latents))
      for i in range(config.log.validation_batches)
    ]
    return means(add_up(fetched))


def add_up(metrics: list[dict[str, Any]]) -> dict[str, np.ndarray]:
  """The sum of every metric over steps."""
  return {name: np.sum([m[name] for m in metrics], axis=0) for name in metrics[0]}


def means(sums: dict[str, np.ndarray]) -> dict[str, float]:
  """Mean losses from the sums of `step.loss_metrics`: all, by noise level, by clip index."""
  values = {"loss": float(sums["loss_sum"] / max(float(sums["loss_count"]), 1.0))}
  for kind in ("noise", "clip"):
    for i, (total, count) in enumerate(
        zip(sums[f"{kind}_sum"], sums[f"{kind}_count"], strict=True)):
      if count:
        values[f"loss_by_{kind}/{i}"] = float(total / count)
  return values
