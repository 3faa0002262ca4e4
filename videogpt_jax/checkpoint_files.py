"""A checkpoint on disk: what it consists of, whether it is whole, and what is in it.

It is the folder WORKDIR/checkpoints/STEP with `state` (nested dicts of arrays), `extra` (JSON:
configuration and data fingerprint) and `checksums.json`, by which one that was damaged after it
was written is told from a whole one. Nothing here writes but `seal`, so the checkpoints of a run
that still trains may be read.
"""

from collections.abc import Callable
import dataclasses
import functools
import json
import logging as std_logging
import os
import pathlib
import stat
import time
from typing import Any, Literal, NamedTuple, TypeVar
import zlib

from absl import logging
from etils import epath
from flax import traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp

from videogpt_jax import errors
from videogpt_jax.errors import InputError

T = TypeVar("T")

FOLDER = "checkpoints"
STATE = "state"
EMA = "ema"  # entry of the state: parameters averaged over steps; some runs keep none
PARAMS = "params"
EXTRA = "extra"
HELD_OUT = "held_out"  # in EXTRA: the held-out loss at the step, if it was measured
CHUNK_BYTES = 128 << 20  # of the stored arrays: a part of one can be read alone, and in parallel

MISSING = (FileNotFoundError, NotADirectoryError)  # an answer: it is not there
_CHECKSUMS = "checksums.json"
_ORBAX_METADATA = "_CHECKPOINT_METADATA"
_READ_AGAIN = (0.5, 2.0, 8.0)  # seconds to wait before what could not be read is read again


