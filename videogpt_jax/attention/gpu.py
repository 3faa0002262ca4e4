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
from videogpt_jax.attention import hopper

HEAD_SIZES = (64, 96, 128)
BLOCKS = (64, 128)

_UNSEEN = -1e20  # maximum of a row that has seen nothing: finite, or it would make NaN
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


class _Inputs(NamedTuple):
  """What the kernels read; lengths are whole blocks."""

  q: Any  # [B, Lq, H, E]
  k: Any  # [B, Lk, G, E]
  v: Any  # [B, Lk, G, E]
  ranks_q: Any  # [B, 3, Lq]: a, lo, hi
  ranks_k: Any  # [B, Lk]
  grad: Any = None  # [B, Lq, H, E]
  stats: Any = None  # [B, H, 2, Lq]: log-sum-exp, and sum of grad * out

  @classmethod
  def of(cls, q: Array, k: Array, v: Array, ranks_q: mask.Ranks, ranks_k: mask.Ranks,
         block_map: blocks.BlockMap) -> "_Inputs":
    block_q, block_k = block_map.block_q, block_map.block_k
    if not {block_q, block_k} <= set(BLOCKS):
      raise ValueError(f"attention 'gpu' has no kernel for blocks of {block_q} x {block_k}: both "
                       f"must be among {', '.join(map(str, BLOCKS))}")
    ranks_q = mask.pad(ranks_q, block_q)
    return cls(_padded(q, block_q), _padded(k, block_k), _padded(v, block_k),
               jnp.stack([ranks_q.a, ranks_q.lo, ranks_q.hi], axis=1),
               mask.pad(ranks_k, block_k).key)


# Forward --------------------------------------------------------------------------------


def _forward(
    q: Float[Array, "B Lq H E"],
    k: Float[Array, "B Lk G E"],
    v: Float[Array, "B Lk G E"],
    ranks_q: mask.Ranks,
    ranks_k: mask.Ranks,
    block_map: blocks.BlockMap,
) -> tuple[Float[Array, "B Lq H E"], Float[Array, "B H Lq"]]:
  """Output, and log-sum-exp of base 2 of the queries padded to whole blocks."""
  inputs = _Inputs.of(q, k, v, ranks_q, ranks_k, block_map)
  batch, length, heads, size = inputs.q.shape
  warpgroups = block_map.block_q // hopper.ROWS
  out, lse = hopper.launch(
      _forward_kernel, inputs, block_map.by_query, heads, warpgroups,
      loaded=(hopper.tile(hopper.ROWS, size), plgpu.SMEM((3, hopper.ROWS), jnp.int32)),
      staged=(plgpu.SMEM((hopper.ROWS,), jnp.float32),),
      rings=_key_rings(block_map.block_k, size, warpgroups, tiles=1, least=2),
      outputs=(jax.ShapeDtypeStruct(inputs.q.shape, q.dtype),
               jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)))
  return out[:, :q.shape[1]], lse


def _forward_kernel(inputs: _Inputs, work: _Ref, out: _Ref, lse: _Ref,
                    memory: hopper.Memory) -> None:
  keys, values = memory.rings

  def compute(row: hopper.Row, head: Array, tokens: Any, own: hopper.Own) -> None:
    own.load(inputs.q.at[row.sample, tokens, head], inputs.ranks_q.at[row.sample, :, tokens])
    q, ranks, stat = own.tiles
    results = pl.run_scoped(
        functools.partial(_attend, row, ranks, q, keys, values, own.turns), plgpu.ACC(q.shape))
    hopper.store(results, (q, stat),
                 (out.at[row.sample, tokens, head], lse.at[row.sample, head, tokens]))

  hopper.specialize(work, memory, inputs.k.shape[1],
                    functools.partial(_fetch_keys, inputs, keys, values), compute)


