#!/bin/bash
# Encodes a data set with the tasks of a SLURM job array; each does its share of the shards.
#
# Submit, from the root of the repository, with encode's own flags after the script's name:
#
#   mkdir -p logs
#   sbatch --array=0-63 launch/encode_slurm.sh --config=configs/stage1.py --videos=LIST \
#       --vae=FOLDER --out=FOLDER
#
# sbatch's flags go before the script and override the defaults below: `--array=0-999%64` runs
# at most 64 tasks at a time, `--gres=none` does without a GPU; most clusters want a
# `--partition=NAME` or an `--account=NAME`.
# All nodes must see the repository, the videos and the output folder under the same paths.
# The Python is $VENV/bin/python if VENV is set, else that of the active environment.
#
#   see what a task would run: bash launch/encode_slurm.sh --dry_run --config=...
#   watch:                     squeue --me; tail -f logs/encode-JOB_TASK.log
#   stop:                      scancel JOB      (or only one task: scancel JOB_TASK)
#   resume:                    the same sbatch command again, once the old job is gone
#
# A preempted task, one whose node failed and one that nears its time limit is queued again by
# itself, and goes on with the shards that are missing. `srun` with encode's --distributed
# shares the work in one job instead; see launch/README.md.

# SLURM makes no folder for the logs: without logs/ the tasks fail and leave no trace.
#SBATCH --job-name=encode
#SBATCH --output=logs/encode-%A_%a.log
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=32G
#SBATCH --gres=gpu:1
#SBATCH --time=12:00:00
# Queue again what was preempted, and add to its log rather than begin it anew.
#SBATCH --requeue
#SBATCH --open-mode=append
# Warn this script (B:, not its children) 2 minutes before the time limit, and on clusters
# with PreemptParameters=send_user_signal also before a preemption.
#SBATCH --signal=B:USR1@120

set -euo pipefail

# A shard that takes longer than the time limit would be begun again for ever.
readonly MAX_RESTARTS=50

fail() {
  echo "error: $*" >&2
  exit 2
}

usage() {  # the comment at the top
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# The part of this task, as I/N. Outside of an array: all of the work.
shard() {
  if [[ -z ${SLURM_ARRAY_TASK_ID:-} ]]; then
    echo 0/1
    return
  fi
  # shellcheck disable=SC2153  # SLURM sets them
  local first=$SLURM_ARRAY_TASK_MIN last=$SLURM_ARRAY_TASK_MAX count=$SLURM_ARRAY_TASK_COUNT
  # In a list such as 1,2,5 nobody would do the parts between; every task says so.
  (( last - first + 1 == count )) ||
    fail "--array must be an unbroken range such as 0-63; ${count} tasks from ${first} to" \
         "${last} are none"
  echo "$(( SLURM_ARRAY_TASK_ID - first ))/${count}"
}

dry_run=0
config=
arguments=()
for argument in "$@"; do
  case $argument in
    -h | --help) usage; exit 0 ;;
    --dry_run) dry_run=1; continue ;;
    --shard | --shard=*) fail "leave out --shard: it follows from --array" ;;
    --distributed | --distributed=*)
      fail "leave out --distributed: the tasks of an array know nothing of each other" ;;
    --config | --config=*) config=given ;;
  esac
  arguments+=("$argument")
done
if (( $# == 0 )); then
  usage >&2
  exit 2
fi
[[ -n $config ]] || fail "no --config=FILE, such as --config=configs/stage1.py"

python=python
if [[ -n ${VENV:-} ]]; then
  python=$VENV/bin/python
fi
command -v "$python" >/dev/null ||
  fail "there is no ${python}; set VENV=FOLDER to an environment with videogpt_jax or activate it"

part=$(shard)
command=("$python" -m videogpt_jax.encode "--shard=$part")
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
  # Where SLURM binds no cores, encode would see all of the node. A later --processes wins.
  command+=("--processes=$SLURM_CPUS_PER_TASK")
fi
command+=("${arguments[@]}")

if (( dry_run )); then
  text=$(printf '%q ' "${command[@]}")
  echo "${text% }"
  exit 0
fi

# Encode needs no time to stop: what it has not finished it does again.
stop() {
  local child
  for child in $(jobs -p); do
    kill -TERM "$child" 2>/dev/null || true
  done
  wait
}

# Asks for it in any case: a task that ends by itself, before SLURM ends it, is not queued again.
requeue() {
  # In an array SLURM_JOB_ID may stand for all tasks; this name is of this one alone.
  local job=${SLURM_JOB_ID:-}
  if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then
    job=${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID}
  fi
  echo "encode: part ${part} is about to be ended, queues itself again"
  stop
  if (( ${SLURM_RESTART_COUNT:-0} >= MAX_RESTARTS )); then
    echo "error: queued again ${MAX_RESTARTS} times already; give it more --time" >&2
    exit 1
  fi
  if ! scontrol requeue "$job"; then
    echo "error: could not be queued again; submit the same command to go on" >&2
    exit 1
  fi
  exit 0
}

trap requeue USR1
trap 'stop; exit 143' TERM  # scancel, or the end of a preemption: SLURM knows what comes next
trap 'stop; exit 130' INT
# Bash acts on a signal only between two commands or in `wait`: hence in the background.
"${command[@]}" &
wait "$!" && status=0 || status=$?
exit "$status"
