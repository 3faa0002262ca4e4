"""Block-sparse flash attention for TPU, with the mask inside (Pallas, Mosaic).

The grid is (heads, live blocks): its second axis walks a worklist of the block map, as long
as the partitions at hand make it, so dead blocks cost nothing, not even a grid step. A
full block skips the predicate; a partial one compares four integers.

Scores are kept transposed, keys by queries, everywhere: then all that belongs to a query
(running maximum, sum, log-sum-exp, delta, bounds of its ranks) is a row along the lanes,
reductions over keys run over sublanes, and queries lie sequence-minor `[E, block]`, where
head sizes below 128 waste no lanes.

Forward: Dao, FlashAttention-2 (arXiv 2307.08691), algorithm 1. Backward: one pass over the
key-major list for dq, dk and dv, five products a block; dq of a whole head stays in VMEM
meanwhile. Where it does not fit, dq has a pass of its own over the query-major list.
"""

from collections.abc import Callable
import functools
import math
from typing import Any

import jax
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from videogpt_jax import mask
from videogpt_jax.attention import blocks
from videogpt_jax.attention import gradient
from videogpt_jax.attention import numerics

_DQ_BYTES = 36 * 2**20  # VMEM that the gradient of a head's queries may take, two buffers of it
_VMEM_BYTES = 60 * 2**20  # the smallest of v5e, v5p, v6e and v7 has 64 MiB
_SMEM_BYTES = 900 * 2**10  # of 1 MiB; the worklist lives there

_Inputs = tuple[Float[Array, "B Lq H E"], Float[Array, "B Lk G E"], Float[Array, "B Lk G E"],
                mask.Ranks, mask.Ranks, blocks.BlockMap]


def problem(head_size: int, dtype: Any) -> str:
  """Why the kernels do not serve such heads; empty if they do."""
  if head_size % 32 or head_size > 256:
    return f"head size {head_size} is not a multiple of 32 up to 256"
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32):
    return f"the type {jnp.dtype(dtype)} is neither bfloat16 nor float32"
  return ""


# Blocks -----------------------------------------------------------------------------------


class _Step:
  """Where a grid step stands in its worklist."""

  def __init__(self, work: blocks.Worklist, entries: Any) -> None:
    step, steps = pl.program_id(1), pl.num_programs(1)
    place = lambda index: work.unpack(entries[index])
    sample, row, self.column, self.full = place(step)
    before, after = place(jnp.maximum(step - 1, 0)), place(jnp.minimum(step + 1, steps - 1))
    differs = lambda other: (other[0] != sample) | (other[1] != row)
    self.first = (step == 0) | differs(before)
    self.last = (step == steps - 1) | differs(after)
    self.first_of_sample = (step == 0) | (before[0] != sample)


def _scores(k: Float[Array, "bk E"], q: Float[Array, "E bq"]) -> Float[Array, "bk bq"]:
  """Scores in base 2: exp2 of their differences are the softmax's weights."""
  return _product(k, q) * (math.log2(math.e) * q.shape[0]**-0.5)


def _visible(bounds: Int[Array, "3 bq"], rank: Int[Array, "1 bk"]) -> Bool[Array, "bk bq"]:
  """The predicate of a block. Key ranks come as a row (a column would fill 128 lanes)."""
  column = jnp.broadcast_to(rank, (128, rank.shape[1])).T[:, :1]
  a, lo, hi = bounds[0:1], bounds[1:2], bounds[2:3]
  return (column <= a) | ((lo <= column) & (column <= hi))


def _product(a: Array, b: Array, contract: tuple[int, int] = (1, 0)) -> Array:
  """Product over the given axes, in float32."""
  return lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())),
                         precision=numerics.precision(a.dtype),
                         preferred_element_type=jnp.float32)


def _with_scores(step: _Step, k: Any, q: Any, bounds: Any, rank: Any,
                 use: Callable[[Array], None]) -> None:
  """Calls `use` with the block's scores, masked only where it is partial."""
  pl.when(step.full)(lambda: use(_scores(k[...], q[...])))

  @pl.when(~step.full)
  def _() -> None:
    use(jnp.where(_visible(bounds[...], rank[...]), _scores(k[...], q[...]), numerics.MASKED))


# Kernels ----------------------------------------------------------------------------------


