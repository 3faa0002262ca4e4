"""Which blocks of queries and keys hold visible pairs: the worklists of every implementation.

Built from the ranks alone (`videogpt_jax.mask`), inside jit, once a step; all layers share
them. The extremes of the ranks in each block decide, so work and memory are O(L) and one
integer a pair of blocks; the L x L mask never exists.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from videogpt_jax import mask


@flax.struct.dataclass
class Worklist:
  """The live blocks of a batch, row after row.

  A row is a block of queries (or of keys, in the key-major list) of one sample, counted
  over the batch: row `b * rows + i`. Its entries stand side by side, the full ones first,
  columns ascending in both parts. An entry is one integer, see `unpack`. A row that nothing
  is visible in still has one partial entry, so a kernel that walks the entries writes every
  row. Capacity is every block there is: it cannot overflow. What stands after `starts[-1]`
  means nothing.
  """

  entries: Int[Array, "capacity"]
  starts: Int[Array, "rows+1"]  # row r owns entries starts[r] .. starts[r + 1] - 1
  partial: Int[Array, "rows"]  # of which those from partial[r] on need the predicate
  longest_first: Int[Array, "rows"]  # rows in the order in which to start them on many cores
  rows: int = flax.struct.field(pytree_node=False)  # of a sample
  columns: int = flax.struct.field(pytree_node=False)

  def column(self, entry: Int[Array, "*n"]) -> Int[Array, "*n"]:
    """The column of packed entries, counted within the sample."""
    return entry & ((1 << _bits(self.columns)) - 1)

  def unpack(self, entry: Int[Array, "*n"]) -> tuple[Array, Array, Array, Array]:
    """Sample, row and column within it, and fullness of packed entries; without a division."""
    bits = _bits(self.columns)
    over = entry >> (bits + 1)
    sample, row = over >> _bits(self.rows), over & ((1 << _bits(self.rows)) - 1)
    return sample, row, self.column(entry), (entry >> bits) & 1 == 0


@flax.struct.dataclass
class BlockMap:
  """Live blocks, query-major and key-major; a full block needs no predicate."""

  by_query: Worklist
  by_key: Worklist
  block_q: int = flax.struct.field(pytree_node=False)
  block_k: int = flax.struct.field(pytree_node=False)


def live_blocks(
    ranks_q: mask.Ranks, ranks_k: mask.Ranks, block_q: int, block_k: int
) -> tuple[Bool[Array, "B nq nk"], Bool[Array, "B nq nk"]]:
  """Which blocks may hold visible pairs, and which hold nothing else.

  Never a live block missed or a partial one called full; exact on the split layout, where
  the tokens of a block differ little.
  """
  ranks_q, ranks_k = mask.pad(ranks_q, block_q), mask.pad(ranks_k, block_k)
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


def block_map(
    ranks_q: mask.Ranks, ranks_k: mask.Ranks, block_q: int, block_k: int
) -> BlockMap:
  """Builds both worklists; jit-able.

  Raises:
    ValueError: so many blocks that an entry does not fit 31 bits.
  """
  live, full = live_blocks(ranks_q, ranks_k, block_q, block_k)
  swap = lambda x: jnp.swapaxes(x, 1, 2)
  return BlockMap(by_query=_worklist(live, full), by_key=_worklist(swap(live), swap(full)),
                  block_q=block_q, block_k=block_k)


def _worklist(live: Bool[Array, "B rows columns"], full: Bool[Array, "B rows columns"]) -> Worklist:
  batch, rows, columns = live.shape
  bits, row_bits = _bits(columns), _bits(rows)
  if batch << (row_bits + bits + 1) >= 1 << 31:
    raise ValueError(f"{batch} samples of {rows} x {columns} blocks do not fit a worklist of "
                     "31-bit entries: choose larger blocks or fewer samples a device")
  live = live.reshape(-1, columns)
  full = full.reshape(-1, columns) & live
  row = (jnp.arange(batch, dtype=jnp.int32)[:, None] << row_bits | jnp.arange(rows)).reshape(-1, 1)
  column = jnp.arange(columns, dtype=jnp.int32)
  live |= ~live.any(-1, keepdims=True) & (column == 0)  # every row has an entry
  packed = (row << (bits + 1)) | ((~full).astype(jnp.int32) << bits) | column
  nothing = jnp.iinfo(jnp.int32).max
  count = live.sum(-1, dtype=jnp.int32)
  starts = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(count)])
  return Worklist(entries=jnp.sort(jnp.where(live, packed, nothing).reshape(-1)),
                  starts=starts, partial=starts[:-1] + full.sum(-1, dtype=jnp.int32),
                  longest_first=jnp.argsort(-count).astype(jnp.int32),
                  rows=rows, columns=columns)


def _bits(count: int) -> int:
  """Bits that hold 0..count - 1."""
  return (count - 1).bit_length()
