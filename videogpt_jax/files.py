"""Files that appear whole or not at all."""

import contextlib
import json
import os
import pathlib
import re
from typing import Any

from videogpt_jax import errors
from videogpt_jax.errors import InputError


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


def check_local(path: str, name: str) -> None:
  """Raises `InputError` if a path is an address such as gs://bucket/run.

  It would be taken for a folder below the current one, which other machines do not see.

  Args:
    path: of a folder to write to.
    name: of the flag that gives it.
  """
  if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:/", path):
    raise InputError(
      f"{name}={path} is no folder of this machine: mount the bucket (Cloud Storage FUSE: gcsfuse "
      f"--implicit-dirs --rename-dir-limit=200000 BUCKET /data; --bucket of the scripts in launch/ "
      f"does it) and name the folder there, such as {name}=/data/run")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
  """Writes JSON as a person reads it; see `replace`."""
  replace(path, (json.dumps(value, indent=2) + "\n").encode())


def make_folder(path: str | os.PathLike[str], name: str = "") -> None:
  """Makes a folder, and those above it, where missing.

  Args:
    path: of the folder.
    name: of the flag that gives it, if one does.

  Raises:
    InputError: it cannot be made (`StorageError`: for now).
  """
  try:
    os.makedirs(path, exist_ok=True)
  except OSError as error:
    said = f"{name}={path}" if name else path
    raise errors.refused(f"cannot write to {said}: {error.strerror or error}", error) from error
