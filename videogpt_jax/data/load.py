"""From an entry of a list to clips: what a decoder process does with one video.

Decoder processes import this module, so it needs neither jax nor tensorflow_datasets.
"""

from collections.abc import Callable
import dataclasses
import pathlib
from typing import Any, Protocol, TYPE_CHECKING

from jaxtyping import UInt8
import numpy as np

from videogpt_jax.data import fit as fit_lib
from videogpt_jax.data import scenes
from videogpt_jax.data import video
from videogpt_jax.errors import InputError

if TYPE_CHECKING:
  from videogpt_jax.data import world

NO_LABEL = -1


@dataclasses.dataclass(frozen=True)
class Segment:
  """A video file, or a part of one.

  Attributes:
    path: of the file, relative to the list's root, or absolute.
    start: s; None: from the beginning.
    end: s; None: to the end.
    label: class, or `NO_LABEL`.
    caption: may be empty.
    split: "train", "validation", or "" (to be decided by a hash of the name).
  """

  path: str
  start: float | None = None
  end: float | None = None
  label: int = NO_LABEL
  caption: str = ""
  split: str = ""

  @property
  def name(self) -> str:
    """Unique within a listing: the path, with "@start-end" in seconds if a part is meant."""
    return segment_name(self.path, self.start, self.end)


def segment_name(path: str, start: float | None, end: float | None) -> str:
  """See `Segment.name`."""
  if not start and end is None:
    return path
  return f"{path}@{_seconds(start or 0)}-{'' if end is None else _seconds(end)}"


def _seconds(value: float) -> str:
  """All digits of a number, so that no two parts have one name."""
  return repr(float(value)).removesuffix(".0")


@dataclasses.dataclass(frozen=True)
class Clip:
  """One video, or one scene of it, ready for the codec, and what is known about it."""

  frames: UInt8[np.ndarray, "T H W 3"]
  fps: float
  source: str
  label: int = NO_LABEL
  caption: str = ""
  masks: UInt8[np.ndarray, "T O H W"] | None = None


class Loader(Protocol):
  """Makes something of an item of a list; picklable, and called in decoder processes."""

  def __call__(self, item: Any, beat: Callable[[], None]) -> Any:
    """What an item becomes, such as a list of clips; calls `beat` when it has come further.

    Raises:
      InputError: it cannot be used; the message is the reason.
    """


@dataclasses.dataclass(frozen=True)
class Rules:
  """What makes clips of decoded frames, wherever these come from.

  Attributes:
    fit: how frames come to their size.
    fps: frames a second that are taken by their times; 0: all frames.
    stride: every stride-th of these is kept.
    max_frames: clips are cut there; 0: no limit.
    min_frames: shorter clips are refused.
    min_side: px; smaller source frames are refused.
    max_aspect: more elongated source frames are refused.
    scene_cut: see `scenes.cuts`; 0: videos stay whole.
  """

  fit: fit_lib.Fit
  fps: float
  stride: int
  max_frames: int
  min_frames: int
  min_side: int
  max_aspect: float
  scene_cut: float

  @property
  def headers(self) -> Loader:
    """Loads the `Header` of an item instead of its clips."""
    raise NotImplementedError

  @property
  def limit(self) -> int | None:
    """Frames of a video that are needed at most; with scenes all, since the limit is on these."""
    return None if self.scene_cut > 0 else self.max_frames or None

  def shrink(self, frame: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    """A source frame at its size.

    Raises:
      InputError: it is too small or too elongated.
    """
    height, width, _ = frame.shape
    if min(height, width) < self.min_side:
      raise InputError(f"too small: {width}x{height} px, a side under {self.min_side}")
    if max(height, width) > self.max_aspect * min(height, width):
      raise InputError(f"too elongated: {width}x{height} px, over {self.max_aspect:g}:1")
    return self.fit(frame)

  def clips(self, frames: UInt8[np.ndarray, "T h w 3"], fps: float, name: str, label: int,
            caption: str) -> list[Clip]:
    """The video, or its scenes, as clips.

    Args:
      frames: that `shrink` made, every stride-th of the source's.
      fps: of `frames`.
      name, label, caption: of the video; scenes get their number after the name.

    Raises:
      InputError: nothing is long enough.
    """
    cut = self.scene_cut > 0
    whole = scenes.split(frames, self.scene_cut) if cut else [frames]
    parts = [part[:self.max_frames or None] for part in whole if len(part) >= self.min_frames]
    if not parts:
      kind = "scenes of at most " if cut else ""
      raise InputError(f"too short: {kind}{max(map(len, whole))} frames at stride "
                       f"{self.stride}, {self.min_frames} needed")
    title = lambda i: f"{name}#{i}" if len(parts) > 1 else name
    return [Clip(frames=part, fps=fps * self.stride, source=title(i), label=label, caption=caption)
            for i, part in enumerate(parts)]


@dataclasses.dataclass(frozen=True)
class Files(Rules):
  """Loads `Segment`s: decoded, checked, resized, cropped, cut into scenes.

  Attributes:
    root: what relative paths are relative to.
  """

  root: pathlib.Path

  @property
  def headers(self) -> Loader:
    return Headers(self.root)

  def __call__(self, item: Segment, beat: Callable[[], None]) -> list[Clip]:
    path = self.root / item.path
    if not path.exists():
      raise InputError("missing: no such file")
    read = video.read(
      path,
      stride=self.stride,
      max_frames=self.limit,
      transform=self.shrink,
      start=item.start,
      end=item.end,
      fps=self.fps or None,
      threads=1,  # there is a process for every core
      beat=beat,
    )
    return self.clips(read.frames, read.fps, item.name, item.label, item.caption)


@dataclasses.dataclass(frozen=True)
class Header:
  """What a file says of itself: its length, rate and size, px."""

  seconds: float
  fps: float
  height: int
  width: int


@dataclasses.dataclass(frozen=True)
class Headers:
  """Loads the `Header`s of `Segment`s' files; nothing is decoded."""

  root: pathlib.Path

  def __call__(self, item: Segment, beat: Callable[[], None]) -> Header:
    seconds, fps, height, width = video.read_header(self.root / item.path)
    return Header(seconds, fps, height, width)


@dataclasses.dataclass(frozen=True)
class Simulated:
  """Loads seeds of the simulated world, with the per-object masks on demand."""

  settings: "world.Settings"
  masks: bool = False

  def __call__(self, item: int, beat: Callable[[], None]) -> list[Clip]:
    from videogpt_jax.data import world  # needs the extra [demo], as nothing else here does

    sample = world.simulate(self.settings, item)
    beat()
    return [Clip(
      frames=sample.frames,
      fps=self.settings.fps,
      source=f"world/{item}",
      label=sample.label,
      caption=sample.caption,
      masks=sample.masks.astype(np.uint8) if self.masks else None,
    )]
