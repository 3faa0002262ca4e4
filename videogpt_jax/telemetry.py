"""What a run says about itself: metrics on disk, one line a step, memory and time.

Everything here runs on the host, once per log point; only `product_rate` uses the device.
In a multi-host run process 0 alone makes a `Writer`.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import io
import json
import math
import pathlib
import time
from typing import Any

from jaxtyping import UInt8
import numpy as np
from PIL import Image
from tensorboardX import event_file_writer
from tensorboardX.proto import event_pb2
from tensorboardX.proto import summary_pb2

from videogpt_jax import files
from videogpt_jax import machine
from videogpt_jax.data import video as video_lib
from videogpt_jax.errors import InputError

METRICS_FILE = "metrics.jsonl"

class Writer:
  """Writes scalars, images and videos of a run under its workdir.

  WORKDIR/metrics.jsonl has one JSON object a call of `scalars`, `step` first; WORKDIR/tensorboard
  the same for TensorBoard; WORKDIR/videos and WORKDIR/images the files themselves. A run
  that resumes rewrites its tail: lines of `start_step` and later, and a last line that a kill
  cut short, are dropped from metrics.jsonl, and TensorBoard is told to forget those steps.

  Args:
    workdir: made if it is missing.
    start_step: the first step that will be written (again): 0 for a new run, one more than
      the checkpoint's number of finished steps for one that resumes.

  Raises (all methods):
    InputError: the workdir cannot be written (no permission, disk full, not a folder).
  """

  def __init__(self, workdir: str | pathlib.Path, start_step: int = 0):
    self._workdir = pathlib.Path(workdir)
    with _writing(self._workdir):
      self._workdir.mkdir(parents=True, exist_ok=True)
      path = self._workdir / METRICS_FILE
      _drop_tail(path, start_step)
      self._lines = path.open("a", encoding="utf-8")
      self._events = _Events(self._workdir / "tensorboard", start_step)

  def scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes `values` for `step`. A NaN or infinity is `null` in the JSON lines."""
    numbers = {name: float(value) for name, value in values.items()}
    line = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    with _writing(self._workdir):
      self._lines.write(json.dumps({"step": int(step), **line}) + "\n")
      self._lines.flush()
      for name, value in numbers.items():
        self._events.add(step, summary_pb2.Summary.Value(tag=name, simple_value=value))
      self._events.flush()

  def last(self, name: str, default: float = 0.0) -> float:
    """The newest value of `name` on disk, from the runs that this one resumes."""
    with _writing(self._workdir):
      records = read_metrics(self._workdir / METRICS_FILE)
    found = [record[name] for record in records if record.get(name) is not None]
    return found[-1] if found else default

  def video(
    self, step: int, name: str, frames: UInt8[np.ndarray, "T H W 3"], fps: float, scale: int = 1
  ) -> pathlib.Path:
    """Writes a GIF and shows it in TensorBoard; `scale` enlarges pixels. Returns the file."""
    with _writing(self._workdir):
      buffer = io.BytesIO()
      video_lib.write_gif(buffer, frames, fps, scale=scale)
      size = (frames.shape[1] * scale, frames.shape[2] * scale)
      return self._picture("videos", step, name, "gif", buffer.getvalue(), size)

  def image(self, step: int, name: str, pixels: UInt8[np.ndarray, "H W 3"]) -> pathlib.Path:
    """Writes a PNG and shows it in TensorBoard. Returns the file."""
    with _writing(self._workdir):
      buffer = io.BytesIO()
      Image.fromarray(pixels).save(buffer, "PNG")
      return self._picture("images", step, name, "png", buffer.getvalue(), pixels.shape[:2])

  def flush(self) -> None:
    with _writing(self._workdir):
      self._lines.flush()
      self._events.flush()

  def close(self) -> None:
    with _writing(self._workdir):
      self._lines.close()
      self._events.close()

  def _picture(
    self, folder: str, step: int, name: str, suffix: str, data: bytes, size: tuple[int, int]
  ) -> pathlib.Path:
    path = self._workdir / folder / f"{name.replace('/', '_')}_{step}.{suffix}"
    path.parent.mkdir(exist_ok=True)
    files.replace(path, data)
    picture = summary_pb2.Summary.Image(
      height=size[0], width=size[1], colorspace=3, encoded_image_string=data
    )
    self._events.add(step, summary_pb2.Summary.Value(tag=name, image=picture))
    self._events.flush()
    return path


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


