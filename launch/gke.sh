#!/usr/bin/env bash
# Trains on Kubernetes with a JobSet: TPU slices of GKE, or nodes with GPUs.
#
#   launch/gke.sh submit --image=IMAGE (--claim=NAME | --bucket=NAME) \
#       (--tpu=tpu-v6e-slice --topology=8x8 [--slices=N] | --gpus=8 [--hosts=N]) \
#       -- --config=configs/stage1.py --workdir=/data/runs/stage1 ...
#   launch/gke.sh logs   [--name=train] [--slice=0] [--worker=0]
#   launch/gke.sh status [--name=train]
#   launch/gke.sh stop   [--name=train]
#   launch/gke.sh xpk --cluster=NAME --type=v6e-64 [--slices=N] --image=IMAGE \
#       [--xpk_flag=--storage=NAME ...] -- --config=... --workdir=...
#   launch/gke.sh resume    is another word for submit
#
#   --name          of the JobSet
#   --image         container image, see launch/Dockerfile
#   --claim         persistent volume claim (ReadWriteMany) with data and workdir,
#   --bucket        or Cloud Storage bucket (Cloud Storage FUSE CSI driver); either is /data
#   --tpu           value of the nodes' label cloud.google.com/gke-tpu-accelerator
#   --topology      of a slice, such as 4x4 or 4x4x8
#   --chips         of a node
#   --slices        so many slices, joined by the data center's network
#   --gpus          of a node
#   --hosts         so many nodes with GPUs
#   --node          label that a node must have, such as cloud.google.com/gke-spot=true; may be
#                   repeated
#   --queue         of Kueue, in which the JobSet waits
#   --max_restarts  after so many crashes it gives up; preemptions do not count
#   --env           NAME=VALUE for the trainer's environment; may be repeated
#   --container     whose log; jax-tpu for what xpk has submitted
#   --xpk_flag      one more flag of `xpk workload create`; may be repeated
#   --dry_run       of each of them: print the manifest or the commands, and run nothing
#
# The cluster and namespace are those of `kubectl config current-context`. `stop` lets the run
# save; the command that started it resumes it. `xpk` submits to a TPU cluster that xpk has made,
# with its storages in place of --claim or --bucket.

set -euo pipefail

launch=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$launch/common.sh"

readonly JOBSET=jobset.sigs.k8s.io
readonly PORT=8476  # of process 0, where nodes with GPUs meet
readonly SAVE_TIME=600  # seconds that a pod has to save when it is told to stop
# In a pod, too, local.sh is what is told to stop: it passes that on, and it ends with another
# status than 0 if the run was stopped before its last step, so that no one takes it for done.
# It starts nothing again: that is up to the JobSet, which starts all pods together.
readonly IN_POD=(launch/local.sh start --max_restarts=0 --logs=/tmp/launch --)

