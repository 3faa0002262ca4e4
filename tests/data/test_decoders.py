"""Decoder processes: what they return, in order, and what a bad video costs."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import psutil
import pytest

from videogpt_jax.data import decoders
from videogpt_jax.data import load
from videogpt_jax.errors import InputError


class Odd:
  """Makes a clip of a number, after a while; some numbers are bad, each in its own way."""

  def __init__(self, folder):
    self.folder = folder

  def __call__(self, item, beat):
    number, what = item
    if what == "refuse":
      raise InputError(f"refused: {number}")
    if what == "defect":
      raise KeyError(number)
    if what == "crash" or (what == "crash once" and self.first_time(number)):
      os.kill(os.getpid(), signal.SIGSEGV)
    if what == "exit":
      os._exit(7)
    if what == "hang" or (what == "hang once" and self.first_time(number)):
      time.sleep(600)
    if what == "slow":  # but alive
      for _ in range(12):
        time.sleep(0.25)
        beat()
    time.sleep(0.05 * (number % 3))
    frames = np.full((1, 2, 2, 3), number, np.uint8)
    return [load.Clip(frames=frames, fps=1.0, source=str(number))]

  def first_time(self, number):
    file = pathlib.Path(self.folder, str(number))
    seen = file.exists()
    file.touch()
    return not seen


class NeverUnpickled:
  def __reduce__(self):
    return (exec, ("raise SystemExit(3)",))


def _load(folder, items, processes=2, timeout=2.0):
  numbered = [(number, (number, what)) for number, what in enumerate(items)]
  with decoders.Decoders(Odd(str(folder)), processes, timeout) as pool:
    return dict(pool.load(numbered)), pool


@pytest.mark.parametrize("processes", [1, 3])
def test_clips_come_in_the_order_of_the_items(tmp_path, processes):
  found, pool = _load(tmp_path, ["good"] * 20, processes)
  assert list(found) == list(range(20))
  for number, clips in found.items():
    assert [clip.source for clip in clips] == [str(number)]
    assert np.all(clips[0].frames == number)
  assert pool.busy_s > 20 * 0.04


def test_a_bad_video_costs_itself_alone(tmp_path):
  items = ["good", "refuse", "crash", "good", "hang", "defect", "exit", "slow", "crash once",
           "hang once", "good"]
  found, _ = _load(tmp_path, items)
  reasons = {items[number]: result.reason for number, result in found.items()
             if isinstance(result, decoders.Rejected)}
  assert reasons == {
    "refuse": "refused: 1",
    "crash": "decoder crashed (signal 11, SIGSEGV), 2 times",
    "hang": "decoder hung: no frame for 2 s, 2 times",
    "defect": "decoder failed: KeyError: 5",
    "exit": "decoder ended with status 7, 2 times",
  }
  assert list(found) == list(range(len(items)))
  good = [number for number, result in found.items() if not isinstance(result, decoders.Rejected)]
  assert good == [0, 3, 7, 8, 9, 10]
  assert all(np.all(found[number][0].frames == number) for number in good)


def test_no_process_is_left_behind(tmp_path):
  before = set(psutil.Process().children(recursive=True))
  pool = decoders.Decoders(Odd(str(tmp_path)), 2, 60.0)
  with pool:
    items = pool.load((i, (i, "good")) for i in range(100))
    assert next(items)[0] == 0
    assert len(set(psutil.Process().children()) - before) == 2
  assert set(psutil.Process().children(recursive=True)) == before


def test_items_are_asked_for_only_a_little_ahead(tmp_path):
  asked = []

  def items():
    for i in range(100):
      asked.append(i)
      yield i, (i, "good")

  with decoders.Decoders(Odd(str(tmp_path)), 2, 60.0) as pool:
    for number, _ in pool.load(items()):
      assert len(asked) <= number + 1 + 2 * 2
      if number == 10:
        break


def test_processes_that_do_not_start_are_an_error():
  with (decoders.Decoders(NeverUnpickled(), 1, 60.0) as pool,
        pytest.raises(InputError, match=r"a decoder process does not start.*status 3")):
    list(pool.load([(0, 0)]))


def test_processes_end_with_a_parent_that_is_killed(tmp_path):
  program = textwrap.dedent(f"""
    import sys
    sys.path.insert(0, {str(pathlib.Path(__file__).parent)!r})
    from test_decoders import Odd
    from videogpt_jax.data import decoders
    pool = decoders.Decoders(Odd({str(tmp_path)!r}), 2, 60.0)
    for number, _ in pool.load((i, (i, "good" if i < 4 else "hang")) for i in range(9)):
      print(number, flush=True)
  """)
  process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
  for number in range(4):
    assert process.stdout.readline() == f"{number}\n"
  children = psutil.Process(process.pid).children(recursive=True)
  assert len(children) == 2
  process.kill()
  process.wait()
  _, alive = psutil.wait_procs(children, timeout=10)
  assert not alive
