"""The data set's folders, and the checks before any work.

    split-videos/testing/8FPS/0001_testing-videos_8FPS_perspective-left_take-1_trimmed-NAME.mp4
    split-videos/conditioning/8FPS/0001_conditioning-videos_...    what a model is given
    full-videos/take-1/8FPS/0001_full-videos_...                   both in one
    video-masks/real/8FPS/0001_video-masks_...                     motion, may be missing
    descriptions.csv                                               categories, may be missing

(`split-videos/testing-videos` and `split-videos/conditioning-videos` are known as well.) Where a
rate has no folder, videos of 30 frames a second are brought to it as they are read.
"""

import collections
from collections.abc import Mapping, Sequence
import csv
import dataclasses
import os
import pathlib

from videogpt_jax.data import video
from videogpt_jax.errors import InputError
from videogpt_jax.metrics.physics_iq import protocol as protocol_lib
from videogpt_jax.metrics.physics_iq.protocol import Case
from videogpt_jax.metrics.physics_iq.protocol import Protocol

DURATION_S = 1e-3  # by which the length of a generated video may be off
_RATE = 1e-3  # relative
_SHOWN = 5  # names in a message
_ROOTS = ("", "physics-IQ-benchmark", "physics-IQ-benchmark-dataset")
_DESCRIPTIONS = ("descriptions.csv", "descriptions/descriptions_original.csv")


@dataclasses.dataclass(frozen=True)
class Clip:
  """A video and what is taken of it.

  Attributes:
    path: file.
    fps: frames a second of the file.
    frames: its frames that are taken.
    wanted: frames they are brought to; the same, unless the rate changes.
    from_end: the last ones are taken; else the first.
  """

  path: pathlib.Path
  fps: int
  frames: int
  wanted: int
  from_end: bool = False


@dataclasses.dataclass(frozen=True)
class Dataset:
  """The data set in a folder; see the module.

  Attributes:
    root: the folder that holds `split-videos`.
    protocol: lengths and rate.
    cases: views of scenarios, by number.
    categories: of scenarios, where the folder says them.
  """

  root: pathlib.Path
  protocol: Protocol
  cases: tuple[Case, ...]
  categories: Mapping[str, str]

  def testing(self, case: Case, take: int = 1) -> Clip:
    """What really happened, at the rate of the protocol or, if that is not there, at 30."""
    folder, fps = _testing_folder(self.root, self.protocol)
    path = folder / case.clip(protocol_lib.TESTING, fps, take)
    return Clip(path, fps, round(self.protocol.prediction_s * fps),
                self.protocol.prediction_frames)

  def mask(self, case: Case, take: int) -> pathlib.Path | None:
    """The motion that comes with the data set, where it does."""
    fps = self.protocol.fps
    path = (self.root / "video-masks" / "real" / f"{fps}FPS"
            / case.clip(protocol_lib.MASKS, fps, take))
    return path if path.is_file() else None

  def conditioning(self, case: Case) -> Clip:
    """What a model is given: the seconds before the part it predicts.

    Raises:
      InputError: neither the split nor the full video is there.
    """
    seconds = self.protocol.conditioning_s
    tried = []
    for fps in dict.fromkeys((self.protocol.fps, protocol_lib.RECORDED)):
      split = case.clip(protocol_lib.CONDITIONING, fps)
      full = case.clip(protocol_lib.FULL, fps)
      for path, from_end in (
          *((self.root / "split-videos" / name / f"{fps}FPS" / split, True)
            for name in ("conditioning", "conditioning-videos")),
          (self.root / "full-videos" / "take-1" / f"{fps}FPS" / full, False)):
        if path.is_file():
          return Clip(path, fps, round(seconds * fps), self.protocol.conditioning_frames, from_end)
        tried.append(str(path.relative_to(self.root)))
    raise InputError(f"{self.root}: nothing to give a model of {case.generated}; looked for "
                     + ", ".join(tried))


