"""Attention under the hierarchical mask: one entry point, several implementations.

`plan` builds the block map that the chosen implementation wants, once a step; `attend`
runs in every layer. `implementation` is one of `IMPLEMENTATIONS`, or "auto":

  tpu         Pallas kernels for TPU (Mosaic)
  gpu         Pallas kernels for Hopper GPUs (Mosaic GPU), bfloat16
  xla         blockwise in plain XLA: CPU, and whatever no kernel serves
  reference   dense, in float32; "auto" takes it for sequences so short that a loop over
              blocks would only cost

Under a mesh, every device attends for its samples and heads. Where the mesh splits the
sequence, heads are split over that axis too while attending, so that a device sees the
whole sequence (Ulysses: Jacobs et al., arXiv 2309.14509); XLA turns the change of layout
into all-to-all exchanges.
"""

import functools
import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from videogpt_jax import mask
from videogpt_jax import sharding
from videogpt_jax.attention import blocks
from videogpt_jax.attention import reference
from videogpt_jax.attention import tuning
from videogpt_jax.attention.gradient import OUTPUT

IMPLEMENTATIONS = ("reference", "xla", "tpu", "gpu")
_DENSE_PAIRS = 64 * 64  # fewer pairs than this a sample, and dense attention is faster
_ROWS = PartitionSpec(sharding.BATCH_AXES)
_HEADS = PartitionSpec(sharding.BATCH_AXES, None, sharding.HEAD_AXES)


def resolve(
    implementation: str, length_q: int, length_k: int, head_size: int, dtype: Any
) -> str:
  """The implementation that "auto" stands for; other names are checked.

  Raises:
    ValueError: unknown name, or a kernel that does not serve this head size or type.
  """
  if implementation == "auto":
    if length_q * length_k < _DENSE_PAIRS:
      return "reference"
    platform = jax.default_backend()
    if platform == "tpu" and not _module("tpu").problem(head_size, dtype):
      return "tpu"
    if (platform == "gpu" and _module("gpu").serves(jax.devices()[0])
        and not _module("gpu").problem(head_size, dtype)):
      return "gpu"
    return "xla"
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"unknown attention {implementation!r}; known: auto, "
                     + ", ".join(IMPLEMENTATIONS))
  if implementation in ("tpu", "gpu"):
    problem = _module(implementation).problem(head_size, dtype)
    if problem:
      raise ValueError(f"attention {implementation!r}: {problem}; use 'xla'")
  return implementation


def _module(name: str) -> Any:
  """The module of an implementation, imported when it is first wanted.

  Those with kernels bring compilers along that take a fifth of a command's start.
  """
  return importlib.import_module(f"{__name__}.{name}")


def tile(implementation: str, length: int, head_size: int, dtype: Any) -> int:
  """What a sequence's length should be a multiple of on a device; see `attend` for the arguments.

  Kernels pad to whole blocks of lanes in every layer if the caller does not once. And where
  lengths are odd, XLA for TPU moves all activations to merge batch and length for a product: the
  train step of five videos took 2.6 times as long to compile, to twice as much code.
  """
  kernel = resolve(implementation, length, length, head_size, dtype) in ("tpu", "gpu")
  return tuning.LANES if kernel else 1


def unavailable(implementation: str) -> str:
  """Why this implementation cannot run on the devices here; empty if it can."""
  device = jax.devices()[0]
  if implementation == "tpu" and device.platform != "tpu":
    return f"its kernels need a TPU, jax runs on {device.platform} here"
  if implementation == "gpu" and not _module("gpu").serves(device):
    return f"its kernels need a Hopper GPU (H100, H200), jax runs on {device.device_kind} here"
  return ""


def plan(
    ranks_q: mask.Ranks,
    ranks_k: mask.Ranks,
    *,
    frame_tokens: int,
    head_size: int,
    dtype: Any,
    implementation: str = "auto",
) -> blocks.BlockMap | None:
  """The block map for `attend`, shared by all layers; None where none is needed.

  Args:
    ranks_q: ranks of the queries.
    ranks_k: ranks of the keys.
    frame_tokens: S, tokens of a frame block; blocks of the XLA loop are whole frames.
    head_size: E, of the queries that will attend.
    dtype: their type.
    implementation: as in `attend`.
  """
  lengths = ranks_q.length, ranks_k.length
  name = resolve(implementation, *lengths, head_size, dtype)
  if name == "reference":
    return None
  block_q, block_k = tuning.block_sizes(name, *lengths, frame_tokens, head_size)
  build = functools.partial(blocks.block_map, block_q=block_q, block_k=block_k)
  if sharding.size(*sharding.BATCH_AXES) > 1:  # every device lists its own samples' blocks
    build = jax.shard_map(build, in_specs=_ROWS, out_specs=_ROWS, check_vma=False)
  return build(ranks_q, ranks_k)


