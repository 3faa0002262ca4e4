"""The launchers of training on clusters, with stand-ins for gcloud, kubectl, xpk and SLURM."""

import os
import shlex
import signal
import subprocess
import time

import pytest

import stand_ins as lib

_TPU, _SLURM, _GKE = (lib.LAUNCH / name for name in ("tpu_pod.sh", "train_slurm.sh", "gke.sh"))
_AWKWARD = ("--config.name=it's \"new\"",
            "--config.data.path=/data/$(HOME) ${IMAGE} $$ `id` \\n & *")
_TRAIN = ("--", "--config=configs/stage1.py", "--workdir=/data/my runs/a", *_AWKWARD)
_TAKE_FLAGS = ("start", "resume", "watch", "job", "xpk")
_MAIN = ["-m", "videogpt_jax.main", "--distributed"]


@pytest.fixture
def stand_ins(tmp_path):
  return lib.StandIns(tmp_path)


def _shown(stand_ins, script, *arguments):
  """The commands of a dry run, which calls nothing."""
  result = stand_ins.run(script, *arguments, "--dry_run", *(
    _TRAIN if arguments[0] in _TAKE_FLAGS else ()))
  assert result.returncode == 0, result.stderr
  return [shlex.split(line) for line in result.stdout.splitlines() if not line.startswith("#")]


def _done(stand_ins, script, *arguments):
  """The same without --dry_run: what was called."""
  before = len(stand_ins.calls())
  result = stand_ins.run(script, *arguments, *(
    _TRAIN if arguments[0] in _TAKE_FLAGS else ()))
  assert result.returncode == 0, result.stderr
  return [[name, *called] for name, called, _ in stand_ins.calls()[before:]]


# All of them


@pytest.mark.parametrize("name", ["local.sh", "tpu_pod.sh", "train_slurm.sh", "gke.sh"])
def test_scripts_are_sound_and_explain_themselves(name, stand_ins):
  script = lib.LAUNCH / name
  subprocess.run(["bash", "-n", str(script)], check=True)
  assert os.access(script, os.X_OK)
  asked, bare = stand_ins.run(script, "--help"), stand_ins.run(script)
  assert asked.returncode == 0 and bare.returncode == 2
  assert asked.stdout == bare.stderr and asked.stderr == bare.stdout == ""
  for word in ("launch/", "--config=", "--workdir=", "--dry_run", "logs", "status", "stop",
               "resume"):
    assert word in asked.stdout
  assert "#" not in asked.stdout and "set -euo" not in asked.stdout


