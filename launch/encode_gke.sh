#!/usr/bin/env bash
# Encodes a data set with the pods of a Kubernetes job; each does its share of the shards.
#
#   launch/encode_gke.sh [submit] --image=IMAGE --shards=N (--claim=NAME | --bucket=NAME) \
#       [--name=encode] [--parallelism=N] [--gpus=1] [--cpus=8] [--memory=32Gi] \
#       [--node=LABEL=VALUE ...] [--dry_run] -- ENCODE_FLAGS...
#   launch/encode_gke.sh status [--name=encode] [--dry_run]
#   launch/encode_gke.sh logs   [--name=encode] [--index=I] [--dry_run]
#   launch/encode_gke.sh stop   [--name=encode] [--dry_run]
#
#   --image        container image with videogpt_jax, its working folder that of the repository
#   --shards       into how many parts the work is cut, one pod each
#   --claim        persistent volume claim (ReadWriteMany) with the videos and for the output,
#   --bucket       or Cloud Storage bucket (Cloud Storage FUSE CSI driver); either is /data
#   --name         of the job
#   --parallelism  at most so many pods at a time; all, if not given
#   --gpus         of each pod; 0: CPU only
#   --cpus         of each pod, for as many decoders
#   --memory       of each pod
#   --node         label that a node must have, such as cloud.google.com/gke-spot=true or
#                  cloud.google.com/gke-accelerator=nvidia-l4; may be repeated
#   --index        all of this pod's log, and what it adds; else the last lines of every pod
#   --dry_run      print the manifest and the kubectl commands, and run nothing
#
# An example:
#
#   launch/encode_gke.sh --image=IMAGE --shards=64 --bucket=BUCKET -- \
#       --config=configs/stage1.py --videos=/data/list.csv --vae=/data/vae --out=/data/stage1
#
# The cluster and namespace are those of `kubectl config current-context`. A preempted pod is
# replaced. To resume a stopped or failed job: `stop`, then the same command again.

set -euo pipefail

launch=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$launch/common.sh"

submit() {
  [[ -n $image ]] || fail "no --image=IMAGE: a container image with videogpt_jax"
  [[ -n $shards ]] || fail "no --shards=N: into how many parts the work is cut"
  whole_number --shards "$shards" 1
  parallelism=${parallelism:-$shards}
  whole_number --parallelism "$parallelism" 1
  whole_number --gpus "$gpus" 0
  whole_number --cpus "$cpus" 1
  data_volume "$claim" "$bucket"

  local argument config=
  # Limits of CPU time hide no cores from a program: encode would start a decoder for each core
  # of the node. A later --processes wins.
  local given=("--shard=\$(JOB_COMPLETION_INDEX)/$shards" "--processes=$cpus")
  for argument in "$@"; do
    case $argument in
      --shard | --shard=*) fail "leave out --shard: every pod gets its own" ;;
      --distributed | --distributed=*)
        fail "leave out --distributed: the pods know nothing of each other" ;;
      --config | --config=*) config=given ;;
    esac
    given+=("$(literal "$argument")")
  done
  [[ -n $config ]] ||
    fail "no --config=FILE; encode's flags come after --, such as -- --config=configs/stage1.py"
  local gpu_limit=
  if (( gpus > 0 )); then
    gpu_limit=", \"nvidia.com/gpu\": $gpus"
  fi
  local manifest
  manifest=$(fill_in "$launch/encode_job.yaml" "NAME=$(json "$name")" "SHARDS=$shards" \
    "PARALLELISM=$parallelism" "IMAGE=$(json "$image")" "ANNOTATIONS=$annotations" \
    "NODES={$nodes}" "ARGS=$(json_list "${given[@]}")" "VOLUME=$volume" \
    "REQUESTS={\"cpu\": $(json "$cpus"), \"memory\": $(json "$memory")}" \
    "LIMITS={\"memory\": $(json "$memory")$gpu_limit}")
  create "$manifest" "If there is a job ${name} already: see \`status\`; after \`stop\` the same \
command resumes it"
}

pods=
status() {
  local columns=NAME:.metadata.name,PARTS:.spec.completions,RUNNING:.status.active
  columns+=,DONE:.status.completedIndexes,FAILED:.status.failedIndexes
  run kubectl get job "$name" "--output=custom-columns=$columns"
  run kubectl get pods "--selector=$pods" --output=wide
}

logs() {
  if [[ -n $index ]]; then
    whole_number --index "$index" 0
    run kubectl logs "--selector=$pods,batch.kubernetes.io/job-completion-index=$index" \
      --container=encode --tail=-1 --follow --max-log-requests=20
  else
    run kubectl logs "--selector=$pods" --container=encode --tail=3 --prefix
  fi
}

stop() {  # also of its pods; finished shards stay
  run kubectl delete job "$name"
}

if (( $# == 0 )); then
  usage >&2
  exit 2
fi

no_control_characters "$@"

subcommand=submit
name=encode gpus=1 cpus=8 memory=32Gi
image='' shards='' parallelism='' claim='' bucket='' index='' nodes=''
while (( $# )); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    submit | status | logs | stop) subcommand=$1 ;;
    --name=*) name=${1#*=} ;;
    --image=*) image=${1#*=} ;;
    --shards=*) shards=${1#*=} ;;
    --parallelism=*) parallelism=${1#*=} ;;
    --gpus=*) gpus=${1#*=} ;;
    --cpus=*) cpus=${1#*=} ;;
    --memory=*) memory=${1#*=} ;;
    --claim=*) claim=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --index=*) index=${1#*=} ;;
    --node=*=*)
      label=${1#--node=}
      nodes+="${nodes:+, }$(json "${label%%=*}"): $(json "${label#*=}")" ;;
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    [!-]*) fail "unknown subcommand '$1'; there are submit, status, logs and stop" ;;
    *)
      fail "unknown flag '$1' (see --help); flags are --flag=value, encode's own come after --" ;;
  esac
  shift
done
[[ $subcommand == submit || $# == 0 ]] || fail "$subcommand takes no flags of encode"
# Kubernetes appends -I and 6 characters, and 63 is the most for a name.
[[ $name =~ ^[a-z]([-a-z0-9]{0,48}[a-z0-9])?$ ]] ||
  fail "--name must be of small letters, digits and hyphens, at most 50, got '$name'"
pods=batch.kubernetes.io/job-name=$name

"$subcommand" "$@"
