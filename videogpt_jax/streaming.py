"""A checkpoint of parameters alone, written piece by piece: a model may exceed the memory.

The checkpoint is one like `videogpt_jax.checkpoint` writes during training, with the
parameters as its `ema`; it is read, started from and exported like any other.
"""

import asyncio
from collections.abc import Iterator, Mapping
import os
import pathlib
import tempfile
from typing import Any, Protocol

from flax import traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from videogpt_jax import checkpoint_files
from videogpt_jax import errors
from videogpt_jax.errors import InputError
from videogpt_jax.errors import StorageError


class Leaf(Protocol):
  """A parameter that is read in pieces; `published.Leaf` is one."""

  @property
  def shape(self) -> tuple[int, ...]:
    """Of the whole."""

  @property
  def dtype(self) -> np.dtype:
    """Type of all its pieces."""

  @property
  def stacked(self) -> bool:
    """Whether the pieces are what the first axis counts, or there is one piece, the whole."""

  def pieces(self) -> Iterator[tuple[Any, np.ndarray]]:
    """(index into the parameter, what stands there)."""


def write(path: str | pathlib.Path, leaves: Mapping[str, Leaf], config: dict[str, Any],
          dtype: np.dtype | None = None) -> None:
  """Writes parameters as a checkpoint; it appears under its name when it is whole.

  Args:
    path: the folder to make.
    leaves: parameters by path `a/b/c` in the tree.
    config: configuration saved beside them, JSON-able.
    dtype: type to store them in; by default each its own.

  Raises:
    InputError: there is something at `path` already, or it cannot be written.
  """
  final = pathlib.Path(path).absolute()
  if final.exists() and (not final.is_dir() or any(final.iterdir())):
    raise InputError(f"{path} exists already; remove it or choose another folder")
  tree = traverse_util.unflatten_dict(
    {("ema", *name.split("/")): _Lazy(leaf, dtype) for name, leaf in leaves.items()})
  save_args = traverse_util.unflatten_dict(
    {("ema", *name.split("/")): _layout(leaf) for name, leaf in leaves.items()})
  handler = ocp.CompositeCheckpointHandler(**{
    checkpoint_files.STATE: ocp.PyTreeCheckpointHandler(
      type_handler_registry=ocp.type_handlers.create_type_handler_registry(
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # orbax warns where there is none
        (_Lazy, _LazyHandler(deepcopy_host_arrays=False)))),
    checkpoint_files.EXTRA: ocp.JsonCheckpointHandler(),
  })
  checkpoint_files.quiet_orbax()
  try:
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{final.name}.", dir=final.parent) as folder:
      whole = pathlib.Path(folder) / "checkpoint"
      with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(whole, ocp.args.Composite(**{
          checkpoint_files.STATE: ocp.args.PyTreeSave(tree, save_args=save_args),
          checkpoint_files.EXTRA: ocp.args.JsonSave({"config": config}),
        }))
      checkpoint_files.seal(whole)
      os.replace(whole, final)
  except (OSError, ValueError) as error:
    reason = checkpoint_files.system_failure(error)
    if not reason:
      raise
    message = f"cannot write the checkpoint {path}: {reason}"
    if isinstance(error, OSError):
      raise errors.refused(message, error) from error
    raise StorageError(message) from error


def _layout(leaf: Leaf) -> ocp.SaveArgs:
  """Chunks that no two pieces share, so that each is written once and alone."""
  axes = (0,) if leaf.stacked else ()
  return ocp.SaveArgs(chunk_byte_size=checkpoint_files.CHUNK_BYTES, shard_axes=axes)


class _Lazy:
  """What orbax sees of a leaf: an array that only `_LazyHandler` can write."""

  def __init__(self, leaf: Leaf, dtype: np.dtype | None) -> None:
    self._leaf = leaf
    self.shape = leaf.shape
    self.dtype = np.dtype(dtype or leaf.dtype)
    self.ndim = len(self.shape)
    self.size = int(np.prod(self.shape))
    self.itemsize = self.dtype.itemsize
    self.nbytes = self.size * self.itemsize

  def pieces(self) -> Iterator[tuple[Any, np.ndarray]]:
    for index, piece in self._leaf.pieces():
      yield index, piece.astype(self.dtype, copy=False)


class _LazyHandler(ocp.type_handlers.NumpyHandler):
  """Writes leaves one after the other, a piece at a time; the files are those of numpy arrays."""

  def __init__(self, **options: Any) -> None:
    super().__init__(**options)
    self._one_at_a_time = asyncio.Semaphore(1)
    self._failed = False

  async def _open_and_write(self, value: _Lazy, tspec: dict[str, Any],
                            ts_context: ts.Context) -> None:
    async with self._one_at_a_time:
      if self._failed:
        return  # the loop is about to close; a file begun now would outlive the folder's removal
      try:
        stored = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        for index, piece in value.pieces():
          await stored[index].write(piece)
      except BaseException:
        self._failed = True
        raise
