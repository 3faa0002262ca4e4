"""Memory and time of conversion: `python -m videogpt_jax.benchmarks.convert --folder=SCRATCH`.

Writes a synthetic checkpoint of the full model under the published names (float32, 15 GB),
makes a checkpoint of it and a published folder of that again, each by the command in a
process of its own, and compares every tensor bit by bit. Needs three times the space of the
model (45 GB). The last line printed is one JSON object.
"""

from collections.abc import Iterator
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any
import zlib

from absl import flags
import numpy as np

from videogpt_jax import cli
from videogpt_jax import flops
from videogpt_jax import folder
from videogpt_jax import model as model_lib
from videogpt_jax import published
from videogpt_jax import tensors
from videogpt_jax.errors import InputError

# What the command does, followed by what it took.
_CONVERT = """
import sys
from videogpt_jax import convert, machine
getattr(convert, sys.argv[1])(*sys.argv[2:])
print(machine.peak_rss_mib())
"""


class _Synthetic:
  """Parameters of a model, every one different, none of them held."""

  def __init__(self, config: model_lib.Config) -> None:
    self._tree = model_lib.abstract_params(config)
    rng = np.random.default_rng(0)
    self._noise = 0.02 * rng.standard_normal(2**24, np.float32)  # too long a period to compress

  def read(self, path: str) -> np.ndarray:
    """The parameter at a path."""
    shape = published.leaf(self._tree, path).shape
    size, start = math.prod(shape), zlib.crc32(path.encode()) % self._noise.size
    repeats = -(-(size + start) // self._noise.size)
    return np.tile(self._noise, repeats)[start:start + size].reshape(shape)


def measure(config: model_lib.Config, scratch: str) -> dict[str, Any]:
  """Seconds and peak memory of both ways, and whether the result is the source.

  Raises:
    InputError: a conversion failed, as it does where the disk is full.
  """
  with tempfile.TemporaryDirectory(dir=scratch) as name:
    place = pathlib.Path(name)
    print("writing the synthetic checkpoint", flush=True)
    folder.save(str(place / "source"), _Synthetic(config).read, config, {}, "float32")
    result: dict[str, Any] = {"parameters": flops.parameters(config)["total"],
                              "bytes": sum(x.stat().st_size for x in (place / "source").iterdir())}
    ways = (("import_folder", "source", "checkpoint"), ("export_folder", "checkpoint", "again"))
    for function, source, target in ways:
      print(f"{function}", flush=True)
      began = time.perf_counter()
      done = subprocess.run(
        [sys.executable, "-c", _CONVERT, function, str(place / source), str(place / target)],
        capture_output=True, text=True, check=False)
      if done.returncode:
        raise InputError(f"{function} failed: {done.stderr.strip().splitlines()[-1]}")
      kind = function.removesuffix("_folder")
      result[f"{kind}_seconds"] = round(time.perf_counter() - began, 1)
      result[f"{kind}_peak_rss_mib"] = float(done.stdout.splitlines()[-1])
    result["bit_equal"] = all(_compared(place / "source", place / "again"))
  return result


def _compared(source: pathlib.Path, again: pathlib.Path) -> Iterator[bool]:
  """Whether each tensor is the same in both folders."""
  ours, theirs = (tensors.open_folder(str(path)) for path in (source, again))
  yield set(ours) == set(theirs)
  for name, x in ours.items():
    yield x.dtype == theirs[name].dtype and x.tobytes() == theirs[name].tobytes()


def main() -> None:
  """Reads the flags and measures."""
  from videogpt_jax import config as config_lib
  from videogpt_jax import presets

  scratch = flags.FLAGS.folder
  if not os.path.isdir(scratch):
    raise InputError(f"--folder={scratch}: no such folder")
  config = config_lib.model(presets.stage(4, flags.FLAGS.variant))
  size = 4 * flops.parameters(config)["total"] + 4 * math.prod((192, 192, 3072))
  free = shutil.disk_usage(scratch).free
  if free < 3.1 * size:
    raise InputError(f"--folder={scratch} has {free / 1e9:.0f} GB free, {3.1 * size / 1e9:.0f} GB "
                     "are needed")
  print(json.dumps({"benchmark": "convert", **measure(config, scratch)}))


if __name__ == "__main__":
  flags.DEFINE_string("folder", "/tmp", "Scratch folder.")
  flags.DEFINE_enum("variant", "", ["", "small"], "Of the model, see configs/stage4.py.")
  cli.run(main)
