"""Block-sparse flash attention for Hopper GPUs (Pallas Mosaic GPU), forward and backward.

The algorithm is FlashAttention-3's (Shah et al., arXiv 2407.08608): one warpgroup fetches
blocks into rings of shared memory (TMA), the others compute, 64 rows each; a warpgroup's
softmax overlaps its own matrix products (the scores of the next block are issued before
the values of this one are waited for) and, as warpgroups take turns to issue, those of its
neighbour. Only live blocks are visited: a row of the block map's worklist gives first the
full ones, which need no predicate, then the partial ones, where ranks are compared. The
backward pass recomputes the weights from the log-sum-exp (FlashAttention-2, arXiv
2307.08691) in two kernels, rows of queries for dq and rows of keys for dk and dv.

Exponents are of base 2, the scale of the scores is folded into them, and so log-sum-exps
have base 2 too. Products are of bfloat16 with float32 sums.
"""

from collections.abc import Callable
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Float

from videogpt_jax import mask
from videogpt_jax.attention import blocks
from videogpt_jax.attention import gradient

HEAD_SIZES = (64, 96, 128)
BLOCKS = (64, 128)

_ROWS = 64  # of a wgmma, so of a compute warpgroup
_UNSEEN = -1e20  # maximum of a row that has seen nothing: finite, or it would make NaN
_SHARED_BYTES = 220 << 10  # of 227 KB; the rest is for ranks, sums and barriers
_MOST_SLOTS = 4
_WIDE = 96  # head size above which the backward pass has no registers left to overlap as much
_Ref = Any


def problem(head_size: int, dtype: Any) -> str:
  """Why the kernels cannot serve; empty if they can."""
  if jnp.dtype(dtype) != jnp.bfloat16:
    return f"the kernel computes in bfloat16, not {jnp.dtype(dtype)} (wgmma would round to tf32)"
  if head_size not in HEAD_SIZES:
    return f"head size {head_size} is not among {', '.join(map(str, HEAD_SIZES))}"
  return ""


def serves(device: jax.Device) -> bool:
  """Whether the device has wgmma: Hopper only, Blackwell dropped it."""
  return getattr(device, "compute_capability", None) == "9.0"


# Rings of shared memory -------------------------------------------------------------------


class _Ring(NamedTuple):
  """Slots of shared memory that the fetching warpgroup fills and the others read.

  Steps count the slots' uses from 0; step i has slot i modulo their number.
  """

  buffers: tuple[_Ref, ...]  # [slots, ...] each
  filled: _Ref  # barriers: all copies of a slot have landed
  free: _Ref  # barriers: all readers are done with a slot

  @classmethod
  def of(cls, slots: int, readers: int, *tiles: Any) -> "_Ring":
    """The types to allocate, from the types of what a slot holds."""
    return cls(tuple(_each(slots, tile) for tile in tiles),
               plgpu.Barrier(num_arrivals=len(tiles), num_barriers=slots),
               plgpu.Barrier(num_arrivals=readers, num_barriers=slots))

  def fill(self, step: Array, *sources: _Ref) -> None:
    slot = self._slot(step)
    plgpu.barrier_wait(self.free.at[slot])
    for source, buffer in zip(sources, self.buffers, strict=True):
      plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.filled.at[slot])

  def drain(self, steps: Array) -> None:
    """Waits until everything filled was read."""
    lax.fori_loop(steps, steps + self._slots,
                  lambda step, _: plgpu.barrier_wait(self.free.at[self._slot(step)]), None)

  def open(self) -> None:
    """What every reader does first: all slots are free."""
    for slot in range(self._slots):
      plgpu.barrier_arrive(self.free.at[slot])

  def wait(self, step: Array) -> tuple[_Ref, ...]:
    plgpu.barrier_wait(self.filled.at[self._slot(step)])
    return self.read(step)

  def read(self, step: Array) -> tuple[_Ref, ...]:
    """What `wait` gave and `release` has not yet given back."""
    return tuple(buffer.at[self._slot(step)] for buffer in self.buffers)

  def release(self, step: Array) -> None:
    plgpu.barrier_arrive(self.free.at[self._slot(step)])

  @property
  def _slots(self) -> int:
    return self.filled.shape[0]

  def _slot(self, step: Array) -> Array:
    return lax.rem(step, jnp.int32(self._slots))


