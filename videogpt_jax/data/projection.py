"""How large a data set will be, from a look at some of the videos."""

import dataclasses
from typing import Any

import numpy as np

from videogpt_jax import codec as codec_lib
from videogpt_jax.data import clips
from videogpt_jax.data import decoders
from videogpt_jax.data import load

_SAMPLE = 32  # videos of a split that are opened
_TIMEOUT_S = 5.0  # for one of them


@dataclasses.dataclass(frozen=True)
class Projection:
  """Expectations, before compression (which hardly shrinks latents) and rejections.

  Attributes:
    frames: stored ones.
    num_bytes: of their latents.
  """

  frames: int
  num_bytes: int

  def describe(self) -> str:
    """For people."""
    return f"{self.frames} frames, {size(self.num_bytes)}"


def project(videos: clips.Videos, codec: codec_lib.Codec) -> Projection:
  """What all splits will hold, by the headers of videos spread over the list."""
  total = sum(videos.count(split) for split in clips.SPLITS)
  per_cell = codec_lib.stored_channels(codec) * codec.dtype.itemsize
  loader = videos.loader
  if isinstance(loader, load.Simulated):
    frames = total * loader.settings.frames
    return Projection(frames, frames * (loader.settings.size // codec.downsample) ** 2 * per_cell)
  assert isinstance(loader, load.Rules)
  found = [_stored(loader, item, header) for item, header in _headers(videos, loader)]
  if not found:
    return Projection(0, 0)
  frames = round(total * float(np.mean([frames for frames, _ in found])))
  area = float(np.mean([area for _, area in found])) / codec.downsample**2
  return Projection(frames, round(frames * area * per_cell))


def _headers(videos: clips.Videos, loader: load.Rules) -> list[tuple[Any, load.Header]]:
  """Some items whose headers can be read; not in this process, which might hang."""
  items = [videos.item(split, number) for split in clips.SPLITS
           for number in _spread(videos.count(split))]
  pool = decoders.Decoders[int](loader.headers, 1, _TIMEOUT_S, tries=1)
  with pool:
    read = list(pool.load(enumerate(items)))
  return [(items[i], header) for i, header in read if isinstance(header, load.Header)]


def _stored(loader: load.Rules, item: Any, header: load.Header) -> tuple[float, int]:
  """Stored frames of an item, and their area, px."""
  start, end = 0.0, header.seconds
  if isinstance(item, load.Segment):
    start = item.start or 0.0
    end = end if item.end is None else min(end, item.end)
  frames = max(0.0, end - start) * (loader.fps or header.fps) / loader.stride
  limit = float("inf") if loader.scene_cut else loader.max_frames or float("inf")
  height, width = loader.fit.size(header.height, header.width)
  return min(frames, limit), height * width


def _spread(count: int) -> list[int]:
  """Some numbers below `count`, evenly."""
  return np.unique(np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int)).tolist()


def size(count: float) -> str:
  """Bytes in the largest unit that leaves at least one before the point."""
  for unit in ("B", "KiB", "MiB", "GiB"):
    if count < 1024:
      return f"{count:.1f} {unit}"
    count /= 1024
  return f"{count:.1f} TiB"