@pytest.mark.parametrize("script, arguments, words", [
  (_TPU, ("start", "--name=a"), ["--config="]),
  (_TPU, ("start", "--name=a", "--", "--config=c"), ["--workdir="]),
  (_TPU, ("start", "--name=a", "--", "--config=c", "--workdir=runs/a"), ["whole path"]),
  (_TPU, ("start", "--name=a", *_TRAIN, "--distributed"), ["--distributed"]),
  (_TPU, ("start", "--name=a", "--bucket=b", "--nfs=h:/s", *_TRAIN), ["exclude"]),
  (_TPU, ("create", "--name=a"), ["--type="]),
  (_TPU, ("create", "--name=a", "--type=v9-8"), ["--runtime_version", "v9-8"]),
  (_TPU, ("create", "--name=a", "--type=v6e-8", "--slices=0"), ["--slices"]),
  (_TPU, ("create", "--name=A", "--type=v6e-8"), ["--name"]),
  (_TPU, ("destroy", "--name=a"), ["destroy"]),
  (_TPU, ("logs", "--name=a", *_TRAIN), ["no flags of the trainer"]),
  (_TPU, ("--name=a",), ["what to do"]),
  (_SLURM, ("start",), ["--config="]),
  (_SLURM, ("start", *_TRAIN, "--coordinator=x:1"), ["--coordinator"]),
  (_SLURM, ("start", "--nodes", "4", *_TRAIN), ["--flag=value"]),
  (_SLURM, ("start", "--gpus-per-task=1", *_TRAIN), ["--gpus-per-task", "all GPUs"]),
  (_SLURM, ("job", *_TRAIN), ["`start`"]),
  (_SLURM, ("stop", "--name=a b"), ["--name"]),
  (_GKE, ("submit", *_TRAIN), ["--image="]),
  (_GKE, ("submit", "--image=i", *_TRAIN), ["--claim=NAME or --bucket=NAME"]),
  (_GKE, ("submit", "--image=i", "--claim=c", *_TRAIN), ["--tpu=TYPE or --gpus=N"]),
  (_GKE, ("submit", "--image=i", "--claim=c", "--tpu=t", *_TRAIN), ["--topology"]),
  (_GKE, ("submit", "--image=i", "--claim=c", "--tpu=t", "--topology=3x3", *_TRAIN), ["--chips"]),
  (_GKE, ("submit", "--image=i", "--claim=c", "--gpus=8", "--slices=2", *_TRAIN), ["--hosts"]),
  (_GKE, ("submit", "--image=i", "--claim=c", "--gpus=8", "--", "--config=c", "--workdir=/x"),
   ["/data"]),
  (_GKE, ("xpk", "--image=i", *_TRAIN), ["--cluster="]),
  (_GKE, ("xpk", "--image=i", "--cluster=c", *_TRAIN), ["--type="]),
  (_GKE, ("logs", "--worker=x"), ["--worker"]),
])
def test_refuses_what_cannot_work(stand_ins, script, arguments, words):
  for name in ("gcloud", "kubectl", "xpk", "sbatch", "srun", "python"):
    stand_ins.add(name)
  lib.refused(stand_ins.run(script, *arguments), *words)
  assert not stand_ins.calls()


# TPU VMs


_POD = ("--name=pod", "--zone=z", "--project=p")
_WHERE = ["--zone=z", "--project=p"]
_ALL = ["--node=all", "--worker=all"]


def _remote(call):
  """The command that a call of gcloud's ssh runs on the machines."""
  text, = (one.removeprefix("--command=") for one in call if one.startswith("--command="))
  subprocess.run(["bash", "-n", "-c", text], check=True)
  return text


@pytest.mark.parametrize("flags, expected", [
  (["--type=v6e-64", "--spot"],
   ["--accelerator-type=v6e-64", "--runtime-version=v2-alpha-tpuv6e", "--node-id=pod", "--spot"]),
  (["--type=v5p-32", "--slices=3", "--create_flag=--network=my net"],
   ["--accelerator-type=v5p-32", "--runtime-version=v2-alpha-tpuv5", "--node-count=3",
    "--node-prefix=pod", "--network=my net"]),
  (["--type=v5litepod-16", "--runtime_version=other"],
   ["--accelerator-type=v5litepod-16", "--runtime-version=other", "--node-id=pod"]),
])
def test_tpu_create(stand_ins, flags, expected):
  stand_ins.add("gcloud")
  expected = ["gcloud", "compute", "tpus", "queued-resources", "create", "pod", *expected, *_WHERE]
  assert _shown(stand_ins, _TPU, "create", *_POD, *flags) == [expected]
  assert not stand_ins.calls()
  assert _done(stand_ins, _TPU, "create", *_POD, *flags) == [expected]


