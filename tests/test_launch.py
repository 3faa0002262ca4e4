"""The scripts of launch/ that encode: what they run, with stand-ins for what they call."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

import stand_ins as lib
import tiny_run
from videogpt_jax.data import store

_LAUNCH = lib.LAUNCH
_SLURM, _GKE = _LAUNCH / "encode_slurm.sh", _LAUNCH / "encode_gke.sh"
_AWKWARD = ("--videos=/data/my videos/it's \"new\".csv", "--out=$(HOME) ${IMAGE} $$ `id` \\n & *",
            "--config.name=größer: #1, {a} [b]")

@pytest.fixture
def stand_ins(tmp_path):
  return lib.StandIns(tmp_path)


def _array(task, first=0, last=63):
  """What SLURM sets in a task of an array."""
  return {
    "SLURM_JOB_ID": "123", "SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": str(task),
    "SLURM_ARRAY_TASK_MIN": str(first), "SLURM_ARRAY_TASK_MAX": str(last),
    "SLURM_ARRAY_TASK_COUNT": str(last - first + 1), "SLURM_ARRAY_TASK_STEP": "1",
  }


@pytest.mark.parametrize("script", [_SLURM, _GKE], ids=lambda path: path.name)
def test_scripts_are_sound_and_explain_themselves(script, stand_ins):
  subprocess.run(["bash", "-n", str(script)], check=True)
  assert os.access(script, os.X_OK)
  asked, bare = stand_ins.run(script, "--help"), stand_ins.run(script)
  assert asked.returncode == 0 and bare.returncode == 2
  assert asked.stdout == bare.stderr and asked.stderr == bare.stdout == ""
  for word in ("launch/", "--config=", "--dry_run", "stop", "resume"):
    assert word in asked.stdout
  assert "#" not in asked.stdout and "set -euo" not in asked.stdout


def test_lines_fit():
  for path in _LAUNCH.iterdir():
    for line in path.read_text().splitlines():
      table = path.suffix == ".md" and line.startswith("|")
      assert (table or len(line) <= 100) and line == line.rstrip(), (path, line)


# SLURM


def test_directives_come_before_the_first_command():
  lines = _SLURM.read_text().splitlines()
  command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
  directives = [line.split()[1] for line in lines[:command] if line.startswith("#SBATCH ")]
  assert sum(line.startswith("#SBATCH") for line in lines) == len(directives) > 5
  for one in ("--requeue", "--open-mode=append", "--signal=B:USR1@120", "--gres=gpu:1",
              "--output=logs/encode-%A_%a.log"):
    assert one in directives
  assert not any(line.startswith("--array") for line in directives)


@pytest.mark.parametrize("task, first, last, part", [
  (0, 0, 63, "0/64"), (5, 0, 63, "5/64"), (63, 0, 63, "63/64"),
  (10, 10, 12, "0/3"), (12, 10, 12, "2/3"), (7, 7, 7, "0/1"), (9, 8, 17, "1/10"),
])
def test_slurm_task_encodes_its_part(stand_ins, task, first, last, part):
  stand_ins.add("python")
  result = stand_ins.run(_SLURM, "--config=configs/stage1.py", *_AWKWARD,
                         **_array(task, first, last))
  assert result.returncode == 0, result.stderr
  assert stand_ins.calls() == [["python", [
    "-m", "videogpt_jax.encode", f"--shard={part}", "--config=configs/stage1.py", *_AWKWARD], ""]]


def test_slurm_decodes_on_the_cores_it_was_given(stand_ins):
  stand_ins.add("python")
  stand_ins.run(_SLURM, "--config=c.py", "--processes=3", SLURM_CPUS_PER_TASK="8", **_array(0))
  (_, arguments, _), = stand_ins.calls()
  assert arguments[2:] == ["--shard=0/64", "--processes=8", "--config=c.py", "--processes=3"]


def test_slurm_takes_the_environment_it_is_told(stand_ins, tmp_path):
  stand_ins.add("python", "sys.exit('the wrong one')")
  (tmp_path / "my env" / "bin").mkdir(parents=True)
  stand_ins.add("python", folder=tmp_path / "my env" / "bin")
  arguments = ("--config", "c.py")  # absl takes a value also as an argument of its own
  assert stand_ins.run(_SLURM, *arguments, VENV=str(tmp_path / "my env")).returncode == 0
  lib.refused(stand_ins.run(_SLURM, *arguments, VENV=str(tmp_path / "none")), "none/bin/python",
           "VENV")


def test_slurm_dry_run_shows_the_command(stand_ins):
  stand_ins.add("python")
  arguments = ("--config=c.py", *_AWKWARD)
  outside = stand_ins.run(_SLURM, "--dry_run", *arguments)
  inside = stand_ins.run(_SLURM, *arguments, "--dry_run", **_array(3))
  assert outside.returncode == inside.returncode == 0
  assert not stand_ins.calls()
  for result, part in (outside, "0/1"), (inside, "3/64"):
    # Bash itself has to read it back: in some locales it quotes letters in its own way.
    echo = subprocess.run(["bash", "-c", f"printf '%s\\0' {result.stdout}"],
                          capture_output=True, text=True, check=True)
    assert echo.stdout.split("\0")[:-1] == [
      "python", "-m", "videogpt_jax.encode", f"--shard={part}", *arguments]


def test_slurm_refuses_what_cannot_work(stand_ins):
  stand_ins.add("python")
  lib.refused(stand_ins.run(_SLURM, "--out=x", **_array(0)), "--config=")
  lib.refused(stand_ins.run(_SLURM, "--dry_run"), "--config=")
  lib.refused(stand_ins.run(_SLURM, "--config=c.py", "--shard=0/2", **_array(0)), "--shard")
  lib.refused(stand_ins.run(_SLURM, "--config=c.py", "--distributed", **_array(0)), "--distributed")
  gaps = {**_array(5, 1, 5), "SLURM_ARRAY_TASK_COUNT": "3"}
  lib.refused(stand_ins.run(_SLURM, "--config=c.py", **gaps), "unbroken range")
  assert not stand_ins.calls()


@pytest.mark.parametrize("status", [1, 2, 137])
def test_slurm_passes_a_failure_on(stand_ins, status):
  stand_ins.add("python", f"print('error: no such list', file=sys.stderr); sys.exit({status})")
  stand_ins.add("scontrol")
  result = stand_ins.run(_SLURM, "--config=c.py", **_array(1))
  assert result.returncode == status
  assert result.stderr == "error: no such list\n"
  assert [name for name, *_ in stand_ins.calls()] == ["python"]  # a failure is not queued again


_WORKING = """
with open(os.environ["STARTED"], "w") as file:
  file.write(str(os.getpid()))
