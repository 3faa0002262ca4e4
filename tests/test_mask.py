"""The mask: against its definition, against the published masks, and its count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import golden_videogpt as golden
from videogpt_jax import layout
from videogpt_jax import mask


def _definition(tokens, row=0):
  """The mask of design section 3, pair by pair, from stream, clip, frame and role alone."""
  s, c, f, r, valid = (np.asarray(x[row]) for x in (
      tokens.stream, tokens.clip, tokens.frame, tokens.role, tokens.valid))
  visible = np.zeros((len(s), len(s)), bool)
  for q in range(len(s)):
    for k in range(len(s)):
      if not (valid[q] and valid[k]):
        continue
      if s[k] == layout.PREFIX:
        visible[q, k] = s[q] != layout.PREFIX or f[k] <= f[q]
      elif s[q] == layout.PREFIX:
        continue
      elif s[q] == layout.CLEAN:
        seen = f[k] < f[q] or (f[k] == f[q] and r[k] <= r[q])
        visible[q, k] = s[k] == layout.CLEAN and seen
      elif s[k] == layout.CLEAN:
        visible[q, k] = c[k] < c[q]
      else:
        visible[q, k] = c[k] == c[q] and r[k] <= r[q]
  return visible


def _random_tokens(seed, frames=6, patches=3, multiple=1):
  keys = jax.random.split(jax.random.key(seed), 3)
  clip = jax.vmap(lambda k: layout.random_partition(k, frames))(keys)
  valid = jnp.arange(frames) < jnp.array([frames, frames - 1, frames - 3])[:, None]
  lengths = jnp.array([0, 1, 4])
  return layout.tokens(layout.training(clip, valid), patches, lengths, prefix_size=4,
                       multiple=multiple)


@pytest.mark.parametrize("seed", range(4))
def test_ranks_equal_the_definition(seed):
  tokens = _random_tokens(seed, multiple=7)
  ranks = mask.ranks(tokens)
  dense = np.asarray(mask.visible(ranks, ranks))
  for row in range(3):
    np.testing.assert_array_equal(dense[row], _definition(tokens, row))


def test_one_clip_and_no_history():
  for blocks in (layout.training(jnp.zeros((1, 4), jnp.int32)), layout.prediction(0, 4)):
    tokens = layout.tokens(blocks, 2)
    ranks = mask.ranks(tokens)
    np.testing.assert_array_equal(mask.visible(ranks, ranks)[0], _definition(tokens))


# The published masks ----------------------------------------------------------------------

_KIND = {1: (layout.NOISY, 0), 2: (layout.NOISY, 1), 3: (layout.NOISY, 2),
         4: (layout.CLEAN, 0), 5: (layout.CLEAN, 1), 6: (layout.CLEAN, 2)}


def _check_against_published(case, row, blocks, patches):
  """Mask, position and kind of every token, through the permutation to their order."""
  tokens = layout.tokens(blocks, patches)
  ranks = mask.ranks(tokens)
  dense = np.asarray(mask.visible(ranks, ranks))[0]
  real = np.flatnonzero(case["token_kind"][row] > 0)
  size = patches + 2
  place = {}  # (stream, frame, token of the block) -> our index
  for m in range(blocks.stream.shape[1]):
    for o in range(size):
      place[int(blocks.stream[0, m]), int(blocks.frame[0, m]), o] = m * size + o
  order, inside = [], {}
  for i in real:
    stream, role = _KIND[int(case["token_kind"][row, i])]
    frame = int(case["token_frame"][row, i])
    o = inside.get((stream, frame), 0)
    inside[stream, frame] = o + 1
    ours = place[stream, frame, o]
    assert int(tokens.role[0, ours]) == role
    assert bool(tokens.valid[0, ours])
    order.append(ours)
  order = np.array(order)
  assert len(set(order.tolist())) == len(order) == int(tokens.valid.sum())
  np.testing.assert_array_equal(np.asarray(tokens.position)[0, order],
                                case["position_ids"][row, real])
  np.testing.assert_array_equal(dense[np.ix_(order, order)],
                                case["attention_mask"][row][np.ix_(real, real)])


def _training_cases():
  index = golden.index("masks_index")
  for spec in index["train"]:
    yield spec["key"], [spec["frame_blocks"]]
  for spec in index["train_batch"]:
    yield spec["key"], spec["frame_blocks"]


@pytest.mark.parametrize("key,rows", list(_training_cases()), ids=str)
def test_golden_training_masks_and_positions(key, rows):
  case = golden.case("masks_train", key)
  for row, lengths in enumerate(rows):
    clip = layout.fixed_partition(tuple(lengths))[None]
    _check_against_published(case, row, layout.training(clip), int(case["patches"]))


def _prediction_cases():
  index = golden.index("masks_index")
  return index["infer"] + index["infer_cfg"]


@pytest.mark.parametrize("spec", _prediction_cases(), ids=lambda s: s["key"])
def test_golden_prediction_masks_and_positions(spec):
  case = golden.case("masks_infer", spec["key"])
  for row, name in enumerate(spec["rows"]):
    history = spec["history"] if name == "cond" else 0
    blocks = layout.prediction(history, spec["generated"])
    _check_against_published(case, row, blocks, int(case["patches"]))


# Counting ---------------------------------------------------------------------------------


def test_live_pairs_counts_the_mask():
  ranks = mask.ranks(_random_tokens(1))
  np.testing.assert_array_equal(mask.live_pairs(ranks), mask.visible(ranks, ranks).sum((1, 2)))
