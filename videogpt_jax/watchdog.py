"""Says where a run hangs, on every host of it.

A step that waits for another host, a storage or a device may wait for ever, and says
nothing. A thread in each process looks at when the last step finished. If that is too long
ago it writes the stacks of all threads to stderr and to WORKDIR/stacks/PROCESS-TIME.txt, and
touches WORKDIR/stacks/hung, which the threads of the other processes see: they write theirs,
so that one can tell who waits for whom, and who is missing.

A process that hangs in foreign code which never lets Python run gets its stacks written by
`faulthandler`'s own thread, to stderr alone, and leaves no mark for the others.
"""

from collections.abc import Callable
import contextlib
import faulthandler
import os
import pathlib
import sys
import threading
import time
import traceback

from videogpt_jax import files
from videogpt_jax import signal_file
from videogpt_jax.errors import InputError

FOLDER = "stacks"
MARK = "hung"
ACTIONS = ("report", "abort")
HUNG_STATUS = 75  # "temporary failure, try again" (sysexits.h): launchers can tell it from others
COMPILATION = 3  # times the allowance of a step, for what compiles first


class Watchdog:
  """Watches one process of a run, from its making until `close`.

  Args:
    workdir: of the run, shared by its processes.
    seconds: that a step may take; a save, an evaluation or a step that compiles three times as
      many; 0 watches nothing.
    action: "report" goes on waiting; "abort" ends the process with `HUNG_STATUS` once the
      others have had time to see the mark.
    process: number of this process.
    poll: seconds between two looks at the mark.
    leave: ends the process; another one for tests.
  """

  def __init__(self, workdir: str | os.PathLike[str], seconds: float, action: str = "report", *,
               process: int = 0, poll: float = 2.0,
               leave: Callable[[int], object] = os._exit) -> None:
    self._folder = pathlib.Path(workdir) / FOLDER
    self._seconds, self._action, self._process = seconds, action, process
    self._poll, self._leave = min(poll, seconds / 8), leave
    self._mark = signal_file.SignalFile(self._folder / MARK)
    self._closed = threading.Event()
    self._beats = 0
    self._hung = self._told = -1  # the beat whose stall is our own, and the one that is reported
    self.beat(COMPILATION)
    self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
    if seconds:
      self._arm()
      self._thread.start()

  def beat(self, allowance: float = 1.0) -> None:
    """Something is finished; the next thing may take `allowance` times as long as a step."""
    self._deadline = time.monotonic() + allowance * self._seconds
    self._beats += 1

  def close(self) -> None:
    """Ends the watch."""
    self._closed.set()
    if self._thread.is_alive():
      self._thread.join()

  def _watch(self) -> None:
    try:
      while not self._closed.wait(self._poll):
        self._arm()
        self._look()
    finally:
      faulthandler.cancel_dump_traceback_later()

  def _arm(self) -> None:
    """Lets stacks be written by a thread that needs no Python, unless this is called again."""
    faulthandler.dump_traceback_later(
      self._seconds, exit=self._action == "abort", file=sys.__stderr__ or sys.stderr)

  def _look(self) -> None:
    beats = self._beats
    if time.monotonic() > self._deadline and self._hung != beats:
      self._hung = self._told = beats
      self._report(f"no step finished in the time allowed (config.train.watchdog is "
                   f"{self._seconds:g} s)")
      with contextlib.suppress(InputError):  # a full disk; the stacks are on stderr
        files.replace(self._mark.path, f"process {self._process}".encode())
      self._mark.forget()
      if self._action == "abort" and not self._closed.wait(5 * self._poll) and (
          self._beats == beats):
        self._leave(HUNG_STATUS)
    elif (told := self._mark.news()) and self._told != beats:
      self._told = beats
      self._report(f"{told} hangs")

  def _report(self, reason: str) -> None:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    path = self._folder / f"{self._process}-{stamp}.txt"
    text = f"watchdog of process {self._process}, {stamp}: {reason}\n\n{_stacks()}"
    print(text, file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):
      self._folder.mkdir(parents=True, exist_ok=True)
      with path.open("a", encoding="utf-8") as file:
        file.write(text)


def _stacks() -> str:
  """What every thread of this process is doing, the main thread first."""
  names = {thread.ident: thread.name for thread in threading.enumerate()}
  main = threading.main_thread().ident
  frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
  return "\n".join(
    f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
    for ident, frame in frames if ident != threading.get_ident())
