"""LPIPS: how different two frames look, by the features of a network that knows pictures.

Zhang et al. (arXiv 1801.03924), version 0.1: features after five of the ReLUs of AlexNet (or
VGG-16), each cell's scaled to length 1; squared differences, weighted by channel, averaged over
cells and summed over the five. Lower is more alike.

The weights are the user's files: torchvision's state dict of the network (such as
`alexnet-owt-7be5be79.pth`, read without torch) and the channels' weights, which the package
`lpips` has in `lpips/weights/v0.1/alex.pth`.
"""

from collections.abc import Mapping
import dataclasses
import functools
import os
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8
import numpy as np

from videogpt_jax import tensors
from videogpt_jax.errors import InputError

_FRAMES = ("NHWC", "HWIO", "NHWC")
_MEAN, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)  # of colours in [-1, 1]
_EPSILON = 1e-10
_BATCH = 16  # frames at once
SMALLEST = 32  # px, a side of frames of which anything is left after all strides


@dataclasses.dataclass(frozen=True)
class _Layer:
  """A convolution with its ReLU: its number in torchvision's `features`, and what is around it.

  Attributes:
    index: see above.
    channels: of the output.
    side, stride, padding: of the convolution.
    pool: side of the maximum before it, of stride 2; 0: none.
    taken: whether its output is compared.
  """

  index: int
  channels: int
  side: int = 3
  stride: int = 1
  padding: int = 1
  pool: int = 0
  taken: bool = True


# AlexNet as Krizhevsky (arXiv 1404.5997) has it, and VGG-16 (arXiv 1409.1556, table 1, D).
_LAYERS = {
  "alex": (_Layer(0, 64, 11, 4, 2), _Layer(3, 192, 5, 1, 2, pool=3), _Layer(6, 384, pool=3),
           _Layer(8, 256), _Layer(10, 256)),
  "vgg": tuple(_Layer(i, channels, pool=pool, taken=taken) for i, channels, pool, taken in (
    (0, 64, 0, False), (2, 64, 0, True), (5, 128, 2, False), (7, 128, 0, True),
    (10, 256, 2, False), (12, 256, 0, False), (14, 256, 0, True), (17, 512, 2, False),
    (19, 512, 0, False), (21, 512, 0, True), (24, 512, 2, False), (26, 512, 0, False),
    (28, 512, 0, True))),
}
NETWORKS = tuple(_LAYERS)


class Lpips:
  """The distance of frames; weights are on the first device."""

  def __init__(self, backbone: str, heads: str, network: str = "alex") -> None:
    """Reads the weights.

    Args:
      backbone: torchvision's state dict of the network, a .pth or .safetensors file.
      heads: weights of the channels, a file as in the package `lpips`.
      network: of `NETWORKS`.

    Raises:
      InputError: no such files (how to get them), damaged ones, or of another network.
    """
    if network not in _LAYERS:
      raise InputError(f"unknown network {network!r}; known: {', '.join(_LAYERS)}")
    self._network = network
    self._params = jax.device_put(_load(backbone, heads, _LAYERS[network]))

  def __call__(self, predicted: UInt8[np.ndarray, "*lead H W 3"],
               truth: UInt8[np.ndarray, "*lead H W 3"]) -> Float[np.ndarray, "*lead"]:
    """The distance of every pair of frames, float32; 0 for equal ones.

    Raises:
      InputError: the shapes differ, frames are not uint8 RGB, or a side is under 32 px.
    """
    if predicted.shape != truth.shape or predicted.shape[-1:] != (3,) or (
        {predicted.dtype, truth.dtype} != {np.dtype(np.uint8)}):
      raise InputError(f"LPIPS compares uint8 RGB frames of one shape, got {predicted.dtype} "
                       f"{predicted.shape} and {truth.dtype} {truth.shape}")
    check(truth.shape[-3:-1])
    frame = truth.shape[-3:]
    x, y = predicted.reshape(-1, *frame), truth.reshape(-1, *frame)
    found = [np.asarray(_distance(self._params, x[i:i + _BATCH], y[i:i + _BATCH], self._network))
             for i in range(0, len(x), _BATCH)]
    return np.concatenate([*found, np.zeros(0, np.float32)]).reshape(truth.shape[:-3])


def check(size: tuple[int, ...]) -> None:
  """Raises `InputError` if frames of a height and width, px, are too small."""
  if min(size) < SMALLEST:
    raise InputError(f"LPIPS needs frames of at least {SMALLEST} px a side, got "
                     f"{size[0]}x{size[1]}")


@functools.partial(jax.jit, static_argnums=3)
def _distance(params: Mapping[str, Any], x: UInt8[Array, "B H W 3"], y: UInt8[Array, "B H W 3"],
              network: str) -> Float[Array, " B"]:
  total = jnp.zeros(len(x))
  ours, theirs = (_features(params, frames, _LAYERS[network]) for frames in (x, y))
  for a, b, weights in zip(ours, theirs, params["heads"], strict=True):
    total += ((_unit(a) - _unit(b))**2 @ weights).mean((1, 2))
  return total


def _unit(x: Float[Array, "B h w D"]) -> Float[Array, "B h w D"]:
  return x / (jnp.sqrt((x * x).sum(-1, keepdims=True)) + _EPSILON)


def _features(params: Mapping[str, Any], frames: UInt8[Array, "B H W 3"],
              layers: tuple[_Layer, ...]) -> list[Float[Array, "B h w D"]]:
  x = (frames / 127.5 - 1 - jnp.asarray(_MEAN)) / jnp.asarray(_SCALE)
  found = []
  for layer, (kernel, bias) in zip(layers, params["layers"], strict=True):
    if layer.pool:
      window = (1, layer.pool, layer.pool, 1)
      x = lax.reduce_window(x, -jnp.inf, lax.max, window, (1, 2, 2, 1), "VALID")
    x = lax.conv_general_dilated(x, kernel, (layer.stride,) * 2, [(layer.padding,) * 2] * 2,
                                 dimension_numbers=_FRAMES, precision=lax.Precision.HIGHEST)
    x = jax.nn.relu(x + bias)
    if layer.taken:
      found.append(x)
  return found


def _load(backbone: str, heads: str, layers: tuple[_Layer, ...]) -> dict[str, Any]:
  for path, what in ((backbone, "torchvision's state dict of the network"),
                     (heads, "lpips/weights/v0.1/NETWORK.pth of the package lpips")):
    if not os.path.isfile(path):
      raise InputError(f"no file {path}; LPIPS needs {what}")
  network, channels = tensors.open_folder(backbone), tensors.open_folder(heads)

  def read(files: tensors.TensorFiles, path: str, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in files or files.entries[name].shape != shape:
      found = f"has it in the shape {files.entries[name].shape}" if name in files else "lacks it"
      raise InputError(f"{path} is of another network: {name} of shape {shape} is wanted, the "
                       f"file {found}")
    return files[name].astype(np.float32)

  params: dict[str, Any] = {"layers": [], "heads": []}
  before = 3
  for layer in layers:
    shape = (layer.channels, before, layer.side, layer.side)
    kernel = read(network, backbone, f"features.{layer.index}.weight", shape)
    bias = read(network, backbone, f"features.{layer.index}.bias", (layer.channels,))
    params["layers"].append((kernel.transpose(2, 3, 1, 0), bias))
    before = layer.channels
    if layer.taken:
      name = f"lin{len(params['heads'])}.model.1.weight"
      params["heads"].append(read(channels, heads, name, (1, layer.channels, 1, 1)).reshape(-1))
  return params
