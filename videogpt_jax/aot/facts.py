"""What the train step of a configuration needs on devices that are there or not."""

from collections.abc import Sequence
import dataclasses
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from videogpt_jax import attention
from videogpt_jax import codec as codec_lib
from videogpt_jax import config as config_lib
from videogpt_jax import flops
from videogpt_jax import sharding
from videogpt_jax import step as step_lib
from videogpt_jax.aot import hlo
from videogpt_jax.aot import process
from videogpt_jax.aot import topology as topology_lib

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of a device, as the compiler planned them.

  Attributes:
    arguments: state and batch.
    results: the new state and metrics.
    aliased: of the results, what takes the place of arguments.
    temporaries: all else while the program runs.
    code: the program.
    host: what lies in the host's memory for the device, temporaries included.
    needed: in all, where the compiler gave up because it is more than there is; else 0.
  """

  arguments: float = 0
  results: float = 0
  aliased: float = 0
  temporaries: float = 0
  code: float = 0
  host: float = 0
  needed: float = 0

  @property
  def total(self) -> float:
    """Bytes that are held at once."""
    held = self.arguments + self.results - self.aliased + self.temporaries + self.code
    return self.needed or held


@dataclasses.dataclass(frozen=True)
class Facts:
  """What is known of a train step before it runs.

  Attributes:
    device: kind of the devices.
    places: where each stands, in the order of the mesh: coordinates in a TPU's torus (and its
      slice), or node and place in the node.
    mesh: devices along each axis.
    rows: videos that a device computes at once.
    accumulation: microbatches of a step.
    latents: (N, h, w, C) of a video.
    attention: the implementation.
    remat: what the backward pass computes again, see `videogpt_jax.backbone`.
    parameters: by part.
    cost: needed work of the global batch.
    memory: of a device.
    traffic: of a device; None where the compiler gave up.
    compile_seconds: tracing, lowering and compilation.
  """

  device: str
  places: tuple[tuple[int, ...], ...]
  mesh: dict[str, int]
  rows: int
  accumulation: int
  latents: tuple[int, int, int, int]
  attention: str
  remat: str
  parameters: dict[str, int]
  cost: flops.Cost
  memory: Memory
  traffic: hlo.Traffic | None
  compile_seconds: float


def of_topology(config: ConfigDict, topology: topology_lib.Topology) -> Facts:
  """The facts for a topology; compiles in a process of its own.

  Raises:
    InputError: no compiler for it, no such topology, or a configuration that does not suit it.
    RuntimeError: the compiler crashed.
  """
  topology_lib.require(topology.chip)
  compiler = process.Compiler(topology)
  try:
    return compiler(_of_topology, config.to_dict(), topology)
  finally:
    compiler.close()


def _of_topology(settings: dict[str, Any], topology: topology_lib.Topology) -> Facts:
  devices = topology.devices()
  with process.pretending(devices, topology.chip.backend):
    return of_devices(config_lib.from_saved(settings), devices)


def of_devices(config: ConfigDict, devices: Sequence[jax.Device]) -> Facts:
  """The facts for these devices, which `jax.devices()` must name; nothing is allocated.

  Raises:
    InputError: the configuration does not suit them.
  """
  from videogpt_jax import train  # what it refuses, is refused here

  recipe, mesh = config_lib.recipe(config), sharding.make_mesh(config.mesh, devices)
  train.check_devices(config, mesh)
  latents = _latents(config, recipe.codec)
  cost = flops.training(recipe.model, recipe.objective, config.train.batch_size, latents)
  stack, rows = recipe.model.backbone, config.train.batch_size // config.train.accumulation
  sequence = int(cost.sequence / config.train.batch_size)
  began = time.perf_counter()
  memory, traffic = _compile(recipe, mesh, config.train.batch_size, latents)
  return Facts(
    device=devices[0].device_kind, places=tuple(map(_place, mesh.devices.flat)),
    mesh=dict(mesh.shape), rows=rows // _shards(mesh), accumulation=config.train.accumulation,
    latents=latents, remat=stack.remat, parameters=flops.parameters(recipe.model), cost=cost,
    attention=attention.resolve(stack.attention, sequence, sequence, stack.head_size,
                                jnp.dtype(stack.dtype)),
    memory=memory, traffic=traffic, compile_seconds=time.perf_counter() - began)


def _latents(config: ConfigDict, codec: codec_lib.Codec) -> tuple[int, int, int, int]:
  height, width = config_lib.fit(config).size(9, 16)  # where sizes vary, most are like this
  side = codec.downsample
  return config.data.frames, height // side, width // side, codec.channels


def _shards(mesh: jax.sharding.Mesh) -> int:
  """Over how many devices the rows of a batch are split."""
  spec = sharding.rows(mesh).shard_shape((mesh.size,))
  return mesh.size // spec[0]


def _place(device: Any) -> tuple[int, ...]:
  if device.platform == "tpu":
    return getattr(device, "slice_index", 0) or 0, *device.coords
  return device.process_index, device.id


def _compile(recipe: step_lib.Recipe, mesh: jax.sharding.Mesh, batch: int,
             latents: tuple[int, int, int, int]) -> tuple[Memory, hlo.Traffic | None]:
  stored = (batch, *latents[:-1], codec_lib.stored_channels(recipe.codec))
  state = step_lib.abstract_state(recipe, mesh)
  with sharding.use(mesh):
    lowered = step_lib.compile_step(recipe, mesh).lower(
      state, jax.ShapeDtypeStruct(stored, jnp.dtype(recipe.codec.dtype)))
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      if needed := _needed(str(error)):
        return Memory(needed=needed), None
      raise
  plan: Any = compiled.memory_analysis()
  memory = Memory(
    arguments=plan.argument_size_in_bytes, results=plan.output_size_in_bytes,
    aliased=plan.alias_size_in_bytes, temporaries=plan.temp_size_in_bytes,
    code=plan.generated_code_size_in_bytes,
    host=plan.host_argument_size_in_bytes + plan.host_temp_size_in_bytes)
  return memory, hlo.read(compiled.as_text() or "", mesh.size)


def _needed(error: str) -> float:
  """Bytes that a compiler said it would need when it refused; 0 if it refused for else."""
  found = re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", error)
  return float(found[1]) * _UNITS[found[2]] if found else 0.0
