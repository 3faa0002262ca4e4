"""3x3 convolutions with fewer multiplications, for CPU; accelerators have better ways.

Minimal filtering after Lavin and Gray (arXiv 1509.09308), F(2x2, 3x3): windows of the input
and kernels are mapped to components of which sums over channels are products alone, and two
by two cells of the output come out of 16 of them where 36 belong there. Where the input was
doubled to nearest neighbours before, 9 components are enough: every fourth is zero. In
float32 the result is as near to the exact one as that of the direct way; bfloat16 would lose
by the sums of inputs, and goes the direct way.

Convolutions over time as well (`same_in_time`, `strided_in_time`) become those of frames: the
frames that a kernel reaches stand beside each other as channels. XLA's own way on CPU takes
from one and a half to five times as long.

Functions are called as `jax.lax.conv_general_dilated` is, by `flax.linen.Conv`.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any

from jax import lax
import jax.numpy as jnp
from jaxtyping import Array, Float

# Multiplications of a component at once: enough for two cores, few enough to stay in a cache.
_WORK = 40_000_000
_CHANNELS = 16  # with fewer, of input or output, the mapping costs more than it saves

# Multiplications of a video, below which minimal filtering takes longer to compile than it saves.
_WORTH = 1_000_000_000
_FRAMES = ("NHWC", "HWIO", "NHWC")

_Matrix = tuple[tuple[float, ...], ...]


@dataclasses.dataclass(frozen=True)
class _Scheme:
  """How two cells of the output come about, along each side.

  Attributes:
    inputs: a window's cells to its components.
    kernels: a kernel's three taps to its components.
    outputs: the products' components to two cells.
    stride: cells of the input from a window to the next.
  """

  inputs: _Matrix
  kernels: _Matrix
  outputs: _Matrix
  stride: int


_PLAIN = _Scheme(
  inputs=((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1)),
  kernels=((1, 0, 0), (.5, .5, .5), (.5, -.5, .5), (0, 0, 1)),
  outputs=((1, 1, 1, 0), (0, 1, -1, -1)),
  stride=2)
# Of the window a, b, b, c, of which b stands in twice: the third of _PLAIN's inputs is zero.
_DOUBLED = _Scheme(
  inputs=((1, -1, 0), (0, 1, 0), (0, 1, -1)),
  kernels=((1, 0, 0), (1, 1, 1), (0, 0, 1)),
  outputs=((1, 1, 0), (0, 1, -1)),
  stride=1)


def same(x: Float[Array, "B h w D"], kernel: Float[Array, "3 3 D E"], *args: Any,
         **settings: Any) -> Float[Array, "B h w E"]:
  """The convolution with a border of one zero, stride 1."""
  direct = lambda x, kernel: lax.conv_general_dilated(x, kernel, *args, **settings)
  return _by_platform(x, kernel, _PLAIN, direct)


def doubled(x: Float[Array, "B h w D"], kernel: Float[Array, "3 3 D E"], *args: Any,
            **settings: Any) -> Float[Array, "B 2h 2w E"]:
  """`same` of the input at twice its size, nearest neighbour."""

  def direct(x: Array, kernel: Array) -> Array:
    x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    return lax.conv_general_dilated(x, kernel, *args, **settings)

  return _by_platform(x, kernel, _DOUBLED, direct)


def same_in_time(x: Float[Array, "B T h w D"], kernel: Float[Array, "3 3 3 D E"], *args: Any,
                 **settings: Any) -> Float[Array, "B T h w E"]:
  """The convolution with a border of one zero in time and space, stride 1."""
  is_large = math.prod(x.shape[1:4]) * math.prod(kernel.shape) > _WORTH
  frames = functools.partial(same if is_large else lax.conv_general_dilated,
                             window_strides=(1, 1), padding=((1, 1), (1, 1)),
                             dimension_numbers=_FRAMES, precision=settings.get("precision"))
  ours = functools.partial(_as_channels, frames, 1)
  direct = lambda x, kernel: lax.conv_general_dilated(x, kernel, *args, **settings)
  return lax.platform_dependent(x, kernel, cpu=ours, default=direct)


def strided_in_time(x: Float[Array, "B T h w D"], kernel: Float[Array, "k k k D E"], *args: Any,
                    **settings: Any) -> Float[Array, "B t h_ w_ E"]:
  """The convolution with stride 2 in time and space and zeros around as TensorFlow's SAME."""
  frames = functools.partial(lax.conv_general_dilated, window_strides=(2, 2), padding="SAME",
                             dimension_numbers=_FRAMES, precision=settings.get("precision"))
  ours = functools.partial(_as_channels, frames, 2)
  direct = lambda x, kernel: lax.conv_general_dilated(x, kernel, *args, **settings)
  return lax.platform_dependent(x, kernel, cpu=ours, default=direct)