def load_params(
  path: str | pathlib.Path, which: Literal["ema", "params"] = "ema"
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Parameters for prediction, without knowing the model beforehand.

  Changes nothing on disk, so a run that still trains may be read.

  Args:
    path: a workdir (its newest whole checkpoint is read) or the folder of one checkpoint.
    which: the entry of the saved state to read; where no EMA was kept, that is the parameters.

  Returns:
    (nested dict of numpy arrays, configuration as a nested dict).

  Raises:
    InputError: no checkpoint there, none whole, or no such entry in it.
  """
  folder, entry, tree = _entry(path, which)
  return restore(folder, {entry: tree})[entry], read_extra(folder)["config"]


def _entry(path: str | pathlib.Path, which: str) -> tuple[pathlib.Path, str, Any]:
  """The folder of the checkpoint that `path` means, and of one entry of its state name and tree."""
  folder = find(pathlib.Path(path).absolute())
  tree = saved_tree(folder)
  if which == EMA and EMA not in tree:
    which = PARAMS
  if which not in tree:
    raise InputError(f"{folder} holds no {which!r}, only {', '.join(sorted(tree))}")
  return folder, which, tree[which]


def restore(folder: pathlib.Path, wanted: dict[str, Any], how: Any = None) -> dict[str, Any]:
  """The part of the saved state that the tree `wanted` names; by default as numpy arrays."""
  numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
  return ocp.PyTreeCheckpointHandler().restore(
    epath.Path(folder / STATE),
    args=ocp.args.PyTreeRestore(item=wanted, restore_args=how or numpy, partial_restore=True),
  )


@dataclasses.dataclass(frozen=True)
class SavedLeaf:
  """A parameter in a checkpoint, not read yet."""

  folder: pathlib.Path
  keys: tuple[str, ...]
  shape: tuple[int, ...]
  dtype: np.dtype

  def read(self, dtype: Any = None) -> np.ndarray:
    """The parameter, as stored or in another type."""
    wanted = jax.ShapeDtypeStruct(self.shape, self.dtype)
    restored = restore(self.folder, traverse_util.unflatten_dict({self.keys: wanted}))
    return traverse_util.flatten_dict(restored)[self.keys].astype(dtype or self.dtype, copy=False)


class SavedParams(NamedTuple):
  """Parameters in a checkpoint by path `a/b/c`, and what was saved beside them.

  That is the configuration and, if they are adapters, a record of their base.
  """

  leaves: dict[str, SavedLeaf]
  config: dict[str, Any]
  base: dict[str, Any] | None


def open_params(
  path: str | pathlib.Path, which: Literal["ema", "params"] = "ema"
) -> SavedParams:
  """As `load_params`, without reading the parameters. Raises `InputError` as it does."""
  folder, entry, tree = _entry(path, which)
  leaves = {name: SavedLeaf(folder, (entry, *name.split("/")), leaf.shape, np.dtype(leaf.dtype))
            for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}
  extra = read_extra(folder)
  return SavedParams(leaves, extra["config"], extra.get("base"))


def seal(folder: pathlib.Path) -> None:
  """Writes the checksums of all files of a checkpoint, without which it does not count."""
  sums = {}
  for item in (STATE, EXTRA):
    for path in sorted((folder / item).rglob("*")):
      if path.is_file():
        sums[path.relative_to(folder).as_posix()] = [path.stat().st_size, _crc32(path)]
  (folder / _CHECKSUMS).write_text(json.dumps(sums))


def find(path: pathlib.Path) -> pathlib.Path:
  """The folder of the checkpoint that `path` means; see `load_params`."""
  if (path / _CHECKSUMS).is_file():
    reason = damage(path)
    if reason:
      raise InputError(f"the checkpoint {path} is damaged: {reason}")
    return path
  directory = path / FOLDER
  if not directory.is_dir():
    raise InputError(f"no checkpoint in {path}: expected a workdir with a folder {FOLDER!r} in it "
                     "(or, for weights under the published names, config.json)")
  for step in steps(directory):
    reason = damage(directory / str(step))
    if not reason:
      return directory / str(step)
    logging.warning("checkpoint %s is skipped: %s", directory / str(step), reason)
  raise InputError(f"no whole checkpoint in {directory} yet")


def steps(directory: pathlib.Path) -> list[int]:
  """Steps of the finished checkpoints, newest first."""
  def read() -> list[str]:
    with os.scandir(directory) as entries:  # which raises where pathlib takes errors for "no"
      return [entry.name for entry in entries if entry.is_dir()]

  names = patiently(directory, read)
  return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def has_all_files(folder: pathlib.Path) -> bool:
  """Whether nothing of a checkpoint has been deleted; a look at names alone.

  Raises `StorageError` where the system does not answer: then nothing is known.
  """
  try:
    sums = json.loads(_text(folder / _CHECKSUMS))
  except InputError:
    raise
  except (*MISSING, ValueError):
    return False
  return all(_size(folder / name) is not None for name in (_ORBAX_METADATA, *sums))


def damage(folder: pathlib.Path) -> str:
  """Why the checkpoint in `folder` is not whole; empty if it is. Reads every byte.

  Raises `StorageError` where the system does not answer: that is no damage.
  """
  try:
    sums = json.loads(_text(folder / _CHECKSUMS))
    json.loads(_text(folder / _ORBAX_METADATA))
  except InputError:
    raise
  except MISSING as error:
    return f"{pathlib.Path(error.filename).name} is missing"
  except ValueError as error:
    return f"its metadata cannot be read: {error}"
  for name, (size, crc) in sums.items():
    path = folder / name
    found = _size(path)
    if found is None:
      return f"{name} is missing"
    if found != size:
      return f"{name} has {found} bytes, not {size}"
    if patiently(path, functools.partial(_crc32, path)) != crc:
      return f"{name} is not what was written"
  return ""


def patiently(path: pathlib.Path, read: Callable[[], T]) -> T:
  """What `read` makes of a path. What the system refuses is tried again a few times.

  Raises:
    FileNotFoundError, NotADirectoryError: it is not there, which is an answer.
    InputError, StorageError: the system refuses again and again, see `errors.refused`.
  """
  for seconds in (*_READ_AGAIN, None):
    try:
      return read()
    except MISSING:
      raise
    except OSError as error:
      if seconds is None:
        raise errors.refused(f"cannot read {path}: {error.strerror or error}", error) from error
      logging.warning("cannot read %s: %s; tries again in %g s", path, error.strerror or error,
                      seconds)
      time.sleep(seconds)
  raise AssertionError


def _text(path: pathlib.Path) -> str:
  return patiently(path, path.read_text)


def _size(path: pathlib.Path) -> int | None:
  """Bytes of a file; None if there is none."""
  try:
    status = patiently(path, path.stat)
  except MISSING:
    return None
  return status.st_size if stat.S_ISREG(status.st_mode) else None


def _crc32(path: pathlib.Path) -> int:
  value = 0
  with path.open("rb") as file:
    while chunk := file.read(1 << 20):
      value = zlib.crc32(chunk, value)
  return value


def read_extra(folder: pathlib.Path) -> dict[str, Any]:
  """What a checkpoint holds beside the state, as it was given when it was saved."""
  return ocp.JsonCheckpointHandler().restore(epath.Path(folder / EXTRA))


def saved_tree(folder: pathlib.Path) -> dict[str, Any]:
  """The saved state's tree; every leaf has the `shape` and `dtype` of the array."""
  return ocp.PyTreeCheckpointHandler().metadata(epath.Path(folder / STATE)).tree


def system_failure(error: Exception) -> str:
  """What the system refused while orbax wrote or read, in its words; empty for any other error.

  tensorstore reports it as a ValueError with the code in it, behind a chain of layers.
  """
  if isinstance(error, OSError):
    return str(error)
  return str(error).rsplit(": ", 1)[-1] if "os_error_code=" in str(error) else ""


def quiet_orbax() -> None:
  """Orbax logs a failed save four times, with tracebacks, and then raises it to us as well.

  And it warns of every save that waits for the one before; the log of the run has that time.
  """
  std_logging.getLogger("absl").addFilter(_worth_telling)


def _worth_telling(record: std_logging.LogRecord) -> bool:
  if "orbax" not in record.pathname:
    return True
  waits = record.getMessage().startswith("Waiting for previous save")
  return record.levelno < std_logging.ERROR and not waits
