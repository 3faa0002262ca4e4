"""FVD: the Frechet distance between I3D features of real and of generated videos.

Unterthiner et al. (arXiv 1812.01717). Steps, each as in their reference implementation unless
said otherwise:

1. A window of T frames (16, or more: the network averages over time), RGB bytes.
2. Every frame resized to 224x224 px, bilinear, without smoothing before and whatever its
   proportions. `resize="tensorflow"` places samples as `tf.image.resize_bilinear` of
   TensorFlow 1 does, the corner of the frame at the centre of the first pixel; "half_pixel"
   centres them as PyTorch (and the FVD code descended from StyleGAN-V) does.
3. Bytes to [-1, 1].
4. I3D's 400 logits, averaged over time (`layer="logits"`); or the 1024 averages before them.
5. `frechet.distance`, covariances divided by n - 1.

Axes: B videos, T frames, D features.
"""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8
import numpy as np

from videogpt_jax.errors import InputError
from videogpt_jax.metrics import frechet
from videogpt_jax.metrics import i3d

RESIZES = ("tensorflow", "half_pixel")
FIRST, RANDOM = "first", "random"
OWN = "own"  # the protocol of a model's own training


@dataclasses.dataclass(frozen=True)
class Protocol:
  """What is compared with what.

  Attributes:
    name: of the protocol.
    history: frames that a model is given; they are part of the window, on both sides.
    frames: of the window, history included, T.
    size: height and width that videos are brought to before anything else; None: as they are.
    videos: of each set.
    sampling: where in a real video the window begins: `FIRST`, its beginning; `RANDOM`, drawn
      uniformly, by its name.
    interval: every how many frames of a real video one is taken; 0: as the model was trained.
    known_from: the sources of these values, and what is chosen here.
    unknown: what is not known of the protocol of the paper's own distances.
  """

  name: str
  history: int
  frames: int
  size: tuple[int, int] | None
  videos: int
  sampling: str
  interval: int
  known_from: str
  unknown: str = ""

  def named(self, changed: Mapping[str, Any]) -> str:
    """The name, with what has been changed of the protocol or of how it is followed."""
    if not changed:
      return self.name
    so_far = f"{self.name}, " if ", changed: " in self.name else f"{self.name}, changed: "
    return so_far + ", ".join(f"{key}={value}" for key, value in changed.items())


_PAPER = "unknown of the paper's protocol (arXiv 2505.12489): "
_UCF101_UNKNOWN = _PAPER + "size, number of videos, sampling, I3D weights, whether by class"

PROTOCOLS = {protocol.name: protocol for protocol in (
  Protocol("kinetics600_5k", 5, 16, (64, 64), 5_000, RANDOM, 1,
           "5 given and 11 predicted frames of 64x64 px: as in MAGVIT (arXiv 2212.05199); "
           "chosen here: 5,000 validation videos, one prediction each; windows begin anywhere",
           _PAPER + "given frames, size, number of videos, interval, split, I3D weights"),
  Protocol("ucf101_2048", 0, 16, (128, 128), 2_048, RANDOM, 1,
           "2,048 windows of 16 frames, drawn from the data, of 128x128 px: as asked for and "
           "answered for MoCoGAN-HD (arXiv 2104.15069, issue 7 of its repository); the count and "
           "length are also those of StyleGAN-V's fvd2048_16f", _UCF101_UNKNOWN),
  Protocol("ucf101_10k", 0, 16, (128, 128), 10_000, RANDOM, 1,
           "as ucf101_2048, with 10,000 videos", _UCF101_UNKNOWN),
)}


