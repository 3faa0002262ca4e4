"""Physics-IQ in small: scenes of the simulated world in its format, four predictors ranked.

    python -m videogpt_jax.evaluate --benchmark=physics_mini --out=runs/physics_mini

Every scene is simulated twice, the second time with slightly other velocities, and filmed by
three cameras: from the front and, by perspective, from the left and from the right. The files
have the names and folders of the real data set, and everything runs as on it, with the seconds
that the weights are made for. Scored are

    truth      the second take: what a perfect model could know
    model      the weights
    copy_last  the last given frame, again and again
    noise      independent random pixels
"""

from collections.abc import Mapping
import csv
import dataclasses
import io
import pathlib
import shutil
from typing import Any

from absl import flags
import cv2
import jax
from jaxtyping import PRNGKeyArray, UInt8
import numpy as np

from videogpt_jax import distributed
from videogpt_jax import files as files_lib
from videogpt_jax import weights as weights_lib
from videogpt_jax.data import video
from videogpt_jax.data import world
from videogpt_jax.errors import InputError
from videogpt_jax.evaluation import ledger as ledger_lib
from videogpt_jax.evaluation import physics_iq
from videogpt_jax.evaluation import physics_iq_report
from videogpt_jax.evaluation import report as report_lib
from videogpt_jax.metrics.physics_iq import protocol as protocol_lib
from videogpt_jax.metrics.physics_iq.protocol import Case
from videogpt_jax.metrics.physics_iq.protocol import Protocol

TRUTH, MODEL, COPY, NOISE = "truth", "model", "copy_last", "noise"
DATA = "data"

_SCALE = 4  # filmed so much larger than the world is: compared is at a quarter
_DISTURBED = 0.03  # of the velocities, relative standard deviation
# Where the corners (top left, top right, bottom right, bottom left) of a frame of side 1 come to
# lie: the far side is smaller.
_CAMERAS: Mapping[str, tuple[tuple[float, float], ...] | None] = {
  "left": ((0, 0), (0.96, 0.04), (0.96, 0.96), (0, 1)),
  "center": None,
  "right": ((0.04, 0.04), (1, 0), (1, 1), (0.04, 0.96)),
}


@dataclasses.dataclass(frozen=True)
class Options:
  """What is measured.

  Attributes:
    scenes: of the world, held-out ones from the first.
    seed: of the noise and of what differs between takes.
    batch_size: videos predicted at once.
    workers: processes that score; 0: one a core. For so little work more than one do not pay.
    restart: forget what another evaluation left.
  """

  scenes: int = 8
  seed: int = 0
  batch_size: int = 8
  workers: int = 1
  restart: bool = False


def define_flags() -> None:
  """The flags of this benchmark alone."""
  flags.DEFINE_integer("scenes", 8, "Scenes of the world; of each there are three views.",
                       lower_bound=1)
  flags.DEFINE_integer("batch_size", 8, "Videos predicted at once.", lower_bound=1)
  flags.DEFINE_integer("workers", 1, "Processes that score; 0: one a core.", lower_bound=0)


def from_flags() -> Options:
  """The options that the flags say."""
  f = flags.FLAGS
  return Options(f.scenes, f.seed, f.batch_size, f.workers, f.restart)


