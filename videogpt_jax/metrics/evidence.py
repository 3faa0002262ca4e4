"""First evidence that a model predicts: held-out worlds, four metrics, five baselines.

`evaluate` scores a predictor frame by frame; the `Evidence` it returns prints as tables,
sums up as JSON, plots and writes videos. Axes: V videos, h frames of history, G predicted
frames, S side of a frame.
"""

from collections.abc import Callable
import dataclasses
import pathlib
from typing import Any

from jaxtyping import Float, UInt8
from matplotlib import ticker
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure
import numpy as np

from videogpt_jax.data import video
from videogpt_jax.data import world
from videogpt_jax.errors import InputError
from videogpt_jax.metrics import baselines
from videogpt_jax.metrics import frames as frame_metrics
from videogpt_jax.metrics import world as detector

MODEL = "model"
GIF_COLUMNS = ("constant_velocity", "copy_last")  # baselines shown beside truth and model

_EQUAL_PSNR = 100.0  # dB that equal frames count; their infinite PSNR would swallow every mean
_VISIBLE = 0.5  # share of an object's area that the truth must show for it to count

# Takes histories uint8 [B, h, S, S, 3] and a number G, returns uint8 [B, G, S, S, 3].
Predict = Callable[[np.ndarray, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Scores:
  """One predictor's scores for every video and predicted frame.

  `mse` is of pixels / 255, `psnr` in dB (equal frames count as 100), `position` the mean
  error in px of the video's objects, lost ones counting 8; NaN where none is in view.
  """

  mse: Float[np.ndarray, "V G"]
  psnr: Float[np.ndarray, "V G"]
  ssim: Float[np.ndarray, "V G"]
  position: Float[np.ndarray, "V G"]


@dataclasses.dataclass(frozen=True)
class _Metric:
  field: str
  title: str
  decimals: int
  best: Callable[[np.ndarray], int]


_METRICS = (
  _Metric("mse", "MSE of pixels / 255 (lower is better)", 5, lambda row: int(np.nanargmin(row))),
  _Metric("psnr", "PSNR in dB (higher is better)", 2, lambda row: int(np.nanargmax(row))),
  _Metric("ssim", "SSIM (higher is better)", 4, lambda row: int(np.nanargmax(row))),
  _Metric(
    "position",
    f"Position error of objects in px, a lost one counts {detector.LOST:g} (lower is better)",
    2,
    lambda row: int(np.nanargmin(row)),
  ),
)


@dataclasses.dataclass(frozen=True)
class Evidence:
  """What `evaluate` found.

  Attributes:
    settings: the world.
    history: frames that every predictor was given, h.
    scores: by predictor, the model first, then the baselines.
    truth: the first few videos, whole.
    predictions: by predictor, the frames predicted for these videos.
  """

  settings: world.Settings
  history: int
  scores: dict[str, Scores]
  truth: UInt8[np.ndarray, "E T S S 3"]
  predictions: dict[str, UInt8[np.ndarray, "E G S S 3"]]

  def by_frame(self, name: str, field: str) -> Float[np.ndarray, " G"]:
    """The metric `field` of predictor `name`, mean over videos, by predicted frame."""
    return _mean(getattr(self.scores[name], field), axis=0)

  def table(self) -> str:
    """All metrics as aligned text: a row per predicted frame, a column per predictor."""
    videos, predicted = self.scores[MODEL].mse.shape
    parts = [
      f"{videos} held-out videos, {self.history} frames given, {predicted} predicted;"
      " * marks the best of a row"
    ]
    for metric in _METRICS:
      parts.append(f"{metric.title}\n{self._block(metric)}")
    return "\n\n".join(parts)

  def _block(self, metric: _Metric) -> str:
    names = list(self.scores)
    values = np.stack([self.by_frame(name, metric.field) for name in names], axis=-1)
    labels = [str(i + 1) for i in range(len(values))] + ["mean"]
    values = np.concatenate([values, _mean(values, axis=0)[None]])
    widths = [max(len(name), metric.decimals + 5) for name in names]
    header = "frame  " + "  ".join(n.rjust(w) for n, w in zip(names, widths, strict=True))
    lines = [header.rstrip(), "-" * len(header)]
    for label, row in zip(labels, values, strict=True):
      best = metric.best(row) if np.any(np.isfinite(row)) else -1
      cells = []
      for i, (value, width) in enumerate(zip(row, widths, strict=True)):
        mark = "*" if i == best else " "
        cells.append(f"{value:.{metric.decimals}f}".rjust(width) + mark)
      if label == "mean":
        lines.append("-" * len(header))
      lines.append((f"{label:>5}  " + " ".join(cells)).rstrip())
    return "\n".join(lines)

  def summary(self) -> dict[str, Any]:
    """The figures as a dict that JSON can hold; means over videos, lists by frame."""
    names = [name for name in self.scores if name != MODEL]
    return {
      "evaluated_videos": len(self.scores[MODEL].mse),
      "history": self.history,
      "mse_model": float(self.scores[MODEL].mse.mean()),
      "mse_baselines": {name: float(self.scores[name].mse.mean()) for name in names},
      "mse_by_frame": self._lists("mse"),
      "psnr": self._lists("psnr"),
      "ssim": self._lists("ssim"),
      "position_error_px": self._lists("position"),
    }

  def _lists(self, field: str) -> dict[str, list[float | None]]:
    lists = {}
    for name in self.scores:
      # NaN is no JSON: a frame in which no video shows an object has no position error.
      lists[name] = [float(v) if np.isfinite(v) else None for v in self.by_frame(name, field)]
    return lists


def evaluate(
  predict: Predict,
  settings: world.Settings,
  *,
  history: int,
  videos: int = 64,
  fit_videos: int = 256,
  batch_size: int = 16,
  examples: int = 4,
) -> Evidence:
  """Scores `predict` and all baselines on held-out videos 0 to `videos` - 1.

  The baselines are fitted to training videos 0 to `fit_videos` - 1. Every predictor gets
  the first `history` frames and predicts all others; an object counts in the position
  error while at least half of it is in view.

  Args:
    predict: histories uint8 [B, h, S, S, 3] and G to frames uint8 [B, G, S, S, 3]; every
      call gets `batch_size` videos, the last one perhaps repeated, so that one
      compilation serves all.
    settings: the world.
    history: frames given, h.
    videos: held-out videos.
    fit_videos: training videos.
    batch_size: videos per call of `predict`.
    examples: how many videos to keep the frames of.

  Raises:
    InputError: nothing to predict or nothing to evaluate on, or predicted frames of
      another shape or type.
  """
  count = settings.frames - history
  if history < 1 or count < 1:
    raise InputError(
      f"{history} frames of history leave none to predict in videos of {settings.frames};"
      " lower sample.history or raise world.frames"
    )
  if min(videos, fit_videos, batch_size) < 1:
    raise InputError(
      "videos, fit_videos and batch_size must be at least 1,"
      f" got {videos}, {fit_videos} and {batch_size}"
    )
  training = [world.simulate(settings, world.train_seed(i)).frames for i in range(fit_videos)]
  fitted = baselines.fit(settings, np.stack(training), history, count)
  samples = [world.simulate(settings, world.held_out_seed(i)) for i in range(videos)]
  truth = np.stack([sample.frames for sample in samples])
  predictions = {MODEL: _predict_all(predict, truth[:, :history], count, batch_size)}
  for name, baseline in baselines.BASELINES.items():
    predictions[name] = np.stack([baseline(s.frames[:history], s.objects, fitted) for s in samples])
  hidden = detector.hidden_pixels(settings)
  scores = {name: score(p, samples, history, hidden) for name, p in predictions.items()}
  kept = {name: p[:examples] for name, p in predictions.items()}
  return Evidence(settings, history, scores, truth[:examples], kept)


def score(
  predicted: UInt8[np.ndarray, "V G S S 3"],
  samples: list[world.Sample],
  history: int,
  hidden: np.ndarray | None = None,
) -> Scores:
  """Scores predictions of the frames after `history`; `hidden` as in `detector.detect`.

  Raises:
    InputError: predicted frames of another shape or type than the true ones.
  """
  truth = np.stack([sample.frames[history:] for sample in samples])
  error = frame_metrics.mse(predicted, truth)
  position = [
    _position_error(p, sample, history, hidden)
    for p, sample in zip(predicted, samples, strict=True)
  ]
  decibels = np.minimum(frame_metrics.psnr_from_mse(error), _EQUAL_PSNR)
  return Scores(error, decibels, frame_metrics.ssim(predicted, truth), np.stack(position))


def plot(evidence: Evidence, path: str | pathlib.Path) -> None:
  """Draws MSE and position error by predicted frame to an image file; folders are made."""
  figure = Figure(figsize=(10, 4.4), dpi=120, layout="constrained")
  backend_agg.FigureCanvasAgg(figure)
  panels = figure.subplots(1, 2)
  titles = ("Mean square error of pixels / 255", "Position error of objects, px")
  for panel, field, title in zip(panels, ("mse", "position"), titles, strict=True):
    for i, name in enumerate(evidence.scores):
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
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path)


def write_gifs(evidence: Evidence, folder: str | pathlib.Path) -> list[pathlib.Path]:
  """Writes each example as a GIF, truth and predictions side by side; returns the paths."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  scale = max(1, 192 // evidence.settings.size)
  paths = []
  for i, truth in enumerate(evidence.truth):
    columns = {"truth": truth}
    for name in (MODEL, *GIF_COLUMNS):
      start = truth[: evidence.history]
      columns[name] = np.concatenate([start, evidence.predictions[name][i]])
    picture = video.side_by_side(columns, scale, history=evidence.history)
    paths.append(folder / f"held_out_{i:03d}.gif")
    video.write_gif(paths[-1], picture, evidence.settings.fps)
  return paths


_BASELINE_COLOURS = ("#7f7f7f", "#bc8f5f", "#9a7fb5", "#5f9ea0", "#2e8b57")


def _draw_curve(panel: Any, evidence: Evidence, name: str, field: str, index: int) -> None:
  values = getattr(evidence.scores[name], field)
  mean = _mean(values, axis=0)
  x = np.arange(1, len(mean) + 1)
  if name != MODEL:
    colour = _BASELINE_COLOURS[(index - 1) % len(_BASELINE_COLOURS)]
    dashes = "--" if name in baselines.SCORED_BY_PIXELS else "-"
    panel.plot(x, mean, dashes, color=colour, linewidth=1.4, marker=".", label=name)
    return
  counts = np.maximum(np.sum(np.isfinite(values), axis=0), 1)
  spread = np.sqrt(_mean((values - mean) ** 2, axis=0) / counts)
  panel.fill_between(x, mean - spread, mean + spread, color="#d1342f", alpha=0.18, linewidth=0)
  panel.plot(
    x, mean, color="#d1342f", linewidth=2.6, marker="o", label=name, zorder=3, clip_on=False
  )


def _predict_all(
  predict: Predict, histories: UInt8[np.ndarray, "V h S S 3"], count: int, batch_size: int
) -> UInt8[np.ndarray, "V G S S 3"]:
  parts = []
  for start in range(0, len(histories), batch_size):
    rows = np.minimum(np.arange(start, start + batch_size), len(histories) - 1)
    part = np.asarray(predict(histories[rows], count))
    expected = (batch_size, count, *histories.shape[2:])
    if part.shape != expected or part.dtype != np.uint8:
      raise InputError(
        f"the predictor returned {part.dtype} {part.shape} instead of uint8 {expected}"
      )
    parts.append(part)
  return np.concatenate(parts)[: len(histories)]


def _position_error(
  predicted: UInt8[np.ndarray, "G S S 3"],
  sample: world.Sample,
  history: int,
  hidden: np.ndarray | None,
) -> Float[np.ndarray, " G"]:
  positions, found = detector.detect(predicted, sample.objects, hidden)
  error = detector.position_error(positions, found, sample.positions[history:])
  areas = np.array([detector.area(item) for item in sample.objects])
  in_view = sample.masks[history:].sum(axis=(2, 3)) >= _VISIBLE * areas
  return _mean(np.where(in_view, error, np.nan), axis=1)


def _mean(values: Float[np.ndarray, "*any"], axis: int) -> Float[np.ndarray, "*rest"]:
  """Mean of the numbers along `axis`, NaN where there are none."""
  known = np.isfinite(values)
  total = np.where(known, values, 0.0).sum(axis=axis)
  count = known.sum(axis=axis)
  return np.where(count > 0, total / np.maximum(count, 1), np.nan)