def test_tpu_install_copies_the_working_tree(stand_ins, tmp_path):
  """Unpacked as on the machines, by the command that they get."""
  stand_ins.add("gcloud", f"""
import shutil
if sys.argv[4] == "scp":
  shutil.copy(sys.argv[5], {str(tmp_path)!r})
""")
  shown = _shown(stand_ins, _TPU, "install", *_POD)
  copied, installed = _done(stand_ins, _TPU, "install", *_POD, "--ssh_flag=--tunnel-through-iap")
  assert [copied[4], copied[6:]] == ["scp", ["pod:", *_ALL, "--tunnel-through-iap", *_WHERE]]
  assert installed[4:8] == ["ssh", "pod", *_ALL] and "--tunnel-through-iap" in installed
  assert _remote(installed) == _remote(shown[1])
  assert not os.path.exists(copied[5])
  home = tmp_path / "home"
  (home / "videogpt_jax" / ".venv").mkdir(parents=True)
  (home / "videogpt_jax" / "old.py").touch()
  (tmp_path / "videogpt_jax.tgz").rename(home / "videogpt_jax.tgz")
  command = _remote(installed).replace("launch/local.sh install", "bash launch/local.sh install"
                                       " --dry_run")
  result = subprocess.run(["bash", "-c", command], check=True, cwd=home, capture_output=True,
                          text=True, env={**os.environ, "HOME": str(home)})
  assert ".venv/bin/python -m pip install -e" in result.stdout and "[tpu]" in result.stdout
  assert (home / "videogpt_jax" / ".venv").is_dir()
  assert not (home / "videogpt_jax" / "old.py").exists()
  for name in ("setup.py", "videogpt_jax/main.py", "launch/common.sh"):
    assert (home / "videogpt_jax" / name).read_bytes() == (lib.ROOT / name).read_bytes()


def test_tpu_install_clones(stand_ins):
  call, = _shown(stand_ins, _TPU, "install", *_POD, "--repo=https://host/x y", "--ref=v1")
  assert "git clone 'https://host/x y' videogpt_jax" in _remote(call)
  assert "git fetch origin v1" in _remote(call)


def test_tpu_start(stand_ins, tmp_path):
  """The command for the machines, run with stand-ins for what it calls there."""
  call, = _shown(stand_ins, _TPU, "start", *_POD, "--bucket=my-bucket", "--env=A=b c")
  assert call[4:8] == ["ssh", "pod", *_ALL]
  assert _shown(stand_ins, _TPU, "resume", *_POD, "--bucket=my-bucket", "--env=A=b c") == [call]
  (tmp_path / "home" / "videogpt_jax").mkdir(parents=True)
  for name in ("sudo", "gcsfuse"):
    stand_ins.add(name)
  stand_ins.add("mountpoint", "sys.exit(1)")
  subprocess.run(["bash", "-c", _remote(call)], check=True, stdin=subprocess.DEVNULL,
                 env=stand_ins.environment(HOME=str(tmp_path / "home")))
  *_, mounted, started = [[name, *called] for name, called, _ in stand_ins.calls()]
  assert mounted[0] == "gcsfuse" and mounted[-2:] == ["my-bucket", "/data"]
  assert "--rename-dir-limit=200000" in mounted  # checkpoints are completed by a rename
  folder = f"{tmp_path}/home/videogpt_jax"
  assert started[:2] == ["sudo", "systemd-run"]
  assert {"--unit=videogpt", "--property=KillMode=mixed", f"--working-directory={folder}",
          f"--setenv=VENV={folder}/.venv", "--setenv=A=b c"} <= set(started)
  program = started.index(f"{folder}/launch/local.sh")
  assert started[program + 1:] == [
    "start", f"--logs={tmp_path}/home/videogpt_logs", "--", "--distributed", *_TRAIN[1:]]


def test_tpu_watching_and_ending(stand_ins):
  stand_ins.add("gcloud")
  ssh = ["gcloud", "compute", "tpus", "queued-resources", "ssh", "pod"]
  logs, = _done(stand_ins, _TPU, "logs", *_POD, "--slice=1", "--worker=3")
  assert logs[:8] == [*ssh, "--node=1", "--worker=3"] and "tail -n 50 -F" in _remote(logs)
  described, asked = _done(stand_ins, _TPU, "status", *_POD)
  assert described[4:] == ["describe", "pod", "--format=value(state.state)", *_WHERE]
  assert asked[:8] == [*ssh, *_ALL] and "launch/local.sh status" in _remote(asked)
  stopped, = _done(stand_ins, _TPU, "stop", *_POD)
  assert stopped[:8] == [*ssh, *_ALL] and "systemctl stop videogpt" in _remote(stopped)
  deleted, = _done(stand_ins, _TPU, "delete", *_POD)
  assert deleted[4:] == ["delete", "pod", "--force", "--quiet", *_WHERE]
  for command in ("logs", "status", "stop", "delete"):
    before = len(stand_ins.calls())
    assert _shown(stand_ins, _TPU, command, *_POD)
    assert len(stand_ins.calls()) == before


