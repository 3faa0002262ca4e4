"""The kernels lower for their platforms at full size; needs no accelerator and no compiler of it.

A cheap part of what tests/aot shows: block shapes that Mosaic refuses, primitives that it
lacks and, for GPUs, too much shared memory. Overflows of a TPU's memories and spilled
registers are found there.
"""

import jax
from jax import export
import jax.numpy as jnp
import pytest

from videogpt_jax import attention
from videogpt_jax import layout
from videogpt_jax import mask

_FRAMES, _PATCHES = 80, 220  # 35,298 tokens


@pytest.mark.parametrize(("implementation", "platform", "call"), [
    ("tpu", "tpu", "tpu_custom_call"), ("gpu", "cuda", "mosaic_gpu")])
@pytest.mark.parametrize(("heads", "kv_heads", "head_size"), [(32, 32, 96), (16, 4, 64)])
def test_kernels_lower(implementation, platform, call, heads, kv_heads, head_size):
  def attend(clip, q, k, v):
    ranks = mask.ranks(layout.tokens(layout.training(clip), _PATCHES))
    block_map = attention.plan(
        ranks, ranks, frame_tokens=_PATCHES + layout.MARKERS, head_size=head_size, dtype=q.dtype,
        implementation=implementation)
    return attention.attend(q, k, v, ranks, ranks, block_map, implementation=implementation)

  def loss_and_gradients(clip, *inputs):
    loss = lambda *inputs: attend(clip, *inputs).astype(jnp.float32).sum()
    return jax.value_and_grad(loss, argnums=(0, 1, 2))(*inputs)

  length = (2 * _FRAMES - 1) * (_PATCHES + layout.MARKERS)
  shape = lambda heads: jax.ShapeDtypeStruct((1, length, heads, head_size), jnp.bfloat16)
  inputs = (jax.ShapeDtypeStruct((1, _FRAMES), jnp.int32),
            shape(heads), shape(kv_heads), shape(kv_heads))
  unchecked = [export.DisabledSafetyCheck.custom_call(name)  # Mosaic's calls promise no stability
               for name in ("mosaic_gpu", "mosaic_gpu_v2")]
  for function, calls in ((attend, 1), (loss_and_gradients, 2)):
    exported = export.export(jax.jit(function), platforms=[platform],
                             disabled_checks=unchecked)(*inputs)
    assert exported.mlir_module().count(f"@{call}") >= calls
