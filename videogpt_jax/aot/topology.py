"""Topologies by name (`v5p:4x4x4`, `v5e:16x16@2`, `h100:8x8`), their devices to compile for."""

from collections.abc import Sequence
import dataclasses
import importlib.util
import math
import os
import pathlib
import re
import shutil
from typing import Any

import jax

from videogpt_jax.aot import chips
from videogpt_jax.errors import InputError

_GPUS = pathlib.Path(__file__).parent / "gpus"
KNOWN = ("v5p:4x4x4 (chips along the axes of the torus; v5e:4x4, v6e:16x16), v5p:4x4x4@2 (two such "
         "slices), h100:8x8 (nodes x GPUs of a node; h200:1, l4:1), cpu:8 (simulated devices)")
_HOST = {2: (2, 2), 3: (2, 2, 1)}  # chips of a TPU's host along each axis


@dataclasses.dataclass(frozen=True)
class Topology:
  """So many chips of a kind: along the axes of a torus, or nodes and GPUs of a node.

  Attributes:
    chip: the kind.
    shape: of a slice, or of the whole.
    slices: of TPUs, joined by the data center's network.
  """

  chip: chips.Chip
  shape: tuple[int, ...]
  slices: int = 1

  @property
  def name(self) -> str:
    """As `parse` reads it."""
    return self._slice_name + (f"@{self.slices}" if self.slices > 1 else "")

  @property
  def _slice_name(self) -> str:
    return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

  @property
  def count(self) -> int:
    """Chips in all."""
    return self.slices * math.prod(self.shape)

  def devices(self) -> Sequence[jax.Device]:
    """The chips, to compile for; nothing can run on them (but on CPU).

    To be called in a process of its own, see `videogpt_jax.aot.process`.

    Raises:
      InputError: there is no such slice.
    """
    if self.chip.platform == "cpu":
      return jax.devices("cpu")[:self.count]
    from jax.experimental import topologies  # it asks for compilers

    try:
      return topologies.get_topology_desc(**self._description()).devices
    except jax.errors.JaxRuntimeError as error:
      raise InputError(f"there is no topology {self.name}: {error}") from error

  def _description(self) -> dict[str, Any]:
    if self.chip.platform == "cuda":
      nodes, gpus = self.shape if len(self.shape) == 2 else (1, self.shape[0])
      return {"platform": "cuda", "topology_name": "", "topology": f"{nodes}x1x{gpus}",
              "target_config": (_GPUS / f"{self.chip.name}.txtpb").read_text()}
    host = tuple(map(min, _HOST[len(self.shape)], self.shape))
    return {"platform": "tpu", "topology_name": self._slice_name,
            "chips_per_host_bounds": (*host, *(1,) * (3 - len(host))),
            **({"num_slices": self.slices} if self.slices > 1 else {})}


def parse(name: str) -> Topology:
  """The topology of that name.

  Raises:
    InputError: it is none; the message says what is known.
  """
  found = re.fullmatch(r"([a-z0-9]+):([1-9]\d*(?:x[1-9]\d*)*)(?:@([1-9]\d*))?", name)
  if not found or found[1] not in chips.CHIPS:
    raise InputError(f"{name!r} names no known topology; known are {KNOWN}")
  chip, shape = chips.CHIPS[found[1]], tuple(map(int, found[2].split("x")))
  sizes = {"tpu": (chip.axes,), "cuda": (1, 2), "cpu": (1,)}[chip.platform]
  if len(shape) not in sizes:
    raise InputError(f"the topology {name!r} must have {' or '.join(map(str, sizes))} number(s); "
                     f"known are {KNOWN}")
  slices = int(found[3] or 1)
  if slices > 1 and chip.platform != "tpu":
    raise InputError(f"the topology {name!r} has several slices, and only TPUs come in slices; "
                     f"known are {KNOWN}")
  return Topology(chip, shape, slices)


def missing(platform: str) -> str:
  """What is not installed to compile for that platform; empty if nothing."""
  needed = {
    "cpu": {},
    "tpu": {"libtpu": _installed("libtpu")},
    "cuda": {"jax-cuda13-plugin": _installed("jax_cuda13_plugin"),
             "jax-cuda13-pjrt": _installed("jax_plugins.xla_cuda13"),
             "nvidia-cuda-nvcc (ptxas)": _ptxas_installed()},
  }[platform]
  return ", ".join(name for name, there in needed.items() if not there)


def require(chip: chips.Chip) -> None:
  """Raises `InputError` if the compiler for such chips is not installed."""
  if lacks := missing(chip.platform):
    raise InputError(
      f"no compiler for {chip.name} here: {lacks} missing. In an environment of its own, since "
      "jax would look for the accelerators at every start: pip install -e '.[aot]'")


def _installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # its parent is not there either
    return False


def _ptxas_installed() -> bool:
  folders = [os.environ["CUDA_ROOT"]] if "CUDA_ROOT" in os.environ else []
  spec = importlib.util.find_spec("nvidia.cu13") if _installed("nvidia.cu13") else None
  folders += (spec.submodule_search_locations or []) if spec else []
  return any((pathlib.Path(folder) / "bin" / "ptxas").exists() for folder in folders) or (
      shutil.which("ptxas") is not None)
