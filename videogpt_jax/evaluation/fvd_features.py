"""Features of sets of videos for FVD, made batch after batch, each safe on disk when it is done."""

from collections.abc import Iterator, Sequence
import hashlib
import itertools
import os
import pathlib
from typing import Any

import jax
from jaxtyping import UInt8
import numpy as np

from videogpt_jax import files
from videogpt_jax import weights as weights_lib
from videogpt_jax.data import decoders as decoders_lib
from videogpt_jax.data import video
from videogpt_jax.data import windows
from videogpt_jax.errors import InputError
from videogpt_jax.evaluation import frame_scores
from videogpt_jax.evaluation import fvd_videos
from videogpt_jax.evaluation import ledger as ledger_lib
from videogpt_jax.evaluation import prediction
from videogpt_jax.evaluation import progress as progress_lib
from videogpt_jax.metrics import frechet
from videogpt_jax.metrics import fvd

OUTPUTS = ("statistics", "videos")  # that `Features` makes in the folder of the results
SHOWN = 8  # videos of which files are kept for the report's page
_SIDE = 192  # px, to which small frames are enlarged there
_TIMEOUT_S = 60.0  # of a decoder without a sign of life


class Features:
  """Features of sets of videos, batch after batch, each kept on disk."""

  def __init__(self, out: pathlib.Path, ledger: ledger_lib.Ledger, extractor: fvd.Extractor,
               protocol: fvd.Protocol, comparison: frame_scores.Comparison | None, *,
               batch_size: int, processes: int = 0) -> None:
    """Starts nothing.

    Args:
      out: folder of the results.
      ledger: of what is finished.
      extractor: makes the features.
      protocol: what is compared with what.
      comparison: of predicted frames with the true ones; None: there is none.
      batch_size: videos predicted at once, and the piece of work after which all is safe.
      processes: decoders; 0: one for each core.
    """
    self._out, self._ledger, self._extractor = out, ledger, extractor
    self._protocol, self._comparison = protocol, comparison
    self._batch_size, self._processes = batch_size, processes
    self._size: tuple[int, ...] | None = None  # of videos that stay as they are

  def make(self, name: str, videos: fvd_videos.Videos, model: weights_lib.Weights | None = None,
           seed: int = 0) -> None:
    """Makes the statistics of a set; goes on from what is finished.

    Args:
      name: of the set.
      videos: it consists of.
      model: predicts all frames of a window but the protocol's history; None: they are as loaded.
      seed: of its noise.

    Raises:
      InputError: mixed resolutions, or a video that has to be usable and is not.
      DivergedError: the model predicts no numbers.
    """
    files.make_folder(self._out / "statistics" / name)
    batches = _batches(name, len(videos.items), self._batch_size)
    states = {batch: _state(videos, rows) for batch, rows in batches.items()}
    unfinished = self._ledger.mine(states)
    if not unfinished:
      return
    progress = progress_lib.Progress(f"{name} videos", sum(len(batches[x]) for x in unfinished))
    items = ((batch, videos.items[i]) for batch in unfinished for i in batches[batch])
    processes = self._processes or os.cpu_count() or 1
    pool: decoders_lib.Decoders[str] = decoders_lib.Decoders(videos.loader, processes, _TIMEOUT_S)
    with pool as decoders:
      for batch, loaded in itertools.groupby(decoders.load(items), key=lambda pair: pair[0]):
        results = [result for _, result in loaded]
        self._finish(batch, videos, list(zip(batches[batch], results, strict=True)), name,
                     states[batch], model, seed)
        progress.add(len(results))

  def _finish(self, batch: str, videos: fvd_videos.Videos,
              results: Sequence[tuple[int, windows.Window | decoders_lib.Rejected]], name: str,
              state: str, model: weights_lib.Weights | None, seed: int) -> None:
    """Writes what a batch comes to: the loader's results, with the numbers of the videos."""
    rejected = [[videos.names[i], result.reason] for i, result in results
                if isinstance(result, decoders_lib.Rejected)]
    if rejected and videos.must_all:
      raise InputError(f"{len(rejected)} generated videos cannot be used, such as "
                       f"{rejected[0][0]}: {rejected[0][1]}; every one counts, so make them "
                       "again, or change --frames")
    usable = [(i, result) for i, result in results if isinstance(result, windows.Window)]
    history = self._protocol.history
    statistics = frechet.empty(self._extractor.size, self._extractor.kind(self._protocol.frames),
                               name)
    compared: list[dict[str, Any]] = []
    for rows, loaded in self._by_size(usable, videos):
      frames = self._resized(np.stack([window.frames for window in loaded]))
      if model is not None:
        rng = jax.random.fold_in(jax.random.key(seed), rows[0])
        with prediction.of(f"batch {batch}, videos from {rows[0]} on"):
          made = self._predicted(model, loaded, rng)
        if self._comparison is not None:
          compared.append({"rows": rows, **self._comparison(made, frames[:, history:])})
        # The given frames are the true ones, on both sides from the same place.
        frames = np.concatenate([frames[:, :history], made], axis=1)
      self._show(name, rows, frames, loaded[0].fps)
      statistics = statistics.add(self._extractor(frames))
    statistics.save(self._file(batch))
    self._ledger.put(batch, {"videos": statistics.count, "rejected": rejected,
                             "size": self._size, "compared": compared}, state)

  def merged(self, name: str, videos: fvd_videos.Videos
             ) -> tuple[frechet.Statistics, list[tuple[str, str]]]:
    """The statistics of a whole set, and the videos that were left out, with reasons."""
    results = self._ledger.all(list(_batches(name, len(videos.items), self._batch_size)))
    total = frechet.empty(self._extractor.size, self._extractor.kind(self._protocol.frames), name)
    rejected: list[tuple[str, str]] = []
    for batch, result in results.items():
      if result["size"]:
        self._check_size(result["size"])  # of other processes, and of a call before this one
      total = total.merge(frechet.load(self._file(batch)))
      rejected += [tuple(pair) for pair in result["rejected"]]
    if jax.process_index() == 0:
      total.save(self._out / "statistics" / f"{name}.npz")
    return total, rejected

  def compared(self, name: str, videos: fvd_videos.Videos) -> frame_scores.Means:
    """What the comparison of a whole set of predictions came to."""
    results = self._ledger.all(list(_batches(name, len(videos.items), self._batch_size)))
    return frame_scores.merge(itertools.chain.from_iterable(
      result["compared"] for result in results.values()), SHOWN)

  def shown(self, name: str, row: int) -> pathlib.Path:
    """The file of a video on the report's page."""
    return self._out / "videos" / f"{row:05d}_{name}.mp4"

  def _file(self, batch: str) -> pathlib.Path:
    return self._out / "statistics" / f"{batch}.npz"

  def _by_size(self, usable: Sequence[tuple[int, windows.Window]], videos: fvd_videos.Videos
               ) -> Iterator[tuple[list[int], list[windows.Window]]]:
    """Those of one resolution, in the order of the videos, and their numbers."""
    key = lambda pair: (pair[1].frames.shape[1:3], self._given(pair[1]).shape[1:3])
    for (size, _), group in itertools.groupby(usable, key):
      if getattr(videos.loader, "fit", True) is None:
        self._check_size(size)
      part = list(group)
      yield [i for i, _ in part], [window for _, window in part]

  def _given(self, window: windows.Window) -> UInt8[np.ndarray, "h H W 3"]:
    """What a model is given of a window, at its own size."""
    return window.frames[:self._protocol.history] if window.given is None else window.given

  def _check_size(self, size: Sequence[int]) -> None:
    self._size = self._size or tuple(size)
    if tuple(size) != self._size:
      raise InputError(
        f"mixed resolutions: one video is of {self._size[0]}x{self._size[1]} px, another of "
        f"{size[0]}x{size[1]} px; bring all to the same size, or take a --protocol that does")

  def _predicted(self, model: weights_lib.Weights, of: Sequence[windows.Window],
                 rng: jax.Array) -> UInt8[np.ndarray, "B G h w 3"]:
    """What the model predicts of windows, at the size of what is compared.

    One compilation serves all batches of a size.
    """
    rows = np.minimum(np.arange(self._batch_size), len(of) - 1)
    history = np.stack([self._given(window) for window in of])
    made = prediction.continued(model, history[rows],
                                self._protocol.frames - self._protocol.history, rng=rng)
    return np.concatenate([self._resized(self._unsqueezed(frames, window.squeezed)[None])
                           for frames, window in zip(made, of, strict=False)])

  def _unsqueezed(self, frames: UInt8[np.ndarray, "G H W 3"], source: tuple[int, int] | None
                  ) -> UInt8[np.ndarray, "G Hs Ws 3"]:
    """Frames with the proportions of their source again, so large that they cover the window."""
    if source is None or self._protocol.size is None:
      return frames
    factor = max(self._protocol.size[0] / source[0], self._protocol.size[1] / source[1])
    height, width = (max(wanted, round(side * factor))
                     for wanted, side in zip(self._protocol.size, source, strict=True))
    return np.stack([video.stretch(frame, height, width) for frame in frames])

  def _resized(self, frames: UInt8[np.ndarray, "B T H W 3"]) -> UInt8[np.ndarray, "B T h w 3"]:
    if self._protocol.size is None:
      return frames
    flat = frames.reshape(-1, *frames.shape[2:])
    return video.resize_and_crop(flat, *self._protocol.size).reshape(
      *frames.shape[:2], *self._protocol.size, 3)

  def _show(self, name: str, rows: Sequence[int], frames: np.ndarray, fps: float) -> None:
    for row, one in zip(rows, frames, strict=True):
      if row < SHOWN:
        path = self.shown(name, row)
        files.make_folder(path.parent)
        video.write_mp4(path, video.enlarge(one, max(1, _SIDE // one.shape[1])), fps)


def _state(videos: fvd_videos.Videos, rows: range) -> str:
  """Of the files of a batch; others make it unfinished."""
  if not videos.files:
    return ""
  return hashlib.sha256("\n".join(videos.files[i] for i in rows).encode()).hexdigest()[:16]


def _batches(name: str, count: int, size: int) -> dict[str, range]:
  """The items of the ledger, and the videos of each."""
  return {f"{name}/{start // size:05d}": range(start, min(start + size, count))
          for start in range(0, count, size)}
