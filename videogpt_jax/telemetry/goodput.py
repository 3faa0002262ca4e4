"""Where the wall time of a run goes, from its first start on, restarts included.

A process is in one phase at any moment, so the phases of a run add up to its wall time:

  start       reading data and checkpoint, building, waiting for the first batch
  compile     the first step on batches of each shape
  step        steps whose update the model has kept: the good time
  data_wait   the device stood idle because the next batch was not there
  checkpoint  the loop was held by a save (what a save does in the background costs nothing)
  evaluation  held-out loss and videos
  profile     starting traces and writing them
  lost        steps whose update was skipped, or undone by a return to an older checkpoint
  down        between the last sign of life of a process and the start of the next one

Goodput is the share of `step`. Times between processes are taken from the time stamps of the
records; a killed process was alive for a little longer than its last record says, and that
time counts as `down`. So does the time of importing packages, but for the first start.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import time
from typing import Any

START = "start"
COMPILE = "compile"
STEP = "step"
DATA_WAIT = "data_wait"
CHECKPOINT = "checkpoint"
EVALUATION = "evaluation"
PROFILE = "profile"
LOST = "lost"
DOWN = "down"
PHASES = (START, COMPILE, STEP, DATA_WAIT, CHECKPOINT, EVALUATION, PROFILE, LOST, DOWN)

Record = dict[str, Any]


def share(totals: Mapping[str, float]) -> float:
  """Share of the wall time, 0..1, that went into steps which count: the goodput."""
  return totals[STEP] / max(sum(totals.values()), 1e-9)


@dataclasses.dataclass
class _Span:
  """Good time by step: `seconds` were spent on the steps after `first`, up to `last`."""

  first: int
  last: int
  seconds: float


class Account:
  """The time of a run, split among phases. Made when a process starts, it is in `start`.

  What it must know after a restart goes out as records: JSON-able, each with the time
  stamp, the number of finished steps and the seconds by phase since the one before.

  Args:
    clock: seconds that never jump; another one for tests.
    now: seconds since 1970, comparable between processes and hosts.
  """

  def __init__(self, clock: Callable[[], float] = time.monotonic,
               now: Callable[[], float] = time.time) -> None:
    self.clock = clock
    self._now = now
    self._began = now()
    self._phase, self._since = START, clock()
    self._spent = dict.fromkeys(PHASES, 0.0)  # by this process
    self._recorded = dict(self._spent)
    self._history = _History()
    self._write: Callable[[Record], None] = lambda record: None

  def open(self, earlier: Sequence[Record], step: int, write: Callable[[Record], None]) -> None:
    """Goes on from the records of earlier processes.

    Args:
      earlier: all records so far; what they did beyond `step` is lost.
      step: number of finished steps that this process starts from.
      write: keeps a record.
    """
    for record in earlier:
      self._history.add(record)
    down = self._history.down_until(self._began)
    self._spent[DOWN] += down
    self._write = write
    self.record(step, "start")

  def enter(self, name: str) -> None:
    """Counts the time from here on, outside of other phases, as `name`."""
    self._switch(name)

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Counts the time in here as `name`; phases may stand in one another."""
    before = self._switch(name)
    try:
      yield
    finally:
      self._switch(before)

  def move(self, source: str, target: str, seconds: float) -> None:
    """Counts so many seconds of this process, already counted as `source`, as `target`."""
    self._switch(self._phase)
    self._spent[source] -= seconds
    self._spent[target] += seconds

  def spent(self) -> dict[str, float]:
    """Seconds by phase in this process; what a return to an older step undoes included."""
    self._switch(self._phase)
    return dict(self._spent)

  def totals(self) -> dict[str, float]:
    """Seconds by phase since the first start of the run; they add up to its wall time."""
    spent = self.spent()
    return {name: self._history.seconds[name] + spent[name] - self._recorded[name]
            for name in PHASES}

  def record(self, step: int, event: str = "") -> None:
    """Keeps the time since the last record, for `step` finished steps.

    Args:
      step: number of finished steps.
      event: "start": a process begins at `step`, and later steps are undone; "back": the
        run itself returns to `step` (record the step that it had reached before); "end":
        nothing is left to do, and the time without a process from here on does not count.
    """
    spent = self.spent()
    seconds = {name: round(spent[name] - self._recorded[name], 6) for name in PHASES}
    record = {"time": self._now(), "step": int(step),
              "seconds": {name: value for name, value in seconds.items() if value}}
    if event:
      record["event"] = event
    self._recorded = spent
    self._history.add(record)
    self._write(record)

  def table(self) -> str:
    """Where the time went, a line for each phase that took any."""
    totals = self.totals()
    wall = max(sum(totals.values()), 1e-9)
    starts = self._history.starts
    lines = [f"where the time went since the first start ({starts} start{'s' * (starts != 1)}):"]
    for name in PHASES:
      if totals[name] >= 0.0005:
        lines.append(f"  {name:<10} {totals[name]:>12.1f} s {100 * totals[name] / wall:>6.1f}%")
    lines.append(f"  {'all':<10} {wall:>12.1f} s, goodput {100 * share(totals):.1f}%")
    return "\n".join(lines)

  def _switch(self, phase: str) -> str:
    """Ends the phase, begins another; returns the ended one."""
    now = self.clock()
    self._spent[self._phase] += now - self._since
    before, self._phase, self._since = self._phase, phase, now
    return before


class _History:
  """The sum of all records: seconds by phase, and which steps the good ones belong to."""

  def __init__(self) -> None:
    self.seconds = dict.fromkeys(PHASES, 0.0)
    self.starts = 0
    self._spans: list[_Span] = []
    self._step = 0
    self._last: tuple[float, str] | None = None  # time stamp and event of the last record

  def add(self, record: Mapping[str, Any]) -> None:
    """Takes the next record."""
    step, event, seconds = record["step"], record.get("event", ""), record["seconds"]
    for name, value in seconds.items():
      self.seconds[name] = self.seconds.get(name, 0.0) + value
    if seconds.get(STEP):
      self._spans.append(_Span(min(self._step, step), max(self._step, step), seconds[STEP]))
    if event in ("start", "back"):
      self._undo(step)
    self.starts += event == "start"
    self._step, self._last = step, (record["time"], event)

  def down_until(self, moment: float) -> float:
    """Seconds without a process before `moment`; none if the run was complete."""
    if self._last is None or self._last[1] == "end":
      return 0.0
    return max(moment - self._last[0], 0.0)

  def _undo(self, step: int) -> None:
    """Counts the time of steps after `step` as lost; in part where a span reaches across."""
    while self._spans and self._spans[-1].last > step:
      span = self._spans.pop()
      kept = max(step - span.first, 0) / max(span.last - span.first, 1) * span.seconds
      self.seconds[STEP] -= span.seconds - kept
      self.seconds[LOST] += span.seconds - kept
      if kept:
        self._spans.append(_Span(span.first, step, kept))
