"""Where `encode` takes its clips from: a folder of video files, or the simulated world."""

from collections.abc import Mapping, Sequence
import dataclasses
import hashlib
import os
from pathlib import Path
from typing import Any, Protocol, TYPE_CHECKING

from jaxtyping import UInt8
from ml_collections import ConfigDict
import numpy as np

from videogpt_jax.data import pipeline
from videogpt_jax.data import store
from videogpt_jax.data import video
from videogpt_jax.errors import InputError

if TYPE_CHECKING:
  from videogpt_jax.data import world

SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Clip:
  """One video, ready for the codec, and what is known about it."""

  frames: UInt8[np.ndarray, "T H W 3"]
  fps: float
  source: str
  label: int = store.NO_LABEL
  caption: str = ""
  masks: UInt8[np.ndarray, "T O H W"] | None = None


class Videos(Protocol):
  """Where clips come from; picklable, since worker processes load the clips."""

  @property
  def size(self) -> tuple[int, int]:
    """(height, width) of every clip, px."""

  def count(self, split: str) -> int:
    """Number of videos of a split."""

  def name(self, split: str, index: int) -> str:
    """A name for lists and records."""

  def load(self, split: str, index: int) -> Clip:
    """The video; raises `InputError` with the reason if it cannot be used."""

  def describe(self) -> dict[str, Any]:
    """A JSON-able identity: equal only if every `load` gives the same."""


@dataclasses.dataclass(frozen=True)
class WorldVideos:
  """Videos of the simulated world: `train` and `validation` many, of disjoint seeds."""

  settings: "world.Settings"
  counts: Mapping[str, int]
  masks: bool = False

  @property
  def size(self) -> tuple[int, int]:
    return self.settings.size, self.settings.size

  def count(self, split: str) -> int:
    return self.counts[split]

  def name(self, split: str, index: int) -> str:
    return f"world/{self._seed(split, index)}"

  def load(self, split: str, index: int) -> Clip:
    from videogpt_jax.data import world  # needs the extra [demo], as nothing else here does

    sample = world.simulate(self.settings, self._seed(split, index))
    return Clip(
      frames=sample.frames,
      fps=self.settings.fps,
      source=self.name(split, index),
      label=sample.label,
      caption=sample.caption,
      masks=sample.masks.astype(np.uint8) if self.masks else None,
    )

  def describe(self) -> dict[str, Any]:
    return {"source": "world", **dataclasses.asdict(self)}

  def _seed(self, split: str, index: int) -> int:
    from videogpt_jax.data import world

    seed = world.train_seed if split == "train" else world.held_out_seed
    return seed(index)


@dataclasses.dataclass(frozen=True)
class VideoFiles:
  """Video files below a folder, resized and cropped.

  Attributes:
    folder: where they are.
    names: of each split, relative to the folder.
    digest: hash of the names and sizes of all files.
    height, width: px of a clip.
    stride: every stride-th frame is kept.
    max_frames: longer clips are cut there; 0: no limit.
    min_frames: shorter clips are refused.
    min_side: px; smaller source frames are refused.
    max_aspect: more elongated source frames are refused.
  """

  folder: Path
  names: Mapping[str, Sequence[str]]
  digest: str
  height: int
  width: int
  stride: int
  max_frames: int
  min_frames: int
  min_side: int
  max_aspect: float

  @property
  def size(self) -> tuple[int, int]:
    return self.height, self.width

  def count(self, split: str) -> int:
    return len(self.names[split])

  def name(self, split: str, index: int) -> str:
    return self.names[split][index]

  def load(self, split: str, index: int) -> Clip:
    name = self.name(split, index)
    clip = video.read(
      self.folder / name,
      stride=self.stride,
      max_frames=self.max_frames or None,
      transform=self._shrink,
    )
    if len(clip.frames) < self.min_frames:
      raise InputError(
        f"too short: {len(clip.frames)} frames at stride {self.stride}, {self.min_frames} needed"
      )
    return Clip(frames=clip.frames, fps=clip.fps * self.stride, source=name)

  def _shrink(self, frame: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "h w 3"]:
    height, width, _ = frame.shape
    if min(height, width) < self.min_side:
      raise InputError(f"too small: {width}x{height} px, a side under {self.min_side}")
    if max(height, width) > self.max_aspect * min(height, width):
      raise InputError(f"too elongated: {width}x{height} px, over {self.max_aspect:g}:1")
    return video.resize_and_crop(frame[None], self.height, self.width)[0]

  def describe(self) -> dict[str, Any]:
    fields = dataclasses.asdict(self)
    del fields["names"], fields["folder"]  # the digest names them, wherever they lie
    counts = {split: len(names) for split, names in self.names.items()}
    return {"source": "videos", "videos": counts, **fields}


