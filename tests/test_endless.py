"""Endless rollouts: flat in time and memory. 50 clips in `make test`, 1,000 in `make soak`."""

import json
import os
import subprocess
import sys

import pytest

from videogpt_jax import weights as weights_lib
from videogpt_jax.benchmarks import drift
from videogpt_jax.benchmarks import endless
from videogpt_jax.benchmarks import report
from videogpt_jax.sampler import Sampler


def test_fifty_clips_need_no_more_memory_and_no_new_program():
  """How long they take is for the soak: tests run beside each other."""
  found = endless.measure(weights_lib.load(), clips=50, steps=2, clip_frames=4, window=16, turns=2)
  assert found["programs"][0] == found["programs"][1]
  # The allocator settles within some MiB; keys and values of 45 clips, were they kept, are 30.
  assert found["rss_growth_mib"] < 20


def test_drift_sees_the_simulator_as_it_is():
  weights = weights_lib.load()
  found = drift.measure(weights, videos=1, clips=3, size=2, window=6, sampler=Sampler(1))["by_clip"]
  assert found["truth"]["mse"] == [0, 0, 0] and min(found["truth"]["found"]) > 0.8
  assert found["recompute"]["mse"][0] == pytest.approx(found["rolling"]["mse"][0], rel=1e-3)
  assert min(found["rolling"]["mse"]) > 0
  assert found["recompute"]["mse"][2] != found["rolling"]["mse"][2]  # frames have left


@pytest.mark.soak
def test_a_thousand_clips():
  """In a process of its own, optimised; the result is kept."""
  path = report.RESULTS / "endless_rollout.json"
  done = subprocess.run(
    [sys.executable, "-m", "videogpt_jax.benchmarks.endless", "--clips=1000", f"--out={path}"],
    env={name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}, check=False,
    capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  found = json.loads(done.stdout.splitlines()[-1])
  assert abs(found["time_ratio"] - 1) < 0.05
  assert found["rss_growth_mib"] < 16
