"""The Hopper kernels against the dense reference; without such a GPU simulated on the CPU.

Pallas simulates barriers, shared memory, copies and the warpgroups of a block of threads,
one real thread each. It lacks three primitives that the kernels use; `simulated` adds them.
"""

import contextlib
import functools
import threading

import jax
from jax._src import linear_util
from jax._src.interpreters import partial_eval
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu import core as plgpu_core
from jax._src.pallas.mosaic_gpu import primitives as plgpu_primitives
from jax._src.pallas.mosaic_gpu.interpret import jaxpr_interpret
from jax._src.pallas.mosaic_gpu.interpret import params as interpret
from jax._src.state import types as state_types
import jax.numpy as jnp
import numpy as np
import pytest

from videogpt_jax import layout
from videogpt_jax import mask
from videogpt_jax.attention import blocks
from videogpt_jax.attention import gpu
from videogpt_jax.attention import hopper
from videogpt_jax.attention import reference

# What the simulator lacks ------------------------------------------------------------------


def _product(acc, a, b, *leaves, acc_transforms_tree, a_transforms_tree, b_transforms_tree):
  """wgmma with a first operand in registers, or with a transposed one."""
  assert acc_transforms_tree is None
  counts = [tree.num_leaves if tree else 0 for tree in (a_transforms_tree, b_transforms_tree)]
  acc[...] = acc[...] + jnp.dot(_value(a, a_transforms_tree, leaves[:counts[0]]),
                                _value(b, b_transforms_tree, leaves[counts[0]:]),
                                preferred_element_type=jnp.float32)


def _value(operand, tree, leaves):
  if tree is None:
    return operand
  transforms = jax.tree.unflatten(tree, leaves)
  turned = [t for t in transforms if isinstance(t, state_types.TransposeTransform)]
  value = state_types.TransformedRef(
      operand, tuple(t for t in transforms if t not in turned))[...]
  for transform in turned:
    value = value.transpose(transform.permutation)
  return value


def _store(acc, value):
  acc[...] = value
  return value


def _replacement(eqn):
  """A function of references for an equation that the simulator lacks, else None."""
  if eqn.primitive is plgpu_core.layout_cast_p:
    return lambda x: x  # values have no layout here
  if eqn.primitive is plgpu_primitives.wgmma_accumulator_store_p:
    return _store
  if eqn.primitive is plgpu_primitives.wgmma_ref_p:
    return functools.partial(_product, **eqn.params)
  return None


@contextlib.contextmanager
def simulated():
  if gpu.serves(jax.devices()[0]):  # JAX_PLATFORMS=cuda pytest tests/test_attention_gpu.py
    yield
    return
  original = jaxpr_interpret.JaxprInterpreter.interpret

  def completed(self, jaxpr, token, *args):
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], args, strict=True))
    read = lambda atom: atom.val if hasattr(atom, "val") else values[atom]
    for eqn in jaxpr.eqns:
      step = jaxpr.replace(constvars=[], invars=list(dict.fromkeys(
          v for v in eqn.invars if not hasattr(v, "val"))), outvars=eqn.outvars, eqns=[eqn])
      inputs = [values[v] for v in step.invars]
      if replacement := _replacement(eqn):
        plain = lambda aval: state_types.AbstractRef(aval.inner_aval) if isinstance(
            aval, plgpu_core.WGMMAAbstractAccumulatorRef) else aval
        step, *_ = partial_eval.trace_to_jaxpr_dynamic(
            linear_util.wrap_init(lambda *x: jax.tree.leaves(replacement(*x)),
                                  debug_info=jaxpr.debug_info),
            [plain(v.aval) for v in eqn.invars])
        inputs = [read(v) for v in eqn.invars]
      token, outputs = original(self, step, token, *inputs)
      values.update(zip(eqn.outvars, outputs, strict=True))
    return token, [read(v) for v in jaxpr.outvars]

  compiled, lock = {}, threading.Lock()

  def run_once_compiled(jaxpr, consts, *args):
    with lock:  # for all threads and places of the grid
      if id(jaxpr) not in compiled:
        evaluate = lambda consts, *args: jax.core.eval_jaxpr(jaxpr, consts, *args)
        compiled[id(jaxpr)] = jax.jit(evaluate).lower(consts, *args).compile()
    compiled[id(jaxpr)](consts, *args)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(thread_map, "_run_jaxpr", run_once_compiled)
    patch.setattr(jaxpr_interpret.JaxprInterpreter, "interpret", completed)
    with interpret.force_gpu_interpret_mode(interpret.InterpretGPUParams()):
      yield


# Cases -------------------------------------------------------------------------------------


