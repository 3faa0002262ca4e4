"""The commands from end to end, in processes of their own, as a user types them."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
from PIL import Image
import psutil
import pytest

import tiny_run
from videogpt_jax import checkpoint_files
from videogpt_jax import telemetry


def test_a_run_from_the_first_to_the_last_step(finished):
  said = finished.result.stdout.splitlines()
  assert re.fullmatch(r"first step done after [\d.]+ s \(compilation included\)", said[0])
  assert re.match(r"step 2/24 +8\.3% \| loss ", said[1])
  assert said[-1] == f"24 steps of 24 done; the run is in {finished.workdir}"
  assert finished.result.stderr == ""
  assert (finished.workdir / checkpoint_files.FOLDER / "24").is_dir()
  assert list((finished.workdir / "tensorboard").glob("events.out.tfevents.*"))
  with Image.open(finished.workdir / "videos" / "rollout_0_24.gif") as picture:
    assert picture.n_frames == 4  # of 16 px, enlarged, the truth beside the prediction
    assert picture.height >= 128
    assert picture.width >= 2 * 128


def test_the_evaluation_of_a_run(finished, tmp_path):
  result = tiny_run.run("evaluate", f"--checkpoint={finished.workdir}", f"--out={tmp_path}",
                        "--videos=2")
  assert result.returncode == 0, result.stderr
  summary = json.loads((tmp_path / "summary.json").read_text())
  assert summary["steps"] == 24
  assert summary["seconds"] >= summary["train_seconds"] > 0
  assert summary["mse_baselines"].keys() == {"copy_last", "scaled_copy", "history_median",
                                             "data_mean"}
  assert summary["mse_model"] > min(summary["mse_baselines"].values())  # after 24 steps
  errors = summary["position_error_px"]
  assert errors.keys() == {"model", "constant_velocity", *summary["mse_baselines"]}
  assert all(len(by_frame) == 4 for by_frame in errors.values())  # 6 frames, 2 are given
  for path in (*summary["videos"], summary["plot"], summary["loss_curve"]):
    with Image.open(path) as picture:
      picture.verify()
  assert re.search(r"^frame +model +copy_last ", result.stdout, re.M)
  for path in tmp_path.iterdir():
    assert f"wrote {path}" in result.stdout


def test_dry_run_tells_the_cost_and_does_nothing(finished, tmp_path):
  result = tiny_run.run("main", f"--config={finished.config_file}", f"--workdir={tmp_path / 'run'}",
                        "--dry_run", "--config.train.steps=7", "--config.data.path=/not/there")
  assert result.returncode == 0, result.stderr
  assert "--config.train.steps=7\n" in result.stdout
  parts = dict(re.findall(r"^  (\w+) +([\d,]+)$", result.stdout, re.M))
  sizes = {name: int(size.replace(",", "")) for name, size in parts.items()}
  saved = tiny_run.saved_state(finished.workdir)
  assert sizes.pop("total") == sum(sizes.values()) == sum(
    value.size for name, value in saved.items() if name.startswith("params/"))
  assert re.search(r"FLOPs, all +\d\.\d+e\+\d+", result.stdout)
  assert re.search(r"temporary +[1-9]\d*\.\d+ [KM]iB", result.stdout)
  assert not list(tmp_path.iterdir())


def test_ctrl_c_saves_and_ends_without_a_trace_of_the_workers(finished, tmp_path):
  """As a terminal does, the signal goes to the worker processes too."""
  process = subprocess.Popen(
    [sys.executable, "-m", "videogpt_jax.main", f"--config={finished.config_file}",
     f"--workdir={tmp_path}", "--config.train.steps=100000", "--config.log.videos=0",
     "--config.data.workers=2"],
    stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
  while not re.match("step [4-9]", line := process.stdout.readline()):
    assert line, process.stderr.read()
  workers = psutil.Process(process.pid).children(recursive=True)
  assert len(workers) >= 2
  os.killpg(process.pid, signal.SIGINT)
  said, errors = process.communicate(timeout=100)
  assert process.returncode == 0, errors
  assert errors == ""
  step = int(re.search(r"stopped by a signal after step (\d+); the same command", said)[1])
  assert step >= 4
  assert said.endswith(f"{step} steps of 100000 done; the run is in {tmp_path}\n")
  assert not psutil.wait_procs(workers, timeout=20)[1]
  assert int(tiny_run.saved_state(tmp_path)["step"]) == step


@pytest.mark.parametrize(("arguments", "message"), [
  (["--workdir={tmp}/run"], "--config is missing, for example --config=configs/tiny.py"),
  (["--config={file}"], "--workdir is missing, for example --workdir=runs/tiny"),
  (["--config={file}", "--workdir=gs://bucket/run"],
   "--workdir=gs://bucket/run is no folder of this machine: mount the bucket"),
  (["--config={file}", "train"], "unexpected argument 'train'; options start with `--`"),
  (["--config={tmp}/none.py", "--config.seed=1"], "No such file or directory: '{tmp}/none.py'"),
])
def test_a_wrong_command_line(finished, tmp_path, arguments, message):
  fill = {"tmp": tmp_path, "file": finished.config_file}
  result = tiny_run.run("main", *(argument.format(**fill) for argument in arguments))
  assert result.returncode == 2
  assert result.stderr.startswith("error: ")
  assert message.format(**fill) in result.stderr
  assert len(result.stderr.splitlines()) == 1
  assert not list(tmp_path.iterdir())


def test_the_cores_of_a_cpu_as_two_devices(finished, tmp_path):
  """Heads and MLP split over two devices: the losses of one device."""
  arguments = [f"--config={finished.config_file}", "--config.mesh.data=1",
               "--config.mesh.tensor=-1", "--config.train.steps=2", "--config.log.videos=0"]
  flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
  environment = {**os.environ, "XLA_FLAGS": " ".join(flags)}
  losses = []
  for devices in (1, 2):
    workdir = tmp_path / str(devices)
    result = tiny_run.run("main", *arguments, f"--workdir={workdir}",
                          f"--config.cpu_devices={devices}", env=environment)
    if os.cpu_count() < devices:
      assert f"cpu_devices is {devices}; this machine has" in result.stderr
      return
    assert result.returncode == 0, result.stderr
    told = telemetry.read_metrics(workdir / telemetry.METRICS_FILE)
    losses.append([r.get("loss", r.get("validation/loss")) for r in told])
  np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
  result = tiny_run.run("main", *arguments, f"--workdir={tmp_path / '3'}",
                        "--config.cpu_devices=10000", env=environment)
  assert result.returncode == 2
  assert "error: cpu_devices is 10000; this machine has" in result.stderr
