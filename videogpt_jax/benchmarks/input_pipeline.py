"""How fast latents come from disk: records, frames and bytes a second, per core.

    python -m videogpt_jax.benchmarks.input_pipeline
    python -m videogpt_jax.benchmarks.input_pipeline --data=data/pretraining --frames=48

Without --data, a data set of noise is written to a temporary folder first; its files are then
in the system's cache, so what is measured is the work, not the disk. Frames per core are those
per second of processor time, over this process and its workers. The last line printed is one
JSON object.
"""

from collections.abc import Sequence
import itertools
import os
import pathlib
import tempfile
import time
from typing import Any

from absl import flags
import numpy as np
import psutil

from videogpt_jax import cli
from videogpt_jax import machine
from videogpt_jax.benchmarks import report
from videogpt_jax.data import pipeline
from videogpt_jax.data import store
from videogpt_jax.errors import InputError

_SIZE = (22, 40, 4)  # latents of 176x320 px
_PER_SHARD = 64
# What an H200 at 400 TFLOP/s needs for the published model, frames a second.
_NEEDED = 40


def write_noise(path: pathlib.Path, records: int, length: int) -> None:
  """A data set of normal noise, float16, with records of `length` frames."""
  spec = store.Spec(channels=_SIZE[-1], dtype="float16",
                    codec={"id": "vae", "block": 8, "channels": 4, "scale": 0.13025, "shift": 0.0})
  writer = store.create(path, spec, {"train": -(-records // _PER_SHARD)}, {"source": "noise"})
  for split, index in writer.pending():
    rng = np.random.default_rng(index)
    with writer.shard(split, index) as shard:
      for number in range(min(_PER_SHARD, records - index * _PER_SHARD)):
        latents = rng.standard_normal((length, *_SIZE), np.float32).astype(np.float16)
        shard.add(latents, fps=30.0, source=f"{index}/{number}")
  writer.finish()


def measure(source: store.Source, *, frames: int, interval: int, batch_size: int, workers: int,
            seconds: float) -> dict[str, Any]:
  """Reads batches for a while; see the module."""
  process = psutil.Process()
  began = time.perf_counter()
  batches = pipeline.batches(source, frames=frames, interval=(interval, interval),
                             batch_size=batch_size, seed=0, workers=workers)
  first = next(batches)
  first_s = time.perf_counter() - began
  for _ in range(3 + 2 * workers):  # what was read ahead meanwhile
    next(batches)
  cpu, start, count, wall = _cpu_seconds(process), time.perf_counter(), 0, 0.0
  while wall < seconds:
    next(batches)
    count, wall = count + 1, time.perf_counter() - start
  cpu = _cpu_seconds(process) - cpu
  rss = machine.host_rss_mib()
  if hasattr(batches, "close"):
    batches.close()
  rows = count * batch_size
  return {
    "workers": workers, "frames": frames, "interval": interval, "batch_size": batch_size,
    "seconds_to_first_batch": round(first_s, 3),
    "records_per_second": round(rows / wall, 1),
    "frames_per_second": round(rows * frames / wall, 1),
    "mb_per_second": round(count * first.latents.nbytes / wall / 1e6, 1),
    "frames_per_second_per_core": round(rows * frames / cpu, 1),
    "records_per_second_per_core": round(rows / cpu, 1),
    "mb_per_second_per_core": round(count * first.latents.nbytes / cpu / 1e6, 1),
    "busy_cores": round(cpu / wall, 2),
    "rss_mib": round(rss, 1),
  }


def _cpu_seconds(process: psutil.Process) -> float:
  """Of a process and its children, user and system."""
  return sum(sum(p.cpu_times()[:2]) for p in (process, *process.children(recursive=True)))


def run(data: str, split: str, frames: Sequence[int], interval: int, batch_size: int,
        workers: Sequence[int], seconds: float, records: int) -> dict[str, Any]:
  """All cases, a line each."""
  with tempfile.TemporaryDirectory() as folder:
    if not data:
      length = max(frames) * interval + 8
      write_noise(pathlib.Path(folder), records, length)
      print(f"wrote {records} records of {length} frames of noise, {_SIZE} float16", flush=True)
    source = store.open_split(data or folder, split)
    cases = []
    for n, count in itertools.product(frames, workers):
      cases.append(measure(source, frames=n, interval=interval, batch_size=batch_size,
                           workers=count, seconds=seconds))
      c = cases[-1]
      print(f"N={n:<3} workers={count}: {c['frames_per_second']:>9,.0f} frames/s, "
            f"{c['records_per_second']:>7,.1f} records/s, {c['mb_per_second']:>6,.0f} MB/s | "
            f"per core {c['frames_per_second_per_core']:>8,.0f} frames/s "
            f"({c['frames_per_second_per_core'] / _NEEDED:.0f} times an H200's need) | "
            f"first batch {c['seconds_to_first_batch']:.2f} s", flush=True)
  lengths = source.lengths
  return {
    "benchmark": "input_pipeline", "device": f"{machine.usable_cores()} CPU cores",
    "data": data or "noise", "records": len(source),
    "record_frames": [int(lengths.min()), int(lengths.max())],
    "frames_per_second_per_core": min(c["frames_per_second_per_core"] for c in cases),
    "needed_frames_per_second": _NEEDED, "cases": cases,
  }


def define_flags() -> None:
  """The command's flags."""
  flags.DEFINE_string("data", "", "A latent data set; default: noise in a temporary folder.")
  flags.DEFINE_string("split", "train", "Of --data.")
  flags.DEFINE_list("frames", ["16", "48", "80"], "N, frames of a sample; several are measured.")
  flags.DEFINE_integer("interval", 4, "Source frames between them.", lower_bound=1)
  flags.DEFINE_integer("batch_size", 8, "Rows of a batch.", lower_bound=1)
  flags.DEFINE_list("workers", ["0", "1", "2"], "Worker processes; 0 reads in threads.")
  flags.DEFINE_float("seconds", 5.0, "Measured time of every case.", lower_bound=0.1)
  flags.DEFINE_integer("records", 128, "Of the noise.", lower_bound=1)
  flags.DEFINE_string("out", "", "JSON file; default: in benchmarks/results; - for none.")


def main() -> None:
  """Reads the flags and measures."""
  f = flags.FLAGS
  try:
    frames, workers = list(map(int, f.frames)), list(map(int, f.workers))
  except ValueError as error:
    raise InputError(f"--frames and --workers are whole numbers: {error}") from error
  if min(frames, default=0) < 1 or min(workers, default=-1) < 0:
    raise InputError("--frames must be positive, --workers at least 0; give one of each at least")
  result = run(f.data, f.split, frames, f.interval, f.batch_size, workers, f.seconds, f.records)
  report.finish(result, f.out, "input_pipeline_cpu.json")


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed
  define_flags()
  cli.run(main)