def _ranks(seed, frames=6, patches=20, prefix=3):
  """Two samples: random partitions, unequal lengths, prefixes of different lengths."""
  clip = jax.vmap(lambda k: layout.random_partition(k, frames))(
      jax.random.split(jax.random.key(seed), 2))
  valid = jnp.arange(frames) < jnp.array([frames, frames - 2])[:, None]
  tokens = layout.tokens(layout.training(clip, valid), patches, jnp.array([0, prefix]),
                         prefix_size=prefix)
  return mask.ranks(tokens)


def _inputs(seed, ranks_q, ranks_k, heads, kv_heads, size):
  draw = lambda i, length, n: jax.random.normal(
      jax.random.fold_in(jax.random.key(seed), i), (2, length, n, size)).astype(jnp.bfloat16)
  return (draw(0, ranks_q.length, heads), draw(1, ranks_k.length, kv_heads),
          draw(2, ranks_k.length, kv_heads), draw(3, ranks_q.length, heads))


def _with_gradients(attend, q, k, v, g):
  out, pull = jax.vjp(attend, q, k, v)
  return (out, *pull(g))


def _compare(ranks_q, ranks_k, inputs, block_q, block_k):
  """Output and gradients, simulated, against the reference in float32."""
  block_map = blocks.block_map(ranks_q, ranks_k, block_q, block_k)
  with simulated():
    ours = _with_gradients(
        lambda *x: gpu.attend(*x, ranks_q, ranks_k, block_map), *inputs)
  theirs = _with_gradients(lambda *x: reference.attend(*x, ranks_q, ranks_k),
                           *(x.astype(jnp.float32) for x in inputs))
  for name, a, b in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
    assert a.dtype == jnp.bfloat16
    error = np.abs(np.asarray(a, np.float32) - b).max() / np.abs(b).max()
    assert error < 0.02, (name, error)
  return ours


@pytest.mark.parametrize("size,heads,kv_heads,block_q,block_k", [
    (96, 1, 1, 128, 128), (64, 2, 1, 64, 128), (128, 1, 1, 128, 128)])
def test_equals_dense_forward_and_backward(size, heads, kv_heads, block_q, block_k):
  ranks = _ranks(size)
  _compare(ranks, ranks, _inputs(size, ranks, ranks, heads, kv_heads, size), block_q, block_k)


def test_slots_of_shared_memory_are_used_again(monkeypatch):
  """As in every long row: with so few slots, each is filled more than once."""
  counted = []

  def fewest(fixed, slot, least):
    counted.append(least)
    return least

  monkeypatch.setattr(hopper, "slots", fewest)
  ranks = _ranks(3, frames=9, patches=26)
  assert ranks.length > 3 * 128
  _compare(ranks, ranks, _inputs(3, ranks, ranks, 1, 1, 96), 128, 128)
  assert len(counted) >= 3  # forward, dq, dk and dv


def test_other_keys_than_queries():
  ranks = mask.ranks(layout.tokens(layout.prediction(5, 2, batch=2), 28))
  ranks_q = jax.tree.map(lambda x: x[:, -70:], ranks)  # the new clip looks at everything
  _compare(ranks_q, ranks, _inputs(1, ranks_q, ranks, 1, 1, 64), 64, 64)


def test_invalid_tokens_reach_nothing_and_get_zeros():
  ranks = _ranks(0, frames=4)
  invalid = np.asarray(ranks.key == ranks.key.max())
  assert invalid.any()
  *inputs, grad = _inputs(0, ranks, ranks, 1, 1, 64)
  clean = [jnp.where(invalid[:, :, None, None], 0, x) for x in (*inputs, grad)]
  poisoned = [jnp.where(invalid[:, :, None, None], 3e38, x) for x in inputs]
  block_map = blocks.block_map(ranks, ranks, 64, 64)
  attend = lambda *x: gpu.attend(*x, ranks, ranks, block_map)
  with simulated():
    expected = _with_gradients(attend, *clean)
    ours = _with_gradients(attend, *poisoned, grad)
  for a, b in zip(ours, expected, strict=True):
    np.testing.assert_array_equal(a, b)
    assert (np.asarray(a, np.float32)[invalid] == 0).all()


def test_what_the_kernels_do_not_serve_is_told():
  assert not gpu.problem(96, jnp.bfloat16)
  assert "float32" in gpu.problem(96, jnp.float32)
  assert "80" in gpu.problem(80, jnp.bfloat16)
  ranks = _ranks(0)
  q, k, v, _ = _inputs(0, ranks, ranks, 1, 1, 64)
  with pytest.raises(ValueError, match="256 x 128"):
    gpu.attend(q, k, v, ranks, ranks, blocks.block_map(ranks, ranks, 256, 128))
