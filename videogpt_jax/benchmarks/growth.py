"""Time and memory of the small model's step by the number of frames: `train_step --growth`."""

from collections.abc import Sequence
import json
import pathlib
import subprocess
import sys
from typing import Any

from videogpt_jax.benchmarks import train_step_cases
from videogpt_jax.errors import InputError


def measure(steps: int) -> dict[str, Any]:
  """Runs the case of every length in a process of its own, whose peak memory is its own.

  Raises:
    InputError: one of them failed.
  """
  lines = []
  for frames in train_step_cases.GROWTH:
    name = f"laptop{frames}"
    command = [sys.executable, "-m", "videogpt_jax.benchmarks.train_step", f"--case={name}",
               f"--steps={steps}", "--out=-"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
      raise InputError(f"the case {name} failed: {' '.join(command)}")
    found = json.loads(done.stdout.splitlines()[-1])
    lines.append({"frames": frames, **found})
    print(f"  {frames:>3} frames  {found['seconds_per_step']:8.3f} s  "
          f"{found['peak_rss_mib']:8.0f} MiB", flush=True)
  return {"lengths": lines}


def plot(lines: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Draws both curves beside the published implementation's, as png."""
  import matplotlib

  matplotlib.use("Agg")
  from matplotlib import pyplot

  figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
  for axis, key, label in zip(axes, ("seconds_per_step", "peak_rss_mib"),
                              ("seconds, forward and backward", "peak memory, MiB"), strict=True):
    axis.plot([line["frames"] for line in lines], [line[key] for line in lines], "o-",
              label="videogpt_jax")
    known = [(line["frames"], line["published"][key]) for line in lines if "published" in line]
    axis.plot(*zip(*known, strict=True), "s--", label="published (its own machine)")
    axis.set(xlabel="frames", ylabel=label, ylim=(0, None))
    axis.grid(alpha=0.3)
    axis.legend()
  figure.tight_layout()
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=110)
  pyplot.close(figure)
