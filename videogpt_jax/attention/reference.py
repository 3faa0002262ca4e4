"""Dense attention in float32: the reference for every other implementation."""

import functools

import einops
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from videogpt_jax import mask
from videogpt_jax.attention import numerics


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
  length, heads, size = q.shape[1:]
  # Heads first: otherwise every product would begin and end with a change of layout.
  q_ = einops.rearrange(q, "B L (G R) E -> B G (R L) E", G=k.shape[2])
  k_, v_ = (einops.rearrange(x, "B L G E -> B G L E") for x in (k, v))
  product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32,
                              precision=numerics.precision(q.dtype))
  scores = product("BGqE,BGkE->BGqk", q_, k_) * size**-0.5
  visible = jnp.tile(mask.visible(ranks_q, ranks_k), (1, heads // k.shape[2], 1))[:, None]
  scores = jnp.where(visible, scores, -jnp.inf)
  peak = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
  weights = jnp.exp(scores - jnp.where(jnp.isfinite(peak), peak, 0.0))
  total = weights.sum(axis=-1, keepdims=True)
  out = product("BGqk,BGkE->BGqE", weights, v_.astype(jnp.float32))
  out = out / jnp.where(total > 0, total, 1.0)  # after the product: it is smaller
  return einops.rearrange(out, "B G (R L) E -> B L (G R) E", L=length).astype(q.dtype)
