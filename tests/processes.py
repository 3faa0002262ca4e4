"""Training with several processes on this machine, over the loopback."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys


def free_port():
  """A port that nobody listens on."""
  with contextlib.closing(socket.socket()) as listener:
    listener.bind(("localhost", 0))
    return listener.getsockname()[1]


def environment(devices):
  """Of a process with so many simulated devices, which can import the tests' modules."""
  flags = os.environ.get("XLA_FLAGS", "")
  paths = [str(pathlib.Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
  return {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths),
          "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}"}


def start(arguments, processes, devices):
  """Starts the same Python arguments in several processes that know of each other."""
  port = free_port()
  return [
    subprocess.Popen(
      [sys.executable, "-u", *map(str, arguments), f"--coordinator=localhost:{port}",
       f"--num_processes={processes}", f"--process_id={i}"],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(devices))
    for i in range(processes)]


def finish(started):
  """Waits for processes; what each printed to the standard output.

  Raises:
    AssertionError: one of them failed.
  """
  said = [process.communicate(timeout=600) for process in started]
  for process, (_, errors) in zip(started, said, strict=True):
    assert process.returncode == 0, errors
  return [out for out, _ in said]


def train(file, workdir, processes, devices, *options):
  """Runs `videogpt_jax.main` to its end; see `finish`."""
  return finish(start(["-m", "videogpt_jax.main", f"--config={file}", f"--workdir={workdir}",
                       *options], processes, devices))


def losses(workdir):
  """Every loss in the metrics of a run, training and held-out, by step and name."""
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return {(record["step"], name): value for record in map(json.loads, lines)
          for name, value in record.items() if "loss" in name}
