"""Every implementation of attention against float64, forward and backward.

The kernels run in Pallas's interpret modes, which simulate the memories of the device: the
same code that a TPU or a GPU compiles. `test_attention_gpu.py` has the GPU kernel.
"""

import contextlib
import functools

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np
import pytest

from videogpt_jax import attention
from videogpt_jax import layout
from videogpt_jax import mask
from videogpt_jax.attention import blocks
from videogpt_jax.attention import reference
from videogpt_jax.attention import tpu
from videogpt_jax.attention import xla

_RUN = {"xla": xla.attend, "tpu": tpu.attend}
_BLOCKS = {"xla": (12, 18), "tpu": (128, 128)}


def _interpreted(name):
  """Where a kernel can run without its device."""
  if name != "tpu" or jax.default_backend() == "tpu":
    return contextlib.nullcontext()
  return pltpu.force_tpu_interpret_mode()


def _ranks(seed, frames=5, patches=4, prefix=3):
  """Three samples: random partitions, unequal lengths, prefixes of different lengths."""
  keys = jax.random.split(jax.random.key(seed), 3)
  clip = jax.vmap(lambda k: layout.random_partition(k, frames))(keys)
  valid = jnp.arange(frames) < jnp.array([frames, frames - 2, 1])[:, None]
  tokens = layout.tokens(layout.training(clip, valid), patches, jnp.array([0, 2, prefix]),
                         prefix_size=prefix)
  return mask.ranks(tokens)


def _partitioned(clip, patches):
  return mask.ranks(layout.tokens(layout.training(jnp.asarray(clip)[None]), patches))


def _inputs(seed, ranks_q, ranks_k, heads, kv_heads, size=8, dtype=jnp.float32):
  draw = lambda i, length, n: jax.random.normal(
      jax.random.fold_in(jax.random.key(seed), i), (ranks_q.key.shape[0], length, n, size), dtype)
  return (draw(0, ranks_q.length, heads), draw(1, ranks_k.length, kv_heads),
          draw(2, ranks_k.length, kv_heads), draw(3, ranks_q.length, heads))


def _with_gradients(attend, q, k, v, g):
  out, pull = jax.vjp(attend, q, k, v)
  return (out, *pull(g))


def _computed(name, ranks_q, ranks_k, inputs, sizes=None):
  """Output and gradients of an implementation, block map built in the same jit."""
  @jax.jit
  def run(ranks_q, ranks_k, *inputs):
    block_map = blocks.block_map(ranks_q, ranks_k, *(sizes or _BLOCKS[name]))
    attend = lambda q, k, v: _RUN[name](q, k, v, ranks_q, ranks_k, block_map)
    return _with_gradients(attend, *inputs)

  with _interpreted(name):
    return run(ranks_q, ranks_k, *inputs)


def _float64(q, k, v, g, ranks_q, ranks_k):
  """Output and gradients in numpy, float64, by the formulas; only the mask's ranks are shared."""
  q, k, v, g = (np.asarray(x, np.float64) for x in (q, k, v, g))
  group, scale = q.shape[2] // k.shape[2], q.shape[-1]**-0.5
  k_all, v_all = (np.repeat(x, group, axis=2) for x in (k, v))
  key = np.asarray(ranks_k.key)[:, None, None, :]
  a, lo, hi = (np.asarray(x)[:, None, :, None] for x in (ranks_q.a, ranks_q.lo, ranks_q.hi))
  visible = (key <= a) | ((lo <= key) & (key <= hi))
  scores = np.where(visible, np.einsum("bqhe,bkhe->bhqk", q, k_all) * scale, -np.inf)
  peak = scores.max(-1, keepdims=True)
  weights = np.exp(scores - np.where(np.isfinite(peak), peak, 0))
  total = weights.sum(-1, keepdims=True)
  weights = weights / np.where(total > 0, total, 1)
  out = np.einsum("bhqk,bkhe->bqhe", weights, v_all)
  dv = np.einsum("bhqk,bqhe->bkhe", weights, g)
  d_weights = np.einsum("bqhe,bkhe->bhqk", g, v_all)
  d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
  dq = np.einsum("bhqk,bkhe->bqhe", d_scores, k_all)
  dk = np.einsum("bhqk,bqhe->bkhe", d_scores, q)
  shared = lambda x: x.reshape(*k.shape[:3], group, -1).sum(3)
  return out, dq, shared(dk), shared(dv)


