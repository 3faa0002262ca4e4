"""What one would use for this mask without our kernels: the peers that attention is timed with.

Every peer computes the same function of the same inputs, but for `jax_causal`, which is an
upper bound for what a dense kernel could reach. A peer that cannot run here says why.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
import numpy as np

from videogpt_jax import attention
from videogpt_jax import mask

_SPLASH_BLOCK = 512


class Unsupported(Exception):
  """A peer cannot run this problem on this machine."""


@dataclasses.dataclass(frozen=True)
class Problem:
  """Self-attention to be timed.

  Attributes:
    q: queries, of the type that is measured; likewise k and v.
    grad: gradient of the output.
    ranks: the mask.
    frame_tokens: S.
  """

  q: Float[Array, "B L H E"]
  k: Float[Array, "B L G E"]
  v: Float[Array, "B L G E"]
  grad: Float[Array, "B L H E"]
  ranks: mask.Ranks
  frame_tokens: int

  @functools.cached_property
  def visible(self) -> Array:
    """The dense mask [B, L, L]."""
    return jax.jit(mask.visible)(self.ranks, self.ranks)


@dataclasses.dataclass(frozen=True)
class Runner:
  """A peer set up for a problem: calls return when they are queued, `wait` when all is done.

  `forward` returns the output as [B, L, H, E] in whatever its library has.
  """

  forward: Callable[[], Any]
  both: Callable[[], Any]
  wait: Callable[[Any], Any]
  temporary_mib: float | None = None  # memory of forward and backward beside their inputs


# jax --------------------------------------------------------------------------------------


def ours(problem: Problem, implementation: str = "auto",
         build: Callable[..., Any] | None = None) -> Runner:
  """`videogpt_jax.attention`, its block map included."""

  def attend(q: Array, k: Array, v: Array, ranks: mask.Ranks) -> Array:
    if build is not None:
      block_map = build(ranks, ranks)
    else:
      block_map = attention.plan(ranks, ranks, frame_tokens=problem.frame_tokens,
                                 head_size=q.shape[3], dtype=q.dtype, implementation=implementation)
    return attention.attend(q, k, v, ranks, ranks, block_map, implementation=implementation)

  length, size = problem.q.shape[1], problem.q.shape[3]
  name = attention.resolve(implementation, length, length, size, problem.q.dtype)
  if name in ("tpu", "gpu") and jax.default_backend() != name:
    raise Unsupported(f"needs a {name.upper()}")
  return _jax_runner(attend, problem, problem.ranks)


def jax_dense(problem: Problem) -> Runner:
  """Masked softmax of all scores, as one writes it in jax: heads first, float32 weights."""
  shared = problem.q.shape[2] // problem.k.shape[2]
  visible = problem.visible[:, None]

  def attend(q: Array, k: Array, v: Array, visible: Array) -> Array:
    q, k, v = (x.swapaxes(1, 2) for x in (q, *(jnp.repeat(x, shared, axis=2) for x in (k, v))))
    scores = jnp.einsum("BHqE,BHkE->BHqk", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores * q.shape[3]**-0.5, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BHqk,BHkE->BHqE", weights, v).swapaxes(1, 2)

  return _jax_runner(attend, problem, visible)


def jax_dot_product_attention(problem: Problem) -> Runner:
  """`jax.nn.dot_product_attention` with the boolean mask; cuDNN where that serves it."""
  attend = lambda q, k, v, visible: jax.nn.dot_product_attention(
      q, k, v, mask=visible, implementation=_cudnn(problem))
  return _jax_runner(attend, problem, problem.visible[:, None])


def jax_causal(problem: Problem) -> Runner:
  """`jax.nn.dot_product_attention`, causal: another function, for comparison of rates."""
  attend = lambda q, k, v: jax.nn.dot_product_attention(
      q, k, v, is_causal=True, implementation=_cudnn(problem))
  return _jax_runner(attend, problem)


def splash(problem: Problem) -> Runner:
  """JAX's splash attention for TPU with the mask as a constant, built outside of jit."""
  if jax.default_backend() != "tpu":
    raise Unsupported("needs a TPU")
  if problem.q.shape[0] > 1 or problem.k.shape[2] != problem.q.shape[2]:
    raise Unsupported("one sample, one key/value head a query head")
  return _jax_runner(splash_attention(np.asarray(problem.visible[0]), problem.q.shape[2]), problem)


def splash_attention(visible: Bool[np.ndarray, "L L"], heads: int) -> Callable[..., Array]:
  """Splash attention of one sample, in blocks of the sizes that users of it train with."""
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

  length, block = len(visible), _SPLASH_BLOCK
  missing = -length % block
  one = splash_attention_mask.NumpyMask(np.pad(visible, (0, missing)))
  kernel = splash_attention_kernel.make_splash_mha_single_device(
      splash_attention_mask.MultiHeadMask([one] * heads),
      block_sizes=splash_attention_kernel.BlockSizes(
          block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block, block_q_dq=block,
          block_kv_dq=block))
  heads_first = lambda x: jnp.pad(x[0].swapaxes(0, 1), ((0, 0), (0, missing), (0, 0)))

  def attend(q: Array, k: Array, v: Array) -> Array:
    out = kernel(heads_first(q * q.shape[3]**-0.5), heads_first(k), heads_first(v))
    return out[:, :length].swapaxes(0, 1)[None]

  return attend


