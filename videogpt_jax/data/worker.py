"""What every worker process owes the process that started it."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading


def obey_parent(*signals: signal.Signals) -> None:
  """Makes this worker process end when its parent does, and not before.

  Without this a parent that is killed leaves its workers behind for good, with all their
  memory; and signals that go to a whole group of processes (Ctrl-C, job managers) take
  away the workers of a parent that still has a step to finish.

  Args:
    *signals: to be ignored besides SIGINT.
  """
  for number in (signal.SIGINT, *signals):
    signal.signal(number, signal.SIG_IGN)
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None, "only worker processes have a parent to obey"
  multiprocessing.connection.wait([parent.sentinel])
  os._exit(1)  # the main thread may be waiting for a parent that is gone
