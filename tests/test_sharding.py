"""Meshes: which device stands where, and what is refused."""

import types

import jax
import numpy as np
import pytest

from videogpt_jax import sharding
from videogpt_jax.errors import InputError


def _chips(slices, side=2):
  """Stand-ins for TPU chips: squares of side x side, several slices of them."""
  return [
    types.SimpleNamespace(
      id=s * side * side + x * side + y, slice_index=s, process_index=s, platform="tpu",
      device_kind="TPU v5 lite", coords=(x, y, 0), core_on_chip=0)
    for s in range(slices) for x in range(side) for y in range(side)]


def _placed(sizes, chips, monkeypatch):
  """Slice numbers of the mesh's devices; jax's own `Mesh` takes no stand-ins."""
  monkeypatch.setattr(sharding, "Mesh", lambda devices, axes, axis_types: devices)
  return np.vectorize(lambda chip: chip.slice_index)(sharding.make_mesh(sizes, chips))


@pytest.mark.parametrize("slices", [2, 4])
def test_only_the_axis_of_slices_leaves_a_slice(slices, monkeypatch):
  placed = _placed({"slice": slices, "fsdp": 2, "tensor": -1}, _chips(slices), monkeypatch)
  assert placed.shape == (slices, 1, 2, 1, 2)
  assert (placed == np.arange(slices)[:, None, None, None, None]).all()


def test_slices_are_counted_where_the_size_is_left_open(monkeypatch):
  placed = _placed({"slice": -1, "data": 4}, _chips(3), monkeypatch)
  assert placed.shape == (3, 4, 1, 1, 1)


def test_without_a_word_slices_are_as_many_as_there_are(monkeypatch):
  placed = _placed({"slice": 0, "data": -1}, _chips(2), monkeypatch)
  assert placed.shape == (2, 4, 1, 1, 1)
  assert (placed == np.arange(2)[:, None, None, None, None]).all()


def test_nodes_of_gpus_are_no_slices(monkeypatch):
  """XLA numbers them as if they were, by the node in which a process runs."""
  gpus = [types.SimpleNamespace(id=i, slice_index=i // 8, process_index=i // 8, platform="gpu",
                                device_kind="NVIDIA H100 80GB HBM3") for i in range(32)]
  assert _placed({"slice": 0, "data": -1, "fsdp": 8}, gpus, monkeypatch).shape == (1, 4, 8, 1, 1)
  placed = _placed({"slice": 4, "fsdp": 8}, gpus, monkeypatch)
  assert (placed == np.arange(4)[:, None, None, None, None]).all()


@pytest.mark.parametrize("sizes", [{"slice": 1, "data": 8}, {"slice": 4, "data": 2}])
def test_slices_that_the_mesh_does_not_know_are_refused(sizes):
  with pytest.raises(InputError, match=r"lie in 2 slices; set config\.mesh\.slice=2"):
    sharding.make_mesh(sizes, _chips(2))


@pytest.mark.parametrize(("sizes", "message"), [
  ({"data": -1, "fsdp": -1}, "one of them may be -1"),
  ({"data": 0}, "must be positive"),
  ({"data": 3}, r"data=3 .* needs 3 devices, there are 1"),
])
def test_sizes_that_make_no_mesh_are_refused(sizes, message):
  with pytest.raises(InputError, match=message):
    sharding.make_mesh(sizes, jax.devices()[:1])
