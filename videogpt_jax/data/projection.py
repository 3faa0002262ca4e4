"""How large a data set will be, from a look at some of the videos."""

import dataclasses

import av
import numpy as np

from videogpt_jax import codec as codec_lib
from videogpt_jax.data import clips
from videogpt_jax.data import fit as fit_lib
from videogpt_jax.data import load

_SAMPLE = 32  # videos that are opened


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
  loader = videos.loader
  channels = codec.channels * (2 if codec.moments else 1)
  if isinstance(loader, load.Simulated):
    frames = total * loader.settings.frames
    area = (loader.settings.size // codec.downsample) ** 2
    return Projection(frames, frames * area * channels * codec.dtype.itemsize)
  assert isinstance(loader, load.Files)
  known = [found for split in clips.SPLITS for number in _spread(videos.count(split))
           if (found := _header(loader, videos.item(split, number)))]
  if not known:
    return Projection(0, 0)
  cells = lambda height, width: fit_area(loader.fit, height, width) // codec.downsample**2
  per_video = np.mean([frames for frames, _, _ in known])
  per_frame = np.mean([cells(height, width) for _, height, width in known])
  frames = round(total * float(per_video))
  return Projection(frames, round(frames * float(per_frame) * channels * codec.dtype.itemsize))


def fit_area(fit: fit_lib.Fit, height: int, width: int) -> int:
  """px of a frame at its size."""
  height, width = fit.size(height, width)
  return height * width


def _spread(count: int) -> list[int]:
  """Some numbers below `count`, evenly."""
  return np.unique(np.linspace(0, count - 1, min(count, _SAMPLE)).astype(int)).tolist()


def _header(loader: load.Files, segment: load.Segment) -> tuple[float, int, int] | None:
  """Stored frames, height and width of a video as its header says, or None."""
  try:
    with av.open(str(loader.root / segment.path)) as container:
      stream = container.streams.video[0]
      rate = float(stream.average_rate or stream.guessed_rate or 25)
      seconds = container.duration / av.time_base if container.duration else stream.frames / rate
      height, width = stream.height, stream.width
  except (OSError, ValueError, IndexError):  # will be rejected with its reason
    return None
  if not (height and width):
    return None
  begin = segment.start or 0.0
  seconds = min(seconds, segment.end if segment.end is not None else seconds) - begin
  frames = max(0.0, seconds) * (loader.fps or rate) / loader.stride
  limit = float("inf") if loader.scene_cut else loader.max_frames or float("inf")
  return min(frames, limit), height, width


def size(count: float) -> str:
  """Bytes in the largest unit that leaves at least one before the point."""
  for unit in ("B", "KiB", "MiB", "GiB"):
    if count < 1024:
      return f"{count:.1f} {unit}"
    count /= 1024
  return f"{count:.1f} TiB"
