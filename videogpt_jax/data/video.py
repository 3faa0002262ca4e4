"""Video files and pictures of videos: read, write, resize, put side by side.

Frames are uint8 [T, H, W, 3]; files are decoded and encoded by PyAV, pictures by Pillow.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import fractions
import io
import os
import pathlib
from typing import BinaryIO

import av
from jaxtyping import UInt8
import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont
from PIL import ImageOps

from videogpt_jax import errors
from videogpt_jax import files
from videogpt_jax.errors import InputError

SUFFIXES = frozenset((
  ".3gp", ".asf", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg",
  ".mpg", ".mts", ".ogv", ".ts", ".webm", ".wmv",
))
PICTURES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"))
_DEFAULT_FPS = 25.0  # of a stream that states none
_INSTANT = 1e-6  # s, by which rounded times may differ
_ALIKE = 0.05  # relative difference of rates that are rounded times or a dropped frame
_SHORT_S = 0.25  # s that may be missing at the end of a file
_CRF = "12"  # x264: hard to tell from the original
_PAPER, _INK, _GIVEN, _PREDICTED = (255, 255, 255), (60, 60, 60), (255, 255, 255), (230, 120, 30)
_BORDER, _GAP, _TITLE = 2, 8, 16  # px


class VideoError(InputError):
  """A video file that cannot be used; the message is the reason, without the path."""


@dataclasses.dataclass(frozen=True)
class Video:
  """Decoded frames and their rate, per second."""

  frames: UInt8[np.ndarray, "T H W 3"]
  fps: float


def find_videos(folder: str | os.PathLike[str]) -> list[pathlib.Path]:
  """All files under `folder` whose suffix is that of a video container, sorted.

  Links to folders are followed, each folder once, so that loops of links do no harm.

  Raises:
    InputError: the folder is missing, or there are none.
  """
  folder = pathlib.Path(folder).expanduser()
  if not folder.is_dir():
    raise InputError(f"no folder {folder}; name one with video files")
  paths = sorted(p for p in _files(folder) if p.suffix.lower() in SUFFIXES and p.is_file())
  if not paths:
    raise InputError(f"no video files in {folder} (looked for {', '.join(sorted(SUFFIXES))})")
  return paths


def _files(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  seen = set()
  for place, folders, names in os.walk(folder, followlinks=True):
    identity = os.path.realpath(place)
    folders.sort()  # of two ways to a folder the same one is taken everywhere
    if identity in seen:
      folders.clear()
      continue
    seen.add(identity)
    yield from (pathlib.Path(place, name) for name in names)


def read(
    path: str | os.PathLike[str],
    *,
    stride: int = 1,
    max_frames: int | None = None,
    transform: Callable[[UInt8[np.ndarray, "H W 3"]], UInt8[np.ndarray, "h w 3"]] | None = None,
    start: float | None = None,
    end: float | None = None,
    fps: float | None = None,
    threads: int = 0,
    beat: Callable[[], None] = lambda: None,
) -> Video:
  """Decodes the first video stream of a file, turned upright; cover pictures are none.

  Args:
    path: any container PyAV opens.
    stride: every stride-th frame is kept.
    max_frames: stop after so many kept frames.
    transform: applied to every kept frame as it is decoded, so that a long video of large
      frames never lies in memory whole; may refuse it by an `InputError`.
    start, end: s from the beginning of the video, of the part that is wanted; None: its
      beginning, its end.
    fps: frames a second, before `stride`: at every time the frame that is shown then, however
      unevenly the file's frames come. None: the file's frames, as they come.
    threads: of the decoder; 0: as many as help.
    beat: called after every decoded frame.

  Returns:
    The kept frames and their rate: the file's (or `fps`) over `stride`.

  Raises:
    VideoError: not a video, damaged, cut short (as its index or its header shows), no video
      stream, no frames in that part.
  """
  frames: list[np.ndarray] = []
  times: list[float] = []
  shape = None
  try:
    with av.open(os.fspath(path)) as container:
      stream = _video_stream(container)
      stream.thread_type = "SLICE"  # threads by frame would lose some of the marks of damage
      stream.codec_context.thread_count = threads
      rate = stream.average_rate or stream.guessed_rate or fractions.Fraction(_DEFAULT_FPS)
      _check_index(stream, container.size)
      shown = _shown(container, stream, start, end, float(rate), fps, beat)
      for number, (time, frame) in enumerate(shown):
        times.append(time)
        if number % stride:
          continue
        if max_frames is not None and len(frames) == max_frames:
          break
        pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
        if shape is not None and pixels.shape != shape:
          raise VideoError("frames change their size")
        shape = pixels.shape
        frames.append(pixels if transform is None else transform(pixels))
  except (av.FFmpegError, OSError) as error:
    reason = error.strerror or str(error)
    if frames:
      raise VideoError(f"damaged: {reason} after {len(frames)} frames") from error
    raise VideoError(f"not a video that can be read: {reason}") from error
  if not frames:
    raise VideoError("no frames" + (f" after {start:g} s" if start else ""))
  return Video(np.stack(frames), (fps or _rate(float(rate), times)) / stride)


def _rate(stated: float, times: list[float]) -> float:
  """Frames a second: as stated, unless the frames' times (s) say something else."""
  if len(times) < 2 or not times[-1] > times[0]:
    return stated
  measured = (len(times) - 1) / (times[-1] - times[0])
  return stated if abs(measured - stated) <= _ALIKE * stated else measured