def _check(name, ranks_q, ranks_k, inputs, sizes=None, atol=1e-5):
  ours = _computed(name, ranks_q, ranks_k, inputs, sizes)
  for label, a, b in zip(("out", "dq", "dk", "dv"), ours,
                         _float64(*inputs, ranks_q, ranks_k), strict=True):
    assert np.isfinite(a).all(), label
    np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=atol, err_msg=label)


# Against float64 --------------------------------------------------------------------------


@pytest.mark.parametrize("heads,kv_heads", [(2, 2), (4, 2), (3, 1)])
def test_reference(heads, kv_heads):
  ranks = _ranks(0)
  inputs = _inputs(1, ranks, ranks, heads, kv_heads)
  ours = _with_gradients(lambda q, k, v: reference.attend(q, k, v, ranks, ranks), *inputs)
  for a, b in zip(ours, _float64(*inputs, ranks, ranks), strict=True):
    np.testing.assert_allclose(a, b, atol=5e-6)


@pytest.mark.parametrize("heads,kv_heads", [(2, 2), (4, 2)])
@pytest.mark.parametrize("sizes", [(6, 6), (12, 6), (17, 23), (64, 64)], ids=str)
def test_xla_with_blocks_of_any_size(sizes, heads, kv_heads):
  for seed in range(2):
    ranks = _ranks(seed)
    _check("xla", ranks, ranks, _inputs(seed, ranks, ranks, heads, kv_heads), sizes)


@pytest.mark.parametrize("sizes", [(128, 128), (256, 128), (128, 384)], ids=str)
def test_tpu_with_blocks_of_any_size(sizes):
  """Invalid tokens, prefixes, a length that no block divides (355), two heads a key head."""
  ranks = _ranks(2, frames=6, patches=30)
  _check("tpu", ranks, ranks, _inputs(3, ranks, ranks, 4, 2, size=32), sizes)


@pytest.mark.parametrize("name", ["xla", "tpu"])
@pytest.mark.parametrize("size", [64, 96, 128])
def test_head_sizes(name, size):
  ranks = _ranks(1, frames=6, patches=30)
  _check(name, ranks, ranks, _inputs(size, ranks, ranks, 2, 1, size))


_PARTITIONS = {
  "one frame a clip": list(range(8)),
  "one clip": [0] * 8,
  "two clips": [0, 0, 0, 1, 1, 1, 1, 1],
  "one very long clip": [0, 1, 1, 1, 1, 1, 1, 2],
}


@pytest.mark.parametrize("name", ["xla", "tpu"])
@pytest.mark.parametrize("clip", _PARTITIONS.values(), ids=_PARTITIONS)
def test_partitions(name, clip):
  ranks = _partitioned(clip, 20)
  _check(name, ranks, ranks, _inputs(0, ranks, ranks, 1, 1, 32))


@pytest.mark.parametrize("name", ["xla", "tpu"])
def test_other_keys_than_queries(name):
  """A new clip that looks at its history and itself, as in a rollout with a cache."""
  ranks = mask.ranks(layout.tokens(layout.prediction(6, 3, batch=2), 30))
  new = jax.tree.map(lambda x: x[:, 6 * 32:], ranks)
  _check(name, new, ranks, _inputs(2, new, ranks, 2, 2, 32))


@pytest.mark.parametrize("name", ["xla", "tpu"])
def test_bfloat16_keeps_its_type_and_stays_close(name):
  ranks = _ranks(1, frames=6, patches=30)
  inputs = _inputs(5, ranks, ranks, 2, 2, 64, jnp.bfloat16)
  ours = _computed(name, ranks, ranks, inputs)
  assert all(x.dtype == jnp.bfloat16 for x in ours)
  for a, b in zip(ours, _float64(*inputs, ranks, ranks), strict=True):
    error = np.asarray(a, np.float64) - b
    assert np.linalg.norm(error) / np.linalg.norm(b) < 8e-3


