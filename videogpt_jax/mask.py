"""Who may look at whom: the hierarchical mask (paper, section 3.3) as comparisons of ranks.

For a query q and a key k with stream s, clip c, frame f and role r:

  q clean, k clean   f_k < f_q, or f_k == f_q and r_k <= r_q
  q clean, k noisy   never
  q noisy, k clean   c_k < c_q
  q noisy, k noisy   c_k == c_q and r_k <= r_q

Clip level: noisy tokens see the clean history only. Frame level: clean frames are causal,
noisy ones see each other both ways inside their clip. Patch level: markers are causal,
the patches of a frame fully connected. A condition prefix is causal in itself and seen by
everything.

One integer per key and three per query decide it: every key has a `key` rank, and q sees
k iff `key_k <= a_q or lo_q <= key_k <= hi_q`. The L x L mask exists only in tests and
pictures; attention gets the ranks, and the blocks that they make live (`attention.blocks`).
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from videogpt_jax import layout

_NOISY_BASE = 1 << 24  # above the rank of every clean token
_NEVER = 1 << 30


@flax.struct.dataclass
class Ranks:
  """Mask of L tokens in four integers each; q sees k iff key <= a or lo <= key <= hi."""

  key: Int[Array, "B L"]
  a: Int[Array, "B L"]
  lo: Int[Array, "B L"]
  hi: Int[Array, "B L"]

  @property
  def length(self) -> int:
    """L, the number of tokens."""
    return self.key.shape[-1]


def ranks(tokens: layout.Tokens) -> Ranks:
  """Ranks of `tokens`; invalid ones are seen by nobody and see nothing."""
  noisy = tokens.stream == layout.NOISY
  prefix = tokens.stream == layout.PREFIX
  clean_rank = jnp.where(prefix, tokens.frame, 3 * tokens.frame + tokens.role)
  noisy_lo = _NOISY_BASE + 3 * tokens.clip
  noisy_rank = noisy_lo + tokens.role
  a = jnp.where(noisy, 3 * tokens.clip_start - 1, clean_rank)
  only = lambda condition, x, other: jnp.where(condition & tokens.valid, x, other)
  return Ranks(
      key=jnp.where(tokens.valid, jnp.where(noisy, noisy_rank, clean_rank), _NEVER),
      a=jnp.where(tokens.valid, a, -_NEVER),
      lo=only(noisy, noisy_lo, _NEVER),
      hi=only(noisy, noisy_rank, -_NEVER),
  )


def pad(ranks: Ranks, multiple: int) -> Ranks:
  """Appends invalid tokens until L is a multiple of `multiple`."""
  extra = [(0, 0)] * (ranks.key.ndim - 1) + [(0, -ranks.length % multiple)]
  fill = lambda x, value: jnp.pad(x, extra, constant_values=value)
  return Ranks(key=fill(ranks.key, _NEVER), a=fill(ranks.a, -_NEVER),
               lo=fill(ranks.lo, _NEVER), hi=fill(ranks.hi, -_NEVER))


def concatenate(*parts: Ranks) -> Ranks:
  """The ranks of several runs of tokens as those of one."""
  return jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), *parts)


def visible(ranks_q: Ranks, ranks_k: Ranks) -> Bool[Array, "*B Lq Lk"]:
  """The dense mask: true where query q may look at key k."""
  key = ranks_k.key[..., None, :]
  a, lo, hi = ranks_q.a[..., None], ranks_q.lo[..., None], ranks_q.hi[..., None]
  return (key <= a) | ((lo <= key) & (key <= hi))


def live_pairs(ranks: Ranks) -> Int[Array, "B"]:
  """Visible (query, key) pairs of each sample, in O(L log L): the honest count for MFU.

  Counts keys by binary search in the sorted ranks, so the L x L mask is never built.
  """
  def count(key: Array, a: Array, lo: Array, hi: Array) -> Array:
    ordered = jnp.sort(key)
    up_to = lambda bound: jnp.searchsorted(ordered, bound, side="right")
    below = lambda bound: jnp.searchsorted(ordered, bound, side="left")
    return (up_to(a) + jnp.maximum(up_to(hi) - below(lo), 0)).sum()

  return jax.vmap(count)(ranks.key, ranks.a, ranks.lo, ranks.hi)