# A cloud of one pod: `script` is what happens at each look, the last entry for ever.
_CLOUD = """
import pathlib
story = {story!r}
count = pathlib.Path({count!r})
look = int(count.read_text()) if count.exists() else 0
verb, rest = sys.argv[4], " ".join(sys.argv[5:])
if verb == "list":
  print(story[min(look, len(story) - 1)][0])
  count.write_text(str(look + 1))
elif verb == "ssh" and "word=" in rest:
  words = story[min(look, len(story)) - 1][1]
  if not words:
    sys.exit(255)
  print("\\n".join(f"word={{word}}" for word in (words[:1] if "--node=0" in rest else words)))
"""


def _watch(stand_ins, tmp_path, story):
  """What `watch` does: verbs of gcloud but for its looks; and its status."""
  stand_ins.add("gcloud", _CLOUD.format(story=story, count=str(tmp_path / "count")))
  stand_ins.no_pauses()
  result = stand_ins.run(_TPU, "watch", *_POD, "--type=v6e-16", "--spot", "--bucket=b", *_TRAIN)
  verbs = []
  for name, called, _ in stand_ins.calls():
    text = " ".join(called)
    if name != "gcloud" or called[3] == "list" or "word=" in text:
      continue
    kinds = {"systemd-run": "start", "systemctl stop": "stop", "local.sh install": "install"}
    verbs.append(next((kind for words, kind in kinds.items() if words in text), called[3]))
  return result, verbs


def test_tpu_watch_makes_a_pod_and_replaces_it(stand_ins, tmp_path):
  running = ["running", "running"]
  result, verbs = _watch(stand_ins, tmp_path, [
    ("", []), ("WAITING_FOR_RESOURCES", []), ("ACTIVE", ["bare", "bare"]), ("ACTIVE", running),
    ("SUSPENDING", []), ("SUSPENDED", []), ("", []), ("ACTIVE", ["bare", "bare"]),
    ("ACTIVE", running), ("ACTIVE", ["done", "done"])])
  assert result.returncode == 0, result.stderr
  # A worker that is bare has no state yet: the first word of the second look is "bare", too.
  assert verbs == ["create", "scp", "install", "stop", "start",
                   "delete", "create", "scp", "install", "stop", "start"]
  assert "the run is done" in result.stdout


def test_tpu_watch_starts_a_run_again_that_lost_a_worker(stand_ins, tmp_path):
  result, verbs = _watch(stand_ins, tmp_path, [
    ("ACTIVE", ["running", "running"]), ("ACTIVE", ["stopped", "vanished"]),
    ("ACTIVE", ["running", "running"]), ("ACTIVE", []), ("ACTIVE", ["done", "stopped"])])
  assert result.returncode == 0, result.stderr
  assert verbs == ["stop", "start"]


@pytest.mark.parametrize("story, status, verbs", [
  ([("ACTIVE", ["failed 2", "failed 2"])], 2, []),
  ([("ACTIVE", ["failed 134", "running"])], 134, []),
  ([("ACTIVE", ["stopped", "running"])], 2, ["stop", "start"] * 4),
  ([("FAILED", [])], 2, ["delete"] * 3),
])
def test_tpu_watch_gives_up(stand_ins, tmp_path, story, status, verbs):
  result, done = _watch(stand_ins, tmp_path, story)
  assert (result.returncode, done) == (status, verbs), result.stderr


# SLURM


