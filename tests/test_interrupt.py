"""Killed at any moment and started again, a run ends with the bits of one left alone.

In `make test` three kills; in `make soak` twenty, without shared compiled programs, and the
result goes to benchmarks/results/interrupt_soak.json.
"""

import datetime
import json
import os
import pathlib
import platform
import random
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest

import tiny_run
from videogpt_jax import checkpoint_files

ROOT = pathlib.Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "interrupt_soak.json"


def _command(config_file, workdir, *options):
  return [sys.executable, "-m", "videogpt_jax.main", f"--config={config_file}",
          f"--workdir={workdir}", "--config.platform=cpu", "--config.log.every=1",
          "--config.log.videos=0", *options]


def _kill(command, log, *, step=None, seconds=0.0):
  """Starts a run and kills it `seconds` after it reported `step` (None: after its start).

  Returns the step that it last reported. No process of it may survive.
  """
  with log.open("a") as errors:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
  reported = None
  while step is not None and (reported or 0) < step:
    line = process.stdout.readline()
    assert line, f"the run ended before step {step}: {log.read_text()[-2000:]}"
    if found := re.match(r"step (\d+)/", line):
      reported = int(found[1])
  time.sleep(seconds)
  workers = psutil.Process(process.pid).children(recursive=True)
  process.send_signal(signal.SIGKILL)
  process.communicate()  # returns when nobody holds the pipe any more, workers included
  assert process.returncode == -signal.SIGKILL
  assert not psutil.wait_procs(workers, timeout=20)[1], "worker processes survived"
  return reported


def _newest(workdir):
  """Step of the newest finished checkpoint; 0 if there is none."""
  folder = workdir / checkpoint_files.FOLDER
  return max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)


def _finish(command):
  result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
  assert result.returncode == 0, result.stderr
  return result.stdout


@pytest.mark.parametrize(("workers", "kills"), [(0, 2), (2, 1)])
def test_killed_runs_end_with_the_bits_of_one_left_alone(finished, tmp_path, workers, kills):
  seed = random.SystemRandom().randrange(2**32)
  print(f"moments drawn with seed {seed}")
  moments = random.Random(seed)
  workdir, log = tmp_path / "run", tmp_path / "stderr.txt"
  command = _command(finished.config_file, workdir, f"--config.data.workers={workers}")
  for kill in range(kills):  # every time somewhere in the next part of the 24 steps
    part = 18 // kills
    step = moments.randint(kill * part + 1, (kill + 1) * part)
    reported = _kill(command, log, step=step, seconds=moments.uniform(0, 0.15))
    assert reported < 24
    assert _newest(workdir) < 24
  resumed = re.search(r"resuming .* at step (\d+)", _finish(command))
  assert resumed or step <= 6  # from there on the checkpoint of step 3 is whole
  tiny_run.assert_same_state(workdir, finished.workdir)


@pytest.mark.soak
def test_twenty_kills(tiny_data, tmp_path, monkeypatch):
  for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_DEFAULT_MATMUL_PRECISION", "XLA_FLAGS"):
    monkeypatch.delenv(name, raising=False)  # every start compiles anew, as a user's does
  config_file = tiny_run.config_file(tiny_run.config(tiny_data), tmp_path / "config.py")
  steps, kills, record, commit = 60, 10, [], _commit()
  seed = random.SystemRandom().randrange(2**32)
  moments = random.Random(seed)
  alone = tmp_path / "alone"
  began = time.monotonic()
  _finish(_command(config_file, alone, f"--config.train.steps={steps}"))
  whole_run = time.monotonic() - began
  for workers in (0, 2):
    workdir, log = tmp_path / f"workers{workers}", tmp_path / f"stderr{workers}.txt"
    command = _command(config_file, workdir, f"--config.train.steps={steps}",
                       f"--config.data.workers={workers}")
    for kill in range(kills):
      done = _newest(workdir)
      if kill % 4 == 3:  # any time: while importing, restoring, compiling, or later
        step, seconds = None, moments.uniform(0, whole_run / 2)
      else:  # while training and saving
        reach = 2 * (steps - 6 - done) // (kills - kill + 1)
        step, seconds = done + moments.randint(1, max(1, reach)), moments.uniform(0, 0.3)
      reported = _kill(command, log, step=step, seconds=seconds)
      record.append({"workers": workers, "resumed_at": done, "killed_after_step": reported,
                     "saved": _newest(workdir)})
    _finish(command)
  same = [_same(tmp_path / f"workers{workers}", alone) for workers in (0, 2)]
  RESULT.parent.mkdir(parents=True, exist_ok=True)
  RESULT.write_text(json.dumps({
    "kills": len(record), "bit_equal": all(same), "date": datetime.date.today().isoformat(),
    "commit": commit if commit == _commit() else f"{commit} to {_commit()}",
    "device": f"{_processor()}, {os.cpu_count()} cores, CPU backend",
    "compared": "every array of params, EMA and optimizer state", "steps": steps, "seed": seed,
    "runs": record}, indent=2) + "\n")
  assert all(same), f"see {RESULT}"
  assert len(record) == 20


def _same(workdir, other):
  try:
    tiny_run.assert_same_state(workdir, other)
  except AssertionError as error:
    print(error)
    return False
  return True


def _commit():
  command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False
                        ).stdout.strip()


def _processor():
  info = pathlib.Path("/proc/cpuinfo")
  names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
  return names[0] if names else platform.machine()
