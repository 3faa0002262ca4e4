"""Attention and training compile for real accelerators, although there is none here.

Shown is that the programs fit: no overflow of VMEM, SMEM or shared memory (the compilers
raise), registers that are not spilled, tensor cores in use, and memory that grows with L,
not with its square. That they compute what they should is for other tests, and speed is
for a device.
"""

import compiling
from programs import ALL_AXES
from programs import Attention
from programs import Clip
from programs import Layer
from programs import ONE
from programs import Step
import pytest

from videogpt_jax.aot import chips

pytestmark = pytest.mark.aot

_GIB = 1 << 30
_CALL = {"tpu": "tpu_custom_call", "gpu": "mosaic_gpu_v2"}


def _assert_kernels(report, name, least):
  """At least so many calls of the target's kernels and of no other's; good code on GPUs."""
  implementation = chips.CHIPS[name].attention
  assert report.auto == implementation
  for other, call in _CALL.items():
    if other == implementation:
      assert report.calls[call] >= least
    else:
      assert call not in report.calls
  if implementation == "gpu":
    assert report.kernels_so_far >= least
  for kernel in report.kernels:
    assert kernel.spilled == 0, kernel
    assert kernel.wgmma > 0, kernel
    assert not kernel.serialized, kernel


@pytest.mark.parametrize("name", compiling.TARGETS, scope="session")
def test_forward_at_full_size(compile_for, name):
  """80 frames of 220 patches, 32 heads of 96: at most a few copies of the inputs beside them."""
  report = compile_for(name, Attention())
  _assert_kernels(report, name, least=1)
  assert report.temporaries < 1.5 * _GIB


@pytest.mark.parametrize("name", compiling.TARGETS, scope="session")
def test_gradients_at_full_size(compile_for, name):
  """Forward and backward; the scores alone would be 74 GiB."""
  report = compile_for(name, Attention(gradient=True))
  _assert_kernels(report, name, least=2)
  assert report.temporaries < 4 * _GIB


@pytest.mark.parametrize("name", ["v5e", "v5p", "v6e", "h100"], scope="session")
@pytest.mark.parametrize("program", [
    pytest.param(Attention(gradient=True, frames=16, heads=16, kv_heads=16, head_size=64), id="64"),
    pytest.param(Attention(gradient=True, frames=16, heads=16, kv_heads=16, head_size=128),
                 id="128"),
    pytest.param(Attention(gradient=True, frames=16, kv_heads=8), id="shared-heads"),
    pytest.param(Attention(gradient=True, frames=5, patches=7, batch=3), id="short"),
])
def test_other_heads_and_lengths(compile_for, name, program):
  """Each head size, key/value heads that are shared, and less than a block."""
  _assert_kernels(compile_for(name, program), name, least=2)


@pytest.mark.parametrize("name", ["v5e"], scope="session")
@pytest.mark.parametrize("program", [
    pytest.param(Attention(gradient=True, frames=160, heads=4, kv_heads=4), id="long"),
    pytest.param(Attention(gradient=True, frames=16, heads=4, kv_heads=4, dtype="float32"),
                 id="float32"),
])
def test_only_on_tpu(compile_for, name, program):
  """So many queries that their gradient has a pass of its own; float32."""
  _assert_kernels(compile_for(name, program), name, least=2)


@pytest.mark.parametrize("name", ["v5p", "h100"], scope="session")
def test_attention_on_a_mesh(compile_for, name):
  """Samples over 4 chips, heads and sequence over 4: heads are exchanged for tokens and back."""
  report = compile_for(name, Attention(gradient=True, batch=4, mesh=ALL_AXES))
  _assert_kernels(report, name, least=2)
  assert report.collectives["all-to-all"] >= 2
  assert report.temporaries < _GIB


@pytest.mark.parametrize(("name", "program"), [
    pytest.param("v5p", Layer(batch=4, frames=16, mesh=ALL_AXES), id="v5p"),
    pytest.param("h100", Layer(batch=4, mesh=ALL_AXES), id="h100"),
], scope="session")
def test_layer(compile_for, name, program):
  """Gradients of a model of one layer of the published width, split over 16 chips."""
  report = compile_for(name, program)
  _assert_kernels(report, name, least=2)
  assert report.arguments + report.temporaries + report.results < 8 * _GIB


@pytest.mark.parametrize(("name", "mesh"), [
    ("h100", ONE), ("h200", ONE), ("v6e", ONE), ("v5p", ALL_AXES)], scope="session")
def test_a_clip_of_the_published_model(compile_for, name, mesh):
  """Guided, in bfloat16: weights, cache and what it takes beside them fit one such chip."""
  report = compile_for(name, Clip(mesh=mesh))
  _assert_kernels(report, name, least=1)
  held = report.arguments + report.results + report.temporaries
  if mesh == ONE:
    assert report.arguments > 11 * _GIB  # 7 of weights, 4.6 of keys and values
    assert held < 24 * _GIB
  else:
    assert report.collectives["all-to-all"]  # from sequence to heads and back
    assert held < 6 * _GIB


def _held(report):
  """Of a step: state and batch, what is computed, and the new state, as if nothing were donated."""
  return report.arguments + report.temporaries + report.results


@pytest.mark.parametrize(("frames", "videos"), [(16, 1), (16, 8), (48, 1), (80, 1)],
                         scope="session")
def test_adapters_are_trained_on_24_gb(compile_for, frames, videos):
  """The published model with LoRA; of the 24 GB, 2 are left to others."""
  report = compile_for("l4", Step("finetune_lora", frames, videos))
  assert report.arguments > 7 * _GIB  # the base in bfloat16
  assert report.results < _GIB  # the adapters, and what goes with them
  assert _held(report) < 22e9


@pytest.mark.parametrize(("frames", "videos"), [(16, 1), (16, 8), (48, 1), (80, 1)],
                         scope="session")
def test_the_published_model_is_trained_on_80_gb(compile_for, frames, videos):
  """All of its parameters, with Adafactor and without an averaged copy."""
  report = compile_for("h100", Step("finetune_full", frames, videos))
  _assert_kernels(report, "h100", least=2)
  assert report.arguments > 20 * _GIB  # parameters, and their first moment in bfloat16
  assert _held(report) < 78e9
