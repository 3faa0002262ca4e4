"""The Phi-3 block stack: RMSNorm, rotary attention, SwiGLU, layers scanned.

Source: Phi-3 technical report (arXiv 2404.14219) for the shape; RoFormer (2104.09864) for
the rotary embedding, with halves rotated (j pairs with j + E/2). Projections keep their
axes (q `[D, H, E]`, kv `[D, 2, G, E]`, o `[H, E, D]`, gate_up `[D, 2, F]`, down `[F, D]`),
so that a sharding is a choice of axes; layers are stacked in front.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from videogpt_jax import attention
from videogpt_jax import lora as lora_lib
from videogpt_jax import mask
from videogpt_jax import sharding
from videogpt_jax.attention import blocks

_ROPE_ORIGINAL = 4096  # positions that Phi-3 was trained on before its context was extended


NUMERICS = ("dtype", "attention", "remat", "gradients", "lora")  # how it is computed, not what


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape and numerics of the stack.

  Attributes:
    hidden_size: D.
    intermediate_size: F.
    num_layers: layers in the stack.
    num_heads: H.
    num_kv_heads: G, divides H.
    rms_norm_eps: added to the mean square.
    rope_theta: base of the rotary frequencies.
    rope_long_factor: divisors of the E/2 rotary frequencies (longrope, also called su;
      Ding et al., arXiv 2402.13753); none are plain rotary embeddings. As published, they
      apply whatever the length.
    max_position_embeddings: positions that the longrope factors are made for; they scale
      cosine and sine, see `rope_scale`.
    dtype: compute type; parameters stay float32.
    attention: implementation, see `videogpt_jax.attention`.
    remat: what the backward pass computes again, a key of `REMAT_POLICIES`.
    gradients: type of the matrices' gradients while devices add theirs up, a key of `GRADIENTS`.
    lora: adapters beside the matrices, in training alone: for prediction they are merged.
  """

  hidden_size: int
  intermediate_size: int
  num_layers: int
  num_heads: int
  num_kv_heads: int
  rms_norm_eps: float = 1e-5
  rope_theta: float = 10000.0
  rope_long_factor: tuple[float, ...] = ()
  max_position_embeddings: int = 4096
  dtype: Any = jnp.float32
  attention: str = "auto"
  remat: str = "none"
  gradients: str = "compute"
  lora: lora_lib.Config | None = None

  @property
  def head_size(self) -> int:
    """E, channels of a head."""
    return self.hidden_size // self.num_heads

  @property
  def rope_scale(self) -> float:
    """Factor of cosine and sine: sqrt(1 + ln(max / 4096) / ln 4096) for longrope, else 1."""
    ratio = self.max_position_embeddings / _ROPE_ORIGINAL
    if not self.rope_long_factor or ratio <= 1:
      return 1.0
    return math.sqrt(1 + math.log(ratio) / math.log(_ROPE_ORIGINAL))


# What the backward pass finds stored; the rest of a layer it computes again. Even "none" leaves
# norms, rotations and activations to be recomputed: that is cheaper than to keep them.
_policies = jax.checkpoint_policies
_LAYER_INPUT = "layer_input"
REMAT_POLICIES = {
    "none": _policies.save_from_both_policies(  # all products, and the attention's output
        _policies.dots_saveable, _policies.save_only_these_names(attention.OUTPUT)),
    "dots": _policies.dots_with_no_batch_dims_saveable,  # products with weights
    # The input of each layer, and the attention's output, which takes longest to compute again.
    "attention": _policies.save_only_these_names(attention.OUTPUT),
    "full": _policies.nothing_saveable,  # the input of each layer alone
    "offload": _policies.save_and_offload_only_these_names(  # the same, in the host's memory
        names_which_can_be_saved=[], names_which_can_be_offloaded=[_LAYER_INPUT],
        offload_src="device", offload_dst=sharding.HOST),
}


def problem(config: Config) -> str:
  """What makes the sizes of a stack impossible; empty if they fit."""
  c = config
  if c.hidden_size % c.num_heads:
    return f"hidden_size {c.hidden_size} is not divisible by num_heads {c.num_heads}"
  if c.num_heads % c.num_kv_heads:
    return f"num_heads {c.num_heads} is not divisible by num_kv_heads {c.num_kv_heads}"
  if c.head_size % 2 or c.hidden_size % 4:
    return (f"hidden_size {c.hidden_size} must be a multiple of 4 (position table) and of twice "
            f"num_heads {c.num_heads} (rotary halves)")
  if c.rope_long_factor and len(c.rope_long_factor) != c.head_size // 2:
    return (f"rope_long_factor has {len(c.rope_long_factor)} numbers; half a head's size, "
            f"{c.head_size // 2}, are needed")
  return ""


