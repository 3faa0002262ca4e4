"""The clean frames of a window as keys and values, computed once: a ring of frame slots.

Clean tokens never look at noisy ones, so their keys and values do not depend on what is
being denoised: a clip's T denoising steps read them, and nobody computes them again. Keys
are kept before their rotation. Positions and ranks count from the oldest frame kept and
are made from the ring's two counters when they are needed, so a frame may leave without
anything being moved, and nothing grows however long a video gets.
"""

import einops
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from videogpt_jax import attention
from videogpt_jax import backbone
from videogpt_jax import layout
from videogpt_jax import mask


@flax.struct.dataclass
class Cache:
  """Clean frames in a ring of W slots; all samples of the batch hold as many frames.

  Slot `first` holds the oldest of `count` frames, the slots after it (and on from slot 0)
  the next ones; what the other slots hold means nothing.
  """

  keys: Float[Array, "layers B W S G E"]  # not rotated
  values: Float[Array, "layers B W S G E"]
  first: Int[Array, ""]
  count: Int[Array, ""]

  @property
  def slots(self) -> int:
    """W, how many frames it can hold."""
    return self.keys.shape[2]


@flax.struct.dataclass
class Past:
  """A cache as the frames after it see it: keys rotated to where they stand now."""

  tokens: backbone.KeysValues  # [layers, B, W S, G, E]
  ranks: mask.Ranks  # [B, W S]


def empty(config: backbone.Config, batch: int, slots: int, frame_tokens: int) -> Cache:
  """A cache that holds nothing.

  Args:
    config: of the stack.
    batch: B, videos.
    slots: W, frames that it can hold.
    frame_tokens: S, tokens of a frame.
  """
  shape = (config.num_layers, batch, slots, frame_tokens, config.num_kv_heads, config.head_size)
  nothing = lambda: _laid_out(jnp.zeros(shape, config.dtype))
  return Cache(nothing(), nothing(), jnp.int32(0), jnp.int32(0))


def drop(cache: Cache, frames: Int[Array, ""] | int) -> Cache:
  """The cache without its `frames` oldest frames, of which there are as many."""
  return Cache(cache.keys, cache.values, (cache.first + frames) % max(1, cache.slots),
               cache.count - frames)


def append(cache: Cache, tokens: backbone.KeysValues) -> Cache:
  """The cache with the frames of `tokens` after its own.

  Args:
    cache: with as many free slots, which only the caller can know.
    tokens: their keys, not rotated, and values, [layers, B, n S, G, E].

  Raises:
    ValueError: more frames than the cache has slots.
  """
  *_, slots, size, _, _ = cache.keys.shape
  frames = tokens.keys.shape[2] // size
  if frames > slots:
    raise ValueError(f"{frames} frames do not fit a cache of {slots}")
  at = (cache.first + cache.count + jnp.arange(frames)) % slots

  def write(ring: Array, new: Array) -> Array:
    new = einops.rearrange(new, "Y B (n S) G E -> Y B n S G E", S=size)
    return _laid_out(ring.at[:, :, at].set(new.astype(ring.dtype)))

  return Cache(write(cache.keys, tokens.keys), write(cache.values, tokens.values), cache.first,
               cache.count + frames)


def past(config: backbone.Config, cache: Cache) -> Past:
  """What the frames after those of `cache` see of it, until it changes."""
  _, batch, slots, size, *_ = cache.keys.shape
  blocks = layout.window(cache.first, cache.count, slots, batch)
  tokens = layout.tokens(blocks, size - layout.MARKERS)
  cos, sin = backbone.rotary_angles(config, tokens.position)
  flat = lambda x: einops.rearrange(x, "Y B W S G E -> Y B (W S) G E")
  keys = jax.vmap(backbone.rotate, in_axes=(0, None, None))(flat(cache.keys), cos, sin)
  return Past(backbone.KeysValues(_laid_out(keys), flat(cache.values)), mask.ranks(tokens))


def _laid_out(x: Array) -> Array:
  """As attention wants it over the mesh; the axes between batch and heads stay whole."""
  flat = x.reshape(*x.shape[:2], -1, *x.shape[-2:])
  return attention.by_heads(flat).reshape(x.shape)
