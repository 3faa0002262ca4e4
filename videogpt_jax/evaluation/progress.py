"""How far an evaluation is, on stdout."""

from collections.abc import Callable
import time

from videogpt_jax import telemetry


class Progress:
  """One line a piece of work: how much is done, and when the rest will be.

  Args:
    what: is counted, such as "videos".
    total: how many this process has to do.
    clock: seconds; another one for tests.
  """

  def __init__(self, what: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
    self._what, self._total, self._clock = what, total, clock
    self._began, self._done = clock(), 0

  def add(self, count: int = 1) -> None:
    """So many more are done."""
    self._done += count
    seconds = max(self._clock() - self._began, 1e-9)
    left = seconds / self._done * (self._total - self._done)
    print(f"{self._done}/{self._total} {self._what} | {self._done / seconds:.3g} {self._what}/s | "
          f"eta {telemetry.duration(left)}", flush=True)
