"""From noise to a clip: the time grid, the methods, guidance.

A clip follows dz/dt = (x1(z, t) - z) / (1 - t) from noise at t = 0 to data at t = 1, where
x1 is what the model predicts. Over a step from t to t', with s = 1 - t, a constant x1
leads to z' = (s' / s) z + (1 - s' / s) x1, which is Euler's step; every method here is a
linear combination of z and of predictions made on the way, with weights that depend on the
grid alone. They are computed once, in float64; the steps themselves are one scan.
"""

from collections.abc import Callable
import dataclasses
import itertools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

METHODS = ("euler", "heun", "multistep")

# (z, t, guided) -> x1 given the history; and, if guided, x1 without any.
Predict = Callable[[Float[Array, "B g h w C"], Float[Array, ""], bool],
                   tuple[Float[Array, "B g h w C"], Float[Array, "B g h w C"] | None]]


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How a clip is denoised.

  Attributes:
    steps: T, steps of the time grid.
    guidance: weight of the prediction given the history against the one without; 1 leaves
      the latter out.
    shift: of the time grid, see `time_grid`.
    method: `euler` (published), one prediction a step; `heun`, of second order, with two
      predictions a step but the last one, which is Euler's; `multistep`, of second order
      with one prediction a step: x1 is extrapolated from this one and the one before.
    guidance_decay: d; at time t the weight is 1 + (guidance - 1) (1 - t)^d.
    guidance_range: times (lo, hi) between which there is guidance at all (Kynkaanniemi et
      al., arXiv 2404.07724); a step outside does not pay for it.
  """

  steps: int = 20
  guidance: float = 1.0
  shift: float = 1.0
  method: str = "euler"
  guidance_decay: float = 0.0
  guidance_range: tuple[float, float] = (0.0, 1.0)

  @property
  def evaluations(self) -> int:
    """How often the model predicts a clip."""
    return 2 * self.steps - 1 if self.method == "heun" else self.steps

  @property
  def guided_evaluations(self) -> int:
    """How many of these have guidance."""
    return int((_table(self).guidance != 1).sum())


def problem(sampler: Sampler) -> str:
  """What makes the settings of a sampler impossible; empty if they make sense."""
  lo, hi = sampler.guidance_range
  for wrong, reason in (
      (sampler.steps < 1, f"steps must be at least 1, got {sampler.steps}"),
      (not sampler.shift > 0, f"shift must be positive, got {sampler.shift}"),
      (not sampler.guidance >= 0, f"guidance must be at least 0, got {sampler.guidance}"),
      (not sampler.guidance_decay >= 0,
       f"guidance_decay must be at least 0, got {sampler.guidance_decay}"),
      (not 0 <= lo <= hi <= 1, f"guidance_range must be two times 0 <= lo <= hi <= 1, got "
                               f"{sampler.guidance_range}"),
      (sampler.method not in METHODS,
       f"method is {sampler.method!r}; known: {', '.join(METHODS)}")):
    if wrong:
      return reason
  return ""


def time_grid(steps: int, shift: float = 1.0) -> Float[np.ndarray, "T1"]:
  """Sampling times from 0 to 1 in `steps` steps: u / (u + shift - shift * u), T + 1 of them.

  `shift` above 1 spends more steps near the noise. Float64.
  """
  if steps < 1:
    raise ValueError(f"sampling needs at least 1 step, got {steps}")
  u = np.linspace(0.0, 1.0, steps + 1)
  return u / (u + shift - shift * u)


def integrate(
    predict: Predict, noise: Float[Array, "B g h w C"], sampler: Sampler
) -> Float[Array, "B g h w C"]:
  """Denoises a clip: one scan over the predictions of the model, the state in float32.

  Guidance on x1 is guidance on velocities: both are the same affine map of each other at
  given z and t.

  Raises:
    ValueError: the sampler's settings make no sense.
  """
  if problem(sampler):
    raise ValueError(problem(sampler))
  table = _table(sampler)
  has_guidance = table.guidance != 1

  def guided(z: Array, row: _Table) -> Array:
    conditional, unconditional = predict(z, row.t, True)
    assert unconditional is not None
    return unconditional + row.guidance * (conditional - unconditional)

  def plain(z: Array, row: _Table) -> Array:
    return predict(z, row.t, False)[0]

  if has_guidance.all() or not has_guidance.any():
    x1_of = guided if has_guidance.any() else plain
  else:
    x1_of = lambda z, row: jax.lax.cond(row.guidance != 1, guided, plain, z, row)

  def evaluate(carry: tuple[Array, Array, Array], row: _Table
               ) -> tuple[tuple[Array, Array, Array], None]:
    z, begin, before = carry
    x1 = x1_of(z, row).astype(jnp.float32)
    begin = jnp.where(row.begins, z, begin)
    z = row.of_z * z + row.of_begin * begin + row.of_x1 * x1 + row.of_before * before
    return (z, begin, x1), None

  z = noise.astype(jnp.float32)
  rows = jax.tree.map(lambda x: jnp.asarray(x, bool if x.dtype == bool else jnp.float32), table)
  (z, _, _), _ = jax.lax.scan(evaluate, (z, z, jnp.zeros_like(z)), rows)
  return z


@flax.struct.dataclass
class _Table:
  """A method on a grid: a row for each prediction of the model.

  All are [n]. At time `t` the model predicts x1 from z; then z becomes a combination of z, of
  z at the `begin` of the step, of x1 and of the x1 `before`.
  """

  t: Any
  guidance: Any
  begins: Any  # whether z is now at the begin of a step
  of_z: Any
  of_begin: Any
  of_x1: Any
  of_before: Any


def _table(sampler: Sampler) -> _Table:
  grid = time_grid(sampler.steps, sampler.shift)
  rows = []
  for i, (t, t_next) in enumerate(itertools.pairwise(grid)):
    s, s_next = 1 - t, 1 - t_next
    ratio, extrapolated = s_next / s, 0.0
    if sampler.method == "multistep" and i:
      # x1 + (tau - t) (x1 - before) / (t - t_before), integrated exactly over the step.
      logarithm = s_next * math.log(s / s_next) if s_next > 0 else 0.0
      extrapolated = (s - s_next - logarithm) / (t - grid[i - 1])
    rows.append((t, True, ratio, 0.0, 1 - ratio + extrapolated, -extrapolated))
    if sampler.method == "heun" and s_next > 0:
      # From the begin of the step along the mean of the velocities at both its ends.
      first, last = (t_next - t) / (2 * s), (t_next - t) / (2 * s_next)
      rows.append((t_next, False, -last, 1 - first, last, first))
  t, begins, *weights = (np.array(column) for column in zip(*rows, strict=True))
  lo, hi = sampler.guidance_range
  guidance = 1 + (sampler.guidance - 1) * (1 - t) ** sampler.guidance_decay
  return _Table(t, np.where((lo <= t) & (t <= hi), guidance, 1.0), begins, *weights)
