"""One run in two processes: it computes what one process does, and all stop and start together."""

import json
import signal
import threading

import numpy as np
import pytest

import processes
import tiny_run
from videogpt_jax import checkpoint_files
from videogpt_jax import cli


@pytest.fixture(scope="module")
def pair(tmp_path_factory, finished):
  """The run `finished`, but in two processes of four devices; its folder, and what they said."""
  folder = tmp_path_factory.mktemp("pair")
  return folder, processes.train(finished.config_file, folder, 2, 4)


def _assert_same_losses(workdir, other, tolerance=1e-5):
  ours, theirs = processes.losses(workdir), processes.losses(other)
  assert ours.keys() == theirs.keys() and len(ours) > 50
  for name, loss in ours.items():
    assert loss == pytest.approx(theirs[name], rel=tolerance), name


def test_two_processes_compute_what_one_device_does(pair, finished):
  _assert_same_losses(pair[0], finished.workdir)


def test_one_process_with_as_many_devices_does_too(pair, finished, tmp_path):
  file = finished.config_file
  done = tiny_run.run("main", f"--config={file}", f"--workdir={tmp_path}",
                      env=processes.environment(8))
  assert done.returncode == 0, done.stderr
  _assert_same_losses(tmp_path, pair[0])


def test_one_of_them_reports(pair, finished):
  folder, (first, second) = pair
  lines = lambda text: [line.split(" |")[0] for line in text.splitlines() if "Gloo" not in line]
  assert [x for x in lines(first) if x.startswith("step 2/")]
  assert not lines(second)
  names = lambda workdir: {path.name for path in (workdir / "videos").iterdir()}
  assert names(folder) == names(finished.workdir)


def test_heads_and_sequence_may_be_split_over_processes(tiny, tmp_path):
  """Then both read the same rows."""
  tiny.model.num_heads = tiny.model.num_kv_heads = 4
  tiny.train.steps, tiny.log.videos, tiny.log.every = 4, 0, 1
  tiny.log.validate_every = tiny.checkpoint.every = 4
  file = tiny_run.config_file(tiny, tmp_path / "c.py")
  one = tiny_run.run("main", f"--config={file}", f"--workdir={tmp_path / 'one'}")
  assert one.returncode == 0, one.stderr
  processes.train(file, tmp_path / "two", 2, 2, "--config.mesh.data=1", "--config.mesh.sequence=2",
                  "--config.mesh.tensor=2")
  ours, theirs = (processes.losses(tmp_path / name) for name in ("two", "one"))
  assert ours.keys() == theirs.keys()
  np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=1e-5)


_ROWS = """
import json, sys
import jax
from videogpt_jax import distributed, sharding
from videogpt_jax.data import pipeline
value = lambda name: next(x.split("=")[1] for x in sys.argv if x.startswith(f"--{name}="))
distributed.initialize(value("coordinator"), int(value("num_processes")), int(value("process_id")))
meshes = [dict(data=4), dict(data=2, tensor=2), dict(data=1, fsdp=2, sequence=2), dict(tensor=4)]
found = [pipeline.local_rows(sharding.rows(sharding.make_mesh(mesh)), 8) for mesh in meshes]
heard = distributed.from_first(lambda: {"from": jax.process_index(), "text": "größer"})
print(json.dumps({"rows": found, "heard": heard}))
"""


def test_rows_are_disjoint_and_complete():
  said = [json.loads(next(line for line in out.splitlines() if line.startswith("{")))
          for out in processes.finish(processes.start(["-c", _ROWS], 2, 2))]
  first, second = (part["rows"] for part in said)
  for ours, theirs in zip(first[:3], second[:3], strict=True):
    assert ours == [0, 1, 2, 3] and theirs == [4, 5, 6, 7]
  assert first[3] == second[3] == list(range(8))
  assert [part["heard"] for part in said] == [{"from": 0, "text": "größer"}] * 2


