"""Video-GPT: a plain Transformer that denoises every clip in parallel.

Clean and noisy frames are cut into patches, each stream with an embedding of its own;
marker tokens are rows of `embed_tokens`; the time enters as a token of each noisy block
and through the shift and scale of the last layer. The output is the clean latent, x1.
"""

import dataclasses
from typing import Any

import chex
import einops
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from videogpt_jax import attention
from videogpt_jax import backbone
from videogpt_jax import layout
from videogpt_jax import mask
from videogpt_jax import sharding

TIME_FEATURES = 256
_POSITION_SPAN = 64  # the position table covers coordinates 0..64 whatever its size


@dataclasses.dataclass(frozen=True)
class Config:
  """Everything that decides the model's parameters and its function.

  Attributes:
    backbone: the Transformer stack.
    channels: C of the latents.
    patch_size: p, side of a patch in latent cells.
    vocab_size: V, rows of `embed_tokens`.
    img_id: row of the `<img>` marker; likewise `end_img_id`, `diff_id`.
    pos_embed_max_size: side of the position table from which a centred crop is taken.
  """

  backbone: backbone.Config
  channels: int
  patch_size: int = 2
  vocab_size: int = 4
  img_id: int = 1
  end_img_id: int = 2
  diff_id: int = 3
  pos_embed_max_size: int = 192


@flax.struct.dataclass
class Prefix:
  """Condition tokens before the frames: embeddings, and how many of them are real."""

  embeddings: Float[Array, "B n D"]
  length: Int[Array, "B"]


@flax.struct.dataclass
class Output:
  """x1: predicted clean latents; hidden: outputs of captured layers."""

  x1: Float[Array, "B Nn h w C"]
  hidden: dict[int, Float[Array, "B L D"]]


def patches_per_frame(config: Config, height: int, width: int) -> int:
  """P for latents of height x width cells. Raises `ValueError` if patches do not fit."""
  p = config.patch_size
  if height % p or width % p:
    raise ValueError(f"latents of {height}x{width} cells do not divide into {p}x{p} patches")
  return (height // p) * (width // p)


def time_features(t: Float[Array, "*B"]) -> Float[Array, "*B 256"]:
  """`[cos(t w), sin(t w)]`, w_j = 10000^(-j/128), in float32; t in [0, 1] is not scaled."""
  half = TIME_FEATURES // 2
  frequency = 10000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
  angle = t[..., None].astype(jnp.float32) * frequency
  return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=-1)


def position_table(hidden_size: int, max_size: int, rows: int, columns: int) -> np.ndarray:
  """The centred rows x columns crop of the 2-D sine-cosine table, float32 [P, D].

  Entry (y, x) has coordinates 64 y / G and 64 x / G in a table of side G; the first half
  of the channels encodes x, the second y, each as [sin, cos].

  Raises:
    ValueError: the crop is larger than the table.
  """
  if max(rows, columns) > max_size:
    raise ValueError(f"{rows}x{columns} patches exceed the position table: "
                     f"pos_embed_max_size is {max_size}")
  quarter = hidden_size // 4
  frequency = 10000.0 ** (-np.arange(quarter, dtype=np.float64) / quarter)

  def encode(count: int) -> np.ndarray:
    start = (max_size - count) // 2
    angle = np.outer((start + np.arange(count)) * (_POSITION_SPAN / max_size), frequency)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)

  y, x = encode(rows), encode(columns)
  table = np.concatenate([np.broadcast_to(x[None], (rows, columns, 2 * quarter)),
                          np.broadcast_to(y[:, None], (rows, columns, 2 * quarter))], axis=-1)
  return table.reshape(rows * columns, -1).astype(np.float32)


class PatchEmbed(nn.Module):
  """Patches to tokens: a convolution whose stride is its size, plus the position table."""

  config: Config

  @nn.compact
  def __call__(self, frames: Float[Array, "B N h w C"]) -> Float[Array, "B N P D"]:
    c = self.config
    D, p = c.backbone.hidden_size, c.patch_size
    axes = ("patch_y", "patch_x", "channel", "embed")
    w = backbone.kernel(self, "kernel", (p, p, c.channels, D), axes, (0, 1, 2))
    bias = _bias(self, "bias", (D,), ("embed",))
    x = einops.rearrange(frames, "B N (y p) (x q) C -> B N (y x) p q C", p=p, q=p)
    x = backbone.contract(x.astype(c.backbone.dtype), w, axes=3)
    rows, columns = frames.shape[2] // p, frames.shape[3] // p
    table = position_table(D, c.pos_embed_max_size, rows, columns)
    return x + (bias + table).astype(c.backbone.dtype)