def test_tpu_with_dq_in_a_pass_of_its_own(monkeypatch):
  """As for sequences whose dq would not fit VMEM."""
  monkeypatch.setattr(tpu, "_DQ_BYTES", 0)
  ranks = _ranks(4, frames=6, patches=30)
  _check("tpu", ranks, ranks, _inputs(6, ranks, ranks, 2, 1, 32))


# Properties -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["xla", "tpu"])
def test_rows_that_see_nothing_give_zeros_and_no_gradient(name):
  """A sample of padding alone, and poison in every invalid token, which must reach nothing."""
  ranks = mask.pad(_ranks(0, frames=6, patches=20), 64)
  ranks = jax.tree.map(lambda x: x.at[1].set(x[1, -1]), ranks)
  invalid = np.asarray(ranks.key == ranks.key.max())
  assert invalid[1].all() and not invalid.all()
  q, k, v, g = _inputs(0, ranks, ranks, 2, 2, 32)
  poison = lambda x: jnp.where(invalid[:, :, None, None], 1e4, x)
  clean = _computed(name, ranks, ranks, (q, k, v, g))
  poisoned = _computed(name, ranks, ranks, (poison(q), poison(k), poison(v), poison(g)))
  for a, b in zip(clean, poisoned, strict=True):
    assert (np.asarray(b)[invalid] == 0).all()
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ["xla", "tpu"])
def test_outputs_do_not_depend_on_what_memory_held(name):
  """Pallas fills memory with NaN before the kernel runs: whatever is read was written."""
  ranks = _ranks(0, frames=6, patches=30)
  inputs = _inputs(0, ranks, ranks, 1, 1, 32)
  if name == "tpu":
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(uninitialized_memory="nan")):
      _check_finite(name, ranks, inputs)
  else:
    _check_finite(name, ranks, inputs)


def _check_finite(name, ranks, inputs):
  block_map = blocks.block_map(ranks, ranks, *_BLOCKS[name])
  attend = lambda q, k, v: _RUN[name](q, k, v, ranks, ranks, block_map)
  for x in _with_gradients(attend, *inputs):
    assert np.isfinite(x).all()


@pytest.mark.parametrize("name", ["xla", "tpu"])
def test_permuting_tokens_permutes_the_output(name):
  ranks = _ranks(3, frames=6, patches=20)
  q, k, v, g = _inputs(3, ranks, ranks, 2, 2, 32)
  order = jax.random.permutation(jax.random.key(0), ranks.length)
  shuffle = functools.partial(jnp.take, indices=order, axis=1)
  moved = jax.tree.map(shuffle, ranks)
  straight = _computed(name, ranks, ranks, (q, k, v, g))
  permuted = _computed(name, moved, moved, [shuffle(x) for x in (q, k, v, g)])
  for a, b in zip(straight, permuted, strict=True):
    np.testing.assert_allclose(b, shuffle(a), atol=5e-6)


@pytest.mark.parametrize("name", ["xla", "tpu"])
def test_under_remat_scan_and_vmap(name, monkeypatch):
  """Gradients through two scanned, rematerialised layers, and samples mapped one by one."""
  ranks = _ranks(5, frames=6, patches=20)
  q, k, v, _ = _inputs(5, ranks, ranks, 2, 2, 32)

  def loss(attend, q):
    block_map = blocks.block_map(ranks, ranks, *_BLOCKS["tpu"]) if attend else None
    attend = attend or (lambda q, k, v, a, b, _: reference.attend(q, k, v, a, b))
    layer = jax.checkpoint(lambda x, _: (attend(x, k, v, ranks, ranks, block_map), None))
    return jnp.sum(jnp.sin(jax.lax.scan(layer, q, None, length=2)[0]))

  # The simulated memories of the other interpret mode are an effect that remat refuses.
  monkeypatch.setattr(pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True))
  ours = jax.jit(jax.grad(functools.partial(loss, _RUN[name])))(q)
  single = lambda x: jax.tree.map(lambda y: y[None], x)

  def one(q, k, v, ranks):
    q, k, v, ranks = single((q, k, v, ranks))
    block_map = blocks.block_map(ranks, ranks, *_BLOCKS["tpu"])
    return _RUN[name](q, k, v, ranks, ranks, block_map)[0]

  mapped = jax.jit(jax.vmap(one))(q, k, v, ranks)
  np.testing.assert_allclose(ours, jax.grad(functools.partial(loss, None))(q), atol=1e-5)
  np.testing.assert_allclose(mapped, reference.attend(q, k, v, ranks, ranks), atol=1e-5)