time.sleep(60)
"""


def _signalled(stand_ins, tmp_path, number, **variables):
  """Status and output of a task that gets a signal while it encodes; encode is gone then."""
  stand_ins.add("python", _WORKING)
  started = tmp_path / "started"
  process = subprocess.Popen(
    ["bash", str(_SLURM), "--config=c.py"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    text=True, env=stand_ins.environment(STARTED=str(started), **variables),
    # A shell's background job ignores Ctrl-C from the start, and the tests may be one.
    preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
  deadline = time.monotonic() + 30
  while not (started.exists() and started.read_text()):
    assert time.monotonic() < deadline and process.poll() is None
    time.sleep(0.01)
  process.send_signal(number)
  out, err = process.communicate(timeout=30)
  with pytest.raises(ProcessLookupError):
    os.kill(int(started.read_text()), 0)
  return process.returncode, out, err


def test_slurm_warned_of_its_end_queues_itself_again(stand_ins, tmp_path):
  stand_ins.add("scontrol")
  status, out, err = _signalled(stand_ins, tmp_path, signal.SIGUSR1, **_array(5))
  assert status == 0, err
  assert "5/64" in out
  # The task alone: of the array's last task, SLURM_JOB_ID is the number of the whole array.
  assert stand_ins.calls()[1:] == [["scontrol", ["requeue", "120_5"], ""]]


def test_slurm_without_an_array_queues_its_job_again(stand_ins, tmp_path):
  stand_ins.add("scontrol")
  status, _, err = _signalled(stand_ins, tmp_path, signal.SIGUSR1, SLURM_JOB_ID="77")
  assert status == 0, err
  assert stand_ins.calls()[1:] == [["scontrol", ["requeue", "77"], ""]]


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_slurm_cancelled_ends_and_stays_away(stand_ins, tmp_path, number, status):
  stand_ins.add("scontrol")
  assert _signalled(stand_ins, tmp_path, number, **_array(5))[0] == status
  assert [name for name, *_ in stand_ins.calls()] == ["python"]


def test_slurm_says_so_if_it_cannot_queue_itself_again(stand_ins, tmp_path):
  stand_ins.add("scontrol", "sys.exit(1)")
  status, _, err = _signalled(stand_ins, tmp_path, signal.SIGUSR1, **_array(5))
  assert status == 1 and "submit the same command" in err


def test_slurm_gives_up_on_a_shard_longer_than_the_time_limit(stand_ins, tmp_path):
  stand_ins.add("scontrol")
  status, _, err = _signalled(stand_ins, tmp_path, signal.SIGUSR1, **_array(5),
                              SLURM_RESTART_COUNT="50")
  assert status == 1 and "--time" in err
  assert [name for name, *_ in stand_ins.calls()] == ["python"]


def test_slurm_tasks_make_the_data_set_of_one_run(stand_ins, tmp_path):
  """Two tasks one after the other, the last first; then once more, all being done."""
  c = tiny_run.config(tmp_path / "unused")
  c.data.videos_per_shard = 5  # 5 shards for training, 2 for validation
  config = tiny_run.config_file(c, tmp_path / "my config.py")

  def encode(out, **variables):
    result = stand_ins.run(_SLURM, f"--config={config}", f"--out={tmp_path / out}",
                           SLURM_CPUS_PER_TASK="1", VENV=sys.prefix, **variables)
    assert result.returncode == 0, result.stderr
    return result.stdout

  def content(out):
    files = [path for path in (tmp_path / out).rglob("*") if path.is_file()]
    return {str(path.relative_to(tmp_path / out)): path.read_bytes() for path in files}

  encode("one")
  assert "left to other jobs" in encode("shared", **_array(8, 7, 8))
  assert not (tmp_path / "shared" / "dataset_info.json").exists()
  assert "encode done: 24 train and 8 validation" in encode("shared", **_array(7, 7, 8))
  assert len(content("one")) >= 10
  assert content("shared") == content("one")
  assert len(store.open_split(tmp_path / "shared", "train")) == 24
  encode("shared", **_array(7, 7, 8))
  assert content("shared") == content("one")


# Kubernetes


_SUBMIT = ("--image=REGION/IMAGE:1", "--shards=64", "--claim=videos")
_ENCODE = ("--", "--config=configs/stage1.py")


def _manifest(text):
  yaml = pytest.importorskip("yaml")
  return yaml.safe_load(text)


def _dry(stand_ins, *arguments):
  """The manifest that would be submitted, and its container."""
  stand_ins.add("kubectl")
  result = stand_ins.run(_GKE, "--dry_run", *arguments)
  assert result.returncode == 0, result.stderr
  assert result.stdout.startswith("# kubectl create --filename=-")
  assert not stand_ins.calls()
  job = _manifest(result.stdout)
  container, = job["spec"]["template"]["spec"]["containers"]
  return job, container


def test_template_is_yaml_itself():
  job = _manifest((_LAUNCH / "encode_job.yaml").read_text())
  assert job["kind"] == "Job"


def test_job_on_a_claim(stand_ins):
  job, container = _dry(stand_ins, *_SUBMIT, *_ENCODE, "--out=/data/set")
  assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
  assert job["metadata"]["name"] == "encode"
  spec, pod = job["spec"], job["spec"]["template"]["spec"]
  assert spec["completionMode"] == "Indexed"
  assert spec["completions"] == spec["parallelism"] == 64
  assert spec["backoffLimitPerIndex"] == 3 and "backoffLimit" not in spec
  assert pod["restartPolicy"] == "Never"  # backoffLimitPerIndex demands it
  assert spec["podReplacementPolicy"] == "Failed"
  assert spec["podFailurePolicy"]["rules"] == [
    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]}]
  assert pod["nodeSelector"] == spec["template"]["metadata"]["annotations"] == {}
  assert pod["volumes"] == [{"name": "data", "persistentVolumeClaim": {"claimName": "videos"}}]
  assert container == {
    "name": "encode",
    "image": "REGION/IMAGE:1",
    "command": ["python", "-m", "videogpt_jax.encode"],
    "args": ["--shard=$(JOB_COMPLETION_INDEX)/64", "--processes=8",
             "--config=configs/stage1.py", "--out=/data/set"],
    "resources": {"requests": {"cpu": "8", "memory": "32Gi"},
                  "limits": {"memory": "32Gi", "nvidia.com/gpu": 1}},
    "volumeMounts": [{"name": "data", "mountPath": "/data"}],
  }


def test_job_on_a_bucket_without_gpus(stand_ins):
  job, container = _dry(
    stand_ins, "submit", "--name=world-2", "--image=IMAGE", "--shards=7", "--parallelism=3",
    "--gpus=0", "--cpus=16", "--memory=64Gi", "--bucket=my-bucket",
    "--node=cloud.google.com/gke-spot=true", "--node=a=b=c", *_ENCODE)
  assert job["metadata"]["name"] == "world-2"
  assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (7, 3)
  template = job["spec"]["template"]
  assert template["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
  assert template["spec"]["nodeSelector"] == {"cloud.google.com/gke-spot": "true", "a": "b=c"}
  volume, = template["spec"]["volumes"]
  assert volume["name"] == "data" and volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
  attributes = volume["csi"]["volumeAttributes"]
  assert attributes["bucketName"] == "my-bucket"
  assert attributes["mountOptions"].split(",")[:2] == ["implicit-dirs", "metadata-cache:ttl-secs:0"]
  assert container["args"][:2] == ["--shard=$(JOB_COMPLETION_INDEX)/7", "--processes=16"]
  assert container["resources"] == {"requests": {"cpu": "16", "memory": "64Gi"},
                                    "limits": {"memory": "64Gi"}}


def test_awkward_arguments_reach_the_container(stand_ins):
  _, container = _dry(stand_ins, *_SUBMIT, *_ENCODE, *_AWKWARD)
  # Kubernetes replaces $$ by $, and would replace $(HOME).
  assert [text.replace("$$", "$") for text in container["args"][3:]] == list(_AWKWARD)
  assert "$(HOME)" not in container["args"][4].replace("$$", "")


def test_submits_the_manifest_of_the_dry_run(stand_ins):
  shown = stand_ins.run(_GKE, "--dry_run", *_SUBMIT, *_ENCODE).stdout
  stand_ins.add("kubectl")
  result = stand_ins.run(_GKE, *_SUBMIT, *_ENCODE)
  assert result.returncode == 0, result.stderr
  (name, arguments, text), = stand_ins.calls()
  assert (name, arguments) == ("kubectl", ["create", "--filename=-"])
  assert text == shown.partition("\n")[2]


def test_runs_from_any_folder(stand_ins, tmp_path):
  result = subprocess.run(
    ["bash", str(_GKE), "--dry_run", *_SUBMIT, *_ENCODE], capture_output=True, text=True,
    check=True, cwd=tmp_path, env=stand_ins.environment(LC_ALL="C"))
  assert "kind: Job" in result.stdout


def test_passes_on_that_kubectl_failed(stand_ins):
  stand_ins.add("kubectl", "sys.exit(3)")
  result = stand_ins.run(_GKE, *_SUBMIT, *_ENCODE)
  assert result.returncode == 3 and "`stop`" in result.stderr
  assert stand_ins.run(_GKE, "stop").returncode == 3


def test_watches_and_stops(stand_ins):
  expected = [
    (("status",), ["get", "job", "encode", "--output=custom-columns=NAME:.metadata.name,"
                   "PARTS:.spec.completions,RUNNING:.status.active,"
                   "DONE:.status.completedIndexes,FAILED:.status.failedIndexes"]),
    (("status",), ["get", "pods", "--selector=batch.kubernetes.io/job-name=encode",
                   "--output=wide"]),
    (("logs", "--name=mine"), ["logs", "--selector=batch.kubernetes.io/job-name=mine",
                               "--container=encode", "--tail=3", "--prefix"]),
    (("logs", "--index=5"), ["logs", "--selector=batch.kubernetes.io/job-name=encode,"
                             "batch.kubernetes.io/job-completion-index=5", "--container=encode",
                             "--tail=-1", "--follow", "--max-log-requests=20"]),
    (("stop", "--name=mine"), ["delete", "job", "mine"]),
  ]
  stand_ins.add("kubectl")
  commands = list(dict.fromkeys(command for command, _ in expected))
  shown = [stand_ins.run(_GKE, *command, "--dry_run").stdout for command in commands]
  assert not stand_ins.calls()
  lines = "".join(shown).splitlines()
  assert [shlex.split(line) for line in lines] == [["kubectl", *call] for _, call in expected]
  for command in commands:
    assert stand_ins.run(_GKE, *command).returncode == 0
  assert [arguments for _, arguments, _ in stand_ins.calls()] == [call for _, call in expected]


@pytest.mark.parametrize("arguments, word", [
  (_ENCODE, "--image="),
  (("--image=i", *_ENCODE), "--shards="),
  (("--image=i", "--shards=2", *_ENCODE), "--claim=NAME or --bucket=NAME"),
  ((*_SUBMIT, "--bucket=b", *_ENCODE), "exclude each other"),
  (_SUBMIT, "--config="),
  ((*_SUBMIT, "--", "--out=x"), "--config="),
  ((*_SUBMIT, "--config=c.py"), "come after --"),
  ((*_SUBMIT, "--image", "i", *_ENCODE), "--flag=value"),
  ((*_SUBMIT, "--shards=0", *_ENCODE), "--shards must be a whole number"),
  ((*_SUBMIT, "--shards=08", *_ENCODE), "--shards"),
  ((*_SUBMIT, "--parallelism=x[$(id)]", *_ENCODE), "--parallelism"),
  ((*_SUBMIT, "--gpus=-1", *_ENCODE), "--gpus"),
  ((*_SUBMIT, "--name=Mine", *_ENCODE), "--name"),
  ((*_SUBMIT, f"--name={'a' * 51}", *_ENCODE), "--name"),
  ((*_SUBMIT, *_ENCODE, "--shard=0/2"), "--shard"),
  ((*_SUBMIT, *_ENCODE, "--distributed"), "--distributed"),
  ((*_SUBMIT, *_ENCODE, "--videos=a\nb"), "control characters"),
  (("start",), "unknown subcommand 'start'"),
  (("stop", *_ENCODE), "takes no flags of encode"),
  (("logs", "--index=last"), "--index"),
])
def test_gke_refuses_what_cannot_work(stand_ins, arguments, word):
  stand_ins.add("kubectl")
  lib.refused(stand_ins.run(_GKE, *arguments), word)
  assert not stand_ins.calls()
