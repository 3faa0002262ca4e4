"""Reading checkpoint files tensor by tensor: every format, and every kind of damage."""

import collections
import json
import os
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors import numpy as safetensors

import torch_files
from videogpt_jax import tensors
from videogpt_jax.errors import InputError

_RNG = np.random.default_rng(0)
ARRAYS = {
  "a.weight": _RNG.normal(size=(3, 5)).astype(np.float32),
  "b.weight": _RNG.normal(size=(2, 4, 1)).astype(ml_dtypes.bfloat16),
  "b.bias": _RNG.normal(size=7).astype(np.float16),
  "ids": np.arange(4),
  "none": np.zeros((0, 3), np.float32),
}


def _assert_reads(files, expected=None):
  expected = ARRAYS if expected is None else expected
  assert set(files) == set(expected)
  for name, array in expected.items():
    assert (files.entries[name].shape, files.entries[name].dtype) == (array.shape, array.dtype)
    assert files[name].dtype == array.dtype
    np.testing.assert_array_equal(files[name], array)


def _index(folder, name, weight_map):
  (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_weights_beside_other_files_are_found(tmp_path):
  """An optimizer's file in the folder does not hide the weights in `transformer`."""
  (tmp_path / "transformer").mkdir()
  safetensors.save_file(ARRAYS, tmp_path / "transformer" / "model.safetensors")
  torch_files.save(tmp_path / "optimizer.pt", {"m": np.zeros(3, np.float32)})
  _assert_reads(tensors.open_folder(str(tmp_path)))


def test_one_safetensors_file(tmp_path):
  safetensors.save_file(ARRAYS, tmp_path / "model.safetensors")
  _assert_reads(tensors.open_folder(str(tmp_path)))
  _assert_reads(tensors.open_folder(str(tmp_path / "model.safetensors")))


@pytest.mark.parametrize("with_index", [True, False])
@pytest.mark.parametrize(("ending", "save"), [
  ("safetensors", safetensors.save_file), ("bin", lambda x, path: torch_files.save(path, x))])
def test_shards(tmp_path, ending, save, with_index):
  names = [f"model-0000{i}-of-00002.{ending}" for i in (1, 2)]
  parts = [dict(list(ARRAYS.items())[:2]), dict(list(ARRAYS.items())[2:])]
  for name, part in zip(names, parts, strict=True):
    save(part, tmp_path / name)
  if with_index:
    _index(tmp_path, f"model.{ending}.index.json",
           {key: name for name, part in zip(names, parts, strict=True) for key in part})
    save({"left": np.ones(2)[:1].astype(np.float32)}, tmp_path / f"other.{ending}")
  _assert_reads(tensors.open_folder(str(tmp_path)))
  if with_index:
    os.remove(tmp_path / names[1])
    with pytest.raises(InputError, match=f"shards are missing: {names[1]}"):
      tensors.open_folder(str(tmp_path))


def test_safetensors_go_before_bin(tmp_path):
  safetensors.save_file(ARRAYS, tmp_path / "model.safetensors")
  (tmp_path / "pytorch_model.bin").write_text("never opened")
  _assert_reads(tensors.open_folder(str(tmp_path)))


def test_bin_with_shared_and_transposed_storage(tmp_path):
  whole = np.arange(24, dtype=np.float32)
  shared = torch_files.storage(whole)
  torch_files.save(tmp_path / "pytorch_model.bin", collections.OrderedDict(
    part=torch_files.View(shared, 4, (2, 3), (3, 1)),
    transposed=torch_files.View(shared, 0, (6, 4), (1, 6))))
  _assert_reads(tensors.open_folder(str(tmp_path)), {
    "part": whole[4:10].reshape(2, 3), "transposed": whole.reshape(4, 6).T})


class _Evil:
  """Would write a file if it were unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return os.mkdir, (self.path,)


def _beyond(offset, shape, strides):
  storage = torch_files.storage(np.arange(6, dtype=np.float32))
  return {"x": torch_files.View(storage, offset, shape, strides)}


@pytest.mark.parametrize(("content", "message"), [
  ({"x": complex(1, 2)}, r"holds .*builtins\.complex|__builtin__.complex, which is not read"),
  ({"x": collections.Counter()}, "holds collections.Counter, which is not read"),
  ({"x": 3}, "'x' is a int, not a tensor"),
  ({5: ARRAYS["a.weight"]}, "5 is a _Tensor, not a tensor"),
  ([ARRAYS["a.weight"]], "holds a list, not tensors by name"),
  (_beyond(0, (7,), (1,)), "reaches beyond its storage"),
  (_beyond(4, (3,), (1,)), "reaches beyond its storage"),
  (_beyond(0, (2, 2), (5, 1)), "reaches beyond its storage"),
  (_beyond(-1, (2,), (1,)), "reaches beyond its storage"),
  (_beyond(5, (2,), (-1,)), "reaches beyond its storage"),
])
def test_bin_files_that_hold_anything_else_are_refused(tmp_path, content, message):
  torch_files.save(tmp_path / "pytorch_model.bin", content)
  with pytest.raises(InputError, match=message):
    tensors.open_folder(str(tmp_path))


def test_bin_files_run_nothing(tmp_path):
  mark = tmp_path / "mark"
  torch_files.save(tmp_path / "pytorch_model.bin", {"x": _Evil(str(mark))})
  with pytest.raises(InputError, match=r"it holds posix\.mkdir, which is not read"):
    tensors.open_folder(str(tmp_path))
  assert not mark.exists()


def test_damaged_files_are_refused(tmp_path):
  with pytest.raises(InputError, match=r"no weights; expected model\.safetensors"):
    tensors.open_folder(str(tmp_path))
  path = tmp_path / "pytorch_model.bin"
  for damage, message in (
      (lambda data: data[:-30], "damaged, or no file of PyTorch"),
      (lambda data: b"text", "damaged, or no file of PyTorch"),
      (lambda data: data.replace(b"archive/data/1", b"archive/data/9"), "values of .* missing")):
    torch_files.save(path, ARRAYS)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=message):
      tensors.open_folder(str(tmp_path))
  torch_files.save(path, ARRAYS, compression=zipfile.ZIP_DEFLATED)
  with pytest.raises(InputError, match="are missing"):
    tensors.open_folder(str(tmp_path))
  with zipfile.ZipFile(path, "w") as archive:
    archive.writestr("readme.txt", "hello")
  with pytest.raises(InputError, match="none that PyTorch wrote"):
    tensors.open_folder(str(tmp_path))
  path.unlink()
  (tmp_path / "model.safetensors").write_bytes(b"\x00" * 20)
  with pytest.raises(InputError, match="damaged or no safetensors file"):
    tensors.open_folder(str(tmp_path))
  for name, text in (("model.safetensors.index.json", "{"), ("model.safetensors.index.json", "[]")):
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match="is no index of weights"):
      tensors.open_folder(str(tmp_path))


def test_the_same_tensor_twice_is_refused(tmp_path):
  for name in ("a.safetensors", "b.safetensors"):
    safetensors.save_file({"x": ARRAYS["a.weight"]}, tmp_path / name)
  with pytest.raises(InputError, match="the tensor x stands in several files"):
    tensors.open_folder(str(tmp_path))
