"""Codecs: frames to latents and back, behind one small interface.

A data set stores what `encode` returns (for a VAE the unscaled posterior mean, for
pixels the bytes themselves). The model sees `normalize(latents)` only; `denormalize`
and `decode` lead back to frames. A codec is described by the JSON-able dict of
`spec()`, which stands in a data set's metadata and beside exported weights.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import functools
import itertools
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from videogpt_jax import tiling
from videogpt_jax import vae
from videogpt_jax.errors import InputError


class Codec(Protocol):
  """Frames `uint8 [..., H, W, 3]` to stored latents `[..., h, w, C]` and back."""

  @property
  def downsample(self) -> int:
    """Pixels per latent cell, along each side."""

  @property
  def channels(self) -> int:
    """Channels C of a latent."""

  @property
  def dtype(self) -> np.dtype:
    """Type of the stored latents."""

  @property
  def moments(self) -> bool:
    """Whether a posterior is stored: C means, then C log-variances."""

  @property
  def on_device(self) -> bool:
    """Whether it computes on jax's devices, which several processes cannot share."""

  def prepare(self) -> None:
    """Loads what `encode` and `decode` need. Raises `InputError` if it is not there."""

  def encode(self, frames: np.ndarray) -> np.ndarray:
    """Frames `uint8 [..., H, W, 3]` to stored (unscaled) latents `[..., h, w, C or 2C]`."""

  def start_encode(self, frames: np.ndarray) -> Callable[[], np.ndarray]:
    """Starts to encode; see `encode`.

    Returns:
      A function that waits for the latents. Devices take turns, so that all of them are at
      work when several clips have been started.
    """

  def decode(self, latents: np.ndarray) -> np.ndarray:
    """Unscaled latents `[..., h, w, C]` (stored or predicted) to frames `uint8 [..., H, W, 3]`."""

  def normalize(self, latents: jax.Array) -> jax.Array:
    """Stored latents (of a posterior, its means) to what the model sees, float32.

    Runs on the device.
    """

  def sample(self, latents: jax.Array, noise: jax.Array) -> jax.Array:
    """As `normalize`, of the draw that standard normal `noise` [..., h, w, C] leads to.

    Raises:
      ValueError: no posterior is stored.
    """

  def denormalize(self, latents: jax.Array) -> jax.Array:
    """The inverse of `normalize`, without rounding."""

  def start_decode(self, latents: jax.Array) -> Callable[[], np.ndarray]:
    """Starts to decode what the model predicted, [..., h, w, C] as it sees latents.

    Returns:
      A function that waits for the frames `uint8 [..., H, W, 3]`. Until it is called, the
      device works on what it was given before and after.
    """

  def spec(self) -> dict[str, Any]:
    """A JSON-able description from which `from_spec` builds the same codec."""


