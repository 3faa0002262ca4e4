"""The watchdog on processes that really hang."""

import os
import pathlib
import subprocess
import sys
import time

import jax
import pytest

from videogpt_jax import signal_file
from videogpt_jax import step as step_lib
from videogpt_jax import train
from videogpt_jax import watchdog

_PROCESS = """
import ctypes, sys, time
from videogpt_jax import watchdog

workdir, process, action, does = sys.argv[1:]
dog = watchdog.Watchdog(workdir, 1.0, action, process=int(process), poll=0.1)

def waits_for_the_others():
  time.sleep(60)

def works():
  while True:
    time.sleep(0.02)
    dog.beat()

def holds_the_interpreter():
  ctypes.PyDLL(None).sleep(60)

print("ready", flush=True)
globals()[does]()
"""


def _start(workdir, process, action, does):
  started = subprocess.Popen(
    [sys.executable, "-c", _PROCESS, str(workdir), str(process), action, does],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  assert started.stdout.readline() == "ready\n"
  return started


def _wait_for(condition, seconds=60):
  end = time.monotonic() + seconds
  while not (found := condition()):
    assert time.monotonic() < end, "waited in vain"
    time.sleep(0.05)
  return found


def _stacks(workdir, process):
  return [path.read_text() for path in sorted((workdir / watchdog.FOLDER).glob(f"{process}-*.txt"))]


def test_a_hung_process_and_one_that_works_both_write_their_stacks(tmp_path):
  processes = [_start(tmp_path, 3, "report", "works"),
               _start(tmp_path, 4, "report", "waits_for_the_others")]
  try:
    hung, = _wait_for(lambda: _stacks(tmp_path, 4))
    other, = _wait_for(lambda: _stacks(tmp_path, 3))
    time.sleep(1)
    assert len(_stacks(tmp_path, 3)) == len(_stacks(tmp_path, 4)) == 1  # told once
    assert all(process.poll() is None for process in processes)
  finally:
    for process in processes:
      process.kill()
  assert "no step finished in the time allowed" in hung and "in waits_for_the_others" in hung
  assert "process 4 hangs" in other and "in works" in other
  for process, text in zip(processes, (other, hung), strict=True):
    assert text in process.communicate()[1]


def test_abort_ends_the_process_with_a_status_of_its_own(tmp_path):
  process = _start(tmp_path, 0, "abort", "waits_for_the_others")
  errors = process.communicate(timeout=60)[1]
  assert process.returncode == watchdog.HUNG_STATUS
  assert "in waits_for_the_others" in errors


def test_code_that_never_lets_python_run_is_told_of_too(tmp_path):
  process = _start(tmp_path, 0, "abort", "holds_the_interpreter")
  errors = process.communicate(timeout=60)[1]
  assert process.returncode not in (0, None)
  assert "in holds_the_interpreter" in errors
  assert not _stacks(tmp_path, 0)


@pytest.fixture
def watch(tmp_path):
  dogs = []

  def start(*arguments, **options):
    dogs.append(watchdog.Watchdog(tmp_path, *arguments, poll=0.02, **options))
    return dogs[-1]

  yield start
  for dog in dogs:
    dog.close()


def test_compilation_has_an_allowance_of_its_own(watch, tmp_path):
  begin = time.monotonic()
  watch(0.5)
  _wait_for(lambda: _stacks(tmp_path, 0))
  assert time.monotonic() - begin >= 0.5 * watchdog.COMPILATION


def test_every_stall_is_told_anew_and_a_beat_ends_it(watch, tmp_path, capsys):
  dog = watch(0.3)
  for stall in (1, 2):
    dog.beat()
    _wait_for(lambda n=stall: capsys.readouterr().err.count("no step finished") or n is None)
  dog.beat(1000)
  time.sleep(0.5)
  assert "no step" not in capsys.readouterr().err


def test_one_that_goes_on_after_all_is_not_ended(watch, tmp_path):
  left = []
  dog = watch(0.3, "abort", leave=left.append)
  dog.beat()
  mark = tmp_path / watchdog.FOLDER / watchdog.MARK
  _wait_for(mark.exists)
  dog.beat(1000)  # within the five looks that the others are given
  time.sleep(0.5)
  assert left == []


def test_nothing_is_watched_without_seconds(watch, tmp_path):
  watch(0.0)
  time.sleep(0.3)
  assert not list(tmp_path.iterdir())


def test_old_marks_are_no_news(watch, tmp_path):
  folder = tmp_path / watchdog.FOLDER
  folder.mkdir()
  (folder / watchdog.MARK).write_text("process 7")
  watch(100.0)
  time.sleep(0.3)
  assert not _stacks(tmp_path, 0)
  (folder / watchdog.MARK).write_text("process 8")
  text, = _wait_for(lambda: _stacks(tmp_path, 0))
  assert "process 8 hangs" in text


def test_a_training_whose_step_hangs(tiny, tmp_path, monkeypatch):
  compile_step = step_lib.compile_step

  def compile_and_hang(*arguments):
    run = compile_step(*arguments)

    def a_step_that_hangs(state, stored):
      if int(state.step) == 3:
        time.sleep(3)
      return run(state, stored)

    return a_step_that_hangs

  monkeypatch.setattr(step_lib, "compile_step", compile_and_hang)
  tiny.train.watchdog, tiny.train.steps, tiny.log.videos = 1.0, 5, 0
  assert train.train(tiny, str(tmp_path)) == 5  # it was only slow
  assert any("in a_step_that_hangs" in text for text in _stacks(tmp_path, jax.process_index()))


def test_a_signal_file_tells_once_of_every_writing(tmp_path):
  path = tmp_path / "file"
  path.write_text("before")
  ours, theirs = signal_file.SignalFile(path), signal_file.SignalFile(path)
  assert ours.news() is None
  path.write_text("first")
  assert (ours.news(), ours.news(), theirs.news()) == ("first", None, "first")
  path.unlink()
  assert ours.news() is None
  path.write_text("")
  assert (ours.news(), ours.news()) == ("", None)
  replacement = pathlib.Path(f"{path}.tmp")
  replacement.write_text("third")
  os.utime(replacement, ns=(0, path.stat().st_mtime_ns))  # a coarse clock: the same moment
  replacement.replace(path)
  assert ours.news() == "third"
  path.write_text("fourth")
  ours.forget()
  assert ours.news() is None
