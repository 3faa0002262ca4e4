"""Pieces of a warp-specialised Pallas kernel for Hopper GPUs, for `attention.gpu`.

A block of threads serves one row of a worklist for one head. Its last warpgroup fetches
what the row's entries name into rings of shared memory (TMA); the others compute, 64 rows
of a product each, and take turns to issue their products.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array

from videogpt_jax.attention import blocks

ROWS = 64  # of a wgmma, so of a computing warpgroup

_SHARED_BYTES = 220 << 10  # of 227 KB; the rest is for ranks, sums and barriers
_MOST_SLOTS = 4
_Ref = Any


# Work -------------------------------------------------------------------------------------


class Row(NamedTuple):
  """A row of a worklist, and the steps along it: a block each, or chunks of one."""

  sample: Array
  block: Array  # within the sample
  start: Array  # of its entries
  full: Array  # steps that need no predicate
  steps: Array  # all of them
  chunks: int  # of a block
  work: Any  # blocks.Worklist of references

  def column(self, step: Array) -> Array:
    """The chunk, counted within the sample, that a step visits; past the end, the last."""
    step, chunks = lax.min(step, self.steps - 1), jnp.int32(self.chunks)
    entry = self.work.entries[self.start + lax.div(step, chunks)]
    return self.work.column(entry) * chunks + lax.rem(step, chunks)


def row_here(work: Any, length: int, width: int) -> Row:
  """The row that this block of threads is for, in steps of `width` of `length` tokens."""
  row = work.longest_first[lax.axis_index("row")]
  rows, chunks, start = jnp.int32(work.rows), length // (work.columns * width), work.starts[row]
  return Row(lax.div(row, rows), lax.rem(row, rows), start,
             (work.partial[row] - start) * chunks, (work.starts[row + 1] - start) * chunks,
             chunks, work)


# Shared memory ----------------------------------------------------------------------------


class Ring(NamedTuple):
  """Slots of shared memory that the fetching warpgroup fills and the others read.

  Steps count the slots' uses from 0; step i has slot i modulo their number.
  """

  buffers: tuple[_Ref, ...]  # [slots, ...] each
  filled: _Ref  # barriers: all copies of a slot have landed
  free: _Ref  # barriers: all readers are done with a slot

  @classmethod
  def of(cls, slots: int, readers: int, *tiles: Any) -> "Ring":
    """The types to allocate, from the types of what a slot holds."""
    return cls(tuple(each(slots, tile) for tile in tiles),
               plgpu.Barrier(num_arrivals=len(tiles), num_barriers=slots),
               plgpu.Barrier(num_arrivals=readers, num_barriers=slots))

  def fill(self, step: Array, *sources: _Ref) -> None:
    slot = self._slot(step)
    plgpu.barrier_wait(self.free.at[slot])
    for source, buffer in zip(sources, self.buffers, strict=True):
      plgpu.copy_gmem_to_smem(source, buffer.at[slot], self.filled.at[slot])

  def drain(self, steps: Array) -> None:
    """Waits until everything filled was read."""
    lax.fori_loop(steps, steps + self._count,
                  lambda step, _: plgpu.barrier_wait(self.free.at[self._slot(step)]), None)

  def open(self) -> None:
    """What every reader does first: all slots are free."""
    for slot in range(self._count):
      plgpu.barrier_arrive(self.free.at[slot])

  def wait(self, step: Array) -> tuple[_Ref, ...]:
    plgpu.barrier_wait(self.filled.at[self._slot(step)])
    return self.read(step)

  def read(self, step: Array) -> tuple[_Ref, ...]:
    """What `wait` gave, until `release`."""
    return tuple(buffer.at[self._slot(step)] for buffer in self.buffers)

  def release(self, step: Array) -> None:
    plgpu.barrier_arrive(self.free.at[self._slot(step)])

  @property
  def _count(self) -> int:
    return self.filled.shape[0]

  def _slot(self, step: Array) -> Array:
    return lax.rem(step, jnp.int32(self._count))


class Turns(NamedTuple):
  """Warpgroups issue their products in turn, so that one's softmax meets another's products.

  A step starts with the turn, passes it on when its products are issued, and waits for the
  next one before it waits for products. In that order, for a reason: the compiler moves
  arithmetic past a wait for products, and so out of their shadow, but not past a barrier.
  """

  barriers: _Ref
  warpgroup: Array

  def open(self) -> None:
    """Before the first step: the first warpgroup has the turn."""
    last = self.barriers.shape[0] - 1
    pl.when(self.warpgroup == last)(lambda: plgpu.barrier_arrive(self.barriers.at[0]))
    self.wait()

  def wait(self) -> None:
    plgpu.barrier_wait(self.barriers.at[self.warpgroup])

  def pass_on(self) -> None:
    following = lax.rem(self.warpgroup + 1, jnp.int32(self.barriers.shape[0]))
    plgpu.barrier_arrive(self.barriers.at[following])

  def close(self) -> None:
    """After the last step: the turn goes round once more, so that every arrival was seen."""
    self.pass_on()
    pl.when(self.warpgroup == 0)(self.wait)


def slots(fixed: int, slot: int, least: int) -> int:
  """How many slots of so many bfloat16 numbers fit, beside what is fixed.

  At least three are needed where one is released only after the wait for the next turn: the
  next step's must not depend on it, or the warpgroups would wait for each other.
  """
  count = min(_MOST_SLOTS, (_SHARED_BYTES // 2 - fixed) // slot)
  if count < least:
    raise ValueError(f"shared memory holds {count} slots, the kernel needs {least}")
  return count


def each(count: int, memory: Any) -> Any:
  """The type of `count` pieces of shared memory."""
  return plgpu.SMEM((count, *memory.shape), memory.dtype, transforms=memory.transforms)


def tile(rows: int, size: int) -> Any:
  """A [rows, size] operand of wgmma in shared memory."""
  swizzle = 128 if size % 64 == 0 else 64
  return plgpu.SMEM((rows, size), jnp.bfloat16, transforms=(
      plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle)))


# Registers --------------------------------------------------------------------------------


def of_rows(ref: _Ref) -> Array:
  """Loads one number for each row of a product."""
  return plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA.reduce(1))


def of_columns(ref: _Ref) -> Array:
  """Loads one number for each column of a product."""
  return plgpu.layout_cast(ref[...], plgpu.Layout.WGMMA.reduce(0))


def along(x: Array, shape: tuple[int, ...], axis: int) -> Array:
  """Repeats a vector to `shape`, in which it lies along `axis`."""
  return lax.broadcast_in_dim(x, shape, (axis,))


def now(x: Array) -> Array:
  """`x`, no earlier than what is above: registers that products read must not change before."""
  return lax.optimization_barrier(x)


# Launching --------------------------------------------------------------------------------


class Memory(NamedTuple):
  """Shared memory of a block of threads."""

  tiles: tuple[_Ref, ...]  # [warpgroups, ...]: what each computing warpgroup owns
  loaded: _Ref  # barriers: a warpgroup's tiles have landed
  turns: _Ref  # barriers: a warpgroup may issue
  rings: tuple[Ring, ...]


class Own(NamedTuple):
  """What a computing warpgroup does not share."""

  tiles: tuple[_Ref, ...]
  loaded: _Ref
  turns: Turns

  def load(self, *sources: _Ref) -> None:
    for source, tile in zip(sources, self.tiles, strict=False):  # the staged tiles have none
      plgpu.copy_gmem_to_smem(source, tile, self.loaded)
    plgpu.barrier_wait(self.loaded)


def launch(kernel: Callable[..., None], inputs: Any, work: blocks.Worklist, heads: int,
           warpgroups: int, *, loaded: tuple[Any, ...], staged: tuple[Any, ...] = (),
           rings: tuple[Ring, ...], outputs: tuple[Any, ...]) -> tuple[Array, ...]:
  """Runs a block of threads for each head and row: `warpgroups` that compute, one that fetches.

  Args:
    kernel: of the inputs, the worklist, the outputs and the shared memory.
    inputs: a tree of arrays.
    work: whose rows are to be computed.
    heads: of queries, or of keys.
    warpgroups: that compute.
    loaded: types of the tiles that a warpgroup owns and loads.
    staged: types of those that it only writes.
    rings: types of the rings.
    outputs: types of the outputs.
  """
  memory = Memory(
      tuple(each(warpgroups, tile) for tile in (*loaded, *staged)),
      plgpu.Barrier(num_arrivals=len(loaded), num_barriers=warpgroups),
      plgpu.Barrier(num_barriers=warpgroups), rings)
  return plgpu.kernel(
      kernel, out_type=outputs, scratch_types=(memory,),
      # Rows are the fastest axis: those in flight share a head's keys in the L2 cache.
      grid=(heads, work.partial.size), grid_names=("head", "row"),
      num_threads=warpgroups + 1, thread_name="warpgroup",
      compiler_params=plgpu.CompilerParams(
          approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
  )(inputs, work)


def specialize(work: Any, memory: Memory, length: int,
               fetch: Callable[..., None], compute: Callable[..., None]) -> None:
  """The body of a kernel, by warpgroup.

  Args:
    work: the worklist, of whose rows this block of threads takes one.
    memory: shared memory.
    length: tokens that the row's columns cover.
    fetch: what the last warpgroup does, from the row and the head.
    compute: what the others do, from the row, the head, their tokens and their own memory.
  """
  warpgroup, head = lax.axis_index("warpgroup"), lax.axis_index("head")
  warpgroups = memory.loaded.shape[0]
  width = memory.rings[0].buffers[0].shape[1]

  @pl.when(warpgroup == warpgroups)
  def _() -> None:
    if warpgroups > 1:  # a single one has all the registers that a thread can have
      plgpu.set_max_registers(24, action="decrease")
    fetch(row_here(work, length, width), head)

  @pl.when(warpgroup < warpgroups)
  def _() -> None:
    if warpgroups > 1:  # a single one has all the registers that a thread can have
      plgpu.set_max_registers(240, action="increase")
    for ring in memory.rings:
      ring.open()
    row = row_here(work, length, width)
    tokens = pl.ds((row.block * warpgroups + warpgroup) * ROWS, ROWS)
    tiles = tuple(tile.at[warpgroup] for tile in memory.tiles)
    compute(row, head, tokens, Own(tiles, memory.loaded.at[warpgroup],
                                   Turns(memory.turns, warpgroup)))


def store(values: Any, tiles: Any, targets: Any) -> None:
  """Writes values to global memory, by way of tiles."""
  for value, tile in zip(values, tiles, strict=True):
    tile[...] = value.astype(tile.dtype)
  plgpu.commit_smem()
  for tile, target in zip(tiles, targets, strict=True):
    plgpu.copy_smem_to_gmem(tile, target)
  plgpu.wait_smem_to_gmem(0)
