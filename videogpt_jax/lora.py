"""Low-rank adapters: a frozen matrix W acts as W + (alpha / r) A B, and A and B are trained.

Source: Hu et al., LoRA (arXiv 2106.09685): A starts normal, B at zero, so that the model starts
as its base. The product is computed on the way of the activations, x W + (alpha / r) (x A) B:
no gradient of W's size is ever formed. A has the axes of W that are summed over, B those that
are made; keys and values (and gate and up) share their A, as parts of one fused matrix do.

A tree of parameters with adapters holds, beside a matrix `NAME`, the leaves `NAME_lora_a` and
`NAME_lora_b`; stacks of layers are in front of both, as of the matrix.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any, NamedTuple

from flax import traverse_util
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

TARGETS = ("q", "kv", "o", "gate_up", "down")  # matrices of a layer, as in `backbone`
A, B = "_lora_a", "_lora_b"
_RANK_AXIS = "lora_rank"


@dataclasses.dataclass(frozen=True)
class Config:
  """What is adapted.

  Attributes:
    rank: r, of the product A B.
    alpha: the product is scaled by alpha / r.
    targets: the matrices that have adapters, some of `TARGETS`.
    base_dtype: type in which those frozen parameters are kept that the model uses in its compute
      type alone; the others stay float32.
  """

  rank: int
  alpha: float
  targets: tuple[str, ...] = TARGETS
  base_dtype: Any = jnp.float32

  @property
  def scale(self) -> float:
    """Of the product A B."""
    return self.alpha / self.rank


class Weight(NamedTuple):
  """A matrix w and, where it has an adapter, the factors of what is added to it, a and b."""

  w: Float[Array, "inner *outer"]
  a: Float[Array, "inner r"] | None = None
  b: Float[Array, "r *outer"] | None = None

  def part(self, index: int) -> "Weight":
    """That entry of the second axis alone: of keys and values, of gate and up."""
    return Weight(self.w[:, index], self.a, None if self.b is None else self.b[:, index])


def factors(module: nn.Module, config: Config | None, name: str, shape: tuple[int, ...],
            axes: Sequence[str], inner: int) -> tuple[Array, Array] | tuple[()]:
  """Declares a and b of the matrix `name`; nothing if it is no target.

  Args:
    module: the module that owns the matrix.
    config: None: nothing is adapted.
    name: of the matrix.
    shape: of the matrix.
    axes: logical names of its axes, see `videogpt_jax.sharding`.
    inner: how many of them, the first ones, are summed over.
  """
  if config is None or name not in config.targets:
    return ()
  normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=tuple(range(inner)))
  down: Any = nn.with_logical_partitioning(normal, (*axes[:inner], _RANK_AXIS))
  up: Any = nn.with_logical_partitioning(nn.initializers.zeros_init(), (_RANK_AXIS, *axes[inner:]))
  return (module.param(name + A, down, (*shape[:inner], config.rank), jnp.float32),
          module.param(name + B, up, (config.rank, *shape[inner:]), jnp.float32))


def split(params: Any) -> tuple[Any, Any]:
  """A parameter tree as (base, adapters)."""
  flat = traverse_util.flatten_dict(params)
  of = lambda wanted: traverse_util.unflatten_dict(
    {path: x for path, x in flat.items() if path[-1].endswith((A, B)) == wanted})
  return of(False), of(True)


def join(base: Any, adapters: Any) -> Any:
  """The tree that `split` took apart; without a base (None), the other as it is."""
  if base is None:
    return adapters
  return traverse_util.unflatten_dict(
    traverse_util.flatten_dict(base) | traverse_util.flatten_dict(adapters))


def merge(w: Float[np.ndarray, "layers inner *outer"], a: Float[np.ndarray, "layers inner r"],
          b: Float[np.ndarray, "layers r *outer"], scale: float) -> None:
  """Adds `scale` a b to w in place, layer by layer."""
  for layer, down, up in zip(w, a, b, strict=True):
    layer += scale * np.tensordot(down, up, axes=1)
