"""Blockwise attention in plain XLA: only live blocks are computed, exactly.

The default wherever no Pallas kernel serves. One loop over the block map's worklist, in
which the blocks of all samples stand one after the other, so samples whose partition
leaves less to do cost less. Blocks are whole frames (multiples of S = P + 2 tokens):
that is where the mask changes, so hardly a block is partial. Memory is O(L).

Forward keeps a running maximum and sum per query row (online softmax); backward
recomputes the weights of a block from the saved log-sum-exp, in one pass for dq, dk, dv
(Dao et al., FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2).
"""

import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from videogpt_jax import mask

_MASKED = -1e30  # finite: a row that has seen nothing yet must not make NaN


def block_size(length: int, frame_tokens: int, target: int = 64) -> int:
  """Tokens of a block: whole frames, near `target`, no longer than the sequence."""
  frames = max(1, min(round(target / frame_tokens), -(-length // frame_tokens)))
  return frames * frame_tokens


def attend(
    q: Float[Array, "B Lq H E"],
    k: Float[Array, "B Lk G E"],
    v: Float[Array, "B Lk G E"],
    ranks_q: mask.Ranks,
    ranks_k: mask.Ranks,
    block_map: mask.BlockMap,
) -> Float[Array, "B Lq H E"]:
  """Softmax attention over the live blocks of `block_map`; see `reference.attend`."""
  batch, length, heads, size = q.shape
  kv_heads = k.shape[2]
  bq, bk = block_map.block_q, block_map.block_k
  q_heads = jnp.moveaxis((q * size**-0.5).reshape(batch, length, kv_heads, -1, size), 1, 3)
  q_heads = _pad(q_heads, 3, bq)  # [B, G, R, Lq, E]
  kv = [_pad(jnp.moveaxis(x, 1, 2), 2, bk) for x in (k, v)]  # [B, G, Lk, E]
  out = _attend(q_heads, *kv, mask.pad(ranks_q, bq), mask.pad(ranks_k, bk), block_map)
  out = jnp.moveaxis(out[:, :, :, :length], 3, 1)
  return out.reshape(batch, length, heads, size)


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, ranks_q: mask.Ranks, ranks_k: mask.Ranks,
            block_map: mask.BlockMap) -> Array:
  return _forward(q, k, v, ranks_q, ranks_k, block_map)[0]


def _forward(q: Array, k: Array, v: Array, ranks_q: mask.Ranks, ranks_k: mask.Ranks,
             block_map: mask.BlockMap) -> tuple[Array, Any]:
  bq, bk = block_map.block_q, block_map.block_k
  rows = q.shape[:-1]

  def body(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    out, peak, total = carry
    b, i, j, full = block_map.unpack(block_map.pairs[index])
    scores = _scores(_block(q, b, i, bq), _block(k, b, j, bk))
    scores = _masked(scores, ranks_q, ranks_k, b, i, j, full, bq, bk)
    old_peak = _row_block(peak, b, i, bq)
    new_peak = jnp.maximum(old_peak, scores.max(-1))
    weights = jnp.exp(scores - new_peak[..., None])
    decay = jnp.exp(old_peak - new_peak)
    new_total = _row_block(total, b, i, bq) * decay + weights.sum(-1)
    update = jnp.einsum("GRqk,GkE->GRqE", weights.astype(v.dtype), _block(v, b, j, bk),
                        preferred_element_type=jnp.float32)
    new_out = _block(out, b, i, bq) * decay[..., None] + update
    return (_write(out, new_out, b, i, bq), _write_row(peak, new_peak, b, i, bq),
            _write_row(total, new_total, b, i, bq))

  init = (jnp.zeros(q.shape, jnp.float32), jnp.full(rows, _MASKED / 2, jnp.float32),
          jnp.zeros(rows, jnp.float32))
  out, peak, total = lax.fori_loop(0, block_map.count[0], body, init)
  out = (out / jnp.where(total > 0, total, 1.0)[..., None]).astype(q.dtype)
  lse = peak + jnp.log(jnp.where(total > 0, total, 1.0))
  return out, (q, k, v, ranks_q, ranks_k, block_map, out, lse)


def _backward(residuals: Any, grad: Array) -> tuple[Any, ...]:
  q, k, v, ranks_q, ranks_k, block_map, out, lse = residuals
  bq, bk = block_map.block_q, block_map.block_k
  delta = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

  def body(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    dq, dk, dv = carry
    b, i, j, full = block_map.unpack(block_map.pairs[index])
    q_b, k_b, v_b = _block(q, b, i, bq), _block(k, b, j, bk), _block(v, b, j, bk)
    grad_b = _block(grad, b, i, bq)
    scores = _masked(_scores(q_b, k_b), ranks_q, ranks_k, b, i, j, full, bq, bk)
    weights = jnp.exp(scores - _row_block(lse, b, i, bq)[..., None])
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    dv_b = product("GRqk,GRqE->GkE", weights.astype(grad.dtype), grad_b)
    d_weights = product("GRqE,GkE->GRqk", grad_b, v_b)
    d_scores = (weights * (d_weights - _row_block(delta, b, i, bq)[..., None])).astype(q.dtype)
    dq_b = product("GRqk,GkE->GRqE", d_scores, k_b)
    dk_b = product("GRqk,GRqE->GkE", d_scores, q_b)
    return (_write(dq, _block(dq, b, i, bq) + dq_b, b, i, bq),
            _write(dk, _block(dk, b, j, bk) + dk_b, b, j, bk),
            _write(dv, _block(dv, b, j, bk) + dv_b, b, j, bk))

  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
  dq, dk, dv = lax.fori_loop(0, block_map.count[0], body, zeros)
  return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, None


_attend.defvjp(_forward, _backward)


# Blocks of arrays [B, ..., L, E] and of rows [B, ..., L] -----------------------------------


def _pad(x: Array, axis: int, multiple: int) -> Array:
  extra = [(0, 0)] * x.ndim
  extra[axis] = (0, -x.shape[axis] % multiple)
  return jnp.pad(x, extra)


def _block(x: Array, b: Array, i: Array, size: int) -> Array:
  start: list[Any] = [b, *[0] * (x.ndim - 3), i * size, 0]
  return lax.dynamic_slice(x, start, (1, *x.shape[1:-2], size, x.shape[-1]))[0]


def _row_block(x: Array, b: Array, i: Array, size: int) -> Array:
  start: list[Any] = [b, *[0] * (x.ndim - 2), i * size]
  return lax.dynamic_slice(x, start, (1, *x.shape[1:-1], size))[0]


def _write(x: Array, block: Array, b: Array, i: Array, size: int) -> Array:
  return lax.dynamic_update_slice(x, block[None], (b, *[0] * (x.ndim - 3), i * size, 0))


def _write_row(x: Array, block: Array, b: Array, i: Array, size: int) -> Array:
  return lax.dynamic_update_slice(x, block[None], (b, *[0] * (x.ndim - 2), i * size))


def _scores(q: Array, k: Array) -> Array:
  return jnp.einsum("GRqE,GkE->GRqk", q, k, preferred_element_type=jnp.float32)


def _masked(scores: Array, ranks_q: mask.Ranks, ranks_k: mask.Ranks, b: Array, i: Array,
            j: Array, full: Array, bq: int, bk: int) -> Array:
  def apply(scores: Array) -> Array:
    part_q = jax.tree.map(lambda x: _row_block(x, b, i, bq), ranks_q)
    part_k = jax.tree.map(lambda x: _row_block(x, b, j, bk), ranks_k)
    return jnp.where(mask.visible(part_q, part_k), scores, _MASKED)

  return lax.cond(full, lambda scores: scores, apply, scores)