def test_slurm_directives_come_before_the_first_command():
  lines = _SLURM.read_text().splitlines()
  command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
  directives = [line.split()[1] for line in lines[:command] if line.startswith("#SBATCH ")]
  assert sum(line.startswith("#SBATCH") for line in lines) == len(directives)
  for one in ("--requeue", "--open-mode=append", "--signal=B:USR1@600", "--gres=gpu:1",
              "--output=logs/%x-%j.log", "--ntasks-per-node=1"):
    assert one in directives


def test_slurm_start_status_and_stop(stand_ins):
  for name in ("python", "sbatch", "squeue", "scancel", "mkdir"):
    stand_ins.add(name)
  me = f"--user={subprocess.run(['id', '-un'], capture_output=True, text=True).stdout.strip()}"
  expected = {
    ("start", "--name=vg", "--nodes=4", "--ntasks-per-node=8", "--gres=gpu:8"): [
      ["mkdir", "-p", "logs"],
      ["sbatch", "--job-name=vg", "--nodes=4", "--ntasks-per-node=8", "--gres=gpu:8",
       "launch/train_slurm.sh", "job", *_TRAIN]],
    ("status",): [["squeue", "--me", "--name=train",
                   "--format=%i %T %M of %l, %D nodes, %r"]],
    ("stop", "--name=vg"): [
      ["scancel", "--name=vg", me, "--state=PENDING"],
      ["scancel", "--name=vg", me, "--state=RUNNING", "--batch", "--signal=USR2"]],
  }
  for command, calls in expected.items():
    assert _shown(stand_ins, _SLURM, *command) == calls
    assert _done(stand_ins, _SLURM, *command) == calls
  assert _shown(stand_ins, _SLURM, "logs") == [["tail", "-n", "50", "-F", "logs/train-JOB.log"]]


