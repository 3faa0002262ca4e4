"""Files of one JSON object a line, as a kill may leave them."""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import json
import pathlib
from typing import Any, TextIO

from videogpt_jax import errors
from videogpt_jax import files
from videogpt_jax.errors import InputError

METRICS_FILE = "metrics.jsonl"


def read_metrics(path: str | pathlib.Path) -> list[dict[str, Any]]:
  """The records of such a file in order; a last line that a kill cut short is left out.

  Raises:
    InputError: the file is missing, or another line of it is not JSON.
    StorageError: the system refuses to read it for now.
  """
  try:
    lines = pathlib.Path(path).read_text(encoding="utf-8").split("\n")
  except OSError as error:
    raise errors.refused(f"cannot read metrics: {error}", error) from error
  records = []
  for number, line in enumerate(lines[:-1], start=1):  # a whole line ends with a newline
    try:
      records.append(json.loads(line))
    except ValueError as error:
      raise InputError(f"{path}, line {number} is not JSON ({error}); mend or remove it") from error
  return records


def reopen(
  path: pathlib.Path, keep: Callable[[Mapping[str, Any]], bool] = lambda record: True
) -> TextIO:
  """Opens such a file to append to it, without the records that `keep` refuses.

  A last line that a kill cut short goes too. Raises `InputError` as `read_metrics` does.
  """
  if path.exists():
    kept = [record for record in read_metrics(path) if keep(record)]
    files.replace(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
  return path.open("a", encoding="utf-8")


@contextlib.contextmanager
def writing(folder: pathlib.Path) -> Iterator[None]:
  """Turns what the system refuses to write into an `InputError` or a `StorageError`."""
  try:
    yield
  except OSError as error:
    raise errors.refused(f"cannot write to {folder}: {error}", error) from error