class Extractor:
  """Features of videos; weights are on all devices of this process, which share a batch."""

  def __init__(self, path: str = "", *, sha256: str = i3d.SHA256, layer: str = "logits",
               resize: str = "tensorflow", batch: int = 4) -> None:
    """Loads the network.

    Args:
      path, sha256: see `i3d.load`.
      layer: of `i3d.FEATURES`.
      resize: of `RESIZES`.
      batch: videos at once; fewer are filled up, so that features do not depend on them.

    Raises:
      InputError: no weights (how to get them), damaged ones, or unknown settings.
    """
    for name, value, known in (("layer", layer, i3d.FEATURES), ("resize", resize, RESIZES)):
      if value not in known:
        raise InputError(f"unknown {name} {value!r}; known: {', '.join(known)}")
    devices = jax.local_devices()
    mesh = jax.sharding.Mesh(np.asarray(devices), ("videos",))
    spec = jax.sharding.PartitionSpec
    self._rows = jax.sharding.NamedSharding(mesh, spec("videos"))
    self._params = jax.device_put(i3d.load(path, sha256), jax.sharding.NamedSharding(mesh, spec()))
    self._batch = -(-batch // len(devices)) * len(devices)
    self._sha256, self._layer, self._resize = sha256.lower(), layer, resize

  @property
  def size(self) -> int:
    """Features of a video, D."""
    return i3d.FEATURES[self._layer]

  def kind(self, frames: int) -> dict[str, Any]:
    """How the features of windows of so many frames are made; see `frechet.Statistics`."""
    return {"network": "I3D Kinetics-400", "weights": self._sha256, "layer": self._layer,
            "resize": self._resize, "frames": frames}

  def __call__(self, videos: UInt8[np.ndarray, "B T H W 3"]) -> Float[np.ndarray, "B D"]:
    """The features of videos of one size.

    Raises:
      InputError: no RGB bytes, or too few frames.
    """
    _check(videos)
    found = []
    for start in range(0, len(videos), self._batch):
      part = videos[start:start + self._batch]
      filled = np.concatenate([part, *[part[-1:]] * (self._batch - len(part))])
      placed = jax.device_put(filled, self._rows)
      found.append(np.asarray(_features(self._params, placed, self._layer, self._resize))
                   [:len(part)])
    return np.concatenate(found) if found else np.zeros((0, self.size), np.float32)

  def statistics(self, videos: UInt8[np.ndarray, "B T H W 3"], source: Any = None
                 ) -> frechet.Statistics:
    """Of the features of videos; those of several calls can be merged.

    Raises:
      InputError: see `__call__`; or features are NaN.
    """
    return frechet.of(self(videos), self.kind(videos.shape[1]), source)


def distance(extractor: Extractor, real: UInt8[np.ndarray, "B T H W 3"],
             generated: UInt8[np.ndarray, "C T H W 3"],
             covariance: str = frechet.UNBIASED) -> float:
  """FVD of two sets that fit into memory.

  Raises:
    InputError: lengths or resolutions differ; or see `Extractor` and `frechet.distance`.
  """
  for videos in (real, generated):
    _check(videos)
  if real.shape[1] != generated.shape[1]:
    raise InputError(f"real videos have {real.shape[1]} frames, generated ones "
                     f"{generated.shape[1]}; cut both to the same length")
  if real.shape[2:] != generated.shape[2:]:
    size = lambda x: f"{x.shape[2]}x{x.shape[3]} px"
    raise InputError(f"real videos are of {size(real)}, generated ones of {size(generated)}; "
                     "bring both to the same size: FVD feels a difference in sharpness")
  return frechet.distance(extractor.statistics(real), extractor.statistics(generated), covariance)


def _check(videos: np.ndarray) -> None:
  if videos.ndim != 5 or videos.shape[-1] != 3 or videos.dtype != np.uint8:
    raise InputError("videos must be uint8 with the axes video, frame, height, width, 3; got "
                     f"{videos.dtype} of shape {videos.shape}")
  if videos.shape[1] < i3d.MIN_FRAMES:
    raise InputError(f"windows of {videos.shape[1]} frames are too short for I3D, which needs "
                     f"{i3d.MIN_FRAMES}; 16 are usual")


@functools.partial(jax.jit, static_argnums=(2, 3))
def _features(params: Mapping[str, Any], videos: UInt8[Array, "B T H W 3"], layer: str,
              resize: str) -> Float[Array, "B D"]:
  out: Any = i3d.I3D().apply({"params": params}, preprocess(videos, resize))
  return out[layer]


def preprocess(videos: UInt8[Array, "B T H W 3"], resize: str = "tensorflow"
               ) -> Float[Array, "B T 224 224 3"]:
  """What the network sees: resized, in [-1, 1]; see the module."""
  height, width = videos.shape[2:4]
  x = videos.astype(jnp.float32)
  exact = jax.lax.Precision.HIGHEST
  if height != i3d.SIZE:
    x = jnp.einsum("ih,BThwc->BTiwc", _weights(height, resize), x, precision=exact)
  if width != i3d.SIZE:
    x = jnp.einsum("jw,BTiwc->BTijc", _weights(width, resize), x, precision=exact)
  return x / 127.5 - 1


def _weights(side: int, resize: str) -> Float[np.ndarray, "224 side"]:
  """Of every old pixel in every new one, along a side."""
  places = np.arange(i3d.SIZE)
  scale = side / i3d.SIZE
  at = places * scale if resize == "tensorflow" else np.maximum((places + 0.5) * scale - 0.5, 0)
  low = np.minimum(at.astype(int), side - 1)
  part = at - low
  weights = np.zeros((i3d.SIZE, side), np.float32)
  np.add.at(weights, (places, low), 1 - part)
  np.add.at(weights, (places, np.minimum(low + 1, side - 1)), part)
  return weights