def _video_stream(container: av.container.InputContainer) -> av.VideoStream:
  """The first stream that moves."""
  for stream in container.streams.video:
    if not stream.disposition & av.stream.Disposition.attached_pic:
      return stream
  raise VideoError("no video stream")


def _shown(container: av.container.InputContainer, stream: av.VideoStream, start: float | None,
           end: float | None, rate: float, fps: float | None, beat: Callable[[], None]
           ) -> Iterator[tuple[float, av.VideoFrame]]:
  """Frames from `start` to `end` and their times, s: all, or what is shown at ticks of `fps`."""
  timed = _decoded(container, stream, start, end, rate, beat)
  if fps is None:
    yield from timed
    return
  held, shown_until, tick, first = None, 0.0, 0, None
  for time, frame in timed:
    first = time if first is None else first
    while held is not None and first + tick / fps < time - _INSTANT:
      yield first + tick / fps, held
      tick += 1
    held, shown_until = frame, time + 1 / rate
  while held is not None and first is not None and first + tick / fps < shown_until - _INSTANT:
    yield first + tick / fps, held
    tick += 1


def _decoded(container: av.container.InputContainer, stream: av.VideoStream,
             start: float | None, end: float | None, rate: float, beat: Callable[[], None]
             ) -> Iterator[tuple[float, av.VideoFrame]]:
  """Frames and their times, s from the video's beginning, less than half a frame before `start`.

  Raises:
    VideoError: a frame is damaged, or the file ends before it should.
  """
  base, origin = stream.time_base or fractions.Fraction(1, av.time_base), stream.start_time or 0
  if start:
    container.seek(origin + int(start / base), stream=stream)  # to the last key frame before
  decoded, reached = 0, 0.0  # the latter: s of any stream
  for packet in container.demux():
    if packet.pts is not None and packet.time_base is not None:
      reached = max(reached, float((packet.pts + (packet.duration or 0)) * packet.time_base))
    if packet.stream is not stream:
      continue
    for frame in stream.decode(packet):
      decoded += 1
      beat()
      pts = frame.pts
      time = (decoded - 1) / rate if pts is None else float((pts - origin) * base)
      if start and time < start - 0.5 / rate:
        continue  # the way from a key frame to the start; what it lacks there does no harm
      if end is not None and time >= end - 0.5 / rate:
        return
      if frame.is_corrupt:
        raise VideoError(f"damaged: frame {decoded}")
      yield time, frame
  # The stream ended: was all there that the header announced?
  # An edit list (of a trimmed mp4 or mov) rightly hides some of the announced frames.
  if not start and decoded < stream.frames and "mov" not in container.format.name:
    raise VideoError(f"cut short: {decoded} of {stream.frames} frames can be decoded")
  # Matroska counts no frames, but says how long it is.
  if "matroska" in container.format.name and container.duration:
    announced = container.duration / av.time_base
    if reached < announced - max(_SHORT_S, 2 / rate):
      raise VideoError(f"cut short: ends after {reached:.1f} of {announced:.1f} s")


def read_header(path: str | os.PathLike[str]) -> tuple[float, float, int, int]:
  """Seconds, frames a second, height and width of a video file; nothing is decoded.

  Raises:
    VideoError: not a video, or one whose header does not say.
  """
  try:
    with av.open(os.fspath(path)) as container:
      stream = _video_stream(container)
      rate = float(stream.average_rate or stream.guessed_rate or _DEFAULT_FPS)
      seconds = container.duration / av.time_base if container.duration else stream.frames / rate
      height, width = stream.height, stream.width
  except (av.FFmpegError, OSError) as error:
    raise VideoError(f"not a video that can be read: {error.strerror or error}") from error
  if not (seconds > 0 and height and width):
    raise VideoError("the header says no length or size")
  return seconds, rate, height, width


