"""Next clip generation: roll out a video clip after clip, without end, over a window.

The frames before a clip are encoded once, as keys and values (`cache`); each of the T
denoising steps computes the new clip alone; the finished clip then extends the cache. The
unconditional branch of guidance sees no history and is computed on the clip alone, as a
second clip of the same sequence.

When history and new clip exceed the window, the oldest frames leave. Two ways to go on:

  recompute   the kept frames are encoded anew, as if the video began with the first of
              them (published)
  rolling     the kept frames' keys and values stay; positions and ranks count from the
              first of them. What a frame took from others, now gone, when it entered stays
              in it. A clip costs the same for ever, whatever the window's length
"""

from collections.abc import Iterable, Iterator, Sequence
import dataclasses
import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from videogpt_jax import cache as cache_lib
from videogpt_jax import layout
from videogpt_jax import model
from videogpt_jax import sampler as sampler_lib
from videogpt_jax.sampler import Sampler

MODES = ("recompute", "rolling")
_ROWS = ("batch", None, None, None, None)  # logical axes of latents


@dataclasses.dataclass(frozen=True)
class Window:
  """What a new clip sees of the video before it.

  Attributes:
    frames: most frames of history and new clip together; 0: no limit.
    mode: what becomes of the history when its oldest frames leave, see the module.
    history_noise: n; a generated clip x enters the history as (1 - n) x + n eps. The
      published models were trained on n up to 0.1.
    redraw: draw this noise anew for every clip and on all frames of the history, from the
      second clip on, as the published sampler does; only with `recompute`, and only then
      is all history encoded again for every clip.
  """

  frames: int = 0
  mode: str = "recompute"
  history_noise: float = 0.0
  redraw: bool = False


EULER = Sampler()
UNLIMITED = Window()


def problem(window: Window) -> str:
  """What makes the settings of a window impossible; empty if they make sense."""
  for wrong, reason in (
      (window.frames < 0, f"window must be at least 0 frames, got {window.frames}"),
      (window.mode not in MODES,
       f"window_mode is {window.mode!r}; known: {', '.join(MODES)}"),
      (not 0 <= window.history_noise < 1,
       f"history_noise must be in [0, 1), got {window.history_noise}"),
      (window.redraw and window.mode != "recompute",
       "redraw_noise works only where the history is encoded anew: window_mode recompute")):
    if wrong:
      return reason
  return ""


def kept_history(history: int, generated: int, window: int) -> int:
  """Frames of history that stay in a window with `generated` new ones; window 0: all.

  Raises:
    ValueError: the new clip alone exceeds the window.
  """
  if window and generated > window:
    raise ValueError(f"a clip of {generated} frames does not fit a window of {window}")
  return min(history, window - generated) if window else history


# On the device ----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(0, 3))
def encode(
    config: model.Config, params: Any, frames: Float[Array, "B n h w C"], slots: int
) -> cache_lib.Cache:
  """A cache of `slots` frames that holds `frames`, which may be none."""
  batch, count, height, width, _ = frames.shape
  size = model.patches_per_frame(config, height, width) + layout.MARKERS
  cache = cache_lib.empty(config.backbone, batch, slots, size)
  return _extended(config, params, cache, frames, is_empty=True) if count else cache


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def extend(
    config: model.Config,
    params: Any,
    cache: cache_lib.Cache,
    frames: Float[Array, "B n h w C"],
    dropped: Int[Array, ""] | int = 0,
) -> cache_lib.Cache:
  """The cache (which is given up) without its `dropped` oldest frames, then `frames` appended."""
  return _extended(config, params, cache_lib.drop(cache, dropped), frames)