def _attend(row: hopper.Row, ranks: _Ref, q: _Ref, keys: hopper.Ring, values: hopper.Ring,
            turns: hopper.Turns, out: _Ref) -> tuple[Array, Array]:
  """64 queries over the blocks of their row; the softmax trails the scores by one block."""
  shape = (hopper.ROWS, keys.buffers[0].shape[1])
  scale = _scale(q)
  queries = tuple(hopper.of_rows(ranks.at[i]) for i in range(3))

  def scores_of(step: Array, masked: bool, update: Callable[[], None] | None = None) -> Array:
    """Scores of block `step`; `update`, the product issued after them, still runs."""
    def issue(scores: _Ref) -> Array:
      k, key_ranks = keys.wait(step)
      plgpu.wgmma(scores, q, k.transpose((1, 0)))
      if update:
        update()
      turns.pass_on()
      result = plgpu.wgmma_accumulator_load(scores, wait_n=1 if update else 0)
      if masked:
        visible = _visible(queries, hopper.of_columns(key_ranks), shape, query_axis=0)
        result = jnp.where(visible, result, -jnp.inf)
      keys.release(step)
      return result
    return pl.run_scoped(issue, plgpu.ACC(shape))

  def softmax(scores: Array, peak: Array, total: Array) -> tuple[Array, ...]:
    new_peak = jnp.maximum(peak, scores.max(axis=1) * scale)
    decay = jnp.exp2(peak - new_peak)
    weights = jnp.exp2(scores * scale - hopper.along(new_peak, shape, 0))
    return weights, decay, new_peak, total * decay + weights.sum(axis=1)

  def block(step: Array, carry: tuple[Array, ...], masked: bool) -> tuple[Array, ...]:
    weights, peak, total = carry

    def update() -> None:
      v, = values.wait(step - 1)
      plgpu.wgmma(out, weights, v)

    scores = scores_of(step, masked, update)
    weights, decay, peak, total = softmax(scores, peak, total)
    turns.wait()
    plgpu.wgmma_wait(0)
    values.release(step - 1)
    out[...] = out[...] * hopper.along(decay, out.shape, 0)
    return hopper.now(weights).astype(q.dtype), peak, total

  turns.open()
  nothing = plgpu.layout_cast(jnp.full((hopper.ROWS,), 0.0), plgpu.Layout.WGMMA.reduce(1))
  weights, _, peak, total = softmax(scores_of(jnp.int32(0), True), nothing + _UNSEEN, nothing)
  turns.wait()
  weights, peak, total = _over_blocks(
      row.full, row.steps, block, (weights.astype(q.dtype), peak, total))
  v, = values.wait(row.steps - 1)
  plgpu.wgmma(out, weights, v)
  turns.close()
  total = jnp.where(total > 0, total, 1.0)
  result = out[...] * hopper.along(1 / total, out.shape, 0)
  values.release(row.steps - 1)
  return result, peak + jnp.log(total) * math.log2(math.e)


# Backward -------------------------------------------------------------------------------


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
  delta = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
  delta = jnp.swapaxes(_padded(delta, block_map.block_q), 1, 2)
  inputs = _Inputs.of(q, k, v, ranks_q, ranks_k, block_map)._replace(
      grad=_padded(grad, block_map.block_q), stats=jnp.stack([lse, delta], axis=2))
  like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
  size, ranks = q.shape[3], lambda *shape: plgpu.SMEM((*shape, hopper.ROWS), jnp.int32)
  tile, stats = hopper.tile(hopper.ROWS, size), plgpu.SMEM((2, hopper.ROWS), jnp.float32)

  warpgroups = block_map.block_q // hopper.ROWS
  width = block_map.block_k if size <= _WIDE else hopper.ROWS
  dq, = hopper.launch(
      _query_gradient_kernel, inputs, block_map.by_query, q.shape[2], warpgroups,
      loaded=(tile, tile, stats, ranks(3)),
      rings=_key_rings(width, size, warpgroups, tiles=2, least=3),
      outputs=(like(inputs.q),))

  warpgroups = block_map.block_k // hopper.ROWS
  slots = hopper.slots(2 * block_map.block_k * size, 2 * hopper.ROWS * size, least=3)
  dk, dv = hopper.launch(
      _key_gradients_kernel, inputs, block_map.by_key, k.shape[2], warpgroups,
      loaded=(tile, tile, ranks()),
      rings=(hopper.Ring.of(slots, warpgroups, tile, tile, stats, ranks(3)),),
      outputs=(like(inputs.k), like(inputs.v)))
  return dq[:, :q.shape[1]], dk[:, :k.shape[1]], dv[:, :k.shape[1]]


def _query_gradient_kernel(inputs: _Inputs, work: _Ref, dq: _Ref,
                           memory: hopper.Memory) -> None:
  keys, values = memory.rings

  def compute(row: hopper.Row, head: Array, tokens: Any, own: hopper.Own) -> None:
    own.load(*(x.at[row.sample, tokens, head] for x in (inputs.q, inputs.grad)),
             inputs.stats.at[row.sample, head, :, tokens],
             inputs.ranks_q.at[row.sample, :, tokens])
    q, grad, stats, ranks = own.tiles
    result = pl.run_scoped(
        functools.partial(_differentiate_row, row, q, grad, stats, ranks, keys, values, own.turns),
        plgpu.ACC(q.shape))
    hopper.store((result,), (q,), (dq.at[row.sample, tokens, head],))

  hopper.specialize(work, memory, inputs.k.shape[1],
                    functools.partial(_fetch_keys, inputs, keys, values), compute)