class TimeEmbed(nn.Module):
  """Time to a vector: features, linear, SiLU, linear; in float32."""

  config: Config

  @nn.compact
  def __call__(self, t: Float[Array, "B N"]) -> Float[Array, "B N D"]:
    D = self.config.backbone.hidden_size
    w_in = backbone.kernel(self, "in_kernel", (TIME_FEATURES, D), ("time", "embed"))
    w_out = backbone.kernel(self, "out_kernel", (D, D), ("embed", "embed_out"))
    hidden = nn.silu(time_features(t) @ w_in + _bias(self, "in_bias", (D,), ("embed",)))
    return hidden @ w_out + _bias(self, "out_bias", (D,), ("embed_out",))


class FinalLayer(nn.Module):
  """Tokens to patches: layer norm, shift and scale by the time, linear; in float32."""

  config: Config

  @nn.compact
  def __call__(
      self, x_BNPD: Float[Array, "B N P D"], time_BND: Float[Array, "B N D"]
  ) -> Float[Array, "B N P O"]:
    c = self.config
    D, size = c.backbone.hidden_size, c.patch_size**2 * c.channels
    w_mod = backbone.kernel(self, "modulation_kernel", (D, 2, D),
                            ("embed", "shift_scale", "embed_out"), zeros=True)
    b_mod = _bias(self, "modulation_bias", (2, D), ("shift_scale", "embed_out"))
    w_out = backbone.kernel(self, "kernel", (D, size), ("embed", "patch_out"), zeros=True)
    modulation = jnp.einsum("BND,DKE->BNKE", nn.silu(time_BND), w_mod) + b_mod
    x = nn.LayerNorm(epsilon=1e-6, use_bias=False, use_scale=False)(x_BNPD.astype(jnp.float32))
    x = x * (1 + modulation[:, :, None, 1]) + modulation[:, :, None, 0]
    return backbone.contract(x, w_out) + _bias(self, "bias", (size,), ("patch_out",))


