"""Dense attention in float32: the reference for every other implementation."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from videogpt_jax import mask


def attend(
    q: Float[Array, "B Lq H E"],
    k: Float[Array, "B Lk G E"],
    v: Float[Array, "B Lk G E"],
    ranks_q: mask.Ranks,
    ranks_k: mask.Ranks,
) -> Float[Array, "B Lq H E"]:
  """Softmax attention under the mask of `ranks`; scores take O(Lq * Lk) memory.

  Query head i uses key/value head i // (H / G). Rows that see nothing give zeros.
  """
  heads, kv_heads, size = q.shape[2], k.shape[2], q.shape[3]
  batch, length = q.shape[:2]
  grouped = q.reshape(batch, length, kv_heads, heads // kv_heads, size)
  scores = jnp.einsum("BqGRE,BkGE->BGRqk", grouped, k, preferred_element_type=jnp.float32)
  visible = mask.visible(ranks_q, ranks_k)[:, None, None]
  scores = jnp.where(visible, scores * size**-0.5, -jnp.inf)
  peak = jnp.max(scores, axis=-1, keepdims=True)
  weights = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0))
  total = weights.sum(axis=-1, keepdims=True)
  weights = weights / jnp.where(total > 0, total, 1.0)
  out = jnp.einsum("BGRqk,BkGE->BqGRE", weights, v.astype(jnp.float32))
  return out.reshape(q.shape).astype(q.dtype)
