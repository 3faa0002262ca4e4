"""Frames too large for one piece: the autoencoder by tiles that overlap and are blended.

The same as diffusers computes after `enable_tiling`: tiles begin at every three quarters of a
tile, and where two overlap the one before fades into the next linearly. Memory is then that of
a tile, whatever the frame; group norm and attention see a tile each, so that the result is
near to the whole frame's but not the same. Pure functions of static shapes, to be jitted.
"""

from collections.abc import Callable
from typing import Any

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

from videogpt_jax import vae
from videogpt_jax.errors import InputError

_OVERLAP = 4  # a tile shares this part of its side with the next


def encode(config: vae.Config, params: Any, frames: Float[Array, "B H W 3"], tile: int = 512
           ) -> vae.Posterior:
  """`vae.encode` by tiles of `tile` pixels; the same where no side is longer, or with 0.

  Raises:
    InputError: `tile` is no multiple of four latent cells, or a side of the frames of one.
  """
  if not tile or max(frames.shape[1:3]) <= tile:
    return vae.encode(config, params, frames)
  cells = _cells(config, tile)
  if any(side % config.downsample for side in frames.shape[1:3]):
    raise InputError(f"frames of {frames.shape[1]}x{frames.shape[2]} px do not divide into latent "
                     f"cells of {config.downsample} px")
  return vae.Posterior.from_moments(
    _tiled(lambda x: vae.moments(config, params, x), frames, tile, cells))


def decode(config: vae.Config, params: Any, latents: Float[Array, "B h w C"], tile: int = 512
           ) -> Float[Array, "B H W 3"]:
  """`vae.decode` by tiles of `tile` pixels; the same where no side is longer, or with 0.

  Raises:
    InputError: `tile` is no multiple of four latent cells.
  """
  if not tile or max(latents.shape[1:3]) * config.downsample <= tile:
    return vae.decode(config, params, latents)
  cells = _cells(config, tile)
  return _tiled(lambda x: vae.decode(config, params, x), latents, cells, tile)


def _cells(config: vae.Config, tile: int) -> int:
  """Latent cells along a tile's side."""
  if tile < 1 or tile % (_OVERLAP * config.downsample):
    raise InputError(f"tile is {tile} px; it must be a multiple of {_OVERLAP * config.downsample}, "
                     f"{_OVERLAP} latent cells")
  return tile // config.downsample


def _tiled(run: Callable[[Array], Array], x: Array, size: int, out_size: int) -> Array:
  """`run` on tiles of `x` `[B, ., ., .]` with sides of at most `size`, blended.

  Args:
    run: one tile; makes sides of `out_size` of those of `size`.
    x: what is cut.
    size: a multiple of `_OVERLAP`, as is `out_size`.
    out_size: see `run`.
  """
  down, across = (range(0, length, size - size // _OVERLAP) for length in x.shape[1:3])
  parts = {(i, j): x[:, top:top + size, left:left + size]
           for i, top in enumerate(down) for j, left in enumerate(across)}
  tiles = _run_each(run, parts)
  shared = out_size // _OVERLAP
  # From the left and from the top, as blended tiles are what the next ones are blended with.
  for i, j in tiles:
    if i > 0:
      tiles[i, j] = _faded(tiles[i - 1, j], tiles[i, j], shared, axis=1)
    if j > 0:
      tiles[i, j] = _faded(tiles[i, j - 1], tiles[i, j], shared, axis=2)
  kept = out_size - shared
  return jnp.concatenate([
    jnp.concatenate([tiles[i, j][:, :kept, :kept] for j in range(len(across))], axis=2)
    for i in range(len(down))], axis=1)


def _run_each(run: Callable[[Array], Array], parts: dict[tuple[int, int], Array]
              ) -> dict[tuple[int, int], Array]:
  """`run` on every part, one after another; parts of one shape by one program."""
  shapes: dict[tuple[int, ...], list[tuple[int, int]]] = {}
  for place, part in parts.items():
    shapes.setdefault(part.shape, []).append(place)
  out: dict[tuple[int, int], Array] = {}
  for places in shapes.values():
    results = lax.map(run, jnp.stack([parts[place] for place in places]))
    out.update(zip(places, results, strict=True))
  return {place: out[place] for place in parts}


def _faded(before: Array, tile: Array, shared: int, axis: int) -> Array:
  """`tile` with its first `shared` cells along an axis, or all, blended with those of `before`."""
  shared = min(shared, before.shape[axis], tile.shape[axis])  # at the end tiles are shorter
  weight = jnp.arange(shared, dtype=jnp.float32) / shared
  weight = jnp.expand_dims(weight, [i for i in range(tile.ndim) if i != axis])
  last = lax.slice_in_dim(before, before.shape[axis] - shared, None, axis=axis)
  first = lax.slice_in_dim(tile, 0, shared, axis=axis)
  rest = lax.slice_in_dim(tile, shared, None, axis=axis)
  return jnp.concatenate([last * (1 - weight) + first * weight, rest], axis=axis)
