"""Tensors by name from the files that checkpoints come in, one at a time.

A folder may hold `model.safetensors`, safetensors shards, `pytorch_model.bin` (a file, or a
folder of shards), other `.bin` shards, with an index or without, or `model.pt`; or it holds
them in a folder `transformer`, as the published training code writes them. Nothing is read
before it is asked for, so a checkpoint larger than the memory can be walked through. PyTorch's
files are read without torch and without running what they hold: of the pickle language only
tensors in dictionaries are understood, everything else is refused.
"""

import collections
from collections.abc import Callable, Iterator, Mapping
import dataclasses
import functools
import glob
import io
import json
import os
import pickle
import struct
from typing import Any, NamedTuple
import zipfile

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors import SafetensorError

from videogpt_jax.errors import InputError

_INDEX = ".index.json"
_ENDINGS = (".safetensors", ".bin", ".pt")
_WHOLE = ("model.safetensors", "pytorch_model.bin", "model.pt")


class Entry(NamedTuple):
  """A tensor that is not read yet."""

  read: Callable[[], np.ndarray]
  shape: tuple[int, ...]
  dtype: np.dtype


class TensorFiles(Mapping[str, np.ndarray]):
  """Tensors of one or several files; `tensors[name]` reads that tensor alone."""

  def __init__(self, entries: Mapping[str, Entry]) -> None:
    self.entries = dict(entries)

  def __getitem__(self, name: str) -> np.ndarray:
    return self.entries[name].read()

  def __iter__(self) -> Iterator[str]:
    return iter(self.entries)

  def __len__(self) -> int:
    return len(self.entries)


def in_memory(tensors: Mapping[str, np.ndarray]) -> TensorFiles:
  """Arrays as if they came from files."""
  return TensorFiles({name: Entry(functools.partial(tensors.__getitem__, name), tuple(x.shape),
                                  x.dtype) for name, x in tensors.items()})


def open_folder(folder: str) -> TensorFiles:
  """All tensors of a checkpoint folder (or of one file).

  Where both kinds are there, safetensors are taken.

  Raises:
    InputError: no weights there, a shard is missing, or a file is damaged or holds anything
      but tensors.
  """
  entries: dict[str, Entry] = {}
  for path in _files(folder):
    open_file = _open_safetensors if path.endswith(".safetensors") else _open_bin
    for name, entry in open_file(path).items():
      if name in entries:
        raise InputError(f"{folder}: the tensor {name} stands in several files")
      entries[name] = entry
  return TensorFiles(entries)


def _files(folder: str) -> list[str]:
  """The files of the weights, whole ones and indices first, loose shards last."""
  if os.path.isfile(folder):
    return [folder]
  inside = lambda pattern: sorted(glob.glob(os.path.join(glob.escape(folder), pattern)))
  for ending in _ENDINGS:
    if indices := inside(f"*{ending}{_INDEX}"):
      return _indexed(indices[0])
    whole = [path for path in inside(f"*{ending}") if os.path.basename(path) in _WHOLE]
    if whole:
      return _files(whole[0]) if os.path.isdir(whole[0]) else whole
  inner = os.path.join(folder, "transformer")
  if os.path.isdir(inner):
    return _files(inner)
  for ending in _ENDINGS:
    if shards := inside(f"*{ending}"):
      return shards
  raise InputError(f"{folder}: no weights; expected model.safetensors, pytorch_model.bin, shards "
                   "of one of them, or model.pt")


def _indexed(index: str) -> list[str]:
  """The files that an index names, all of which must be there."""
  try:
    with open(index, encoding="utf-8") as file:
      names = sorted(set(json.load(file)["weight_map"].values()))
  except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
    raise InputError(f"{index} is no index of weights ({error!r})") from error
  paths = [os.path.join(os.path.dirname(index), os.path.basename(name)) for name in names]
  missing = [os.path.basename(path) for path in paths if not os.path.exists(path)]
  if missing:
    raise InputError(f"{os.path.dirname(index)}: shards are missing: {', '.join(missing)}")
  return paths


