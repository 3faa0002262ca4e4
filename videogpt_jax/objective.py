"""What a video becomes in a training step: which frames are denoised, given which.

An objective turns one key per sample and normalised latents, once for what is noised and
predicted and once for the clean copies, into a `flow.Draw` and the frame blocks that stand for
it. The two are the same array, or two draws of one posterior. The model, the mask and the loss
are the same for all.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from videogpt_jax import flow
from videogpt_jax import layout

Objective = Callable[[PRNGKeyArray, Float[Array, "B N h w C"], Float[Array, "B N h w C"]],
                     tuple[flow.Draw, layout.FrameBlocks]]
Partition = Callable[[PRNGKeyArray, int], Int[Array, "B N"]]  # of one key a sample, and N


def next_clip(partition: Partition, beta: float = 0.9, last_clip: int = 1) -> Objective:
  """Next clip diffusion: every clip is denoised, given the clips before it.

  Args:
    partition: cuts the N frames of every sample into clips.
    beta: least cleanness of the history, see `flow.draw`.
    last_clip: frames that the last clip of every partition has, at least; their clean copies,
      which nobody sees, are left out.
  """

  def draw(rng: PRNGKeyArray, latents: Array, clean: Array) -> tuple[flow.Draw, layout.FrameBlocks]:
    rng_clip, rng_noise = _split(rng)
    frames = latents.shape[1]
    clip = partition(rng_clip, frames)
    draw = flow.draw(rng_noise, clip, latents, clean[:, :-last_clip], beta)
    return draw, layout.training(clip, last_clip=last_clip)

  return draw


def continuation(history: int, beta: float = 0.9) -> Objective:
  """Prediction alone: the first `history` frames are given, all others are one noisy clip.

  For N = 16 and a history of 4 half as many tokens as `next_clip`, for a model that will
  only be asked to continue videos in this way.
  """

  def draw(rng: PRNGKeyArray, latents: Array, clean: Array) -> tuple[flow.Draw, layout.FrameBlocks]:
    batch, frames = latents.shape[:2]
    given, target = clean[:, :history], latents[:, history:]
    clip = jnp.zeros(target.shape[:2], jnp.int32)
    draw = flow.draw(_split(rng)[1], clip, target, given, beta)
    return draw, layout.prediction(history, frames - history, batch)

  return draw


def random_partition(rng: PRNGKeyArray, frames: int) -> Int[Array, "B N"]:
  """The paper's partitions into 2..N random clips; see `layout.random_partition`."""
  return jax.vmap(lambda key: layout.random_partition(key, frames))(rng)


def single_partition(rng: PRNGKeyArray, frames: int) -> Int[Array, "B N"]:
  """One frame a clip, the first stage of training."""
  return jnp.tile(layout.single_partition(frames), (len(rng), 1))


def fixed(lengths: tuple[int, ...], beta: float = 0.9) -> Objective:
  """Next clip diffusion on clips of the given lengths, the same for every sample."""
  partition = lambda rng, frames: jnp.tile(layout.fixed_partition(lengths), (len(rng), 1))
  return next_clip(partition, beta, lengths[-1])


def row_keys(seed: int, step: Int[Array, ""], rows: int) -> PRNGKeyArray:
  """One key per row of the global batch: fold_in(seed, step, row)."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


def _split(rng: PRNGKeyArray) -> tuple[PRNGKeyArray, PRNGKeyArray]:
  pair = jax.vmap(jax.random.split)(rng)
  return pair[:, 0], pair[:, 1]
