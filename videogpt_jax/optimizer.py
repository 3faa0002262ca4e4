"""The optimizers: what they are made of, and where their state lies on a mesh."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jaxtyping import Array
import optax
import optax.contrib

from videogpt_jax import backbone

NAMES = ("adamw", "muon", "adafactor")
MOMENTS = ("float32", "bfloat16")  # types of the first moment
_FACTORED = 32  # an axis as long as this makes a row or a column of a factored second moment


@dataclasses.dataclass(frozen=True)
class Config:
  """AdamW with global-norm clipping; decay on all parameters, as published.

  With `name` "muon", the matrices of the stack take steps along their orthogonalised momentum
  (of 0.95; Jordan et al., https://kellerjordan.github.io/posts/muon), scaled to the root mean
  square of AdamW's (Liu et al., arXiv 2502.16982), so that both share a learning rate; the rest
  goes by AdamW with Nesterov momentum, as `optax.contrib.muon` has it.

  With "adafactor", the second moment of a parameter is the product of its means over rows and
  over columns (Shazeer and Stern, arXiv 1804.04235): of its two longest axes, where both have 32
  entries or more, so each head and each layer for itself. Its decay is 1 - t^-0.8 at step t, at
  most `b2`; updates are clipped to a root mean square of 1. As for vision transformers (Zhai et
  al., arXiv 2106.04560, section 3.4), steps are not scaled by the size of a parameter, so that
  AdamW's learning rate and decay serve, and the first moment is kept unless `b1` is 0.

  `moments` is the type of the first moment. The second one is float32: optax offers no other for
  AdamW, and has little of it left to save in Adafactor.

  The learning rate rises linearly over `warmup_steps`, stays, and over the last
  `cooldown_steps` (if any) of `total_steps` falls linearly to zero. Updates that are skipped do
  not count in it.
  """

  learning_rate: float
  warmup_steps: int
  total_steps: int
  cooldown_steps: int = 0
  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  name: str = "adamw"
  moments: str = "float32"


def learning_rate(config: Config) -> optax.Schedule:
  """Learning rate by optimizer step."""
  # The first step moves already: with one warm-up step or none, at the full rate.
  warmup = optax.linear_schedule(0.0, config.learning_rate, max(1, config.warmup_steps))
  shifted = lambda step: warmup(step + 1)
  if not config.cooldown_steps:
    return shifted
  begin = config.total_steps - config.cooldown_steps
  cooldown = optax.linear_schedule(config.learning_rate, 0.0, config.cooldown_steps)
  return optax.join_schedules([shifted, cooldown], [begin])


def count(opt_state: Any) -> Array:
  """How many updates the learning rate's schedule has seen."""
  return optax.tree_utils.tree_get_all_with_path(opt_state, "count", _of_schedule)[0][1]


def with_count(opt_state: Any, number: Array) -> Any:
  """The state with another such count."""
  schedule = lambda x: isinstance(x, optax.ScaleByScheduleState)
  # Muon has two schedules, and a train step, to which the state is donated, wants two arrays.
  return jax.tree.map(lambda x: x._replace(count=jnp.copy(number)) if schedule(x) else x, opt_state,
                      is_leaf=schedule)


def _of_schedule(path: tuple[Any, ...], value: Any) -> bool:
  return getattr(path[-1], "tuple_name", "") == optax.ScaleByScheduleState.__name__


def make(config: Config) -> optax.GradientTransformation:
  """The optimizer of `config`, of parameter trees without boxes."""
  rate, decay = learning_rate(config), config.weight_decay
  kind = jnp.dtype(config.moments)
  if config.name == "muon":
    rule = optax.contrib.muon(
      rate, eps=config.eps, weight_decay=decay, mu_dtype=kind, adam_b1=config.b1,
      adam_b2=config.b2, adam_weight_decay=decay, muon_weight_dimension_numbers=_matrices,
      consistent_rms=0.2)
  elif config.name == "adafactor":
    rule = _adafactor(config)
  else:
    rule = optax.adamw(rate, b1=config.b1, b2=config.b2, eps=config.eps, mu_dtype=kind,
                       weight_decay=decay)
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), rule)


def _matrices(params: Any) -> Any:
  """Which axes of which parameters are matrices for Muon; None for the others."""
  flat = traverse_util.flatten_dict(params, sep="/")
  prefix = "backbone/layers/"
  numbers = dict.fromkeys(flat) | {
    prefix + name: optax.contrib.MuonDimensionNumbers(*axes)
    for name, axes in backbone.MATRICES.items() if prefix + name in flat}
  return traverse_util.unflatten_dict(numbers, sep="/")


def _adafactor(config: Config) -> optax.GradientTransformation:
  """From optax's parts: its own `adafactor` would not multiply the decay by the learning rate."""

  def decay_rate(step: Array, exponent: float) -> Array:
    return jnp.minimum(config.b2, 1 - (step + 1.0) ** -exponent)

  momentum = [optax.ema(config.b1, debias=False, accumulator_dtype=jnp.dtype(config.moments))]
  return optax.chain(
    optax.scale_by_factored_rms(min_dim_size_to_factor=_FACTORED, decay_rate_fn=decay_rate),
    optax.clip_by_block_rms(1.0),
    *(momentum if config.b1 else []),
    optax.add_decayed_weights(config.weight_decay),
    optax.scale_by_learning_rate(learning_rate(config)))


def shardings(opt_state: Any, params: Mapping[tuple[str, ...], Any],
              of_params: Mapping[tuple[str, ...], NamedSharding],
              mesh: jax.sharding.Mesh) -> Any:
  """Where the leaves of an optimizer's state lie.

  A moment as large as its parameter lies where that lies; of a factored one the rows or columns
  that are left lie as they do in the parameter. All else every device holds whole.

  Args:
    opt_state: abstract; the path of a moment ends in that of its parameter.
    params: the parameters by path, for their shapes.
    of_params: their shardings.
    mesh: of the devices.
  """
  replicated = NamedSharding(mesh, PartitionSpec())

  def of_leaf(path: tuple[Any, ...], leaf: Any) -> jax.sharding.Sharding:
    keys = tuple(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    ends = (keys[start:] for start in range(len(keys)))
    end = next((end for end in ends if end in of_params), None)
    if end is None:
      return replicated
    whole = params[end].shape
    if leaf.shape == whole:
      return of_params[end]
    axes = (*of_params[end].spec, *[None] * len(whole))[:len(whole)]
    left = {axes[:i] + axes[i + 1:] for i in range(len(whole))
            if leaf.shape == whole[:i] + whole[i + 1:]}
    # Of a square parameter nobody can tell which axis is left; it is replicated if that matters.
    return NamedSharding(mesh, PartitionSpec(*left.pop())) if len(left) == 1 else replicated

  return jax.tree_util.tree_map_with_path(of_leaf, opt_state)
