"""What a prediction starts from: a video file, a picture, a folder of them, or the world."""

from collections.abc import Mapping
import dataclasses
import os
import pathlib
from typing import Any

from jaxtyping import UInt8
import numpy as np

from videogpt_jax.data import fit as fit_lib
from videogpt_jax.data import video
from videogpt_jax.errors import InputError

_PICTURE_FPS = 8.0  # of videos that begin with a picture


@dataclasses.dataclass(frozen=True)
class Given:
  """The first frames of a video, and those after them where they are known.

  Attributes:
    name: of the video, as a file may be called.
    frames: at the model's resolution; `history` given ones, then the truth (any length).
    history: how many of them are given.
    fps: frames a second.
    notes: what was done to it, to be told to the user.
  """

  name: str
  frames: UInt8[np.ndarray, "T H W 3"]
  history: int
  fps: float
  notes: tuple[str, ...] = ()


def find(path: str) -> list[pathlib.Path]:
  """The file at `path`, or all video and picture files below a folder, sorted.

  Raises:
    InputError: nothing is there.
  """
  place = pathlib.Path(path).expanduser()
  if not place.is_dir():
    if not place.exists():
      raise InputError(f"{place}: no such file or folder")
    return [place]
  known = video.SUFFIXES | video.PICTURES
  found = sorted(p for p in place.rglob("*") if p.suffix.lower() in known and p.is_file())
  if not found:
    raise InputError(f"no videos or pictures in {place} (looked for {', '.join(sorted(known))})")
  return found


def read(path: pathlib.Path, *, fit: fit_lib.Fit, history: int | None, default_history: int,
         following: int, interval: int) -> Given:
  """Reads a file.

  Args:
    path: a video, or a picture, which is a history of one frame.
    fit: brings frames to a size of the model.
    history: frames given; None: `default_history`, or the one of a picture.
    default_history: see there.
    following: frames of truth that are wanted after them.
    interval: every how many frames of a video one is taken.

  Raises:
    InputError: the file cannot be read, or is shorter than the history.
  """
  seen: list[tuple[int, ...]] = []

  def fitted(frame: np.ndarray) -> np.ndarray:  # one at a time: a video of large frames is large
    seen.append(frame.shape)
    return fit(frame)

  is_picture = path.suffix.lower() in video.PICTURES
  wanted = history or (1 if is_picture else default_history)
  taken = f" at an interval of {interval}" if interval > 1 and not is_picture else ""
  try:
    if is_picture:
      clip = video.Video(np.stack([fitted(x) for x in video.read_picture(path)]), _PICTURE_FPS)
    else:
      clip = video.read(path, stride=interval, max_frames=wanted + following, transform=fitted)
  except video.VideoError as error:
    raise InputError(f"{path}: {error}") from error
  if len(clip.frames) < wanted:
    raise InputError(f"{path} has {len(clip.frames)} frames{taken}, --history needs {wanted}")
  notes = []
  size = clip.frames.shape[1:3]
  if seen[0][:2] != size:
    notes.append(f"{path}: {seen[0][1]}x{seen[0][0]} px resized and cropped to "
                 f"{size[1]}x{size[0]} as in training")
  if is_picture and history is None and default_history > 1:
    notes.append(f"{path}: a picture is a history of one frame, which shows no motion; the "
                 f"model's own history is {default_history}")
  return Given(path.stem, clip.frames, wanted, clip.fps, tuple(notes))


def of_world(config: Mapping[str, Any], index: int, history: int) -> Given:
  """A held-out video of the world that a model was trained on.

  Args:
    config: of the run that trained it.
    index: which.
    history: frames given.

  Raises:
    InputError: the model knows no simulated world, its videos are shorter than the history,
      or pymunk is missing.
  """
  try:
    from videogpt_jax.data import world
  except ImportError as error:
    raise InputError(f"--video is missing, and the simulated world needs {error.name}: "
                     "pip install 'videogpt_jax[demo]'") from error
  if config["data"].get("source", "world") != "world":
    raise InputError("--video is missing (the model was not trained on the simulated world)")
  settings = world.Settings(**config["world"])
  frames = world.simulate(settings, world.held_out_seed(index)).frames
  if len(frames) < history:
    raise InputError(f"--history={history} is longer than the world's {len(frames)} frames")
  return Given(f"held_out_{index}", frames, history, settings.fps)


def shortest_interval(data: Mapping[str, Any]) -> int:
  """The shortest interval between frames in training, in source frames, of a section `data`."""
  (lo, _), stride = data.get("interval", (1, 1)), data.get("stride", 1)
  return -(-lo // stride) * stride


def folders(out: str | os.PathLike[str], found: list[pathlib.Path]) -> list[pathlib.Path]:
  """A folder for the results of each file: `out` itself for one, else one of its name below it."""
  base = pathlib.Path(out)
  if len(found) == 1:
    return [base]
  names: list[str] = []
  for path in found:
    name = path.stem
    if name in names:  # the same name in two folders, or as video and picture
      name = f"{path.stem}_{len(names)}"
    names.append(name)
  return [base / name for name in names]
