"""Video-GPT: a plain Transformer that denoises every clip in parallel.

Clean and noisy frames are cut into patches, each stream with an embedding of its own;
marker tokens are rows of `embed_tokens`; the time enters as a token of each noisy block
and through the shift and scale of the last layer. The output is the clean latent, x1.
"""

import dataclasses
from typing import Any

import chex
import einops
from flax import traverse_util
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
import numpy as np

from videogpt_jax import attention
from videogpt_jax import backbone
from videogpt_jax import cache as cache_lib
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
    # As rows, and apart: for one node of GPUs, XLA (0.10.2) otherwise fuses a transposition of P
    # and D into the product, and finds no tiles for it.
    rows = jax.lax.optimization_barrier(x.reshape(-1, D))
    out = backbone.contract(rows, w_out).reshape(*x.shape[:-1], size)
    return out + _bias(self, "bias", (size,), ("patch_out",))


class VideoGPT(nn.Module):
  """The whole model; pure `init` and `apply`.

  Training runs `__call__` on whole sequences. To generate, clean frames go through `extend`
  once, and each denoising step through `denoise`, which computes the noisy frames alone.
  """

  config: Config

  def setup(self) -> None:
    c = self.config
    init: Any = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
    self.embed_tokens = self.param("embed_tokens", init, (c.vocab_size, c.backbone.hidden_size),
                                   jnp.float32)
    self.input_x_embedder = PatchEmbed(c)
    self.x_embedder = PatchEmbed(c)
    self.time_token = TimeEmbed(c)
    self.backbone = backbone.Backbone(c.backbone)
    self.t_embedder = TimeEmbed(c)
    self.final_layer = FinalLayer(c)

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
    chex.assert_shape(blocks.stream, (noisy.shape[0], clean.shape[1] + noisy.shape[1]))
    x_BLD = jnp.concatenate([self._clean_tokens(clean), self._noisy_tokens(noisy, t)], axis=1)
    if prefix is not None:
      x_BLD = jnp.concatenate([prefix.embeddings.astype(x_BLD.dtype), x_BLD], axis=1)
    x_BLD, hidden, _ = self._run(x_BLD, blocks, noisy.shape[2:4], prefix=prefix, capture=capture)
    noisy_tokens = x_BLD.shape[1] // blocks.stream.shape[1] * noisy.shape[1]
    return Output(x1=self._read(x_BLD[:, -noisy_tokens:], noisy, t), hidden=hidden)

  def extend(
      self, frames: Float[Array, "B n h w C"], cache: cache_lib.Cache, *, is_empty: bool = False
  ) -> cache_lib.Cache:
    """Appends clean frames, which see those in the cache and themselves, to it.

    Args:
      frames: normalised latents.
      cache: with at least n free slots.
      is_empty: it is known to hold nothing, so there is nothing to look at.
    """
    past = None if is_empty else cache_lib.past(self.config.backbone, cache)
    blocks = layout.appended(cache.count, frames.shape[1], frames.shape[0])
    x_BLD = self._clean_tokens(frames)
    _, _, own = self._run(x_BLD, blocks, frames.shape[2:4], past=past, keep=True)
    return cache_lib.append(cache, own)

  def denoise(
      self,
      noisy: Float[Array, "B n h w C"],
      t: Float[Array, "B n"],
      blocks: layout.FrameBlocks,
      past: cache_lib.Past,
  ) -> Float[Array, "B n h w C"]:
    """Predicts the clean latents of noisy frames after cached ones.

    Args:
      noisy: frames to denoise.
      t: time of each.
      blocks: what they are; see `layout.next_clip`.
      past: what they see of the cache.
    """
    x_BLD, _, _ = self._run(self._noisy_tokens(noisy, t), blocks, noisy.shape[2:4], past=past)
    return self._read(x_BLD, noisy, t)

  def _clean_tokens(self, frames: Float[Array, "B n h w C"]) -> Float[Array, "B L D"]:
    """`<img>`, patches and `</img>` of every frame."""
    patches_BNPD = self.input_x_embedder(frames)
    x_BNSD = [self._marker(self.config.img_id, frames), patches_BNPD,
              self._marker(self.config.end_img_id, frames)]
    return einops.rearrange(jnp.concatenate(x_BNSD, axis=2), "B n S D -> B (n S) D")

  def _noisy_tokens(
      self, frames: Float[Array, "B n h w C"], t: Float[Array, "B n"]
  ) -> Float[Array, "B L D"]:
    """`<diff>`, time and patches of every frame."""
    chex.assert_equal_shape_prefix([frames, t], 2)
    time_BND = self.time_token(t).astype(self.config.backbone.dtype)
    x_BNSD = [self._marker(self.config.diff_id, frames), time_BND[:, :, None],
              self.x_embedder(frames)]
    return einops.rearrange(jnp.concatenate(x_BNSD, axis=2), "B n S D -> B (n S) D")

  def _marker(self, row: int, frames: Float[Array, "B n h w C"]) -> Float[Array, "B n 1 D"]:
    token_D = jnp.asarray(self.embed_tokens)[row].astype(self.config.backbone.dtype)
    return jnp.broadcast_to(token_D, (*frames.shape[:2], 1, token_D.shape[0]))

  def _run(
      self,
      x_BLD: Float[Array, "B L D"],
      blocks: layout.FrameBlocks,
      cells: tuple[int, ...],
      *,
      prefix: Prefix | None = None,
      past: cache_lib.Past | None = None,
      capture: tuple[int, ...] = (),
      keep: bool = False,
  ) -> tuple[Float[Array, "B L D"], dict[int, Array], Any]:
    """The stack on the tokens of a prefix and of `blocks`, whose latents have h x w `cells`.

    Returns:
      The output, without the prefix's part; captured outputs; the frames' own keys and values.
    """
    c = self.config.backbone
    patches = patches_per_frame(self.config, *cells)
    prefix_size = 0 if prefix is None else prefix.embeddings.shape[1]
    # Each device should have as many tokens, in whole tiles of memory (a mesh that splits the
    # sequence must: libtpu 0.0.42 fails on odd numbers).
    shards, length = sharding.size("sequence"), x_BLD.shape[1]
    tile = max(attention.tile(c.attention, length, c.head_size, c.dtype), 16 if shards > 1 else 1)
    tokens = layout.tokens(blocks, patches, None if prefix is None else prefix.length,
                           prefix_size=prefix_size, multiple=tile * shards)
    whole = tokens.position.shape[1]
    x_BLD = jnp.pad(x_BLD, [(0, 0), (0, whole - length), (0, 0)])
    ranks = mask.ranks(tokens)
    ranks_k = ranks if past is None else mask.concatenate(past.ranks, ranks)
    block_map = attention.plan(
        ranks, ranks_k, frame_tokens=patches + layout.MARKERS, head_size=c.head_size,
        dtype=c.dtype, implementation=c.attention)
    cos, sin = backbone.rotary_angles(c, tokens.position)
    context = backbone.Context(cos=cos, sin=sin, ranks_q=ranks, ranks_k=ranks_k,
                               block_map=block_map)
    x_BLD = nn.with_logical_constraint(x_BLD, ("batch", "length", "embed"))
    x_BLD, hidden, own = self.backbone(x_BLD, context, None if past is None else past.tokens,
                                       capture=capture, keep=keep)
    if own is not None:
      own = jax.tree.map(lambda x: x[:, :, prefix_size:length], own)
    return x_BLD[:, prefix_size:length], hidden, own

  def _read(
      self, x_BLD: Float[Array, "B L D"], noisy: Float[Array, "B n h w C"], t: Float[Array, "B n"]
  ) -> Float[Array, "B n h w C"]:
    """The clean latents that the stack's output says, for the `noisy` frames at times `t`."""
    x_BNSD = x_BLD.reshape(*noisy.shape[:2], -1, x_BLD.shape[-1])
    x_BNPO = self.final_layer(x_BNSD[:, :, layout.MARKERS:], self.t_embedder(t))
    p = self.config.patch_size
    return einops.rearrange(x_BNPO, "B n (y x) (p q C) -> B n (y p) (x q) C",
                            y=noisy.shape[2] // p, p=p, q=p)


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


def rounded(name: str) -> bool:
  """Whether the model uses the parameter at the path `name` only in its compute type."""
  return name in ("embed_tokens", "x_embedder/kernel", "input_x_embedder/kernel") or (
      name.removeprefix("backbone/layers/") in backbone.MATRICES)


def with_type(params: Any, dtype: Any) -> Any:
  """A tree of which those parameters that are `rounded` have the type `dtype`."""
  flat = traverse_util.flatten_dict(params, sep="/")
  cast = lambda x: jax.tree.map(lambda leaf: leaf.astype(dtype), x)  # boxes stay around
  return traverse_util.unflatten_dict(
      {name: cast(x) if rounded(name) else x for name, x in flat.items()}, sep="/")


def abstract_params(config: Config) -> dict[str, Any]:
  """The parameter tree of a model as shapes and types (without axis names)."""
  # Unboxed inside: under a mesh that is where sharding constraints can be met.
  return jax.eval_shape(lambda: nn.meta.unbox(init_params(config, 0)))


def _bias(module: nn.Module, name: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> Array:
  init: Any = nn.with_logical_partitioning(nn.initializers.zeros_init(), axes)
  return module.param(name, init, shape, jnp.float32)