_JOB = {"SLURM_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "6"}
_SRUN = ["--kill-on-bad-exit=0", "--wait=0", "--cpus-per-task=6"]


@pytest.mark.parametrize("gpus, tasks, more", [
  (8, 8, []), (1, 1, []), (4, 1, ["env", "JAX_LOCAL_DEVICE_IDS=0,1,2,3"])])
def test_slurm_job_runs_a_process_for_each_task(stand_ins, tmp_path, gpus, tasks, more):
  """From a copy elsewhere, as SLURM does it."""
  for name in ("srun", "scontrol", "scancel", "python"):
    stand_ins.add(name)
  copy = tmp_path / "slurm_script"
  copy.write_bytes(_SLURM.read_bytes())
  result = stand_ins.run(copy, "job", *_TRAIN, **_JOB, SLURM_GPUS_ON_NODE=str(gpus),
                         SLURM_NTASKS_PER_NODE=str(tasks))
  assert result.returncode == 0, result.stderr
  (name, arguments, _), = stand_ins.calls()
  assert name == "srun"
  assert arguments == [*_SRUN, *more, "python", *_MAIN, *_TRAIN[1:]]


def test_slurm_job_refuses_tasks_that_do_not_fit_the_gpus(stand_ins):
  stand_ins.add("python")
  lib.refused(stand_ins.run(_SLURM, "job", *_TRAIN, **_JOB, SLURM_GPUS_ON_NODE="8",
                            SLURM_NTASKS_PER_NODE="4"), "--ntasks-per-node is 4")


@pytest.mark.parametrize("number, status, requeued", [
  (signal.SIGUSR1, 0, True), (signal.SIGUSR2, 143, False), (signal.SIGTERM, 143, False)])
def test_slurm_job_saves_before_its_end(stand_ins, tmp_path, number, status, requeued):
  """`scancel` tells the tasks, never a signal for srun, which would kill them."""
  started, asked = tmp_path / "started", tmp_path / "asked"
  stand_ins.add("srun", f"""
import pathlib
pathlib.Path({str(started)!r}).touch()
while not pathlib.Path({str(asked)!r}).exists():
  time.sleep(0.05)
""")
  stand_ins.add("scancel", f"open({str(asked)!r}, 'w')")
  for name in ("scontrol", "python"):
    stand_ins.add(name)
  process = subprocess.Popen(
    ["bash", str(_SLURM), "job", *_TRAIN], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
    text=True, cwd=lib.ROOT, env=stand_ins.environment(**_JOB))
  deadline = time.monotonic() + 30
  while not started.exists():
    assert time.monotonic() < deadline
    time.sleep(0.02)
  process.send_signal(number)
  if number == signal.SIGTERM:  # SLURM tells the tasks itself
    time.sleep(0.5)
    asked.touch()
  out, _ = process.communicate(timeout=30)
  assert process.returncode == status, out
  calls = [[name, *called] for name, called, _ in stand_ins.calls() if name != "srun"]
  told = [] if number == signal.SIGTERM else [["scancel", "--signal=TERM", "77"]]
  assert calls == told + ([["scontrol", "requeue", "77"]] if requeued else [])


def test_slurm_job_starts_a_crashed_run_again(stand_ins, tmp_path):
  """And one that storage refuses as often as it takes."""
  stand_ins.no_pauses()
  for name in ("scontrol", "scancel", "python"):
    stand_ins.add(name)
  stand_ins.add("srun", """
import pathlib
count = pathlib.Path(os.environ["COUNT"])
with count.open("a") as file:
  file.write("x")
outage = os.environ["STATUS"] == "74" and len(count.read_text()) > 8  # storage is back
sys.exit(0 if outage else int(os.environ["STATUS"]))
""")
  for status, starts in ((2, 1), (1, 6), (74, 9)):
    before = len([1 for name, *_ in stand_ins.calls() if name == "srun"])
    result = stand_ins.run(_SLURM, "job", *_TRAIN, **_JOB, STATUS=str(status),
                           COUNT=str(tmp_path / f"count-{status}"))
    assert result.returncode == (0 if status == 74 else status)
    assert len([1 for name, *_ in stand_ins.calls() if name == "srun"]) - before == starts
  assert not any(name == "scontrol" for name, *_ in stand_ins.calls())


# Kubernetes


def _manifest(stand_ins, *arguments):
  """The JobSet of a dry run; its job, its pod and its container."""
  yaml = pytest.importorskip("yaml")
  stand_ins.add("kubectl")
  result = stand_ins.run(_GKE, "submit", "--image=REGION/IMAGE:1", "--dry_run", *arguments, *_TRAIN)
  assert result.returncode == 0, result.stderr
  assert result.stdout.startswith("# kubectl create --filename=-") and not stand_ins.calls()
  jobset = yaml.safe_load(result.stdout)
  replicated, = jobset["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  container, = pod["containers"]
  return jobset, replicated, job, pod, container


_IN_POD = ["launch/local.sh", "start", "--max_restarts=0", "--logs=/tmp/launch", "--",
           "--distributed"]


def test_jobset_template_is_yaml_itself():
  yaml = pytest.importorskip("yaml")
  assert yaml.safe_load((lib.LAUNCH / "train_jobset.yaml").read_text())["kind"] == "JobSet"


def test_jobset_of_tpu_slices(stand_ins):
  jobset, replicated, job, pod, container = _manifest(
    stand_ins, "--name=vg", "--bucket=b", "--tpu=tpu-v6e-slice", "--topology=4x8", "--slices=3",
    "--node=cloud.google.com/gke-spot=true", "--queue=q", "--max_restarts=7", "--env=A=$(b) c")
  assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
  assert jobset["metadata"] == {
    "name": "vg", "labels": {"kueue.x-k8s.io/queue-name": "q"},
    "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}}
  assert replicated["replicas"] == 3
  assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
  assert job["completions"] == job["parallelism"] == 8  # 32 chips, 4 a node
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-spot": "true", "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
    "cloud.google.com/gke-tpu-topology": "4x8"}
  assert pod["restartPolicy"] == "Never" and pod["terminationGracePeriodSeconds"] == 600
  assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
  assert container["image"] == "REGION/IMAGE:1" and container["command"] == ["bash"]
  # GKE tells jax on TPUs who takes part.
  assert container["args"][:8] == [*_IN_POD, "--config=configs/stage1.py",
                                   "--workdir=/data/my runs/a"]
  # Kubernetes replaces $$ by $, and would replace $(HOME).
  assert [text.replace("$$", "$") for text in container["args"][8:]] == list(_AWKWARD)
  assert container["env"] == [{"name": "A", "value": "$$(b) c"}]
  assert container["resources"] == {"limits": {"google.com/tpu": 4}}
  data, shared = pod["volumes"]
  assert data["csi"]["volumeAttributes"]["bucketName"] == "b"
  options = data["csi"]["volumeAttributes"]["mountOptions"].split(",")
  assert "file-system:rename-dir-limit:200000" in options
  assert shared["emptyDir"] == {"medium": "Memory"}
  assert {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]} == {
    "/data": data["name"], "/dev/shm": shared["name"]}


def test_jobset_restarts_what_is_worth_it(stand_ins):
  """The rules of job and JobSet refer to each other by number."""
  jobset, _, job, _, container = _manifest(stand_ins, "--claim=c", "--gpus=8", "--max_restarts=7")
  wrong, disrupted, told = job["podFailurePolicy"]["rules"]
  assert wrong == {"action": "FailJob", "onExitCodes": {
    "containerName": container["name"], "operator": "In", "values": [2]}}
  assert disrupted == {"action": "FailJob", "onPodConditions": [
    {"type": "DisruptionTarget", "status": "True"}]}
  policy = jobset["spec"]["failurePolicy"]
  assert told == {"action": "FailJob", "onExitCodes": {
    "containerName": container["name"], "operator": "In", "values": [74, 143]}}
  assert policy["maxRestarts"] == 7 and policy["restartStrategy"] == "BlockingRecreate"
  assert [(rule["action"], rule["onJobFailureReasons"], rule["onJobFailureMessagePatterns"])
          for rule in policy["rules"]] == [
    ("FailJobSet", ["PodFailurePolicy"], ["rule at index 0$"]),
    ("RestartJobSetAndIgnoreMaxRestarts", ["PodFailurePolicy"], ["rule at index [12]$"])]


def test_jobset_of_gpu_nodes(stand_ins):
  jobset, replicated, job, pod, container = _manifest(
    stand_ins, "--claim=videos", "--gpus=8", "--hosts=4",
    "--node=cloud.google.com/gke-accelerator=nvidia-h100-80gb")
  assert jobset["metadata"] == {"name": "train", "labels": {}, "annotations": {}}
  assert replicated["replicas"] == 1 and job["completions"] == job["parallelism"] == 4
  assert container["resources"] == {"limits": {"nvidia.com/gpu": 8}}
  # JobSet names pods JOBSET-REPLICATED-0-0.JOBSET.
  coordinator = f"train-{replicated['name']}-0-0.train:8476"
  assert jobset["spec"]["network"]["enableDNSHostnames"] is True
  assert container["args"][:9] == [
    *_IN_POD, f"--coordinator={coordinator}", "--num_processes=4",
    "--process_id=$(JOB_COMPLETION_INDEX)"]
  assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": "videos"}
  assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}