def _as_channels(convolve: Callable[[Array, Array], Array], stride: int, x: Array,
                 kernel: Array) -> Array:
  """A convolution in time and space by one in space, `convolve`."""
  batch, length, *sides, channels = x.shape
  taps, across = kernel.shape[0], kernel.shape[1:3]
  count = -(-length // stride)
  border = max((count - 1) * stride + taps - length, 0)
  x = jnp.pad(x, ((0, 0), (border // 2, border - border // 2), (0, 0), (0, 0), (0, 0)))
  reached = [lax.slice_in_dim(x, i, i + (count - 1) * stride + 1, stride, axis=1)
             for i in range(taps)]
  frames = jnp.concatenate(reached, axis=-1).reshape(batch * count, *sides, taps * channels)
  y = convolve(frames, jnp.moveaxis(kernel, 0, 2).reshape(*across, taps * channels, -1))
  return y.reshape(batch, count, *y.shape[1:])


def _by_platform(x: Array, kernel: Array, scheme: _Scheme,
                 direct: Callable[[Array, Array], Array]) -> Array:
  """The one place that decides between the ways; when a program is lowered."""
  if x.dtype != jnp.float32 or min(kernel.shape[2:]) < _CHANNELS:
    return direct(x, kernel)
  minimal = functools.partial(_minimal, scheme)
  return lax.platform_dependent(x, kernel, cpu=minimal, default=direct)


def _minimal(scheme: _Scheme, x: Array, kernel: Array) -> Array:
  """The convolution, portion by portion: some frames, or some rows of one."""
  batch, height, width, channels = x.shape
  down, across = -(-height // scheme.stride), -(-width // scheme.stride)  # tiles
  frames, rows = _portion(batch, down, across, max(1, _WORK // math.prod(kernel.shape[2:])))
  strips = -(-down // rows)
  halo = len(scheme.inputs[0]) - scheme.stride
  cells = lambda tiles: tiles * scheme.stride + halo
  x = jnp.pad(x, ((0, 0), (1, cells(strips * rows) - height - 1),
                  (1, cells(across) - width - 1), (0, 0)))
  components = _map_sides(scheme.kernels, [kernel[i] for i in range(3)],
                          lambda row: [row[i] for i in range(3)])

  def one(index: Array) -> Array:
    frame, strip = index // strips, index % strips
    part = lax.dynamic_slice(
      x, (frame * frames, strip * rows * scheme.stride, 0, 0),
      (frames, cells(rows), cells(across), channels))
    return _tiles(scheme, part, components, rows, across)

  count = batch // frames * strips
  y = lax.map(one, jnp.arange(count)) if count > 1 else one(jnp.int32(0))
  y = y.reshape(batch, strips * rows * 2, across * 2, kernel.shape[3])
  return y[:, :height * 2 // scheme.stride, :width * 2 // scheme.stride]


def _portion(batch: int, down: int, across: int, tiles: int) -> tuple[int, int]:
  """Frames and rows of tiles that make `tiles` or up to three times as many; or all rows."""
  if down * across <= tiles:
    most = max(1, 3 * tiles // (down * across))
    return max(n for n in range(1, min(batch, most) + 1) if batch % n == 0), down
  least = max(1, min(down, tiles // across))
  # The last strip is filled up: of some sizes the one that fills up least.
  return 1, min(range(least, min(down, 3 * least) + 1), key=lambda n: -(-down // n) * n)


def _tiles(scheme: _Scheme, x: Array, kernels: Array, rows: int, across: int) -> Array:
  """Outputs `[F, 2 rows, 2 across, E]` of the windows of `[F, ., ., D]`, no border added."""
  taken = lambda x, axis, count: [
    lax.slice_in_dim(x, i, i + (count - 1) * scheme.stride + 1, scheme.stride, axis)
    for i in range(len(scheme.inputs[0]))]
  inputs = _map_sides(scheme.inputs, taken(x, 1, rows), lambda x: taken(x, 2, across))
  side, frames, channels = len(scheme.inputs), x.shape[0], x.shape[3]
  flat = inputs.reshape(side, side, -1, channels)
  products = jnp.einsum("ijtd,ijde->ijte", flat, kernels)
  products = products.reshape(side, side, frames, rows, across, -1)
  y = jnp.stack([jnp.stack(_combined(scheme.outputs, list(row)), axis=3)
                 for row in _combined(scheme.outputs, list(products))], axis=2)
  return y.reshape(frames, 2 * rows, 2 * across, -1)


def _map_sides(matrix: _Matrix, rows: Sequence[Array],
               columns: Callable[[Array], Sequence[Array]]) -> Array:
  """The components, stacked `[i, j, ...]`, of what has `rows`, each of which has `columns`."""
  return jnp.stack([jnp.stack(_combined(matrix, columns(row)))
                    for row in _combined(matrix, rows)])


def _combined(matrix: _Matrix, parts: Sequence[Array]) -> list[Array]:
  """The sums of `parts` that the rows of a matrix tell; what is zero costs nothing."""
  out = []
  for row in matrix:
    terms = [part if factor == 1 else -part if factor == -1 else factor * part
             for factor, part in zip(row, parts, strict=True) if factor]
    out.append(functools.reduce(jnp.add, terms))
  return out
