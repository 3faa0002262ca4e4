"""Compiles programs for a target in a process of its own, and reports what came out.

A process of its own because the compilers read their settings once, from the environment;
those that other tests want (no optimisation, say) would falsify the result.
"""

import collections
from concurrent import futures
from concurrent.futures import process
import contextlib
import dataclasses
import multiprocessing
import os
import pathlib
import re
import signal
import tempfile
from unittest import mock

import hardware
import jax
import jax.numpy as jnp
import programs

from videogpt_jax import attention
from videogpt_jax import sharding

_SETTINGS = ("JAX_", "XLA_", "TPU_", "LIBTPU_", "MOSAIC_GPU_")
_SECONDS = 600
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
  """Compiles for one target, one program after the other."""

  def __init__(self, target: hardware.Target) -> None:
    self._target = target
    self._folder = tempfile.TemporaryDirectory(prefix="videogpt_aot_")
    self._process = _process()

  def __call__(self, program: programs.Program) -> Report:
    """The report.

    Raises:
      RuntimeError: the compiler crashed or does not end; else whatever it raises itself.
    """
    try:
      with _environment(pathlib.Path(self._folder.name)):  # the first call starts the process
        return self._process.submit(_compile, self._target, program).result()
    except process.BrokenProcessPool as error:
      self._process = _process()  # for the next program
      raise RuntimeError(f"the compiler crashed, or took over {_SECONDS} s") from error

  def close(self) -> None:
    """Ends the process."""
    self._process.shutdown(cancel_futures=True)
    self._folder.cleanup()


def _process() -> futures.ProcessPoolExecutor:
  return futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


@contextlib.contextmanager
def _environment(folder: pathlib.Path):
  """Default settings of the compilers, but for what it takes to have no accelerator."""
  kept = {name: x for name, x in os.environ.items() if not name.startswith(_SETTINGS)}
  new = kept | {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no TPU that only one process may hold
    "JAX_PLATFORMS": "cpu",
    "MOSAIC_GPU_DUMP_TO": str(folder),
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # libtpu wants one; the topology is what counts
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
  }
  with mock.patch.dict(os.environ, new, clear=True):
    yield


def _compile(target: hardware.Target, program: programs.Program) -> Report:
  """Runs in the process of its own."""
  folder = pathlib.Path(os.environ["MOSAIC_GPU_DUMP_TO"])
  for file in folder.iterdir():  # of a program before
    file.unlink()
  signal.alarm(_SECONDS)  # ends the process, whatever it is doing
  try:
    mesh = target.mesh(program.mesh)
    function, shapes = program.build(target.attention, mesh)
    devices = list(mesh.devices.flat)
    # Code that asks what it runs on (block sizes by device, "auto") is told the target.
    with mock.patch.object(jax, "devices", lambda *_: devices), \
         mock.patch.object(jax, "default_backend", lambda: target.backend), sharding.use(mesh):
      auto = attention.resolve("auto", 1 << 10, 1 << 10, program.head_size,
                               jnp.dtype(program.dtype))
      compiled = jax.jit(function).trace(*shapes).lower().compile()
  finally:
    signal.alarm(0)
  kernels, memory, text = _kernels(folder), compiled.memory_analysis(), compiled.as_text()
  _known.extend(kernels)
  return Report(
      arguments=memory.argument_size_in_bytes, results=memory.output_size_in_bytes,
      temporaries=memory.temp_size_in_bytes,
      calls=_count(r'custom_call_target="([^"]+)"', text),
      collectives=_count(r" (all-to-all|all-gather|all-reduce|reduce-scatter|collective-permute)"
                         r"(?:-start)?\(", text),
      kernels=kernels, kernels_so_far=len(_known), auto=auto)


def _count(pattern: str, text: str) -> dict[str, int]:
  return dict(collections.Counter(re.findall(pattern, text)))


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