def attend(
    q: Float[Array, "B Lq H E"],
    k: Float[Array, "B Lk G E"],
    v: Float[Array, "B Lk G E"],
    ranks_q: mask.Ranks,
    ranks_k: mask.Ranks,
    block_map: blocks.BlockMap | None,
    *,
    implementation: str = "auto",
) -> Float[Array, "B Lq H E"]:
  """Softmax attention where the ranks allow it, scores divided by sqrt(E).

  Query head i uses key/value head i // (H / G). Rows that see nothing give zeros.

  Args:
    q: queries.
    k: keys.
    v: values.
    ranks_q: ranks of the queries.
    ranks_k: ranks of the keys.
    block_map: what `plan` returned for the same ranks and implementation.
    implementation: "auto" or one of `IMPLEMENTATIONS`.

  Raises:
    ValueError: unknown implementation, one that does not serve this type or head size, a
      block map missing, or heads that the mesh cannot split.
  """
  name = resolve(implementation, q.shape[1], k.shape[1], q.shape[3], q.dtype)
  if name == "reference":
    return reference.attend(q, k, v, ranks_q, ranks_k)
  if block_map is None:
    raise ValueError("blockwise attention needs the block map of attention.plan")
  _check(q, k, ranks_q, ranks_k, block_map)
  run = _module(name).attend
  if sharding.size(*sharding.BATCH_AXES, *sharding.HEAD_AXES) > 1:
    k, v = _enough_heads(q.shape[2], k, v)
    run = jax.shard_map(run, in_specs=(_HEADS, _HEADS, _HEADS, _ROWS, _ROWS, _ROWS),
                        out_specs=_HEADS, check_vma=False)
  return run(q, k, v, ranks_q, ranks_k, block_map)


def by_heads(x: Float[Array, "B Lk G E"]) -> Float[Array, "B Lk G E"]:
  """Keys or values laid out over the mesh as attention wants them: whole sequences, heads split.

  What is kept for many calls then needs no exchange in any of them. Heads that the mesh
  cannot split stay whole; `attend` sees to them.
  """
  if sharding.size(*sharding.BATCH_AXES, *sharding.HEAD_AXES) == 1:
    return x
  split = x.shape[-2] % sharding.size(*sharding.HEAD_AXES) == 0
  spec = PartitionSpec(*[None] * (x.ndim - 4), *(_HEADS if split else _ROWS))
  return jax.lax.with_sharding_constraint(x, spec)


def _check(q: Array, k: Array, ranks_q: mask.Ranks, ranks_k: mask.Ranks,
           block_map: blocks.BlockMap) -> None:
  """Raises `ValueError` for what the kernels would compute wrongly, or never finish."""
  if q.shape[2] % k.shape[2]:
    raise ValueError(f"{q.shape[2]} query heads do not divide among {k.shape[2]} key/value heads")
  for name, x, ranks in (("queries", q, ranks_q), ("keys", k, ranks_k)):
    if ranks.key.shape != x.shape[:2]:
      raise ValueError(f"ranks of {name} are of {ranks.key.shape} tokens, not {x.shape[:2]}")
  rows, columns = -(-q.shape[1] // block_map.block_q), -(-k.shape[1] // block_map.block_k)
  for work, wanted in ((block_map.by_query, (rows, columns)), (block_map.by_key, (columns, rows))):
    if (work.rows, work.columns) != wanted or work.partial.size != q.shape[0] * work.rows:
      raise ValueError("the block map was planned for other lengths or another batch than those "
                       f"of q {q.shape} and k {k.shape}")


def _enough_heads(heads: int, k: Array, v: Array) -> tuple[Array, Array]:
  """Key/value heads repeated until every device of the head axes can have some."""
  kv_heads, shards = k.shape[2], sharding.size(*sharding.HEAD_AXES)
  copies = shards // math.gcd(kv_heads, shards)
  if heads % (kv_heads * copies):
    raise ValueError(
        f"{heads} query heads over {kv_heads} key/value heads cannot be split over the "
        f"{shards} devices of the mesh axes {' and '.join(sharding.HEAD_AXES)}")
  if copies == 1:
    return k, v
  return jnp.repeat(k, copies, axis=2), jnp.repeat(v, copies, axis=2)


__all__ = ["IMPLEMENTATIONS", "OUTPUT", "attend", "by_heads", "plan", "resolve", "tile",
           "unavailable"]
