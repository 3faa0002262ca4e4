"""The benchmark of attention: its peers compute the same, its table of block sizes is used."""

import dataclasses
import json

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from videogpt_jax import sharding
from videogpt_jax.attention import blocks
from videogpt_jax.attention import tuning
from videogpt_jax.benchmarks import attention as benchmark
from videogpt_jax.benchmarks import peers


@pytest.fixture(name="mesh")
def _mesh():
  return sharding.make_mesh({"data": 1, "fsdp": 1, "sequence": 1, "tensor": -1})


@pytest.fixture(autouse=True)
def _small(monkeypatch, tmp_path):
  """A case of 3 ms, and a table of block sizes of its own."""
  monkeypatch.setitem(benchmark.CASES, "stage1", (6, 20, 2, 32))
  table = tmp_path / "block_sizes.json"
  table.write_text(tuning.TABLE.read_text())
  monkeypatch.setattr(tuning, "TABLE", table)


def test_peers_agree_and_the_report_says_who_did_not_run(mesh, capsys):
  names = ["ours", "jax_dense", "jax_dot_product_attention", "jax_causal", "splash"]
  result = benchmark.report("stage1", mesh, rounds=1, calls=1, names=names)
  table = result["peers"]
  assert set(table) == {"ours", "jax_dense", "jax_dot_product_attention", "jax_causal"}
  assert result["not_run"] == {"splash": "needs a TPU"}
  for name in ("jax_dense", "jax_dot_product_attention"):
    assert table[name]["difference_from_ours"] < 1e-5
  # TFLOP/s are of visible pairs: 4 E H of them forward, 14 E H with backward.
  length = result["length"]
  for name, row in table.items():
    pairs = result["visible_share"] * length**2
    if name == "jax_causal":
      pairs = length * (length + 1) / 2
    assert row["forward_tflops"] * row["forward_s"] * 1e12 == pytest.approx(4 * pairs * 64)
    total = row["forward_backward_tflops"] * row["forward_backward_s"] * 1e12
    assert total == pytest.approx(14 * pairs * 64)
  assert result["speedup_vs_jax_dense"] == (
      table["jax_dense"]["forward_backward_s"] / table["ours"]["forward_backward_s"])
  json.dumps(result)
  assert "needs a TPU" in capsys.readouterr().out


def test_a_peer_that_fails_is_reported_and_ours_is_not_forgiven(mesh, monkeypatch):
  def broken(problem):
    raise RuntimeError("out of memory")

  def silent(problem):
    raise MemoryError

  monkeypatch.setitem(peers.PEERS, "jax_dense", broken)
  monkeypatch.setitem(peers.PEERS, "jax_causal", silent)
  result = benchmark.report("stage1", mesh, rounds=1, calls=1,
                            names=["ours", "jax_dense", "jax_causal"])
  assert result["not_run"] == {"jax_dense": "RuntimeError: out of memory",
                               "jax_causal": "MemoryError: "}
  monkeypatch.setitem(peers.PEERS, "ours", broken)
  with pytest.raises(RuntimeError, match="out of memory"):
    benchmark.report("stage1", mesh, rounds=1, calls=1, names=["ours"])


def _half_forgotten(ranks_q, ranks_k):
  """A block map that lacks some live blocks."""
  late = dataclasses.replace(ranks_q, a=jnp.minimum(ranks_q.a, ranks_q.a.max() // 2))
  return blocks.block_map(late, ranks_k, 62, 62)


def test_what_computes_wrongly_is_not_measured(mesh, monkeypatch):
  benchmark.check("stage1", mesh)
  with pytest.raises(RuntimeError, match="its output differs from dense attention by"):
    benchmark.check("stage1", mesh, build=_half_forgotten)
  monkeypatch.setitem(benchmark.CANDIDATES, "xla", ((22, 44), (1, 2)))
  block_map = blocks.block_map
  wrong_at = lambda *ranks, block_q, block_k: (
      _half_forgotten(*ranks) if block_q == 22 else block_map(*ranks, block_q, block_k))
  monkeypatch.setattr(blocks, "block_map", wrong_at)
  assert set(benchmark.tune("stage1", mesh, rounds=1, calls=1)["seconds"]) == {"44x44"}


def test_splash_is_set_up_as_its_compiler_wants_it():
  """For TPU, which is not there: the peer must not fail for our mistake."""
  visible = np.tril(np.ones((700, 700), bool))
  attend = peers.splash_attention(visible, heads=2)
  q = jax.ShapeDtypeStruct((1, 700, 2, 128), jnp.bfloat16)
  loss = lambda q, k, v: attend(q, k, v).astype(jnp.float32).sum()
  exported = jax.export.export(jax.jit(jax.grad(loss, (0, 1, 2))), platforms=["tpu"])(q, q, q)
  assert [x.shape for x in exported.out_avals] == [q.shape] * 3


def test_tuning_writes_the_fastest_sizes_for_this_device(mesh, monkeypatch):
  monkeypatch.setitem(benchmark.CANDIDATES, "xla", ((22, 44), (1, 2)))
  times = {"22x22": {"forward": 1.0, "both": 3.0}, "44x44": {"forward": 2.0, "both": 2.5}}
  seen = []
  monkeypatch.setattr(benchmark, "measure", lambda runners, *_: seen.extend(runners) or times)
  result = benchmark.tune("stage1", mesh, rounds=1, calls=1)
  assert sorted(seen) == ["22x22", "44x44"]  # each once, though three entries mean the first
  assert result["best"] == "44x44"
  kind = jax.devices()[0].device_kind
  table = json.loads(tuning.TABLE.read_text())
  assert table["xla"][f"{kind}/32"] == [44, 2]
  assert set(table) == {"xla", "tpu", "gpu"}
  assert tuning.block_sizes("xla", 1000, 30, 22, 32) == (44, 44)
  assert tuning.block_sizes("xla", 1000, 1000, 22, 64) == (88, 88)  # another head size's line


@pytest.mark.parametrize("name,entry,lengths,sizes", [
  ("xla", (264, 4), (2000, 2000), (264, 264)),
  ("xla", (264, 4), (2000, 66), (264, 66)),
  ("tpu", (512, 1024), (35_298, 700), (512, 768)),
  ("gpu", (128, 128), (40, 4000), (128, 128))])
def test_blocks_are_no_longer_than_their_sequence(name, entry, lengths, sizes):
  assert tuning.fitted(name, entry, *lengths, frame_tokens=66) == sizes