def compute_dtype(name: str) -> Any:
  """The type of that name; "auto" is bfloat16 on accelerators, float32 on CPU."""
  if name == "auto":
    name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
  return jnp.dtype(name)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
  """What every layer shares: who sees whom, and where the tokens at hand stand."""

  cos: Float[Array, "B L E2"]
  sin: Float[Array, "B L E2"]
  ranks_q: mask.Ranks  # of the tokens at hand
  ranks_k: mask.Ranks  # of those before them, if any, and theirs
  block_map: blocks.BlockMap | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeysValues:
  """Keys and values of tokens, in every layer if there is an axis for it in front."""

  keys: Float[Array, "*layers B L G E"]
  values: Float[Array, "*layers B L G E"]


def rotary_angles(
    config: Config, position: Int[Array, "*B L"]
) -> tuple[Float[Array, "*B L E2"], Float[Array, "*B L E2"]]:
  """Cosine and sine of `position * theta^(-2j / E) / factor_j`, j < E/2, in float32.

  Both are multiplied by `config.rope_scale`.
  """
  size = config.head_size
  frequency = config.rope_theta ** (-np.arange(0, size, 2) / size)
  if config.rope_long_factor:
    frequency = frequency / np.array(config.rope_long_factor)
  angle = position[..., None].astype(jnp.float32) * frequency.astype(np.float32)
  return jnp.cos(angle) * config.rope_scale, jnp.sin(angle) * config.rope_scale


def rotate(
    x: Float[Array, "B L H E"], cos: Float[Array, "B L E2"], sin: Float[Array, "B L E2"]
) -> Float[Array, "B L H E"]:
  """Rotates the two halves of each head by the position's angles, in float32."""
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, :, None], sin[:, :, None]
  turned = [first * cos - second * sin, second * cos + first * sin]
  return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def swiglu(gate: Float[Array, "B L F"], up: Float[Array, "B L F"]) -> Float[Array, "B L F"]:
  """silu(gate) * up."""
  return nn.silu(gate) * up


def rms_norm(
    x: Float[Array, "B L D"], weight: Float[Array, "D"], epsilon: float, dtype: Any
) -> Float[Array, "B L D"]:
  """x / rms(x) * weight, statistics in float32, as `dtype`."""
  shape = x.shape if sharding.size("sequence") > 1 else (-1, x.shape[-1])  # as in `contract`
  rows = x.astype(jnp.float32).reshape(shape)
  rows = rows * jax.lax.rsqrt(jnp.mean(jnp.square(rows), -1, keepdims=True) + epsilon)
  return (rows * weight).astype(dtype).reshape(x.shape)


