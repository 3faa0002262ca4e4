"""launch/local.sh: a run on one machine, with a stand-in for the trainer."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest

import stand_ins as lib
import tiny_run

_LOCAL = lib.LAUNCH / "local.sh"
_QUICKLY = ("start", "--restart_delay=0")

# Counts its starts in a file for each process; "stopped" as the trainer is by a signal.
_TRAINER = """
import pathlib, threading
workdir = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir=")).partition("=")[2])
process = next((a.partition("=")[2] for a in sys.argv if a.startswith("--process_id=")), "0")
with open(workdir / f"starts-{{process}}", "a") as file:
  file.write(f"{{os.getpid()}} {{os.environ.get('XLA_FLAGS')}} "
             f"{{os.environ.get('JAX_LOCAL_DEVICE_IDS')}}\\n")
starts = len((workdir / f"starts-{{process}}").read_text().splitlines())

def stopped(number, frame):
  print("stopped by a signal after step 7; the same command goes on from here", flush=True)
  with open(workdir / f"saved-{{process}}", "a") as file:
    file.write(signal.Signals(number).name)
  time.sleep(0.5)
  sys.exit(0)

def train(seconds=60):
  signal.signal(signal.SIGTERM, stopped)
  (workdir / f"trains-{{process}}").touch()
  time.sleep(seconds)

