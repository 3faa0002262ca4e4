"""The image autoencoder of Stable Diffusion XL: frames to latents and back, frame by frame.

The architecture is that of Rombach et al. (arXiv 2112.10752) with the weights of Podell et
al. (arXiv 2307.01952), as the class AutoencoderKL of diffusers arranges it: modules have
its names, so a tensor's name is its path. Everything is NHWC; images are in [-1, 1] and
not clipped on the way out.
"""

from collections.abc import Mapping
import dataclasses
import json
import os
import re
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray
import numpy as np
from safetensors import numpy as safetensors
from safetensors import SafetensorError

from videogpt_jax import convolution
from videogpt_jax.errors import InputError

_EPSILON = 1e-6  # of every group norm
_LOG_VARIANCE = (-30.0, 20.0)  # what the posterior's log-variance is clipped to
_WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclasses.dataclass(frozen=True)
class Config:
  """What decides the parameters; the defaults are SDXL's.

  Attributes:
    block_channels: channels of each level; every level but the last halves the sides.
    layers_per_block: residual blocks of a level of the encoder; the decoder has one more.
    norm_groups: groups of every group norm.
    image_channels: of the frames.
    latent_channels: C.
    scale: what the model sees is `latent * scale`.
    dtype: compute type; norms' statistics and attention weights are float32 always. The
      published weights overflow float16.
  """

  block_channels: tuple[int, ...] = (128, 256, 512, 512)
  layers_per_block: int = 2
  norm_groups: int = 32
  image_channels: int = 3
  latent_channels: int = 4
  scale: float = 0.13025
  dtype: Any = jnp.float32

  @property
  def downsample(self) -> int:
    """Pixels per latent cell, along each side."""
    return 2 ** (len(self.block_channels) - 1)


