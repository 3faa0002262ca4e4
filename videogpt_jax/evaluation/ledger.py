"""Results of a benchmark item by item, on disk: what was cut short goes on where it was.

    FOLDER/evaluation.json       what is measured: weights, benchmark, settings; and which other
                                 files and folders here the evaluation makes
    FOLDER/items/NAME.json       the result of one finished item

A file appears whole or not at all, so any number of processes may share the folder.
"""

from collections.abc import Iterable, Mapping, Sequence
import hashlib
import json
import os
import pathlib
import shutil
from typing import Any
import urllib.parse

import jax
from jax.experimental import multihost_utils
import numpy as np

import videogpt_jax
from videogpt_jax import distributed
from videogpt_jax import errors
from videogpt_jax import files
from videogpt_jax.errors import InputError

IDENTITY = "evaluation.json"
_ITEMS = "items"
_OUTPUTS = "outputs"  # in the file `IDENTITY`: no part of the identity
_STATE = "state"  # in an item's file: of what it was made of
_LONGEST = 200  # characters of a file's name, which may have 255


class Ledger:
  """The finished items of the evaluation in `folder`.

  Every process makes one, with the same arguments.

  Args:
    folder: of the results; made where missing.
    identity: JSON-able, all that decides the results, beside this package's version: only equal
      ones are taken up.
    restart: remove what another evaluation left: its items, and of its outputs those that were
      not there before it.
    outputs: names in `folder` of the other files and folders that the evaluation makes.
    exclusive: refuse outputs that something else has made.
    inputs: paths that the evaluation reads, "" among them is none: never removed.

  Raises:
    InputError: results of another identity are there; or (`exclusive`) what no evaluation made;
      or `restart` would remove an input; or the folder cannot be written.
  """

  def __init__(self, folder: pathlib.Path, identity: Mapping[str, Any], *, restart: bool = False,
               outputs: Sequence[str] = (), exclusive: bool = False,
               inputs: Sequence[str] = ()) -> None:
    self._folder, self._items = folder, folder / _ITEMS
    versioned = {**identity, "version": videogpt_jax.__version__}
    wanted = json.loads(json.dumps(plain(versioned)))  # as it will be read: no tuples
    distributed.from_first(lambda: self._open(wanted, restart, outputs, exclusive, inputs))

  def get(self, item: str) -> dict[str, Any] | None:
    """The result of an item; None: it is not finished."""
    try:
      return json.loads(self._path(item).read_text(encoding="utf-8"))
    except FileNotFoundError:
      return None
    except ValueError:  # the machine went down before the disk had it
      return None

  def put(self, item: str, values: Mapping[str, Any], state: str = "") -> None:
    """Keeps the result of a finished item: JSON-able values, numpy's among them.

    Args:
      item: its name.
      values: the result.
      state: of the files it was made of; see `mine`.

    Raises:
      InputError: it cannot be written; the ones before are safe.
    """
    files.write_json(self._path(item), plain({**values, **({_STATE: state} if state else {})}))

  def mine(self, items: Iterable[str] | Mapping[str, str]) -> list[str]:
    """The items that this process has to do: its share of those that are not finished.

    Every process has to ask before any of them puts another result: they share what all of
    them see unfinished.

    Args:
      items: their names; or by name the states of the files that they are made of, and those of
        another state count as unfinished.
    """
    states = items if isinstance(items, Mapping) else dict.fromkeys(items, "")
    unfinished = [item for item, state in states.items()
                  if (found := self.get(item)) is None or found.get(_STATE, "") != state]
    self.wait()
    return unfinished[jax.process_index()::jax.process_count()]

  def all(self, items: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The results of items, all of which have been finished by whichever process; waits for them.

    Raises:
      InputError: some are missing: the processes do not share the folder.
    """
    self.wait()
    found = {item: self.get(item) for item in items}
    missing = [item for item, values in found.items() if values is None]
    if missing:
      raise InputError(f"{self._items} lacks {len(missing)} of {len(items)} results, such as "
                       f"{missing[0]}; --out must be a folder that all processes share")
    return {item: {name: value for name, value in values.items() if name != _STATE}
            for item, values in found.items() if values is not None}

  def wait(self) -> None:
    """Until all processes have come here."""
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices("evaluation")

  def _open(self, identity: dict[str, Any], restart: bool, outputs: Sequence[str],
            exclusive: bool, inputs: Sequence[str]) -> None:
    path = self._folder / IDENTITY
    try:
      found = self._found(path, restart)
      made = set(found.pop(_OUTPUTS, ())) if found else set()
      if found is not None and not restart:
        self._compare(found, identity)
      others = [name for name in outputs
                if name not in made and os.path.lexists(self._folder / name)]
      if exclusive and others:
        raise InputError(f"{self._folder} holds {', '.join(others)}, which no evaluation recorded "
                         "as its own: take another --out, or move it away")
      if restart:
        self._remove(made, inputs)
        made = set()
      made |= set(outputs) - set(others)  # what is not there yet can only come from this one
      self._items.mkdir(parents=True, exist_ok=True)
    except OSError as error:
      raise errors.refused(f"cannot write to {self._folder}: {error.strerror or error}",
                           error) from error
    files.write_json(path, {**identity, _OUTPUTS: sorted(made)})

  def _found(self, path: pathlib.Path, restart: bool) -> dict[str, Any] | None:
    """What the file of the identity holds; None: there is none, or it will not be needed."""
    try:
      found = json.loads(path.read_text(encoding="utf-8"))
      if not isinstance(found, dict):
        raise ValueError(found)
      return found
    except FileNotFoundError:
      return None
    except ValueError as error:
      if restart:
        return None
      raise InputError(f"{path} is damaged; give --restart to begin anew") from error

  def _compare(self, found: Mapping[str, Any], identity: Mapping[str, Any]) -> None:
    differences = [f"{name} {found.get(name)} (now {identity.get(name)})"
                   for name in sorted(found.keys() | identity.keys())
                   if found.get(name) != identity.get(name)]
    if differences:
      raise InputError(f"{self._folder} holds results of another evaluation: "
                       + ", ".join(differences) + "; take another --out, or give --restart to "
                       "remove them and begin anew")

  def _remove(self, made: Iterable[str], inputs: Sequence[str]) -> None:
    """Removes the items and what else an evaluation made; the identity last, which says so."""
    paths = [self._folder / name for name in sorted(made)]
    paths = [path for path in paths if path.parent == self._folder and path.name != ".."]
    for place in (pathlib.Path(x).expanduser().resolve() for x in inputs if x):
      if within := [path for path in paths if place.is_relative_to(path.resolve())]:
        raise InputError(f"--restart would remove {within[0]}, which is to be read: take another "
                         "--out")
    for path in self._items.glob("*.json"):
      path.unlink()
    for path in paths:
      if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
      else:
        path.unlink(missing_ok=True)
    (self._folder / IDENTITY).unlink(missing_ok=True)

  def _path(self, item: str) -> pathlib.Path:
    name = urllib.parse.quote(item, safe=" ")
    if len(name) > _LONGEST:
      name = f"{name[:_LONGEST // 2]}-{hashlib.sha256(item.encode()).hexdigest()[:16]}"
    return self._items / f"{name}.json"


def plain(value: Any) -> Any:
  """A value as JSON can hold it: numpy's numbers and arrays, and paths, become Python's."""
  if isinstance(value, Mapping):
    return {str(name): plain(x) for name, x in value.items()}
  if isinstance(value, (np.ndarray, np.generic)):
    return plain(value.tolist())
  if isinstance(value, (list, tuple)):
    return [plain(x) for x in value]
  return str(value) if isinstance(value, pathlib.PurePath) else value