@functools.partial(jax.jit, static_argnums=(0, 4))
def denoise_clip(
    config: model.Config,
    params: Any,
    cache: cache_lib.Cache,
    noise: Float[Array, "B g h w C"],
    sampler: Sampler,
) -> Float[Array, "B g h w C"]:
  """Denoises one clip of g frames from `noise`, after the frames in the cache."""
  network = model.VideoGPT(config)
  past = cache_lib.past(config.backbone, cache)
  batch, generated = noise.shape[:2]

  def predict(z: Array, t: Array, guided: bool) -> tuple[Array, Array | None]:
    blocks = layout.next_clip(cache.count, generated, batch, guided=guided)
    noisy = jnp.concatenate([z, z], axis=1) if guided else z
    x1: Any = network.apply({"params": params}, noisy, jnp.full(noisy.shape[:2], t), blocks, past,
                            method="denoise")
    return x1[:, :generated], x1[:, generated:] if guided else None

  return sampler_lib.integrate(predict, nn.with_logical_constraint(noise, _ROWS), sampler)


@functools.partial(jax.jit, static_argnums=(2, 3))
def draw_noise(
    rng: PRNGKeyArray, index: Int[Array, ""] | int, shape: tuple[int, ...], purpose: int = 0
) -> Float[Array, "B g h w C"]:
  """Noise of clip `index`, a key for each row: no sample depends on how many there are.

  Args:
    rng: of the rollout.
    index: of the clip.
    shape: B g h w C.
    purpose: 0 what the clip starts from; 1 what is mixed into the history.
  """
  clip_rng = jax.random.fold_in(jax.random.fold_in(rng, index), purpose)
  row = lambda b: jax.random.normal(jax.random.fold_in(clip_rng, b), shape[1:])
  return nn.with_logical_constraint(jax.vmap(row)(jnp.arange(shape[0])), _ROWS)


@jax.jit
def _noised(frames: Array, eps: Array, amount: float) -> Array:
  return (1 - amount) * frames + amount * eps


def _extended(config: model.Config, params: Any, cache: cache_lib.Cache, frames: Array,
              is_empty: bool = False) -> cache_lib.Cache:
  out: Any = model.VideoGPT(config).apply({"params": params}, frames, cache, is_empty=is_empty,
                                          method="extend")
  return out


# On the host ------------------------------------------------------------------------------


def generate(
    config: model.Config,
    params: Any,
    history: Float[Array, "B h_ h w C"],
    *,
    num_frames: int,
    clip_frames: int,
    sampler: Sampler = EULER,
    window: Window = UNLIMITED,
    rng: PRNGKeyArray,
) -> Float[Array, "B n h w C"]:
  """Continues `history` by `num_frames` frames; see `clips`. Returns the new frames only."""
  return jnp.concatenate(list(clips(
      config, params, history, num_frames=num_frames, clip_frames=clip_frames, sampler=sampler,
      window=window, rng=rng)), axis=1)


def clips(
    config: model.Config,
    params: Any,
    history: Float[Array, "B h_ h w C"],
    *,
    clip_frames: int | Sequence[int],
    num_frames: int | None = None,
    sampler: Sampler = EULER,
    window: Window = UNLIMITED,
    rng: PRNGKeyArray,
    finished: Iterable[Float[Array, "B g h w C"]] = (),
) -> Iterator[Float[Array, "B g h w C"]]:
  """Continues `history` clip by clip; a clip is yielded when its computation has been started.

  So whoever takes clips can work on one while the device computes the next: it starts when
  the next one is asked for.

  Args:
    config: model.
    params: its parameters.
    history: clean frames, normalised latents.
    clip_frames: frames of a clip; or those of each clip, in place of `num_frames`.
    num_frames: frames to generate; the last clip is shorter if they do not divide. None: for
      ever.
    sampler: how a clip is denoised.
    window: what it sees of the video before it.
    rng: key of the noise, see `draw_noise`.
    finished: the first clips, from an earlier call with the same arguments that did not come
      to its end. They are not computed, nor yielded; what follows is the same bit by bit.

  Raises:
    ValueError: settings that make no sense, a clip longer than the window, or an endless
      rollout without a window.
  """
  if (reason := problem(window) or sampler_lib.problem(sampler)):
    raise ValueError(reason)
  endless = num_frames is None and isinstance(clip_frames, int)
  if not isinstance(clip_frames, int):
    lengths = list(clip_frames)
  else:
    lengths = clip_lengths(clip_frames if num_frames is None else num_frames, clip_frames)
  if endless and not window.frames:
    raise ValueError("without an end (num_frames None) there must be a window")
  past = _History(config, params, window, rng)
  past.slots = max(past.kept(history.shape[1] if not endless else window.frames, lengths),
                   default=0)
  past.enter(history)
  return _clips(past, itertools.repeat(lengths[0]) if endless else lengths, history.shape, sampler,
                finished)


