"""The edge of every command: parse flags, run, turn `InputError` into one clear line."""

from collections.abc import Callable, Sequence
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from typing import Any, NoReturn

from absl import app
from absl import flags
from absl import logging

from videogpt_jax.errors import InputError
from videogpt_jax.errors import StorageError

USER_ERROR_STATUS = 2
STORAGE_STATUS = 74  # "input/output error" (sysexits.h); 75 is the watchdog's
_CRASH_STATUS = 1
_FIRST_LEAVES_AFTER = 3.0  # seconds


def run(main: Callable[[], None], argv: Sequence[str] | None = None, *,
        define_flags: Callable[[], None] = lambda: None, computes: bool = False) -> None:
  """Parses the absl flags in `argv` (default: the process's) and runs `main`.

  Exits with status 2 and no traceback after an `InputError` or a flag that does
  not parse, with 74 after a `StorageError`; positional arguments are refused, since no command
  takes any. One of several processes ends at once after any error.

  Args:
    main: what to run, after the flags are parsed.
    argv: the command's name and its arguments.
    define_flags: defines flags whose definition may raise an `InputError`.
    computes: it computes long enough on a CPU to start with huge pages, see `use_huge_pages`.
  """
  if computes and argv is None:
    use_huge_pages()

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
    status = STORAGE_STATUS if isinstance(error, StorageError) else USER_ERROR_STATUS
    if _is_one_of_several():
      _leave(status)
    sys.exit(status)
  except Exception:
    if not _is_one_of_several():
      raise
    traceback.print_exc()
    _leave(_CRASH_STATUS)


_HUGE_PAGES = "glibc.malloc.hugetlb=1"


def use_huge_pages() -> None:
  """Starts this command anew, once, with memory in pages of 2 MiB, where that is worth while.

  On CPU a train step takes its buffers from the system and gives them back; with pages of 4 KiB
  this costs 10 to 20% of its time. The C library (glibc 2.35) learns it from its environment
  alone, and that is read when the process starts. Nothing happens where the system gives huge
  pages unasked or not at all, where there is an accelerator, or if GLIBC_TUNABLES is set (to
  nothing, for example).
  """
  if "GLIBC_TUNABLES" in os.environ or not _grants_huge_pages() or _has_accelerator():
    return
  os.environ["GLIBC_TUNABLES"] = _HUGE_PAGES
  sys.stdout.flush()
  sys.stderr.flush()
  os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def _grants_huge_pages() -> bool:
  """Whether the system has huge pages for those who ask, and the C library can ask."""
  try:
    told = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
    return ("[madvise]" in told and name == "glibc"
            and tuple(map(int, version.split("."))) >= (2, 35))
  except (OSError, ValueError):
    return False


def _has_accelerator() -> bool:
  names = ("nvidia[0-9]*", "accel*", "vfio/[0-9]*", "kfd")
  return any(any(pathlib.Path("/dev").glob(name)) for name in names)


def _is_one_of_several() -> bool:
  jax = sys.modules.get("jax")
  return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def _leave(status: int) -> NoReturn:
  """Ends one of several processes. Ended in good order, it would first wait for the others.

  They may be waiting for it in turn, in an exchange. The first one, whose end is an error to all
  others, leaves time to those who end of themselves.
  """
  if not sys.modules["jax"].process_index():
    time.sleep(_FIRST_LEAVES_AFTER)
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(status)


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