def run(weights: weights_lib.Weights, out: pathlib.Path, options: Options) -> report_lib.Report:
  """Makes the data set, scores the four predictors, and reports; see the module.

  Args:
    weights: trained on a simulated world.
    out: folder of the results: the data set, and a folder for each predictor.
    options: see there.

  Raises:
    InputError: the weights were not trained on a simulated world, or its rate is none of
      Physics-IQ's; `out` holds what this benchmark did not write under its names; or see
      `physics_iq.measure`.
  """
  if weights.config["data"].get("source", "world") != "world":
    raise InputError(f"{weights.path} was not trained on the simulated world, of which the scenes "
                     "of physics_mini are")
  settings = world.Settings(**weights.config["world"])
  protocol = protocol_of(settings, weights.config["sample"]["history"], options.scenes)
  base = physics_iq.Options(data=str(out / DATA), protocol=protocol, clip_frames=0,
                            batch_size=options.batch_size, seed=options.seed,
                            workers=options.workers, lossless=True, restart=options.restart)
  model = dataclasses.replace(physics_iq.of_weights(weights, base), name=MODEL)
  # One for all, before anything is written: what is in the folders of the predictors says
  # nothing about the weights and the seed of the others.
  ledger_lib.Ledger(out, {
    "benchmark": "physics_mini", **model.identity, "world": dataclasses.asdict(settings),
    "protocol": dataclasses.asdict(protocol), "scenes": options.scenes, "seed": options.seed,
    "batch_size": options.batch_size}, restart=options.restart,
    outputs=(DATA, TRUTH, MODEL, COPY, NOISE, *report_lib.OUTPUTS), exclusive=True)
  distributed.from_first(lambda: _write(settings, protocol, out, options))
  found = {}
  for name, predictor in {TRUTH: None, MODEL: model, COPY: _simple(COPY, copy_last, model),
                          NOISE: _simple(NOISE, noise, model)}.items():
    print(f"{name}:", flush=True)
    given = "" if predictor else str(out / TRUTH / "videos")
    found[name] = physics_iq.measure(predictor, out / name, dataclasses.replace(
      base, generated=given))
  return _report(weights, found, out, options)


def protocol_of(settings: world.Settings, history: int, scenes: int) -> Protocol:
  """The protocol in which `history` frames are given and the rest of a world's are predicted.

  Raises:
    InputError: the world's rate is none of Physics-IQ's, or nothing is left to predict.
  """
  if settings.fps != round(settings.fps):
    raise InputError(f"the world has {settings.fps} frames a second; Physics-IQ's are "
                     f"{', '.join(map(str, protocol_lib.RATES))}")
  return Protocol(round(settings.fps), history / settings.fps,
                  (settings.frames - history) / settings.fps, scenes)


def scene(settings: world.Settings, index: int, seed: int
          ) -> tuple[world.Sample, UInt8[np.ndarray, "2 T S S 3"]]:
  """A held-out world and both takes of it, `_SCALE` times larger, from the front."""
  sample = world.simulate(settings, world.held_out_seed(index))
  rng = np.random.default_rng((seed, index))
  disturbed = sample.velocities[0] * rng.normal(1, _DISTURBED, sample.velocities[0].shape)
  start = world.State(sample.positions[0], sample.angles[0], disturbed, sample.spins[0])
  again, *_ = world.trajectories(settings, sample.objects, start)
  large = dataclasses.replace(settings, size=_SCALE * settings.size)
  objects = [dataclasses.replace(item, radius=_SCALE * item.radius) for item in sample.objects]
  takes = [world.render(large, objects, _SCALE * positions, angles)[0] for positions, angles in (
    (sample.positions, sample.angles), (again.positions, again.angles))]
  return sample, np.stack(takes)


def film(frames: UInt8[np.ndarray, "T S S 3"], view: str) -> UInt8[np.ndarray, "T S S 3"]:
  """Frames as another camera sees them."""
  corners = _CAMERAS[view]
  if corners is None:
    return frames
  side = frames.shape[1]
  square = np.array([[0, 0], [1, 0], [1, 1], [0, 1]], np.float32)
  seen = cv2.getPerspectiveTransform(side * square, side * np.array(corners, np.float32))
  return np.stack([cv2.warpPerspective(frame, seen, (side, side), flags=cv2.INTER_LINEAR,
                                       borderValue=world.BACKGROUND) for frame in frames])