def _forward_kernel(work: blocks.Worklist, entries: Any, q: Any, k: Any, v: Any, bounds: Any,
                    rank: Any, out: Any, lse: Any, acc: Any, peak: Any, total: Any) -> None:
  """One live block: q [E, bq], k [bk, E], v [E, bk]; acc [E, bq], peak and total [1, bq]."""
  step = _Step(work, entries)

  @pl.when(step.first)
  def _() -> None:
    acc[...] = jnp.zeros_like(acc)
    peak[...] = jnp.full_like(peak, numerics.MASKED / 2)
    total[...] = jnp.zeros_like(total)

  def use(scores: Float[Array, "bk bq"]) -> None:
    new_peak = jnp.maximum(peak[...], scores.max(0, keepdims=True))
    weights = jnp.exp2(scores - new_peak)
    decay = jnp.exp2(peak[...] - new_peak)
    total[...] = total[...] * decay + weights.sum(0, keepdims=True)
    acc[...] = acc[...] * decay + _product(v[...], weights.astype(v.dtype))
    peak[...] = new_peak

  _with_scores(step, k, q, bounds, rank, use)

  @pl.when(step.last)
  def _() -> None:
    seen = jnp.where(total[...] > 0, total[...], 1.0)
    out[...] = (acc[...] / seen).astype(out.dtype)
    lse[...] = peak[...] + jnp.log2(seen)


def _dkv_kernel(work: blocks.Worklist, with_dq: bool, entries: Any, q: Any, grad: Any, k: Any,
                k_minor: Any, v: Any, lse: Any, delta: Any, bounds: Any, rank: Any,
                *outputs: Any) -> None:
  """One live block of the key-major list: q, grad, k_minor [E, b]; k, v [bk, E].

  dk and dv [bk, E] grow in scratch; dq [E, Lq], all queries of the sample, in its output.
  """
  (*dq, dk, dv, dk_acc, dv_acc) = outputs
  step = _Step(work, entries)
  if with_dq:
    pl.when(step.first_of_sample)(lambda: dq[0].__setitem__(..., jnp.zeros_like(dq[0])))

  @pl.when(step.first)
  def _() -> None:
    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)

  def use(scores: Float[Array, "bk bq"]) -> None:
    weights = jnp.exp2(scores - lse[...])
    dv_acc[...] += _product(weights.astype(grad.dtype), grad[...], (1, 1))
    d_scores = (weights * (_product(v[...], grad[...]) - delta[...])).astype(q.dtype)
    dk_acc[...] += _product(d_scores, q[...], (1, 1))
    if with_dq:
      size = q.shape[1]
      here = pl.ds(pl.multiple_of(step.column * size, size), size)
      dq[0][:, here] += _product(k_minor[...], d_scores)

  _with_scores(step, k, q, bounds, rank, use)

  @pl.when(step.last)
  def _() -> None:
    dk[...] = (dk_acc[...] * q.shape[0]**-0.5).astype(dk.dtype)
    dv[...] = dv_acc[...].astype(dv.dtype)


def _dq_kernel(work: blocks.Worklist, entries: Any, q: Any, grad: Any, k: Any, k_minor: Any,
               v: Any, lse: Any, delta: Any, bounds: Any, rank: Any, dq: Any, acc: Any) -> None:
  """One live block of the query-major list: dq [E, bq] grows in scratch."""
  step = _Step(work, entries)
  pl.when(step.first)(lambda: acc.__setitem__(..., jnp.zeros_like(acc)))

  def use(scores: Float[Array, "bk bq"]) -> None:
    weights = jnp.exp2(scores - lse[...])
    d_scores = weights * (_product(v[...], grad[...]) - delta[...])
    acc[...] += _product(k_minor[...], d_scores.astype(q.dtype))

  _with_scores(step, k, q, bounds, rank, use)
  pl.when(step.last)(lambda: dq.__setitem__(..., acc[...]))


# Calls ------------------------------------------------------------------------------------


