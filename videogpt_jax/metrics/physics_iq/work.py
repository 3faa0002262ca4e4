"""Whole views: videos are read, reduced as they are decoded, and compared; over processes.

Memory does not grow with the resolution beyond a few frames: of a video only frames and masks
at the size of comparison are kept.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import itertools
import multiprocessing
import os
import pathlib
from typing import Any, TypeVar

import cv2
from jaxtyping import UInt8
import numpy as np

from videogpt_jax import errors
from videogpt_jax.data import worker
from videogpt_jax.errors import InputError
from videogpt_jax.metrics.physics_iq import comparison
from videogpt_jax.metrics.physics_iq import masks as masks_lib
from videogpt_jax.metrics.physics_iq import measures
from videogpt_jax.metrics.physics_iq import pictures
from videogpt_jax.metrics.physics_iq.files import Clip

_BLOCK = 1 << 20  # bytes hashed at a time
_DIGITS = 32  # of a digest
_T = TypeVar("_T")


@dataclasses.dataclass(frozen=True)
class View:
  """The videos of one view that are compared.

  Attributes:
    first, second: takes.
    generated: the model's video.
    masks: of the takes, where they come with the data set; else they are made.
    shown: folder for small videos to look at; see `pictures.write`.
  """

  first: Clip
  second: Clip
  generated: Clip
  masks: tuple[pathlib.Path | None, pathlib.Path | None] = (None, None)
  shown: pathlib.Path | None = None


def digests(views: Sequence[View]) -> list[str]:
  """Of every view all that decides its values: what the files hold, and how much of it counts.

  Raises:
    InputError: a file cannot be read.
  """
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
    return list(pool.map(_digest, views))


def _digest(view: View) -> str:
  total = hashlib.blake2b(digest_size=_DIGITS // 2)
  for clip in (view.first, view.second, view.generated):
    total.update(f"{clip.fps} {clip.frames} {clip.wanted} {clip.from_end} ".encode())
    total.update(file_digest(clip.path).encode())
  for path in view.masks:
    total.update(b"none" if path is None else file_digest(path).encode())
  return total.hexdigest()


def file_digest(path: pathlib.Path) -> str:
  """A digest of what a file holds.

  Raises:
    InputError: it cannot be read.
  """
  total = hashlib.blake2b(digest_size=_DIGITS // 2)
  try:
    with path.open("rb") as file:
      while block := file.read(_BLOCK):
        total.update(block)
  except OSError as error:
    raise errors.refused(f"cannot read {path}: {error.strerror or error}", error) from error
  return total.hexdigest()


def score(view: View) -> measures.Values:
  """The values of a view; see `measures.compare`.

  Raises:
    InputError: a video cannot be read, or is shorter than it must be; or there is more of the
      generated one.
  """
  first = reduce(view.first, view.masks[0], None)
  to = (first.frames.shape[1], first.frames.shape[2])
  generated = reduce(view.generated, None, to)
  values = measures.compare(first, reduce(view.second, view.masks[1], to), generated)
  if view.shown is not None:
    pictures.write(view.shown, view.generated.path.stem, first, generated,
                   view.generated.fps)
  return values


def reduce(clip: Clip, masks: pathlib.Path | None, to: comparison.Size | None
           ) -> measures.Reduced:
  """A video at the size of comparison.

  Args:
    clip: the video.
    masks: video of its motion; None: it is found in the video, without loss.
    to: height and width; None: what `comparison.size` says of this video's.

  Raises:
    InputError: see `score`.
  """
  motion = masks_lib.Motion(bgr=True)
  frames: list[np.ndarray] = []
  moving: list[np.ndarray] = []
  given = None if masks is None else read(dataclasses.replace(
    clip, path=masks, frames=clip.wanted))  # at the rate of the comparison
  for frame in read(clip):
    to = to or comparison.size(*frame.shape[:2])
    if given is None:
      mask = motion(frame)
    else:
      mask = np.ascontiguousarray(next(given)[..., 0])
    frames.append(comparison.resize(frame, to))
    moving.append(comparison.resize_mask(mask, to))
  return measures.Reduced(np.stack(frames), np.stack(moving))


def read(clip: Clip) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
  """The frames of a clip as OpenCV reads them, blue first.

  Raises:
    InputError: the file cannot be read, or has fewer frames.
  """
  frames: Iterable[np.ndarray] = _decoded(clip.path)
  if clip.from_end:
    skip = max(sum(1 for _ in _decoded(clip.path)) - clip.frames, 0)
    frames = itertools.islice(frames, skip, None)
  frames = _exactly(itertools.islice(frames, clip.frames), clip)
  if clip.wanted == clip.frames:
    yield from frames
  else:
    yield from comparison.change_rate(frames, clip.frames, clip.wanted)


def _exactly(frames: Iterable[np.ndarray], clip: Clip) -> Iterator[np.ndarray]:
  count = 0
  for frame in frames:
    count += 1
    yield frame
  if count < clip.frames:
    raise InputError(f"{clip.path}: {count} frames can be decoded, {clip.frames} are needed")


def _decoded(path: pathlib.Path) -> Iterator[np.ndarray]:
  """Frames by OpenCV, as in the public code, in one thread: processes share the cores."""
  capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
  try:
    if not capture.isOpened():
      raise InputError(f"{path}: not a video that OpenCV can read")
    while True:
      there, frame = capture.read()
      if not there:
        return
      yield frame
  finally:
    capture.release()


def over(function: Callable[[Any], _T], items: Sequence[Any], workers: int) -> Iterator[_T]:
  """`function` of every item, in order, shared among processes; one works in this process.

  Args:
    function: of a module, as all that goes to another process.
    items: its arguments.
    workers: processes.

  Raises:
    InputError: `workers` is not positive; or what `function` raises.
  """
  if workers < 1:
    raise InputError(f"--workers must be positive, got {workers}")
  if workers == 1 or len(items) < 2:
    with _one_thread():
      yield from map(function, items)
    return
  context = multiprocessing.get_context("spawn")  # a copy of a process with threads may hang
  with concurrent.futures.ProcessPoolExecutor(
      min(workers, len(items)), mp_context=context, initializer=_begin) as pool:
    try:
      yield from pool.map(function, items)
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def _begin() -> None:
  worker.obey_parent()
  cv2.setNumThreads(1)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
  before = cv2.getNumThreads()
  cv2.setNumThreads(1)
  try:
    yield
  finally:
    cv2.setNumThreads(before)
