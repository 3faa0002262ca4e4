#!/bin/bash
# Trains on the nodes of a SLURM cluster, one process for each GPU.
#
#   launch/train_slurm.sh start [--name=train] [SBATCH_FLAGS...] -- --config=... --workdir=DIR ...
#   launch/train_slurm.sh logs   [--name=train]
#   launch/train_slurm.sh status [--name=train]
#   launch/train_slurm.sh stop   [--name=train]
#   launch/train_slurm.sh resume    is another word for start
#
#   --name     of the job
#   --dry_run  of each of them: print the commands, and run nothing
#
# An example, 4 nodes of 8 GPUs:
#
#   launch/train_slurm.sh start --nodes=4 --ntasks-per-node=8 --gres=gpu:8 --cpus-per-task=8 \
#       --partition=NAME -- --config=configs/stage1.py --workdir=/shared/runs/stage1
#
# Start it in the root of the repository. All nodes must see that, the data and the workdir under
# the same paths. The Python is $VENV/bin/python if VENV is set, else that of the active
# environment; `launch/local.sh install` makes one. sbatch's flags override the defaults below.
#
# A preempted job, one whose node failed and one that nears its time limit is queued again by
# itself and goes on; a crashed run is started again within the job. `stop` lets the run save;
# `scancel` alone may not.

# SLURM makes no folder for the logs (`start` does).
#SBATCH --job-name=train
#SBATCH --output=logs/%x-%j.log
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --mem-per-cpu=8G
#SBATCH --time=12:00:00
# Queue again what was preempted, and add to its log rather than begin it anew.
#SBATCH --requeue
# Of the jobs of this name and user only one runs: two must never write the same workdir.
#SBATCH --dependency=singleton
#SBATCH --open-mode=append
# Warn this script (B:, not its children) 10 minutes before the time limit, and on clusters with
# PreemptParameters=send_user_signal also before a preemption: time to save.
#SBATCH --signal=B:USR1@600

set -euo pipefail

# SLURM runs a copy of this script, in the folder in which it was submitted.
launch=$(dirname "${BASH_SOURCE[0]}")
[[ -r $launch/common.sh ]] || launch=launch
# shellcheck source=launch/common.sh
source "$launch/common.sh"
# shellcheck source=launch/supervise.sh
source "$launch/supervise.sh"

say() {
  echo "launch: $*"
}

# In the job. USR1: save, be queued again. USR2: save, and stay away. -----------------------

job() {
  trainer_flags --distributed --coordinator --num_processes --process_id -- "$@"
  [[ -n ${SLURM_JOB_ID:-} ]] || (( dry_run )) || fail "\`job\` is for SLURM itself; use \`start\`"
  find_python
  # By the first process that ends the others must not be killed: they have the reasons to tell.
  # A task sees all GPUs of its node, and jax takes the one with the task's number there.
  step=(srun --kill-on-bad-exit=0 --wait=0)
  if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
    step+=("--cpus-per-task=$SLURM_CPUS_PER_TASK")  # srun does not inherit it
  fi
  local gpus=${SLURM_GPUS_ON_NODE:-1} tasks=${SLURM_NTASKS_PER_NODE:-1}
  if (( tasks != gpus )); then
    (( tasks == 1 )) || fail "--ntasks-per-node is ${tasks}, GPUs of a node are ${gpus}: it must" \
      "be as many, or 1"
    step+=(env "JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $(( gpus - 1 )))")
  fi
  step+=("$python" -m videogpt_jax.main --distributed "$@")
  if (( dry_run )); then
    run "${step[@]}"
    return
  fi
  need srun scontrol scancel
  # TERM comes from SLURM, which tells the tasks itself: leave them alone to save.
  trap 'stopping=1 stop_status=143' TERM
  trap 'on_stop 143' USR2
  requeue=0
  trap '(( stopping )) || requeue=1; on_stop 0' USR1
  local status
  supervise && status=0 || status=$?
  if (( requeue && ! status )); then
    say "the job is about to be ended, queues itself again"
    scontrol requeue "$SLURM_JOB_ID" || {
      echo "error: could not be queued again; submit the same command to go on" >&2
      return 1
    }
  fi
  return "$status"
}

start_all() {
  "${step[@]}" &
  pids=("$!")
}

ask_to_stop() {  # the tasks of all nodes. A signal TERM for srun would kill them instead.
  scancel --signal=TERM "$SLURM_JOB_ID" || true
}

end_all() { :; }  # when srun has ended, so have the tasks

unfinished() { false; }

# Outside -----------------------------------------------------------------------------------

start() {
  trainer_flags --distributed --coordinator --num_processes --process_id -- "$@"
  find_python
  (( dry_run )) || need sbatch
  [[ -r launch/train_slurm.sh ]] || fail "start it in the root of the repository"
  run mkdir -p logs
  run sbatch "--job-name=$name" ${sbatch_flags[@]+"${sbatch_flags[@]}"} launch/train_slurm.sh \
    job -- "$@"
}

status() {
  run squeue --me "--name=$name" "--format=%i %T %M of %l, %D nodes, %r"
}

logs() {
  run tail -n 50 -F "$(newest_log)"
}

newest_log() {
  local file newest=
  for file in logs/"$name"-*.log; do
    [[ ! -e $file ]] || { [[ -n $newest && ! $file -nt $newest ]] || newest=$file; }
  done
  (( dry_run )) || [[ -n $newest ]] || fail "there is no logs/$name-JOB.log yet"
  echo "${newest:-logs/$name-JOB.log}"
}

stop() {  # what waits is cancelled, what runs is told
  run scancel "--name=$name" "--user=$(id -un)" --state=PENDING
  run scancel "--name=$name" "--user=$(id -un)" --state=RUNNING --batch --signal=USR2
}

if (( $# == 0 )); then
  usage >&2
  exit 2
fi
no_control_characters "$@"

subcommand='' name=train sbatch_flags=()
while (( $# )); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    start | logs | status | stop | job) subcommand=$1 ;;
    resume) subcommand=start ;;
    --name=*) name=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    --gpu-bind=* | --gpus-per-task=* | --ntasks=*)
      fail "leave out ${1%%=*}: give --nodes, --ntasks-per-node and --gres, of which every task" \
        "then sees all GPUs of its node" ;;
    --*=* | --exclusive) sbatch_flags+=("$1") ;;
    *) fail "unknown flag or subcommand '$1' (see --help); sbatch's flags are --flag=value," \
      "the trainer's come after --" ;;
  esac
  shift
done
[[ -n $subcommand ]] || fail "what to do? start, logs, status or stop"
[[ $subcommand == start || $subcommand == job || $# == 0 ]] ||
  fail "$subcommand takes no flags of the trainer"
[[ $name =~ ^[A-Za-z0-9_.-]+$ ]] || fail "--name must be of letters, digits, _ . and -, got '$name'"

"$subcommand" "$@"