class Stopwatch:
  """Adds up the time spent inside its `with` blocks.

  >>> waiting = Stopwatch()
  >>> with waiting:
  ...   batch = next(batches)
  >>> progress.update(step, values, wait_seconds=waiting.take())
  """

  def __init__(self, clock: Callable[[], float] = time.perf_counter):
    self._clock = clock
    self._total = 0.0
    self._since = 0.0

  def __enter__(self) -> "Stopwatch":
    self._since = self._clock()
    return self

  def __exit__(self, *exception: object) -> None:
    self._total += self._clock() - self._since

  def take(self) -> float:
    """Seconds since the last `take`, which starts again from zero."""
    total, self._total = self._total, 0.0
    return total


class Progress:
  """Speed of a run and its one line a log point, from the wall clock between log points.

  Make it (or call `start`) after the first step has finished, so that compilation is not
  taken for slowness; hold `paused` around evaluation and whatever else is not training.

  Args:
    total_steps: steps of the whole run.
    start_step: steps finished when the clock starts.
    tokens_per_step: of the global batch.
    flops_per_step: needed work of the global batch; None leaves out the MFU.
    peak_flops: of all devices together, FLOP/s (`peak_flops_per_device`); None likewise.
    clock: seconds; another one for tests.
  """

  def __init__(
    self,
    total_steps: int,
    start_step: int,
    *,
    tokens_per_step: float,
    flops_per_step: float | None = None,
    peak_flops: float | None = None,
    clock: Callable[[], float] = time.perf_counter,
  ):
    self._total_steps = total_steps
    self._tokens = tokens_per_step
    self._mfu_at_one_step_per_s = (
      flops_per_step / peak_flops if flops_per_step and peak_flops else None
    )
    self._clock = clock
    self.start(start_step)

  def start(self, step: int) -> None:
    """Starts the clock again at `step` finished steps."""
    self._first = self._last = (step, self._clock())
    self._paused = 0.0

  @contextlib.contextmanager
  def paused(self) -> Iterator[None]:
    """Time in here counts for the ETA but not for the speed."""
    begin = self._clock()
    try:
      yield
    finally:
      self._paused += self._clock() - begin

  def update(self, step: int, wait_seconds: float = 0.0) -> dict[str, float]:
    """Speed since the last call (or the start), for `step` finished steps.

    Returns:
      `steps_per_s`, `tokens_per_s`, `mfu` (0..1; absent if unknown), `data_wait` (share of
      the time, 0..1), `host_rss_mib`, `eta_s`.
    """
    now = self._clock()
    steps, seconds = step - self._last[0], now - self._last[1] - self._paused
    rate = steps / max(seconds, 1e-9)
    overall = (step - self._first[0]) / max(now - self._first[1], 1e-9)
    self._last, self._paused = (step, now), 0.0
    speed = {"steps_per_s": rate, "tokens_per_s": rate * self._tokens}
    if self._mfu_at_one_step_per_s is not None:
      speed["mfu"] = rate * self._mfu_at_one_step_per_s
    speed["data_wait"] = min(wait_seconds / max(seconds, 1e-9), 1.0)
    speed["host_rss_mib"] = machine.host_rss_mib()
    speed["eta_s"] = (self._total_steps - step) / overall if overall > 0 else math.inf
    return speed

  def line(self, step: int, values: Mapping[str, float], speed: Mapping[str, float]) -> str:
    """One greppable line: `values` by name, then `speed` (of `update`) with units."""
    total = self._total_steps
    parts = [f"step {step}/{total} {100 * step / max(total, 1):5.1f}%"]
    parts += [f"{name} {_number(value)}" for name, value in values.items()]
    parts += [f"{speed['steps_per_s']:.3g} steps/s", f"{speed['tokens_per_s']:.0f} tok/s"]
    if "mfu" in speed:
      parts.append(f"mfu {100 * speed['mfu']:.0f}%")
    parts.append(f"wait {100 * speed['data_wait']:.1f}%")
    parts.append(f"rss {speed['host_rss_mib']:.0f} MiB")
    parts.append(f"eta {duration(speed['eta_s'])}")
    return " | ".join(parts)