print(f"start {{starts}}", flush=True)
""".replace("{{", "{").replace("}}", "}")


@pytest.fixture
def stand_ins(tmp_path):
  return lib.StandIns(tmp_path)


@pytest.fixture
def workdir(tmp_path):
  path = tmp_path / "my run's"
  path.mkdir()
  return path


def _flags(workdir, *more):
  return "--", "--config=configs/tiny.py", f"--workdir={workdir}", *more


def _result(workdir):
  return (workdir / "logs" / "result").read_text().strip()


def _log(workdir, process=0):
  return (workdir / "logs" / f"process-{process}.log").read_text()


def _launch(stand_ins, *arguments, **variables):
  """Starts it in the background. Python's default for Ctrl-C, which tests may lack."""
  return subprocess.Popen(
    ["bash", str(_LOCAL), *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT, text=True, cwd=lib.ROOT, env=stand_ins.environment(**variables),
    start_new_session=True,
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


def _wait_for(*paths):
  deadline = time.monotonic() + 30
  while not all(path.exists() for path in paths):
    assert time.monotonic() < deadline, paths
    time.sleep(0.02)


def test_runs_until_it_is_done(stand_ins, workdir):
  stand_ins.add("python", _TRAINER)
  result = stand_ins.run(_LOCAL, *_flags(workdir, "--config.name=it's $HOME"))
  assert result.returncode == 0, result.stderr
  assert result.stdout == "start 1\nlaunch: done\n" == _log(workdir)
  assert _result(workdir) == "done"
  (_, arguments, _), = stand_ins.calls()
  assert arguments == ["-m", "videogpt_jax.main", "--config=configs/tiny.py",
                       f"--workdir={workdir}", "--config.name=it's $HOME"]


def test_starts_a_crashed_run_again(stand_ins, workdir):
  stand_ins.add("python", _TRAINER + "sys.exit(0 if starts > 2 else 134)")
  result = stand_ins.run(_LOCAL, *_QUICKLY, *_flags(workdir))
  assert result.returncode == 0
  assert re.sub(r"\d+ s\b", "N s", result.stdout).splitlines() == [
    "start 1", "launch: crashed with status 134 after N s; restart 1 of at most 5 in N s",
    "start 2", "launch: crashed with status 134 after N s; restart 2 of at most 5 in N s",
    "start 3", "launch: done"]


def test_gives_up_after_quick_crashes(stand_ins, workdir):
  stand_ins.add("python", _TRAINER + "os.kill(os.getpid(), signal.SIGSEGV)")
  result = stand_ins.run(_LOCAL, *_QUICKLY, "--max_restarts=2", *_flags(workdir))
  assert result.returncode == 139  # of the crash
  assert "gives up" in result.stdout and len(stand_ins.calls()) == 3
  assert _result(workdir) == "failed 139"


def test_counts_only_crashes_in_quick_succession(stand_ins, workdir):
  """Every run lasts longer than --quick, so that each crash is a first one."""
  stand_ins.add("python", _TRAINER + "time.sleep(1.2); sys.exit(0 if starts > 3 else 1)")
  result = stand_ins.run(_LOCAL, *_QUICKLY, "--quick=1", "--max_restarts=1", *_flags(workdir))
  assert result.returncode == 0, result.stdout
  assert len(stand_ins.calls()) == 4


def test_waits_longer_before_every_restart(stand_ins, workdir):
  stand_ins.add("python", _TRAINER + "sys.exit(1)")
  stand_ins.no_pauses()
  result = stand_ins.run(_LOCAL, "--restart_delay=50", "--max_restarts=4", *_flags(workdir))
  assert result.returncode == 1
  assert re.findall(r" in (\d+) s", result.stdout) == ["50", "100", "200", "300"]


def test_does_not_repeat_what_the_user_got_wrong(stand_ins, workdir):
  stand_ins.add("python", _TRAINER + "sys.exit(2)")
  result = stand_ins.run(_LOCAL, *_QUICKLY, *_flags(workdir))
  assert result.returncode == 2
  assert len(stand_ins.calls()) == 1
  assert _result(workdir) == "failed 2"


def test_an_outage_of_storage_delays_a_run_and_never_ends_it(stand_ins, workdir):
  """It lasts longer than two restarts, and a crash within it is but one crash."""
  stand_ins.add("python", _TRAINER + "sys.exit({1: 74, 2: 74, 3: 1, 4: 74, 5: 74}.get(starts, 0))")
  result = stand_ins.run(_LOCAL, *_QUICKLY, "--max_restarts=1", *_flags(workdir))
  assert result.returncode == 0, result.stdout
  assert len(stand_ins.calls()) == 6
  assert result.stdout.count("storage refused the run (status 74") == 4
  assert "crashed with status 1 " in result.stdout and _result(workdir) == "done"


def test_storage_is_tried_less_and_less_often(stand_ins, workdir):
  stand_ins.add("python", _TRAINER + "sys.exit(74 if starts < 8 else 2)")
  stand_ins.no_pauses()
  result = stand_ins.run(_LOCAL, "--restart_delay=20", "--max_restarts=2", *_flags(workdir))
  assert result.returncode == 2
  assert re.findall(r" in (\d+) s", result.stdout) == ["20", "40", "80", "160", *["300"] * 3]


def test_storage_errors_are_handed_on_where_somebody_else_starts_the_run(stand_ins, workdir):
  """In a pod, whose fellows must start anew with it."""
  stand_ins.add("python", _TRAINER + "sys.exit(74)")
  assert stand_ins.run(_LOCAL, "--max_restarts=0", *_flags(workdir)).returncode == 74
  assert len(stand_ins.calls()) == 1


@pytest.mark.parametrize("number, status", [
  (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_lets_the_run_save(stand_ins, workdir, number, status, processes):
  stand_ins.add("python", _TRAINER + "train()")
  process = _launch(stand_ins, f"--processes={processes}", *_flags(workdir))
  _wait_for(*(workdir / f"trains-{i}" for i in range(processes)))
  # As Ctrl-C in a terminal does, to the whole group, and impatiently: the trainer must get it but
  # once, since it gives up its save at the second.
  os.killpg(process.pid, number)
  time.sleep(0.2)
  process.send_signal(number)
  out, _ = process.communicate(timeout=30)
  assert process.returncode == status, out
  for i in range(processes):
    assert (workdir / f"saved-{i}").read_text() == "SIGTERM"
    assert len((workdir / f"starts-{i}").read_text().splitlines()) == 1
  assert _result(workdir) == "stopped"
  assert "stopped by a signal after step 7" in out


def test_a_signal_between_two_starts_ends_it(stand_ins, workdir):
  stand_ins.add("python", _TRAINER + "sys.exit(1)")
  process = _launch(stand_ins, "--restart_delay=60", *_flags(workdir))
  while "restart 1" not in process.stdout.readline():
    assert process.poll() is None
  process.terminate()
  assert process.wait(timeout=30) == 143
  assert _result(workdir) == "stopped"


def test_a_run_that_somebody_else_stops_is_not_done(stand_ins, workdir):
  stand_ins.add("python", _TRAINER + "os.kill(os.getpid(), signal.SIGTERM) if starts < 0 else "
                "stopped(signal.SIGTERM, None)")
  assert stand_ins.run(_LOCAL, *_QUICKLY, *_flags(workdir)).returncode == 143
  assert _result(workdir) == "stopped"
  # What an earlier run has said is of no account.
  stand_ins.add("python", _TRAINER)
  assert stand_ins.run(_LOCAL, *_QUICKLY, *_flags(workdir)).returncode == 0


def test_all_processes_start_and_end_together(stand_ins, workdir, tmp_path):
  """Process 1 crashes the first time; process 0 would then wait for it for ever."""
  stand_ins.add("python", _TRAINER + """
if starts == 1:
  sys.exit(1) if process == "1" else train()
""")
  script = tmp_path / "local.sh"
  for name in ("local.sh", "common.sh", "supervise.sh"):
    text = (lib.LAUNCH / name).read_text()
    (tmp_path / name).write_text(text.replace("readonly PATIENCE=30", "readonly PATIENCE=1"))
  result = stand_ins.run(script, *_QUICKLY, "--processes=2", "--devices_per_process=3",
                         *_flags(workdir), XLA_FLAGS="--one")
  assert result.returncode == 0, result.stdout
  assert _log(workdir, 1).splitlines() == ["start 1", "start 2"]
  assert "ends the others" in result.stdout
  calls = [arguments for _, arguments, _ in stand_ins.calls()]
  assert len(calls) == 4
  ports = set()
  for i in range(2):
    for call in calls:
      if call[-1] == f"--process_id={i}":
        assert call[-4:-1:2] == ["--distributed", "--num_processes=2"]
        ports.add(re.fullmatch(r"--coordinator=localhost:(\d+)", call[-3])[1])
    pids, flags, gpus = zip(*(
      line.split(" ", 1)[0:1] + line.split(" ", 1)[1].rsplit(" ", 1)
      for line in (workdir / f"starts-{i}").read_text().splitlines()), strict=True)
    assert set(flags) == {"--one --xla_force_host_platform_device_count=3"}
    for pid in pids:
      with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
  assert len(ports) in (1, 2)  # one for each start; by chance the same


def test_processes_share_the_gpus(stand_ins, workdir):
  stand_ins.add("python", _TRAINER)
  assert stand_ins.run(_LOCAL, "--processes=2", *_flags(workdir)).returncode == 0
  for i in range(2):
    assert (workdir / f"starts-{i}").read_text().split()[-1] == str(i)


def test_in_the_background(stand_ins, workdir):
  stand_ins.add("python", _TRAINER + "train()")
  started = stand_ins.run(_LOCAL, "--detach", *_flags(workdir))
  assert started.returncode == 0, started.stderr
  assert shlex.split(started.stdout)[-2:] == ["logs", f"--logs={workdir}/logs"]
  _wait_for(workdir / "trains-0")
  where = f"--workdir={workdir}"
  assert stand_ins.run(_LOCAL, "status", where).stdout == "running\nstart 1\n"
  for again in ((), ("--detach",)):  # two runs in one workdir would spoil each other
    lib.refused(stand_ins.run(_LOCAL, *again, *_flags(workdir)), "is going on")
  stopped = stand_ins.run(_LOCAL, "stop", where)
  assert stopped.returncode == 0, stopped.stderr
  assert (workdir / "saved-0").read_text() == "SIGTERM"
  assert stand_ins.run(_LOCAL, "status", where).stdout.startswith("stopped\n")
  assert "nothing runs" in stand_ins.run(_LOCAL, "stop", where).stdout


def test_stops_a_run_whose_launcher_was_killed(stand_ins, workdir):
  stand_ins.add("python", _TRAINER + "train()")
  process = _launch(stand_ins, *_flags(workdir))
  _wait_for(workdir / "trains-0", workdir / "logs" / "pids")
  process.kill()
  process.wait()
  where = f"--workdir={workdir}"
  assert stand_ins.run(_LOCAL, "status", where).stdout.startswith("running\n")
  lib.refused(stand_ins.run(_LOCAL, *_flags(workdir)), "is going on")
  assert stand_ins.run(_LOCAL, "stop", where).returncode == 0
  assert (workdir / "saved-0").read_text() == "SIGTERM"
  assert stand_ins.run(_LOCAL, "status", where).stdout.startswith("vanished\n")


def test_dry_runs_call_nothing(stand_ins, workdir):
  for name in ("python", "python3.14", "setsid", "mkdir", "tail", "flock", "kill"):
    stand_ins.add(name)
  where = f"--workdir={workdir}"
  shown = {}
  for command in (("start", "--processes=2", *_flags(workdir)), ("install", "--extra=cuda,gcs"),
                  ("logs", where), ("status", where), ("stop", where)):
    result = stand_ins.run(_LOCAL, "--dry_run", *command)
    assert result.returncode == 0, result.stderr
    shown[command[0]] = [shlex.split(line) for line in result.stdout.splitlines()]
  (name, arguments, _), = stand_ins.calls()  # only whether a Python is new enough
  assert name == "python3.14" and arguments[0] == "-c"
  assert not list(workdir.iterdir())
  assert shown["start"][0] == ["mkdir", "-p", f"{workdir}/logs"]
  for i in range(2):
    assert shown["start"][1 + i][:5] == [
      "setsid", "env", f"JAX_LOCAL_DEVICE_IDS={i}", "python", "-m"]
    assert shown["start"][1 + i][-5:] == [
      f"--process_id={i}", ">>", f"{workdir}/logs/process-{i}.log", "2>&1", "&"]
  assert shown["install"] == [
    ["python3.14", "-m", "venv", ".venv"],
    [".venv/bin/python", "-m", "pip", "install", "-e", f"{lib.ROOT}[cuda,gcs]"]]
  assert shown["logs"][0][:4] == ["tail", "-n", "50", "-F"]
  assert shown["stop"][1] == ["flock", f"{workdir}/logs/lock", "true"]


def test_installs_with_a_python_of_its_own_if_there_is_none(stand_ins):
  old = "sys.exit(1 if '-c' in sys.argv else 0)"
  for version in ("python3.14", "python3.13", "python3.12", "python3.11", "python3"):
    stand_ins.add(version, old)
  result = stand_ins.run(_LOCAL, "install", "--extra=tpu", "--dry_run", VENV="my env")
  assert [shlex.split(line)[:5] for line in result.stdout.splitlines()] == [
    ["python3", "-m", "pip", "install", "--user"], ["python3", "-m", "uv", "venv", "--seed"],
    ["my env/bin/python", "-m", "pip", "install", "-e"]]


@pytest.mark.parametrize("arguments, word", [
  (("--", "--workdir=w"), "--config="),
  (("--", "--config=c.py"), "--workdir="),
  (("--config=c.py", "--workdir=w"), "come after --"),
  (("--processes=0", "--", "--config=c", "--workdir=w"), "--processes"),
  (("--processes=2", "--", "--config=c", "--workdir=w", "--distributed"), "--distributed"),
  (("--devices_per_process=x", "--", "--config=c", "--workdir=w"), "--devices_per_process"),
  (("--max_restarts=-1", "--", "--config=c", "--workdir=w"), "--max_restarts"),
  (("stop",), "--workdir="),
  (("logs", "--workdir=no/such"), "no/such"),
  (("status", "--", "--config=c"), "no flags of the trainer"),
  (("--", "--config=c", "--workdir=a\nb"), "control characters"),
])
def test_refuses_what_cannot_work(stand_ins, arguments, word):
  stand_ins.add("python")
  lib.refused(stand_ins.run(_LOCAL, *arguments), word)
  assert not stand_ins.calls()


def test_refuses_an_environment_that_is_not_there(stand_ins, workdir):
  lib.refused(stand_ins.run(_LOCAL, *_flags(workdir), VENV="no/env"), "no/env/bin/python", "VENV")


def test_trains_and_saves(stand_ins, tmp_path):
  """The real trainer: killed, started again, stopped; its last step is saved."""
  c = tiny_run.config(tmp_path / "unused")
  c.train.steps = c.log.validate_every = c.log.videos_every = 100000
  config = tiny_run.config_file(c, tmp_path / "config.py")
  environment = {"VENV": sys.prefix}
  data = tmp_path / "data"
  subprocess.run([sys.executable, "-m", "videogpt_jax.encode", f"--config={config}",
                  f"--out={data}"], check=True, capture_output=True, cwd=lib.ROOT)
  run = tmp_path / "run"
  flags = ("--", f"--config={config}", f"--config.data.path={data}", f"--workdir={run}")

  process = _launch(stand_ins, *_QUICKLY, *flags, **environment)
  _wait_for(run / "logs" / "pids")
  _wait_for(run / "metrics.jsonl")
  trainer = int((run / "logs" / "pids").read_text().split()[1])
  os.kill(trainer, signal.SIGKILL)
  while "restart 1" not in (line := process.stdout.readline()):
    assert line
  while "first step" not in (line := process.stdout.readline()):
    assert line
  process.terminate()
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 143 and "stopped by a signal after step" in out, out
  done = int(re.search("stopped by a signal after step ([0-9]+)", out)[1])
  assert done > 0
  assert (run / "checkpoints" / str(done)).is_dir()
