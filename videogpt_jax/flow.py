"""Flow matching on clips: noising and the clean-latent loss.

Time runs from noise to data: `x_t = t * x1 + (1 - t) * x0`, x0 ~ N(0, I), so t = 1 is
clean. Every clip has one t, shared by its frames. The model predicts x1 (the clean
latent), from which `sampler` goes the way back. Clean history is slightly noised in
training. Source: paper, section 3.1, and the published implementation for the constants.
"""

import chex
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray


@flax.struct.dataclass
class Draw:
  """One noising of a batch: what the model is given and what it must predict."""

  target: Float[Array, "B N h w C"]  # x1
  noisy: Float[Array, "B N h w C"]
  t: Float[Array, "B N"]
  clip: Int[Array, "B N"]
  clean: Float[Array, "B Nc h w C"]
  clean_t: Float[Array, "B Nc"]


def interpolate(
    x1: Float[Array, "*B h w C"], x0: Float[Array, "*B h w C"], t: Float[Array, "*B"]
) -> Float[Array, "*B h w C"]:
  """`t * x1 + (1 - t) * x0`, one time per frame."""
  t = t[..., None, None, None]
  return t * x1 + (1 - t) * x0


def draw(
    rng: PRNGKeyArray,
    clip: Int[Array, "B N"],
    target: Float[Array, "B N h w C"],
    clean: Float[Array, "B Nc h w C"] | None = None,
    beta: float = 0.9,
) -> Draw:
  """Noises a batch: each clip at its own t ~ U[0, 1), the history nearly clean.

  Args:
    rng: one key per sample, [B]; a sample's noise depends on its own key alone.
    clip: clip index of each target frame.
    target: frames to be predicted, normalised latents.
    clean: frames the model may see as history; by default all target frames but the last.
    beta: the history is at least this clean: its time is beta + U[0, 1 - beta) per frame.
  """
  if clean is None:
    clean = target[:, :-1]
  chex.assert_equal_shape_prefix([clip, target], 2)

  def one(rng: PRNGKeyArray, clip: Array, x1: Array, history: Array) -> tuple[Array, ...]:
    rng_t, rng_x0, rng_gamma, rng_eps = jax.random.split(rng, 4)
    t = jax.random.uniform(rng_t, clip.shape)[clip]  # one draw per clip, by its index
    noisy = interpolate(x1, jax.random.normal(rng_x0, x1.shape), t)
    clean_t = beta + (1 - beta) * jax.random.uniform(rng_gamma, history.shape[:1])
    eps = jax.random.normal(rng_eps, history.shape)
    return noisy, t, interpolate(history, eps, clean_t), clean_t

  noisy, t, clean, clean_t = jax.vmap(one)(rng, clip, target, clean)
  return Draw(target=target, noisy=noisy, t=t, clip=clip, clean=clean, clean_t=clean_t)


def loss(
    x1: Float[Array, "B N h w C"],
    draw: Draw,
    valid: Bool[Array, "B N"] | None = None,
    normalizer: Float[Array, ""] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, "B N"]]]:
  """Mean square error of the predicted clean latents, every real frame weighing the same.

  Args:
    x1: prediction.
    draw: what was to be predicted.
    valid: false for frames that pad a shorter video.
    normalizer: real frames of the *global* batch, over all devices and accumulation
      steps; by default those of this one. With it, losses of parts add up.

  Returns:
    The loss, and aux: `frame_loss` (zero where padded), `frame_weight`, `t`, `clip`.
  """
  chex.assert_equal_shape([x1, draw.target])
  difference = x1.astype(jnp.float32) - draw.target.astype(jnp.float32)
  frame_loss = jnp.mean(jnp.square(difference), axis=(2, 3, 4))
  weight = jnp.ones_like(frame_loss) if valid is None else valid.astype(jnp.float32)
  frame_loss = jnp.where(weight > 0, frame_loss, 0.0)
  if normalizer is None:
    normalizer = jnp.maximum(weight.sum(), 1.0)
  aux = {"frame_loss": frame_loss, "frame_weight": weight, "t": draw.t, "clip": draw.clip}
  return frame_loss.sum() / normalizer, aux