def test_memory_is_linear_in_the_length():
  """Forward and backward of the XLA loop: twice the frames, twice the memory."""
  def temporary(frames):
    ranks = _partitioned(range(frames), 64)
    x = jax.ShapeDtypeStruct((1, ranks.length, 4, 64), jnp.float32)

    def both(ranks, *inputs):
      block_map = attention.plan(ranks, ranks, frame_tokens=66, head_size=64, dtype=jnp.float32,
                                 implementation="xla")
      attend = lambda q, k, v: attention.attend(q, k, v, ranks, ranks, block_map,
                                                implementation="xla")
      return _with_gradients(attend, *inputs)

    return jax.jit(both).lower(ranks, x, x, x, x).compile().memory_analysis().temp_size_in_bytes

  assert temporary(32) < 2.2 * temporary(16)


# The race detector ------------------------------------------------------------------------


@pytest.mark.parametrize("planted", [False, True], ids=["ours", "planted"])
def test_two_cores_race_only_where_a_race_is_planted(planted, monkeypatch, capfd):
  """The cores share the heads. Control: both write what they find into the first head."""
  if planted:
    monkeypatch.setattr(tpu._Specs, "query", lambda self, rows: self._make(self._q, rows, 2, True))
  ranks = _partitioned([0, 0, 1, 1, 1, 2], 60)
  inputs = _inputs(0, ranks, ranks, 2, 2, 32)
  block_map = blocks.block_map(ranks, ranks, 128, 128)
  attend = lambda q, k, v: tpu.attend(q, k, v, ranks, ranks, block_map)
  two = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
  with pltpu.force_tpu_interpret_mode(two):
    _, pull = jax.vjp(attend, *inputs[:3])
    jax.block_until_ready(pull(inputs[3]))
  pltpu.reset_tpu_interpret_mode_state()
  assert ("RACE DETECTED" in capfd.readouterr().out) is planted  # all that the detector tells


# The entry point --------------------------------------------------------------------------


def test_unknown_implementation_missing_map_and_wrong_type_are_refused():
  ranks = _ranks(0)
  q, k, v, _ = _inputs(0, ranks, ranks, 2, 2)
  with pytest.raises(ValueError, match="unknown attention 'flash'"):
    attention.attend(q, k, v, ranks, ranks, None, implementation="flash")
  with pytest.raises(ValueError, match=r"attention\.plan"):
    attention.attend(q, k, v, ranks, ranks, None, implementation="xla")
  with pytest.raises(ValueError, match=r"'tpu': head size 8 is not a multiple of 32.*use 'xla'"):
    attention.attend(q, k, v, ranks, ranks, None, implementation="tpu")


def test_a_block_map_of_other_tokens_is_refused():
  """It would read past the end, or wait for blocks that never come."""
  ranks, other = _ranks(0, frames=6), _ranks(0, frames=3)
  plan = lambda a, b: attention.plan(a, b, frame_tokens=6, head_size=8, dtype=jnp.float32,
                                     implementation="xla")
  q, k, v, _ = _inputs(0, ranks, ranks, 2, 2)
  run = lambda a, b, block_map, k=k, v=v: attention.attend(q, k, v, a, b, block_map,
                                                           implementation="xla")
  first = lambda x: jax.tree.map(lambda y: y[:1], x)
  for block_map in (plan(other, ranks), plan(ranks, other), plan(first(ranks), first(ranks))):
    with pytest.raises(ValueError, match="planned for other lengths or another batch"):
      run(ranks, ranks, block_map)
  with pytest.raises(ValueError, match="ranks of keys are of"):
    run(ranks, other, plan(ranks, ranks))
  q, k, v, _ = _inputs(0, ranks, ranks, 3, 2)
  with pytest.raises(ValueError, match="3 query heads do not divide among 2"):
    attention.attend(q, k, v, ranks, ranks, plan(ranks, ranks), implementation="xla")