def find(config: ConfigDict, masks: bool = False) -> Videos:
  """What `config.data` says the clips are made of; `masks`: the world's per-object masks too.

  Raises:
    InputError: unknown source, no videos, or settings under which none can be used.
  """
  data = config.data
  pipeline.check_interval(data.stride, data.frames, tuple(data.interval))
  min_frames = (data.frames - 1) * -(-data.interval[0] // data.stride) + 1
  if data.source == "world":
    return _world_videos(config, min_frames, masks)
  if data.source != "videos":
    raise InputError(f'data.source must be "videos" or "world", got {data.source!r}')
  if masks:
    raise InputError('video files have no object masks; those are for data.source="world"')
  if not data.videos:
    raise InputError("no folder of videos: give --videos=DIR (or set data.videos)")
  if 0 < data.max_frames < min_frames:
    raise InputError(
      f"data.max_frames={data.max_frames} cuts every video too short: {data.frames} frames at "
      f"interval {data.interval[0]} need {min_frames} stored frames"
    )
  folder = Path(data.videos).expanduser()
  names, digest = _split_files(folder, data.validation_fraction)
  return VideoFiles(
    folder=folder,
    names=names,
    digest=digest,
    height=data.height,
    width=data.width,
    stride=data.stride,
    max_frames=data.max_frames,
    min_frames=min_frames,
    min_side=data.min_side,
    max_aspect=data.max_aspect,
  )


def _world_videos(config: ConfigDict, min_frames: int, masks: bool) -> WorldVideos:
  try:
    from videogpt_jax.data import world
  except ModuleNotFoundError as error:
    raise InputError(
      f"the simulated world needs {error.name}: pip install 'videogpt_jax[demo]'"
    ) from error
  data = config.data
  if data.stride != 1:
    raise InputError(f"data.stride must be 1 for the simulated world, got {data.stride}")
  if data.train_videos < 1:
    raise InputError("data.train_videos must be at least 1 for the simulated world")
  settings = world.Settings(**config.world.to_dict())
  if settings.frames < min_frames:
    raise InputError(
      f"every video of the world has {settings.frames} frames, but {data.frames} frames at "
      f"interval {data.interval[0]} need {min_frames}; raise world.frames or lower data.frames"
    )
  counts = {"train": data.train_videos, "validation": data.validation_videos}
  return WorldVideos(settings, counts, masks)


def _split_files(folder: Path, fraction: float) -> tuple[dict[str, list[str]], str]:
  """Files of each split, by a hash of the name: adding files moves no other."""
  digest = hashlib.sha256()
  ranks = {}
  for path in sorted(video.find_videos(folder)):
    name = Path(path).relative_to(folder).as_posix()
    digest.update(f"{name}\n{os.path.getsize(path)}\n".encode())
    ranks[name] = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
  held_out = {name for name, rank in ranks.items() if rank < fraction}
  by_rank = sorted(ranks, key=ranks.__getitem__)
  held_out.discard(by_rank[-1])  # there must be training videos
  if fraction > 0 and not held_out:
    held_out = set(by_rank[:-1][:1])  # and held-out ones, if that can be helped
  names = {
    "train": [name for name in ranks if name not in held_out],
    "validation": [name for name in ranks if name in held_out],
  }
  return names, digest.hexdigest()[:16]
