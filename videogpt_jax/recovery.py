"""Going back to the last good checkpoint, when updates are skipped again and again.

The batches seen since then are passed over: the step, which is the data position, goes on, and so
does the learning rate; only parameters and moments are those of the checkpoint. So a run that is
resumed later goes through the same steps once more and ends with the same bits.
"""

import dataclasses

import jax
from ml_collections import ConfigDict
import numpy as np

from videogpt_jax import checkpoint
from videogpt_jax import optimizer as optimizer_lib
from videogpt_jax import sharding
from videogpt_jax import step as step_lib
from videogpt_jax import train_log
from videogpt_jax.errors import InputError


class Recovery:
  """Counts how often a run went back.

  Args:
    recipe: of the train step.
    mesh: of its devices.
    checkpoints: of the run; none may be saved while updates are being skipped.
    settings: `train` of the configuration: how many updates skipped in a row lead back, and how
      many returns to one and the same checkpoint are allowed.
  """

  def __init__(self, recipe: step_lib.Recipe, mesh: jax.sharding.Mesh,
               checkpoints: checkpoint.Checkpoints, settings: ConfigDict) -> None:
    self._recipe, self._mesh, self._checkpoints = recipe, mesh, checkpoints
    self._enough, self._most = settings.max_bad_steps, settings.max_rollbacks
    self._returns: dict[int, int] = {}  # by updates that the restored state has seen

  def due(self, skipped: int) -> bool:
    """Whether so many updates skipped in a row are too many."""
    return skipped >= self._enough

  def __call__(self, state: step_lib.TrainState, log: train_log.TrainLog) -> step_lib.TrainState:
    """The state at the same step with what the newest checkpoint holds.

    Args:
      state: after the skipped updates; its memory is freed.
      log: knows how many were skipped; is told of the return.

    Raises:
      InputError: there is no checkpoint, none is whole, or going back to it has not helped.
      StorageError: they cannot be read for now.
    """
    step = int(state.step)
    good = self._checkpoints.verify()  # the state that is there goes before that one is read
    said = (f"{log.skipped} updates in a row, up to step {step}, were skipped: loss or gradient "
            "not finite, or far larger than usual (config.train.spike)")
    advice = "lower config.optimizer.learning_rate or look at the data, then go on from it"
    if good is None:
      raise InputError(f"{said}; there is no checkpoint yet to go back to: lower "
                       "config.optimizer.learning_rate or look at the data")
    base = state.base  # frozen, it is in no checkpoint
    for leaf in jax.tree.leaves(dataclasses.replace(state, base=None)):
      leaf.delete()
    with sharding.unused():
      restored = self._checkpoints.restore(step_lib.abstract_state(self._recipe, self._mesh))
    assert restored is not None
    # A checkpoint saved after a return holds the same parameters under a later step.
    kept = good - int(restored[1].skipped)
    self._returns[kept] = self._returns.get(kept, 0) + 1
    if self._returns[kept] > self._most:
      raise InputError(f"{said}; {self._most} returns (config.train.max_rollbacks) to what the "
                       f"checkpoint of step {good} holds have not helped. It is intact: {advice}")
    print(f"{said}; going on from step {step} with the parameters of step {good}", flush=True)
    log.went_back(step, good)
    number = lambda value: jax.device_put(np.int32(value), sharding.replicated(self._mesh))
    schedule = optimizer_lib.with_count(restored[1].opt_state, number(step))
    return dataclasses.replace(restored[1], base=base, step=number(step), bad_steps=number(0),
                               skipped=number(step - kept), opt_state=schedule)
