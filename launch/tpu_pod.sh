#!/usr/bin/env bash
# Trains on Cloud TPU VMs: a slice of any size, or several slices, as a queued resource.
#
#   launch/tpu_pod.sh create  --name=NAME --zone=ZONE --type=v6e-64 [--slices=N] [--spot] ...
#   launch/tpu_pod.sh install --name=NAME --zone=ZONE [--repo=URL --ref=BRANCH]
#   launch/tpu_pod.sh start   --name=NAME --zone=ZONE (--bucket=NAME | --nfs=HOST:/SHARE) \
#       -- --config=configs/stage1.py --workdir=/data/runs/stage1 ...
#   launch/tpu_pod.sh logs    --name=NAME --zone=ZONE [--slice=0] [--worker=0]
#   launch/tpu_pod.sh status  --name=NAME --zone=ZONE
#   launch/tpu_pod.sh stop    --name=NAME --zone=ZONE
#   launch/tpu_pod.sh delete  --name=NAME --zone=ZONE
#   launch/tpu_pod.sh watch   all flags of create, install and start
#   launch/tpu_pod.sh resume    is another word for start
#
#   --name             of the queued resource, and of its slices
#   --zone, --project  default of both: those of gcloud's configuration
#   --type             accelerator type, such as v6e-64, v5p-32, v5litepod-16
#   --slices           so many slices of that type, joined by the data center's network
#   --spot             cheap machines that may be taken away at any time
#   --runtime_version  of the machines' software; default: the one for the type
#   --create_flag      one more flag of `gcloud compute tpus queued-resources create`, such as
#                      --create_flag=--reserved or --create_flag=--network=NAME; may be repeated
#   --repo, --ref      clone this repository and branch, tag or commit; default: the working
#                      tree here is copied, but for what git ignores
#   --bucket, --nfs    Cloud Storage bucket or NFS share that becomes /data on every machine
#   --env              NAME=VALUE for the trainer's environment; may be repeated
#   --ssh_flag         one more flag of gcloud's ssh and scp, such as --tunnel-through-iap
#   --dry_run          of each of them: print the commands, and run nothing
#
# `create` only asks for machines: wait until `status` says ACTIVE. `watch` does everything, in a
# terminal that stays open (tmux): it creates what is missing, waits, installs, starts, begins
# again with new machines when spot ones were taken away, and ends when the run is done. `stop`
# lets the run save (end a `watch` first). Deleting is up to you: machines cost until then.

set -euo pipefail

launch=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$launch/common.sh"

readonly POLL=60  # seconds between two looks of `watch`
readonly TRIES=3  # of what fails again and again, before `watch` gives up
readonly SAVE_TIME=1800  # seconds that a run has to save when it is told to stop
readonly HOME_RULES="cd ~/videogpt_jax && export VENV=.venv"  # on every machine
readonly LOGS="--logs=\$HOME/videogpt_logs"

tpus() {  # verb of queued-resources, arguments
  local verb=$1
  shift
  run gcloud compute tpus queued-resources "$verb" "$@" ${where[@]+"${where[@]}"}
}

on() {  # slice, worker, command
  tpus ssh "$name" "--node=$1" "--worker=$2" ${ssh_flags[@]+"${ssh_flags[@]}"} "--command=$3"
}

default_runtime() {
  case $type in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v4-* | v3-* | v2-*) echo tpu-ubuntu2204-base ;;
    *) fail "no --runtime_version is known for --type=$type; give one" ;;
  esac
}

check_create() {
  [[ -n $type ]] || fail "no --type=TYPE, such as --type=v6e-64"
  whole_number --slices "$slices" 1
  runtime=${runtime:-$(default_runtime)}
}

create_pod() {
  local flags=("--accelerator-type=$type" "--runtime-version=$runtime")
  if (( slices > 1 )); then
    flags+=("--node-count=$slices" "--node-prefix=$name")
  else
    flags+=("--node-id=$name")
  fi
  (( ! spot )) || flags+=(--spot)
  tpus create "$name" "${flags[@]}" ${create_flags[@]+"${create_flags[@]}"}
}