def duration(seconds: float) -> str:
  """Seconds as a person reads them: `45s`, `1m20s`, `2h05m`, `3d04h`, or `?` if infinite."""
  if not math.isfinite(seconds):
    return "?"
  whole = max(round(seconds), 0)
  if whole < 60:
    return f"{whole}s"
  if whole < 3600:
    return f"{whole // 60}m{whole % 60:02d}s"
  if whole < 86400:
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
  return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def plot_losses(
  metrics: str | pathlib.Path,
  png: str | pathlib.Path,
  *,
  train: str = "loss",
  validation: str = "validation/loss",
) -> None:
  """Draws the loss curve, train and held-out, of a metrics.jsonl on a log scale.

  Args:
    metrics: the file that `Writer` writes.
    png: the picture to write (atomically).
    train: name of the training loss in it.
    validation: name of the held-out loss in it; it may be absent.

  Raises:
    InputError: no training loss in the file, or matplotlib is not installed.
  """
  fig = _figure((7, 4))
  records = read_metrics(metrics)
  axes = fig.add_subplot()
  for name, label, marker in ((train, "train", ""), (validation, "held out", "o")):
    points = [(r["step"], r[name]) for r in records if r.get(name) is not None]
    if points:
      axes.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=4)
    elif name == train:
      raise InputError(f"{metrics} has no value of {train!r} to plot")
  axes.set(xlabel="step", ylabel="loss", yscale="log")
  axes.grid(True, which="both", alpha=0.3)
  axes.legend()
  _save_figure(fig, png)


def plot_held_out(losses: Mapping[str, Mapping[str, float]], png: str | pathlib.Path) -> None:
  """Draws the held-out losses of several models: all, by noise level, by clip index.

  Args:
    losses: by name of the model, what `held_out.Loss` gives.
    png: the picture to write (atomically).

  Raises:
    InputError: matplotlib is not installed.
  """
  fig = _figure((11, 4))
  axes = fig.subplots(1, 3, sharey=True)
  names = [pathlib.PurePath(name).name for name in losses]
  if len(set(names)) < len(names):
    names = list(losses)
  axes[0].plot(names, [values["loss"] for values in losses.values()], color="0.7", zorder=0)
  for name, values in zip(names, losses.values(), strict=True):
    axes[0].plot([name], [values["loss"]], marker="o")
    for panel, kind in ((axes[1], "noise"), (axes[2], "clip")):
      found = {int(key.rpartition("/")[2]): value for key, value in values.items()
               if key.startswith(f"loss_by_{kind}/")}
      panel.plot(list(found), list(found.values()), marker="o", markersize=4, label=name)
  axes[0].set(ylabel="held-out loss", yscale="log")
  axes[0].tick_params(axis="x", rotation=30)
  axes[1].set(xlabel="noise level, 0 the noisiest")
  axes[2].set(xlabel="clip index, the last all later ones")
  for panel in axes:
    panel.grid(True, which="both", alpha=0.3)
  axes[2].legend()
  _save_figure(fig, png)


def _figure(size: tuple[float, float]) -> Any:
  try:
    from matplotlib import figure  # an extra: training does without it
  except ImportError as error:
    raise InputError("plots need matplotlib: pip install 'videogpt_jax[demo]'") from error
  return figure.Figure(figsize=size, layout="constrained")


def _save_figure(fig: Any, png: str | pathlib.Path) -> None:
  buffer = io.BytesIO()
  fig.savefig(buffer, format="png", dpi=120)
  path = pathlib.Path(png)
  with _writing(path.parent):
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace(path, buffer.getvalue())


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
  """The records of a metrics.jsonl in order; a last line that a kill cut short is left out.

  Raises:
    InputError: the file is missing, or another line of it is not JSON.
  """
  try:
    lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
  except OSError as error:
    raise InputError(f"cannot read metrics: {error}") from error
  records = []
  for number, line in enumerate(lines[:-1], start=1):  # a whole line ends with a newline
    try:
      records.append(json.loads(line))
    except ValueError as error:
      raise InputError(f"{path}, line {number} is not JSON ({error}); mend or remove it") from error
  return records


def _drop_tail(path: pathlib.Path, start_step: int) -> None:
  """Rewrites a metrics file without the records of `start_step` and later, atomically."""
  if path.exists():
    kept = [record for record in read_metrics(path) if record["step"] < start_step]
    files.replace(path, "".join(json.dumps(record) + "\n" for record in kept).encode())


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise InputError(f"cannot write to {folder}: {error}") from error


def _number(value: float) -> str:
  """Short and of stable width: plain where that is readable, else an exponent."""
  value = float(value)
  plain = value == 0 or 1e-2 <= abs(value) < 1e5
  return f"{value:.4g}" if plain else f"{value:.2e}"
