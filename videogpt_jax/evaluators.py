"""What a training run measures beside its loss: small evaluators, each at a cadence of its own.

held_out   loss on held-out videos, by noise level and clip index    log.validate_every
rollouts   MSE and PSNR by predicted frame on a fixed set             log.rollouts_every
videos     some of these rollouts to look at                         log.videos_every

All of them also run after the last step. They see the parameters that are shown: the EMA, where
there is one. Axes: V videos, G predicted frames.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

from absl import logging
import jax
from jaxtyping import UInt8
from ml_collections import ConfigDict
import numpy as np

from videogpt_jax import base as base_lib
from videogpt_jax import checkpoint_files
from videogpt_jax import distributed
from videogpt_jax import held_out
from videogpt_jax import step as step_lib
from videogpt_jax import telemetry
from videogpt_jax import weights as weights_lib
from videogpt_jax.data import pipeline
from videogpt_jax.data import video
from videogpt_jax.errors import InputError
from videogpt_jax.metrics import frames as frame_metrics

_SHOWN = 128  # px, height to which small frames are enlarged


@dataclasses.dataclass
class Run:
  """What the parts of a training run share."""

  config: ConfigDict
  workdir: str
  recipe: step_lib.Recipe
  mesh: jax.sharding.Mesh
  source: pipeline.Mixture
  validation: pipeline.Mixture
  writer: telemetry.Writer | telemetry.Silent
  base: base_lib.Base | None = None
  held_out: tuple[int, float] = (-1, 0.0)  # the last held-out loss, and the step it is of

  def extra(self, step: int) -> dict[str, Any]:
    """What is saved beside the state of a step."""
    measured, loss = self.held_out
    base = {} if self.base is None else {"base": self.base.record()}
    return {"config": self.config.to_dict(), "fingerprint": self.source.fingerprint,
            checkpoint_files.HELD_OUT: loss if measured == step else None, **base}


@dataclasses.dataclass(frozen=True)
class Evaluator:
  """Something that is measured during training.

  Attributes:
    name: of it.
    every: steps between two measurements.
    last: step after which it is taken in any case.
    measure: takes the number of finished steps and the parameters, and tells what it found.
  """

  name: str
  every: int
  last: int
  measure: Callable[[int, Any], None]

  def due(self, step: int) -> bool:
    """Whether to measure after `step` steps."""
    return step % self.every == 0 or step == self.last


def of_run(run: Run) -> Sequence[Evaluator]:
  """The evaluators that a run's configuration asks for, in the order they are to be called."""
  log, last = run.config.log, run.config.train.steps
  found = [Evaluator("held_out", log.validate_every, last, HeldOut(run))]
  fixed = FixedSet(run)
  if fixed.scored:
    found.append(Evaluator("rollouts", log.rollouts_every, last, Rollouts(run, fixed)))
  if fixed.shown:
    found.append(Evaluator("videos", log.videos_every, last, Videos(run, fixed)))
  return found


class HeldOut:
  """Loss on held-out videos, every time the same ones with the same noise."""

  def __init__(self, run: Run) -> None:
    self._run = run
    self._loss = held_out.Loss(run.config, run.recipe, run.mesh, run.validation)

  def __call__(self, step: int, params: Any) -> None:
    values = {f"validation/{name}": value for name, value in self._loss(params).items()}
    self._run.held_out = step, values["validation/loss"]
    self._run.writer.scalars(step, values)
    self._run.writer.say(f"step {step} held-out loss {values['validation/loss']:.5f}")


class FixedSet:
  """Rollouts of held-out videos, every time the same ones with the same noise.

  Rolled out once a step, whoever asks. Training needs no autoencoder, rollouts do: without one, a
  warning takes their place.

  Attributes:
    scored: how many are.
    shown: how many are.
  """

  def __init__(self, run: Run) -> None:
    log, there = run.config.log, len(run.validation)
    self._run = run
    generated = run.config.data.frames > run.config.sample.history
    self.scored = min(log.rollouts, there) if generated else 0
    self.shown = min(log.videos, there)
    self._last: tuple[int, np.ndarray, np.ndarray] | None = None
    if self.scored or self.shown:
      try:
        run.recipe.codec.prepare()
      except InputError as error:
        self.scored = self.shown = 0
        logging.warning("no videos will be shown: %s; set --config.codec.path, or "
                        "--config.log.videos=0 and --config.log.rollouts=0", error)
    # A rollout takes all processes.
    self.scored, self.shown = map(distributed.smallest, (self.scored, self.shown))

  def __call__(self, step: int, params: Any
               ) -> tuple[UInt8[np.ndarray, "V N H W 3"], UInt8[np.ndarray, "V N H W 3"]]:
    """The videos, and their first frames as the model continues them."""
    if self._last is not None and self._last[0] == step:
      return self._last[1:]
    run, config = self._run, self._run.config
    frames, history = config.data.frames, config.sample.history
    rows = next(pipeline.batches(
      run.validation, frames=frames, interval=tuple(config.data.interval),
      batch_size=max(self.scored, self.shown), seed=config.seed))
    codec = run.recipe.codec
    truth = codec.decode(rows.latents)
    model = weights_lib.Weights(run.recipe.model, params, codec, config.to_dict(), run.workdir,
                                run.mesh)
    new = model.continue_video(truth[:, :history], frames - history,
                               rng=jax.random.key(config.seed))
    self._last = step, truth, np.concatenate([truth[:, :history], new], axis=1)
    return self._last[1:]


class Rollouts:
  """MSE and PSNR of rollouts by predicted frame, and of copies of the last frame given."""

  def __init__(self, run: Run, fixed: FixedSet) -> None:
    self._run, self.rolled_out = run, fixed

  def __call__(self, step: int, params: Any) -> None:
    history = self._run.config.sample.history
    truth, predicted = (x[:self.rolled_out.scored] for x in self.rolled_out(step, params))
    future = truth[:, history:]
    error = frame_metrics.mse(predicted[:, history:], future)
    copied = frame_metrics.mse(np.repeat(truth[:, history - 1:history], future.shape[1], axis=1),
                               future)
    decibels = np.minimum(frame_metrics.psnr_from_mse(error), frame_metrics.EQUAL_PSNR)
    values = {"rollout/mse": error.mean(), "rollout/psnr": decibels.mean(),
              "rollout/mse_copy_last": copied.mean()}
    for name, by_frame in (("mse", error.mean(axis=0)), ("psnr", decibels.mean(axis=0))):
      values |= {f"rollout/{name}_by_frame/{i}": x for i, x in enumerate(by_frame)}
    values = {name: float(value) for name, value in values.items()}
    self._run.writer.scalars(step, values)
    self._run.writer.say(f"step {step} rollouts of {len(error)} videos: MSE "
                         f"{values['rollout/mse']:.5f} (copies of the last frame "
                         f"{values['rollout/mse_copy_last']:.5f})")


class Videos:
  """Rollouts beside the truth."""

  def __init__(self, run: Run, fixed: FixedSet) -> None:
    self._run, self.rolled_out = run, fixed

  def __call__(self, step: int, params: Any) -> None:
    truth, predicted = self.rolled_out(step, params)
    scale = max(1, _SHOWN // truth.shape[2])
    for i in range(self.rolled_out.shown):
      columns = {"truth": truth[i], "prediction": predicted[i]}
      shown = video.side_by_side(columns, scale=scale, history=self._run.config.sample.history)
      path = self._run.writer.video(step, f"rollout_{i}", shown, fps=8.0)
    self._run.writer.say(f"step {step} wrote {self.rolled_out.shown} rollouts like {path}")
