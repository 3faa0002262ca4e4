"""The physics world: predictions of held-out videos against the truth and five baselines.

By predicted frame: pixels (MSE, PSNR, SSIM), where the objects are, whether they are still
themselves, and their energy. Nothing of it is published elsewhere: the world comes with this
package, and so do weights to compare with. Axes: V videos, h frames of history, G predicted
frames, S side of a frame, k samples.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
import pathlib
import time
from typing import Any

from absl import flags
import jax
from jaxtyping import PRNGKeyArray, UInt8
import numpy as np

from videogpt_jax import files
from videogpt_jax import telemetry
from videogpt_jax import weights as weights_lib
from videogpt_jax.data import video
from videogpt_jax.data import world
from videogpt_jax.errors import InputError
from videogpt_jax.evaluation import ledger as ledger_lib
from videogpt_jax.evaluation import prediction
from videogpt_jax.evaluation import progress as progress_lib
from videogpt_jax.evaluation import report as report_lib
from videogpt_jax.metrics import baselines
from videogpt_jax.metrics import evidence as evidence_lib
from videogpt_jax.metrics import lpips as lpips_lib
from videogpt_jax.metrics import world as detector

SUMMARY = "summary.json"
PLOT = "evidence.png"
PREDICTIONS, GIFS = "predictions", "gifs"
SHOWN_BASELINES = ("constant_velocity", "copy_last")  # beside truth and model

_GIFS = 4  # videos that have one
_SIDE = 192  # px, to which small frames are enlarged in videos
_SHOWN_SAMPLES = 4  # of each video, at most

# Takes histories uint8 [B, h, S, S, 3], a number G and a key; returns uint8 [B, G, S, S, 3].
Predict = Callable[[np.ndarray, int, PRNGKeyArray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Options:
  """What is measured.

  Attributes:
    videos: held-out videos, from the first.
    samples: futures of each video, with different noise; the best and the mean are scored.
    seed: of the noise.
    batch_size: videos predicted at once, and the piece of work after which all is safe.
    fit_videos: training videos that the baselines are fitted to.
    shift: of the sampling times; None: as the weights' configuration says.
    restart: forget what another evaluation left.
    lpips: the files `lpips.Lpips` reads (network, channels' weights); empty: LPIPS is left out.
  """

  videos: int = 64
  samples: int = 1
  seed: int = 0
  batch_size: int = 16
  fit_videos: int = 256
  shift: float | None = None
  restart: bool = False
  lpips: tuple[str, ...] = ()


def define_flags() -> None:
  """The flags of this benchmark alone."""
  flags.DEFINE_integer("videos", 64, "Held-out videos.", lower_bound=1)
  flags.DEFINE_integer("samples", 1, "Futures of each video, with different noise: the best and "
                       "the mean of them are scored.", lower_bound=1)
  flags.DEFINE_float("shift", None, "Of the sampling times; default: as the run's configuration.")
  flags.DEFINE_list("lpips", [], "For LPIPS, two files of weights: torchvision's AlexNet (such as "
                    "alexnet-owt-7be5be79.pth) and lpips/weights/v0.1/alex.pth of the package "
                    "lpips.")


def from_flags() -> Options:
  """The options that the flags say. Raises `InputError` if one makes no sense."""
  f = flags.FLAGS
  if f.shift is not None and not f.shift > 0:
    raise InputError(f"--shift must be positive, got {f.shift}")
  if len(f.lpips) not in (0, 2):
    raise InputError(f"--lpips names two files (NETWORK,CHANNELS), got {len(f.lpips)}")
  return Options(videos=f.videos, samples=f.samples, seed=f.seed, shift=f.shift,
                 restart=f.restart, lpips=tuple(f.lpips))


def run(weights: weights_lib.Weights, out: pathlib.Path, options: Options) -> report_lib.Report:
  """Scores `weights` on held-out worlds; writes summary.json, a plot, GIFs and videos into `out`.

  Raises:
    InputError: the weights were not trained on a simulated world, which leaves nothing to
      predict; they predict what is no number; or see `ledger.Ledger`.
  """
  if weights.config["data"].get("source", "world") != "world":
    raise InputError(f"{weights.path} was not trained on the simulated world, which alone knows "
                     "where its objects are")
  if options.shift is not None:
    sample = {**weights.config["sample"], "shift": options.shift}
    weights = dataclasses.replace(weights, config={**weights.config, "sample": sample})
  settings = world.Settings(**weights.config["world"])
  began = time.perf_counter()

  def predict(histories: np.ndarray, count: int, rng: PRNGKeyArray) -> np.ndarray:
    return prediction.continued(weights, histories, count, rng=rng)

  found, videos = measure(predict, settings, weights.config["sample"]["history"], out, options,
                          weights_lib.identity(weights))
  summary: dict[str, Any] = {}
  if jax.process_index() == 0:
    summary = _write_summary(weights, found, out, options, time.perf_counter() - began)
  return _report(weights, found, videos, out, options, summary)


def measure(predict: Predict, settings: world.Settings, history: int, out: pathlib.Path,
            options: Options, identity: Mapping[str, Any]
            ) -> tuple[evidence_lib.Evidence, list[tuple[str, int]]]:
  """Scores `predict` and the baselines on held-out videos, going on where a call was cut short.

  Args:
    predict: every call gets `options.batch_size` videos, the last one perhaps repeated, so that
      one compilation serves all.
    settings: the world.
    history: frames given, h.
    out: folder of the results.
    options: what is measured.
    identity: of the predictor, for the ledger.

  Returns:
    The scores; and of each video its caption and label (see `world.LABELS`).

  Raises:
    InputError: nothing to predict or nothing to evaluate on, predicted frames of another shape or
      type, or see `ledger.Ledger`.
  """
  count = settings.frames - history
  if history < 1 or count < 1:
    raise InputError(
      f"{history} frames of history leave none to predict in videos of {settings.frames};"
      " lower sample.history or raise world.frames"
    )
  sizes = (options.videos, options.samples, options.batch_size, options.fit_videos)
  if min(sizes) < 1:
    raise InputError("videos, samples, batch_size and fit_videos must be at least 1, got "
                     + ", ".join(map(str, sizes)))
  if options.lpips:
    lpips_lib.check((settings.size, settings.size))
  # The seed of a batch's noise, and so its result, depends on where it starts.
  starts = {f"{start:05d}": start for start in range(0, options.videos, options.batch_size)}
  ledger = ledger_lib.Ledger(out, {
    "benchmark": "world", **identity, "world": dataclasses.asdict(settings), "history": history,
    "videos": options.videos, "samples": options.samples, "seed": options.seed,
    "batch_size": options.batch_size, "fit_videos": options.fit_videos,
    **({"lpips": list(options.lpips)} if options.lpips else {})}, restart=options.restart,
    outputs=(PREDICTIONS, GIFS, SUMMARY, PLOT, *report_lib.OUTPUTS))
  unfinished = ledger.mine(list(starts))
  if unfinished:
    batches = _Batches(predict, settings, history, out, options)
    lengths = [min(options.batch_size, options.videos - starts[item]) for item in unfinished]
    progress = progress_lib.Progress("videos", sum(lengths))
    for item, length in zip(unfinished, lengths, strict=True):
      ledger.put(item, batches(starts[item], length))
      progress.add(length)
  results = list(ledger.all(list(starts)).values())
  mean, best = evidence_lib.of_samples([
    _joined([result["scores"][evidence_lib.MODEL][i] for result in results])
    for i in range(options.samples)])
  scores = {evidence_lib.MODEL: mean}
  scores |= {name: _joined([result["scores"][name][0] for result in results])
             for name in baselines.BASELINES}
  videos = [(caption, label) for result in results for caption, label in result["videos"]]
  return evidence_lib.Evidence(settings, history, scores, best), videos


class _Batches:
  """Predicts and scores a batch of videos, and writes what is to be seen of it."""

  def __init__(self, predict: Predict, settings: world.Settings, history: int, out: pathlib.Path,
               options: Options) -> None:
    self._predict, self._settings, self._history = predict, settings, history
    self._out, self._options = out, options
    self._count = settings.frames - history
    training = [world.simulate(settings, world.train_seed(i)).frames
                for i in range(options.fit_videos)]
    self._fitted = baselines.fit(settings, np.stack(training), history, self._count)
    self._hidden = detector.hidden_pixels(settings)
    self._lpips = lpips_lib.Lpips(*options.lpips) if options.lpips else None
    for folder in (out / PREDICTIONS, out / GIFS):
      files.make_folder(folder)

  def __call__(self, start: int, length: int) -> dict[str, Any]:
    """Scores of `length` videos from `start` on, by predictor and sample."""
    samples = [world.simulate(self._settings, world.held_out_seed(start + i))
               for i in range(length)]
    truth = np.stack([sample.frames for sample in samples])
    histories = truth[:, :self._history]
    predictions = {evidence_lib.MODEL: list(self._of_model(histories, start))}
    for name, baseline in baselines.BASELINES.items():
      predictions[name] = [np.stack([
        baseline(s.frames[:self._history], s.objects, self._fitted) for s in samples])]
    scores = {name: [dataclasses.asdict(evidence_lib.score(
      self._settings, part, samples, self._history, self._hidden, self._lpips))
      for part in parts]
      for name, parts in predictions.items()}
    for i in range(length):
      self._write(start + i, truth[i], {name: [part[i] for part in parts]
                                        for name, parts in predictions.items()})
    return {"scores": scores, "videos": [(s.caption, s.label) for s in samples]}

  def _of_model(self, histories: UInt8[np.ndarray, "V h S S 3"], start: int
                ) -> Iterator[UInt8[np.ndarray, "V G S S 3"]]:
    """Predictions of the model, sample after sample."""
    size = self._options.batch_size
    rows = np.minimum(np.arange(size), len(histories) - 1)
    rng = jax.random.fold_in(jax.random.key(self._options.seed), start // size)
    for sample in range(self._options.samples):
      key = jax.random.fold_in(rng, sample) if sample else rng
      with prediction.of(f"batch of videos {start} to {start + len(histories) - 1}"):
        part = np.asarray(self._predict(histories[rows], self._count, key))
      expected = (size, self._count, *histories.shape[2:])
      if part.shape != expected or part.dtype != np.uint8:
        raise InputError(
          f"the predictor returned {part.dtype} {part.shape} instead of uint8 {expected}"
        )
      yield part[:len(histories)]

  def _write(self, index: int, truth: np.ndarray, predicted: Mapping[str, Sequence[np.ndarray]]
             ) -> None:
    shown = {"truth": truth} | {
      name: np.concatenate([truth[:self._history], frames])
      for name, frames in _shown(predicted)}
    scale = max(1, _SIDE // self._settings.size)
    for name, path in _video_files(self._out, index, shown).items():
      video.write_mp4(path, video.enlarge(shown[name], scale), self._settings.fps)
    if index < _GIFS:
      picture = video.side_by_side(shown, scale, history=self._history)
      video.write_gif(_gif(self._out, index), picture, self._settings.fps)


def _shown(predicted: Mapping[str, Sequence[Any]]) -> list[tuple[str, Any]]:
  """What is to be seen of predictions, by title."""
  samples = predicted[evidence_lib.MODEL][:_SHOWN_SAMPLES]
  shown = [(evidence_lib.MODEL if i == 0 else f"{evidence_lib.MODEL} {i + 1}", sample)
           for i, sample in enumerate(samples)]
  return shown + [(name, predicted[name][0]) for name in SHOWN_BASELINES]


def _video_files(out: pathlib.Path, index: int, titles: Iterable[str]) -> dict[str, pathlib.Path]:
  return {title: out / PREDICTIONS / f"{index:05d}_{report_lib.slug(title)}.mp4"
          for title in titles}


def _gif(out: pathlib.Path, index: int) -> pathlib.Path:
  return out / GIFS / f"held_out_{index:03d}.gif"


def _joined(parts: Sequence[Mapping[str, Any]]) -> evidence_lib.Scores:
  return evidence_lib.Scores(**{
    field.name: np.concatenate([np.array(part[field.name], np.float64) for part in parts])
    for field in dataclasses.fields(evidence_lib.Scores)})


# What is told -----------------------------------------------------------------------------


def _write_summary(weights: weights_lib.Weights, found: evidence_lib.Evidence, out: pathlib.Path,
                   options: Options, seconds: float) -> dict[str, Any]:
  """Writes summary.json and the plot; returns what the first holds."""
  plot = out / PLOT
  evidence_lib.plot(found, plot)
  summary = found.summary()
  every = summary.pop("mse_baselines")
  summary["mse_baselines"] = {name: every[name] for name in baselines.SCORED_BY_PIXELS}
  summary["mse_constant_velocity"] = every["constant_velocity"]  # drawn by the simulator itself
  gifs = [str(_gif(out, i)) for i in range(min(_GIFS, options.videos))]
  summary |= {"checkpoint": weights.path, "sampler": dict(weights.config["sample"]),
              "samples": options.samples, "evaluation_seconds": round(seconds, 1),
              "plot": str(plot), "videos": gifs}
  workdir = pathlib.Path(weights.path)
  if (workdir / telemetry.METRICS_FILE).exists():
    summary |= _training(workdir, out)
    summary["seconds"] = round(summary["train_seconds"] + summary["evaluation_seconds"], 1)
  files.write_json(out / SUMMARY, summary)
  return summary


def _training(workdir: pathlib.Path, out: pathlib.Path) -> dict[str, Any]:
  """Steps and seconds of a training run, and its loss curve."""
  metrics = workdir / telemetry.METRICS_FILE
  records = telemetry.read_metrics(metrics)
  curve = out / "loss.png"
  telemetry.plot_losses(metrics, curve)
  seconds = [record["train_seconds"] for record in records if "train_seconds" in record]
  return {"steps": records[-1]["step"], "train_seconds": round(seconds[-1], 1),
          "loss_curve": str(curve)}


_BETTER = {"mse": report_lib.LOWER, "psnr": report_lib.HIGHER, "ssim": report_lib.HIGHER,
           "lpips": report_lib.LOWER,
           "position": report_lib.LOWER, "mistaken": report_lib.LOWER,
           "vanished": report_lib.LOWER, "kinetic": report_lib.ZERO,
           "mechanical": report_lib.ZERO}


def _report(weights: weights_lib.Weights, found: evidence_lib.Evidence,
            videos: Sequence[tuple[str, int]], out: pathlib.Path, options: Options,
            summary: dict[str, Any]) -> report_lib.Report:
  names, metrics = found.names(), found.metrics()
  frames = list(range(1, found.settings.frames - found.history + 1))
  curves = {key: {name: found.by_frame(name, key).tolist() for name in names} for key in metrics}
  overall = {name: [_whole(found, name, key) for key in metrics] for name in names}
  head = (f"{len(videos)} held-out videos, {found.history} frames given, {len(frames)} predicted"
          + (f"; {options.samples} samples of each: {evidence_lib.MODEL} is their mean, "
             f"{evidence_lib.BEST} the best of each video by each metric"
             if options.samples > 1 else ""))
  tables = [report_lib.Table(
    f"All frames: {head}", ["predictor", *(metric.name for metric in metrics.values())],
    [[name, *values] for name, values in overall.items()],
    better={metric.name: _BETTER[key] for key, metric in metrics.items()})]
  tables += [report_lib.Table(
    metric.title, ["frame", *names],
    [[str(frame), *(curves[key][name][i] for name in names)] for i, frame in enumerate(frames)]
    + [["mean", *(overall[name][list(metrics).index(key)] for name in names)]],
    across=_BETTER[key]) for key, metric in metrics.items()]
  plots = [report_lib.Plot(metric.title, frames, curves[key], "predicted frame", metric.name)
           for key, metric in metrics.items()]
  scenarios = _scenarios(found, [label for _, label in videos])
  tables.append(report_lib.Table(
    "The model by what happens in a video", ["scenario", "videos", *(
      metric.name for metric in metrics.values())],
    [[scenario, len(part.scores[evidence_lib.MODEL].mse),
      *(_whole(part, evidence_lib.MODEL, key) for key in metrics)]
     for scenario, part in scenarios.items()]))
  plots += [report_lib.Plot(
    f"{metrics[key].title}, by what happens in a video", list(scenarios),
    {name: [_whole(part, name, key) for part in scenarios.values()] for name in names}, "",
    metrics[key].name) for key in ("mse", "position")]
  return report_lib.Report("Physics world", {
    "checkpoint": weights.path, "sampler": dict(weights.config["sample"]),
    "world": dataclasses.asdict(found.settings), "videos": options.videos,
    "samples": options.samples, "seed": options.seed}, tables, plots,
    _rows(found, videos, out, options), summary)


def _scenarios(found: evidence_lib.Evidence, labels: Sequence[int]
               ) -> dict[str, evidence_lib.Evidence]:
  """The videos in which the same happens, by `world.LABELS`."""
  parts = {}
  for label in sorted(set(labels)):
    rows = np.array(labels) == label
    parts[world.LABELS[label]] = dataclasses.replace(
      found, scores={name: _of_rows(x, rows) for name, x in found.scores.items()},
      best={key: _of_rows(x, rows) for key, x in found.best.items()})
  return parts


def _of_rows(scores: evidence_lib.Scores, rows: np.ndarray) -> evidence_lib.Scores:
  return evidence_lib.Scores(**{field.name: getattr(scores, field.name)[rows]
                                for field in dataclasses.fields(scores)})


def _whole(found: evidence_lib.Evidence, name: str, key: str) -> float:
  """A metric over all videos and frames."""
  metric = evidence_lib.METRICS[key]
  scores = found.of(name, key)
  values = [getattr(scores, field).reshape(-1) for field in metric.fields]
  return float(metric.value(*values, axis=0))


def _rows(found: evidence_lib.Evidence, videos: Sequence[tuple[str, int]], out: pathlib.Path,
          options: Options) -> list[report_lib.VideoRow]:
  parts = {evidence_lib.MODEL: [None] * options.samples} | {
    name: [None] for name in SHOWN_BASELINES}
  titles = ["truth", *(title for title, _ in _shown(parts))]
  values = {metric.name: found.by_video(evidence_lib.MODEL, key)
            for key, metric in found.metrics().items()}
  return [report_lib.VideoRow(
    f"{i}: {caption}", _video_files(out, i, titles),
    {name: float(column[i]) for name, column in values.items()}, found.settings.fps, found.history)
    for i, (caption, _) in enumerate(videos)]
