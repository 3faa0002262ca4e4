"""The frozen base of adapters: recorded when they are trained, recognised when they are used.

A run that trains adapters saves them alone. Beside them it keeps where the base lay, and a
checksum of every parameter of it: of the values in float32, so that weights are known again in
whatever form they are stored.
"""

from collections.abc import Mapping
import dataclasses
import os
from typing import Any
import zlib

import numpy as np

from videogpt_jax import lora
from videogpt_jax.errors import InputError


class Base:
  """Weights that adapters belong to; reading their leaves makes and compares checksums.

  Attributes:
    source: the `weights.Source`; to read one of its leaves raises an `InputError` if that is not
      what `recognise` was told.
  """

  def __init__(self, source: Any) -> None:
    leaves = {name: _Leaf(self, name, leaf) for name, leaf in source.leaves.items()}
    self.source = dataclasses.replace(source, leaves=leaves)
    self._sums: dict[str, int] = {}
    self._expected: Mapping[str, int] = {}

  def recognise(self, record: Mapping[str, Any] | None, run: str) -> None:
    """Demands from now on the weights of an earlier `record`, that of the run in the folder `run`.

    Raises:
      InputError: there is no such record, or the weights are of another model.
    """
    if record is None:
      raise InputError(f"{run} does not say to which weights its adapters belong")
    self._expected = record["checksums"]
    self._run = run
    for name in self._expected.keys() ^ self.source.leaves.keys():
      raise self._another(name)

  def record(self) -> dict[str, Any]:
    """What is saved beside the adapters, once all leaves were read; JSON-able."""
    return {"path": os.path.abspath(self.source.path), "checksums": self._sums}

  def check(self, name: str, array: np.ndarray) -> None:
    """Takes the checksum of a parameter in float32; `InputError` unless it is as expected."""
    self._sums[name] = zlib.crc32(np.ascontiguousarray(array).data)
    if self._expected and self._sums[name] != self._expected[name]:
      raise self._another(name)

  def _another(self, name: str) -> InputError:
    return InputError(
      f"the weights {self.source.path} are not those that the adapters of {self._run} belong to: "
      f"{name} is another; put those back there, or give their folder as "
      "config.checkpoint.init_from")


class _Leaf:
  """A parameter of the base."""

  def __init__(self, base: Base, name: str, leaf: Any) -> None:
    self._base, self._name, self._leaf = base, name, leaf

  def __getattr__(self, name: str) -> Any:  # shape, dtype
    return getattr(self._leaf, name)

  def read(self, dtype: Any = None) -> np.ndarray:
    """The whole parameter."""
    array = self._leaf.read(np.float32)
    self._base.check(self._name, array)
    return array.astype(dtype or self._leaf.dtype, copy=False)


class _Merged:
  """A matrix of the base with the product of its adapter added, in float32."""

  def __init__(self, leaf: Any, a: Any, b: Any, scale: float) -> None:
    self.shape, self.dtype = leaf.shape, np.dtype(np.float32)
    self._leaf, self._a, self._b, self._scale = leaf, a, b, scale

  def read(self, dtype: Any = None) -> np.ndarray:
    """The whole matrix, of all layers."""
    w = np.require(self._leaf.read(np.float32), requirements="W")
    lora.merge(w, self._a.read(np.float32), self._b.read(np.float32), self._scale)
    return w.astype(dtype or self.dtype, copy=False)


def merged(base: Mapping[str, Any], adapters: Mapping[str, Any], scale: float) -> dict[str, Any]:
  """The parameters of a base with adapters merged into them, by path; none is read yet."""
  return {
    name: _Merged(leaf, adapters[name + lora.A], adapters[name + lora.B], scale)
    if name + lora.A in adapters else leaf for name, leaf in base.items()}