@flax.struct.dataclass
class Posterior:
  """The normal distribution of a frame's latent; unscaled."""

  mean: Float[Array, "B h w C"]
  log_variance: Float[Array, "B h w C"]

  @classmethod
  def from_moments(cls, moments: Float[Array, "B h w 2C"]) -> "Posterior":
    """Mean and clipped log-variance of the encoder's output."""
    mean, log_variance = jnp.split(moments, 2, axis=-1)
    return cls(mean, jnp.clip(log_variance, *_LOG_VARIANCE))

  def sample(self, rng: PRNGKeyArray) -> Float[Array, "B h w C"]:
    """One draw."""
    return self.at(jax.random.normal(rng, self.mean.shape, self.mean.dtype))

  def at(self, noise: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    """The draw that standard normal `noise` leads to."""
    return self.mean + jnp.exp(0.5 * self.log_variance) * noise


# Parts ------------------------------------------------------------------------------------


class Norm(nn.Module):
  """Group norm in float32 over the cells of a frame.

  Cells are summed first and channels of a group last: on CPU that takes half the time of
  flax's norm, which sums over groups as a further axis.
  """

  groups: int

  @nn.compact
  def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
    batch, height, width, channels = x.shape
    scale = self.param("scale", nn.initializers.ones, (channels,), jnp.float32)
    bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
    size = channels // self.groups
    x = x.astype(jnp.float32)

    def mean(x: Array) -> Array:
      # By rows, then rows: one long sum in float32 would lose digits.
      groups = x.sum(2).sum(1).reshape(batch, self.groups, size).sum(2)
      return jnp.repeat(groups / (height * width * size), size, axis=1)[:, None, None]

    average = mean(x)
    variance = jnp.maximum(mean(x * x) - average * average, 0)
    return (x - average) * (jax.lax.rsqrt(variance + _EPSILON) * scale) + bias


def _norm(config: Config, name: str) -> Norm:
  return Norm(config.norm_groups, name=name)


def _conv(config: Config, channels: int, name: str, by: Any = convolution.same) -> nn.Conv:
  """A 3x3 convolution with a border of one zero; `by` computes it."""
  return nn.Conv(channels, (3, 3), padding=1, dtype=config.dtype, conv_general_dilated=by,
                 name=name)


def _point(config: Config, channels: int, name: str | None = None) -> nn.Conv:
  return nn.Conv(channels, (1, 1), dtype=config.dtype, name=name)


class Resnet(nn.Module):
  """Two normed convolutions beside a skip."""

  config: Config
  channels: int

  @nn.compact
  def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w channels"]:
    c = self.config
    y = _conv(c, self.channels, "conv1")(nn.silu(_norm(c, "norm1")(x)))
    y = _conv(c, self.channels, "conv2")(nn.silu(_norm(c, "norm2")(y)))
    if x.shape[-1] != self.channels:
      x = _point(c, self.channels, "conv_shortcut")(x)
    return x + y


class Attention(nn.Module):
  """Self-attention over the cells of a frame, one head, beside a skip."""

  config: Config

  @nn.compact
  def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
    batch, height, width, channels = x.shape
    dense = lambda name: nn.Dense(channels, dtype=self.config.dtype, name=name)
    y = _norm(self.config, "group_norm")(x).reshape(batch, height * width, channels)
    q, k, v = (dense(name)(y) for name in ("to_q", "to_k", "to_v"))
    scores = jnp.einsum("Bqd,Bkd->Bqk", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(scores * channels**-0.5, axis=-1).astype(v.dtype)
    y = dense("to_out_0")(jnp.einsum("Bqk,Bkd->Bqd", weights, v))
    return x + y.reshape(x.shape)


class Middle(nn.Module):
  """Residual block, attention, residual block, at the lowest resolution."""

  config: Config

  @nn.compact
  def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
    channels = self.config.block_channels[-1]
    x = Resnet(self.config, channels, name="resnets_0")(x)
    x = Attention(self.config, name="attentions_0")(x)
    return Resnet(self.config, channels, name="resnets_1")(x)


class Downsample(nn.Module):
  """Halves the sides; padded at the bottom and on the right alone."""

  config: Config

  @nn.compact
  def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h_ w_ D"]:
    padding = [(0, 1), (0, 1)]
    return nn.Conv(x.shape[-1], (3, 3), 2, padding, dtype=self.config.dtype, name="conv")(x)


class Upsample(nn.Module):
  """Doubles the sides: nearest neighbour, then a convolution."""

  config: Config

  @nn.compact
  def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h_ w_ D"]:
    return _conv(self.config, x.shape[-1], "conv", convolution.doubled)(x)


class Level(nn.Module):
  """Residual blocks of one resolution, then a change of resolution or none."""

  config: Config
  channels: int
  layers: int
  resample: str  # "down", "up" or ""

  @nn.compact
  def __call__(self, x: Float[Array, "B h w D"]) -> Float[Array, "B h_ w_ channels"]:
    for i in range(self.layers):
      x = Resnet(self.config, self.channels, name=f"resnets_{i}")(x)
    if self.resample == "down":
      return Downsample(self.config, name="downsamplers_0")(x)
    if self.resample == "up":
      return Upsample(self.config, name="upsamplers_0")(x)
    return x


class Encoder(nn.Module):
  """Frames to the moments of their latents, before the last 1x1 convolution."""

  config: Config

  @nn.compact
  def __call__(self, x: Float[Array, "B H W 3"]) -> Float[Array, "B h w 2C"]:
    c = self.config
    x = _conv(c, c.block_channels[0], "conv_in")(x)
    for i, channels in enumerate(c.block_channels):
      resample = "down" if i < len(c.block_channels) - 1 else ""
      x = Level(c, channels, c.layers_per_block, resample, name=f"down_blocks_{i}")(x)
    x = Middle(c, name="mid_block")(x)
    x = nn.silu(_norm(c, "conv_norm_out")(x))
    return _conv(c, 2 * c.latent_channels, "conv_out")(x)


class Decoder(nn.Module):
  """Latents to frames, after the first 1x1 convolution."""

  config: Config

  @nn.compact
  def __call__(self, z: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
    c = self.config
    x = _conv(c, c.block_channels[-1], "conv_in")(z)
    x = Middle(c, name="mid_block")(x)
    for i, channels in enumerate(reversed(c.block_channels)):
      resample = "up" if i < len(c.block_channels) - 1 else ""
      x = Level(c, channels, c.layers_per_block + 1, resample, name=f"up_blocks_{i}")(x)
    x = nn.silu(_norm(c, "conv_norm_out")(x))
    return _conv(c, c.image_channels, "conv_out")(x)


class Autoencoder(nn.Module):
  """The whole autoencoder; pure `init` and `apply`, methods `encode` and `decode`."""

  config: Config

  def setup(self) -> None:
    c = self.config
    self.encoder, self.decoder = Encoder(c), Decoder(c)
    self.quant_conv = _point(c, 2 * c.latent_channels)
    self.post_quant_conv = _point(c, c.latent_channels)

  def moments(self, frames: Float[Array, "B H W 3"]) -> Float[Array, "B h w 2C"]:
    """What the posterior is made of; h = H / 8, rounded down at each halving."""
    return self.quant_conv(self.encoder(frames.astype(self.config.dtype))).astype(jnp.float32)

  def encode(self, frames: Float[Array, "B H W 3"]) -> Posterior:
    """The posterior of frames in [-1, 1]."""
    return Posterior.from_moments(self.moments(frames))

  def decode(self, latents: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
    """Frames of unscaled latents, about in [-1, 1]."""
    latents = self.post_quant_conv(latents.astype(self.config.dtype))
    return self.decoder(latents).astype(jnp.float32)

  def __call__(self, frames: Float[Array, "B H W 3"]) -> Float[Array, "B H W 3"]:
    """Frames through the mean of their latents."""
    return self.decode(self.encode(frames).mean)


def encode(config: Config, params: Any, frames: Float[Array, "B H W 3"]) -> Posterior:
  """The posterior of frames in [-1, 1]."""
  out: Any = Autoencoder(config).apply({"params": params}, frames, method="encode")
  return out


def moments(
    config: Config, params: Any, frames: Float[Array, "B H W 3"]
) -> Float[Array, "B h w 2C"]:
  """Mean and log-variance, not clipped, of frames in [-1, 1]."""
  out: Any = Autoencoder(config).apply({"params": params}, frames, method="moments")
  return out


def decode(
    config: Config, params: Any, latents: Float[Array, "B h w C"]
) -> Float[Array, "B H W 3"]:
  """Frames, about in [-1, 1], of unscaled latents."""
  out: Any = Autoencoder(config).apply({"params": params}, latents, method="decode")
  return out


def abstract_params(config: Config) -> dict[str, Any]:
  """The parameter tree as shapes and types."""
  side = config.downsample
  frames = jax.ShapeDtypeStruct((1, side, side, config.image_channels), jnp.float32)
  init = lambda x: Autoencoder(config).init(jax.random.key(0), x)["params"]
  return jax.eval_shape(init, frames)


# Files ------------------------------------------------------------------------------------

# Attention projections in older files.
_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# What else `config.json` may say, and what alone is built here.
_FIXED = {
    "act_fn": "silu", "mid_block_add_attention": True, "use_quant_conv": True,
    "use_post_quant_conv": True, "shift_factor": None, "latents_mean": None, "latents_std": None,
}


def config_from_settings(settings: Mapping[str, Any], dtype: Any = jnp.float32) -> Config:
  """The autoencoder that a diffusers `config.json` describes.

  Raises:
    InputError: a setting is missing, or asks for what is not built here.
  """
  wrong = [f"{name} is {settings[name]!r}, only {value!r} is known"
           for name, value in _FIXED.items() if settings.get(name, value) != value]
  for name, kind in (("down_block_types", "DownEncoderBlock2D"),
                     ("up_block_types", "UpDecoderBlock2D")):
    wrong += [f"{name} has {other!r}, only {kind!r} is known"
              for other in sorted(set(settings.get(name, ())) - {kind})]
  if wrong:
    raise InputError(f"this autoencoder is of another kind: {'; '.join(wrong)}")
  try:
    return Config(
        block_channels=tuple(settings["block_out_channels"]),
        layers_per_block=settings["layers_per_block"], norm_groups=settings["norm_num_groups"],
        image_channels=settings["in_channels"], latent_channels=settings["latent_channels"],
        scale=settings["scaling_factor"], dtype=dtype)
  except KeyError as error:
    raise InputError(f"the autoencoder's config.json lacks {error}") from error


def published_shapes(config: Config) -> dict[str, tuple[int, ...]]:
  """The tensors of diffusers' file, by name; in the order of our parameter tree."""
  leaves, _ = jax.tree.flatten_with_path(abstract_params(config))
  return {_published_name(path): _published_shape(x.shape) for path, x in leaves}


def from_published(tensors: Mapping[str, np.ndarray], config: Config) -> dict[str, Any]:
  """The float32 parameter tree of tensors under diffusers' names, new or old.

  Raises:
    InputError: tensors are missing, unexpected or of another shape; all are named.
  """
  tensors = {_current_name(name): x for name, x in tensors.items()}
  shapes = published_shapes(config)
  wrong = [f"missing {name}" for name in sorted(shapes.keys() - tensors.keys())]
  wrong += [f"unexpected {name}" for name in sorted(tensors.keys() - shapes.keys())]
  wrong += [f"{name} is {tuple(tensors[name].shape)}, expected {shape}"
            for name, shape in sorted(shapes.items())
            if name in tensors and tuple(tensors[name].shape) != shape]
  if wrong:
    more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
    raise InputError(f"these weights do not fit the autoencoder: {'; '.join(wrong[:8])}{more}")
  ours = lambda x: np.transpose(x, _OUR_AXES[x.ndim]).astype(np.float32)
  structure = jax.tree.structure(abstract_params(config))
  return jax.tree.unflatten(structure, [ours(tensors[name]) for name in shapes])


def load(path: str, dtype: Any = jnp.float32) -> tuple[Config, dict[str, Any]]:
  """Settings and parameters of an autoencoder.

  Args:
    path: a folder with `config.json` and the safetensors file that diffusers writes; or the
      name of a repository on the Hugging Face hub, fetched once (extra `[hf]`).
    dtype: compute type.

  Raises:
    InputError: nothing there, a damaged file, or other tensors than the settings ask for.
  """
  folder = path if os.path.isdir(path) else _fetch(path)
  try:
    with open(os.path.join(folder, "config.json"), encoding="utf-8") as file:
      config = config_from_settings(json.load(file), dtype)
    tensors = safetensors.load_file(os.path.join(folder, _WEIGHTS))
  except (OSError, json.JSONDecodeError, SafetensorError) as error:
    raise InputError(f"{folder}: no whole autoencoder ({error}); it needs config.json and "
                     f"{_WEIGHTS}") from error
  return config, from_published(tensors, config)


def _fetch(name: str) -> str:
  """The local folder of a hub repository."""
  advice = (f"no folder {name}; give the path of one with config.json and {_WEIGHTS}, as in "
            "the repository stabilityai/sdxl-vae")
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
    raise InputError(advice)
  try:
    import huggingface_hub
  except ImportError as error:
    raise InputError(f"{advice}; or install huggingface_hub (extra [hf]) to fetch it") from error
  try:
    return huggingface_hub.snapshot_download(name, allow_patterns=["config.json", _WEIGHTS])
  except Exception as error:  # of many libraries: no network, no such name, no permission
    raise InputError(f"{advice}; fetching {name} from the hub failed: {error}") from error


# Convolutions OIHW to HWIO, linear layers [out, in] to [in, out], vectors as they are.
_OUR_AXES = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


def _published_name(path: tuple[Any, ...]) -> str:
  *modules, leaf = (key.key for key in path)
  return ".".join([*(re.sub(r"_(\d+)$", r".\1", name) for name in modules), _LEAVES[leaf]])


def _published_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
  """The shape whose transposition is `shape`."""
  out = [0] * len(shape)
  for ours, theirs in enumerate(_OUR_AXES[len(shape)]):
    out[theirs] = shape[ours]
  return tuple(out)


def _current_name(name: str) -> str:
  *modules, module, leaf = name.split(".")
  return ".".join([*modules, _OLDER.get(module, module), leaf])