def find(folder: str | os.PathLike[str], protocol: Protocol) -> Dataset:
  """Finds the data set in a folder, or in `physics-IQ-benchmark` below it.

  Raises:
    InputError: it is not there, a view or take of a scenario is missing, there are more or
      fewer scenarios than the protocol says, or numbers are used twice.
  """
  place = pathlib.Path(folder).expanduser()
  if not place.is_dir():
    raise InputError(f"no folder {place}; name the one that holds Physics-IQ's split-videos "
                     "(--data)")
  root = next((place / name for name in _ROOTS if (place / name / "split-videos").is_dir()), None)
  if root is None:
    raise InputError(f"{place} holds no Physics-IQ: there is no split-videos folder in it or in "
                     "physics-IQ-benchmark below it; docs/physics_iq.md says how to download it")
  testing, fps = _testing_folder(root, protocol)
  takes: dict[tuple[str, str], dict[int, int]] = {}
  for path in sorted(testing.glob("*.mp4")):
    name = protocol_lib.parse_clip(path.name)
    if name is None or name.kind != protocol_lib.TESTING or name.fps != fps:
      raise InputError(f"{path} has no name of a testing video of {fps} frames a second: "
                       f"0001_testing-videos_{fps}FPS_perspective-left_take-1_trimmed-NAME.mp4")
    numbers = takes.setdefault((name.scenario, name.view), {})
    if name.take in numbers:
      raise InputError(f"{testing} holds {name.scenario}, {name.view}, take {name.take} twice")
    numbers[name.take] = name.number
  categories = _categories(root)
  _check_takes(testing, takes, protocol, categories)
  cases = sorted(Case(numbers[1], view, scenario, numbers[2])
                 for (scenario, view), numbers in takes.items())
  used = collections.Counter(x for case in cases for x in (case.number, case.second))
  if (twice := sorted(number for number, times in used.items() if times > 1)):
    raise InputError(f"{testing}: the number {twice[0]:04d} begins the names of several videos")
  return Dataset(root, protocol, tuple(cases), categories)


def generated(folder: str | os.PathLike[str], cases: Sequence[Case]) -> dict[Case, pathlib.Path]:
  """The generated videos in a folder by case: the four digits that a name begins with count.

  Raises:
    InputError: one is missing or there twice, has a full name that belongs to another number,
      or something else is in the folder: the official code takes none of these.
  """
  folder = pathlib.Path(folder).expanduser()
  if not folder.is_dir():
    raise InputError(f"no folder {folder} with generated videos")
  entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
  strange = [path.name for path in entries if path.suffix != ".mp4"]
  if strange:
    raise InputError(f"{folder} may hold generated .mp4 files and nothing else; remove "
                     + _some(strange))
  by_number = {case.number: case for case in cases}
  found: dict[Case, pathlib.Path] = {}
  for path in entries:
    number = path.name[:4]
    case = by_number.get(int(number)) if number.isdecimal() and path.name[4:5] == "_" else None
    if case is None:
      raise InputError(f"{path}: names of generated videos begin with one of the numbers "
                       f"{min(by_number):04d}_ to {max(by_number):04d}_, such as "
                       f"{cases[0].generated}")
    if case in found:
      raise InputError(f"{folder} holds {case.number:04d} twice: {found[case].name}, {path.name}")
    if (full := protocol_lib.parse_generated(path.name)) not in (
        None, (case.number, case.view, case.scenario)):
      raise InputError(f"{path} says {full[1]} view of {full[2]}, but {case.number:04d} is "
                       f"{case.generated}")
    found[case] = path
  missing = [case.generated for case in cases if case not in found]
  if missing:
    raise InputError(f"{folder} holds {len(found)} of {len(cases)} generated videos; missing: "
                     + _some(missing))
  return found


def check_generated(videos: Mapping[Case, pathlib.Path], protocol: Protocol) -> tuple[int, int]:
  """Checks the headers of generated videos as the official code does, and what it forgets.

  Returns:
    Height and width of all of them.

  Raises:
    InputError: one is not as long as the protocol says, has another rate or size than the
      others, or sides that are odd; or cannot be read.
  """
  sizes: dict[tuple[int, int], pathlib.Path] = {}
  for path in videos.values():
    seconds, fps, height, width = _header(path)
    if abs(fps - protocol.fps) > _RATE * protocol.fps:
      raise InputError(f"{path} has {fps:g} frames a second, not {protocol.fps}; all generated "
                       f"videos need the same rate, given by --fps")
    if abs(seconds - protocol.prediction_s) > DURATION_S:
      raise InputError(f"{path} lasts {seconds:.3f} s, not {protocol.prediction_s:g} s: it must "
                       "begin right after the switch frame, without the given seconds, and end "
                       f"after {protocol.prediction_frames} frames")
    if height % 2 or width % 2:
      raise InputError(f"{path} is {height}x{width} px: the official code writes wrong masks for "
                       "odd sizes; crop or pad it to even ones")
    sizes.setdefault((height, width), path)
  if len(sizes) > 1:
    raise InputError("generated videos have different sizes: " + "; ".join(
      f"{height}x{width} px, such as {path}" for (height, width), path in sizes.items()))
  return next(iter(sizes))


