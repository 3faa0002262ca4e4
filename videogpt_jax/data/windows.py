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

_LONGEST = 3_000  # frames among which a window is drawn; more of a video are not looked at


@dataclasses.dataclass(frozen=True)
class Window:
  """Some frames of a video, and their rate."""

  frames: UInt8[np.ndarray, "T H W 3"]
  fps: float


@dataclasses.dataclass(frozen=True)
class Files:
  """Loads a window of `Segment`s.

  Attributes:
    root: what relative paths are relative to.
    frames: of the window.
    interval: every how many frames one is taken.
    fit: brings frames to their size; None: as they are.
    drawn: whether the window begins anywhere, drawn by the segment's name; else it is the first.
  """

  root: pathlib.Path
  frames: int
  interval: int = 1
  fit: fit_lib.Fit | None = None
  drawn: bool = False

  def __call__(self, item: Segment, beat: Callable[[], None]) -> Window:
    path = self.root / item.path
    if not path.exists():
      raise InputError("missing: no such file")
    span = self.frames * self.interval
    # Frames between those of the window are kept too, if it may begin at any of them.
    read = video.read(path, stride=1 if self.drawn else self.interval, transform=self.fit,
                      max_frames=max(_LONGEST, span) if self.drawn else self.frames,
                      start=item.start, end=item.end, threads=1, beat=beat)
    frames = read.frames
    if self.drawn:
      starts = len(frames) - (self.frames - 1) * self.interval
      start = _drawn(item.name, starts) if starts > 0 else 0
      frames = frames[start::self.interval][:self.frames]
    if len(frames) < self.frames:
      every = f" at an interval of {self.interval}" if self.interval > 1 else ""
      raise InputError(f"too short: {len(frames)} frames{every}, the window has {self.frames}")
    return Window(frames, read.fps / (self.interval if self.drawn else 1))


@dataclasses.dataclass(frozen=True)
class Worlds:
  """Loads the first frames of simulated worlds, by their seeds."""

  settings: "world.Settings"
  frames: int

  def __call__(self, item: int, beat: Callable[[], None]) -> Window:
    from videogpt_jax.data import world  # needs the extra [demo], as nothing else here does

    return Window(world.simulate(self.settings, item).frames[:self.frames], self.settings.fps)


def _drawn(name: str, starts: int) -> int:
  """One of `starts`; the same for a name on every machine and in every order of videos."""
  digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
  return int(np.random.default_rng(int.from_bytes(digest[:8], "big")).integers(starts))