def _differentiate_row(row: hopper.Row, q: _Ref, grad: _Ref, stats: _Ref, ranks: _Ref,
                       keys: hopper.Ring, values: hopper.Ring, turns: hopper.Turns,
                       dq: _Ref) -> Array:
  """dq of 64 queries; the product with the keys trails by one block."""
  shape = (hopper.ROWS, keys.buffers[0].shape[1])

  def d_scores_of(step: Array, masked: bool, update: Callable[[], None] | None = None) -> Array:
    def issue(scores: _Ref, d_weights: _Ref) -> Array:
      (k, key_ranks), (v,) = keys.wait(step), values.wait(step)
      plgpu.wgmma(scores, q, k.transpose((1, 0)))
      plgpu.wgmma(d_weights, grad, v.transpose((1, 0)))
      if update:
        update()
      turns.pass_on()
      later = 1 if update else 0
      lse, delta = (hopper.along(hopper.of_rows(stats.at[i]), shape, 0) for i in range(2))
      weights = jnp.exp2(plgpu.wgmma_accumulator_load(scores, wait_n=1 + later) * _scale(q) - lse)
      result = plgpu.wgmma_accumulator_load(d_weights, wait_n=later)
      values.release(step)
      result = weights * (result - delta)
      if masked:
        queries = tuple(hopper.of_rows(ranks.at[i]) for i in range(3))
        visible = _visible(queries, hopper.of_columns(key_ranks), shape, query_axis=0)
        result = jnp.where(visible, result, 0.0)
      return result
    return pl.run_scoped(issue, plgpu.ACC(shape), plgpu.ACC(shape))

  def block(step: Array, d_scores: Array, masked: bool) -> Array:
    update = lambda: plgpu.wgmma(dq, d_scores, keys.read(step - 1)[0])
    new = d_scores_of(step, masked, update)
    turns.wait()
    plgpu.wgmma_wait(0)
    keys.release(step - 1)
    return hopper.now(new).astype(q.dtype)

  turns.open()
  d_scores = d_scores_of(jnp.int32(0), masked=True).astype(q.dtype)
  turns.wait()
  d_scores = _over_blocks(row.full, row.steps, block, d_scores)
  plgpu.wgmma(dq, d_scores, keys.read(row.steps - 1)[0])
  turns.close()
  result = dq[...] * q.shape[1]**-0.5
  keys.release(row.steps - 1)
  return result


def _key_gradients_kernel(inputs: _Inputs, work: _Ref, dk: _Ref, dv: _Ref,
                          memory: hopper.Memory) -> None:
  """A block of queries is visited in chunks of 64: two accumulators leave no more registers."""
  group = inputs.q.shape[2] // inputs.k.shape[2]
  ring, = memory.rings

  def fetch(row: hopper.Row, kv_head: Array) -> None:
    def step(index: Array, column: Array) -> Array:
      head = kv_head * group + lax.div(index, row.steps)
      tokens = pl.ds(column * hopper.ROWS, hopper.ROWS)
      ring.fill(index, *(x.at[row.sample, tokens, head] for x in (inputs.q, inputs.grad)),
                inputs.stats.at[row.sample, head, :, tokens],
                inputs.ranks_q.at[row.sample, :, tokens])
      return row.column(lax.rem(index + 1, row.steps))

    lax.fori_loop(0, group * row.steps, step, row.column(jnp.int32(0)))
    ring.drain(group * row.steps)

  def compute(row: hopper.Row, kv_head: Array, tokens: Any, own: hopper.Own) -> None:
    own.load(*(x.at[row.sample, tokens, kv_head] for x in (inputs.k, inputs.v)),
             inputs.ranks_k.at[row.sample, tokens])
    accumulator = plgpu.ACC(own.tiles[0].shape)
    k, v, ranks = own.tiles
    results = pl.run_scoped(
        functools.partial(_differentiate_column, row, group, k, v, ranks, ring, own.turns),
        accumulator, accumulator)
    hopper.store(results, own.tiles[:2], [x.at[row.sample, tokens, kv_head] for x in (dk, dv)])

  hopper.specialize(work, memory, inputs.q.shape[1], fetch, compute)


