"""Compiles programs for a kind of chip, and reports what came out."""

import dataclasses
import os
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import Mesh
import numpy as np
import programs

from videogpt_jax import attention
from videogpt_jax import sharding
from videogpt_jax.aot import hlo
from videogpt_jax.aot import process
from videogpt_jax.aot import topology

# One chip, and a slice (or two hosts) of 16.
TARGETS = {
    "v5e": ("v5e:1x1", "v5e:4x4"),
    "v5p": ("v5p:1x1x1", "v5p:2x2x4"),
    "v6e": ("v6e:1x1", "v6e:4x4"),
    "h100": ("h100:1", "h100:2x8"),
    "h200": ("h200:1", "h200:2x8"),
    "l4": ("l4:1", "l4:2x8"),
}
_known = []  # kernels that this process compiled


@dataclasses.dataclass(frozen=True)
class Kernel:
  """What ptxas said of a GPU kernel."""

  name: str
  registers: int
  spilled: int  # bytes, stores and loads
  wgmma: int  # instructions
  serialized: bool  # whether ptxas had to wait for each of them


@dataclasses.dataclass(frozen=True)
class Report:
  """A compiled program: bytes for each device, calls to kernels, collectives."""

  arguments: int
  results: int
  temporaries: int
  calls: dict[str, int]  # by the target of the custom call
  collectives: dict[str, int]
  kernels: tuple[Kernel, ...]  # of Mosaic GPU, but for those compiled before, which it knows
  kernels_so_far: int
  auto: str  # what implementation="auto" would be there


class Compiler:
  """Compiles for one kind of chip, one program after the other, in a process of its own."""

  def __init__(self, name: str) -> None:
    self._topologies = [topology.parse(each) for each in TARGETS[name]]
    self._folder = tempfile.TemporaryDirectory(prefix="videogpt_aot_")
    self._process = process.Compiler(self._topologies[0], MOSAIC_GPU_DUMP_TO=self._folder.name)

  def __call__(self, program: programs.Program) -> Report:
    """The report. Raises `RuntimeError` if the compiler crashed, else what it raises itself."""
    where = self._topologies[bool(program.mesh)]
    return self._process(_compile, where, program)

  def close(self) -> None:
    """Ends the process."""
    self._process.close()
    self._folder.cleanup()


def _compile(where: topology.Topology, program: programs.Program) -> Report:
  """Runs in the process of its own."""
  folder = pathlib.Path(os.environ["MOSAIC_GPU_DUMP_TO"])
  for file in folder.iterdir():  # of a program before
    file.unlink()
  devices = where.devices()
  sizes = dict(program.mesh)
  shape = [sizes.get(axis, 1) for axis in sharding.AXES]
  mesh = Mesh(np.reshape(devices, shape), sharding.AXES,
              axis_types=(AxisType.Auto,) * len(sharding.AXES))
  function, shapes = program.build(where.chip.attention, mesh)
  with process.pretending(devices, where.chip.backend), sharding.use(mesh):
    auto = attention.resolve("auto", 1 << 10, 1 << 10, program.head_size,
                             jnp.dtype(program.dtype))
    compiled = jax.jit(function).trace(*shapes).lower().compile()
  kernels, memory = _kernels(folder), compiled.memory_analysis()
  traffic = hlo.read(compiled.as_text(), len(devices))
  _known.extend(kernels)
  return Report(
      arguments=memory.argument_size_in_bytes, results=memory.output_size_in_bytes,
      temporaries=memory.temp_size_in_bytes, calls=traffic.calls,
      collectives={kind: count for kind, (count, _) in traffic.by_kind().items()},
      kernels=kernels, kernels_so_far=len(_known), auto=auto)


def _kernels(folder: pathlib.Path) -> tuple[Kernel, ...]:
  """Reads what Mosaic GPU wrote about the kernels just compiled."""
  found = []
  for log in sorted(folder.glob("*.ptxas")):
    said, code = log.read_text(), log.with_suffix(".ptx").read_text()
    found.append(Kernel(
        name=log.stem, registers=int(re.search(r"Used (\d+) registers", said)[1]),
        spilled=sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        wgmma=code.count("wgmma.mma_async"), serialized="serialized" in said))
  return tuple(found)
