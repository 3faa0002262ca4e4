"""Convolutions with fewer multiplications against direct ones in float64."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from videogpt_jax import convolution

DIMENSIONS = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
WAYS = {
  name: jax.jit(functools.partial(
    getattr(convolution, name), window_strides=(1, 1), padding=((1, 1), (1, 1)), **DIMENSIONS))
  for name in ("same", "doubled")}


@pytest.fixture(autouse=True)
def _small_portions(monkeypatch):
  """Some 96 tiles of few channels at once, not thousands."""
  monkeypatch.setattr(convolution, "_WORK", 96 * 16 * 19)


def _random(shape, kernel_out):
  rng = np.random.default_rng(0)
  kernel = rng.standard_normal((3, 3, shape[-1], kernel_out)) / np.sqrt(9 * shape[-1])
  return rng.standard_normal(shape).astype(np.float32), kernel.astype(np.float32)


def _exact(name, x, kernel):
  x, kernel = x.astype(np.float64), kernel.astype(np.float64)
  if name == "doubled":
    x = x.repeat(2, axis=1).repeat(2, axis=2)
  height, width = x.shape[1:3]
  x = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
  return sum(x[:, i:i + height, j:j + width] @ kernel[i, j] for i in range(3) for j in range(3))


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("shape", [
  (1, 1, 1, 16), (1, 5, 7, 16), (3, 4, 6, 17),  # one portion
  (6, 12, 13, 16),  # frames by twos
  (2, 23, 41, 16),  # each frame in strips, the last of them filled up
  (1, 4, 230, 16)])  # one row of tiles is more than a portion
def test_convolutions_are_exact_in_every_portion(name, shape):
  x, kernel = _random(shape, 19)
  out = WAYS[name](x, kernel)
  expected = _exact(name, x, kernel)
  assert out.shape == expected.shape
  np.testing.assert_allclose(out, expected, rtol=0, atol=5e-6)


def _one_by_one(name, x, kernel):
  """The convolution as its products are added one after another in float32."""
  if name == "doubled":
    x = x.repeat(2, axis=1).repeat(2, axis=2)
  height, width = x.shape[1:3]
  x = np.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
  out = np.zeros((*x.shape[:1], height, width, kernel.shape[-1]), np.float32)
  for i, j, channel in np.ndindex(kernel.shape[:3]):
    out += x[:, i:i + height, j:j + width, channel, None] * kernel[i, j, channel]
  return out


@pytest.mark.parametrize("name", WAYS)
def test_convolutions_round_less_than_sums_one_by_one(name):
  """Many channels, of which rounding errors come. How XLA's own round depends on the CPU."""
  x, kernel = _random((1, 16, 16, 512), 32)
  expected = _exact(name, x, kernel)
  error = lambda out: np.sqrt(np.mean((out - expected)**2))
  assert error(WAYS[name](x, kernel)) < .8 * error(_one_by_one(name, x, kernel))


def _program(name, dtype, platform, channels=32):
  args = (jax.ShapeDtypeStruct((1, 8, 8, channels), dtype),
          jax.ShapeDtypeStruct((3, 3, channels, 32), dtype))
  return jax.export.export(WAYS[name], platforms=[platform])(*args).mlir_module()


@pytest.mark.parametrize("name", WAYS)
def test_convolutions_are_direct_but_on_cpu_in_float32(name):
  assert "stablehlo.convolution" not in _program(name, jnp.float32, "cpu")
  for platform, dtype, channels in (
      ("tpu", jnp.float32, 32), ("cuda", jnp.float32, 32), ("cpu", jnp.bfloat16, 32),
      ("cpu", jnp.float32, 3)):
    text = _program(name, dtype, platform, channels)
    assert text.count("stablehlo.convolution") == 1
    assert "dot_general" not in text


@pytest.mark.parametrize("name", WAYS)
def test_convolutions_have_the_gradients_of_direct_ones(name):
  x, kernel = _random((1, 6, 5, 16), 16)
  grad = jax.jit(jax.grad(lambda x, kernel: (WAYS[name](x, kernel)**2).sum(), argnums=(0, 1)))

  def direct(x, kernel):
    x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2) if name == "doubled" else x
    return (jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", **DIMENSIONS)**2).sum()

  for ours, theirs in zip(grad(x, kernel), jax.grad(direct, (0, 1))(x, kernel), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())


# Of large kernels minimal filtering, of small ones the direct way over frames as channels.
@pytest.mark.parametrize("worth", [0, 1_000_000_000])
@pytest.mark.parametrize(("name", "side", "stride", "shape"), [
  ("same_in_time", 3, 1, (2, 5, 9, 12, 16)), ("same_in_time", 3, 1, (1, 1, 4, 4, 16)),
  ("strided_in_time", 7, 2, (2, 9, 15, 20, 3)), ("strided_in_time", 7, 2, (1, 16, 14, 14, 3))])
def test_convolutions_in_time_are_those_of_xla(name, side, stride, shape, worth, monkeypatch):
  monkeypatch.setattr(convolution, "_WORTH", worth)
  rng = np.random.default_rng(0)
  kernel = rng.standard_normal((side,) * 3 + (shape[-1], 24)) / np.sqrt(side**3 * shape[-1])
  x, kernel = rng.standard_normal(shape).astype(np.float32), kernel.astype(np.float32)
  settings = {"window_strides": (stride,) * 3, "padding": "SAME",
              "dimension_numbers": ("NDHWC", "DHWIO", "NDHWC")}
  ours = jax.jit(lambda x, kernel: getattr(convolution, name)(x, kernel, **settings))(x, kernel)
  np.testing.assert_allclose(ours, jax.lax.conv_general_dilated(x, kernel, **settings), rtol=0,
                             atol=1e-5)
