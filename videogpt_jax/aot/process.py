"""A process of its own to compile in.

A process of its own because the compilers read their settings once, from the environment;
those that others want (no optimisation, say) would falsify the result.
"""

from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import process
import contextlib
import multiprocessing
import os
import signal
from typing import Any
from unittest import mock

import jax

from videogpt_jax.aot import topology as topology_lib

_SETTINGS = ("JAX_", "XLA_", "TPU_", "LIBTPU_", "MOSAIC_GPU_")
SECONDS = 1200


class Compiler:
  """Runs functions, one after the other, where their compilers find default settings."""

  def __init__(self, topology: topology_lib.Topology, **environment: str) -> None:
    """`environment`: more variables, set for these compilers alone."""
    self._environment = _environment(topology) | environment
    self._process = _process()

  def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
    """What the function, which can be imported, returns there.

    Raises:
      RuntimeError: the compiler crashed or does not end; else whatever the function raises.
    """
    try:
      with mock.patch.dict(os.environ, self._environment, clear=True):  # the first call starts it
        return self._process.submit(_run, function, *args).result()
    except process.BrokenProcessPool as error:
      self._process = _process()  # for the next one
      raise RuntimeError(f"the compiler crashed, or took over {SECONDS} s") from error

  def close(self) -> None:
    """Ends the process."""
    self._process.shutdown(cancel_futures=True)


def _process() -> futures.ProcessPoolExecutor:
  return futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def _environment(topology: topology_lib.Topology) -> dict[str, str]:
  """Default settings of the compilers, but for what it takes to have no accelerator."""
  kept = {name: x for name, x in os.environ.items() if not name.startswith(_SETTINGS)}
  cpu = topology.count if topology.chip.platform == "cpu" else 1
  return kept | {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # there is no TPU that only one process may hold
    "JAX_NUM_CPU_DEVICES": str(cpu),
    "JAX_PLATFORMS": "cpu",
    "TPU_ACCELERATOR_TYPE": "v5p-8",  # libtpu wants one; the topology is what counts
    "TPU_LOG_DIR": "disabled",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
  }


def _run(function: Callable[..., Any], *args: Any) -> Any:
  """Runs in the process of its own."""
  signal.alarm(SECONDS)  # ends the process, whatever it is doing
  try:
    return function(*args)
  finally:
    signal.alarm(0)


@contextlib.contextmanager
def pretending(devices: Sequence[jax.Device], backend: str):
  """Tells code that asks what it runs on (compute types, block sizes, "auto") these devices."""
  with mock.patch.object(jax, "devices", lambda *_: list(devices)), \
       mock.patch.object(jax, "device_count", lambda *_: len(devices)), \
       mock.patch.object(jax, "default_backend", lambda: backend):
    yield
