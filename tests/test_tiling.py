"""Tiles that overlap: the same as no tiles where one is enough, blended by the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from videogpt_jax import tiling
from videogpt_jax import vae
from videogpt_jax.errors import InputError

CONFIG = vae.Config(block_channels=(8, 8), layers_per_block=1, norm_groups=2)  # cells of 2 px
TILE = 32


@pytest.fixture(scope="module")
def params():
  rng = np.random.default_rng(0)
  draw = lambda name, shape: (
    rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:])) if len(shape) > 1
    else np.full(shape, float("norm" in name and name.endswith("weight"))))
  shapes = vae.published_shapes(CONFIG)
  return vae.from_published({name: draw(name, shape) for name, shape in shapes.items()}, CONFIG)


_jit = functools.partial(jax.jit, static_argnums=(0, 3))
encode, decode = _jit(tiling.encode), _jit(tiling.decode)


def _smooth(height, width, channels, period=10):
  """Waves short enough that a tile is much like the whole."""
  y, x = 2 * np.pi / period * np.mgrid[:height, :width]
  waves = [np.sin(x + 0.7 * y + i) * np.cos(0.5 * y - i) for i in range(channels)]
  return np.stack(waves, axis=-1)[None].astype(np.float32)


def test_tiling_of_what_fits_into_a_tile_changes_nothing(params):
  frames, latents = _smooth(TILE, 20, 3), _smooth(TILE // 2, 10, 4)
  ours, whole = encode(CONFIG, params, frames, TILE), vae.encode(CONFIG, params, frames)
  np.testing.assert_allclose(ours.mean, whole.mean, rtol=0, atol=1e-5)
  np.testing.assert_allclose(ours.log_variance, whole.log_variance, rtol=0, atol=1e-5)
  np.testing.assert_allclose(decode(CONFIG, params, latents, TILE),
                             vae.decode(CONFIG, params, latents), rtol=0, atol=1e-5)


def test_tiling_is_near_to_the_whole_of_a_smooth_frame(params):
  frames, latents = _smooth(70, 96, 3), _smooth(35, 48, 4, period=5)
  pairs = ((encode(CONFIG, params, frames, TILE).mean, vae.encode(CONFIG, params, frames).mean),
           (decode(CONFIG, params, latents, TILE), vae.decode(CONFIG, params, latents)))
  for tiled, whole in pairs:
    assert tiled.shape == whole.shape
    error = np.abs(tiled - whole)
    assert 0 < error.mean() < 0.35 * np.std(whole)


def _by_definition(run, x, size, out_size):
  """Cell by cell in float64; `run` takes and gives arrays [h, w, C]."""
  step, out_step = size * 3 // 4, out_size * 3 // 4
  down, across = (-(-length // step) for length in x.shape[:2])
  tiles = {(i, j): run(x[i * step:i * step + size, j * step:j * step + size])
           for i in range(down) for j in range(across)}

  @functools.cache
  def value(i, j, y, x):
    """Of the blended tile (i, j) at its own y, x."""
    result = tiles[i, j][y, x]
    height, width = (min(length, out_size - out_step) for length in tiles[i, j].shape[:2])
    if i > 0 and y < height:
      above = np.array(value(i - 1, j, len(tiles[i - 1, j]) - height + y, x))
      result = above + (result - above) * y / height
    if j > 0 and x < width:
      left = np.array(value(i, j - 1, y, tiles[i, j - 1].shape[1] - width + x))
      result = left + (result - left) * x / width
    return tuple(result)

  height, width = (length * out_size // size for length in x.shape[:2])
  place = lambda at, number: min(at // out_step, number - 1)
  return np.array([[value(i := place(y, down), j := place(x, across), y - i * out_step,
                          x - j * out_step)
                    for x in range(width)] for y in range(height)])


@pytest.mark.parametrize("sides", [(32, 40), (33, 16), (56, 57), (8, 80), (50, 44)])
@pytest.mark.parametrize("scale", [1, 2])
def test_tiles_are_blended_as_defined(sides, scale):
  """With a function that sees what is in its tile, as group norm does."""
  x = np.random.default_rng(0).standard_normal((*sides, 2))
  double = lambda x: x.repeat(scale, axis=-3).repeat(scale, axis=-2)
  run = lambda x: double(x - x.mean(axis=(-3, -2), keepdims=True))
  expected = _by_definition(run, x, 16, 16 * scale)
  ours = tiling._tiled(run, jnp.asarray(x[None], jnp.float32), 16, 16 * scale)
  assert ours.shape[1:3] == (sides[0] * scale, sides[1] * scale)
  np.testing.assert_allclose(ours[0], expected, rtol=0, atol=1e-5)


def test_tiles_have_few_shapes_whatever_the_frame():
  seen = []
  run = lambda x: seen.append(x.shape) or x
  tiling._tiled(run, jnp.zeros((1, 200, 150, 1)), 16, 16)
  assert len(seen) <= 9  # along a side: whole, shorter, shortest
  assert max(max(shape[1:3]) for shape in seen) == 16


def test_tiles_that_do_not_fit_are_refused(params):
  with pytest.raises(InputError, match="tile is 30 px; it must be a multiple of 8"):
    tiling.encode(CONFIG, params, _smooth(64, 64, 3), 30)
  with pytest.raises(InputError, match="tile is -8 px"):
    tiling.decode(CONFIG, params, _smooth(64, 64, 4), -8)
  with pytest.raises(InputError, match="71x96 px do not divide into latent cells of 2 px"):
    tiling.encode(CONFIG, params, _smooth(71, 96, 3), TILE)
