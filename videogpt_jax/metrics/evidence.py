"""Scores of predicted worlds by frame, and what they come to over many videos.

Axes: V videos, h frames of history, G predicted frames, S side of a frame.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import pathlib
from typing import Any

from jaxtyping import Float, UInt8
from matplotlib import ticker
import numpy as np

from videogpt_jax.data import world
from videogpt_jax.metrics import baselines
from videogpt_jax.metrics import frames as frame_metrics
from videogpt_jax.metrics import objects
from videogpt_jax.metrics import world as detector
from videogpt_jax.telemetry import plots

MODEL = "model"
BEST = "model_best"  # of several samples

_FOLLOWED = 0.5  # share of the objects whose energy says something of that of all
_RED = "#d1342f"  # the model's curve


@dataclasses.dataclass(frozen=True)
class Scores:
  """One predictor's scores for every video and predicted frame.

  `mse` is of pixels / 255, `psnr` in dB (equal frames count as 100), `lpips` NaN where it was not
  asked for; the others are those of `objects.Objects`.
  """

  mse: Float[np.ndarray, "V G"]
  psnr: Float[np.ndarray, "V G"]
  ssim: Float[np.ndarray, "V G"]
  lpips: Float[np.ndarray, "V G"]
  position: Float[np.ndarray, "V G"]
  mistaken: Float[np.ndarray, "V G"]
  vanished: Float[np.ndarray, "V G"]
  kinetic: Float[np.ndarray, "V G"]
  kinetic_true: Float[np.ndarray, "V G"]
  mechanical: Float[np.ndarray, "V G"]
  mechanical_true: Float[np.ndarray, "V G"]
  followed: Float[np.ndarray, "V G"]


@dataclasses.dataclass(frozen=True)
class Metric:
  """A measure of predictions.

  Attributes:
    name: short, a word or two.
    title: with units and what is better.
    fields: of `Scores` that it is made of.
    value: its mean along an axis of those fields.
    loss: of values, how bad they are.
  """

  name: str
  title: str
  fields: tuple[str, ...]
  value: Callable[..., np.ndarray]
  loss: Callable[[np.ndarray], np.ndarray] = lambda values: values

  def of(self, scores: Scores, axis: int) -> np.ndarray:
    """Over videos (axis 0) or over frames (1)."""
    return self.value(*(getattr(scores, field) for field in self.fields), axis=axis)


def _drift(energy: np.ndarray, truth: np.ndarray, followed: np.ndarray, axis: int) -> np.ndarray:
  """By how much sums differ, as single ones may be near zero; NaN if most objects are lost."""
  total = truth.sum(axis=axis)
  known = (total > 0) & (objects.mean(followed, axis) >= _FOLLOWED)
  return np.where(known, energy.sum(axis=axis) / np.where(known, total, 1.0) - 1, np.nan)


METRICS = {
  "mse": Metric(*frame_metrics.LABELS["mse"], ("mse",), objects.mean),
  "psnr": Metric(*frame_metrics.LABELS["psnr"], ("psnr",), objects.mean, np.negative),
  "ssim": Metric(*frame_metrics.LABELS["ssim"], ("ssim",), objects.mean, np.negative),
  "lpips": Metric(*frame_metrics.LABELS["lpips"], ("lpips",), objects.mean),
  "position": Metric(
    "position", f"Position error of objects in px, a lost one counts {detector.LOST:g} (lower is "
    "better)", ("position",), objects.mean),
  "mistaken": Metric("mistaken", "Objects mistaken for another, share (lower is better)",
                     ("mistaken",), objects.mean),
  "vanished": Metric("vanished", "Objects vanished, share (lower is better)", ("vanished",),
                     objects.mean),
  "kinetic": Metric("kinetic drift", "Kinetic energy of the objects found over the true one, less "
                    "1 (0 is best)", ("kinetic", "kinetic_true", "followed"), _drift, np.abs),
  "mechanical": Metric("energy drift", "Kinetic and potential energy of the objects found over "
                       "the true one, less 1 (0 is best)",
                       ("mechanical", "mechanical_true", "followed"), _drift, np.abs),
}


def score(settings: world.Settings, predicted: UInt8[np.ndarray, "V G S S 3"],
          samples: Sequence[world.Sample], history: int, hidden: np.ndarray | None = None,
          perceptual: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None) -> Scores:
  """Scores predictions of the frames after `history`; `hidden` as in `detector.detect`.

  `perceptual` is an `lpips.Lpips`, if its weights are there.

  Raises:
    InputError: predicted frames of another shape or type than the true ones.
  """
  truth = np.stack([sample.frames[history:] for sample in samples])
  error = frame_metrics.mse(predicted, truth)
  decibels = np.minimum(frame_metrics.psnr_from_mse(error), frame_metrics.EQUAL_PSNR)
  followed = [objects.follow(settings, frames, sample, history, hidden)
              for frames, sample in zip(predicted, samples, strict=True)]
  rest = {field.name: np.stack([getattr(x, field.name) for x in followed])
          for field in dataclasses.fields(objects.Objects)}
  lpips = np.full(error.shape, np.nan) if perceptual is None else perceptual(predicted, truth)
  return Scores(error, decibels, frame_metrics.ssim(predicted, truth), lpips, **rest)


def of_samples(samples: Sequence[Scores]) -> tuple[Scores, dict[str, Scores]]:
  """Scores of a model that predicted every video several times, with different noise.

  Returns:
    The mean over the samples; and by metric, if there are several, all scores of the sample of
    each video that is best by this metric (its mean over frames). Metrics share fields, so one
    `Scores` cannot hold the best of all.
  """
  stacked = {field.name: np.stack([getattr(x, field.name) for x in samples])
             for field in dataclasses.fields(Scores)}
  mean = Scores(**{name: objects.mean(x, axis=0) for name, x in stacked.items()})
  best: dict[str, Scores] = {}
  for key, metric in METRICS.items() if len(samples) > 1 else ():
    loss = np.stack([metric.loss(metric.of(x, axis=1)) for x in samples])
    chosen = np.where(np.isnan(loss), np.inf, loss).argmin(axis=0)
    best[key] = Scores(**{name: x[chosen, np.arange(len(chosen))] for name, x in stacked.items()})
  return mean, best


@dataclasses.dataclass(frozen=True)
class Evidence:
  """What was found.

  Attributes:
    settings: the world.
    history: frames that every predictor was given, h.
    scores: by predictor, the model first, then the baselines.
    best: by metric, of the model's best samples, see `of_samples`; empty if there is one.
  """

  settings: world.Settings
  history: int
  scores: Mapping[str, Scores]
  best: Mapping[str, Scores] = dataclasses.field(default_factory=dict)

  def names(self) -> list[str]:
    """The predictors: the model, `BEST` if it made several samples, the baselines."""
    return [MODEL, *([BEST] if self.best else []), *(name for name in self.scores if name != MODEL)]

  def of(self, name: str, key: str) -> Scores:
    """The scores of predictor `name` that count for a metric."""
    return self.best[key] if name == BEST else self.scores[name]

  def metrics(self) -> dict[str, Metric]:
    """Those that say something of this world."""
    idle = {"mechanical"} if not self.settings.gravity else set()
    if np.isnan(self.scores[MODEL].lpips).all():
      idle.add("lpips")
    return {key: metric for key, metric in METRICS.items() if key not in idle}

  def by_frame(self, name: str, key: str) -> Float[np.ndarray, " G"]:
    """A metric of predictor `name`, over videos, by predicted frame."""
    return METRICS[key].of(self.of(name, key), axis=0)

  def by_video(self, name: str, key: str) -> Float[np.ndarray, " V"]:
    """A metric of predictor `name`, over frames, by video."""
    return METRICS[key].of(self.of(name, key), axis=1)

  def summary(self) -> dict[str, Any]:
    """The figures as a dict that JSON can hold; means over videos, lists by frame."""
    names = [name for name in self.scores if name != MODEL]
    found = {
      "evaluated_videos": len(self.scores[MODEL].mse),
      "history": self.history,
      "mse_model": float(self.scores[MODEL].mse.mean()),
      "mse_baselines": {name: float(self.scores[name].mse.mean()) for name in names},
    }
    keys = {"mse": "mse_by_frame", "psnr": "psnr", "ssim": "ssim", "lpips": "lpips",
            "position": "position_error_px",
            "mistaken": "mistaken_objects", "vanished": "vanished_objects",
            "kinetic": "kinetic_energy_drift", "mechanical": "mechanical_energy_drift"}
    return found | {keys[key]: self._lists(key) for key in self.metrics()}

  def _lists(self, key: str) -> dict[str, list[float | None]]:
    # NaN is no JSON: a frame in which no video shows an object has no position error.
    return {name: [float(v) if np.isfinite(v) else None for v in self.by_frame(name, key)]
            for name in self.names()}


def plot(evidence: Evidence, path: str | pathlib.Path) -> None:
  """Draws MSE and position error by predicted frame to a PNG; folders are made."""
  figure = plots.figure((10, 4.4))
  panels = figure.subplots(1, 2)
  titles = ("Mean square error of pixels / 255", "Position error of objects, px")
  for panel, field, title in zip(panels, ("mse", "position"), titles, strict=True):
    for i, name in enumerate(evidence.names()):
      _draw_curve(panel, evidence, name, field, i)
    panel.set_title(title, fontsize=11, loc="left")
    panel.set_xlabel("predicted frame")
    panel.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
  lines, names = panels[0].get_legend_handles_labels()
  figure.legend(
    lines, names, loc="outside lower center", ncols=len(names), frameon=False, fontsize=9
  )
  videos = len(evidence.scores[MODEL].mse)
  figure.suptitle(
    f"{videos} held-out videos, {evidence.history} frames given"
    " (band: standard error of the model's mean)",
    fontsize=10,
    color="0.35",
  )
  plots.save(figure, path)


_BASELINE_COLOURS = ("#7f7f7f", "#bc8f5f", "#9a7fb5", "#5f9ea0", "#2e8b57")


def _draw_curve(panel: Any, evidence: Evidence, name: str, field: str, index: int) -> None:
  mean = evidence.by_frame(name, field)
  x = np.arange(1, len(mean) + 1)
  if name == BEST:
    panel.plot(x, mean, ":", color=_RED, linewidth=2.0, marker=".", label=name)
    return
  if name != MODEL:
    colour = _BASELINE_COLOURS[(index - 1) % len(_BASELINE_COLOURS)]
    dashes = "--" if name in baselines.SCORED_BY_PIXELS else "-"
    panel.plot(x, mean, dashes, color=colour, linewidth=1.4, marker=".", label=name)
    return
  values = getattr(evidence.scores[name], field)
  counts = np.maximum(np.sum(np.isfinite(values), axis=0), 1)
  spread = np.sqrt(objects.mean((values - mean) ** 2, axis=0) / counts)
  panel.fill_between(x, mean - spread, mean + spread, color=_RED, alpha=0.18, linewidth=0)
  panel.plot(x, mean, color=_RED, linewidth=2.6, marker="o", label=name, zorder=3, clip_on=False)