@dataclasses.dataclass(frozen=True)
class Pixels:
  """Pixels as latents, `block` x `block` of them folded into channels (space-to-depth).

  Stored as the bytes themselves; the model sees `(byte / 255 - shift) * scale`.
  """

  block: int = 1
  scale: float = 2.0
  shift: float = 0.5

  def __post_init__(self) -> None:
    if self.block < 1:
      raise InputError(f"codec.block must be at least 1, got {self.block}")
    if not self.scale > 0:
      raise InputError(f"codec.scale must be positive, got {self.scale}")

  @property
  def downsample(self) -> int:
    return self.block

  @property
  def channels(self) -> int:
    return 3 * self.block**2

  @property
  def dtype(self) -> np.dtype:
    return np.dtype(np.uint8)

  @property
  def moments(self) -> bool:
    return False

  @property
  def on_device(self) -> bool:
    return False

  def prepare(self) -> None:
    """Nothing is needed."""

  def encode(self, frames: np.ndarray) -> np.ndarray:
    """Folds pixels into channels; see `Codec.encode`. Raises `InputError` on odd sizes."""
    *lead, height, width, colours = frames.shape
    b = self.block
    if height % b or width % b:
      raise InputError(f"frames of {height}x{width} px do not divide into {b}x{b} px blocks")
    x = frames.reshape(*lead, height // b, b, width // b, b, colours)
    return np.moveaxis(x, -4, -3).reshape(*lead, height // b, width // b, b * b * colours)

  def start_encode(self, frames: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: self.encode(frames)

  def decode(self, latents: np.ndarray) -> np.ndarray:
    """Unfolds channels into pixels, rounds and clips; see `Codec.decode`."""
    *lead, h, w, _ = latents.shape
    b = self.block
    x = np.asarray(latents).reshape(*lead, h, w, b, b, 3)
    x = np.moveaxis(x, -3, -4).reshape(*lead, h * b, w * b, 3)
    return x if x.dtype == np.uint8 else np.clip(np.rint(x), 0, 255).astype(np.uint8)

  def normalize(self, latents: jax.Array) -> jax.Array:
    return (jnp.asarray(latents, jnp.float32) / 255.0 - self.shift) * self.scale

  def sample(self, latents: jax.Array, noise: jax.Array) -> jax.Array:
    raise ValueError("pixels have no posterior")

  def denormalize(self, latents: jax.Array) -> jax.Array:
    return (jnp.asarray(latents, jnp.float32) / self.scale + self.shift) * 255.0

  def start_decode(self, latents: jax.Array) -> Callable[[], np.ndarray]:
    pixels = self.denormalize(latents)
    return lambda: self.decode(jax.device_get(pixels))

  def spec(self) -> dict[str, Any]:
    return {"id": "pixels", **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class Vae:
  """Latents of an image autoencoder, frame by frame; the defaults are SDXL's.

  Stored unscaled, as the posterior's mean, or with `moments` as its mean and log-variance; the
  model sees `(latent - shift) * scale`. The autoencoder itself is loaded when first a frame is
  encoded or decoded, so that training on stored latents needs none.

  Attributes:
    block: pixels per latent cell, along each side.
    channels: C of the latents.
    scale: factor of what the model sees.
    shift: subtracted before.
    path: the autoencoder, see `vae.load`. Where it lies is no part of `spec`, nor is what
      follows: how latents are stored and computed.
    moments: see above.
    precision: type of the stored latents, float16 or bfloat16.
    tile: px; frames with a longer side are encoded and decoded by overlapping tiles of this
      side, see `tiling`; 0: never.
  """

  block: int = 8
  channels: int = 4
  scale: float = 0.13025
  shift: float = 0.0
  path: str = "stabilityai/sdxl-vae"
  moments: bool = False
  precision: str = "float16"
  tile: int = 512

  def __post_init__(self) -> None:
    if self.precision not in ("float16", "bfloat16"):
      raise InputError(f"codec.precision must be float16 or bfloat16, got {self.precision!r}")
    if self.tile < 0 or self.tile % (4 * self.block):
      raise InputError(f"codec.tile must be a multiple of {4 * self.block} px (four latent cells), "
                       f"or 0 for none, got {self.tile}")
    if not self.scale > 0:
      raise InputError(f"codec.scale must be positive, got {self.scale}")

  @property
  def downsample(self) -> int:
    return self.block

  @property
  def dtype(self) -> np.dtype:
    return jnp.dtype(self.precision)

  @property
  def on_device(self) -> bool:
    return True

  def prepare(self) -> None:
    """Loads the autoencoder; see `Codec.prepare`."""
    _autoencoder(self)

  def encode(self, frames: np.ndarray) -> np.ndarray:
    """Means (or moments) of the posterior; see `Codec.encode`.

    Raises:
      InputError: the frames' sides are no multiples of `block`, or no autoencoder is at `path`.
    """
    return self.start_encode(frames)()

  def start_encode(self, frames: np.ndarray) -> Callable[[], np.ndarray]:
    *lead, height, width, colours = frames.shape
    if height % self.block or width % self.block:
      raise InputError(f"frames of {height}x{width} px do not divide into latent cells of "
                       f"{self.block} px")
    run, _ = _autoencoder(self)
    flat = frames.reshape(-1, height, width, colours)
    parts = list(_batches(run, flat))

    def wait() -> np.ndarray:
      latents = _joined(parts, len(flat))
      return latents.reshape(*lead, *latents.shape[1:])

    return wait

  def decode(self, latents: np.ndarray) -> np.ndarray:
    """Frames, rounded and clipped; see `Codec.decode`. Of moments, those of the means."""
    latents = latents[..., :self.channels]
    lead = latents.shape[:-3]
    _, run = _autoencoder(self)
    flat = np.asarray(latents).reshape(-1, *latents.shape[-3:])
    frames = _joined(_batches(run, flat), len(flat))
    return frames.reshape(*lead, *frames.shape[1:])

  def normalize(self, latents: jax.Array) -> jax.Array:
    means = jnp.asarray(latents[..., :self.channels], jnp.float32)
    return (means - self.shift) * self.scale

  def sample(self, latents: jax.Array, noise: jax.Array) -> jax.Array:
    if latents.shape[-1] != 2 * self.channels:
      raise ValueError(f"{latents.shape[-1]} channels are no posterior of {self.channels}")
    posterior = vae.Posterior.from_moments(jnp.asarray(latents, jnp.float32))
    return (posterior.at(noise) - self.shift) * self.scale

  def denormalize(self, latents: jax.Array) -> jax.Array:
    return jnp.asarray(latents, jnp.float32) / self.scale + self.shift

  def start_decode(self, latents: jax.Array) -> Callable[[], np.ndarray]:
    lead = latents.shape[:-3]
    _, run = _autoencoder(self)
    flat = self.denormalize(latents).reshape(-1, *latents.shape[-3:])
    parts = list(_batches(run, flat))  # all under way before anybody waits for the first

    def wait() -> np.ndarray:
      frames = _joined(parts, len(flat))
      return frames.reshape(*lead, *frames.shape[1:])

    return wait

  def spec(self) -> dict[str, Any]:
    same_latents = ("block", "channels", "scale", "shift")
    return {"id": "vae", **{name: getattr(self, name) for name in same_latents}}


_FRAMES_AT_ONCE = 8


@functools.cache
def _autoencoder(codec: Vae) -> tuple[Any, Any]:
  """`uint8 frames -> stored latents` and `latents -> uint8 frames` of a codec's autoencoder.

  The first goes to this process's devices in turn, each with the same program, so that what a
  frame becomes never depends on how many there are; the second runs where its latents lie.
  """
  config, params = vae.load(codec.path)
  if (config.downsample, config.latent_channels) != (codec.block, codec.channels):
    raise InputError(f"the autoencoder {codec.path} makes cells of {config.downsample} px with "
                     f"{config.latent_channels} channels; config.codec.block is {codec.block}, "
                     f"config.codec.channels {codec.channels}")
  params = jax.tree.map(jnp.asarray, params)
  copies = itertools.cycle(
    [jax.device_put(params, device) for device in jax.local_devices()]
    if jax.local_device_count() > 1 else [params])

  # Given as an argument: as constants of a program they would be compiled and cached with it.
  @jax.jit
  def encode(params: dict, frames: jax.Array) -> jax.Array:
    frames = frames.astype(jnp.float32) / 127.5 - 1
    posterior = tiling.encode(config, params, frames, codec.tile)
    moments = (posterior.mean, posterior.log_variance) if codec.moments else (posterior.mean,)
    return jnp.concatenate(moments, axis=-1).astype(codec.dtype)

  @jax.jit
  def decode(params: dict, latents: jax.Array) -> jax.Array:
    image = tiling.decode(config, params, latents.astype(jnp.float32), codec.tile)
    return jnp.clip(jnp.rint((image + 1) * 127.5), 0, 255).astype(jnp.uint8)

  return lambda frames: encode(next(copies), frames), functools.partial(decode, params)


def _batches(run: Any, x: Any) -> Iterator[jax.Array]:
  """`run` on a few frames at a time, the last ones padded: one compilation, bounded memory."""
  size = min(_FRAMES_AT_ONCE, len(x))
  pad = jnp.pad if isinstance(x, jax.Array) else np.pad
  for start in range(0, len(x), size):
    part = x[start:start + size]
    yield run(pad(part, [(0, size - len(part))] + [(0, 0)] * (x.ndim - 1)))


def _joined(parts: Iterable[jax.Array], count: int) -> np.ndarray:
  """What `_batches` made of `count` frames, on the host."""
  return np.concatenate([np.asarray(part) for part in parts])[:count]


_CODECS = {"pixels": Pixels, "vae": Vae}


def from_settings(settings: dict[str, Any]) -> Codec:
  """As `from_spec`, from settings among which are those of other codecs."""
  kind = _CODECS.get(settings.get("id", ""))
  known = {field.name for field in dataclasses.fields(kind)} if kind else set()
  return from_spec({name: x for name, x in settings.items() if name in {"id", *known}})


def stored_channels(codec: Codec) -> int:
  """Channels of a stored latent: C, or 2C of a posterior."""
  return codec.channels * (2 if codec.moments else 1)


def stored(spec: dict[str, Any]) -> dict[str, Any]:
  """What of a codec's spec decides the stored latents; they are not scaled yet."""
  return {name: value for name, value in spec.items() if name not in ("scale", "shift")}


def from_spec(spec: dict[str, Any]) -> Codec:
  """The codec that `spec` (a dict with an `id` and the codec's own settings) describes.

  Raises:
    InputError: unknown id or setting.
  """
  settings = dict(spec)
  name = settings.pop("id", None)
  if name not in _CODECS:
    raise InputError(f"unknown codec {name!r}; known: {', '.join(sorted(_CODECS))}")
  try:
    return _CODECS[name](**settings)
  except TypeError as error:
    raise InputError(f"codec {name!r}: {error}") from error
