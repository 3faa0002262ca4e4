"""What the machine is and does: memory of this process, speed of its devices."""

import contextlib
import ctypes
import functools
import os
import pathlib
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import psutil

from videogpt_jax.errors import InputError

_MIB = 2**20

# Dense bfloat16 (T4, V100: float16) FLOP/s of one device, from the vendors' data sheets. The
# first entry that occurs in the device's `device_kind` counts.
_PEAK_FLOPS = {
  "TPU v6 lite": 918e12,
  "TPU v5 lite": 197e12,
  "TPU v5": 459e12,
  "TPU v4": 275e12,
  "GB200": 2500e12,
  "B200": 2250e12,
  "H200": 989e12,
  "H100 PCIe": 756e12,
  "H100 NVL": 835e12,
  "H100": 989e12,
  "A100": 312e12,
  "L40S": 362e12,
  "L40": 181e12,
  "L4": 121e12,
  "V100": 125e12,
  "T4": 65e12,
}
_PEAK_PRODUCT = 1024  # side of the matrices by which the rate of a CPU is measured


def use_platform(name: str) -> None:
  """Makes jax compute on a platform (cpu, gpu, tpu), before it is started; "" leaves it to jax.

  Raises:
    InputError: there is no such device.
  """
  if not name:
    return
  jax.config.update("jax_platforms", name)
  try:
    jax.devices()
  except RuntimeError as error:
    raise InputError(f"config.platform is {name!r}: {error}") from error


def host_rss_mib() -> float:
  """Resident memory of this process and its children (data workers) now, MiB.

  Pages shared between them count once for each, so it errs upwards.
  """
  own = psutil.Process()
  total = own.memory_info().rss
  for child in own.children(recursive=True):
    with contextlib.suppress(psutil.NoSuchProcess):  # it may end between the two calls
      total += child.memory_info().rss
  return total / _MIB


def peak_rss_mib() -> float:
  """The most resident memory that this process (without children) has had, MiB."""
  status = pathlib.Path("/proc/self/status")
  if status.exists():  # ru_maxrss would include the parent's size at the time of the fork
    for line in status.read_text().splitlines():
      if line.startswith("VmHWM:"):
        return int(line.split()[1]) / 1024
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return peak / _MIB if sys.platform == "darwin" else peak / 1024


def device_memory_mib() -> dict[str, float]:
  """Memory of the fullest device of this process: in use now, and at most so far, MiB.

  Returns:
    `device_mib` and `device_peak_mib`; nothing where the platform does not tell (CPU).
  """
  told = [stats for device in jax.local_devices() if (stats := device.memory_stats())]
  names = {"device_mib": "bytes_in_use", "device_peak_mib": "peak_bytes_in_use"}
  return {ours: max(stats[theirs] for stats in told) / _MIB for ours, theirs in names.items()
          if told and all(theirs in stats for stats in told)}


@functools.cache
def free_after_compiling(longer_than: float = 0.5) -> None:
  """Gives back to the system what a compiler has freed, after every compilation from now on.

  The C library (glibc) would keep it, hundreds of MiB for a train step, and what the program
  itself needs would come on top. Elsewhere than with glibc this does nothing.

  Args:
    longer_than: seconds of compilation, below which it is not worth while.
  """
  trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
  if trim is None:
    return

  def after(event: str, duration_secs: float, **_: str | int) -> None:
    if event.endswith("/backend_compile_duration") and duration_secs > longer_than:
      trim(0)

  jax.monitoring.register_event_duration_secs_listener(after)


def split_cpu(devices: int) -> None:
  """Lets jax see so many devices in place of one CPU; before anything else asks for devices.

  Each has a share of the cores. Heads and MLP split over two keep two cores busier than one
  program does where sequences are long and batches small; small models lose by it.

  Raises:
    InputError: more devices than cores, or jax has started already.
  """
  cores = usable_cores()
  if not 1 <= devices <= cores:
    raise InputError(f"cpu_devices is {devices}; this machine has {cores} cores")
  try:
    jax.config.update("jax_num_cpu_devices", devices)
  except RuntimeError as error:
    raise InputError(f"cpu_devices cannot be set any more: {error}") from error


def usable_cores() -> int:
  """CPU cores that this process may use."""
  if hasattr(os, "sched_getaffinity"):  # Linux: a container may have fewer than the machine
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def peak_flops() -> float | None:
  """What an MFU is measured against: of all devices together, FLOP/s; None for unknown ones.

  Accelerators: the data sheet's dense bfloat16 rate. CPU: the rate of a float32 product on this
  machine, measured now, since no data sheet states one; once a process, however many devices
  its cores are split into.
  """
  if jax.default_backend() == "cpu":
    return product_rate(_PEAK_PRODUCT, repeats=5) * jax.process_count()  # 0.2 s of a run's start
  each = data_sheet_flops(jax.devices()[0].device_kind)
  return each and each * jax.device_count()


def data_sheet_flops(device_kind: str) -> float | None:
  """The data sheet's dense bfloat16 rate of an accelerator, FLOP/s; None for an unknown one."""
  return next((rate for kind, rate in _PEAK_FLOPS.items() if kind in device_kind), None)


def product_rate(size: int = 2048, dtype: Any = jnp.float32, repeats: int = 3) -> float:
  """FLOP/s of a product of two square random matrices on the default device, best of some."""
  multiply = jax.jit(lambda a, b: jnp.matmul(a, b, precision="highest"))
  a, b = (jax.random.normal(key, (size, size), dtype) for key in jax.random.split(
      jax.random.key(0)))
  multiply(a, b).block_until_ready()
  seconds = []
  for _ in range(repeats):
    begin = time.perf_counter()
    multiply(a, b).block_until_ready()
    seconds.append(time.perf_counter() - begin)
  return 2 * size**3 / min(seconds)