def read_picture(path: str | os.PathLike[str] | BinaryIO) -> UInt8[np.ndarray, "1 H W 3"]:
  """A picture file (or an open one), turned upright, as a video of one frame.

  Raises:
    VideoError: not a picture that Pillow opens.
  """
  try:
    with Image.open(path) as picture:
      return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))[None]
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
    raise VideoError(f"not a picture that can be read: {error}") from error


def _check_index(stream: av.VideoStream, size: int) -> None:
  """Raises `VideoError` if the container's index leads beyond its `size` in bytes."""
  end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
  if end > size >= 0:
    raise VideoError(f"cut short: {size} bytes of at least {end}")


class Mp4Writer:
  """Writes H.264 piece by piece; plays everywhere (yuv420p) unless `lossless` (RGB).

  Odd sizes are repeated by a pixel at the right and bottom edge, since yuv420p needs even ones.
  The file appears when the writer is closed, whole as far as it was written; a writer that
  got no frame leaves none.

  Raises (all methods):
    InputError: the file cannot be written.
  """

  def __init__(self, path: str | os.PathLike[str], fps: float, *, lossless: bool = False) -> None:
    self._path = pathlib.Path(path)
    self._temporary = self._path.with_name(f".{self._path.name}.tmp")
    self._rate, self._lossless = fractions.Fraction(fps).limit_denominator(1001), lossless
    self._stream: av.VideoStream | None = None
    with self._writing():
      self._container = av.open(os.fspath(self._temporary), "w", format="mp4")

  def append(self, frames: UInt8[np.ndarray, "T H W 3"]) -> None:
    """Writes frames after those before, all of one size."""
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with self._writing():
      if self._stream is None:
        self._stream = self._open_stream(*frames.shape[1:3])
      for frame in frames:
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
        self._container.mux(self._stream.encode(picture))

  def close(self) -> None:
    """Ends the file and puts it in its place."""
    try:
      with self._writing():
        if self._stream is not None:
          self._container.mux(self._stream.encode())
        self._container.close()
        if self._stream is not None:
          os.replace(self._temporary, self._path)
    finally:
      self._temporary.unlink(missing_ok=True)

  def __enter__(self) -> "Mp4Writer":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def _open_stream(self, height: int, width: int) -> av.VideoStream:
    if self._lossless:
      stream = self._container.add_stream("libx264rgb", rate=self._rate, options={"crf": "0"})
      stream.pix_fmt = "rgb24"
    else:
      # mbtree reads memory that nobody wrote (see the test with MALLOC_PERTURB_).
      stream = self._container.add_stream("libx264", rate=self._rate,
                                          options={"crf": _CRF, "x264-params": "mbtree=0"})
      stream.pix_fmt = "yuv420p"
    stream.height, stream.width = height, width
    # How x264 cuts the work depends on the number of cores: with one thread a video is the
    # same file on every machine.
    stream.codec_context.thread_count = 1
    return stream

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise errors.refused(f"cannot write {self._path}: {error.strerror or error}",
                           error) from error


def write_mp4(path: str | os.PathLike[str], frames: UInt8[np.ndarray, "T H W 3"], fps: float,
              *, lossless: bool = False) -> None:
  """Writes a whole video; see `Mp4Writer`."""
  with Mp4Writer(path, fps, lossless=lossless) as writer:
    writer.append(frames)


def write_gif(target: str | os.PathLike[str] | BinaryIO, frames: UInt8[np.ndarray, "T H W 3"],
              fps: float, scale: int = 1) -> None:
  """Writes an endless GIF to a path (atomically) or an open file; `scale` enlarges pixels.

  One palette serves all frames, so that colours do not flicker.

  Raises:
    InputError: the file cannot be written.
  """
  frames = enlarge(frames, scale)
  strip = Image.fromarray(frames.reshape(-1, *frames.shape[2:]))
  palette = strip.quantize(255, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
  pictures = [Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE)
              for f in frames]
  buffer = io.BytesIO()
  pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], loop=0,
                   duration=round(1000 / fps), disposal=1)
  if not isinstance(target, (str, os.PathLike)):
    target.write(buffer.getvalue())
    return
  files.replace(target, buffer.getvalue())


def write_picture(path: str | os.PathLike[str], pixels: UInt8[np.ndarray, "H W 3"]) -> None:
  """Writes a PNG, atomically. Raises `InputError` if it cannot."""
  buffer = io.BytesIO()
  Image.fromarray(pixels).save(buffer, "PNG")
  files.replace(path, buffer.getvalue())