@pytest.mark.parametrize(("number", "told"), [(signal.SIGTERM, 1), (signal.SIGINT, 0)])
def test_a_signal_to_one_stops_all_after_the_same_step(finished, tmp_path, number, told):
  """And one process, with another mesh, goes on."""
  running = processes.start(
    ["-m", "videogpt_jax.main", f"--config={finished.config_file}", f"--workdir={tmp_path}",
     "--config.train.steps=2000", "--config.log.every=1", "--config.log.validate_every=2000",
     "--config.checkpoint.every=2000"], 2, 1)
  for line in running[0].stdout:
    if line.startswith("step 3/"):
      break
  running[told].send_signal(number)
  out, _ = processes.finish(running)
  assert "stopped by a signal after step" in out
  step = int(out.split("stopped by a signal after step ")[1].split(";")[0])
  assert int(tiny_run.saved_state(tmp_path)["step"]) == step
  assert [path.name for path in (tmp_path / checkpoint_files.FOLDER).iterdir()] == [str(step)]
  done = tiny_run.run(
    "main", f"--config={finished.config_file}", f"--workdir={tmp_path}", "--config.mesh.data=2",
    "--config.mesh.fsdp=2", f"--config.train.steps={step + 2}", "--config.log.videos=0",
    env=processes.environment(4))
  assert done.returncode == 0, done.stderr
  assert f"at step {step}" in done.stdout


def _errors_of_the_first(running):
  """What process 0 says until it ends of itself; then all are killed."""
  timer = threading.Timer(100, running[0].kill)
  timer.start()
  _, errors = running[0].communicate()
  timer.cancel()
  for process in running[1:]:
    process.kill()
    process.communicate()
  return errors


_LIMITED = """
import resource, runpy, sys
if "--process_id=0" in sys.argv:
  resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
else:
  sys.argv.pop(1)
runpy.run_module("videogpt_jax.main", run_name="__main__", alter_sys=True)
"""


def test_storage_that_refuses_ends_all_and_the_same_command_goes_on(finished, tmp_path):
  """One process cannot write its checkpoint: launchers answer its status by a new start."""
  names = finished.workdir / checkpoint_files.FOLDER / "21" / "state" / "_METADATA"
  options = [f"--config={finished.config_file}", f"--workdir={tmp_path}"]
  running = processes.start(["-c", _LIMITED, names.stat().st_size - 1, *options], 2, 4)
  errors = _errors_of_the_first(running)  # the other would wait for it for hours
  assert running[0].returncode == cli.STORAGE_STATUS, errors
  assert "error: the checkpoint of step 3 could not be written" in errors
  processes.train(finished.config_file, tmp_path, 2, 4, "--config.train.steps=6",
                  "--config.log.videos=0")
  assert int(tiny_run.saved_state(tmp_path)["step"]) == 6


def test_an_error_in_one_process_ends_it_at_once(finished, tmp_path):
  """It does not wait for the others, which may be waiting for it."""
  (tmp_path / "metrics.jsonl").write_text("no JSON\n{}\n")  # only process 0 looks
  running = processes.start(
    ["-m", "videogpt_jax.main", f"--config={finished.config_file}", f"--workdir={tmp_path}"], 2, 1)
  errors = _errors_of_the_first(running)
  assert running[0].returncode == 2, errors
  assert "line 1 is not JSON" in errors and "Traceback" not in errors


@pytest.mark.parametrize(("options", "message"), [
  (["--coordinator=localhost:1"], "belong together"),
  (["--coordinator=localhost:1", "--num_processes=2", "--process_id=2"], "is not between"),
  (["--distributed"], "on a cluster that jax does not know"),
])
def test_processes_that_cannot_find_each_other(finished, tmp_path, options, message):
  done = tiny_run.run("main", f"--config={finished.config_file}", f"--workdir={tmp_path}", *options)
  assert done.returncode == 2
  assert message in done.stderr and "Traceback" not in done.stderr
