"""Scores a model on held-out videos.

    python -m videogpt_jax.evaluate --checkpoint=runs/tiny --out=runs/tiny
    python -m videogpt_jax.evaluate --benchmark=loss --checkpoint=runs/stage1 \\
        --config=configs/stage4.py

`world` predicts videos of the simulated world and compares with five baselines: prints the
table by predicted frame and writes into the output folder `summary.json`, a plot, sample
GIFs and, for a training run, its loss curve. Without --checkpoint the weights that come
with the package are scored. `loss` is the training loss on the held-out videos of a
configuration, whatever configuration the model was trained with: `loss.json`, `loss.png`.
"""

from collections.abc import Sequence
import os
import pathlib
import time
from typing import Any

from absl import flags
import jax
from ml_collections import config_flags
from ml_collections import ConfigDict
import numpy as np

from videogpt_jax import cli
from videogpt_jax import files
from videogpt_jax import telemetry
from videogpt_jax import weights as weights_lib
from videogpt_jax.errors import InputError

SUMMARY = "summary.json"


def evaluate(weights: weights_lib.Weights, out: str | pathlib.Path, *, videos: int = 64,
             seed: int = 0, workdir: str | pathlib.Path | None = None) -> dict[str, Any]:
  """Scores `weights` on held-out worlds, prints the table, writes the files.

  Args:
    weights: trained on a simulated world.
    out: folder for `summary.json`, `evidence.png` and the GIFs.
    videos: how many held-out videos.
    seed: of the sampling noise.
    workdir: the training run, for its seconds, steps and loss curve.

  Returns:
    What `summary.json` holds.

  Raises:
    InputError: the weights were not trained on a simulated world, or an extra is missing.
  """
  try:
    from videogpt_jax.data import world
    from videogpt_jax.metrics import baselines
    from videogpt_jax.metrics import evidence
  except ImportError as error:
    raise InputError(f"{error.name} is missing: pip install 'videogpt_jax[demo]'") from error
  if weights.config["data"].get("source", "world") != "world":
    raise InputError(f"{weights.path} was not trained on the simulated world, which alone knows "
                     "where its objects are")
  settings = world.Settings(**weights.config["world"])
  began = time.perf_counter()
  print(f"predicting {videos} held-out videos with {weights.path}", flush=True)
  calls = [0]

  def predict(histories: np.ndarray, count: int) -> np.ndarray:
    rng = jax.random.fold_in(jax.random.key(seed), calls[0])
    calls[0] += 1
    frames = weights.continue_video(histories, count, rng=rng)
    print(f"  {min(calls[0] * len(histories), videos)}/{videos} videos, "
          f"{time.perf_counter() - began:.1f} s", flush=True)
    return frames

  found = evidence.evaluate(predict, settings, history=weights.config["sample"]["history"],
                            videos=videos)
  print("\n" + found.table() + "\n", flush=True)
  out = pathlib.Path(out)
  gifs = [str(path) for path in evidence.write_gifs(found, out / "gifs")]
  plot = out / "evidence.png"
  evidence.plot(found, plot)
  summary = found.summary()
  every = summary.pop("mse_baselines")
  summary["mse_baselines"] = {name: every[name] for name in baselines.SCORED_BY_PIXELS}
  summary["mse_constant_velocity"] = every["constant_velocity"]  # drawn by the simulator itself
  summary |= {"checkpoint": weights.path, "sampler": dict(weights.config["sample"]),
              "evaluation_seconds": round(time.perf_counter() - began, 1),
              "plot": str(plot), "videos": gifs}
  if workdir is not None:
    summary |= _training(pathlib.Path(workdir), out)
    summary["seconds"] = round(summary["train_seconds"] + summary["evaluation_seconds"], 1)
  files.write_json(out / SUMMARY, summary)
  best = min(summary["mse_baselines"], key=summary["mse_baselines"].get)
  print(f"MSE {summary['mse_model']:.5f}, best pixel baseline ({best}) "
        f"{summary['mse_baselines'][best]:.5f}")
  for path in (*gifs, str(plot), *([summary["loss_curve"]] if workdir else ()), str(out / SUMMARY)):
    print(f"wrote {path}")
  return summary


