"""Traces of a few steps, wanted beforehand or on demand, for xprof and Perfetto.

Written are WORKDIR/profiles/step_N_process_I, one folder a trace and process.
docs/profiling.md says how to read them.
"""

from collections.abc import Callable
import os
import pathlib

from absl import logging
import jax

from videogpt_jax import signal_file

FOLDER = "profiles"
REQUEST = "profile"
_MOST_STEPS = 1000  # a trace holds every kernel of every step: more steps is a slip


class Profiler:
  """Traces steps of this process when asked to.

  By the configuration, or at any time by the file WORKDIR/profile, which holds the number of
  steps (empty: the default). Every process of a run sees it and traces its own devices.

  Args:
    workdir: of the run.
    at: first step to trace, counted from 1; 0: none.
    steps: how many, where the file does not say.
  """

  def __init__(self, workdir: str | os.PathLike[str], at: int, steps: int) -> None:
    self._folder = pathlib.Path(workdir) / FOLDER
    self._request = signal_file.SignalFile(pathlib.Path(workdir) / REQUEST)
    self._at, self._steps = at, steps
    self._wanted = 0  # steps of the next trace
    self._tracing: tuple[pathlib.Path, int] | None = None  # where to, and the last step

  def due(self, step: int) -> bool:
    """Whether something is to be done before `step` begins."""
    if self._tracing:
      return step > self._tracing[1]
    if step == self._at:
      self._wanted = self._steps
      return True
    told = self._request.news()
    if told is None:
      return False
    self._wanted = _number_of_steps(told, self._steps)
    return bool(self._wanted)

  def change(self, step: int) -> str:
    """Begins or ends a trace before `step`, while the devices are idle; says what it did.

    A trace that cannot be begun or written is no reason to stop: a warning says why.
    """
    if self._tracing:
      return self.close()
    folder = self._folder / f"step_{step}_process_{jax.process_index()}"
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every call of a function; the phases of the loop say enough
    if not _safely(lambda: jax.profiler.start_trace(folder, profiler_options=options)):
      return f"no trace of step {step}"
    self._tracing = folder, step + self._wanted - 1
    return f"tracing steps {step} to {self._tracing[1]}"

  def close(self) -> str:
    """Ends a trace under way and writes it; says where, or "" if there is none."""
    if not self._tracing:
      return ""
    folder, _ = self._tracing
    self._tracing = None
    return f"wrote the trace {folder}" if _safely(jax.profiler.stop_trace) else "no trace written"


def _number_of_steps(text: str, default: int) -> int:
  """What a request asks for; 0, with a warning, if that is no sensible number."""
  text = text.strip() or str(default)
  if text.isdigit() and 0 < int(text) <= _MOST_STEPS:
    return int(text)
  logging.warning("the file %r must hold a number of steps (1 to %d), not %r: nothing is traced",
                  REQUEST, _MOST_STEPS, text[:20])
  return 0


def _safely(act: Callable[[], None]) -> bool:
  try:
    act()
  except (OSError, RuntimeError, ValueError) as error:  # disk full; somebody else is tracing
    logging.warning("no trace: %s", error)
    return False
  return True