class VideoGPT(nn.Module):
  """The whole model; pure `init` and `apply`."""

  config: Config

  @nn.compact
  def __call__(
      self,
      clean: Float[Array, "B Nc h w C"],
      noisy: Float[Array, "B Nn h w C"],
      t: Float[Array, "B Nn"],
      blocks: layout.FrameBlocks,
      prefix: Prefix | None = None,
      capture: tuple[int, ...] = (),
  ) -> Output:
    """Predicts the clean latents of the noisy frames.

    Args:
      clean: history, normalised latents; Nc may be 0.
      noisy: frames to denoise.
      t: time of each noisy frame.
      blocks: what the Nc + Nn frames are, in this order; see `layout`.
      prefix: condition tokens, seen by all frames.
      capture: layers whose outputs are returned as well.
    """
    c = self.config
    chex.assert_equal_shape_prefix([noisy, t], 2)
    chex.assert_shape(blocks.stream, (noisy.shape[0], clean.shape[1] + noisy.shape[1]))
    height, width = noisy.shape[2:4]
    patches = patches_per_frame(c, height, width)

    x_BMSD = self._embed(clean, noisy, t)
    x_BLD = einops.rearrange(x_BMSD, "B M S D -> B (M S) D")
    if prefix is not None:
      x_BLD = jnp.concatenate([prefix.embeddings.astype(x_BLD.dtype), x_BLD], axis=1)
    prefix_size = 0 if prefix is None else prefix.embeddings.shape[1]
    # A mesh that splits the sequence wants as many tokens for each device, in whole tiles of
    # memory (libtpu 0.0.42 fails on odd numbers).
    shards = sharding.size("sequence")
    tokens = layout.tokens(blocks, patches, None if prefix is None else prefix.length,
                           prefix_size=prefix_size, multiple=16 * shards if shards > 1 else 1)
    length, whole = x_BLD.shape[1], tokens.position.shape[1]
    x_BLD = jnp.pad(x_BLD, [(0, 0), (0, whole - length), (0, 0)])
    ranks = mask.ranks(tokens)
    block_map = attention.plan(
        ranks, ranks, frame_tokens=patches + layout.MARKERS, head_size=c.backbone.head_size,
        dtype=c.backbone.dtype, implementation=c.backbone.attention)
    cos, sin = backbone.rotary_angles(c.backbone, tokens.position)
    context = backbone.Context(cos=cos, sin=sin, ranks=ranks, block_map=block_map)
    x_BLD = nn.with_logical_constraint(x_BLD, ("batch", "length", "embed"))
    x_BLD, hidden = backbone.Backbone(c.backbone, name="backbone")(x_BLD, context, capture)

    noisy_tokens = noisy.shape[1] * (patches + layout.MARKERS)
    x_BNSD = x_BLD[:, length - noisy_tokens:length].reshape(
        *noisy.shape[:2], -1, c.backbone.hidden_size)
    time_BND = TimeEmbed(c, name="t_embedder")(t)
    x_BNPO = FinalLayer(c, name="final_layer")(x_BNSD[:, :, layout.MARKERS:], time_BND)
    x1 = einops.rearrange(x_BNPO, "B N (y x) (p q C) -> B N (y p) (x q) C",
                          y=height // c.patch_size, p=c.patch_size, q=c.patch_size)
    return Output(x1=x1, hidden=hidden)

  def _embed(self, clean: Array, noisy: Array, t: Array) -> Float[Array, "B M S D"]:
    """Markers, time and patches of every block, clean ones first."""
    c = self.config
    D = c.backbone.hidden_size
    init: Any = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
    table_VD: Array = self.param("embed_tokens", init, (c.vocab_size, D), jnp.float32)
    table_VD = table_VD.astype(c.backbone.dtype)
    marker = lambda row, frames: jnp.broadcast_to(table_VD[row], (*frames.shape[:2], 1, D))
    clean_BNPD = PatchEmbed(c, name="input_x_embedder")(clean)
    noisy_BNPD = PatchEmbed(c, name="x_embedder")(noisy)
    time_BND = TimeEmbed(c, name="time_token")(t).astype(c.backbone.dtype)
    return jnp.concatenate([
        jnp.concatenate([marker(c.img_id, clean), clean_BNPD, marker(c.end_img_id, clean)], axis=2),
        jnp.concatenate([marker(c.diff_id, noisy), time_BND[:, :, None], noisy_BNPD], axis=2),
    ], axis=1)


def predict(
    config: Config,
    params: Any,
    clean: Float[Array, "B Nc h w C"],
    noisy: Float[Array, "B Nn h w C"],
    t: Float[Array, "B Nn"],
    blocks: layout.FrameBlocks,
) -> Float[Array, "B Nn h w C"]:
  """The predicted clean latents alone; see `VideoGPT.__call__`."""
  out: Any = VideoGPT(config).apply({"params": params}, clean, noisy, t, blocks)
  return out.x1


def init_params(config: Config, seed: int) -> Any:
  """Fresh parameters, boxed with their logical axis names.

  From one pass over two frames of one patch, which no device mesh has to split: so it
  attends by the dense reference, whatever the configuration wants.
  """
  stack = dataclasses.replace(config.backbone, attention="reference")
  network = VideoGPT(dataclasses.replace(config, backbone=stack))
  side = config.patch_size
  frame = jnp.zeros((1, 1, side, side, config.channels))
  return network.init(jax.random.key(seed), frame, frame, jnp.zeros((1, 1)),
                      layout.prediction(1, 1))["params"]


def abstract_params(config: Config) -> dict[str, Any]:
  """The parameter tree of a model as shapes and types (without axis names)."""
  return nn.meta.unbox(jax.eval_shape(lambda: init_params(config, 0)))


def _bias(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Array:
  init: Any = nn.with_logical_partitioning(nn.initializers.zeros_init(), axes)
  return module.param(name, init, shape, jnp.float32)
