"""One run in two processes under the launcher, of which one after the other is killed.

In `make test` three kills; in `make soak` twenty in a run of configs/tiny.py, and the result
goes to benchmarks/results/chaos_soak.json.
"""

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest

import processes
import tiny_run
from videogpt_jax import checkpoint_files
from videogpt_jax.benchmarks import report

ROOT = pathlib.Path(__file__).parent.parent


def _launch(workdir, *options):
  """Starts the run, two processes of one device each, as a user does on one machine."""
  return subprocess.Popen(
    [ROOT / "launch" / "local.sh", "start", "--processes=2", "--devices_per_process=1",
     "--max_restarts=100", "--restart_delay=0", "--", *options, f"--workdir={workdir}",
     "--config.log.every=1", "--config.log.videos=0"],
    stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT,
    env={**os.environ, "VENV": str(pathlib.Path(sys.prefix))})


class _Run:
  """A launched run as one sees it from outside."""

  def __init__(self, workdir, launcher):
    self._workdir, self._launcher = workdir, launcher
    self._log, self._seen = workdir / "logs" / "process-0.log", 0

  def wait(self, condition):
    """Waits until it holds; the run must be going on."""
    deadline = time.monotonic() + 900
    while not condition():
      assert self._launcher.poll() is None, self._log.read_text()[-2000:]
      assert time.monotonic() < deadline
      time.sleep(0.02)

  def pids(self):
    """Of the two processes, started most recently."""
    file = self._workdir / "logs" / "pids"
    return [int(x) for x in file.read_text().split()[1:]] if file.exists() else []

  def step(self):
    """The last step reported since the last kill, or 0."""
    text = self._log.read_text()[self._seen:] if self._log.exists() else ""
    return int((re.findall(r"^step (\d+)/", text, re.MULTILINE) or [0])[-1])

  def newest(self):
    """Step of the newest finished checkpoint, or 0."""
    folder = self._workdir / checkpoint_files.FOLDER
    return max((int(x.name) for x in folder.glob("*") if x.name.isdigit()), default=0)

  def kill(self, which):
    """Kills one of the processes; returns when the launcher has started both anew."""
    before, self._seen = self.pids(), len(self._log.read_text())
    os.kill(before[which], signal.SIGKILL)
    self.wait(lambda: self.pids() != before)
    self._seen = len(self._log.read_text())


def _chaos(run, kills, steps, moments, longest):
  """Kills processes: most while they train, every fourth at any moment since its start.

  That may be while they look for each other, restore or compile.
  """
  record = []
  run.wait(lambda: len(run.pids()) == 2)
  for number in range(kills):
    resumed = run.newest()
    if number % 4 == 1:
      time.sleep(moments.uniform(0, longest))
    else:
      reach = max(1, 2 * (steps - 6 - resumed) // (kills - number + 1))
      wanted = resumed + moments.randint(1, reach)
      run.wait(lambda wanted=wanted: run.step() >= wanted)
      time.sleep(moments.uniform(0, 0.3))
    which, reported = moments.randrange(2), run.step()
    run.kill(which)
    record.append({"process": which, "resumed_at": resumed, "killed_after_step": reported,
                   "saved": run.newest()})
  return record


def _interrupt(tmp_path, options, kills, steps, moments, longest):
  """Runs once undisturbed and once with kills; what was killed when."""
  for name in ("alone", "killed"):
    launcher = _launch(tmp_path / name, *options)
    record = []
    if name == "killed":
      record = _chaos(_Run(tmp_path / name, launcher), kills, steps, moments, longest)
    assert launcher.wait() == 0, launcher.stderr.read()
  return record


def test_a_run_of_two_processes_survives_three_kills(tiny, tmp_path):
  tiny.train.steps, tiny.log.validate_every, tiny.checkpoint.every = 120, 60, 10
  file = tiny_run.config_file(tiny, tmp_path / "config.py")
  seed = random.SystemRandom().randrange(2**32)
  print(f"moments drawn with seed {seed}")
  record = _interrupt(tmp_path, [f"--config={file}"], 3, 120, random.Random(seed), 10.0)
  assert len(record) == 3 and any(kill["saved"] for kill in record)
  tiny_run.assert_same_state(tmp_path / "killed", tmp_path / "alone")
  assert processes.losses(tmp_path / "killed") == processes.losses(tmp_path / "alone")


@pytest.mark.soak
def test_twenty_kills_of_two_processes(tmp_path, monkeypatch):
  for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_DEFAULT_MATMUL_PRECISION", "XLA_FLAGS"):
    monkeypatch.delenv(name, raising=False)  # every start compiles anew, as a user's does
  data, steps = tmp_path / "data", 2000
  options = ["--config=configs/tiny.py", f"--config.data.path={data}",
             f"--config.train.steps={steps}"]
  subprocess.run([sys.executable, "-m", "videogpt_jax.encode", "--config=configs/tiny.py",
                  f"--out={data}"], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
  seed = random.SystemRandom().randrange(2**32)
  record = _interrupt(tmp_path, options, 20, steps, random.Random(seed), 40.0)
  tiny_run.assert_same_state(tmp_path / "killed", tmp_path / "alone")
  report.finish({
    "benchmark": "chaos_soak", "config": "configs/tiny.py", "processes": 2, "steps": steps,
    "kills": len(record), "bit_equal": True, "seed": seed,
    "compared": "every array of parameters, EMA and optimizer state", "runs": record,
  }, str(ROOT / "benchmarks" / "results" / "chaos_soak.json"), "")