def clip_lengths(num_frames: int, clip_frames: int) -> list[int]:
  """Frames of each clip of `num_frames` frames in all, the last one perhaps shorter.

  Raises:
    ValueError: a clip of no frames.
  """
  if clip_frames < 1:
    raise ValueError(f"a clip needs at least 1 frame, got {clip_frames}")
  return [min(clip_frames, num_frames - done) for done in range(0, num_frames, clip_frames)]


def _clips(past: "_History", lengths: Iterable[int], shape: tuple[int, ...], sampler: Sampler,
           finished: Iterable[Array]) -> Iterator[Array]:
  finished = iter(finished)
  for index, generated in enumerate(lengths):
    size = (shape[0], generated, *shape[2:])
    cache = past.before_clip(index, generated)
    clip = next(finished, None)
    if clip is None:
      clip = denoise_clip(past.config, past.params, cache, draw_noise(past.rng, index, size),
                          sampler)
      yield clip
    amount = past.window.history_noise
    if amount and not past.window.redraw:
      clip = _noised(clip, draw_noise(past.rng, index, size, 1), amount)
    past.enter(clip)


@dataclasses.dataclass
class _History:
  """The clean frames before the next clip, and the cache that follows the window over them."""

  config: model.Config
  params: Any
  window: Window
  rng: PRNGKeyArray
  slots: int = 0  # of the cache
  _frames: list[Array] = dataclasses.field(default_factory=list)  # those that may be encoded yet
  _waiting: int = 0  # how many of these are not in the cache
  _cached: int = 0
  _cache: cache_lib.Cache | None = None

  def kept(self, history: int, lengths: Iterable[int]) -> Iterator[int]:
    """How many frames each of the clips of `lengths` will see."""
    for generated in lengths:
      history = kept_history(history, generated, self.window.frames)
      yield history
      history += generated

  def enter(self, frames: Array) -> None:
    """Appends frames; they are encoded when the next clip wants them."""
    self._frames.append(frames)
    self._waiting += frames.shape[1]
    limit = self.window.frames
    while limit and sum(x.shape[1] for x in self._frames[1:]) >= limit:
      del self._frames[0]

  def before_clip(self, index: int, generated: int) -> cache_lib.Cache:
    """The cache that clip `index`, of so many frames, sees."""
    window, held = self.window, self._cached + self._waiting
    kept = kept_history(held, generated, window.frames)
    redrawn = window.redraw and bool(window.history_noise) and index > 0
    moved = kept < held and (window.mode == "recompute" or kept <= self._waiting)
    if self._cache is None or moved or redrawn:
      frames = self._last(kept)
      if redrawn:
        frames = _noised(frames, draw_noise(self.rng, index, frames.shape, 1),
                         window.history_noise)
      self._cache = None  # before its successor needs the memory
      self._cache = encode(self.config, self.params, frames, self.slots)
    elif self._waiting:
      self._cache = extend(self.config, self.params, self._cache, self._last(self._waiting),
                           held - kept)
    self._cached, self._waiting = kept, 0
    return self._cache

  def _last(self, count: int) -> Array:
    """The last `count` frames."""
    parts: list[Array] = []
    have = 0
    for frames in reversed(self._frames):
      if have < count or not parts:
        parts.insert(0, frames)
        have += frames.shape[1]
    whole = jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]
    return whole[:, whole.shape[1] - count:]