class _Specs:
  """Block specs over a worklist, by what the arrays look like."""

  def __init__(self, work: blocks.Worklist, rows_are_queries: bool, block_map: blocks.BlockMap,
               group: int) -> None:
    def place(step: Array, entries: Any) -> tuple[Array, Array, Array]:
      sample, row, column, _ = work.unpack(entries[step])
      return (sample, row, column) if rows_are_queries else (sample, column, row)

    q_at = lambda h, s, e: place(s, e)[1]
    k_at = lambda h, s, e: place(s, e)[2]
    sample = lambda s, e: place(s, e)[0]
    self._make = functools.partial(self._spec, sample)
    self._q, self._k = (block_map.block_q, q_at), (block_map.block_k, k_at)
    self._group = group

  @staticmethod
  def _spec(sample: Any, block: tuple[int, Any], rows: int, group: int | None, minor: bool
            ) -> pl.BlockSpec:
    size, at = block
    lead = (None,) if group is None else (None, None)
    head = lambda h: () if group is None else (h if group == 1 else lax.div(h, jnp.int32(group)),)
    if minor:  # the sequence is the last axis
      return pl.BlockSpec((*lead, rows, size), lambda h, s, e: (sample(s, e), *head(h), 0,
                                                                at(h, s, e)))
    return pl.BlockSpec((*lead, size, rows), lambda h, s, e: (sample(s, e), *head(h),
                                                              at(h, s, e), 0))

  def query(self, rows: int) -> pl.BlockSpec:
    """Of [B, H, rows, Lq]."""
    return self._make(self._q, rows, 1, True)

  def key(self, size: int, *, of_query_head: bool = False) -> pl.BlockSpec:
    """Of [B, G, Lk, size], or of [B, H, Lk, size]."""
    return self._make(self._k, size, 1 if of_query_head else self._group, False)

  def key_minor(self, rows: int) -> pl.BlockSpec:
    """Of [B, G, rows, Lk]."""
    return self._make(self._k, rows, self._group, True)

  def bounds(self) -> pl.BlockSpec:
    """Of [B, 3, Lq]."""
    return self._make(self._q, 3, None, True)

  def rank(self) -> pl.BlockSpec:
    """Of [B, 1, Lk]."""
    return self._make(self._k, 1, None, True)


def _call(kernel: Any, name: str, work: blocks.Worklist, heads: int, in_specs: Any, out_specs: Any,
          out_shape: Any, scratch: Any) -> Callable[..., Any]:
  """The pallas_call over heads and the worklist's live entries."""
  if 4 * work.entries.size > _SMEM_BYTES:
    raise ValueError(
        f"attention 'tpu': {work.entries.size} blocks a device do not fit its scalar memory of "
        f"{_SMEM_BYTES >> 10} KiB: choose larger blocks or fewer samples a device")
  grid = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=1, grid=(heads, work.starts[-1]), in_specs=in_specs,
      out_specs=out_specs, scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch])
  call = pl.pallas_call(
      kernel, grid_spec=grid, out_shape=out_shape, name=name,
      compiler_params=pltpu.CompilerParams(
          dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES))
  return functools.partial(call, work.entries)


