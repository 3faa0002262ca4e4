"""Physics-IQ: how well predicted videos of real experiments move as the experiments did.

    python -m videogpt_jax.evaluate --benchmark=physics_iq --checkpoint=runs/mine \\
        --data=physics-IQ-benchmark --out=runs/physics_iq

The model is given 3 s of the first take of every view and predicts the next 5 s. Into the
output folder go

    MODEL/0001_perspective-left_trimmed-NAME.mp4   videos that the official script takes as they are
    results/MODEL.csv                              the official table
    shown/                                         small videos of truth and motion, for the page

A batch of finished videos is not predicted again, and a view is scored again only if one of its
videos has changed. `--generated=DIR` scores videos that somebody else made.
"""

from collections.abc import Callable, Iterator, Sequence
import concurrent.futures
import dataclasses
import pathlib
from typing import Any

from absl import flags
import jax
from jaxtyping import PRNGKeyArray, UInt8
import numpy as np

from videogpt_jax import files as files_lib
from videogpt_jax import machine
from videogpt_jax import weights as weights_lib
from videogpt_jax.data import fit as fit_lib
from videogpt_jax.data import video
from videogpt_jax.errors import InputError
from videogpt_jax.evaluation import ledger as ledger_lib
from videogpt_jax.evaluation import physics_iq_report
from videogpt_jax.evaluation import prediction
from videogpt_jax.evaluation import progress as progress_lib
from videogpt_jax.evaluation import report as report_lib
from videogpt_jax.metrics.physics_iq import files
from videogpt_jax.metrics.physics_iq import protocol as protocol_lib
from videogpt_jax.metrics.physics_iq import scores
from videogpt_jax.metrics.physics_iq import work
from videogpt_jax.metrics.physics_iq.protocol import Case
from videogpt_jax.metrics.physics_iq.protocol import Protocol

SHIPPED, LOSSLESS = "shipped", "lossless"
RESULTS, SHOWN = "results", "shown"  # folders of the results

