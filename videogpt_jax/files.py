"""Files that appear whole or not at all."""

import contextlib
import json
import os
import pathlib
from typing import Any

from videogpt_jax import errors


def replace(path: str | os.PathLike[str], data: bytes) -> None:
  """Writes a file under a temporary name beside it, then puts it in its place.

  Raises:
    InputError: it cannot be written (`StorageError`: for now); what was there is whole.
  """
  path = pathlib.Path(path)
  temporary = path.with_name(f".{path.name}.tmp")
  try:
    temporary.write_bytes(data)
    os.replace(temporary, path)
  except OSError as error:
    raise errors.refused(f"cannot write {path}: {error.strerror or error}", error) from error
  finally:
    with contextlib.suppress(OSError):  # gone, or as unreachable as the file
      temporary.unlink()


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  """Writes JSON as a person reads it; see `replace`."""
  replace(path, (json.dumps(value, indent=2) + "\n").encode())


def make_folder(path: str | os.PathLike[str]) -> None:
  """Makes a folder, and those above it, where missing. Raises `InputError` if it cannot."""
  try:
    os.makedirs(path, exist_ok=True)
  except OSError as error:
    raise errors.refused(f"cannot write to {path}: {error.strerror or error}", error) from error
