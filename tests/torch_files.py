"""Writes files as `torch.save` does, without torch: the format, byte for byte in what counts.

The reference for the format is PyTorch's serialization notes: a zip file, stored, with the
pickle in `archive/data.pkl` (protocol 2) and each storage in `archive/data/<key>`.
"""

import collections
import io
import pickle
import sys
import types
import zipfile

import ml_dtypes
import numpy as np

_STORAGES = {np.dtype(np.float32): "FloatStorage", np.dtype(np.float16): "HalfStorage",
             np.dtype(ml_dtypes.bfloat16): "BFloat16Storage", np.dtype(np.int64): "LongStorage"}


class _Storage:
  def __init__(self, array):
    self.array = array


class View:
  """A tensor that shares its storage with others, or is transposed."""

  def __init__(self, storage, offset, shape, strides):
    self.storage, self.offset, self.shape, self.strides = storage, offset, shape, strides


class _Pickler(pickle.Pickler):
  def __init__(self, file, modules):
    super().__init__(file, protocol=2)
    self.modules, self.storages = modules, []

  def persistent_id(self, obj):
    if not isinstance(obj, _Storage):
      return None
    if not any(obj is other for other in self.storages):
      self.storages.append(obj)
    key = next(i for i, other in enumerate(self.storages) if other is obj)
    kind = getattr(self.modules["torch"], _STORAGES[obj.array.dtype])
    return "storage", kind, str(key), "cpu", obj.array.size

  def reducer_override(self, obj):
    if isinstance(obj, np.ndarray):
      flat = _Storage(np.ascontiguousarray(obj).reshape(-1))
      strides = tuple(s // obj.itemsize for s in np.ascontiguousarray(obj).strides)
      obj = View(flat, 0, obj.shape, strides)
    if isinstance(obj, View):
      rebuild = self.modules["torch._utils"]._rebuild_tensor_v2
      return rebuild, (obj.storage, obj.offset, tuple(obj.shape), tuple(obj.strides), False,
                       collections.OrderedDict())
    return NotImplemented


def storage(array):
  """What several `View`s may share."""
  return _Storage(np.ascontiguousarray(array).reshape(-1))


def save(path, content, *, compression=zipfile.ZIP_STORED):
  """Writes `content`, arrays and views as tensors, all else as pickle would."""
  modules = {"torch": types.ModuleType("torch"), "torch._utils": types.ModuleType("torch._utils")}
  for name in _STORAGES.values():
    kind = type(name, (), {"__module__": "torch"})
    setattr(modules["torch"], name, kind)
  def _rebuild_tensor_v2(*args):
    raise AssertionError("only pickled by name")
  _rebuild_tensor_v2.__module__ = "torch._utils"
  _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
  modules["torch._utils"]._rebuild_tensor_v2 = _rebuild_tensor_v2
  before = {name: sys.modules.get(name) for name in modules}
  sys.modules.update(modules)
  try:
    buffer = io.BytesIO()
    pickler = _Pickler(buffer, modules)
    pickler.dump(content)
  finally:
    for name, module in before.items():
      if module is None:
        del sys.modules[name]
      else:
        sys.modules[name] = module
  with zipfile.ZipFile(path, "w", compression) as archive:
    archive.writestr("archive/data.pkl", buffer.getvalue())
    archive.writestr("archive/byteorder", "little")
    for key, item in enumerate(pickler.storages):
      archive.writestr(f"archive/data/{key}", item.array.tobytes())
    archive.writestr("archive/version", "3\n")