# Takes frames uint8 [B, h, H, W, 3], a number n and a key; returns uint8 [B, n, H, W, 3].
Predict = Callable[[np.ndarray, int, PRNGKeyArray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Options:
  """What is measured, and how.

  Attributes:
    data: folder of the data set.
    generated: folder of videos to score; "": the model makes them.
    model: name of the videos' folder and of the table; "": of the weights or of `generated`.
    protocol: rate and lengths.
    clip_frames: that the model predicts at once; 0: as its configuration says.
    batch_size: videos predicted at once, and the piece of work after which all is safe.
    seed: of the noise.
    masks: of the real videos: `SHIPPED` takes those of the data set where they are, `LOSSLESS`
      makes all. Masks of generated videos are always made, without loss.
    workers: processes that score; 0: one a core.
    lossless: write generated videos as RGB without loss; else as every player can show them.
    check: only look whether the official script would take the generated videos.
    restart: forget what another evaluation left.
  """

  data: str = ""
  generated: str = ""
  model: str = ""
  protocol: Protocol = dataclasses.field(default_factory=Protocol)
  clip_frames: int = 32
  batch_size: int = 4
  seed: int = 0
  masks: str = SHIPPED
  workers: int = 0
  lossless: bool = False
  check: bool = False
  restart: bool = False


@dataclasses.dataclass(frozen=True)
class Predictor:
  """What makes videos.

  Attributes:
    name: of it.
    identity: JSON-able, what decides its predictions.
    predict: continues videos.
    size: height and width, px, at which it wants frames of a given height and width.
  """

  name: str
  identity: dict[str, Any]
  predict: Predict
  size: Callable[[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Found:
  """What was measured.

  Attributes:
    model: name of the folder of the videos.
    dataset: what they were compared with.
    videos: the generated ones.
    rows: the official table.
    score: the score.
    shipped: how many of the masks of takes came with the data set.
  """

  model: str
  dataset: files.Dataset
  videos: dict[Case, pathlib.Path]
  rows: scores.Rows
  score: scores.Score
  shipped: int


def define_flags() -> None:
  """The flags of this benchmark alone."""
  flags.DEFINE_string("data", "", "Folder with Physics-IQ's split-videos.")
  flags.DEFINE_string("generated", "", "Folder of generated videos to score: no model is used.")
  flags.DEFINE_string("model", "", "Name of the model, for its folder and table; default: that of "
                      "the weights' folder, or of --generated.")
  flags.DEFINE_integer("fps", 8, f"Frames a second: {', '.join(map(str, protocol_lib.RATES))}.")
  flags.DEFINE_bool("check", False, "Only look whether the official script would take the videos "
                    "in --generated.")
  flags.DEFINE_float("conditioning_s", 3.0, "Seconds that the model is given.")
  flags.DEFINE_float("prediction_s", 5.0, "Seconds that it predicts; published scores are of 5.")
  flags.DEFINE_integer("scenarios", protocol_lib.SCENARIOS, "Scenarios that --data holds; another "
                       "number gives scores that compare with no others.", lower_bound=1)
  flags.DEFINE_integer("clip_frames", 32, "Frames that the model predicts at once; 0: as its "
                       "configuration says.", lower_bound=0)
  flags.DEFINE_integer("batch_size", 4, "Videos predicted at once.", lower_bound=1)
  flags.DEFINE_enum("masks", SHIPPED, [SHIPPED, LOSSLESS], "Of the real videos: those that come "
                    "with the data set where there are any, or all made anew without loss.")
  flags.DEFINE_integer("workers", 0, "Processes that score; 0: one a core.", lower_bound=0)
  flags.DEFINE_bool("lossless", False, "Write generated videos without loss (RGB).")


def from_flags() -> Options:
  """The options that the flags say, with the folders that they name looked at.

  Raises:
    InputError: an option makes no sense, or a folder lacks videos; before weights are loaded.
  """
  f = flags.FLAGS
  if not f.data:
    raise InputError("--data is missing: the folder with Physics-IQ's split-videos; "
                     "docs/physics_iq.md says how to download it")
  options = Options(
    f.data, f.generated, f.model,
    Protocol(f.fps, f.conditioning_s, f.prediction_s, f.scenarios), f.clip_frames, f.batch_size,
    f.seed, f.masks, f.workers, f.lossless, f.check, f.restart)
  if options.check and not options.generated:
    raise InputError("--check looks at the videos in --generated, which is missing")
  dataset = files.find(options.data, options.protocol)
  if options.generated:
    files.generated(options.generated, dataset.cases)
  return options


def needs_weights(options: Options) -> bool:
  """Whether a model makes the videos."""
  return not options.generated


def only_prints(options: Options) -> bool:
  """Whether nothing is to be written: what an evaluation left in the folder stays."""
  return options.check


def run(weights: weights_lib.Weights | None, out: pathlib.Path, options: Options
        ) -> report_lib.Report:
  """Predicts the videos of the data set, unless they are given, and scores them; see the module.

  Args:
    weights: the model; None where `options.generated` says where the videos are.
    out: folder of the results.
    options: see there.

  Raises:
    InputError: the data set or the generated videos are not what the protocol asks for; the
      model cannot predict so many frames at once, or predicts what is no number; or see
      `ledger.Ledger`.
  """
  if options.check:
    dataset = files.find(options.data, options.protocol)
    folder = pathlib.Path(options.generated)
    size = files.check_generated(files.generated(folder, dataset.cases), options.protocol)
    return physics_iq_report.check(dataset, folder, size)
  predictor = None if weights is None or options.generated else of_weights(weights, options)
  found = measure(predictor, out, options)
  return physics_iq_report.report(
    found.model, found.dataset, found.videos, found.rows, found.score, out / SHOWN,
    {"checkpoint": weights.path if weights and predictor else None,
     "generated": options.generated or str(out / found.model), "data": options.data,
     "protocol": dataclasses.asdict(options.protocol), "clip_frames": options.clip_frames,
     "seed": options.seed, "sampler": dict(weights.config["sample"]) if weights and predictor
     else None},
    found.shipped)


def of_weights(weights: weights_lib.Weights, options: Options) -> Predictor:
  """A model as a predictor; whole frames are squeezed to its size, as they are stretched again.

  Raises:
    InputError: a clip leaves no history in its window.
  """
  clip_frames = options.clip_frames or weights.config["sample"]["clip_frames"]
  window = weights_lib.default_window(weights.config)
  clip_frames = min(clip_frames, options.protocol.prediction_frames)
  if window.frames and clip_frames >= window.frames:
    raise InputError(f"--clip_frames={clip_frames} leaves no history in the {window.frames} frames "
                     f"that {weights.path} sees at once; give fewer")
  fit = fit_lib.of(weights.config["data"], weights.config["codec"]["block"],
                   weights.model.patch_size)

  def predict(frames: np.ndarray, count: int, rng: PRNGKeyArray) -> np.ndarray:
    return prediction.continued(weights, frames, count, clip_frames=clip_frames, rng=rng)

  name = options.model or pathlib.Path(weights.path).resolve().name
  return Predictor(name, {**weights_lib.identity(weights), "clip_frames": clip_frames}, predict,
                   fit.size)


def measure(predictor: Predictor | None, out: pathlib.Path, options: Options) -> Found:
  """Predicts where there is a predictor, scores, and writes the official table.

  Raises:
    InputError: see `run`.
  """
  dataset = files.find(options.data, options.protocol)
  if predictor is None:
    if not options.generated:
      raise InputError("neither a model nor a folder of generated videos is given")
    folder = pathlib.Path(options.generated).expanduser()
    model = options.model or folder.resolve().name
    files.check_generated(files.generated(folder, dataset.cases), options.protocol)
    identity: dict[str, Any] = {"generated": str(folder)}
  else:
    model, folder = predictor.name, out / predictor.name
    identity = {**predictor.identity, "seed": options.seed, "batch_size": options.batch_size,
                "lossless": options.lossless}
  files.check_real(dataset, conditioning=predictor is not None)
  ledger = ledger_lib.Ledger(out, {
    "benchmark": "physics_iq", "model": model, **identity,
    "protocol": dataclasses.asdict(options.protocol)}, restart=options.restart,
    outputs=(*([] if predictor is None else [model]), RESULTS, SHOWN, *report_lib.OUTPUTS),
    inputs=(options.data, options.generated))
  if predictor is not None:
    _predict(predictor, dataset, folder, ledger, options)
  videos = files.generated(folder, dataset.cases)
  files.check_generated(videos, options.protocol)
  rows, shipped = _score(dataset, videos, out / SHOWN, ledger, options)
  if jax.process_index() == 0:
    files_lib.make_folder(out / RESULTS)
    scores.write(out / RESULTS / f"{model}.csv", rows)
  return Found(model, dataset, videos, rows, scores.score(rows), shipped)


def _predict(predictor: Predictor, dataset: files.Dataset, folder: pathlib.Path,
             ledger: ledger_lib.Ledger, options: Options) -> None:
  """Writes the generated videos that are not there yet, batch after batch."""
  files_lib.make_folder(folder)
  size = options.batch_size
  batches = [dataset.cases[i:i + size] for i in range(0, len(dataset.cases), size)]
  items = {f"prediction {i:03d}": batch for i, batch in enumerate(batches)}
  unfinished = [item for item in items if not _is_whole(ledger.get(item), folder)]
  ledger.wait()  # all see the same unfinished ones before any finishes more
  mine = unfinished[jax.process_index()::jax.process_count()]
  progress = progress_lib.Progress("videos predicted", sum(len(items[item]) for item in mine))
  given = _ahead([items[item] for item in mine], dataset, predictor)
  for item, frames in zip(mine, given, strict=True):
    batch = items[item]
    rows = np.minimum(np.arange(size), len(batch) - 1)  # one shape, one compilation
    rng = jax.random.fold_in(jax.random.key(options.seed), list(items).index(item))
    with prediction.of(f"{item}, videos from {batch[0].generated} on"):
      predicted = predictor.predict(frames[rows], options.protocol.prediction_frames, rng)
    digests = {}
    for case, made in zip(batch, predicted, strict=False):
      path = folder / case.generated
      video.write_mp4(path, made, options.protocol.fps, lossless=options.lossless)
      digests[case.generated] = work.file_digest(path)
    ledger.put(item, {"videos": digests})
    progress.add(len(batch))
  ledger.all(list(items))
  if jax.process_index() == 0:
    for left in folder.glob(".*.tmp"):  # of a process that was killed; the official code minds
      left.unlink(missing_ok=True)
  ledger.wait()


def _is_whole(result: dict[str, Any] | None, folder: pathlib.Path) -> bool:
  """Whether the videos of a finished batch are still those that were written."""
  return result is not None and all(
    (folder / name).is_file() and work.file_digest(folder / name) == digest
    for name, digest in result["videos"].items())


def _ahead(batches: Sequence[Sequence[Case]], dataset: files.Dataset, predictor: Predictor
           ) -> Iterator[UInt8[np.ndarray, "B h H W 3"]]:
  """What the model is given, batch after batch; the next is read while one is predicted."""

  def read(batch: Sequence[Case]) -> np.ndarray:
    return np.stack([_conditioning(dataset.conditioning(case), predictor) for case in batch])

  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    following = [pool.submit(read, batch) for batch in batches[:1]]
    for index in range(len(batches)):
      frames = following.pop().result()
      following += [pool.submit(read, batch) for batch in batches[index + 1:index + 2]]
      yield frames


def _conditioning(clip: files.Clip, predictor: Predictor) -> UInt8[np.ndarray, "h H W 3"]:
  frames = []
  for frame in work.read(clip):
    rgb = np.ascontiguousarray(frame[..., ::-1])
    height, width = predictor.size(*rgb.shape[:2])
    frames.append(rgb if rgb.shape[:2] == (height, width) else video.stretch(rgb, height, width))
  return np.stack(frames)


def _score(dataset: files.Dataset, videos: dict[Case, pathlib.Path], shown: pathlib.Path,
           ledger: ledger_lib.Ledger, options: Options) -> tuple[scores.Rows, int]:
  """The official table, and how many masks came with the data set."""
  files_lib.make_folder(shown)
  workers = options.workers or machine.usable_cores()
  views = {case: _view(dataset, case, videos[case], shown, options) for case in dataset.cases}
  items = {case.generated: case for case in views}
  states = dict(zip(items, work.digests(list(views.values())), strict=True))
  mine = ledger.mine(states)
  progress = progress_lib.Progress("views scored", len(mine))
  values = work.over(work.score, [views[items[item]] for item in mine], workers)
  for item, value in zip(mine, values, strict=True):
    ledger.put(item, value, states[item])
    progress.add()
  rows: dict[str, dict[str, Any]] = {}
  for item, value in ledger.all(list(items)).items():
    rows.setdefault(items[item].scenario, {})[items[item].view] = value
  return rows, sum(mask is not None for view in views.values() for mask in view.masks)


def _view(dataset: files.Dataset, case: Case, generated: pathlib.Path, shown: pathlib.Path,
          options: Options) -> work.View:
  frames, fps = options.protocol.prediction_frames, options.protocol.fps
  masks = (dataset.mask(case, 1), dataset.mask(case, 2)) if options.masks == SHIPPED else (None,
                                                                                        None)
  return work.View(dataset.testing(case, 1), dataset.testing(case, 2),
                   files.Clip(generated, fps, frames, frames), masks, shown)
