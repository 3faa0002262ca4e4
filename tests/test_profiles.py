"""Traces of chosen steps, read back with jax's own reader."""

import jax
import jax.numpy as jnp
import pytest

from videogpt_jax import train
from videogpt_jax.telemetry import profiles


def _events(folder):
  """Names of the host's events in a trace, and the numbers of its steps."""
  (path,) = folder.glob("plugins/profile/*/*.xplane.pb")
  names, steps = set(), []
  for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
    for line in plane.lines:
      for event in line.events:
        names.add(event.name)
        if event.name == "train":
          steps.append(dict(event.stats)["step_num"])
  return names, sorted(steps)


def test_a_run_traces_the_steps_of_its_configuration(tiny, tmp_path, capsys):
  tiny.log.profile_at, tiny.log.profile_steps = 3, 4  # a save and an evaluation among them
  tiny.log.videos, tiny.train.steps, tiny.log.validate_every = 0, 8, 5
  assert train.train(tiny, str(tmp_path)) == 8
  names, steps = _events(tmp_path / profiles.FOLDER / "step_3_process_0")
  assert steps == [3, 4, 5, 6]
  assert names >= {"data_wait", "checkpoint", "evaluation"}
  said = capsys.readouterr().out
  assert "tracing steps 3 to 6\n" in said
  assert f"wrote the trace {tmp_path / profiles.FOLDER / 'step_3_process_0'}\n" in said
  assert len(list((tmp_path / profiles.FOLDER).iterdir())) == 1


def test_a_trace_that_the_end_of_the_run_cuts_short_is_written(tiny, tmp_path):
  tiny.log.profile_at, tiny.log.profile_steps = 2, 100
  tiny.log.videos, tiny.train.steps = 0, 3
  assert train.train(tiny, str(tmp_path)) == 3
  assert _events(tmp_path / profiles.FOLDER / "step_2_process_0")[1] == [2, 3]


def _run(profiler, steps):
  """Lets steps pass by as the loop does; returns what the profiler said."""
  said = []
  for step in steps:
    if profiler.due(step):
      said.append(profiler.change(step))
    with jax.profiler.StepTraceAnnotation("train", step_num=step):
      jnp.ones(3).block_until_ready()
  return said


def test_the_file_asks_every_process_and_stays(tmp_path, monkeypatch):
  request = tmp_path / profiles.REQUEST
  request.write_text("9")  # of a run before this one
  first, second = (profiles.Profiler(tmp_path, 0, 2) for _ in range(2))
  assert _run(first, range(1, 4)) == []
  request.write_text("3\n")
  said = _run(first, range(4, 9))
  assert said[0] == "tracing steps 4 to 6"
  assert _events(tmp_path / profiles.FOLDER / "step_4_process_0")[1] == [4, 5, 6]
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  _run(second, range(4, 9))  # another host, which looks later
  assert _events(tmp_path / profiles.FOLDER / "step_4_process_1")[1] == [4, 5, 6]
  request.write_text("")  # the default number
  assert _run(second, range(9, 14))[0] == "tracing steps 9 to 10"


@pytest.mark.parametrize("text", ["many", "0", "-1", "1e3", "100000"])
def test_a_request_that_makes_no_sense_is_warned_of(tmp_path, text, caplog):
  profiler = profiles.Profiler(tmp_path, 0, 2)
  (tmp_path / profiles.REQUEST).write_text(text)
  assert _run(profiler, range(1, 4)) == []
  assert "must hold a number of steps" in caplog.text and text in caplog.text


def test_a_trace_that_cannot_begin_stops_nothing(tmp_path, caplog):
  profiler = profiles.Profiler(tmp_path / "ours", 2, 2)
  with jax.profiler.trace(tmp_path / "theirs"):
    assert _run(profiler, range(1, 6)) == ["no trace of step 2"]
  assert "no trace: " in caplog.text
  assert profiler.close() == ""