def _differentiate_column(row: hopper.Row, group: int, k: _Ref, v: _Ref, key_ranks: _Ref,
                          ring: hopper.Ring, turns: hopper.Turns, dk: _Ref, dv: _Ref
                          ) -> tuple[Array, Array]:
  """dk and dv of 64 keys, all transposed; the products with the queries trail by one chunk."""
  shape = (hopper.ROWS, hopper.ROWS)

  def weights_of(step: Array, masked: bool, update: Callable[[], None] | None = None
                 ) -> tuple[Array, Array]:
    """Weights and the gradient of the scores of chunk `step`."""
    def issue(scores: _Ref, d_weights: _Ref) -> tuple[Array, Array]:
      q, grad, stats, ranks = ring.wait(step)
      plgpu.wgmma(scores, k, q.transpose((1, 0)))
      plgpu.wgmma(d_weights, v, grad.transpose((1, 0)))
      if update:
        update()
      turns.pass_on()
      later = 2 if update else 0
      weights = plgpu.wgmma_accumulator_load(scores, wait_n=1 + later) * _scale(k)
      weights = jnp.exp2(weights - hopper.along(hopper.of_columns(stats.at[0]), shape, 1))
      if masked:
        queries = tuple(hopper.of_columns(ranks.at[i]) for i in range(3))
        visible = _visible(queries, hopper.of_rows(key_ranks), shape, query_axis=1)
        weights = jnp.where(visible, weights, 0.0)
      d_scores = plgpu.wgmma_accumulator_load(d_weights, wait_n=later)
      d_scores = weights * (d_scores - hopper.along(hopper.of_columns(stats.at[1]), shape, 1))
      if masked:  # what is not visible may be infinite
        d_scores = jnp.where(weights > 0, d_scores, 0.0)
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
    found = weights_of(step, masked, (lambda: add(step - 1, *carry)) if carry else None)
    if carry:
      turns.wait()
      finish(step - 1)
      return tuple(hopper.now(x).astype(k.dtype) for x in found)
    add(step, *(x.astype(k.dtype) for x in found))
    finish(step)
    turns.wait()
    return ()

  def head(index: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
    first = index * row.steps
    return _over_blocks(first + row.full, first + row.steps, chunk, carry,
                        lax.max(first, jnp.int32(1)) if carry else first)

  turns.open()
  carry: tuple[Array, ...] = ()
  if k.shape[1] <= _WIDE:
    carry = tuple(x.astype(k.dtype) for x in weights_of(jnp.int32(0), masked=True))
    turns.wait()
  carry = lax.fori_loop(0, group, head, carry)
  if carry:
    last = group * row.steps - 1
    add(last, *carry)
    finish(last)
  turns.close()
  return dk[...] * k.shape[1]**-0.5, dv[...]


# Shared by the kernels --------------------------------------------------------------------


def _fetch_keys(inputs: _Inputs, keys: hopper.Ring, values: hopper.Ring, row: hopper.Row,
                head: Array) -> None:
  """Feeds the rings with the keys and values of a row of queries."""
  width = keys.buffers[0].shape[1]
  kv_head = lax.div(head, jnp.int32(inputs.q.shape[2] // inputs.k.shape[2]))

  def step(index: Array, column: Array) -> Array:
    tokens = pl.ds(column * width, width)
    keys.fill(index, inputs.k.at[row.sample, tokens, kv_head],
              inputs.ranks_k.at[row.sample, tokens])
    values.fill(index, inputs.v.at[row.sample, tokens, kv_head])
    return row.column(index + 1)  # in advance, since global memory is slow

  lax.fori_loop(0, row.steps, step, row.column(jnp.int32(0)))
  keys.drain(row.steps)
  values.drain(row.steps)


def _key_rings(width: int, size: int, readers: int, tiles: int, least: int
               ) -> tuple[hopper.Ring, hopper.Ring]:
  """Rings of keys with their ranks and of values, beside `tiles` tiles for each reader."""
  slots = hopper.slots(tiles * readers * hopper.ROWS * size, 2 * width * size, least)
  tile, ranks = hopper.tile(width, size), plgpu.SMEM((width,), jnp.int32)
  return hopper.Ring.of(slots, readers, tile, ranks), hopper.Ring.of(slots, readers, tile)


def _visible(queries: Any, keys: Array, shape: tuple[int, ...], query_axis: int) -> Array:
  """`mask.visible` for ranks in registers."""
  a, lo, hi = (hopper.along(x, shape, query_axis) for x in queries)
  key = hopper.along(keys, shape, 1 - query_axis)
  return (key <= a) | ((lo <= key) & (key <= hi))


def _padded(x: Array, block: int) -> Array:
  extra = -x.shape[1] % block
  return jnp.pad(x, [(0, 0), (0, extra), *[(0, 0)] * (x.ndim - 2)]) if extra else x


def _over_blocks(full: Array, end: Array, block: Callable[..., Any], carry: Any,
                 start: Array | int = 1) -> Any:
  """Runs `block` over the steps from `start` to `end`, without predicate up to `full`."""
  start = jnp.int32(start)
  full = lax.max(start, full)
  carry = lax.fori_loop(start, full, functools.partial(block, masked=False), carry)
  return lax.fori_loop(full, end, functools.partial(block, masked=True), carry)


def _scale(q: _Ref) -> float:
  """Of the scores, for exponents of base 2."""
  return q.shape[1]**-0.5 * math.log2(math.e)


attend = gradient.differentiable(_forward, _backward)