@pytest.mark.parametrize("topology, flags, hosts, chips", [
  ("2x2", (), 1, 4), ("2x4", ("--chips=8",), 1, 8), ("1x1", (), 1, 1), ("4x4x8", (), 32, 4)])
def test_jobset_has_a_pod_for_each_node(stand_ins, topology, flags, hosts, chips):
  _, _, job, _, container = _manifest(
    stand_ins, "--claim=c", "--tpu=t", f"--topology={topology}", *flags)
  assert job["completions"] == hosts
  assert container["resources"]["limits"] == {"google.com/tpu": chips}


def test_gke_submits_the_manifest_of_the_dry_run(stand_ins):
  flags = ("--image=i", "--claim=c", "--gpus=1", *_TRAIN)
  shown = stand_ins.run(_GKE, "submit", "--dry_run", *flags).stdout
  stand_ins.add("kubectl")
  for word in ("submit", "resume"):
    assert stand_ins.run(_GKE, word, *flags).returncode == 0
  assert stand_ins.calls() == 2 * [
    ["kubectl", ["create", "--filename=-"], shown.partition("\n")[2]]]


def test_gke_watching_and_ending(stand_ins):
  stand_ins.add("kubectl")
  chosen = "--selector=jobset.sigs.k8s.io/jobset-name=vg"
  expected = {
    ("logs", "--name=vg", "--slice=2", "--worker=5"): [
      ["kubectl", "logs", f"{chosen},jobset.sigs.k8s.io/job-index=2,"
       "batch.kubernetes.io/job-completion-index=5", "--container=train", "--tail=50",
       "--follow"]],
    ("status", "--name=vg"): [
      ["kubectl", "get", "jobset", "vg", "--output=custom-columns=NAME:.metadata.name,"
       "END:.status.terminalState,RESTARTS:.status.restarts,"
       "CRASHES:.status.restartsCountTowardsMax"],
      ["kubectl", "get", "pods", chosen, "--output=wide"]],
    ("stop", "--name=vg"): [["kubectl", "delete", "jobset", "vg", "--cascade=foreground"]],
  }
  for command, calls in expected.items():
    assert _shown(stand_ins, _GKE, *command) == calls
    assert _done(stand_ins, _GKE, *command) == calls


