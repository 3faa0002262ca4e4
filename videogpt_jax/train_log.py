"""What the loop tells about its steps, and the time that each part of it takes."""

from collections.abc import Iterator, Sequence
import contextlib

from absl import logging
import jax
from ml_collections import ConfigDict
import numpy as np

from videogpt_jax import flops
from videogpt_jax import held_out
from videogpt_jax import machine
from videogpt_jax import step as step_lib
from videogpt_jax import telemetry
from videogpt_jax import watchdog
from videogpt_jax.data import pipeline
from videogpt_jax.errors import InputError
from videogpt_jax.telemetry import device_clock
from videogpt_jax.telemetry import goodput
from videogpt_jax.telemetry import profiles


class TrainLog:
  """Fetches the metrics of steps, one step late, and writes them at the cadence of the log.

  The parts of the loop stand in `waiting`, `stepping` and `aside`, by which their time is
  accounted for, the watchdog hears that they end, and traces show them by name.

  Args:
    config: of the run.
    recipe: of its step.
    source: videos that it trains on.
    writer: of its metrics.
    account: of its time, not opened yet.
    dog: hears of every step and whatever else ends.
    start: number of finished steps that this process starts from.
  """

  def __init__(self, config: ConfigDict, recipe: step_lib.Recipe, source: pipeline.Mixture,
               writer: telemetry.Writer | telemetry.Silent, account: goodput.Account,
               dog: watchdog.Watchdog, *, workdir: str, start: int) -> None:
    self._config, self._writer, self._account, self._dog = config, writer, account, dog
    self._profiler = profiles.Profiler(workdir, config.log.profile_at, config.log.profile_steps)
    self._progress = _progress(config, recipe, source, account)
    self._device = device_clock.DeviceClock(account.clock)
    self._late: tuple[int, step_lib.Metrics, bool] | None = None  # the last: it compiled
    self._fetched: list[dict[str, np.ndarray]] = []
    self.skipped = 0  # updates skipped in a row, up to the last step fetched
    self._timed = 0  # of them, those whose time is in the account as that of steps
    self._shapes: set[tuple[int, ...]] = set()
    self._compiling = self._finished = False
    self._done = start
    if start < config.train.steps:
      account.open(writer.timings(), start, writer.timing)
    self._line_before = self._fetch_before = account.spent()

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    """Around the wait for a batch."""
    phase = goodput.DATA_WAIT if self._shapes else goodput.START
    began, before = self._account.clock(), self._account.spent()[phase]
    with self._account.phase(phase), jax.profiler.TraceAnnotation(phase):
      yield
    if self._shapes:  # while the device computes, nothing is lost by waiting
      waited = self._account.spent()[phase] - before
      self._account.move(phase, goodput.STEP, min(self._device.busy(since=began), waited))

  @contextlib.contextmanager
  def stepping(self, step: int, shape: Sequence[int]) -> Iterator[None]:
    """Around a step on a batch of that shape, its `add` included."""
    if self._profiler.due(step):
      self.catch_up()
      with self._account.phase(goodput.PROFILE):
        self._writer.say(self._profiler.change(step))
    self._compiling = tuple(shape) not in self._shapes
    annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
    if not self._compiling:
      with annotation:
        yield
    else:
      self.catch_up()
      self._dog.beat(watchdog.COMPILATION)
      with self._account.phase(goodput.COMPILE), annotation:
        began = self._account.clock()
        yield
      self._compiled(step, shape, self._account.clock() - began)
    self._done = step
    self._dog.beat()

  @contextlib.contextmanager
  def aside(self, phase: str) -> Iterator[None]:
    """Around what is no step: a save, an evaluation."""
    self._dog.beat(watchdog.COMPILATION)
    with self._account.phase(phase), jax.profiler.TraceAnnotation(phase):
      yield
    self._dog.beat()

  def add(self, step: int, metrics: step_lib.Metrics) -> None:
    """Takes the metrics of a step under way, and fetches those of the step before."""
    self.catch_up()
    self._late = step, metrics, self._compiling
    self._device.watch(metrics)
    if self._compiling:
      jax.block_until_ready(metrics)

  def catch_up(self) -> None:
    """Fetches the metrics that were left on the device; waits for their step."""
    if self._late is None:
      return
    step, metrics, compiled = self._late
    self._late = None
    self._fetched.append(jax.device_get(metrics))
    self._timed += not compiled
    self.skipped = int(self._fetched[-1]["bad_steps"])
    self._account_for_fetch(kept=not self.skipped)
    if self.skipped:
      logging.warning("step %d: update skipped (%d in a row), loss or gradient is not finite or "
                      "far larger than usual", step, self.skipped)
    if step % self._config.log.every == 0 or step == self._config.train.steps:
      self._write(step)

  def went_back(self, step: int, good: int) -> None:
    """After `step` the parameters are those of step `good` again: what lies between is lost."""
    self.skipped = 0
    self._account.record(step)
    self._account.record(good, "back")

  def saved(self, step: int) -> None:
    """A checkpoint of `step` is on its way: from here on the time of later steps may be lost."""
    self._account.record(step)
    self._writer.sync()

  def finish(self) -> None:
    """Closes the account after the last step, and says where the time went."""
    self._end_trace()
    self._account.record(self._done, "end" if self._done == self._config.train.steps else "")
    self._finished = True
    self._writer.say(self._account.table())

  def close(self) -> None:
    """Ends what runs beside the loop; a trace under way is written."""
    self._end_trace()
    self._device.close()
    if not self._finished:  # an error ends the run, and is more important than this record
      with contextlib.suppress(InputError):
        self._account.record(self._done)

  def _end_trace(self) -> None:
    with self._account.phase(goodput.PROFILE):
      if said := self._profiler.close():
        self._writer.say(said)

  def _account_for_fetch(self, kept: bool) -> None:
    """Ends the time of a step; it is lost if its update was not kept."""
    if not kept:
      seconds = self._account.spent()[goodput.STEP] - self._fetch_before[goodput.STEP]
      self._account.move(goodput.STEP, goodput.LOST, seconds)
    self._fetch_before = self._account.spent()

  def _compiled(self, step: int, shape: Sequence[int], seconds: float) -> None:
    """Tells of a step that compiled, and lets the clock of the ETA start after the first."""
    if self._shapes:
      self._writer.say(f"step {step} took {seconds:.1f} s: it was compiled for batches of "
                       f"{'x'.join(map(str, shape))}")
    else:
      self._writer.say(f"first step done after {seconds:.1f} s (compilation included)")
      self._progress.start(step)
      self._account.enter(goodput.STEP)
    self._shapes.add(tuple(shape))

  def _write(self, step: int) -> None:
    """One line, TensorBoard and JSONL for the steps fetched since the last one."""
    total = held_out.add_up(self._fetched)
    values = held_out.means(total)
    values["grad_norm"] = float(total["grad_norm"] / len(self._fetched))
    values["learning_rate"] = float(self._fetched[-1]["learning_rate"])
    values["skipped"] = float(self._fetched[-1]["skipped"])
    spent = self._account.spent()
    seconds = {name: spent[name] - self._line_before[name] for name in goodput.PHASES}
    speed = self._progress.update(step, self._timed, seconds)
    speed |= {f"{name}_s": seconds[name] for name in (goodput.CHECKPOINT, goodput.EVALUATION)}
    totals = self._account.totals()
    speed["goodput"] = goodput.share(totals)
    self._fetched.clear()
    self._timed, self._line_before = 0, spent
    self._account.record(step)
    times = {f"time/{name}": value for name, value in totals.items()}
    alive = sum(totals.values()) - totals[goodput.DOWN]
    self._writer.scalars(step, {**values, **speed, **times, "train_seconds": alive})
    shown = {"loss": values["loss"], "gnorm": values["grad_norm"], "lr": values["learning_rate"]}
    if values["skipped"]:
      shown["skipped"] = values["skipped"]
    self._writer.say(self._progress.line(step, shown, speed))


def _progress(config: ConfigDict, recipe: step_lib.Recipe, source: pipeline.Mixture,
              account: goodput.Account) -> telemetry.Progress:
  cost = _expected_cost(config, recipe, source)
  return telemetry.Progress(
    config.train.steps, tokens_per_step=cost.tokens, flops_per_step=cost.total,
    peak_flops=machine.peak_flops(), clock=account.clock)


def _expected_cost(config: ConfigDict, recipe: step_lib.Recipe,
                   source: pipeline.Mixture) -> flops.Cost:
  """Of a step, over the sizes of frames."""
  data = config.data
  shares = pipeline.buckets(source, data.frames, tuple(data.interval))
  costs = [(share, flops.training(recipe.model, recipe.objective, config.train.batch_size,
                                  (data.frames, *size, recipe.codec.channels)))
           for size, share in shares.items()]
  return flops.expected(costs)
