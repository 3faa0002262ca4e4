"""Work that a training step needs: tokens and floating-point operations.

Counted are the tokens somebody looks at (the clean copies of the last clip are not
needed) and the visible pairs of the mask alone, forward and backward (twice forward, or
once for products with frozen weights), whatever an implementation computes beyond that.
Recomputation does not count.
"""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from videogpt_jax import layout
from videogpt_jax import lora
from videogpt_jax import mask
from videogpt_jax import model
from videogpt_jax import objective as objective_lib

_DRAWS = 64  # random partitions over which the expectation is taken


@dataclasses.dataclass(frozen=True)
class Cost:
  """Needed work of one training step of the global batch.

  Attributes:
    tokens: needed tokens.
    sequence: tokens of all sequences, needed or not.
    dense: FLOPs in matrix products with weights, forward and backward.
    forward: of these, forward.
    attention: FLOPs in scores and weighted sums over visible pairs, forward and backward.
  """

  tokens: float
  sequence: float
  dense: float
  forward: float
  attention: float

  @property
  def total(self) -> float:
    """FLOPs in all."""
    return self.dense + self.attention


def expected(costs: Sequence[tuple[float, Cost]]) -> Cost:
  """The mean of several costs by their shares."""
  mean = lambda name: sum(share * getattr(cost, name) for share, cost in costs)
  return Cost(**{field.name: mean(field.name) for field in dataclasses.fields(Cost)})


def token_flops(config: model.Config) -> float:
  """Forward FLOPs of one token in the stack's matrix products."""
  b = config.backbone
  attention = 2 * b.hidden_size * b.head_size * (b.num_heads + b.num_kv_heads)
  return 2.0 * b.num_layers * (attention + 3 * b.hidden_size * b.intermediate_size)


def pair_flops(config: model.Config) -> float:
  """Forward FLOPs of one visible pair: a score and a weighted sum in every head and layer."""
  b = config.backbone
  return 4.0 * b.num_layers * b.num_heads * b.head_size


def training(
  config: model.Config,
  objective: objective_lib.Objective,
  batch: int,
  latent_shape: tuple[int, int, int, int],
) -> Cost:
  """Expected cost of a step on `batch` videos of latents (N, h, w, C).

  Random partitions are averaged over; embeddings and the last layer are counted by patch.
  """
  frames, height, width, channels = latent_shape
  patches = model.patches_per_frame(config, height, width)

  @jax.jit
  def count(keys: jax.Array) -> tuple[jax.Array, ...]:
    nothing = jnp.zeros((1, frames, 1, 1, 1))
    # One by one: samples of a batch may have something in common.
    drawn = jax.vmap(lambda key: objective(key[None], nothing, nothing)[1])(keys)
    blocks = jax.tree.map(lambda x: x[:, 0], drawn)
    tokens = layout.tokens(blocks, patches)
    pairs = jax.lax.map(lambda row: mask.live_pairs(row)[0].astype(jnp.float32),
                        jax.tree.map(lambda x: x[:, None], mask.ranks(tokens)))
    noisy = (blocks.stream == layout.NOISY).sum(1)
    return pairs.mean(), blocks.valid.sum(1).mean(), noisy.mean(), jnp.float32(tokens.role.shape[1])

  keys = objective_lib.row_keys(0, jnp.int32(0), _DRAWS)
  pairs, blocks, noisy, sequence = (float(x) for x in count(keys))
  tokens = blocks * (patches + layout.MARKERS)
  patch_size = channels * config.patch_size**2
  ends = 2.0 * patches * patch_size * config.backbone.hidden_size * (blocks + noisy)
  products = 2.0 if config.backbone.lora else 3.0  # frozen weights have no gradients
  adapters = 2.0 * size_of(lora.split(model.abstract_params(config))[1])
  forward = tokens * token_flops(config) + ends
  return Cost(
    tokens=batch * tokens,
    sequence=batch * sequence,
    dense=batch * (products * forward + 3.0 * tokens * adapters),
    forward=batch * (forward + tokens * adapters),
    attention=3.0 * batch * pairs * pair_flops(config),
  )


def size_of(part: Any) -> int:
  """Numbers in a tree of arrays."""
  return sum(x.size for x in jax.tree.leaves(part))


def parameters(config: model.Config) -> dict[str, int]:
  """Parameters by part, without allocating any."""
  tree, adapters = lora.split(model.abstract_params(config))
  parts = {
    "backbone": size_of(tree["backbone"]),
    "embeddings": size_of(tree["embed_tokens"]),
    "patches": size_of([tree["x_embedder"], tree["input_x_embedder"]]),
    "time": size_of(tree["time_token"]) + size_of(tree["t_embedder"]),
    "final": size_of(tree["final_layer"]),
    **({"adapters": size_of(adapters)} if adapters else {}),
  }
  return {**parts, "total": sum(parts.values())}


def clip(
  config: model.Config,
  history: int,
  generated: int,
  cells: tuple[int, int],
  *,
  evaluations: int,
  guided_evaluations: int = 0,
  recomputed: bool = False,
) -> float:
  """FLOPs of one generated clip: its history encoded once, then every prediction of the sampler.

  Args:
    config: model.
    history: frames that are encoded for it and seen.
    generated: frames of the clip.
    cells: h and w of the latents.
    evaluations: predictions given the history.
    guided_evaluations: how many of them come with one that is given none.
    recomputed: count the history for every prediction, as samplers without a cache do.
  """
  patches = model.patches_per_frame(config, *cells)
  frame = patches + layout.MARKERS
  pairs = lambda blocks: float(mask.live_pairs(mask.ranks(layout.tokens(blocks, patches)))[0])
  sees = frame * frame * history * generated  # of the history, by the clip
  own = pairs(layout.prediction(0, generated))
  past = pairs(layout.prediction(history, generated)) - sees - own
  dense = lambda frames: frame * frames * token_flops(config) + (
    2.0 * frames * patches * config.channels * config.patch_size**2 * config.backbone.hidden_size)
  attention = pair_flops(config)
  encoded = dense(history) + past * attention
  per_evaluation = dense(2 * generated) - frame * generated * token_flops(config)
  return ((evaluations if recomputed else 1) * encoded
          + evaluations * (per_evaluation + (own + sees) * attention)
          + guided_evaluations * (per_evaluation + own * attention))
