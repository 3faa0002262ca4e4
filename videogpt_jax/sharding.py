"""The device mesh, and one table from logical axis names to mesh axes.

Parameters and activations name their axes by meaning (`embed`, `heads`, `batch`, ...);
only this table says which of them are split over which mesh axis. Code that runs under
`jax.set_mesh` and `logical_rules()` is sharded; without them everything is on one device.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import math
from typing import Any, TypeVar

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

from videogpt_jax.errors import InputError

Item = TypeVar("Item")

# `slice`: parts of the machine with a slower network between them, over which only gradients go.
AXES = ("slice", "data", "fsdp", "sequence", "tensor")
BATCH_AXES = ("slice", "data", "fsdp")
HOST = "pinned_host"  # memory kind: the host's, where devices read and write it themselves
HEAD_AXES = ("tensor", "sequence")  # of heads while attending; see `videogpt_jax.attention`

# Logical axis -> mesh axes; an axis that is not here, or None, is not split.
RULES: tuple[tuple[str, str | tuple[str, ...] | None], ...] = (
  ("batch", BATCH_AXES),
  ("length", "sequence"),
  ("embed", "fsdp"),
  ("heads", "tensor"),
  ("kv_heads", "tensor"),
  ("mlp", "tensor"),
)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """A mesh of `devices`, by default all.

  Args:
    sizes: of the axes; one that is not named is 1, at most one may be -1 and takes what is left.
      `slice` not named or 0: as many as the devices lie in.
    devices: in any order; those of a pod are placed by where they lie in its network.

  Raises:
    InputError: the sizes do not multiply to the number of devices, or `slice` is not the number
      of slices that they lie in.
  """
  devices = jax.devices() if devices is None else devices
  slices = _slices(devices)
  shape = [int(sizes.get(axis, 1)) for axis in AXES]
  shape[0] = int(sizes.get(AXES[0], 0)) or slices
  known = math.prod(size for size in shape if size != -1)
  if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
    raise InputError(f"mesh sizes must be positive, one of them may be -1; got {dict(sizes)}")
  shape = [len(devices) // known if size == -1 else size for size in shape]
  if math.prod(shape) != len(devices):
    raise InputError(
      f"a mesh of {' x '.join(f'{a}={n}' for a, n in zip(AXES, shape, strict=True))} needs "
      f"{math.prod(shape)} devices, there are {len(devices)}"
    )
  # A slice of a pod is a torus of two or three axes: one of them may serve several of ours.
  split: Any = {"allow_split_physical_axes": True}
  if slices == 1:
    placed = mesh_utils.create_device_mesh(shape, devices, **split)
  elif shape[0] == slices:
    apart = [slices] + [1] * (len(AXES) - 1)
    placed = mesh_utils.create_hybrid_device_mesh([1, *shape[1:]], apart, devices, **split)
  else:
    raise InputError(f"the devices lie in {slices} slices; set config.mesh.slice={slices}, or 0")
  return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: Sequence[jax.Device]) -> int:
  """In how many TPU slices they lie. XLA calls GPU nodes slices, too: it numbers them so."""
  if any(device.platform != "tpu" for device in devices):
    return 1
  return len({getattr(device, "slice_index", 0) or 0 for device in devices})


@contextlib.contextmanager
def use(mesh: Mesh):
  """Traces what runs inside for `mesh`, with the table above."""
  with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
    yield


@contextlib.contextmanager
def unused():
  """For code inside of `use` that brings meshes of its own, such as orbax."""
  with jax.set_mesh(Mesh(np.empty((), dtype=object), ())):
    yield


def under(mesh: Mesh | None, items: Iterator[Item]) -> Iterator[Item]:
  """What a generator yields, each item computed under `use(mesh)`; None: as it is.

  The context must not outlive a `yield`, so a generator cannot enter it by itself.
  """
  while True:
    with contextlib.nullcontext() if mesh is None else use(mesh):
      try:
        item = next(items)
      except StopIteration:
        return
    yield item


def prediction_mesh(
    samples: int, heads: int, kv_heads: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh for prediction: samples over `data`, then heads over `tensor`.

  Of the devices, by default all, as many are used as samples and heads divide among.
  """
  devices = jax.devices() if devices is None else devices
  data = math.gcd(samples, len(devices))
  tensor = math.gcd(len(devices) // data, math.gcd(heads, kv_heads))
  return make_mesh({"data": data, "tensor": tensor}, devices[:data * tensor])


def size(*axes: str) -> int:
  """Over how many devices these axes of the mesh in use split an array; 1 without a mesh."""
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in axes)


def require_host_memory(mesh: Mesh) -> None:
  """Raises `InputError` unless the mesh's devices can keep arrays in their host's memory."""
  device = mesh.devices.flat[0]
  kinds = {memory.kind for memory in device.addressable_memories()}
  if kinds and HOST not in kinds:  # devices that are only compiled for may name none
    raise InputError(f"{device.device_kind} devices cannot keep arrays in the host's memory (they "
                     f"know {', '.join(sorted(kinds))}); use config.train.offload='none'")


def rows(mesh: Mesh) -> NamedSharding:
  """Sharding of arrays whose leading axis is the batch."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """Sharding of arrays that every device holds whole."""
  return NamedSharding(mesh, PartitionSpec())


def of_tree(mesh: Mesh, abstract: Any) -> Any:
  """Shardings for an abstract tree whose leaves may be boxed with logical axis names."""
  specs = nn.get_partition_spec(abstract)
  return nn.logical_to_mesh_sharding(specs, mesh, RULES)