def _each(count: int, memory: Any) -> Any:
  """The type of `count` pieces of shared memory."""
  return plgpu.SMEM((count, *memory.shape), memory.dtype, transforms=memory.transforms)


def _tile(rows: int, size: int) -> Any:
  """A [rows, size] operand of wgmma in shared memory."""
  swizzle = 128 if size % 64 == 0 else 64
  return plgpu.SMEM((rows, size), jnp.bfloat16, transforms=(
      plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)))


# Rows of the worklist -------------------------------------------------------------------


class _Row(NamedTuple):
  """A row of a worklist, and the steps along it: a block each, or chunks of one."""

  sample: Array
  block: Array  # within the sample
  start: Array  # of its entries
  full: Array  # steps that need no predicate
  count: Array  # of all steps
  chunks: int  # of a block

  def column(self, work: Any, step: Array) -> Array:
    """The chunk, counted within the sample, that a step visits; past the end, the last."""
    step, chunks = lax.min(step, self.count - 1), jnp.int32(self.chunks)
    entry = work.entries[self.start + lax.div(step, chunks)]
    return work.column(entry) * chunks + lax.rem(step, chunks)


def _row(work: Any, order: _Ref, length: int, width: int) -> _Row:
  """The row this block of threads is for, in steps of `width` of `length` tokens."""
  row, rows, chunks = order[lax.axis_index("row")], jnp.int32(work.rows), length // (
      work.columns * width)
  start = work.starts[row]
  return _Row(lax.div(row, rows), lax.rem(row, rows), start,
              (work.partial[row] - start) * chunks, (work.starts[row + 1] - start) * chunks, chunks)


# Forward ----------------------------------------------------------------------------------


def _forward(
    q: Float[Array, "B Lq H E"],
    k: Float[Array, "B Lk G E"],
    v: Float[Array, "B Lk G E"],
    ranks_q: mask.Ranks,
    ranks_k: mask.Ranks,
    block_map: blocks.BlockMap,
) -> tuple[Float[Array, "B Lq H E"], Float[Array, "B H Lq"]]:
  """Output and log-sum-exp of base 2."""
  length, (heads, size) = q.shape[1], q.shape[2:]
  block_q, block_k = block_map.block_q, block_map.block_k
  q, k, v = _padded(q, block_q), _padded(k, block_k), _padded(v, block_k)
  warpgroups = block_q // _ROWS
  work = block_map.by_query
  stat = jax.ShapeDtypeStruct((q.shape[0], heads, q.shape[1]), jnp.float32)
  out, lse = _launch(
      _forward_kernel, work, heads, warpgroups,
      out_type=(jax.ShapeDtypeStruct(q.shape, q.dtype), stat),
      scratch_types=(
          _each(warpgroups, _tile(_ROWS, size)),
          plgpu.SMEM((warpgroups, 3, _ROWS), jnp.int32),
          plgpu.SMEM((warpgroups, _ROWS), jnp.float32),
          plgpu.Barrier(num_arrivals=2, num_barriers=warpgroups),
          *_key_rings(block_k, size, warpgroups, tiles=1),
          plgpu.Barrier(num_barriers=warpgroups),
      ),
  )(q, k, v, _stacked(ranks_q, block_q), mask.pad(ranks_k, block_k).key, work, _order(work))
  return out[:, :length], lse