# The types that safetensors names, as far as numpy has them.
_TYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8, "U8": np.uint8,
    "BOOL": np.bool_,
}


def _open_safetensors(path: str) -> dict[str, Entry]:
  def read(name: str) -> np.ndarray:
    with safe_open(path, "np") as file:
      return file.get_tensor(name)

  entries: dict[str, Entry] = {}
  try:
    with safe_open(path, "np") as file:
      for name in file.keys():  # noqa: SIM118 (no dictionary, and not iterable)
        tensor = file.get_slice(name)
        kind = tensor.get_dtype()
        if kind not in _TYPES:
          raise InputError(f"{path}: {name} is of type {kind}, which is not read")
        entries[name] = Entry(functools.partial(read, name), tuple(tensor.get_shape()),
                              np.dtype(_TYPES[kind]))
  except (OSError, SafetensorError) as error:
    raise InputError(f"{path} is damaged or no safetensors file: {error}") from error
  return entries


# PyTorch's zip format ---------------------------------------------------------------------
#
# <root>/data.pkl pickles the object; each storage stands uncompressed in <root>/data/<key>.

_STORAGES = {
    "FloatStorage": np.float32, "DoubleStorage": np.float64, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8,
    "BoolStorage": np.bool_,
}


@dataclasses.dataclass(frozen=True)
class _StorageType:
  dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class _Tensor:
  """Where in a file the elements of a tensor are."""

  key: str
  dtype: np.dtype
  elements: int  # of the storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]  # in elements


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> _Tensor:
  key, dtype, elements = storage
  shape, strides = tuple(shape), tuple(strides)
  last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
  negative = min((offset, *shape, *strides)) < 0
  if negative or (0 not in shape and last >= elements):
    raise pickle.UnpicklingError("a tensor reaches beyond its storage")
  return _Tensor(key, dtype, elements, offset, shape, strides)


def _rebuild_parameter(tensor: Any, *_: Any) -> _Tensor:
  if not isinstance(tensor, _Tensor):
    raise pickle.UnpicklingError("a parameter that is no tensor")
  return tensor


# What reading a damaged file may raise.
_UNREADABLE = (OSError, pickle.UnpicklingError, EOFError, AttributeError, TypeError, ValueError,
               IndexError, KeyError, struct.error)
_OLD_MAGIC = pickle.dumps(0x1950a86a20f9469cfc6c, protocol=2)
_OLD_VERSION = 1001

_KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    **{("torch", name): _StorageType(np.dtype(kind)) for name, kind in _STORAGES.items()},
}


class _Unpickler(pickle.Unpickler):
  """Understands tensors, and containers of plain values; nothing else is even imported."""

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in _KNOWN:
      raise pickle.UnpicklingError(f"it holds {module}.{name}, which is not read")
    return _KNOWN[module, name]

  def persistent_load(self, pid: Any) -> Any:
    kind, storage_type, key, _, elements, *views = pid
    if any(view is not None for view in views):
      raise pickle.UnpicklingError("it holds views of storages, which are not read")
    if kind != "storage" or not isinstance(storage_type, _StorageType):
      raise pickle.UnpicklingError(f"it holds a reference to {kind!r}, which is not read")
    return key, storage_type.dtype, elements


