"""What the log makes of steps whose time the test sets."""

import contextlib
import re

import jax.numpy as jnp
import pytest

from videogpt_jax import config as config_lib
from videogpt_jax import step as step_lib
from videogpt_jax import telemetry
from videogpt_jax import train
from videogpt_jax import train_log
from videogpt_jax import watchdog


class Clock:
  def __init__(self):
    self.now = 1000.0

  def __call__(self):
    return self.now


def _metrics(bad_steps=0):
  bins = {"noise": step_lib.NOISE_BINS, "clip": step_lib.CLIP_BINS}
  sums = {f"{kind}_{name}": jnp.ones(n) for kind, n in bins.items() for name in ("sum", "count")}
  return {"loss_sum": jnp.float32(3), "loss_count": jnp.float32(2), "grad_norm": jnp.float32(1),
          "learning_rate": jnp.float32(0.1),
          "bad_steps": jnp.int32(bad_steps), "skipped": jnp.int32(bad_steps), **sums}


@pytest.fixture
def make(tiny, tmp_path):
  """A log, its clock and its account; nothing is computed."""
  with contextlib.ExitStack() as stack:

    def log():
      clock = Clock()
      account = telemetry.Account(clock, clock)
      writer = stack.enter_context(contextlib.closing(telemetry.Writer(tmp_path)))
      made = stack.enter_context(contextlib.closing(train_log.TrainLog(
        tiny, config_lib.recipe(tiny), train.open_data(tiny)[0], writer, account,
        watchdog.Watchdog(tmp_path, 0), workdir=str(tmp_path), start=0)))
      return made, clock, account

    yield log


def _step(log, clock, step, seconds, shape=(8, 4), bad_steps=0):
  with log.stepping(step, shape):
    log.add(step, _metrics(bad_steps))
    clock.now += seconds


def _used(account):
  return {name: seconds for name, seconds in account.totals().items() if seconds}


def test_every_shape_of_batches_compiles_once_and_is_no_slow_step(make, capsys):
  log, clock, account = make()
  clock.now += 7  # data and state
  for step, (seconds, shape) in enumerate(
      [(40, (8, 4)), (3, (8, 4)), (20, (8, 6)), (5, (8, 6)), (2, (8, 4)), (2, (8, 4))], start=1):
    _step(log, clock, step, seconds, shape)
  log.catch_up()
  assert _used(account) == {"start": 7, "compile": 60, "step": 12}
  said = capsys.readouterr().out
  assert "first step done after 40.0 s" in said
  assert "step 3 took 20.0 s: it was compiled for batches of 8x6\n" in said
  assert re.findall(r"^step (\d)/12 .* (\d+) ms ", said, re.M) == [
    ("2", "3000"), ("4", "5000"), ("6", "2000")]


def test_the_time_of_a_skipped_update_is_lost(make):
  log, clock, account = make()
  for step, (seconds, bad) in enumerate([(10, 0), (1, 0), (2, 1), (4, 0)], start=1):
    _step(log, clock, step, seconds, bad_steps=bad)
  with log.aside("checkpoint"):
    clock.now += 16
  log.catch_up()
  log.saved(4)
  log.finish()
  assert _used(account) == {"compile": 10, "step": 5, "lost": 2, "checkpoint": 16}


def test_waiting_is_idle_time_only_while_the_device_is(make, monkeypatch):
  log, clock, account = make()
  with log.waiting():
    clock.now += 9  # for the first batch: a part of the start
  _step(log, clock, 1, 10)
  monkeypatch.setattr(log._device, "busy", lambda since: 3.0)
  with log.waiting():
    clock.now += 5
  with log.waiting():
    clock.now += 1
  assert _used(account) == {"start": 9, "compile": 10, "step": 4, "data_wait": 2}


def test_a_run_that_ends_by_an_error_keeps_its_time(make, tmp_path):
  log, clock, _ = make()
  for step in range(1, 4):
    _step(log, clock, step, 1, bad_steps=step)
  assert log.skipped == 2  # one step late
  clock.now += 5
  log.close()
  told = telemetry.Writer(tmp_path, 100).timings()[-1]
  assert told["time"] == clock.now
  assert "event" not in told


def test_what_a_return_undoes_is_lost(make, tmp_path):
  log, clock, _ = make()
  for step in range(1, 9):
    _step(log, clock, step, 1, bad_steps=max(0, step - 6))
  log.catch_up()
  assert log.skipped == 2
  log.went_back(8, 4)
  assert log.skipped == 0
  _step(log, clock, 9, 1)
  log.close()
  records = telemetry.Writer(tmp_path, 100).timings()
  back = next(i for i, record in enumerate(records) if record.get("event") == "back")
  assert records[back]["step"] == 4
  assert records[back - 1]["step"] == 8


