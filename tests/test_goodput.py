"""The account of a run's time against clocks that the tests turn by hand."""

import json
import random

import pytest

from videogpt_jax.telemetry import goodput


class World:
  """Wall time, and the records that outlive processes."""

  def __init__(self):
    self.now = 1.7e9
    self.records = []

  def process(self, step):
    """A process that starts now; its clock that never jumps began somewhere else."""
    account = goodput.Account(clock=lambda: self.now - 1.23e9, now=lambda: self.now)
    self.now += 3
    account.open(list(self.records), step, self.keep)
    account.enter(goodput.STEP)
    return account

  def keep(self, record):
    self.records.append(json.loads(json.dumps(record)))

  def wall(self):
    return self.now - 1.7e9


def _used(account):
  return {name: seconds for name, seconds in account.totals().items() if seconds}


def test_phases_stand_in_one_another_and_add_up():
  world = World()
  account = world.process(0)
  with account.phase(goodput.COMPILE):
    world.now += 40
  world.now += 5
  with account.phase(goodput.EVALUATION):
    world.now += 7
    with account.phase(goodput.CHECKPOINT):
      world.now += 2
    world.now += 1
  world.now += 10
  with pytest.raises(KeyError), account.phase(goodput.DATA_WAIT):
    world.now += 4
    raise KeyError
  world.now += 1
  assert _used(account) == pytest.approx(
    {"start": 3, "compile": 40, "step": 16, "evaluation": 8, "checkpoint": 2, "data_wait": 4})
  account.move(goodput.DATA_WAIT, goodput.STEP, 3)  # the device was busy all the same
  account.move(goodput.STEP, goodput.LOST, 9)  # and one update was not kept
  assert _used(account) == pytest.approx(
    {"start": 3, "compile": 40, "step": 10, "evaluation": 8, "checkpoint": 2, "data_wait": 1,
     "lost": 9})
  assert sum(account.totals().values()) == pytest.approx(world.wall())
  assert goodput.share(account.totals()) == pytest.approx(10 / 73)


def test_a_killed_run_has_lost_the_steps_after_its_checkpoint_and_the_time_between():
  world = World()
  account = world.process(0)
  for step in range(1, 26):
    world.now += 2
    if step % 10 == 0:  # also the steps of the checkpoints
      account.record(step)
  world.now += 1  # killed in the middle of step 26; the last record is of step 20
  world.now += 500
  account = world.process(10)
  assert _used(account) == pytest.approx(
    {"start": 6, "step": 20, "lost": 20, "down": 10 + 1 + 500})
  assert sum(account.totals().values()) == pytest.approx(world.wall())
  world.now += 6
  assert goodput.share(account.totals()) == pytest.approx(26 / world.wall())
  assert [record.get("event") for record in world.records] == ["start", None, None, "start"]


def test_of_a_record_across_the_checkpoint_a_part_is_kept():
  world = World()
  account = world.process(0)
  world.now += 30
  account.record(20)
  account = world.process(15)
  assert _used(account) == pytest.approx({"start": 6, "step": 22.5, "lost": 7.5})


def test_an_older_checkpoint_undoes_what_several_processes_did():
  world = World()
  account = world.process(0)
  for step in (10, 20, 30):
    world.now += step  # 1, 2, 3 s a step
    account.record(step)
  account = world.process(20)
  world.now += 40
  account.record(30)
  account = world.process(5)  # both checkpoints turn out to be damaged
  assert _used(account) == pytest.approx({"start": 9, "step": 5, "lost": 5 + 20 + 30 + 40})
  assert sum(account.totals().values()) == pytest.approx(world.wall())


def test_a_run_that_goes_back_by_itself():
  world = World()
  account = world.process(0)
  for step in range(1, 8):
    world.now += 1
    if step == 5:
      account.record(5)
  account.record(7)
  account.record(4, "back")
  world.now += 2
  assert _used(account) == pytest.approx({"start": 3, "step": 6, "lost": 3})
  account.record(6)
  assert _used(world.process(6)) == pytest.approx({"start": 6, "step": 6, "lost": 3})


def test_after_the_end_nobody_misses_a_process():
  world = World()
  account = world.process(0)
  world.now += 17
  account.record(10, "end")
  world.now += 1e6
  account = world.process(10)  # train.steps has been raised
  world.now += 3
  assert _used(account) == pytest.approx({"start": 6, "step": 20})


def test_a_clock_set_back_between_processes_gives_no_negative_time():
  world = World()
  account = world.process(0)
  world.now += 5
  account.record(5)
  world.now -= 100
  assert _used(world.process(5)) == pytest.approx({"start": 6, "step": 5})


@pytest.mark.parametrize("seed", range(20))
def test_random_runs_against_a_list_of_the_steps_that_count(seed):
  """Steps of random length, kills and resumes: the good time is that of the final steps."""
  draw = random.Random(seed)
  world, kept, waste = World(), {}, 0.0
  done = saved = 0
  account = world.process(0)
  for _ in range(200):
    seconds = draw.uniform(0.1, 3)
    kind = draw.choice(("step", "step", "step", "skipped", "save", "evaluate", "kill", "back"))
    if kind in ("step", "skipped"):
      world.now += seconds
      done += 1
      kept[done] = seconds if kind == "step" else 0
      if kind == "skipped":
        account.move(goodput.STEP, goodput.LOST, seconds)
        waste += seconds
      account.record(done)
    elif kind == "save":
      with account.phase(goodput.CHECKPOINT):
        world.now += seconds
      saved = done
    elif kind == "evaluate":
      with account.phase(goodput.EVALUATION):
        world.now += seconds
      account.record(done)
    else:
      saved = saved if draw.random() < 0.7 else draw.randint(0, saved)
      waste += sum(seconds for step, seconds in kept.items() if step > saved)
      kept = {step: seconds for step, seconds in kept.items() if step <= saved}
      done = saved
      if kind == "kill":
        world.now += seconds
        account = world.process(done)
      else:
        account.record(done, "back")
    totals = account.totals()
    assert totals["step"] == pytest.approx(sum(kept.values()), abs=1e-3)
    assert totals["lost"] == pytest.approx(waste, abs=1e-3)
    assert sum(totals.values()) == pytest.approx(world.wall(), abs=1e-3)


def test_the_table_names_every_phase_that_took_time():
  world = World()
  account = world.process(0)
  world.now += 96
  account.record(5)
  world.now += 20
  table = world.process(5).table()
  assert table.splitlines() == [
    "where the time went since the first start (2 starts):",
    "  start               6.0 s    4.9%",
    "  step               96.0 s   78.7%",
    "  down               20.0 s   16.4%",
    "  all               122.0 s, goodput 78.7%",
  ]