def _open_bin(path: str) -> dict[str, Entry]:
  if _is_old(path):
    return _open_old(path)
  try:
    with zipfile.ZipFile(path) as archive:
      pickled = [name for name in archive.namelist() if name.endswith("/data.pkl")]
      if len(pickled) != 1:
        raise InputError(f"{path} is a zip file, but none that PyTorch wrote")
      root = pickled[0].removesuffix("data.pkl")
      content = _Unpickler(io.BytesIO(archive.read(pickled[0]))).load()
      order = root + "byteorder"
      if order in archive.namelist() and archive.read(order) != b"little":
        raise InputError(f"{path} was written on a big-endian machine; convert it there")
      places = {info.filename: info for info in archive.infolist()}
  except zipfile.BadZipFile as error:
    raise InputError(f"{path} is damaged, or no file of PyTorch's: {error}") from error
  except _UNREADABLE as error:
    raise InputError(f"{path} cannot be read: {error}") from error
  entries: dict[str, Entry] = {}
  for name, tensor in _by_name(path, content).items():
    place = places.get(f"{root}data/{tensor.key}")
    size = tensor.elements * tensor.dtype.itemsize
    if place is None or place.compress_type != zipfile.ZIP_STORED or place.file_size < size:
      raise InputError(f"{path} is damaged: the values of {name} are missing")
    entries[name] = Entry(functools.partial(_read_zipped, path, tensor, place), tensor.shape,
                          tensor.dtype)
  return entries


def _by_name(path: str, content: Any) -> dict[str, _Tensor]:
  if not isinstance(content, dict):
    raise InputError(f"{path} holds a {type(content).__name__}, not tensors by name")
  for name, tensor in content.items():
    if not isinstance(name, str) or not isinstance(tensor, _Tensor):
      raise InputError(f"{path}: {name!r} is a {type(tensor).__name__}, not a tensor")
  return content


# PyTorch's format before 1.6 ----------------------------------------------------------------
#
# Pickles one after the other: a magic number, a version, facts of the machine, the object, the
# keys of its storages. Then each storage, in the order of the keys: its length in 8 bytes, its
# elements.


def _is_old(path: str) -> bool:
  try:
    with open(path, "rb") as file:
      return file.read(len(_OLD_MAGIC)) == _OLD_MAGIC
  except OSError:
    return False  # whoever opens it will tell


def _open_old(path: str) -> dict[str, Entry]:
  try:
    with open(path, "rb") as file:
      _, version, facts, content, keys = (_Unpickler(file).load() for _ in range(5))
      if version != _OLD_VERSION or not facts["little_endian"]:
        raise InputError(f"{path} is of a version or machine that is not read; load it with "
                         "PyTorch and save it again")
      tensors = _by_name(path, content)
      kinds = {tensor.key: tensor for tensor in tensors.values()}
      starts = {}
      for key in keys:
        elements, = struct.unpack("<q", file.read(8))
        starts[key] = file.tell()
        if elements != kinds[key].elements:
          raise ValueError(f"storage {key} has {elements} elements")
        file.seek(elements * kinds[key].dtype.itemsize, os.SEEK_CUR)
      if file.tell() > os.path.getsize(path) or kinds.keys() - starts.keys():
        raise ValueError("values are missing")
  except InputError:
    raise
  except _UNREADABLE as error:
    raise InputError(f"{path} is damaged or cannot be read: {error}") from error
  return {name: Entry(functools.partial(_read, path, tensor, starts[tensor.key]), tensor.shape,
                      tensor.dtype) for name, tensor in tensors.items()}


def _read_zipped(path: str, tensor: _Tensor, place: zipfile.ZipInfo) -> np.ndarray:
  """The values of one tensor, whose storage is a file in a zip file."""
  with open(path, "rb") as file:
    file.seek(place.header_offset)
    name_size, extra_size = struct.unpack("<26xHH", file.read(30))
  return _read(path, tensor, place.header_offset + 30 + name_size + extra_size)


def _read(path: str, tensor: _Tensor, start: int) -> np.ndarray:
  """The values of one tensor, from the memory-mapped file, where its storage starts at `start`."""
  if 0 in tensor.shape:
    return np.zeros(tensor.shape, tensor.dtype)
  storage = np.memmap(path, np.uint8, "r", start, (tensor.elements * tensor.dtype.itemsize,))
  values = storage.view(tensor.dtype)[tensor.offset:]
  strides = [stride * tensor.dtype.itemsize for stride in tensor.strides]
  return np.array(np.lib.stride_tricks.as_strided(values, tensor.shape, strides))
