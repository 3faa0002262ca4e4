"""Blockwise attention in plain XLA: only live blocks are computed, exactly.

The default wherever no Pallas kernel serves. One loop over the block map's query-major list,
in which the blocks of all samples stand one after the other, so samples whose partition
leaves less to do cost less. Blocks are whole frames (multiples of S = P + 2 tokens): that
is where the mask changes, so hardly a block is partial. Memory is O(L).

Forward keeps a running maximum and sum per query row (online softmax); backward
recomputes the weights of a block from the saved log-sum-exp, in one pass for dq, dk, dv
(Dao et al., FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2).

Inside, arrays are stacks of blocks, `[n, G, rows, E]`: one block is contiguous memory. The
R query heads that share a key/value head stand one after the other in its rows.
"""

from typing import Any

import einops
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from videogpt_jax import mask
from videogpt_jax.attention import blocks
from videogpt_jax.attention import gradient
from videogpt_jax.attention import numerics


def block_size(length: int, frame_tokens: int, tokens: int, frames: int) -> int:
  """Tokens of a block: whole frames, near `tokens`, at most `frames`, no longer than needed."""
  wanted = min(round(tokens / frame_tokens), frames, -(-length // frame_tokens))
  return max(1, wanted) * frame_tokens


def attend(
    q: Float[Array, "B Lq H E"],
    k: Float[Array, "B Lk G E"],
    v: Float[Array, "B Lk G E"],
    ranks_q: mask.Ranks,
    ranks_k: mask.Ranks,
    block_map: blocks.BlockMap,
) -> Float[Array, "B Lq H E"]:
  """Softmax attention over the live blocks of `block_map`; see `videogpt_jax.attention`."""
  batch, length, heads = q.shape[:3]
  block_q, block_k = block_map.block_q, block_map.block_k
  stacks = (_to_blocks(q, block_q, k.shape[2]), _to_blocks(k, block_k, k.shape[2]),
            _to_blocks(v, block_k, k.shape[2]))
  out = _attend(*stacks, _rank_blocks(ranks_q, block_q), _rank_blocks(ranks_k, block_k),
                block_map)
  out = einops.rearrange(out, "(B n) G (R b) E -> B (n b) (G R) E", B=batch, b=block_q,
                         R=heads // k.shape[2])
  return out[:, :length]


def _forward(
    q: Float[Array, "nq G Rbq E"],
    k: Float[Array, "nk G bk E"],
    v: Float[Array, "nk G bk E"],
    ranks_q: mask.Ranks,
    ranks_k: mask.Ranks,
    block_map: blocks.BlockMap,
) -> tuple[Float[Array, "nq G Rbq E"], Float[Array, "nq G Rbq"]]:
  work, scale = block_map.by_query, q.shape[-1]**-0.5

  def body(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    out, peak, total = carry
    i, j, full = _pair(work, index)
    mask_of = lambda: mask.visible(_at(ranks_q, i), _at(ranks_k, j))
    scores = _masked(_product("Gqe,Gke->Gqk", q[i], k[j]), full, mask_of)
    new_peak = jnp.maximum(peak[i], scores.max(-1))
    weights = jnp.exp((scores - new_peak[..., None]) * scale)
    decay = jnp.exp((peak[i] - new_peak) * scale)
    update = _product("Gqk,Gke->Gqe", weights.astype(v.dtype), v[j])
    return (_put(out, i, out[i] * decay[..., None] + update), _put(peak, i, new_peak),
            _put(total, i, total[i] * decay + weights.sum(-1)))

  rows = q.shape[:-1]
  init = (jnp.zeros(q.shape, jnp.float32), jnp.full(rows, numerics.MASKED / 2, jnp.float32),
          jnp.zeros(rows, jnp.float32))
  out, peak, total = lax.fori_loop(0, work.starts[-1], body, init)
  total = jnp.where(total > 0, total, 1.0)
  return (out / total[..., None]).astype(q.dtype), peak * scale + jnp.log(total)


def _backward(
    q: Float[Array, "nq G Rbq E"],
    k: Float[Array, "nk G bk E"],
    v: Float[Array, "nk G bk E"],
    ranks_q: mask.Ranks,
    ranks_k: mask.Ranks,
    block_map: blocks.BlockMap,
    out: Float[Array, "nq G Rbq E"],
    lse: Float[Array, "nq G Rbq"],
    grad: Float[Array, "nq G Rbq E"],
) -> tuple[Array, Array, Array]:
  """Weights are computed transposed, keys by queries: two of three gradients need them so."""
  work, scale = block_map.by_query, q.shape[-1]**-0.5
  delta = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

  def body(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
    dq, dk, dv = carry
    i, j, full = _pair(work, index)
    q_i, k_j, v_j, grad_i = q[i], k[j], v[j], grad[i]
    mask_of = lambda: mask.visible(_at(ranks_q, i), _at(ranks_k, j)).T
    scores = _masked(_product("Gke,Gqe->Gkq", k_j, q_i), full, mask_of)
    weights = jnp.exp(scores * scale - lse[i][:, None])
    d_weights = _product("Gke,Gqe->Gkq", v_j, grad_i)
    d_scores = (weights * (d_weights - delta[i][:, None])).astype(q.dtype)
    dv_j = _product("Gkq,Gqe->Gke", weights.astype(grad.dtype), grad_i)
    dk_j = _product("Gkq,Gqe->Gke", d_scores, q_i)
    dq_i = _product("Gkq,Gke->Gqe", d_scores, k_j)
    return _put(dq, i, dq[i] + dq_i), _put(dk, j, dk[j] + dk_j), _put(dv, j, dv[j] + dv_j)

  zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
  dq, dk, dv = lax.fori_loop(0, work.starts[-1], body, zeros)
  return (dq * scale).astype(q.dtype), (dk * scale).astype(k.dtype), dv.astype(v.dtype)


_attend = gradient.differentiable(_forward, _backward)


def _product(equation: str, a: Array, b: Array) -> Array:
  return jnp.einsum(equation, a, b, precision=numerics.precision(a.dtype),
                    preferred_element_type=jnp.float32)


# Stacks of blocks -------------------------------------------------------------------------


def _to_blocks(x: Float[Array, "B L H E"], block: int, kv_heads: int) -> Float[Array, "n G Rb E"]:
  x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)])
  return einops.rearrange(x, "B (n b) (G R) E -> (B n) G (R b) E", b=block, G=kv_heads)


def _pair(work: blocks.Worklist, index: Array) -> tuple[Array, Array, Array]:
  """Query block, key block (both counted over the batch) and fullness of an entry."""
  sample, row, column, full = work.unpack(work.entries[index])
  return sample * work.rows + row, sample * work.columns + column, full


def _rank_blocks(ranks: mask.Ranks, block: int) -> mask.Ranks:
  return jax.tree.map(lambda x: x.reshape(-1, block), mask.pad(ranks, block))


def _at(ranks: mask.Ranks, index: Array) -> mask.Ranks:
  return jax.tree.map(lambda x: x[index], ranks)


def _put(stack: Array, index: Array, block: Array) -> Array:
  return lax.dynamic_update_index_in_dim(stack, block, index, 0)


def _masked(scores: Float[Array, "G x y"], full: Bool[Array, ""], mask_of: Any) -> Array:
  """Scores where `mask_of()` is true; it is asked only for a block that is not full.

  The mask is repeated for the heads that share a block's rows (or columns).
  """
  def apply(scores: Array) -> Array:
    visible = mask_of()
    repeats = [n // m for n, m in zip(scores.shape[1:], visible.shape, strict=True)]
    return jnp.where(jnp.tile(visible, repeats), scores, numerics.MASKED)

  return lax.cond(full, lambda scores: scores, apply, scores)
