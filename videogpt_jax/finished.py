"""Clips of a prediction that is under way, on disk: what a kill leaves, a second run takes up.

    FOLDER/clips/settings.json    what is predicted, from what, with which weights
    FOLDER/clips/00000.npy ...    latents of the finished clips, float32 [B, g, h, w, C]

A file appears whole or not at all. The folder is removed when the prediction is complete.
"""

from collections.abc import Callable, Mapping, Sequence
import contextlib
import itertools
import json
import os
import pathlib
import shutil
from typing import Any, BinaryIO

import numpy as np

from videogpt_jax import errors
from videogpt_jax.errors import InputError


class Clips(Sequence[np.ndarray]):
  """The finished clips of the prediction in `folder`; each is read when it is asked for.

  Args:
    folder: of the results.
    settings: JSON-able, all that decides the clips: only equal ones are taken up.
    restart: forget what another prediction left.

  Raises:
    InputError: an interrupted prediction of other settings is there, or the folder cannot be
      written.
  """

  def __init__(self, folder: pathlib.Path, settings: Mapping[str, Any], restart: bool = False
               ) -> None:
    self._folder = folder / "clips"
    wanted = json.loads(json.dumps(settings))  # as it will be read: no tuples
    try:
      if restart and self._folder.exists():
        shutil.rmtree(self._folder)
      self._folder.mkdir(parents=True, exist_ok=True)
      self._check(wanted)
      self._count = next(i for i in itertools.count() if not self._path(i).exists())
    except OSError as error:
      raise errors.refused(f"cannot write to {folder}: {error.strerror or error}",
                           error) from error

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: Any) -> Any:
    if not 0 <= index < self._count:
      raise IndexError(index)
    return np.load(self._path(index), allow_pickle=False)

  def append(self, latents: np.ndarray) -> None:
    """Keeps one more clip.

    Raises:
      InputError: it cannot be written; the ones before are safe.
    """
    self._write(self._path(self._count), lambda file: np.save(file, latents))
    self._count += 1

  def remove(self) -> None:
    """The prediction is complete."""
    shutil.rmtree(self._folder, ignore_errors=True)

  def _check(self, settings: dict[str, Any]) -> None:
    path = self._folder / "settings.json"
    if not path.exists():
      text = json.dumps(settings, indent=2) + "\n"
      self._write(path, lambda file: file.write(text.encode()))
      return
    found = json.loads(path.read_text(encoding="utf-8"))
    differences = [f"{name} {found.get(name)} (now {settings.get(name)})"
                   for name in sorted(found.keys() | settings.keys())
                   if found.get(name) != settings.get(name)]
    if differences:
      raise InputError(
        f"{self._folder.parent} holds an interrupted prediction of other settings: "
        + ", ".join(differences) + "; finish it with its own, take another --out, or give "
        "--restart to begin anew")

  def _path(self, index: int) -> pathlib.Path:
    return self._folder / f"{index:05d}.npy"

  def _write(self, path: pathlib.Path, write: Callable[[BinaryIO], Any]) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    try:
      with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
      os.replace(temporary, path)
    except OSError as error:
      with contextlib.suppress(OSError):  # as unreachable as the file
        temporary.unlink(missing_ok=True)
      raise errors.refused(f"cannot write to {self._folder}: {error.strerror or error}; the clips "
                           "finished so far are safe", error) from error