def _forward(*inputs: Any) -> tuple[Float[Array, "B Lq H E"], Float[Array, "B H 1 Lq"]]:
  """Output and log-sum-exp (base 2, padded to whole blocks)."""
  q, k, v, ranks_q, ranks_k, block_map = inputs
  batch, length, heads, size = q.shape
  block_q, block_k, work = block_map.block_q, block_map.block_k, block_map.by_query
  bounds, rank = _rank_rows(ranks_q, ranks_k, block_map)
  q, k, v = _minor(q, block_q), _major(k, block_k), _minor(v, block_k)
  specs = _Specs(work, True, block_map, heads // k.shape[1])
  padded = q.shape[-1]
  run = _call(
      functools.partial(_forward_kernel, work), "attention_forward", work, heads,
      [specs.query(size), specs.key(size), specs.key_minor(size), specs.bounds(), specs.rank()],
      [specs.query(size), specs.query(1)],
      [jax.ShapeDtypeStruct((batch, heads, size, padded), q.dtype),
       jax.ShapeDtypeStruct((batch, heads, 1, padded), jnp.float32)],
      [(size, block_q), (1, block_q), (1, block_q)])
  out, lse = run(q, k, v, bounds, rank)
  return _from_minor(out, length), lse


def _backward(q: Array, k: Array, v: Array, ranks_q: mask.Ranks, ranks_k: mask.Ranks,
              block_map: blocks.BlockMap, out: Array, lse: Array, grad: Array
              ) -> tuple[Array, Array, Array]:
  length_q, length_k, types = q.shape[1], k.shape[1], (q.dtype, k.dtype, v.dtype)
  batch, _, heads, size = q.shape
  block_q, block_k = block_map.block_q, block_map.block_k
  bounds, rank = _rank_rows(ranks_q, ranks_k, block_map)
  delta = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
  group = heads // k.shape[2]
  arrays = (_minor(q, block_q), _minor(grad.astype(q.dtype), block_q), _major(k, block_k),
            _minor(k, block_k), _major(v, block_k), lse, _minor(delta, block_q), bounds, rank)
  padded_q, padded_k = arrays[0].shape[-1], arrays[2].shape[-2]

  def ins(specs: _Specs) -> list[pl.BlockSpec]:
    return [specs.query(size), specs.query(size), specs.key(size), specs.key_minor(size),
            specs.key(size), specs.query(1), specs.query(1), specs.bounds(), specs.rank()]

  with_dq = 8 * size * padded_q <= _DQ_BYTES
  dq_shape = jax.ShapeDtypeStruct((batch, heads, size, padded_q), jnp.float32)
  work = block_map.by_key
  specs = _Specs(work, False, block_map, group)
  whole = pl.BlockSpec((None, None, size, padded_q), lambda h, s, e: (
      work.unpack(e[s])[0], h, 0, 0))
  # Query heads that share a key/value head are summed up afterwards, so in float32.
  dkv_shape = lambda dtype: jax.ShapeDtypeStruct(
      (batch, heads, padded_k, size), dtype if group == 1 else jnp.float32)
  run = _call(
      functools.partial(_dkv_kernel, work, with_dq), "attention_backward", work, heads, ins(specs),
      [*([whole] if with_dq else []), *[specs.key(size, of_query_head=True)] * 2],
      [*([dq_shape] if with_dq else []), dkv_shape(types[1]), dkv_shape(types[2])],
      [(block_k, size)] * 2)
  *dq, dk, dv = run(*arrays)
  if not with_dq:
    work = block_map.by_query
    specs = _Specs(work, True, block_map, group)
    dq = [_call(functools.partial(_dq_kernel, work), "attention_backward_dq", work, heads,
                ins(specs), specs.query(size), dq_shape, [(size, block_q)])(*arrays)]
  dk, dv = (_from_major(x, length_k, group).astype(dtype)
            for x, dtype in ((dk, types[1]), (dv, types[2])))
  return _from_minor(dq[0] * size**-0.5, length_q).astype(types[0]), dk, dv


attend = gradient.differentiable(_forward, _backward)


# Layouts ----------------------------------------------------------------------------------


def _pad(x: Float[Array, "B L H E"], block: int) -> Float[Array, "B Lp H E"]:
  return jnp.pad(x, [(0, 0), (0, -x.shape[1] % block), (0, 0), (0, 0)])


def _minor(x: Float[Array, "B L H E"], block: int) -> Float[Array, "B H E Lp"]:
  return _pad(x, block).transpose(0, 2, 3, 1)


def _major(x: Float[Array, "B L H E"], block: int) -> Float[Array, "B H Lp E"]:
  return _pad(x, block).transpose(0, 2, 1, 3)


def _from_minor(x: Float[Array, "B H E Lp"], length: int) -> Float[Array, "B L H E"]:
  return x[..., :length].transpose(0, 3, 1, 2)


def _from_major(x: Float[Array, "B H Lp E"], length: int, group: int) -> Float[Array, "B L G E"]:
  """Sums the query heads of each key/value head."""
  x = x[:, :, :length].transpose(0, 2, 1, 3)
  if group == 1:
    return x
  return x.reshape(*x.shape[:2], -1, group, x.shape[-1]).sum(3)


def _rank_rows(ranks_q: mask.Ranks, ranks_k: mask.Ranks, block_map: blocks.BlockMap
               ) -> tuple[Int[Array, "B 3 Lq"], Int[Array, "B 1 Lk"]]:
  ranks_q, ranks_k = mask.pad(ranks_q, block_map.block_q), mask.pad(ranks_k, block_map.block_k)
  return jnp.stack([ranks_q.a, ranks_q.lo, ranks_q.hi], axis=1), ranks_k.key[:, None]
