"""Next clip generation: roll out a video clip after clip over a sliding window.

Each new clip starts as noise and is denoised in T steps while it sees the clean frames
before it; then it joins the history. When history and new clip exceed the window, the
oldest frames leave and positions start at 0 for the first frame kept.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from videogpt_jax import flow
from videogpt_jax import layout
from videogpt_jax import model


@dataclasses.dataclass(frozen=True)
class Sampler:
  """How a clip is denoised.

  Attributes:
    steps: T, Euler steps.
    guidance: weight of the conditional velocity; 1 leaves the unconditional branch out.
    shift: of the time grid, see `flow.time_grid`.
    history_noise: n; from the second clip on, all frames of the history are drawn anew as
      (1 - n) x + n eps for every clip, as published. The model was trained on n up to 0.1.
  """

  steps: int = 20
  guidance: float = 1.0
  shift: float = 1.0
  history_noise: float = 0.0


@functools.partial(jax.jit, static_argnums=(0, 4))
def denoise_clip(
    config: model.Config,
    params: dict,
    history: Float[Array, "B h_ h w C"],
    noise: Float[Array, "B g h w C"],
    sampler: Sampler,
) -> Float[Array, "B g h w C"]:
  """Denoises one clip of g frames from `noise`, given the clean `history` (may be empty)."""
  batch, generated = noise.shape[:2]

  def predict(z: Array, t: Array, past: Array) -> Array:
    blocks = layout.prediction(past.shape[1], generated, batch)
    times = jnp.full((batch, generated), t)
    return model.predict(config, params, past, z, times, blocks)

  def step(z: Array, times: tuple[Array, Array]) -> tuple[Array, None]:
    t, t_next = times
    v = flow.velocity(predict(z, t, history), z, t)
    if sampler.guidance != 1.0:
      unconditional = flow.velocity(predict(z, t, history[:, :0]), z, t)
      v = flow.guide(v, unconditional, sampler.guidance)
    return flow.euler_step(z, v, t, t_next), None

  grid = flow.time_grid(sampler.steps, sampler.shift)
  z, _ = jax.lax.scan(step, noise.astype(jnp.float32), (grid[:-1], grid[1:]))
  return z


def kept_history(history: int, generated: int, window: int) -> int:
  """Frames of history that stay in a window with `generated` new ones; window 0: all.

  Raises:
    ValueError: the new clip alone exceeds the window.
  """
  if window and generated > window:
    raise ValueError(f"a clip of {generated} frames does not fit a window of {window}")
  return min(history, window - generated) if window else history


def generate(
    config: model.Config,
    params: dict,
    history: Float[Array, "B h_ h w C"],
    *,
    num_frames: int,
    clip_frames: int,
    sampler: Sampler = Sampler(),
    window: int = 0,
    rng: PRNGKeyArray,
) -> Float[Array, "B n h w C"]:
  """Continues `history` by `num_frames` frames, `clip_frames` at a time.

  Args:
    config: model.
    params: its parameters.
    history: clean frames, normalised latents.
    num_frames: frames to generate; the last clip is shorter if they do not divide.
    clip_frames: frames of a clip.
    sampler: how a clip is denoised.
    window: most frames in a sequence; 0: no limit.
    rng: key of the noise; clip i uses fold_in(rng, i).

  Returns:
    The new frames only.
  """
  batch, _, *cell = history.shape
  video, start = history, history.shape[1]
  for index, done in enumerate(range(0, num_frames, clip_frames)):
    size = min(clip_frames, num_frames - done)
    clip_rng = jax.random.fold_in(rng, index)
    noise = jax.random.normal(clip_rng, (batch, size, *cell))
    kept = kept_history(video.shape[1], size, window)
    past = video[:, video.shape[1] - kept:]
    if index and sampler.history_noise:
      eps = jax.random.normal(jax.random.fold_in(clip_rng, 0), past.shape)
      past = (1 - sampler.history_noise) * past + sampler.history_noise * eps
    video = jnp.concatenate([video, denoise_clip(config, params, past, noise, sampler)], axis=1)
  return video[:, start:]