def write_dataset(settings: world.Settings, protocol: Protocol, folder: pathlib.Path, seed: int
                  ) -> tuple[Case, ...]:
  """Writes the data set: what is given and what happens then, of both takes and all views.

  Raises:
    InputError: it cannot be written.
  """
  history, fps, cases = protocol.conditioning_frames, protocol.fps, []
  split = {protocol_lib.CONDITIONING: folder / "split-videos" / "conditioning" / f"{fps}FPS",
           protocol_lib.TESTING: folder / "split-videos" / "testing" / f"{fps}FPS"}
  for path in split.values():
    files_lib.make_folder(path)
  lines = [("scenario", "description", "category", "generated_video_name")]
  views, count = protocol_lib.VIEWS, len(protocol_lib.VIEWS) * protocol.scenarios
  for index in range(protocol.scenarios):
    sample, takes = scene(settings, index, seed)
    for place, view in enumerate(views):
      number = len(views) * index + place + 1
      case = Case(number, view, f"trimmed-scene-{index}", number + count)
      cases.append(case)
      for take, frames in enumerate(takes, start=1):
        filmed = film(frames, view)
        parts = {protocol_lib.CONDITIONING: filmed[:history], protocol_lib.TESTING:
                 filmed[history:history + protocol.prediction_frames]}
        for kind, part in parts.items():
          video.write_mp4(split[kind] / case.clip(kind, fps, take), part, fps, lossless=True)
        first = case.number if take == 1 else case.second
        lines.append((f"{first:04d}_perspective-{view}_take-{take}_{case.scenario}.mp4",
                      sample.caption, world.LABELS[sample.label], case.generated))
  buffer = io.StringIO()
  csv.writer(buffer, lineterminator="\n").writerows(lines)
  files_lib.replace(folder / "descriptions.csv", buffer.getvalue().encode())
  return tuple(cases)


def copy_last(frames: UInt8[np.ndarray, "B h H W 3"], count: int, rng: PRNGKeyArray
              ) -> UInt8[np.ndarray, "B n H W 3"]:
  """The last given frame, again and again."""
  del rng
  return np.repeat(frames[:, -1:], count, axis=1)


def noise(frames: UInt8[np.ndarray, "B h H W 3"], count: int, rng: PRNGKeyArray
          ) -> UInt8[np.ndarray, "B n H W 3"]:
  """Random pixels, each by itself."""
  shape = (len(frames), count, *frames.shape[2:])
  return np.asarray(jax.random.randint(rng, shape, 0, 256)).astype(np.uint8)


def _simple(name: str, predict: physics_iq.Predict, like: physics_iq.Predictor
            ) -> physics_iq.Predictor:
  return physics_iq.Predictor(name, {"predictor": name}, predict, like.size)


def _write(settings: world.Settings, protocol: Protocol, out: pathlib.Path, options: Options
           ) -> None:
  """The data set and, as generated videos, its second takes; again: the same files come out."""
  folder = out / DATA
  cases = write_dataset(settings, protocol, folder, options.seed)
  truth = out / TRUTH / "videos"
  files_lib.make_folder(truth)
  fps = protocol.fps
  for case in cases:
    shutil.copyfile(folder / "split-videos" / "testing" / f"{fps}FPS"
                    / case.clip(protocol_lib.TESTING, fps, 2), truth / case.generated)


# What is told -----------------------------------------------------------------------------


def _report(weights: weights_lib.Weights, found: Mapping[str, physics_iq.Found],
            out: pathlib.Path, options: Options) -> report_lib.Report:
  measures = physics_iq_report.MEASURES
  table = report_lib.Table(
    f"Physics-IQ score on {options.scenes} scenes of the world, three views each",
    ["predictor", "score", *(title for _, title in measures)],
    [[name, x.score.score, *(getattr(x.score, key) for key, _ in measures)]
     for name, x in found.items()],
    "truth is the second take; no published score compares with these")
  reports = {name: physics_iq_report.report(
    name, x.dataset, x.videos, x.rows, x.score, out / name / "shown", {}, x.shipped)
    for name, x in found.items()}
  plots = [dataclasses.replace(plot, curves={
    name: reports[name].plots[i].curves["prediction"] for name in (MODEL, TRUTH, COPY, NOISE)})
    for i, plot in enumerate(reports[MODEL].plots)]
  videos = []
  for rows in zip(*(reports[name].videos for name in found), strict=True):
    by_name = dict(zip(found, rows, strict=True))
    shown = {"first take": by_name[MODEL].files["truth"]} | {
      name: row.files["prediction"] for name, row in by_name.items()} | {
      "motion (model)": by_name[MODEL].files["motion"]}
    videos.append(dataclasses.replace(by_name[MODEL], files=shown))
  parts: dict[str, Any] = {name: x.score.score for name, x in found.items()}
  return report_lib.Report(
    "Physics-IQ in small", {"checkpoint": weights.path, **dataclasses.asdict(options)},
    [table, *reports[MODEL].tables[1:]], plots, videos, {"score": parts})
