"""What a run writes into its workdir: scalars, pictures, records of its time."""

from collections.abc import Iterator, Mapping
import contextlib
import io
import json
import math
import os
import pathlib
import time
from typing import Any

from absl import logging
import jax
from jaxtyping import UInt8
import numpy as np
from PIL import Image
from tensorboardX import event_file_writer
from tensorboardX.proto import event_pb2
from tensorboardX.proto import summary_pb2

from videogpt_jax import files
from videogpt_jax.data import video as video_lib
from videogpt_jax.errors import InputError
from videogpt_jax.telemetry import mirror as mirror_lib
from videogpt_jax.telemetry import records as records_lib
from videogpt_jax.telemetry.records import METRICS_FILE

TIME_FILE = "time.jsonl"


def open_writer(workdir: str | pathlib.Path, start_step: int = 0, *, project: str = "",
                name: str = "", settings: Mapping[str, Any] | None = None) -> "Writer | Silent":
  """The writer of this process: the first of a run writes, the others do not.

  Args:
    workdir: see `Writer`.
    start_step: see `Writer`.
    project: of Weights & Biases, to be shown there too; "" leaves it out.
    name: of the run, shown there.
    settings: of the run, shown there.

  Raises:
    InputError: see `Writer`.
  """
  if jax.process_index() != 0:
    return Silent(workdir)
  writer = Writer(workdir, start_step)
  if project:
    writer.mirror = mirror_lib.WeightsAndBiases(workdir, project, name, settings or {})
  return writer