pods_of_slice() {
  [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
    fail "--topology must be like 4x4 or 4x4x8, got '$topology'"
  local all=$(( ${topology//x/ * } ))
  if (( all < chips )); then
    chips=$all
  fi
  (( all % chips == 0 )) || fail "a slice of ${topology} has ${all} chips, no multiple of" \
    "--chips=${chips}"
  hosts=$(( all / chips ))
}

submit() {
  trainer_flags --distributed --coordinator --num_processes --process_id -- "$@"
  [[ -n $image ]] || fail "no --image=IMAGE: a container image with videogpt_jax"
  data_volume "$claim" "$bucket"
  [[ $workdir == /data/* ]] || fail "--workdir must be in /data, the volume that all pods see"
  whole_number --slices "$slices" 1
  whole_number --hosts "$hosts" 1
  whole_number --chips "$chips" 1
  whole_number --max_restarts "$max_restarts" 0
  [[ -n $tpu || -n $gpus ]] || fail "no --tpu=TYPE or --gpus=N"
  [[ -z $tpu || -z $gpus ]] || fail "--tpu and --gpus exclude each other"

  local argument given=() limits placement='' labels=''
  for argument in "${IN_POD[@]}" --distributed; do
    given+=("$argument")
  done
  if [[ -n $tpu ]]; then
    pods_of_slice
    limits="{\"google.com/tpu\": $chips}"
    # Every slice on one node pool, which is what chips are wired up in.
    placement="\"alpha.$JOBSET/exclusive-topology\": \"cloud.google.com/gke-nodepool\""
    nodes+="${nodes:+, }\"cloud.google.com/gke-tpu-accelerator\": $(json "$tpu")"
    nodes+=", \"cloud.google.com/gke-tpu-topology\": $(json "$topology")"
  else
    whole_number --gpus "$gpus" 1
    (( slices == 1 )) || fail "--slices is for --tpu; nodes with GPUs are --hosts"
    limits="{\"nvidia.com/gpu\": $gpus}"
    # jax would ask the cluster who takes part, with a package and rights that pods do not have.
    given+=("--coordinator=$name-host-0-0.$name:$PORT" "--num_processes=$hosts"
      "--process_id=\$(JOB_COMPLETION_INDEX)")
  fi
  for argument in "$@"; do
    given+=("$(literal "$argument")")
  done
  [[ -z $queue ]] || labels="\"kueue.x-k8s.io/queue-name\": $(json "$queue")"

  local manifest
  manifest=$(fill_in "$launch/train_jobset.yaml" "NAME=$(json "$name")" "LABELS={$labels}" \
    "PLACEMENT={$placement}" "RESTARTS=$max_restarts" "SLICES=$slices" "HOSTS=$hosts" \
    "ANNOTATIONS=$annotations" "GRACE=$SAVE_TIME" "NODES={$nodes}" "IMAGE=$(json "$image")" \
    "ARGS=$(json_list "${given[@]}")" "ENV=[$environment]" "LIMITS=$limits" "VOLUME=$volume")
  create "$manifest" "If there is a JobSet ${name} already: see \`status\`; after \`stop\` the \
same command resumes it"
}

# xpk's own JobSet gives up on statuses of which it is not told that they are worth a restart.
submit_by_xpk() {
  trainer_flags --distributed --coordinator --num_processes --process_id -- "$@"
  [[ -n $image ]] || fail "no --image=IMAGE: a container image with videogpt_jax"
  [[ -n $cluster ]] || fail "no --cluster=NAME"
  [[ -n $type ]] || fail "no --type=TYPE, such as --type=v6e-64"
  whole_number --slices "$slices" 1
  whole_number --max_restarts "$max_restarts" 0
  (( dry_run )) || need xpk
  local entry variables=()
  for entry in ${pairs[@]+"${pairs[@]}"}; do
    variables+=("--env=$entry")
  done
  run xpk workload create "--cluster=$cluster" "--workload=$name" "--tpu-type=$type" \
    "--num-slices=$slices" "--docker-image=$image" "--max-restarts=$max_restarts" \
    --restart-on-exit-codes=1,3-126 "--termination-grace-period-seconds=$SAVE_TIME" \
    ${variables[@]+"${variables[@]}"} ${xpk_flags[@]+"${xpk_flags[@]}"} \
    "--command=bash $(quoted "${IN_POD[@]}" --distributed "$@")"
}

status() {
  local columns=NAME:.metadata.name,END:.status.terminalState,RESTARTS:.status.restarts
  columns+=,CRASHES:.status.restartsCountTowardsMax
  run kubectl get jobset "$name" "--output=custom-columns=$columns"
  run kubectl get pods "--selector=$JOBSET/jobset-name=$name" --output=wide
}

logs() {
  whole_number --slice "$slice" 0
  whole_number --worker "$worker" 0
  local selector=$JOBSET/jobset-name=$name,$JOBSET/job-index=$slice
  selector+=,batch.kubernetes.io/job-completion-index=$worker
  run kubectl logs "--selector=$selector" "--container=$container" --tail=50 --follow
}

stop() {  # returns when all pods have saved and are gone
  run kubectl delete jobset "$name" --cascade=foreground
}

if (( $# == 0 )); then
  usage >&2
  exit 2
fi
no_control_characters "$@"

subcommand='' name=train image='' claim='' bucket='' tpu='' topology='' chips=4 slices=1
gpus='' hosts=1 nodes='' queue='' max_restarts=20 environment='' container=train slice=0 worker=0
cluster='' type='' pairs=() xpk_flags=()
while (( $# )); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    submit | logs | status | stop | xpk) subcommand=$1 ;;
    resume) subcommand=submit ;;
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --claim=*) claim=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --tpu=*) tpu=${1#*=} ;;
    --topology=*) topology=${1#*=} ;;
    --chips=*) chips=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --hosts=*) hosts=${1#*=} ;;
    --node=*=*)
      label=${1#--node=}
      nodes+="${nodes:+, }$(json "${label%%=*}"): $(json "${label#*=}")" ;;
    --queue=*) queue=${1#*=} ;;
    --max_restarts=*) max_restarts=${1#*=} ;;
    --env=*=*)
      pair=${1#--env=}
      pairs+=("$pair")
      environment+="${environment:+, }{\"name\": $(json "${pair%%=*}"), "
      environment+="\"value\": $(json "$(literal "${pair#*=}")")}" ;;
    --container=*) container=${1#*=} ;;
    --slice=*) slice=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --cluster=*) cluster=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --xpk_flag=*) xpk_flags+=("${1#*=}") ;;
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    *) fail "unknown flag or subcommand '$1' (see --help); flags are --flag=value, the" \
      "trainer's come after --" ;;
  esac
  shift
done
[[ -n $subcommand ]] || fail "what to do? submit, logs, status, stop or xpk"
[[ $subcommand == submit || $subcommand == xpk || $# == 0 ]] ||
  fail "$subcommand takes no flags of the trainer"
# JobSet and Kubernetes append more; 63 is the most for the names of pods.
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  fail "--name must be of small letters, digits and hyphens, at most 40, got '$name'"
if [[ $subcommand == xpk ]]; then
  submit_by_xpk "$@"
else
  (( dry_run )) || need kubectl
  "$subcommand" "$@"
fi