def _cudnn(problem: Problem) -> Any:
  """cuDNN's attention where there is one for this type, XLA's elsewhere."""
  half = problem.q.dtype in (jnp.bfloat16, jnp.float16)
  return "cudnn" if jax.default_backend() == "gpu" and half else "xla"


def _jax_runner(attend: Callable[..., Array], problem: Problem, *given: Any) -> Runner:
  """A runner of `attend(q, k, v, *given)`; as a constant the mask would be in every program."""
  inputs = problem.q, problem.k, problem.v, *given

  def both(grad: Array, q: Array, k: Array, v: Array, *given: Any) -> Any:
    out, pull = jax.vjp(lambda *x: attend(*x, *given), q, k, v)
    return out, pull(grad)

  forward = jax.jit(attend).lower(*inputs).compile()
  with_gradients = jax.jit(both).lower(problem.grad, *inputs).compile()
  memory = with_gradients.memory_analysis()
  return Runner(lambda: forward(*inputs), lambda: with_gradients(problem.grad, *inputs),
                jax.block_until_ready,
                memory.temp_size_in_bytes / 2**20 if memory is not None else None)


# torch ------------------------------------------------------------------------------------


def torch_sdpa(problem: Problem) -> Runner:
  """`scaled_dot_product_attention` with the boolean mask."""
  torch = _torch()
  q, k, v, grad = _torch_inputs(problem)
  visible = _to_torch(problem.visible)[:, None]
  grouped = q.shape[1] != k.shape[1]
  attend = functools.partial(torch.nn.functional.scaled_dot_product_attention,
                             attn_mask=visible, enable_gqa=grouped)
  return _torch_runner(lambda: attend(q, k, v), (q, k, v), grad)


def torch_flex(problem: Problem) -> Runner:
  """FlexAttention, compiled, with the same mask from the same ranks; its block mask built once."""
  torch = _torch()
  if not torch.cuda.is_available():
    raise Unsupported("torch has no backward pass of it for CPU")
  from torch.nn.attention import flex_attention

  q, k, v, grad = _torch_inputs(problem)
  key, a, lo, hi = (_to_torch(x) for x in (
      problem.ranks.key, problem.ranks.a, problem.ranks.lo, problem.ranks.hi))

  def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
    rank = key[b, j]
    return (rank <= a[b, i]) | ((lo[b, i] <= rank) & (rank <= hi[b, i]))

  batch, length = problem.ranks.key.shape
  block_mask = torch.compile(flex_attention.create_block_mask)(
      visible, batch, None, length, length, device=q.device)
  attend = torch.compile(flex_attention.flex_attention)
  grouped = q.shape[1] != k.shape[1]
  return _torch_runner(lambda: attend(q, k, v, block_mask=block_mask, enable_gqa=grouped),
                       (q, k, v), grad)


def _torch() -> Any:
  try:
    import torch
  except ImportError as error:
    raise Unsupported("torch is not installed: pip install -e .[bench]") from error
  if jax.default_backend() == "gpu" and not torch.cuda.is_available():
    raise Unsupported("this build of torch has no CUDA")
  return torch


def _to_torch(x: Array) -> Any:
  torch = _torch()
  half = x.dtype == jnp.bfloat16
  host = torch.from_numpy(np.array(x.astype(jnp.float32) if half else x))
  host = host.to(torch.bfloat16) if half else host
  return host.cuda() if torch.cuda.is_available() else host


def _torch_inputs(problem: Problem) -> tuple[Any, Any, Any, Any]:
  """q, k, v (wanting gradients) and the output's gradient as [B, H, L, E]."""
  tensors = [_to_torch(x).transpose(1, 2).contiguous()
             for x in (problem.q, problem.k, problem.v, problem.grad)]
  for x in tensors[:3]:
    x.requires_grad_(True)
  return tuple(tensors)


def _torch_runner(attend: Callable[[], Any], inputs: Any, grad: Any) -> Runner:
  torch = _torch()

  def forward() -> Any:
    with torch.no_grad():
      return attend().transpose(1, 2)

  def both() -> Any:
    return torch.autograd.grad(attend(), inputs, grad)

  def wait(out: Any) -> Any:
    if torch.cuda.is_available():
      torch.cuda.synchronize()
    return out

  return Runner(forward, both, wait)


PEERS: dict[str, Callable[[Problem], Runner]] = {
  "ours": ours,
  "ours_dense": functools.partial(ours, implementation="reference"),
  "jax_dense": jax_dense,
  "jax_dot_product_attention": jax_dot_product_attention,
  "jax_causal": jax_causal,
  "splash": splash,
  "torch_sdpa": torch_sdpa,
  "torch_flex": torch_flex,
}
