"""Blockwise attention against the dense reference, and the reference against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from videogpt_jax import attention
from videogpt_jax import layout
from videogpt_jax import mask
from videogpt_jax.attention import reference
from videogpt_jax.attention import xla


def _ranks(seed, frames=5, patches=4, prefix=3):
  """Three samples: random partitions, unequal lengths, prefixes of different lengths."""
  keys = jax.random.split(jax.random.key(seed), 3)
  clip = jax.vmap(lambda k: layout.random_partition(k, frames))(keys)
  valid = jnp.arange(frames) < jnp.array([frames, frames - 2, 1])[:, None]
  tokens = layout.tokens(layout.training(clip, valid), patches, jnp.array([0, 2, prefix]),
                         prefix_size=prefix)
  return mask.ranks(tokens)


def _inputs(seed, ranks_q, ranks_k, heads, kv_heads, size=8):
  draw = lambda i, length, n: jax.random.normal(
      jax.random.fold_in(jax.random.key(seed), i), (ranks_q.key.shape[0], length, n, size))
  return (draw(0, ranks_q.length, heads), draw(1, ranks_k.length, kv_heads),
          draw(2, ranks_k.length, kv_heads), draw(3, ranks_q.length, heads))


def _with_gradients(attend, q, k, v, g):
  out, pull = jax.vjp(attend, q, k, v)
  return (out, *pull(g))


def _float64(q, k, v, ranks_q, ranks_k):
  """Plain numpy, row by row, with nothing shared with the code under test but the mask."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  visible = np.asarray(mask.visible(ranks_q, ranks_k))
  out = np.zeros_like(q)
  group = q.shape[2] // k.shape[2]
  for b, i, h in np.ndindex(*q.shape[:3]):
    seen = visible[b, i]
    if seen.any():
      score = k[b, seen, h // group] @ q[b, i, h] / np.sqrt(q.shape[-1])
      weight = np.exp(score - score.max())
      out[b, i, h] = weight @ v[b, seen, h // group] / weight.sum()
  return out


@pytest.mark.parametrize("heads,kv_heads", [(2, 2), (4, 2), (3, 1)])
def test_reference_equals_float64(heads, kv_heads):
  ranks = _ranks(0)
  q, k, v, _ = _inputs(1, ranks, ranks, heads, kv_heads)
  out = reference.attend(q, k, v, ranks, ranks)
  np.testing.assert_allclose(out, _float64(q, k, v, ranks, ranks), atol=2e-6)


@pytest.mark.parametrize("heads,kv_heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("block_q,block_k", [(6, 6), (12, 6), (17, 23), (64, 64)])
@pytest.mark.parametrize("seed", range(2))
def test_blockwise_equals_dense_forward_and_backward(seed, block_q, block_k, heads, kv_heads):
  ranks = _ranks(seed)
  inputs = _inputs(seed, ranks, ranks, heads, kv_heads)

  @jax.jit
  def both(*inputs):
    block_map = mask.block_map(ranks, ranks, block_q, block_k)
    blockwise = lambda q, k, v: xla.attend(q, k, v, ranks, ranks, block_map)
    dense = lambda q, k, v: reference.attend(q, k, v, ranks, ranks)
    return _with_gradients(blockwise, *inputs), _with_gradients(dense, *inputs)

  for ours, theirs in zip(*both(*inputs), strict=True):
    assert np.isfinite(ours).all()
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_blockwise_with_other_keys_than_queries():
  ranks = mask.ranks(layout.tokens(layout.prediction(3, 2, batch=2), 4))
  part = lambda lo, hi: jax.tree.map(lambda x: x[:, lo:hi], ranks)
  ranks_q, ranks_k = part(18, 30), ranks  # the new clip looks at everything
  inputs = _inputs(2, ranks_q, ranks_k, 2, 2)
  block_map = attention.plan(ranks_q, ranks_k, frame_tokens=6, implementation="xla")
  ours = _with_gradients(
      lambda *x: attention.attend(*x, ranks_q, ranks_k, block_map, implementation="xla"), *inputs)
  theirs = _with_gradients(lambda *x: reference.attend(*x, ranks_q, ranks_k), *inputs)
  for a, b in zip(ours, theirs, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_rows_that_see_nothing_give_zeros_and_no_gradient():
  ranks = mask.pad(_ranks(0), 64)
  q, k, v, g = _inputs(0, ranks, ranks, 2, 2)
  invalid = np.asarray(ranks.key == ranks.key.max())
  poison = lambda x: jnp.where(invalid[:, :, None, None], 1e4, x)  # must not reach anything
  block_map = mask.block_map(ranks, ranks, 16, 16)
  out, *grads = _with_gradients(lambda *x: xla.attend(*x, ranks, ranks, block_map),
                                poison(q), poison(k), poison(v), g)
  assert (np.asarray(out)[invalid] == 0).all()
  for grad in grads:
    assert np.isfinite(grad).all()
    assert (np.asarray(grad)[invalid] == 0).all()


def test_bfloat16_inputs_keep_their_type_and_stay_close():
  ranks = _ranks(1)
  q, k, v, _ = _inputs(5, ranks, ranks, 2, 2)
  half = [x.astype(jnp.bfloat16) for x in (q, k, v)]
  out = xla.attend(*half, ranks, ranks, mask.block_map(ranks, ranks, 6, 6))
  assert out.dtype == jnp.bfloat16
  error = np.asarray(out, np.float32) - np.asarray(reference.attend(q, k, v, ranks, ranks))
  assert np.abs(error).max() < 0.03


def test_permuting_tokens_permutes_the_output():
  ranks = _ranks(3)
  q, k, v, _ = _inputs(3, ranks, ranks, 2, 2)
  order = jax.random.permutation(jax.random.key(0), ranks.length)
  shuffle = functools.partial(jnp.take, indices=order, axis=1)
  moved = jax.tree.map(shuffle, ranks)
  run = lambda q, k, v, ranks: xla.attend(q, k, v, ranks, ranks,
                                          mask.block_map(ranks, ranks, 6, 6))
  np.testing.assert_allclose(run(shuffle(q), shuffle(k), shuffle(v), moved),
                             shuffle(run(q, k, v, ranks)), atol=2e-6)


def test_unknown_implementation_and_missing_map_are_refused():
  ranks = _ranks(0)
  q, k, v, _ = _inputs(0, ranks, ranks, 2, 2)
  with pytest.raises(ValueError, match="unknown attention 'flash'"):
    attention.attend(q, k, v, ranks, ranks, None, implementation="flash")
  with pytest.raises(ValueError, match=r"attention\.plan"):
    attention.attend(q, k, v, ranks, ranks, None, implementation="xla")