def resize_and_crop(frames: UInt8[np.ndarray, "T H W 3"], height: int, width: int
                    ) -> UInt8[np.ndarray, "T h w 3"]:
  """Scales until `height` x `width` px are covered, keeping proportions, and crops the centre.

  While the shorter side is at least twice the longer one wanted, sides are halved by averages
  over areas; the rest is bicubic, as in the published preprocessing.
  """
  _, old_height, old_width, _ = frames.shape
  if (old_height, old_width) == (height, width):
    return frames
  return np.stack([_resize_and_crop(frame, height, width) for frame in frames])


def _resize_and_crop(frame: UInt8[np.ndarray, "H W 3"], height: int, width: int
                     ) -> UInt8[np.ndarray, "h w 3"]:
  picture = _halved(frame, height, width)
  factor = max(height / picture.height, width / picture.width)
  covered = (max(width, round(picture.width * factor)), max(height, round(picture.height * factor)))
  if picture.size != covered:
    picture = picture.resize(covered, Image.Resampling.BICUBIC)
  top, left = (covered[1] - height) // 2, (covered[0] - width) // 2
  return np.asarray(picture)[top:top + height, left:left + width]


def stretch(frame: UInt8[np.ndarray, "H W 3"], height: int, width: int
            ) -> UInt8[np.ndarray, "h w 3"]:
  """Scales a frame to `height` x `width` px, all of it, changing proportions; else as above."""
  picture = _halved(frame, height, width)
  return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))


def _halved(frame: UInt8[np.ndarray, "H W 3"], height: int, width: int) -> Image.Image:
  picture = Image.fromarray(frame)
  while min(picture.size) >= 2 * max(height, width):
    picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
  return picture


def enlarge(frames: UInt8[np.ndarray, "T H W 3"], scale: int) -> UInt8[np.ndarray, "T sH sW 3"]:
  """Every pixel as a block of `scale` x `scale`."""
  return frames.repeat(scale, axis=1).repeat(scale, axis=2) if scale != 1 else frames


def side_by_side(columns: Mapping[str, UInt8[np.ndarray, "T H W 3"]], scale: int = 1,
                 history: int | None = None) -> UInt8[np.ndarray, "T h w 3"]:
  """Videos of equal shape in titled columns, pixels enlarged by `scale`.

  With `history`, frames from there on have an orange border: they are predicted.
  """
  parts = []
  for title, frames in columns.items():
    frames = enlarge(np.asarray(frames), scale)
    length, height, width, _ = frames.shape
    title_width = ImageFont.load_default().getlength(title)
    outer = max(width + 2 * _BORDER, int(title_width) + 2)
    column = np.empty((length, height + 2 * _BORDER + _TITLE, outer + _GAP, 3), np.uint8)
    column[:] = _PAPER
    column[:, :_TITLE, :] = _text(title, _TITLE, outer + _GAP)
    for t in range(length):
      colour = _PREDICTED if history is not None and t >= history else _GIVEN
      column[t, _TITLE:, : width + 2 * _BORDER] = colour
    inside = (slice(None), slice(_TITLE + _BORDER, -_BORDER), slice(_BORDER, _BORDER + width))
    column[inside] = frames
    parts.append(column)
  return np.concatenate(parts, axis=2)


def contact_sheet(rows: Mapping[str, UInt8[np.ndarray, "T H W 3"]], columns: Sequence[str],
                  scale: int = 1) -> UInt8[np.ndarray, "h w 3"]:
  """One picture: a titled video a row, a titled frame a column, pixels enlarged by `scale`."""
  frame = lambda x: list(np.pad(enlarge(x, scale), ((0, 0), (1, 1), (1, 1), (0, 0))))
  sheet = np.concatenate([np.concatenate(frame(x), axis=1) for x in rows.values()], axis=0)
  height, width = sheet.shape[0] // len(rows), sheet.shape[1] // len(columns)
  margin = 2 * _BORDER + max(int(ImageFont.load_default().getlength(title)) for title in rows)
  top = [_text(title, _TITLE, size) for title, size in
         (("", margin), *((title, width) for title in columns))]
  side = np.concatenate([_text(title, height, margin) for title in rows], axis=0)
  return np.concatenate([np.concatenate(top, axis=1),
                         np.concatenate([side, sheet], axis=1)], axis=0)


def _text(text: str, height: int, width: int) -> UInt8[np.ndarray, "h w 3"]:
  picture = Image.new("RGB", (width, height), _PAPER)
  ImageDraw.Draw(picture).text((1, 1), text, fill=_INK, font=ImageFont.load_default())
  return np.asarray(picture)