install_pod() {
  local unpack archive folder
  if [[ -n $repo ]]; then
    unpack="[ -d videogpt_jax/.git ] || git clone $(quoted "$repo") videogpt_jax"
    # Not joined by &&: a failure must end the shell.
    unpack+="; cd videogpt_jax; git fetch origin $(quoted "$ref")"
    unpack+="; git checkout --detach FETCH_HEAD; cd .."
  else
    folder=$(mktemp -d)
    archive=$folder/videogpt_jax.tgz
    pack "$archive"
    tpus scp "$archive" "$name:" --node=all --worker=all ${ssh_flags[@]+"${ssh_flags[@]}"}
    rm -r "$folder"
    # All but the environment is replaced.
    unpack="mkdir -p videogpt_jax; find videogpt_jax -mindepth 1 -maxdepth 1 ! -name .venv"
    unpack+=" -exec rm -rf {} +; tar -xzf videogpt_jax.tgz -C videogpt_jax"
  fi
  on all all "set -e; $unpack; $HOME_RULES; launch/local.sh install --extra=tpu"
}

pack() {  # the working tree, but for what git ignores and what is deleted
  local root
  root=$(cd "$launch/.." && pwd)
  if (( dry_run )); then
    echo "# $1 is made of $(cd "$root" && git ls-files --cached --others --exclude-standard |
      wc -l | tr -d ' ') files of $root"
    return
  fi
  (cd "$root" && git ls-files -z --cached --others --exclude-standard |
    while IFS= read -r -d '' file; do [[ ! -e $file ]] || printf '%s\0' "$file"; done |
    tar -czf "$1" --null -T -)
}

# /data on every machine. Not mounted by the machines themselves, so again at every start.
mount_command() {
  # shellcheck disable=SC2016  # for the machines' shells
  local make='sudo mkdir -p /data && sudo chown "$(id -u)" /data'
  if [[ -n $bucket ]]; then
    local site=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
    echo "mountpoint -q /data || {" \
      "command -v gcsfuse || {" \
      "curl -fsS $site/doc/apt-key.gpg | sudo tee $key >/dev/null &&" \
      "echo \"deb [signed-by=$key] $site gcsfuse-\$(lsb_release -c -s) main\" |" \
      "sudo tee /etc/apt/sources.list.d/gcsfuse.list &&" \
      "sudo apt-get update && sudo apt-get install -y gcsfuse; } &&" \
      "$make && gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0" \
      "--metadata-cache-negative-ttl-secs=0 --rename-dir-limit=$RENAME_LIMIT" \
      "$(quoted "$bucket") /data; } || exit 1"
  elif [[ -n $nfs ]]; then
    echo "mountpoint -q /data || { sudo apt-get install -y nfs-common && $make &&" \
      "sudo mount -t nfs $(quoted "$nfs") /data; } || exit 1"
  else
    echo true
  fi
}

