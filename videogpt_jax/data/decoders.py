"""Decoder processes: a video that hangs or crashes its decoder costs that video, not the run.

Every process is a fresh interpreter that runs this module and imports what `load` imports,
whatever the program that started it is. It answers over a pipe, tells now and then that it is
getting on, and ends when its parent does.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
from multiprocessing.connection import Connection
from multiprocessing.connection import Pipe
from multiprocessing.connection import wait
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from typing import Any, Generic, TypeVar

from videogpt_jax.data import load
from videogpt_jax.errors import InputError

_BEAT_S = 0.5  # between signs of life
_START_S = 300.0  # that a process may take to start
_POLL_S = 0.2  # between looks at the clock
_AHEAD = 2  # videos begun for every process, while the oldest of them is not finished

Key = TypeVar("Key")


@dataclasses.dataclass(frozen=True)
class Rejected:
  """Why a video is left out."""

  reason: str


class Decoders(Generic[Key]):
  """Processes that load items, in order; use as a context manager.

  Attributes:
    busy_s: time that the processes have spent on finished items, all together.
  """

  def __init__(self, loader: load.Loader, processes: int, timeout_s: float, tries: int = 2):
    """Starts nothing yet.

    Args:
      loader: what an item becomes.
      processes: how many work at once.
      timeout_s: without a sign of life for so long a process is killed.
      tries: of an item whose process ends or is killed: the first may have been bad luck.
    """
    self._loader, self._timeout, self._tries = pickle.dumps(loader), timeout_s, tries
    self._workers: list[_Worker | None] = [None] * processes
    self.processes, self.busy_s = processes, 0.0

  def __enter__(self) -> "Decoders[Key]":
    return self

  def __exit__(self, *exception: object) -> None:
    for worker in self._workers:
      if worker is not None:
        worker.kill()

  def load(self, items: Iterable[tuple[Key, Any]], tick: Callable[[], None] = lambda: None
           ) -> Iterator[tuple[Key, Any]]:
    """What the loader makes of every item, or `Rejected`, in the order of the items.

    Args:
      items: keys, which are given back, and items.
      tick: called now and then.

    Raises:
      InputError: decoder processes cannot be started.
    """
    source = enumerate(items)
    begun: dict[int, _Task] = {}  # by number, ascending
    queue: list[_Task] = []  # to be begun again before all others
    exhausted = False
    while True:
      while begun and (result := begun[head := next(iter(begun))].result) is not None:
        yield begun.pop(head).key, result
      for place in range(self.processes):
        worker = self._workers[place]
        if worker is not None and worker.task is not None:
          continue
        if not queue and not exhausted and len(begun) < _AHEAD * self.processes:
          try:
            number, (key, item) = next(source)
          except StopIteration:
            exhausted = True
          else:
            queue.append(_Task(key, item))
            begun[number] = queue[-1]
        if queue:
          if worker is None:
            worker = self._workers[place] = _Worker(self._loader)
          worker.begin(queue.pop(0))
      if exhausted and not begun:
        return
      tick()
      queue += self._attend()

  def _attend(self) -> list["_Task"]:
    """Waits for news of the processes; returns the tasks that have to be tried again."""
    working = {worker.pipe: (place, worker) for place, worker in enumerate(self._workers)
               if worker is not None and worker.task is not None}
    again: list[_Task] = []
    ready = wait(list(working), _POLL_S)
    for pipe, (place, worker) in working.items():
      task, problem = worker.task, ""
      assert task is not None
      if pipe in ready:
        try:
          self.busy_s += worker.receive()
        except (EOFError, OSError):
          problem = worker.ended()
      elif time.monotonic() - worker.heard > self._patience(worker) and not worker.pipe.poll():
        problem = f"decoder hung: no frame for {self._patience(worker):g} s"
      if problem:
        worker.kill()
        self._workers[place] = None
        if not worker.ready:
          raise InputError(f"a decoder process does not start: {problem}")
        task.failures += 1
        if task.failures < self._tries:
          again.append(task)
        else:
          task.result = Rejected(f"{problem}, {self._tries} times")
    return again


  def _patience(self, worker: "_Worker") -> float:
    """How long a process may be silent, s; the start on a busy machine is no video's fault."""
    return self._timeout if worker.ready else max(self._timeout, _START_S)


@dataclasses.dataclass
class _Task:
  """An item on its way."""

  key: Any
  item: Any
  failures: int = 0
  result: Any = None  # until it is there


class _Worker:
  """The parent's end of one process."""

  def __init__(self, loader: bytes):
    self.pipe, theirs = Pipe()
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    self._process = subprocess.Popen(
      [sys.executable, "-m", __name__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
      env={**os.environ, "PYTHONPATH": path}, stdin=subprocess.DEVNULL)
    theirs.close()
    self.pipe.send_bytes(loader)
    self.task: _Task | None = None
    self.ready, self.heard = False, time.monotonic()

  def begin(self, task: _Task) -> None:
    """Sends an item; a process that is gone shows at the next `receive`."""
    self.task, self.heard = task, time.monotonic()
    with contextlib.suppress(OSError):
      self.pipe.send(task.item)

  def receive(self) -> float:
    """Takes what the process says; returns the time spent on a finished item, s."""
    kind, *content = pickle.loads(self.pipe.recv_bytes())
    self.heard = time.monotonic()
    if kind == "ready":
      self.ready = True
      return 0.0
    if kind == "beat":
      return 0.0
    assert self.task is not None
    result, seconds = content
    self.task.result = Rejected(result) if kind == "rejected" else result
    self.task = None
    return seconds

  def ended(self) -> str:
    """How a process whose pipe is closed has ended."""
    try:
      status = self._process.wait(timeout=5)
    except subprocess.TimeoutExpired:
      return "decoder closed its pipe"
    if status < 0:
      return f"decoder crashed (signal {-status}, {signal.Signals(-status).name})"
    return f"decoder ended with status {status}"

  def kill(self) -> None:
    """Ends the process at once."""
    self._process.kill()
    self._process.wait()
    self.pipe.close()


# In the process ---------------------------------------------------------------------------


def _work(pipe: Connection) -> None:
  """Answers items until the parent closes the pipe."""
  loader = pickle.loads(pipe.recv_bytes())
  last = 0.0

  def send(*message: Any) -> None:
    pipe.send_bytes(pickle.dumps(message, protocol=5))

  def beat() -> None:
    nonlocal last
    if time.monotonic() - last > _BEAT_S:
      last = time.monotonic()
      send("beat")

  send("ready")
  while True:
    try:
      item = pipe.recv()
    except EOFError:
      return
    start = time.perf_counter()
    try:
      result, kind = loader(item, beat), "loaded"
    except InputError as error:
      result, kind = str(error), "rejected"
    except Exception as error:  # a decoder's own defect costs its video only
      result, kind = f"decoder failed: {type(error).__name__}: {error}", "rejected"
    send(kind, result, time.perf_counter() - start)


def _end_with_parent(parent: int) -> None:
  while os.getppid() == parent:
    time.sleep(_POLL_S)
  os._exit(1)  # the main thread may be waiting for a parent that is gone


if __name__ == "__main__":
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the parent decides
  threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
  _work(Connection(int(sys.argv[1])))
