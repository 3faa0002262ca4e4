"""Measures a model by a benchmark: `python -m videogpt_jax.evaluate --benchmark=NAME`.

    python -m videogpt_jax.evaluate --checkpoint=runs/tiny --out=runs/tiny
    python -m videogpt_jax.evaluate --benchmark=loss --checkpoint=runs/stage1 \\
        --config=configs/stage4.py
    python -m videogpt_jax.evaluate --benchmark=fvd --help

world         held-out videos of the simulated world, against five baselines
loss          the training loss on the held-out videos of a configuration
physics_iq    the Physics-IQ benchmark, from its folder of videos
physics_mini  the same measures on the simulated world
fvd           Frechet video distance

Every benchmark prints its tables and writes into the output folder results.json, results.csv,
plots/ and report.html, a page with the videos side by side. Interrupted, the same command goes
on; with --distributed, the same command in every process shares the work. Without
--checkpoint the weights that come with the package are measured.
"""

from collections.abc import Sequence
import importlib
import os
import pathlib
import sys
from typing import Any

from absl import flags
import jax

from videogpt_jax import cli
from videogpt_jax import distributed
from videogpt_jax import files
from videogpt_jax import machine
from videogpt_jax import sharding
from videogpt_jax import telemetry
from videogpt_jax import weights as weights_lib
from videogpt_jax.errors import InputError
from videogpt_jax.evaluation import report as report_lib

BENCHMARKS = ("world", "loss", "physics_iq", "physics_mini", "fvd")
_BATCHES = 16  # rows that the devices of a process can share, where nothing else is said


def define_flags(arguments: Sequence[str] = ()) -> None:
  """The command's flags, with those of the benchmark that the arguments name."""
  _define_benchmark()
  flags.DEFINE_string("checkpoint", "", "Training workdir or weights folder (for loss, several "
                      "separated by commas); default: the weights that come with the package.")
  flags.DEFINE_string("vae", "", "Folder (or hub name) of the autoencoder, for weights on its "
                      "latents.")
  flags.DEFINE_string("out", "", "Folder for the results; default: for world, the workdir, else "
                      "runs/evaluation/BENCHMARK.")
  flags.DEFINE_bool("restart", False, "Remove what another evaluation left in --out.")
  flags.DEFINE_integer("seed", 0, "Of the sampling noise.")
  flags.DEFINE_enum("dtype", "auto", ["auto", "float32", "bfloat16"], "Compute type; auto: "
                    "bfloat16 on accelerators.")
  distributed.define_flags()
  module = _module(_chosen(arguments))
  module.define_flags()
  flags.adopt_module_key_flags(module)
  flags.adopt_module_key_flags(distributed)


def _define_benchmark(values: flags.FlagValues = flags.FLAGS) -> None:
  flags.DEFINE_enum("benchmark", BENCHMARKS[0], BENCHMARKS, "What to measure; each has flags of "
                    "its own: --benchmark=NAME --help.", flag_values=values)


def _chosen(arguments: Sequence[str]) -> str:
  """The benchmark that the arguments name; of what is wrong with them others tell."""
  probe = flags.FlagValues()
  _define_benchmark(probe)
  try:
    probe(["", *arguments], known_only=True)
  except flags.Error:
    return BENCHMARKS[0]
  return str(probe["benchmark"].value)


def _module(benchmark: str) -> Any:
  """The module of a benchmark: `define_flags()`, `from_flags()` and `run(weights, out, options)`.

  And `needs_weights(options)`, if it can do without, and `only_prints(options)`, if it can leave
  the output folder alone. A flag of its own may have the name of another benchmark's, as only the
  flags of the one that is named are defined.

  Raises:
    InputError: an extra is missing.
  """
  try:
    return importlib.import_module(f"videogpt_jax.evaluation.{benchmark}")
  except ImportError as error:
    extra = {"world": "demo", "physics_mini": "demo,eval"}.get(benchmark, "eval")
    raise InputError(f"{error.name} is missing: pip install 'videogpt_jax[{extra}]'") from error


def main() -> None:
  """Reads the flags and measures."""
  f = flags.FLAGS
  distributed.obey_flags()
  machine.free_after_compiling()
  module = _module(f.benchmark)
  options = module.from_flags()
  if f.benchmark == "loss":
    out = _folder(f.out or "runs/evaluation/loss")
    report = module.run(out, options)
  else:
    needs_weights = getattr(module, "needs_weights", lambda options: True)
    weights: Any = _load(f) if needs_weights(options) else None
    is_run = f.benchmark == "world" and os.path.exists(
      os.path.join(weights.path, telemetry.METRICS_FILE))
    path = f.out or (weights.path if is_run else f"runs/evaluation/{f.benchmark}")
    if getattr(module, "only_prints", lambda options: False)(options):
      print("\n" + report_lib.text(module.run(weights, pathlib.Path(path), options)) + "\n")
      return
    out = _folder(path)
    report = module.run(weights, out, options)
  if jax.process_index() == 0:
    _tell(report, out)


def _load(f: flags.FlagValues) -> weights_lib.Weights:
  """The weights, on as many devices of this process as can share a batch and the heads."""
  source = weights_lib.open_source(f.checkpoint)
  stack = source.model.backbone
  mesh = sharding.prediction_mesh(_BATCHES, stack.num_heads, stack.num_kv_heads,
                                  jax.local_devices())
  return weights_lib.load(source, dtype=f.dtype, vae=f.vae, mesh=mesh if mesh.size > 1 else None)


def _tell(report: report_lib.Report, out: pathlib.Path) -> None:
  """Prints the tables and writes the files of a report."""
  print("\n" + report_lib.text(report) + "\n", flush=True)
  report_lib.write(report, out)
  for path in sorted(out.iterdir()):
    if path.is_file() and path.suffix in (".json", ".csv", ".png", ".html"):
      print(f"wrote {path}")
    elif path.is_dir():
      print(f"wrote {path}{os.sep}")


def _folder(out: str) -> pathlib.Path:
  """The folder for the results, made where missing."""
  files.make_folder(out)
  return pathlib.Path(out)


if __name__ == "__main__":
  cli.run(main, define_flags=lambda: define_flags(sys.argv[1:]), computes=True)