def check_real(dataset: Dataset, *, conditioning: bool) -> None:
  """Checks the headers of the videos that are read of a data set.

  Args:
    dataset: found by `find`.
    conditioning: whether also what a model is given is needed.

  Raises:
    InputError: one is too short, has another rate than its name says, or the takes of a view
      have different sizes; or cannot be read.
  """
  for case in dataset.cases:
    clips = [dataset.testing(case, take) for take in (1, 2)]
    sizes = [_check_clip(clip) for clip in clips]
    if sizes[0] != sizes[1]:
      raise InputError(f"the takes of a view have different sizes: {clips[0].path} "
                       f"{sizes[0][0]}x{sizes[0][1]} px, {clips[1].path} "
                       f"{sizes[1][0]}x{sizes[1][1]} px")
    if conditioning:
      _check_clip(dataset.conditioning(case))


def _check_clip(clip: Clip) -> tuple[int, int]:
  seconds, fps, height, width = _header(clip.path)
  if abs(fps - clip.fps) > _RATE * clip.fps:
    raise InputError(f"{clip.path} has {fps:g} frames a second, not {clip.fps} as its name says")
  if seconds < clip.frames / clip.fps - 0.5 / clip.fps:
    raise InputError(f"{clip.path} lasts {seconds:.3f} s, {clip.frames / clip.fps:g} s are needed")
  return height, width


def _header(path: pathlib.Path) -> tuple[float, float, int, int]:
  try:
    return video.read_header(path)
  except video.VideoError as error:
    raise InputError(f"{path}: {error}") from error


def _testing_folder(root: pathlib.Path, protocol: Protocol) -> tuple[pathlib.Path, int]:
  tried = [(root / "split-videos" / name / f"{fps}FPS", fps)
           for fps in dict.fromkeys((protocol.fps, protocol_lib.RECORDED))
           for name in ("testing", "testing-videos")]
  for folder, fps in tried:
    if folder.is_dir() and any(folder.glob("*.mp4")):
      return folder, fps
  raise InputError(f"{root}: no testing videos; looked for "
                   + ", ".join(str(folder.relative_to(root)) for folder, _ in tried))


def _check_takes(testing: pathlib.Path, takes: Mapping[tuple[str, str], Mapping[int, int]],
                 protocol: Protocol, categories: Mapping[str, str]) -> None:
  scenarios = sorted({scenario for scenario, _ in takes})
  missing = [f"{scenario}, perspective-{view}, take-{take}" for scenario in scenarios
             for view in protocol_lib.VIEWS for take in (1, 2)
             if take not in takes.get((scenario, view), {})]
  if missing:
    raise InputError(f"{testing} lacks {len(missing)} videos: {_some(missing)}; every scenario "
                     "needs three views and two takes")
  if len(scenarios) != protocol.scenarios:
    gone = sorted(categories.keys() - set(scenarios))
    raise InputError(f"{testing} holds {len(scenarios)} scenarios, not {protocol.scenarios}"
                     + (f"; missing: {_some(gone)}" if gone else "")
                     + f"; download the rest, or give --scenarios={len(scenarios)} for a score of "
                     "these alone, which cannot be compared with others")


def _categories(root: pathlib.Path) -> dict[str, str]:
  """Scenario to category, from descriptions.csv in the data set or beside it."""
  for path in (place / name for place in (root, root.parent) for name in _DESCRIPTIONS):
    if not path.is_file():
      continue
    with path.open(newline="", encoding="utf-8") as file:
      lines = list(csv.DictReader(file))
    if not lines or not {"scenario", "category"} <= lines[0].keys():
      raise InputError(f"{path}: expected the columns scenario and category")
    return {line["scenario"].removesuffix(".mp4").rsplit("_", 1)[-1]: line["category"]
            for line in lines}
  return {}


def _some(names: Sequence[str]) -> str:
  more = len(names) - _SHOWN
  return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
