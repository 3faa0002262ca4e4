"""Attention under the hierarchical mask: one entry point, several implementations.

`plan` builds the block map that the chosen implementation wants, once a step; `attend`
runs in every layer. `implementation` is one of `IMPLEMENTATIONS`, or "auto": blockwise
XLA, and the dense reference for sequences so short that the loop would only cost.
"""

import functools

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from videogpt_jax import mask
from videogpt_jax import sharding
from videogpt_jax.attention import reference
from videogpt_jax.attention import xla

OUTPUT = xla.OUTPUT
IMPLEMENTATIONS = ("reference", "xla")
_DENSE_PAIRS = 64 * 64  # fewer pairs than this a sample, and dense attention is faster


def resolve(implementation: str, length_q: int, length_k: int) -> str:
  """The implementation that "auto" stands for; other names are checked.

  Raises:
    ValueError: unknown name.
  """
  if implementation == "auto":
    return "reference" if length_q * length_k < _DENSE_PAIRS else "xla"
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"unknown attention {implementation!r}; known: auto, "
                     + ", ".join(IMPLEMENTATIONS))
  return implementation


def plan(
    ranks_q: mask.Ranks, ranks_k: mask.Ranks, *, frame_tokens: int, implementation: str = "auto"
) -> mask.BlockMap | None:
  """The block map for `attend`, shared by all layers; None where none is needed.

  Args:
    ranks_q: ranks of the queries.
    ranks_k: ranks of the keys.
    frame_tokens: S, tokens of a frame block: blocks are whole frames.
    implementation: as in `attend`.
  """
  if resolve(implementation, ranks_q.length, ranks_k.length) == "reference":
    return None
  build = functools.partial(
      mask.block_map,
      block_q=xla.block_size(ranks_q.length, frame_tokens),
      block_k=xla.block_size(ranks_k.length, frame_tokens))
  if sharding.batch_shards() > 1:
    rows = PartitionSpec(sharding.BATCH_AXES)
    build = jax.shard_map(build, in_specs=rows, out_specs=rows, check_vma=False)
  return build(ranks_q, ranks_k)


def attend(
    q: Float[Array, "B Lq H E"],
    k: Float[Array, "B Lk G E"],
    v: Float[Array, "B Lk G E"],
    ranks_q: mask.Ranks,
    ranks_k: mask.Ranks,
    block_map: mask.BlockMap | None,
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
  """
  name = resolve(implementation, q.shape[1], k.shape[1])
  if name == "reference":
    return reference.attend(q, k, v, ranks_q, ranks_k)
  if block_map is None:
    raise ValueError("blockwise attention needs the block map of attention.plan")
  run = xla.attend
  if sharding.batch_shards() > 1:
    # Every device has a worklist of its own samples: a loop over a global one would gather.
    rows = PartitionSpec(sharding.BATCH_AXES)
    heads = PartitionSpec(sharding.BATCH_AXES, None, "tensor")
    run = jax.shard_map(run, in_specs=(heads, heads, heads, rows, rows, rows), out_specs=heads,
                        check_vma=False)
  return run(q, k, v, ranks_q, ranks_k, block_map)


__all__ = ["IMPLEMENTATIONS", "OUTPUT", "attend", "plan", "resolve"]