def held_out_loss(config: ConfigDict, checkpoints: Sequence[str]) -> dict[str, dict[str, float]]:
  """The loss of any weights on the held-out videos of a configuration.

  Args:
    config: says the data, the frames and clips of a sample, and how many batches.
    checkpoints: workdirs, checkpoints or weights folders, of one model.

  Returns:
    By checkpoint: `loss`, `loss_by_noise/I` (time from noise to clean in equal bins) and
    `loss_by_clip/I`.

  Raises:
    InputError: bad configuration or data, or weights of another model.
  """
  from videogpt_jax import config as config_lib
  from videogpt_jax import held_out
  from videogpt_jax import sharding
  from videogpt_jax import step as step_lib
  from videogpt_jax import train

  config_lib.validate(config)
  _, videos = train.open_data(config)
  config = ConfigDict(config)
  config.lora.rank = 0  # adapters are merged when they are read
  recipe, mesh = config_lib.recipe(config), sharding.make_mesh(config.mesh)
  train.check_devices(config, mesh)
  wanted = step_lib.abstract_state(recipe, mesh).params
  loss = held_out.Loss(config, recipe, mesh, videos)
  with sharding.use(mesh):
    return {path: loss(train.initial_params(path, recipe, wanted)) for path in checkpoints}


def _training(workdir: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
  """Steps and seconds of a training run, and its loss curve."""
  metrics = workdir / telemetry.METRICS_FILE
  records = telemetry.read_metrics(metrics)
  curve = out / "loss.png"
  telemetry.plot_losses(metrics, curve)
  seconds = [record["train_seconds"] for record in records if "train_seconds" in record]
  return {"steps": records[-1]["step"], "train_seconds": round(seconds[-1], 1),
          "loss_curve": str(curve)}


def define_flags() -> None:
  """The command's flags."""
  flags.DEFINE_enum("benchmark", "world", ["world", "loss"], "What to measure.")
  config_flags.DEFINE_config_file("config", None, "For loss: the experiment whose held-out videos "
                                  "are taken.", lock_config=True)
  flags.DEFINE_string("checkpoint", "", "Training workdir or weights folder (for loss, several "
                      "separated by commas); default: the weights that come with the package.")
  flags.DEFINE_string("vae", "", "Folder (or hub name) of the autoencoder, for weights on its "
                      "latents.")
  flags.DEFINE_string("out", "", "Folder for the results; default: the workdir, or "
                      "runs/evaluation.")
  flags.DEFINE_integer("videos", 64, "Held-out videos.", lower_bound=1)
  flags.DEFINE_float("shift", -1.0, "Of the sampling times; default: as the run's configuration.")
  flags.DEFINE_integer("seed", 0, "Of the sampling noise.")


def main() -> None:
  """Reads the flags and evaluates."""
  f = flags.FLAGS
  if f.benchmark == "loss":
    if f.config is None or not f.checkpoint:
      raise InputError("--benchmark=loss needs --checkpoint and, for the held-out videos, --config")
    folder = pathlib.Path(_folder(f.out, "runs/evaluation"))
    losses = held_out_loss(f.config, [path for path in f.checkpoint.split(",") if path])
    for name, values in losses.items():
      print(f"{values['loss']:.6f}  {name}")
    files.write_json(folder / "loss.json", {"config": f.config.to_dict(), "held_out": losses})
    print(f"wrote {folder / 'loss.json'}")
    telemetry.plot_held_out(losses, folder / "loss.png")
    print(f"wrote {folder / 'loss.png'}")
    return
  weights = weights_lib.load(f.checkpoint, vae=f.vae)
  if f.shift != -1:
    if not f.shift > 0:
      raise InputError(f"--shift must be positive, got {f.shift}")
    weights.config["sample"]["shift"] = f.shift
  is_run = os.path.exists(os.path.join(weights.path, telemetry.METRICS_FILE))
  out = _folder(f.out, weights.path if is_run else "runs/evaluation")
  evaluate(weights, out, videos=f.videos, seed=f.seed, workdir=weights.path if is_run else None)


def _folder(out: str, default: str) -> str:
  """The folder for the results, made where missing."""
  out = out or default
  try:
    os.makedirs(out, exist_ok=True)
  except OSError as error:
    raise InputError(f"cannot write to --out={out}: {error}") from error
  return out


if __name__ == "__main__":
  define_flags()
  cli.run(main, computes=True)
