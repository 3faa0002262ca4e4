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

fail() {
  echo "error: $*" >&2
  exit 2
}

usage() {  # the comment at the top
  sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

# A text without control characters as a JSON string, which is a YAML string, too.
json() {
  local text=$1 out= i char
  for (( i = 0; i < ${#text}; i++ )); do
    char=${text:i:1}
    case $char in
      '"' | "\\") out+="\\$char" ;;
      *) out+=$char ;;
    esac
  done
  printf '"%s"' "$out"
}

# Several texts as a JSON list of strings.
json_list() {
  local out= text
  for text in "$@"; do
    out+="${out:+, }$(json "$text")"
  done
  printf '[%s]' "$out"
}

# A text as Kubernetes has to get it so that the program gets the text: it replaces $(NAME),
# and $$ by $.
literal() {
  local text=$1 out= i char
  for (( i = 0; i < ${#text}; i++ )); do
    char=${text:i:1}
    out+=$char
    [[ $char != '$' ]] || out+=$char
  done
  printf '%s' "$out"
}

whole_number() {  # flag, value, least
  [[ $2 =~ ^(0|[1-9][0-9]{0,5})$ ]] && (( $2 >= $3 )) ||
    fail "$1 must be a whole number, at least $3, got '$2'"
}

# The template with the value of NAME in every place of ${NAME}. In one pass, so that nothing
# is replaced within a value.
fill_in() {
  local text out=
  text=$(< "$1")
  while [[ $text =~ \$\{([A-Z]+)\} ]]; do
    local place=${BASH_REMATCH[0]} name=${BASH_REMATCH[1]}
    out+=${text%%"$place"*}
    case $name in
      NAME) out+=$(json "$name_flag") ;;
      SHARDS) out+=$shards ;;
      PARALLELISM) out+=$parallelism ;;
      IMAGE) out+=$(json "$image") ;;
      ANNOTATIONS) out+=$annotations ;;
      NODES) out+="{$nodes}" ;;
      ARGS) out+=$arguments ;;
      REQUESTS) out+="{\"cpu\": $(json "$cpus"), \"memory\": $(json "$memory")}" ;;
      LIMITS) out+="{\"memory\": $(json "$memory")$gpu_limit}" ;;
      VOLUME) out+="{\"name\": \"data\", $volume}" ;;
      *) fail "$1: nothing is known about $place" ;;
    esac
    text=${text#*"$place"}
  done
  printf '%s\n' "$out$text"
}

run() {  # a command; with --dry_run shows it instead
  if (( dry_run )); then
    local text
    text=$(printf '%q ' "$@")
    echo "${text% }"
  else
    "$@"
  fi
}

submit() {
  [[ -n $image ]] || fail "no --image=IMAGE: a container image with videogpt_jax"
  [[ -n $shards ]] || fail "no --shards=N: into how many parts the work is cut"
  whole_number --shards "$shards" 1
  parallelism=${parallelism:-$shards}
  whole_number --parallelism "$parallelism" 1
  whole_number --gpus "$gpus" 0
  whole_number --cpus "$cpus" 1
  [[ -n $claim || -n $bucket ]] ||
    fail "no --claim=NAME or --bucket=NAME: a volume that all pods see, for videos and output"
  [[ -z $claim || -z $bucket ]] || fail "--claim and --bucket exclude each other"

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
  arguments=$(json_list "${given[@]}")

  gpu_limit=
  if (( gpus > 0 )); then
    gpu_limit=", \"nvidia.com/gpu\": $gpus"
  fi
  if [[ -n $claim ]]; then
    annotations="{}"
    volume="\"persistentVolumeClaim\": {\"claimName\": $(json "$claim")}"
  else
    annotations='{"gke-gcsfuse/volumes": "true"}'
    # Without caches every pod sees at once what the others have finished: the last one must.
    local options=implicit-dirs,metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0
    volume="\"csi\": {\"driver\": \"gcsfuse.csi.storage.gke.io\", \"volumeAttributes\": "
    volume+="{\"bucketName\": $(json "$bucket"), \"mountOptions\": \"$options\"}}"
  fi

  local manifest template
  template=$(dirname "${BASH_SOURCE[0]}")/encode_job.yaml
  [[ -r $template ]] || fail "there is no $template"
  manifest=$(fill_in "$template")
  if (( dry_run )); then
    echo "# kubectl create --filename=-    (reads what follows)"
    printf '%s\n' "$manifest"
    return
  fi
  # `create`, not `apply`: a job cannot be changed, and `apply` would do nothing, silently.
  kubectl create --filename=- <<< "$manifest" || {
    local status=$?
    echo "error: not submitted. If there is a job ${name_flag} already: see \`status\`; after" \
         "\`stop\` the same command resumes it" >&2
    return "$status"
  }
}

pods=
status() {
  local columns=NAME:.metadata.name,PARTS:.spec.completions,RUNNING:.status.active
  columns+=,DONE:.status.completedIndexes,FAILED:.status.failedIndexes
  run kubectl get job "$name_flag" "--output=custom-columns=$columns"
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
  run kubectl delete job "$name_flag"
}

if (( $# == 0 )); then
  usage >&2
  exit 2
fi

for argument in "$@"; do
  [[ $argument != *[[:cntrl:]]* ]] ||
    fail "there are line breaks or other control characters in $(printf %q "$argument")"
done

subcommand=submit
name_flag=encode image= shards= parallelism= gpus=1 cpus=8 memory=32Gi claim= bucket= index=
nodes=
dry_run=0
while (( $# )); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    submit | status | logs | stop) subcommand=$1 ;;
    --name=*) name_flag=${1#*=} ;;
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
[[ $name_flag =~ ^[a-z]([-a-z0-9]{0,48}[a-z0-9])?$ ]] ||
  fail "--name must be of small letters, digits and hyphens, at most 50, got '$name_flag'"
pods=batch.kubernetes.io/job-name=$name_flag

"$subcommand" "$@"
