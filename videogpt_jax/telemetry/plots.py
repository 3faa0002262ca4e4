"""Pictures of a run's losses, for whoever has no TensorBoard open."""

from collections.abc import Mapping
import io
import pathlib
from typing import Any

from videogpt_jax import files
from videogpt_jax.errors import InputError
from videogpt_jax.telemetry import records as records_lib


def plot_losses(
  metrics: str | pathlib.Path,
  png: str | pathlib.Path,
  *,
  train: str = "loss",
  validation: str = "validation/loss",
) -> None:
  """Draws the loss curve, train and held-out, of a metrics.jsonl on a log scale.

  Args:
    metrics: the file that `Writer` writes.
    png: the picture to write (atomically).
    train: name of the training loss in it.
    validation: name of the held-out loss in it; it may be absent.

  Raises:
    InputError: no training loss in the file, or matplotlib is not installed.
  """
  fig = figure((7, 4))
  records = records_lib.read_metrics(metrics)
  axes = fig.add_subplot()
  for name, label, marker in ((train, "train", ""), (validation, "held out", "o")):
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    if points:
      axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=4)
    elif name == train:
      raise InputError(f"{metrics} has no value of {train!r} to plot")
  axes.set(xlabel="step", ylabel="loss", yscale="log")
  axes.grid(True, which="both", alpha=0.3)
  axes.legend()
  save(fig, png)


def plot_held_out(losses: Mapping[str, Mapping[str, float]], png: str | pathlib.Path) -> None:
  """Draws the held-out losses of several models: all, by noise level, by clip index.

  Args:
    losses: by name of the model, what `held_out.Loss` gives.
    png: the picture to write (atomically).

  Raises:
    InputError: matplotlib is not installed.
  """
  fig = figure((11, 4))
  axes = fig.subplots(1, 3, sharey=True)
  names = [pathlib.PurePath(name).name for name in losses]
  if len(set(names)) < len(names):
    names = list(losses)
  axes[0].plot(names, [values["loss"] for values in losses.values()], color="0.7", zorder=0)
  for name, values in zip(names, losses.values(), strict=True):
    axes[0].plot([name], [values["loss"]], marker="o")
    for panel, kind in ((axes[1], "noise"), (axes[2], "clip")):
      found = {int(key.rpartition("/")[2]): value for key, value in values.items()
               if key.startswith(f"loss_by_{kind}/")}
      panel.plot(list(found), list(found.values()), marker="o", markersize=4, label=name)
  axes[0].set(ylabel="held-out loss", yscale="log")
  axes[0].tick_params(axis="x", rotation=30)
  axes[1].set(xlabel="noise level, 0 the noisiest")
  axes[2].set(xlabel="clip index, the last all later ones")
  for panel in axes:
    panel.grid(True, which="both", alpha=0.3)
  axes[2].legend()
  save(fig, png)


def figure(size: tuple[float, float]) -> Any:
  """An empty figure of matplotlib's, of a size in inches.

  Raises:
    InputError: matplotlib is not installed.
  """
  try:
    from matplotlib.figure import Figure  # an extra: training does without it
  except ImportError as error:
    raise InputError("plots need matplotlib: pip install 'videogpt_jax[eval]'") from error
  return Figure(figsize=size, layout="constrained")


def save(fig: Any, png: str | pathlib.Path) -> None:
  """Writes a figure as a PNG, atomically; its folder is made."""
  buffer = io.BytesIO()
  fig.savefig(buffer, format="png", dpi=120)
  path = pathlib.Path(png)
  with records_lib.writing(path.parent):
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, buffer.getvalue())
