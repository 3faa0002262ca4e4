"""When the device is busy, told without waiting for it in the loop."""

from collections.abc import Callable
import queue
import threading
from typing import Any

import jax


class DeviceClock:
  """Notes in a thread when the newest result is finished.

  While the loop waits for a batch the device still computes the step before. Only the rest
  of that wait, in which the device stands idle, slows the training down.

  Args:
    clock: seconds, the one that the loop is timed by.
  """

  def __init__(self, clock: Callable[[], float]) -> None:
    self._clock = clock
    self._finished: float | None = None
    self._given = 0
    self._results: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=self._wait, name="device clock", daemon=True).start()

  def watch(self, result: Any) -> None:
    """The device has been given something to do that ends with `result`, a tree of arrays."""
    self._given += 1
    self._finished = None
    self._results.put((self._given, result))

  def busy(self, since: float) -> float:
    """Seconds since `since` in which the device was busy with what it was given before."""
    finished = self._finished
    if finished is None:
      finished = self._clock() if self._given else since
    return max(finished - since, 0.0)

  def close(self) -> None:
    """Ends the thread."""
    self._results.put(None)

  def _wait(self) -> None:
    while (item := self._results.get()) is not None:
      number, result = item
      try:
        jax.block_until_ready(result)
      except Exception:  # a step that failed: the loop meets the same error when it fetches
        continue
      if number == self._given:
        self._finished = self._clock()