def contract(
    x: Float[Array, "*lead inner"], w: Float[Array, "inner *outer"], axes: int = 1
) -> Float[Array, "*lead outer"]:
  """Sums the last `axes` axes of x against the first ones of w, in the type of x.

  One plain product of two matrices: XLA on CPU transposes (slowly, and together with all
  that leads there) an operand of a product with several row axes.
  """
  if sharding.size("sequence") > 1:  # merged with the batch, tokens that are split are gathered
    return jnp.tensordot(x, w.astype(x.dtype), axes)
  rows, inner = x.shape[:-axes], math.prod(w.shape[:axes])
  out = x.reshape(-1, inner) @ w.astype(x.dtype).reshape(inner, -1)
  return out.reshape(*rows, *w.shape[axes:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def contract_exactly(
    x: Float[Array, "*lead inner"], w: Float[Array, "inner *outer"], axes: int = 1
) -> Float[Array, "*lead outer"]:
  """As `contract`, but the gradient of w is made in float32, whatever the type of x."""
  return contract(x, w, axes)


def _contract_forward(x: Array, w: Array, axes: int) -> tuple[Array, tuple[Array, Array]]:
  return contract(x, w, axes), (x, w)


def _contract_backward(axes: int, kept: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
  x, w = kept
  inner = math.prod(w.shape[:axes])
  rows, g = x.reshape(-1, inner), g.reshape(x.size // inner, -1)
  back = g @ w.astype(x.dtype).reshape(inner, -1).T
  of_w = jax.lax.dot_general(rows, g, (((0,), (0,)), ((), ())),
                             preferred_element_type=jnp.float32)
  return back.reshape(x.shape), of_w.astype(w.dtype).reshape(w.shape)


contract_exactly.defvjp(_contract_forward, _contract_backward)

# The gradient of a matrix over the tokens of several devices is the sum of what each has found:
# rounded to the compute type (half the traffic with bfloat16), or in float32.
GRADIENTS: dict[str, Callable[..., Array]] = {
    "compute": contract, "float32": contract_exactly}


def kernel(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...],
           in_axes: int | tuple[int, ...] = 0, *, zeros: bool = False) -> Array:
  """A weight with logical axis names, normal with variance 1 / fan-in (or zero).

  Args:
    module: the module that owns it.
    name: of the parameter.
    shape: of the parameter.
    axes: logical names of its axes, see `videogpt_jax.sharding`.
    in_axes: which axes are summed over when it is used.
    zeros: start from zero.
  """
  in_axes = (in_axes,) if isinstance(in_axes, int) else in_axes
  out_axes = tuple(i for i in range(len(shape)) if i not in in_axes)
  init = nn.initializers.zeros_init() if zeros else nn.initializers.variance_scaling(
      1.0, "fan_in", "normal", in_axis=in_axes, out_axis=out_axes)
  named: Any = nn.with_logical_partitioning(init, axes)
  return module.param(name, named, shape, jnp.float32)


def weight(module: nn.Module, config: Config, name: str, shape: tuple[int, ...],
           axes: tuple[str, ...], inner: int = 1) -> lora_lib.Weight:
  """A kernel of the stack, with its adapter if it has one; the first `inner` axes are summed."""
  w = kernel(module, name, shape, axes, tuple(range(inner)))
  return lora_lib.Weight(w, *lora_lib.factors(module, config.lora, name, shape, axes, inner))


def multiply(
    config: Config, x: Float[Array, "*lead inner"], weight: lora_lib.Weight, axes: int = 1
) -> Float[Array, "*lead outer"]:
  """As `contract`, with what the adapter adds."""
  out = GRADIENTS[config.gradients](x, weight.w, axes)
  if config.lora is None or weight.a is None or weight.b is None:
    return out
  return out + config.lora.scale * contract(contract(x, weight.a, axes), weight.b)


# The matrices of a stack of layers, for optimizers that treat them as such: of each leaf of
# `Backbone`'s `layers` the axes summed over and those made; all others count matrices.
MATRICES = {
    "attention/q": ((1,), (2, 3)), "attention/kv": ((1,), (3, 4)), "attention/o": ((1, 2), (3,)),
    "mlp/gate_up": ((1,), (3,)), "mlp/down": ((1,), (2,)),
}


class RMSNorm(nn.Module):
  """Root mean square layer norm (Zhang and Sennrich, arXiv 1910.07467)."""

  config: Config

  @nn.compact
  def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    init: Any = nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",))
    weight_D = self.param("weight", init, (x_BLD.shape[-1],), jnp.float32)
    return rms_norm(x_BLD, weight_D, self.config.rms_norm_eps, self.config.dtype)


class Attention(nn.Module):
  """Grouped-query attention with rotary positions under the hierarchical mask."""

  config: Config

  @nn.compact
  def __call__(
      self, x_BLD: Float[Array, "B L D"], context: Context, past: KeysValues | None = None
  ) -> tuple[Float[Array, "B L D"], KeysValues]:
    """Attends to the tokens themselves and to those before them.

    Args:
      x_BLD: the tokens at hand.
      context: of all layers.
      past: rotated keys, and values, of the tokens that stand before.

    Returns:
      What was attended to, and the tokens' own keys (not rotated: where they will stand in
      a window that moves is not known yet) and values.
    """
    c = self.config
    D, H, G, E = c.hidden_size, c.num_heads, c.num_kv_heads, c.head_size
    w_DHE = weight(self, c, "q", (D, H, E), ("embed", "heads", "head"))
    w_D2GE = weight(self, c, "kv", (D, 2, G, E), ("embed", "kv", "kv_heads", "head"))
    w_HED = weight(self, c, "o", (H, E, D), ("heads", "head", "embed"), inner=2)
    q_BLHE = rotate(multiply(c, x_BLD, w_DHE), context.cos, context.sin)
    own = KeysValues(*(multiply(c, x_BLD, w_D2GE.part(i)) for i in range(2)))
    q_BLHE = nn.with_logical_constraint(q_BLHE, ("batch", "length", "heads", "head"))
    k_BLGE, v_BLGE = rotate(own.keys, context.cos, context.sin), own.values
    if past is not None:
      k_BLGE = jnp.concatenate([past.keys, attention.by_heads(k_BLGE)], axis=1)
      v_BLGE = jnp.concatenate([past.values, attention.by_heads(v_BLGE)], axis=1)
    out_BLHE = attention.attend(q_BLHE, k_BLGE, v_BLGE, context.ranks_q, context.ranks_k,
                                context.block_map, implementation=c.attention)
    return multiply(c, out_BLHE, w_HED, axes=2), own


class MLP(nn.Module):
  """SwiGLU: down(silu(gate) * up) (Shazeer, arXiv 2002.05202)."""

  config: Config

  @nn.compact
  def __call__(self, x_BLD: Float[Array, "B L D"]) -> Float[Array, "B L D"]:
    c = self.config
    D, F = c.hidden_size, c.intermediate_size
    w_D2F = weight(self, c, "gate_up", (D, 2, F), ("embed", "gate_up", "mlp"))
    w_FD = weight(self, c, "down", (F, D), ("mlp", "embed"))
    # Two products: slicing their joint result would pad its gradient, which is far larger.
    hidden_BLF = swiglu(*(multiply(c, x_BLD, w_D2F.part(i)) for i in range(2)))
    return multiply(c, hidden_BLF, w_FD)


class Layer(nn.Module):
  """Pre-norm residual attention and MLP.

  Returns its output, and for scan what is wanted beside it: the output once more if
  `capture`, its keys and values if `keep`.
  """

  config: Config
  capture: bool = False
  keep: bool = False

  @nn.compact
  def __call__(self, x_BLD: Float[Array, "B L D"], context: Context, past: KeysValues | None
               ) -> tuple[Array, tuple[Array | None, KeysValues | None]]:
    x_BLD = checkpoint_name(x_BLD, _LAYER_INPUT)
    attended_BLD, own = Attention(self.config, name="attention")(
        RMSNorm(self.config, name="attention_norm")(x_BLD), context, past)
    x_BLD = x_BLD + attended_BLD
    x_BLD = x_BLD + MLP(self.config, name="mlp")(RMSNorm(self.config, name="mlp_norm")(x_BLD))
    x_BLD = nn.with_logical_constraint(x_BLD, ("batch", "length", "embed"))
    return x_BLD, (x_BLD if self.capture else None, own if self.keep else None)


class Backbone(nn.Module):
  """The stack with its final norm."""

  config: Config

  @nn.compact
  def __call__(
      self,
      x_BLD: Float[Array, "B L D"],
      context: Context,
      past: KeysValues | None = None,
      *,
      capture: tuple[int, ...] = (),
      keep: bool = False,
  ) -> tuple[Float[Array, "B L D"], dict[int, Float[Array, "B L D"]], KeysValues | None]:
    """Runs all layers.

    Args:
      x_BLD: embedded tokens.
      context: shared by all layers.
      past: of the tokens before these, with an axis of layers in front; see `Attention`.
      capture: indices of layers whose outputs are wanted too.
      keep: whether the tokens' own keys and values are wanted.

    Returns:
      The normalised output, the captured outputs by layer index, and if `keep` the tokens'
      own keys and values in every layer.
    """
    c = self.config
    layer = nn.remat(Layer, policy=REMAT_POLICIES[c.remat], prevent_cse=False)
    stack = nn.scan(layer, length=c.num_layers, variable_axes={"params": 0},
                    split_rngs={"params": True}, in_axes=(nn.broadcast, 0),
                    metadata_params={nn.PARTITION_NAME: "layers"})
    x_BLD, (outputs, own) = stack(c, capture=bool(capture), keep=keep, name="layers")(
        x_BLD, context, past)
    captured = {i: outputs[i] for i in capture} if outputs is not None else {}
    return RMSNorm(c, name="norm")(x_BLD), captured, own
