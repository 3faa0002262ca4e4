"""Partitions, blocks, tokens and positions."""

import collections
import itertools
import math

from hypothesis import given
from hypothesis import settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from videogpt_jax import layout

_CERTAIN = 1e-4  # a right law fails a chi-square test with this probability


def _draw(frames, count, rows=None):
  """Partitions of their own, or of batches of so many rows with one number of clips."""
  keys = jax.random.split(jax.random.key(3), count)
  if not rows:
    return np.asarray(jax.jit(jax.vmap(lambda k: layout.random_partition(k, frames)))(keys))
  draw = jax.vmap(lambda k: layout.random_partitions_of_one_count(k, frames))
  return np.asarray(jax.jit(draw)(keys.reshape(-1, rows)))


@pytest.mark.parametrize("rows", [None, 10])
def test_partition_starts_at_zero_and_steps_by_zero_or_one(rows):
  clip = _draw(7, 500, rows).reshape(500, 7)
  assert (clip[:, 0] == 0).all()
  assert set(np.unique(np.diff(clip, axis=1))) == {0, 1}


@pytest.mark.parametrize("row", [None, 0, 1])
def test_partition_has_the_stated_distribution(row):
  """Also of each row of a batch with one number of clips."""
  frames, count = 5, 40_000
  clip = _draw(frames, count) if row is None else _draw(frames, 2 * count, 2)[:, row]
  clips = clip[:, -1] + 1
  seen = np.bincount(clips, minlength=frames + 1)
  assert seen[:2].sum() == 0  # never one clip
  assert stats.chisquare(seen[2:]).pvalue > _CERTAIN  # K uniform in 2..N
  for k in range(2, frames + 1):  # given K, every set of K - 1 cuts equally often
    cuts = collections.Counter(tuple(np.flatnonzero(np.diff(row))) for row in clip[clips == k])
    possible = math.comb(frames - 1, k - 1)
    assert len(cuts) == possible
    if possible > 1:
      assert stats.chisquare(list(cuts.values())).pvalue > _CERTAIN


def test_partitions_of_one_count_share_it_and_nothing_else():
  frames, batches = 5, 20_000
  clip = _draw(frames, 2 * batches, 2)
  assert (clip[:, 0, -1] == clip[:, 1, -1]).all()
  for k in (3, 4):  # both cut anywhere, whatever the other does
    number = {cuts: i for i, cuts in enumerate(itertools.combinations(range(frames - 1), k - 1))}
    found = [[number[tuple(np.flatnonzero(np.diff(row)))] for row in pair]
             for pair in clip[clip[:, 0, -1] == k - 1]]
    table = np.zeros((len(number), len(number)))
    np.add.at(table, tuple(np.transpose(found)), 1)
    assert stats.chi2_contingency(table).pvalue > _CERTAIN


def test_partition_of_one_frame_is_refused():
  with pytest.raises(ValueError, match="at least 2 frames"):
    layout.random_partition(jax.random.key(0), 1)


def test_fixed_and_single_partitions():
  assert layout.fixed_partition((2, 1, 3)).tolist() == [0, 0, 1, 2, 2, 2]
  assert layout.single_partition(3).tolist() == [0, 1, 2]
  with pytest.raises(ValueError, match="positive"):
    layout.fixed_partition((2, 0))


def test_training_blocks_leave_out_the_last_clip():
  blocks = layout.training(jnp.array([[0, 0, 1, 2, 2]]))
  assert blocks.stream[0].tolist() == [layout.CLEAN] * 4 + [layout.NOISY] * 5
  assert blocks.frame[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4]
  assert blocks.valid[0].tolist() == [True, True, True, False] + [True] * 5
  assert blocks.clip_start[0, 4:].tolist() == [0, 0, 2, 3, 3]


def test_training_blocks_of_a_shorter_video():
  clip, valid = jnp.array([[0, 1, 1, 0, 0]]), jnp.array([[True, True, True, False, False]])
  blocks = layout.training(clip, valid)
  assert blocks.valid[0].tolist() == [True, False, False, False] + [True, True, True, False, False]


def test_prediction_without_history_starts_at_zero():
  blocks = layout.prediction(0, 3, batch=2)
  assert blocks.frame.tolist() == [[0, 1, 2]] * 2
  assert (np.asarray(blocks.stream) == layout.NOISY).all()


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 4), st.integers(1, 5), st.integers(0, 3), st.integers(1, 7))
def test_positions_are_shared_by_both_streams_and_shifted_by_the_prefix(
    frames, patches, prefix, multiple):
  clip = jnp.arange(frames)[None]
  length = jnp.array([min(prefix, 2)])
  t = layout.tokens(layout.training(clip), patches, length, prefix_size=prefix, multiple=multiple)
  size = patches + 2
  assert t.position.shape[1] % multiple == 0
  body = np.asarray(t.position[0, prefix:prefix + (2 * frames - 1) * size]).reshape(-1, size)
  expected = int(length[0]) + np.arange(frames)[:, None] * size + np.arange(size)
  np.testing.assert_array_equal(body[frames - 1:], expected)
  np.testing.assert_array_equal(body[:frames - 1], expected[:-1])
  assert not np.asarray(t.valid[0, prefix + (2 * frames - 1) * size:]).any()
  assert t.valid[0, :prefix].tolist() == [i < length[0] for i in range(prefix)]
