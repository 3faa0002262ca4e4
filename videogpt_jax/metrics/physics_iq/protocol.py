"""What the benchmark fixes: frame rates, lengths, and the names of files."""

import dataclasses
import re

from videogpt_jax.errors import InputError

VIEWS = ("left", "center", "right")
RATES = (8, 16, 24, 30)  # frames a second for which there are folders
RECORDED = 30  # of these, the one from which others can be made
SCENARIOS = 66
_OFFICIAL_S = 5.0

TESTING, CONDITIONING, FULL, MASKS = ("testing-videos", "conditioning-videos", "full-videos",
                                      "video-masks")
_CLIP = re.compile(r"(\d{4})_([a-z-]+)_(\d+)FPS_perspective-(left|center|right)_take-([12])_"
                   r"([^_]+)\.mp4")
_GENERATED = re.compile(r"(\d{4})_perspective-(left|center|right)_([^_]+)\.mp4")


@dataclasses.dataclass(frozen=True)
class Protocol:
  """How long and how fast the videos are.

  Raises `InputError` for a rate that the benchmark does not know and for parts of a frame.

  Attributes:
    fps: frames a second, of `RATES`.
    conditioning_s: seconds that a model is given.
    prediction_s: seconds that it predicts, and that are compared.
    scenarios: how many the data set has, with three views and two takes each.
  """

  fps: int = 8
  conditioning_s: float = 3.0
  prediction_s: float = 5.0
  scenarios: int = SCENARIOS

  def __post_init__(self) -> None:
    if self.fps not in RATES:
      raise InputError(f"Physics-IQ has videos of {', '.join(map(str, RATES))} frames a second, "
                       f"not of {self.fps}; choose one of these (--fps)")
    for name in ("conditioning_s", "prediction_s"):
      frames = getattr(self, name) * self.fps
      if frames < 1 or abs(frames - round(frames)) > 1e-6:
        raise InputError(f"{name} of {getattr(self, name)} at {self.fps} frames a second are "
                         f"{frames:g} frames; it must be one or more whole ones")
    if self.scenarios < 1:
      raise InputError(f"scenarios must be positive, got {self.scenarios}")

  @property
  def is_official(self) -> bool:
    """Whether scores compare with published ones; what a model is given, is its own affair."""
    return self.scenarios == SCENARIOS and self.prediction_s == _OFFICIAL_S

  @property
  def conditioning_frames(self) -> int:
    """Frames that a model is given."""
    return round(self.conditioning_s * self.fps)

  @property
  def prediction_frames(self) -> int:
    """Frames that it predicts."""
    return round(self.prediction_s * self.fps)


@dataclasses.dataclass(frozen=True, order=True)
class Case:
  """One view of one scenario: what a model predicts one video of.

  Attributes:
    number: of its first take, from 1; generated videos begin with it.
    view: of `VIEWS`.
    scenario: name, `trimmed-...`.
    second: number of its second take.
  """

  number: int
  view: str
  scenario: str
  second: int

  @property
  def generated(self) -> str:
    """The name of its generated video."""
    return f"{self.number:04d}_perspective-{self.view}_{self.scenario}.mp4"

  def clip(self, kind: str, fps: int, take: int = 1) -> str:
    """The name of a video of the data set.

    Args:
      kind: `TESTING`, `CONDITIONING`, `FULL` or `MASKS`.
      fps: its frames a second.
      take: 1 or 2.
    """
    number = self.number if take == 1 else self.second
    return (f"{number:04d}_{kind}_{fps}FPS_perspective-{self.view}_take-{take}_"
            f"{self.scenario}.mp4")


@dataclasses.dataclass(frozen=True)
class ClipName:
  """What the name of a video of the data set says; see `Case.clip`."""

  number: int
  kind: str
  fps: int
  view: str
  take: int
  scenario: str


def parse_clip(name: str) -> ClipName | None:
  """Reads the name of a video of the data set; None: it is none."""
  if (match := _CLIP.fullmatch(name)) is None:
    return None
  number, kind, fps, view, take, scenario = match.groups()
  return ClipName(int(number), kind, int(fps), view, int(take), scenario)


def parse_generated(name: str) -> tuple[int, str, str] | None:
  """Number, view and scenario of a generated video with a full name; None: it has another."""
  match = _GENERATED.fullmatch(name)
  return (int(match[1]), match[2], match[3]) if match else None
