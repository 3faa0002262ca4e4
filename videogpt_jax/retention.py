"""Which checkpoints of a run stay: the last ones, one every so many steps, the best ones."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

from videogpt_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Retention:
  """A checkpoint stays if any of the three rules wants it.

  Attributes:
    last: the newest ones, at least 1.
    every: those whose step is a multiple of it, for ever; 0: none.
    best: those with the lowest held-out losses; 0: none. Checkpoints at steps for which no loss
      was measured, or none that is finite, do not count.
  """

  last: int
  every: int = 0
  best: int = 0

  def __post_init__(self) -> None:
    if self.last < 1 or self.every < 0 or self.best < 0:
      raise InputError(f"checkpoint.keep ({self.last}) must be at least 1, checkpoint.keep_every "
                       f"({self.every}) and checkpoint.keep_best ({self.best}) at least 0")

  def stays(self, losses: Sequence[tuple[int, float | None]]) -> list[bool]:
    """For every checkpoint whether it stays.

    Args:
      losses: step and held-out loss, if any, of every checkpoint by ascending step.
    """
    measured = sorted((loss, step) for step, loss in losses
                      if loss is not None and math.isfinite(loss))
    best = {step for _, step in measured[:self.best]}
    newest = {step for step, _ in losses[-self.last:]}
    return [step in newest | best or bool(self.every and step % self.every == 0)
            for step, _ in losses]


@dataclasses.dataclass(frozen=True)
class Policy:
  """`Retention` as orbax asks for it (a `PreservationPolicy`).

  Attributes:
    retention: the rules.
    losses: held-out losses by step; grows with the run.
  """

  retention: Retention
  losses: dict[int, float | None]

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """For every checkpoint (anything with a `step`) whether it stays."""
    del context
    return self.retention.stays([(saved.step, self.losses.get(saved.step))
                                 for saved in checkpoints])