def _forward_kernel(q: _Ref, k: _Ref, v: _Ref, ranks_q: _Ref, ranks_k: _Ref,
                    work: Any, order: _Ref, out: _Ref, lse: _Ref,
                    tiles: _Ref, ranks: _Ref, stats: _Ref, loaded: _Ref, keys: _Ring, values: _Ring,
                    turns: _Ref) -> None:
  warpgroup, head = lax.axis_index("warpgroup"), lax.axis_index("head")
  warpgroups = tiles.shape[0]

  @pl.when(warpgroup == warpgroups)
  def fetch() -> None:
    _few_registers(warpgroups)
    row = _row(work, order, k.shape[1], keys.buffers[0].shape[1])
    _fetch_keys(row, work, lax.div(head, jnp.int32(q.shape[2] // k.shape[2])), k, v, ranks_k,
                keys, values)

  @pl.when(warpgroup < warpgroups)
  def compute() -> None:
    _many_registers(warpgroups)
    row = _row(work, order, k.shape[1], keys.buffers[0].shape[1])
    tile = tiles.at[warpgroup]
    tokens = pl.ds((row.block * warpgroups + warpgroup) * _ROWS, _ROWS)
    plgpu.copy_gmem_to_smem(q.at[row.sample, tokens, head], tile, loaded.at[warpgroup])
    plgpu.copy_gmem_to_smem(ranks_q.at[row.sample, :, tokens], ranks.at[warpgroup],
                            loaded.at[warpgroup])
    keys.open()
    values.open()
    plgpu.barrier_wait(loaded.at[warpgroup])
    queries = tuple(_of_rows(ranks.at[warpgroup, i]) for i in range(3))
    result, statistic = pl.run_scoped(
        functools.partial(_attend, row, queries, tile, keys, values, _Turns(turns, warpgroup)),
        plgpu.ACC((_ROWS, q.shape[3])))
    tile[...] = result.astype(out.dtype)
    stats.at[warpgroup][...] = statistic
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, out.at[row.sample, tokens, head])
    plgpu.copy_smem_to_gmem(stats.at[warpgroup], lse.at[row.sample, head, tokens])
    plgpu.wait_smem_to_gmem(0)


class _Turns(NamedTuple):
  """Warpgroups issue their products in turn, so that one's softmax meets another's products."""

  barriers: _Ref
  warpgroup: Array

  def open(self) -> None:
    last = self.barriers.shape[0] - 1
    pl.when(self.warpgroup == last)(lambda: plgpu.barrier_arrive(self.barriers.at[0]))

  def wait(self) -> None:
    plgpu.barrier_wait(self.barriers.at[self.warpgroup])

  def pass_on(self) -> None:
    following = lax.rem(self.warpgroup + 1, jnp.int32(self.barriers.shape[0]))
    plgpu.barrier_arrive(self.barriers.at[following])

  def close(self) -> None:
    pl.when(self.warpgroup == 0)(self.wait)


def _attend(row: _Row, queries: Any, q: _Ref, keys: _Ring, values: _Ring, turns: _Turns,
            out: _Ref) -> tuple[Array, Array]:
  """64 queries over the blocks of their row; the softmax trails the scores by one block."""
  shape = (_ROWS, keys.buffers[0].shape[1])
  scale = _scale(q)

  def scores_of(step: Array, masked: bool, update: Callable[[], None] | None = None) -> Array:
    """Scores of block `step`; `update`, the product issued after them, still runs."""
    def issue(scores: _Ref) -> Array:
      k, key_ranks = keys.wait(step)
      turns.wait()
      plgpu.wgmma(scores, q, k.transpose((1, 0)))
      if update:
        update()
      turns.pass_on()
      result = plgpu.wgmma_accumulator_load(scores, wait_n=1 if update else 0)
      if masked:
        visible = _visible(queries, _of_columns(key_ranks), shape, query_axis=0)
        result = jnp.where(visible, result, -jnp.inf)
      keys.release(step)
      return result
    return pl.run_scoped(issue, plgpu.ACC(shape))

  def softmax(scores: Array, peak: Array, total: Array) -> tuple[Array, ...]:
    new_peak = jnp.maximum(peak, scores.max(axis=1) * scale)
    decay = jnp.exp2(peak - new_peak)
    weights = jnp.exp2(scores * scale - _along(new_peak, shape, 0))
    return weights, decay, new_peak, total * decay + weights.sum(axis=1)

  def block(step: Array, carry: tuple[Array, ...], masked: bool) -> tuple[Array, ...]:
    weights, peak, total = carry

    def update() -> None:
      v, = values.wait(step - 1)
      plgpu.wgmma(out, weights, v)

    scores = scores_of(step, masked, update)
    weights, decay, peak, total = softmax(scores, peak, total)
    plgpu.wgmma_wait(0)
    values.release(step - 1)
    out[...] = out[...] * _along(decay, out.shape, 0)
    return _now(weights).astype(q.dtype), peak, total

  turns.open()
  nothing = plgpu.layout_cast(jnp.full((_ROWS,), 0.0), plgpu.Layout.WGMMA.reduce(1))
  weights, _, peak, total = softmax(
      scores_of(jnp.int32(0), True), nothing + _UNSEEN, nothing)
  weights, peak, total = _over_blocks(
      row.full, row.count, block, (weights.astype(q.dtype), peak, total))
  turns.close()
  v, = values.wait(row.count - 1)
  plgpu.wgmma(out, weights, v)
  seen = total > 0
  total = jnp.where(seen, total, 1.0)
  result = out[...] * _along(1 / total, out.shape, 0)
  values.release(row.count - 1)
  return result, peak + jnp.log(total) * math.log2(math.e)


# Backward ---------------------------------------------------------------------------------


def _backward(
    q: Float[Array, "B Lq H E"],
    k: Float[Array, "B Lk G E"],
    v: Float[Array, "B Lk G E"],
    ranks_q: mask.Ranks,
    ranks_k: mask.Ranks,
    block_map: blocks.BlockMap,
    out: Float[Array, "B Lq H E"],
    lse: Float[Array, "B H Lq"],
    grad: Float[Array, "B Lq H E"],
) -> tuple[Array, Array, Array]:
  length_q, length_k = q.shape[1], k.shape[1]
  block_q, block_k = block_map.block_q, block_map.block_k
  delta = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
  delta = jnp.pad(jnp.swapaxes(delta, 1, 2), [(0, 0), (0, 0), (0, -length_q % block_q)])
  q, grad = _padded(q, block_q), _padded(grad, block_q)
  k, v = _padded(k, block_k), _padded(v, block_k)
  inputs = (q, k, v, grad, jnp.stack([lse, delta], axis=2), _stacked(ranks_q, block_q),
            mask.pad(ranks_k, block_k).key)
  dq = _query_gradient(*inputs, block_map.by_query, block_q, block_k)
  dk, dv = _key_gradients(*inputs, block_map.by_key, block_k)
  return dq[:, :length_q], dk[:, :length_k], dv[:, :length_k]


def _query_gradient(q: Array, k: Array, v: Array, grad: Array, stats: Array, ranks_q: Array,
                    ranks_k: Array, work: blocks.Worklist, block_q: int, block_k: int) -> Array:
  heads, size = q.shape[2:]
  warpgroups = block_q // _ROWS
  return _launch(
      _query_gradient_kernel, work, heads, warpgroups,
      out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
      scratch_types=(
          _each(warpgroups, _tile(_ROWS, size)),
          _each(warpgroups, _tile(_ROWS, size)),
          plgpu.SMEM((warpgroups, 2, _ROWS), jnp.float32),
          plgpu.SMEM((warpgroups, 3, _ROWS), jnp.int32),
          plgpu.Barrier(num_arrivals=4, num_barriers=warpgroups),
          *_key_rings(block_k if size <= _WIDE else _ROWS, size, warpgroups, tiles=2),
          plgpu.Barrier(num_barriers=warpgroups),
      ),
  )(q, k, v, grad, stats, ranks_q, ranks_k, work, _order(work))


def _query_gradient_kernel(q: _Ref, k: _Ref, v: _Ref, grad: _Ref, stats: _Ref, ranks_q: _Ref,
                           ranks_k: _Ref, work: Any, order: _Ref, dq: _Ref,
                           q_tiles: _Ref, grad_tiles: _Ref, stat_tiles: _Ref, ranks: _Ref,
                           loaded: _Ref, keys: _Ring, values: _Ring, turns: _Ref) -> None:
  warpgroup, head = lax.axis_index("warpgroup"), lax.axis_index("head")
  warpgroups = q_tiles.shape[0]

  @pl.when(warpgroup == warpgroups)
  def fetch() -> None:
    _few_registers(warpgroups)
    row = _row(work, order, k.shape[1], keys.buffers[0].shape[1])
    _fetch_keys(row, work, lax.div(head, jnp.int32(q.shape[2] // k.shape[2])), k, v, ranks_k,
                keys, values)

  @pl.when(warpgroup < warpgroups)
  def compute() -> None:
    _many_registers(warpgroups)
    row = _row(work, order, k.shape[1], keys.buffers[0].shape[1])
    tokens = pl.ds((row.block * warpgroups + warpgroup) * _ROWS, _ROWS)
    for source, tiles in ((q.at[row.sample, tokens, head], q_tiles),
                          (grad.at[row.sample, tokens, head], grad_tiles),
                          (stats.at[row.sample, head, :, tokens], stat_tiles),
                          (ranks_q.at[row.sample, :, tokens], ranks)):
      plgpu.copy_gmem_to_smem(source, tiles.at[warpgroup], loaded.at[warpgroup])
    keys.open()
    values.open()
    plgpu.barrier_wait(loaded.at[warpgroup])
    tile = q_tiles.at[warpgroup]
    result = pl.run_scoped(
        functools.partial(_differentiate_row, row, ranks.at[warpgroup], stat_tiles.at[warpgroup], tile,
                          grad_tiles.at[warpgroup], keys, values, _Turns(turns, warpgroup)),
        plgpu.ACC((_ROWS, q.shape[3])))
    tile[...] = result.astype(dq.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, dq.at[row.sample, tokens, head])
    plgpu.wait_smem_to_gmem(0)


def _differentiate_row(row: _Row, ranks: _Ref, stats: _Ref, q: _Ref, grad: _Ref,
                       keys: _Ring, values: _Ring, turns: _Turns, dq: _Ref) -> Array:
  """dq of 64 queries; the product with the keys trails by one block."""
  shape = (_ROWS, keys.buffers[0].shape[1])

  def d_scores_of(step: Array, masked: bool, update: Callable[[], None] | None = None) -> Array:
    def issue(scores: _Ref, d_weights: _Ref) -> Array:
      (k, key_ranks), (v,) = keys.wait(step), values.wait(step)
      turns.wait()
      plgpu.wgmma(scores, q, k.transpose((1, 0)))
      plgpu.wgmma(d_weights, grad, v.transpose((1, 0)))
      if update:
        update()
      turns.pass_on()
      later = 1 if update else 0
      lse, delta = (_along(_of_rows(stats.at[i]), shape, 0) for i in range(2))
      weights = jnp.exp2(plgpu.wgmma_accumulator_load(scores, wait_n=1 + later) * _scale(q) - lse)
      result = plgpu.wgmma_accumulator_load(d_weights, wait_n=later)
      values.release(step)
      result = weights * (result - delta)
      if masked:
        queries = tuple(_of_rows(ranks.at[i]) for i in range(3))
        visible = _visible(queries, _of_columns(key_ranks), shape, query_axis=0)
        result = jnp.where(visible, result, 0.0)
      return result
    return pl.run_scoped(issue, plgpu.ACC(shape), plgpu.ACC(shape))

  def block(step: Array, d_scores: Array, masked: bool) -> Array:
    update = lambda: plgpu.wgmma(dq, d_scores, keys.read(step - 1)[0])
    new = d_scores_of(step, masked, update)
    plgpu.wgmma_wait(0)
    keys.release(step - 1)
    return _now(new).astype(q.dtype)

  turns.open()
  d_scores = d_scores_of(jnp.int32(0), masked=True).astype(q.dtype)
  d_scores = _over_blocks(row.full, row.count, block, d_scores)
  turns.close()
  plgpu.wgmma(dq, d_scores, keys.read(row.count - 1)[0])
  result = dq[...] * q.shape[1]**-0.5
  keys.release(row.count - 1)
  return result


def _key_gradients(q: Array, k: Array, v: Array, grad: Array, stats: Array, ranks_q: Array,
                   ranks_k: Array, work: blocks.Worklist, block_k: int) -> tuple[Array, Array]:
  kv_heads, size = k.shape[2:]
  warpgroups = block_k // _ROWS
  slots = _slots(2 * block_k * size, 2 * _ROWS * size)
  return _launch(
      _key_gradients_kernel, work, kv_heads, warpgroups,
      out_type=(jax.ShapeDtypeStruct(k.shape, k.dtype),) * 2,
      scratch_types=(
          _each(warpgroups, _tile(_ROWS, size)),
          _each(warpgroups, _tile(_ROWS, size)),
          plgpu.SMEM((warpgroups, _ROWS), jnp.int32),
          plgpu.Barrier(num_arrivals=3, num_barriers=warpgroups),
          _Ring.of(slots, warpgroups, _tile(_ROWS, size), _tile(_ROWS, size),
                   plgpu.SMEM((2, _ROWS), jnp.float32), plgpu.SMEM((3, _ROWS), jnp.int32)),
          plgpu.Barrier(num_barriers=warpgroups),
      ),
  )(q, k, v, grad, stats, ranks_q, ranks_k, work, _order(work))


def _key_gradients_kernel(q: _Ref, k: _Ref, v: _Ref, grad: _Ref, stats: _Ref,
                          ranks_q: _Ref, ranks_k: _Ref, work: Any, order: _Ref,
                          dk: _Ref, dv: _Ref, k_tiles: _Ref, v_tiles: _Ref, ranks: _Ref,
                          loaded: _Ref, ring: _Ring, turns: _Ref) -> None:
  """A block of queries is visited in chunks of 64: two accumulators leave no more registers."""
  warpgroup, kv_head = lax.axis_index("warpgroup"), lax.axis_index("head")
  warpgroups, group = k_tiles.shape[0], q.shape[2] // k.shape[2]

  @pl.when(warpgroup == warpgroups)
  def fetch() -> None:
    _few_registers(warpgroups)
    row = _row(work, order, q.shape[1], _ROWS)

    def step(index: Array, column: Array) -> Array:
      head = kv_head * group + lax.div(index, row.count)
      tokens = pl.ds(column * _ROWS, _ROWS)
      ring.fill(index, q.at[row.sample, tokens, head], grad.at[row.sample, tokens, head],
                stats.at[row.sample, head, :, tokens], ranks_q.at[row.sample, :, tokens])
      return row.column(work, lax.rem(index + 1, row.count))

    lax.fori_loop(0, group * row.count, step, row.column(work, jnp.int32(0)))
    ring.drain(group * row.count)

  @pl.when(warpgroup < warpgroups)
  def compute() -> None:
    _many_registers(warpgroups)
    row = _row(work, order, q.shape[1], _ROWS)
    tokens = pl.ds((row.block * warpgroups + warpgroup) * _ROWS, _ROWS)
    tiles = k_tiles.at[warpgroup], v_tiles.at[warpgroup]
    for source, tile in ((k.at[row.sample, tokens, kv_head], tiles[0]),
                         (v.at[row.sample, tokens, kv_head], tiles[1]),
                         (ranks_k.at[row.sample, tokens], ranks.at[warpgroup])):
      plgpu.copy_gmem_to_smem(source, tile, loaded.at[warpgroup])
    ring.open()
    plgpu.barrier_wait(loaded.at[warpgroup])
    accumulator = plgpu.ACC((_ROWS, k.shape[3]))
    results = pl.run_scoped(
        functools.partial(_differentiate_column, row, group, ranks.at[warpgroup], *tiles, ring,
                          _Turns(turns, warpgroup)), accumulator, accumulator)
    for tile, result in zip(tiles, results, strict=True):
      tile[...] = result.astype(dk.dtype)
    plgpu.commit_smem()
    for tile, target in zip(tiles, (dk, dv), strict=True):
      plgpu.copy_smem_to_gmem(tile, target.at[row.sample, tokens, kv_head])
    plgpu.wait_smem_to_gmem(0)


def _differentiate_column(row: _Row, group: int, key_ranks: _Ref, k: _Ref, v: _Ref, ring: _Ring,
                          turns: _Turns, dk: _Ref, dv: _Ref) -> tuple[Array, Array]:
  """dk and dv of 64 keys, all transposed; the products with the queries trail by one chunk."""
  shape = (_ROWS, _ROWS)

  def weights_of(step: Array, masked: bool, update: Callable[[], None] | None = None
                 ) -> tuple[Array, Array]:
    """Weights and the gradient of the scores of chunk `step`."""
    def issue(scores: _Ref, d_weights: _Ref) -> tuple[Array, Array]:
      q, grad, stats, ranks = ring.wait(step)
      turns.wait()
      plgpu.wgmma(scores, k, q.transpose((1, 0)))
      plgpu.wgmma(d_weights, v, grad.transpose((1, 0)))
      if update:
        update()
      turns.pass_on()
      later = 2 if update else 0
      weights = plgpu.wgmma_accumulator_load(scores, wait_n=1 + later) * _scale(k)
      weights = jnp.exp2(weights - _along(_of_columns(stats.at[0]), shape, 1))
      d_scores = plgpu.wgmma_accumulator_load(d_weights, wait_n=later)
      d_scores = weights * (d_scores - _along(_of_columns(stats.at[1]), shape, 1))
      if masked:
        queries = tuple(_of_columns(ranks.at[i]) for i in range(3))
        visible = _visible(queries, _of_rows(key_ranks), shape, query_axis=1)
        weights, d_scores = (jnp.where(visible, x, 0.0) for x in (weights, d_scores))
      return weights, d_scores
    return pl.run_scoped(issue, plgpu.ACC(shape), plgpu.ACC(shape))

  def add(step: Array, weights: Array, d_scores: Array) -> None:
    q, grad, *_ = ring.read(step)
    plgpu.wgmma(dv, weights, grad)
    plgpu.wgmma(dk, d_scores, q)

  def finish(step: Array) -> None:
    plgpu.wgmma_wait(0)
    ring.release(step)

  def chunk(step: Array, carry: tuple[Array, ...], masked: bool) -> tuple[Array, ...]:
    new = weights_of(step, masked, (lambda: add(step - 1, *carry)) if carry else None)
    if carry:
      finish(step - 1)
    new = tuple(_now(x).astype(k.dtype) for x in new)
    if carry:
      return new
    add(step, *new)
    finish(step)
    return ()

  def head(index: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
    first = index * row.count
    return _over_blocks(first + row.full, first + row.count, chunk, carry,
                        lax.max(first, jnp.int32(1)) if carry else first)

  turns.open()
  carry = () if k.shape[1] > _WIDE else tuple(
      x.astype(k.dtype) for x in weights_of(jnp.int32(0), masked=True))
  carry = lax.fori_loop(0, group, head, carry)
  turns.close()
  if carry:
    last = group * row.count - 1
    add(last, *carry)
    finish(last)
  return dk[...] * k.shape[1]**-0.5, dv[...]


# Shared by the kernels --------------------------------------------------------------------


def _launch(kernel: Callable[..., None], work: blocks.Worklist, heads: int, warpgroups: int,
            **types: Any) -> Callable[..., Any]:
  """A block of threads for each head and row: `warpgroups` that compute and one that fetches."""
  # Rows are the fastest axis, so that those in flight share a head's keys in the L2 cache.
  return plgpu.kernel(
      kernel, grid=(heads, work.partial.size), grid_names=("head", "row"),
      num_threads=warpgroups + 1, thread_name="warpgroup",
      compiler_params=plgpu.CompilerParams(
          approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane), **types)


def _key_rings(block_k: int, size: int, readers: int, tiles: int) -> tuple[_Ring, _Ring]:
  """Rings of keys with their ranks and of values, beside `tiles` tiles for each reader."""
  slots = _slots(tiles * readers * _ROWS * size, 2 * block_k * size)
  return (_Ring.of(slots, readers, _tile(block_k, size), plgpu.SMEM((block_k,), jnp.int32)),
          _Ring.of(slots, readers, _tile(block_k, size)))


def _slots(fixed: int, slot: int) -> int:
  """How many slots of so many bfloat16 numbers fit, beside what is fixed."""
  return min(_MOST_SLOTS, (_SHARED_BYTES // 2 - fixed) // slot)


def _fetch_keys(row: _Row, work: Any, kv_head: Array, k: _Ref, v: _Ref, ranks_k: _Ref,
                keys: _Ring, values: _Ring) -> None:
  """Feeds the rings with the blocks of a row of queries."""
  width = keys.buffers[0].shape[1]

  def step(index: Array, column: Array) -> Array:
    tokens = pl.ds(column * width, width)
    keys.fill(index, k.at[row.sample, tokens, kv_head], ranks_k.at[row.sample, tokens])
    values.fill(index, v.at[row.sample, tokens, kv_head])
    return row.column(work, index + 1)  # in advance, since global memory is slow

  lax.fori_loop(0, row.count, step, row.column(work, jnp.int32(0)))
  keys.drain(row.count)
  values.drain(row.count)


def _few_registers(warpgroups: int) -> None:
  if warpgroups > 1:
    plgpu.set_max_registers(24, action="decrease")


def _many_registers(warpgroups: int) -> None:
  if warpgroups > 1:
    plgpu.set_max_registers(240, action="increase")


def _of_rows(ref: _Ref) -> Array:
  """Loads one number for each row of a product."""
  return plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA.reduce(1))


def _of_columns(ref: _Ref) -> Array:
  """Loads one number for each column of a product."""
  return plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA.reduce(0))


def _along(x: Array, shape: tuple[int, ...], axis: int) -> Array:
  return lax.broadcast_in_dim(x, shape, (axis,))


def _visible(queries: Any, keys: Array, shape: tuple[int, ...], query_axis: int) -> Array:
  """`mask.visible` for ranks in registers."""
  a, lo, hi = (_along(x, shape, query_axis) for x in queries)
  key = _along(keys, shape, 1 - query_axis)
  return (key <= a) | ((lo <= key) & (key <= hi))


def _padded(x: Array, block: int) -> Array:
  extra = -x.shape[1] % block
  return jnp.pad(x, [(0, 0), (0, extra), (0, 0), (0, 0)]) if extra else x


def _stacked(ranks: mask.Ranks, block: int) -> Array:
  """Ranks of queries as [B, 3, L], L whole blocks."""
  ranks = mask.pad(ranks, block)
  return jnp.stack([ranks.a, ranks.lo, ranks.hi], axis=1)


def _order(work: blocks.Worklist) -> Array:
  """The rows, in the order to start them: none that takes long is left for the end."""
  return jnp.argsort(work.starts[:-1] - work.starts[1:]).astype(jnp.int32)


def _over_blocks(full: Array, end: Array, block: Callable[..., Any], carry: Any,
                 start: Array | int = 1) -> Any:
  """Runs `block` over the steps from `start` to `end`, without predicate up to `full`."""
  start = jnp.int32(start)
  full = lax.max(start, full)
  carry = lax.fori_loop(start, full, functools.partial(block, masked=False), carry)
  return lax.fori_loop(full, end, functools.partial(block, masked=True), carry)


def _now(x: Array) -> Array:
  """`x`, no earlier than what is above: registers that products read must not change before."""
  return lax.optimization_barrier(x)


def _scale(q: _Ref) -> float:
  """Of the scores, for exponents of base 2."""
  return q.shape[1]**-0.5 * math.log2(math.e)


attend = gradient.differentiable(_forward, _backward)