def test_gke_submits_by_xpk(stand_ins):
  stand_ins.add("xpk")
  flags = ("xpk", "--name=vg", "--cluster=c", "--type=v6e-16", "--slices=2", "--image=i",
           "--env=A=b c", "--xpk_flag=--storage=s")
  call, = _done(stand_ins, _GKE, *flags)
  assert _shown(stand_ins, _GKE, *flags) == [call]
  *options, command = call[3:]
  assert call[:3] == ["xpk", "workload", "create"]
  assert options == [
    "--cluster=c", "--workload=vg", "--tpu-type=v6e-16", "--num-slices=2", "--docker-image=i",
    "--max-restarts=20", "--restart-on-exit-codes=1,3-126",
    "--termination-grace-period-seconds=600", "--env=A=b c", "--storage=s"]
  assert shlex.split(command.removeprefix("--command=")) == ["bash", *_IN_POD, *_TRAIN[1:]]


def test_in_a_pod_a_stopped_run_is_not_taken_for_done(stand_ins, tmp_path):
  """The container's own command: a saved run ends with 143, so that the JobSet goes on."""
  stand_ins.add("python", """
def stopped(number, frame):
  print("stopped by a signal after step 7", flush=True)
  sys.exit(0)
signal.signal(signal.SIGTERM, stopped)
open(os.environ["STARTED"], "w")
time.sleep(60)
""")
  _, _, _, _, container = _manifest(stand_ins, "--claim=c", "--gpus=1")
  arguments = [one.replace("/tmp/launch", str(tmp_path / "logs")) for one in container["args"]]
  started = tmp_path / "started"
  process = subprocess.Popen(
    [*container["command"], *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
    text=True, cwd=lib.ROOT, env=stand_ins.environment(STARTED=str(started)))
  deadline = time.monotonic() + 30
  while not started.exists():
    assert time.monotonic() < deadline
    time.sleep(0.02)
  process.terminate()
  out, _ = process.communicate(timeout=30)
  assert process.returncode == 143, out


# The container


def test_the_container_holds_what_the_launchers_call():
  ignored = (lib.ROOT / ".dockerignore").read_text().split()
  assert not {"launch", "configs", "videogpt_jax", "setup.py", "pyproject.toml"} & set(ignored)
  lines = (lib.LAUNCH / "Dockerfile").read_text().splitlines()
  assert "COPY . ." in lines and any(line.startswith("WORKDIR ") for line in lines)
  extras = (lib.ROOT / "setup.py").read_text()
  assert '"tpu":' in extras and '"cuda":' in extras and '"gcs":' in extras
