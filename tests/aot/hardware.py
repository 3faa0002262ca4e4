"""Accelerators that programs are compiled for on a machine that has none of them."""

from collections.abc import Sequence
import dataclasses
import importlib.util
import math
import os
import pathlib
import shutil

import jax
from jax.experimental import topologies
from jax.sharding import AxisType
from jax.sharding import Mesh
import numpy as np

from videogpt_jax import sharding

_CONFIGS = pathlib.Path(__file__).parent / "targets"


@dataclasses.dataclass(frozen=True)
class Target:
  """A kind of chip.

  Attributes:
    name: also of its file in targets/, if it is a GPU; a TPU's generation.
    platform: "tpu" or "cuda".
    attention: the implementation that it is to attend with.
    slice: the smallest TPU slice there is, or one GPU.
    sixteen: a slice (or two hosts) of 16 chips.
  """

  name: str
  platform: str
  attention: str
  slice: str
  sixteen: str

  @property
  def backend(self) -> str:
    """What `jax.default_backend()` says on it."""
    return {"cuda": "gpu"}.get(self.platform, self.platform)

  def devices(self, count: int) -> Sequence[jax.Device]:
    """Its chips (1 or 16), to compile for; nothing can run on them."""
    place = self.slice if count == 1 else self.sixteen
    if self.platform == "tpu":
      found = topologies.get_topology_desc(platform="tpu", topology_name=f"{self.name}:{place}")
    else:
      config = (_CONFIGS / f"{self.name}.txtpb").read_text()
      found = topologies.get_topology_desc(platform="cuda", topology_name="",
                                           target_config=config, topology=place)
    return found.devices[:count]

  def mesh(self, sizes: Sequence[int]) -> Mesh:
    """A mesh of such chips; `sizes` are of `sharding.AXES`."""
    devices = np.reshape(self.devices(math.prod(sizes)), sizes)
    return Mesh(devices, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))


TARGETS = {target.name: target for target in (
    Target("v5e", "tpu", "tpu", "2x2", "4x4"),
    Target("v5p", "tpu", "tpu", "2x2x1", "2x2x4"),
    Target("v6e", "tpu", "tpu", "2x2", "4x4"),
    Target("h100", "cuda", "gpu", "1x1x1", "2x8x1"),
    Target("h200", "cuda", "gpu", "1x1x1", "2x8x1"),
    Target("l4", "cuda", "xla", "1x1x1", "2x8x1"),  # 24 GB, sm_89: it has no wgmma
)}


def missing(platform: str) -> str:
  """What is not installed to compile for that platform; empty if nothing."""
  needed = {
    "tpu": {"libtpu": _installed("libtpu")},
    "cuda": {"jax-cuda13-plugin": _installed("jax_cuda13_plugin"),
             "jax-cuda13-pjrt": _installed("jax_plugins.xla_cuda13"),
             "nvidia-cuda-nvcc (ptxas)": _ptxas_installed()},
  }[platform]
  return ", ".join(name for name, there in needed.items() if not there)


def _installed(module: str) -> bool:
  try:
    return importlib.util.find_spec(module) is not None
  except ModuleNotFoundError:  # its parent is not there either
    return False


def _ptxas_installed() -> bool:
  folders = [os.environ["CUDA_ROOT"]] if "CUDA_ROOT" in os.environ else []
  if _installed("nvidia.cu13"):
    folders += importlib.util.find_spec("nvidia.cu13").submodule_search_locations
  return any((pathlib.Path(folder) / "bin" / "ptxas").exists() for folder in folders) or (
      shutil.which("ptxas") is not None)