class Writer:
  """Writes scalars, images and videos of a run under its workdir.

  WORKDIR/metrics.jsonl has one JSON object a call of `scalars`, `step` first; WORKDIR/tensorboard
  the same for TensorBoard; WORKDIR/videos and WORKDIR/images the files themselves. A run
  that resumes rewrites its tail: lines of `start_step` and later, and a last line that a kill
  cut short, are dropped from metrics.jsonl, and TensorBoard is told to forget those steps.
  WORKDIR/time.jsonl keeps every record of `timing`: what was lost has taken time, too.

  Args:
    workdir: made if it is missing.
    start_step: the first step that will be written (again): 0 for a new run, one more than
      the checkpoint's number of finished steps for one that resumes.

  What the system refuses to write later is warned of, once for each kind of file until it is
  written again, and does not end the run: whether the state can be saved decides that.

  Raises:
    InputError: the workdir cannot be written (no permission, not a folder).
    StorageError: it cannot for now (disk full, unreachable).
  """

  mirror: mirror_lib.WeightsAndBiases | None = None  # is shown the same

  def __init__(self, workdir: str | pathlib.Path, start_step: int = 0):
    self._workdir = pathlib.Path(workdir)
    self._refused: set[str] = set()
    with records_lib.writing(self._workdir):
      self._workdir.mkdir(parents=True, exist_ok=True)
      self._lines = records_lib.reopen(
        self._workdir / METRICS_FILE, keep=lambda record: record["step"] < start_step)
      self._times = records_lib.reopen(self._workdir / TIME_FILE)
      self._events = _Events(self._workdir / "tensorboard", start_step)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes `values` for `step`. A NaN or infinity is `null` in the JSON lines."""
    numbers = {name: float(value) for name, value in values.items()}
    line = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    with self._refusals("metrics"):
      self._lines.write(json.dumps({"step": int(step), **line}) + "\n")
      self._lines.flush()
      for name, value in numbers.items():
        self._events.add(step, summary_pb2.Summary.Value(tag=name, simple_value=value))
      self._events.flush()
    if self.mirror:
      self.mirror.scalars(step, numbers)

  def timing(self, record: Mapping[str, Any]) -> None:
    """Keeps a record of the run's time (`goodput.Account`)."""
    with self._refusals("times"):
      self._times.write(json.dumps(record) + "\n")
      self._times.flush()

  def sync(self) -> None:
    """Hands the lines over to storage: a mounted bucket has of a file what was synced or closed."""
    for kind, file in (("metrics", self._lines), ("times", self._times)):
      with self._refusals(kind):
        os.fsync(file.fileno())

  def timings(self) -> list[dict[str, Any]]:
    """All records of the run's time, from its first start on."""
    return records_lib.read_metrics(self._workdir / TIME_FILE)

  def say(self, text: str) -> None:
    """Shows a line, or several, on stdout."""
    print(text, flush=True)

  def video(
    self, step: int, name: str, frames: UInt8[np.ndarray, "T H W 3"], fps: float, scale: int = 1
  ) -> pathlib.Path:
    """Writes a GIF and shows it in TensorBoard; `scale` enlarges pixels. Returns the file."""
    buffer = io.BytesIO()
    video_lib.write_gif(buffer, frames, fps, scale=scale)
    size = (frames.shape[1] * scale, frames.shape[2] * scale)
    return self._picture("videos", step, name, "gif", buffer.getvalue(), size)

  def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "H W 3"]) -> pathlib.Path:
    """Writes a PNG and shows it in TensorBoard. Returns the file."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return self._picture("images", step, name, "png", buffer.getvalue(), pixels.shape[:2])

  def close(self) -> None:
    """Closes all files."""
    if self.mirror:
      self.mirror.close()
    for part in (self._lines, self._times, self._events):
      with self._refusals("end"):
        part.close()

  def _picture(
    self, folder: str, step: int, name: str, suffix: str, data: bytes, size: tuple[int, int]
  ) -> pathlib.Path:
    path = _picture_path(self._workdir, folder, step, name, suffix)
    picture = summary_pb2.Summary.Image(
      height=size[0], width=size[1], colorspace=3, encoded_image_string=data
    )
    with self._refusals(folder):
      path.parent.mkdir(exist_ok=True)
      files.replace(path, data)
      self._events.add(step, summary_pb2.Summary.Value(tag=name, image=picture))
      self._events.flush()
      if self.mirror:
        self.mirror.picture(step, name, path)
    return path

  @contextlib.contextmanager
  def _refusals(self, kind: str) -> Iterator[None]:
    """Warns of what the system refuses to write, once in a row of its kind."""
    try:
      yield
    except (OSError, InputError) as error:  # the latter from `files`
      if kind not in self._refused:
        logging.warning("cannot write %s to %s: %s; the run goes on, what it reports may be "
                        "missing there", kind, self._workdir, error)
      self._refused.add(kind)
    else:
      self._refused.discard(kind)


class Silent:
  """What the processes of a run but the first have in place of a `Writer`: it writes nothing."""

  def __init__(self, workdir: str | pathlib.Path) -> None:
    self._workdir = pathlib.Path(workdir)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Does nothing."""

  def timing(self, record: Mapping[str, Any]) -> None:
    """Does nothing."""

  def sync(self) -> None:
    """Does nothing."""

  def timings(self) -> list[dict[str, Any]]:
    """No records."""
    return []

  def say(self, text: str) -> None:
    """Does nothing."""

  def video(
    self, step: int, name: str, frames: UInt8[np.ndarray, "T H W 3"], fps: float, scale: int = 1
  ) -> pathlib.Path:
    """Returns the file that the first process writes."""
    return _picture_path(self._workdir, "videos", step, name, "gif")

  def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "H W 3"]) -> pathlib.Path:
    """Returns the file that the first process writes."""
    return _picture_path(self._workdir, "images", step, name, "png")

  def close(self) -> None:
    """Does nothing."""


def _picture_path(
  workdir: pathlib.Path, folder: str, step: int, name: str, suffix: str
) -> pathlib.Path:
  return workdir / folder / f"{name.replace('/', '_')}_{step}.{suffix}"


class _Events:
  """A TensorBoard event file, written at once.

  tensorboardX's own `SummaryWriter` writes from a thread: when that meets a full disk it
  dies, and the training blocks for ever on the full queue.
  """

  def __init__(self, folder: pathlib.Path, start_step: int):
    folder.mkdir(exist_ok=True)
    # The suffix keeps apart two files of one second.
    self._writer = event_file_writer.EventsWriter(str(folder / "events"), f".{time.time_ns()}")
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(event_pb2.Event(step=start_step, session_log=start))

  def add(self, step: int, value: Any) -> None:
    self._write(event_pb2.Event(step=int(step), summary=summary_pb2.Summary(value=[value])))

  def flush(self) -> None:
    self._writer.flush()

  def close(self) -> None:
    self._writer.close()

  def _write(self, event: Any) -> None:
    event.wall_time = time.time()
    self._writer.write_event(event)
