"""The worklists of live blocks: against the dense mask, pair by pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from videogpt_jax import layout
from videogpt_jax import mask
from videogpt_jax.attention import blocks


def _random_ranks(seed, frames=6, patches=3):
  """Three samples: random partitions, unequal lengths, prefixes of different lengths."""
  keys = jax.random.split(jax.random.key(seed), 3)
  clip = jax.vmap(lambda k: layout.random_partition(k, frames))(keys)
  valid = jnp.arange(frames) < jnp.array([frames, frames - 1, frames - 3])[:, None]
  tokens = layout.tokens(layout.training(clip, valid), patches, jnp.array([0, 1, 4]), prefix_size=4)
  return mask.ranks(tokens)


def _entries(work):
  """(sample, row, column) -> fullness of a worklist, and its order, after checks of its form."""
  starts, partial = np.asarray(work.starts), np.asarray(work.partial)
  samples, rows, columns, full = (np.asarray(x) for x in work.unpack(work.entries[:starts[-1]]))
  np.testing.assert_array_equal(work.column(work.entries[:starts[-1]]), columns)
  assert starts[0] == 0 and len(starts) == len(partial) + 1
  found = {}
  for r in range(len(partial)):
    own = slice(starts[r], starts[r + 1])
    assert starts[r] < starts[r + 1], "a row without an entry"
    assert (samples[own] * work.rows + rows[own] == r).all()
    split = partial[r] - starts[r]
    assert full[own][:split].all() and not full[own][split:].any()
    for part in (columns[own][:split], columns[own][split:]):
      assert (np.diff(part) > 0).all()
    found |= {(r // work.rows, r % work.rows, int(c)): bool(f)
              for c, f in zip(columns[own], full[own], strict=True)}
  return found


@pytest.mark.parametrize("block_q,block_k", [(5, 5), (10, 5), (7, 12), (200, 200), (1, 64)])
@pytest.mark.parametrize("seed", range(3))
def test_every_visible_pair_is_listed_and_no_full_block_lies(seed, block_q, block_k):
  ranks = _random_ranks(seed)
  dense = np.asarray(mask.visible(mask.pad(ranks, block_q), mask.pad(ranks, block_k)))
  made = jax.jit(blocks.block_map, static_argnums=(2, 3))(ranks, ranks, block_q, block_k)
  by_query, by_key = _entries(made.by_query), _entries(made.by_key)
  for (b, i, j), full in by_query.items():
    block = dense[b, i * block_q:(i + 1) * block_q, j * block_k:(j + 1) * block_k]
    assert block.all() or not full
  for b, q, k in np.argwhere(dense):
    assert (b, q // block_q, k // block_k) in by_query
    assert (b, k // block_k, q // block_q) in by_key
  # Both lists hold the same blocks, but for what stands in for an empty row.
  turned = {(b, i, j): full for (b, j, i), full in by_key.items()}
  for only in set(by_query) ^ set(turned):
    b, i, j = only
    assert not dense[b, i * block_q:(i + 1) * block_q, j * block_k:(j + 1) * block_k].any()
  assert all(turned[place] == by_query[place] for place in set(by_query) & set(turned))


def test_live_and_full_are_exact_on_whole_frames():
  clip = jnp.array([[0, 0, 1, 2, 2, 3]])
  ranks = mask.ranks(layout.tokens(layout.training(clip), 3))
  size = 5
  live, full = blocks.live_blocks(ranks, ranks, size, size)
  dense = np.asarray(mask.visible(ranks, ranks))[0]
  cut = dense.reshape(11, size, 11, size).transpose(0, 2, 1, 3)
  np.testing.assert_array_equal(np.asarray(live)[0], cut.any((2, 3)))
  np.testing.assert_array_equal(np.asarray(full)[0], cut.all((2, 3)))


def test_few_blocks_are_live_and_most_of_them_full():
  """One frame a clip, 16 frames of 220 patches: as the dense mask has it, pair by pair."""
  ranks = mask.ranks(layout.tokens(layout.training(jnp.arange(16)[None]), 220))
  live, full = blocks.live_blocks(ranks, ranks, 128, 128)
  dense = np.asarray(mask.visible(mask.pad(ranks, 128), mask.pad(ranks, 128)))[0]
  cut = dense.reshape(live.shape[1], 128, -1, 128).transpose(0, 2, 1, 3)
  np.testing.assert_array_equal(np.asarray(live)[0], cut.any((2, 3)))
  np.testing.assert_array_equal(np.asarray(full)[0], cut.all((2, 3)))
  assert float(live.mean()) < .32 and float(full.sum() / live.sum()) > .7


def test_memory_is_linear_in_the_length():
  """One integer a pair of blocks and a few a token: nothing near L x L is ever made."""
  def build(clip):
    ranks = mask.ranks(layout.tokens(layout.training(clip), 220))
    return blocks.block_map(ranks, ranks, 128, 128)

  compiled = jax.jit(build).lower(jax.ShapeDtypeStruct((1, 80), jnp.int32)).compile()
  memory = compiled.memory_analysis()
  length = (2 * 80 - 1) * 222
  assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 200 * length < length**2 / 100


def test_too_many_blocks_are_refused():
  ranks = jax.eval_shape(lambda: mask.ranks(layout.tokens(layout.prediction(4, 4, 4096), 220)))
  with pytest.raises(ValueError, match="choose larger blocks or fewer samples"):
    jax.eval_shape(lambda r: blocks.block_map(r, r, 1, 1), ranks)