check_start() {
  trainer_flags --distributed --coordinator --num_processes --process_id -- "$@"
  [[ -z $bucket || -z $nfs ]] || fail "--bucket and --nfs exclude each other"
  [[ $workdir == /* ]] || fail "--workdir must be a whole path that all machines see, such as" \
    "/data/runs/stage1, got '$workdir'"
}

# By systemd, so that the run outlives ssh, and is told (TERM, to local.sh alone, which passes it
# on once) when a machine shuts down. A service has none of a login's limits.
start_pod() {
  local command entry
  command="set -e; $(mount_command); $HOME_RULES; sudo systemd-run --quiet --collect"
  command+=" --unit=videogpt --uid=\"\$(id -u)\" --gid=\"\$(id -g)\" --working-directory=\"\$PWD\""
  command+=" --property=KillMode=mixed --property=TimeoutStopSec=$SAVE_TIME"
  command+=" --property=LimitMEMLOCK=infinity --property=LimitNOFILE=1048576"
  command+=" --setenv=HOME=\"\$HOME\" --setenv=VENV=\"\$PWD/.venv\""
  for entry in ${variables[@]+"${variables[@]}"}; do
    command+=" --setenv=$(quoted "$entry")"
  done
  command+=" \"\$PWD/launch/local.sh\" start \"$LOGS\" -- --distributed $(quoted "$@")"
  on all all "$command"
}

stop_pod() {
  on all all "sudo systemctl stop videogpt || true"
}

delete_pod() {  # with its machines
  tpus delete "$name" --force --quiet
}

create() {
  check_create
  create_pod
}

install() {
  install_pod
}

start() {
  check_start "$@"
  start_pod "$@"
}

stop() {
  stop_pod
}

delete() {
  delete_pod
}

logs() {
  on "$slice" "$worker" "tail -n 50 -F ~/videogpt_logs/process-0.log"
}

readonly TELL="$HOME_RULES && launch/local.sh status \"$LOGS\""
status() {
  tpus describe "$name" "--format=value(state.state)"
  on all all "echo \"\$(hostname): \$($TELL)\""
}

# Looked up in the list, where a resource that is not there is no error.
pod_state() {
  tpus list "--filter=name ~ /$name\$" "--format=value(state.state)"
}

watch() {
  check_create
  check_start "$@"
  if (( dry_run )); then
    pod_state
    create_pod
    install_pod
    start_pod "$@"
    return
  fi
  local state old='' bad=0 status
  while :; do
    state=$(pod_state) || state=UNKNOWN
    [[ $state == "$old" ]] || echo "launch: $(date '+%F %T') ${name} is ${state:-not there}"
    old=$state
    case $state in
      '') create_pod || bad=$(( bad + 1 )) ;;
      ACTIVE)
        status=0
        tend "$@" || status=$?
        (( status != GO_ON )) || status=0 bad=0
        (( status != TROUBLE )) || { status=0; bad=$(( bad + 1 )); }
        (( ! finished && ! status )) || return "$status" ;;
      SUSPENDED) delete_pod || bad=$(( bad + 1 )) ;;  # taken away
      FAILED)
        bad=$(( bad + 1 ))
        (( bad > TRIES )) || delete_pod || true ;;
    esac
    (( bad <= TRIES )) || fail "${name} fails again and again; see \`status\` and \`logs\`"
    sleep "$POLL"
  done
}

readonly GO_ON=100 TROUBLE=101
finished=0

# One look at machines that are there: installs, starts, starts again. Returns GO_ON, TROUBLE, or
# after the end the status of the run, with `finished` set.
tend() {
  local words first
  words=$(on all all "[ -x ~/videogpt_jax/.venv/bin/python ] || { echo word=bare; exit; };
    echo \"word=\$($TELL | head -n 1)\"") || return "$TROUBLE"
  if grep -q '^word=bare' <<< "$words"; then
    echo "launch: installs"
    install_pod || return "$TROUBLE"
  elif ! grep '^word=' <<< "$words" | grep -qv '^word=running$'; then
    return "$GO_ON"
  fi
  # Process 0 knows whether the run is done; the others only that they have ended.
  first=$(on 0 0 "echo \"word=\$($TELL | head -n 1)\"" | sed -n 's/^word=//p') || return "$TROUBLE"
  case $first in
    done) echo "launch: the run is done; \`delete\` its machines"; finished=1; return 0 ;;
    failed*)
      echo "launch: the run has failed; see \`logs\`"
      finished=1
      return "${first#failed }" ;;
    never) ;;
    *) stop_pod || return "$TROUBLE" ;;
  esac
  echo "launch: starts the run"
  start_pod "$@" || return "$TROUBLE"
  [[ $first == never ]] || return "$TROUBLE"  # a start that did not last counts
  return "$GO_ON"
}

if (( $# == 0 )); then
  usage >&2
  exit 2
fi

subcommand='' name='' zone='' project='' type='' runtime='' slices=1 spot=0 repo='' ref=HEAD
bucket='' nfs='' slice=0 worker=0
where=() create_flags=() ssh_flags=() variables=()
no_control_characters "$@"
while (( $# )); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    create | install | start | logs | status | stop | delete | watch) subcommand=$1 ;;
    resume) subcommand=start ;;
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --project=*) project=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --slices=*) slices=${1#*=} ;;
    --spot) spot=1 ;;
    --runtime_version=*) runtime=${1#*=} ;;
    --create_flag=*) create_flags+=("${1#*=}") ;;
    --repo=*) repo=${1#*=} ;;
    --ref=*) ref=${1#*=} ;;
    --bucket=*) bucket=${1#*=} ;;
    --nfs=*) nfs=${1#*=} ;;
    --env=*=*) variables+=("${1#*=}") ;;
    --ssh_flag=*) ssh_flags+=("${1#*=}") ;;
    --slice=*) slice=${1#*=} ;;
    --worker=*) worker=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    *) fail "unknown flag or subcommand '$1' (see --help); flags are --flag=value, the" \
      "trainer's come after --" ;;
  esac
  shift
done
[[ -n $subcommand ]] ||
  fail "what to do? create, install, start, logs, status, stop, delete or watch"
[[ $subcommand == start || $subcommand == watch || $# == 0 ]] ||
  fail "$subcommand takes no flags of the trainer"
[[ $name =~ ^[a-z]([-a-z0-9]{0,48}[a-z0-9])?$ ]] ||
  fail "--name must be of small letters, digits and hyphens, at most 50, got '$name'"
[[ -z $zone ]] || where+=("--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")
(( dry_run )) || need gcloud

"$subcommand" "$@"
