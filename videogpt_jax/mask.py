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
pictures; attention gets the ranks and a `BlockMap`.
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


def visible(ranks_q: Ranks, ranks_k: Ranks) -> Bool[Array, "*B Lq Lk"]:
  """The dense mask: true where query q may look at key k."""
  key = ranks_k.key[..., None, :]
  a, lo, hi = ranks_q.a[..., None], ranks_q.lo[..., None], ranks_q.hi[..., None]
  return (key <= a) | ((lo <= key) & (key <= hi))


@flax.struct.dataclass
class BlockMap:
  """Which blocks of queries and keys hold visible pairs, for a blockwise attention.

  `pairs` lists the live blocks of the whole batch, query-major: for sample b, query block
  i and key block j the entry is `((b * nq + i) * nk + j) * 2 + full`. Its capacity is
  every block there is, so it cannot overflow; entries from `count` on mean nothing.
  A block is full if all its pairs are visible, and then needs no predicate.
  """

  pairs: Int[Array, "capacity"]
  count: Int[Array, "1"]
  block_q: int = flax.struct.field(pytree_node=False)
  block_k: int = flax.struct.field(pytree_node=False)
  num_q: int = flax.struct.field(pytree_node=False)  # query blocks a sample
  num_k: int = flax.struct.field(pytree_node=False)

  def unpack(self, entry: Int[Array, "*n"]) -> tuple[Array, Array, Array, Array]:
    """Sample, query block, key block and fullness of packed entries."""
    full, index = entry % 2, entry // 2
    sample_and_q, key = index // self.num_k, index % self.num_k
    return sample_and_q // self.num_q, sample_and_q % self.num_q, key, full == 1


def live_blocks(
    ranks_q: Ranks, ranks_k: Ranks, block_q: int, block_k: int
) -> tuple[Bool[Array, "B nq nk"], Bool[Array, "B nq nk"]]:
  """Which blocks may hold visible pairs, and which hold nothing else.

  From the extremes of the ranks in each block, so O(L) work and memory: never a live
  block missed or a partial one called full; exact on the split layout, where the tokens
  of a block differ little.
  """
  ranks_q, ranks_k = pad(ranks_q, block_q), pad(ranks_k, block_k)
  blocks = lambda x, size: x.reshape(*x.shape[:-1], -1, size)
  q = jax.tree.map(lambda x: blocks(x, block_q), ranks_q)
  key = blocks(ranks_k.key, block_k)
  low, high = key.min(-1)[..., None, :], key.max(-1)[..., None, :]
  bound = lambda x, reduce: reduce(x, axis=-1)[..., None]
  live = (low <= bound(q.a, jnp.max)) | (
      (low <= bound(q.hi, jnp.max)) & (high >= bound(q.lo, jnp.min)))
  full = (high <= bound(q.a, jnp.min)) | (
      (low >= bound(q.lo, jnp.max)) & (high <= bound(q.hi, jnp.min)))
  return live, full


def block_map(ranks_q: Ranks, ranks_k: Ranks, block_q: int, block_k: int) -> BlockMap:
  """Builds the worklist of live blocks; jit-able, once a step for all layers."""
  live, full = live_blocks(ranks_q, ranks_k, block_q, block_k)
  _, num_q, num_k = live.shape
  live, full = live.reshape(-1), full.reshape(-1)
  index = jnp.arange(live.size, dtype=jnp.int32)
  order = jnp.argsort(~live, stable=True)  # live ones first, query-major order kept
  pairs = (index * 2 + full.astype(jnp.int32))[order]
  return BlockMap(pairs=pairs, count=live.sum(dtype=jnp.int32, keepdims=True), block_q=block_q,
                  block_k=block_k, num_q=num_q, num_k=num_k)


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
