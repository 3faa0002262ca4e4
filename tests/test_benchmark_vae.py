"""The benchmark of the autoencoder: what it says, and that who computes wrongly is not timed."""

import json
import sys

import numpy as np
import pytest

import tiny_run
from videogpt_jax.benchmarks import vae as benchmark
from videogpt_jax.errors import InputError

CONFIG = benchmark.CASES["tiny"]


@pytest.fixture(scope="module")
def ours():
  return benchmark.ours(CONFIG, benchmark.random_tensors(CONFIG))


def test_vae_benchmark_says_how_many_frames_a_second(tmp_path):
  out = tmp_path / "result.json"
  done = tiny_run.run("benchmarks.vae", "--case=tiny", "--peers=", "--sizes=16x24", "--batch=2",
                      "--rounds=1", f"--out={out}")
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout.splitlines()[-1])
  assert result == json.loads(out.read_text())
  assert {"benchmark", "date", "commit", "device", "threads", "jax", "batch"} <= set(result)
  figures = result["sizes"]["16x24"]
  assert set(figures) == {"ours"}
  for what in ("encode", "decode"):
    assert figures["ours"][f"{what}_frames_per_second"] > 0
    assert figures["ours"][f"{what}_fastest_frames_per_second"] > 0


def test_vae_benchmark_compares_before_it_measures(ours):
  ways = {"ours": ours, "same": ours}
  figures = benchmark.measure(CONFIG, 16, 24, 2, 1, ways)
  assert figures["same"]["encode_difference_from_ours"] == 0
  rates = [figures[name]["decode_frames_per_second"] for name in ways]
  assert figures["decode_ratio"] == pytest.approx(rates[0] / rates[1])
  wrong = {**ours, "decode": lambda z: np.asarray(ours["decode"](z)) + 0.01}
  with pytest.raises(RuntimeError, match=r"decode of wrong differs from ours by .*not measured"):
    benchmark.measure(CONFIG, 16, 24, 2, 1, {"ours": ours, "wrong": wrong})


def test_vae_benchmark_names_the_extra_of_its_peer(monkeypatch):
  monkeypatch.setitem(sys.modules, "diffusers", None)
  with pytest.raises(InputError, match=r"pip install 'videogpt_jax\[bench\]', or --peers= to"):
    benchmark.diffusers(CONFIG, benchmark.random_tensors(CONFIG), 1)


@pytest.mark.parametrize(("sizes", "message"), [
  (["16"], "--sizes=16: give HEIGHTxWIDTH"), (["16xa"], "give HEIGHTxWIDTH")])
def test_vae_benchmark_refuses_what_is_no_size(sizes, message):
  with pytest.raises(InputError, match=message):
    benchmark._parsed(sizes)


def test_vae_benchmark_refuses_other_sides_and_batches(ours):
  with pytest.raises(InputError, match="20x16 px do not divide into cells of 8 px"):
    benchmark.measure(CONFIG, 20, 16, 1, 1, {"ours": ours})
  for wrong in (["0"], ["a"], []):
    with pytest.raises(InputError, match="--peer_batches="):
      benchmark._batches(wrong)


def test_vae_benchmark_agrees_with_its_peer(ours):
  pytest.importorskip("diffusers", reason="extra [bench]")
  peer = benchmark.diffusers(CONFIG, benchmark.random_tensors(CONFIG), 2)
  figures = benchmark.measure(CONFIG, 16, 24, 3, 1, {"ours": ours, "diffusers": peer})
  assert figures["diffusers"]["decode_difference_from_ours"] < 1e-5
