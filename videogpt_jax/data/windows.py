"""One window of frames of every video: what an evaluation on many videos reads.

Decoder processes import this module, so it needs no jax.
"""

from collections.abc import Callable
import dataclasses
import hashlib
import pathlib
from typing import TYPE_CHECKING

from jaxtyping import UInt8
import numpy as np

from videogpt_jax.data import fit as fit_lib
from videogpt_jax.data import video
from videogpt_jax.data.load import Segment
from videogpt_jax.errors import InputError

if TYPE_CHECKING:
  from videogpt_jax.data import world

_PIXEL = 0.5  # px of a source that may be missing at a border
_LONGEST = 3_000  # frames among which a window is drawn; more of a video are not looked at


@dataclasses.dataclass(frozen=True)
class Window:
  """Some frames of a video.

  Attributes:
    frames: of the window.
    fps: frames a second.
    given: its first frames at the size that a model wants; None: they are among `frames`.
    squeezed: height and width of the video, px, if those given are whole frames that were brought
      to the model's proportions; None: they were cropped.
  """

  frames: UInt8[np.ndarray, "T H W 3"]
  fps: float
  given: UInt8[np.ndarray, "h Hm Wm 3"] | None = None
  squeezed: fit_lib.Size | None = None


@dataclasses.dataclass(frozen=True)
class Files:
  """Loads a window of `Segment`s.

  Attributes:
    root: what relative paths are relative to.
    frames: of the window.
    interval: every how many frames one is taken.
    fit: brings frames to their size; None: as they are.
    drawn: whether the window begins anywhere, drawn by the segment's name; else it is the first.
    model_fit: brings the first frames to a model's size, of the file's own frames; None: a model
      is given those of the window.
    history: how many of them.
  """

  root: pathlib.Path
  frames: int
  interval: int = 1
  fit: fit_lib.Fit | None = None
  drawn: bool = False
  model_fit: fit_lib.Fit | None = None
  history: int = 0

  def __call__(self, item: Segment, beat: Callable[[], None]) -> Window:
    path = self.root / item.path
    if not path.exists():
      raise InputError("missing: no such file")
    span = self.frames * self.interval
    given: list[np.ndarray] = []  # of every frame where it is not known yet which will be
    squeezed: list[fit_lib.Size] = []

    def fitted(frame: np.ndarray) -> np.ndarray:
      if self.model_fit is not None and (self.drawn or len(given) < self.history):
        size = self.model_fit.size(*frame.shape[:2])
        if self._shows_less(frame.shape[:2], size):
          squeezed.append(frame.shape[:2])
          given.append(video.stretch(frame, *size))
        else:
          given.append(self.model_fit(frame))
      return frame if self.fit is None else self.fit(frame)

    # Frames between those of the window are kept too, if it may begin at any of them.
    read = video.read(path, stride=1 if self.drawn else self.interval, transform=fitted,
                      max_frames=max(_LONGEST, span) if self.drawn else self.frames,
                      start=item.start, end=item.end, threads=1, beat=beat)
    frames, start = read.frames, 0
    if self.drawn:
      starts = len(frames) - (self.frames - 1) * self.interval
      start = _drawn(item.name, starts) if starts > 0 else 0
      frames = frames[start::self.interval][:self.frames]
    if len(frames) < self.frames:
      every = f" at an interval of {self.interval}" if self.interval > 1 else ""
      raise InputError(f"too short: {len(frames)} frames{every}, the window has {self.frames}")
    fps = read.fps / (self.interval if self.drawn else 1)
    if self.model_fit is None:
      return Window(frames, fps)
    first = given[start::self.interval if self.drawn else 1][:self.history]
    return Window(frames, fps, np.stack(first), squeezed[0] if squeezed else None)

  def _shows_less(self, source: tuple[int, ...], size: fit_lib.Size) -> bool:
    """Whether cropping to a model's size would lose some of what the window keeps."""
    if self.fit is None:
      return False
    kept, wanted = (_kept(source, x) for x in (size, self.fit.size(*source)))
    return any(a < b - _PIXEL for a, b in zip(kept, wanted, strict=True))


@dataclasses.dataclass(frozen=True)
class Worlds:
  """Loads the first frames of simulated worlds, by their seeds."""

  settings: "world.Settings"
  frames: int

  def __call__(self, item: int, beat: Callable[[], None]) -> Window:
    from videogpt_jax.data import world  # needs the extra [demo], as nothing else here does

    return Window(world.simulate(self.settings, item).frames[:self.frames], self.settings.fps)


def _kept(source: tuple[int, ...], size: fit_lib.Size) -> tuple[float, float]:
  """Height and width, px, that `video.resize_and_crop` keeps of a frame."""
  factor = max(size[0] / source[0], size[1] / source[1])
  return size[0] / factor, size[1] / factor


def _drawn(name: str, starts: int) -> int:
  """One of `starts`; the same for a name on every machine and in every order of videos."""
  digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
  return int(np.random.default_rng(int.from_bytes(digest[:8], "big")).integers(starts))
