"""The edge of every command: parse flags, run, turn `InputError` into one clear line."""

from collections.abc import Callable, Sequence
import signal
import sys
import threading
from typing import Any

from absl import app
from absl import flags
from absl import logging

from videogpt_jax.errors import InputError

USER_ERROR_STATUS = 2


def run(main: Callable[[], None], argv: Sequence[str] | None = None, *,
        define_flags: Callable[[], None] = lambda: None) -> None:
  """Parses the absl flags in `argv` (default: the process's) and runs `main`.

  Flags whose definition may raise an `InputError` are defined by `define_flags`.

  Exits with status 2 and no traceback after an `InputError` or a flag that does
  not parse; positional arguments are refused, since no command takes any.
  """

  def guarded(args: Sequence[str]) -> None:
    if len(args) > 1:
      raise InputError(f"unexpected argument {args[1]!r}; options start with `--` (see --help)")
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # absl's default would show all that orbax does
    main()

  try:
    define_flags()
    app.run(guarded, argv=list(argv) if argv is not None else None, flags_parser=_parse)
  except InputError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(USER_ERROR_STATUS)


def _parse(argv: Sequence[str]) -> list[str]:
  try:
    remaining = flags.FLAGS(list(argv))
    if "config" in flags.FLAGS:
      hasattr(flags.FLAGS.config, "keys")  # raises what hindered the file's loading, if anything
    return remaining
  except (flags.Error, AttributeError, KeyError, OSError) as error:  # unknown leaves of --config
    raise InputError(_plain(error)) from error


def _plain(error: Exception) -> str:
  """The message without the quotes that KeyError and ml_collections put around it.

  Of a whole traceback in the message the first and the last line are kept.
  """
  text = error.args[0] if error.args else error
  while isinstance(text, BaseException) and text.args:
    text = text.args[0]
  lines = [line.strip() for line in str(text).splitlines() if line.strip()]
  return "; ".join(lines if len(lines) <= 2 else (lines[0].rstrip(":"), lines[-1]))


class stop_signal:
  """Turns SIGTERM and the first Ctrl-C into an event, so that a step is never cut short.

  Job managers send SIGTERM more than once; only a second Ctrl-C is impatient.
  """

  def __enter__(self) -> threading.Event:
    self._event = threading.Event()
    self._previous = {}
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._handle)
    return self._event

  def _handle(self, number: int, frame: Any) -> None:
    if self._event.is_set() and number == signal.SIGINT:
      raise KeyboardInterrupt
    self._event.set()

  def __exit__(self, *exception: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
