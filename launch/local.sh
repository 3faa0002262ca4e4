#!/usr/bin/env bash
# Trains on this machine, and starts the run again when it crashes.
#
#   launch/local.sh install [--extra=cuda]
#   launch/local.sh [start] [--processes=N] [--devices_per_process=M] [--detach] [--logs=DIR] \
#       [--max_restarts=5] [--restart_delay=10] [--quick=600] \
#       -- --config=configs/stage1.py --workdir=DIR ...
#   launch/local.sh logs   (--workdir=DIR | --logs=DIR)
#   launch/local.sh status (--workdir=DIR | --logs=DIR)
#   launch/local.sh stop   (--workdir=DIR | --logs=DIR)
#   launch/local.sh resume    is another word for start
#
#   --extra                what to install: cuda, tpu, or several as in cuda,gcs
#   --processes            one uses all GPUs; with N of them, number I uses GPU I
#   --devices_per_process  so many simulated CPU devices for each process, to try things
#   --detach               return at once; the run goes on when the terminal is closed
#   --logs                 folder of the logs; default: WORKDIR/logs
#   --max_restarts         give up after so many crashes in quick succession
#   --restart_delay        seconds before the first restart, doubled with every further one
#   --quick                a run that lasted so many seconds starts a new count of crashes
#   --dry_run              of each of them: print the commands, and run nothing
#
# Ctrl-C, a closed terminal, `stop` and the signal TERM let the run save, then end it. The same
# command goes on. `install` makes the environment $VENV, or .venv; the others use the Python of
# $VENV if it is set, else that of the active environment. A run that storage refuses (74) is
# started again without end, but with --max_restarts=0. Status 0: done; 2: wrong input; 129, 130,
# 143: stopped; another one: of the crash after which it gave up. Linux only.

set -euo pipefail

launch=$(dirname "${BASH_SOURCE[0]}")
# shellcheck source=launch/common.sh
source "$launch/common.sh"
# shellcheck source=launch/supervise.sh
source "$launch/supervise.sh"

say() {
  echo "launch: $*" | tee -a "$logs/process-0.log"
}

# The command of process number I.
command_of() {
  command=()
  if [[ -n $devices ]]; then
    command+=(env JAX_PLATFORMS=cpu
      "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices")
  elif (( processes > 1 )); then
    command+=(env "JAX_LOCAL_DEVICE_IDS=$1")
  fi
  command+=("$python" -m videogpt_jax.main "${flags[@]}")
  if (( processes > 1 )); then
    command+=(--distributed "--coordinator=localhost:$port" "--num_processes=$processes"
      "--process_id=$1")
  fi
}

# A port where nobody listens. A new one for every start: the old one may linger.
free_port() {
  while :; do
    port=$(( 20000 + RANDOM % 12000 ))
    (exec 3<> "/dev/tcp/127.0.0.1/$port") 2>/dev/null || return 0
  done
}

start_all() {
  local i
  pids=()
  free_port
  before=$(stat -c %s "$logs/process-0.log")
  # Process 0 also writes to the terminal. What ends the terminal must not end the log.
  exec 8> >(trap '' HUP INT TERM; exec tee -a "$logs/process-0.log" 9>&-)
  tee_id=$!
  for (( i = 0; i < processes && ! stopping; ++i )); do
    command_of "$i"
    # In sessions of their own: Ctrl-C in the terminal reaches only this script, which passes it
    # on once. (They keep the lock, 9, for as long as they live.)
    if (( i == 0 )); then
      setsid "${command[@]}" < /dev/null >&8 2>&1 8>&- &
    else
      setsid "${command[@]}" < /dev/null >> "$logs/process-$i.log" 2>&1 8>&- &
    fi
    pids+=("$!")
  done
  exec 8>&-
  echo "$$ ${pids[*]}" > "$logs/pids"
}

ask_to_stop() {
  (( ! ${#pids[@]} )) || kill -TERM "${pids[@]}" 2>/dev/null || true
}

end_all() {  # with their data workers
  local pid
  for pid in ${pids[@]+"${pids[@]}"}; do
    kill -KILL -- "-$pid" 2>/dev/null || true
  done
  wait "$tee_id" 2>/dev/null || true
}

unfinished() {
  tail -c "+$(( before + 1 ))" "$logs/process-0.log" | grep -q '^stopped by a signal after step '
}

install() {
  local root candidate found='' venv=${VENV:-.venv}
  root=$(cd "$launch/.." && pwd)
  for candidate in python3.14 python3.13 python3.12 python3.11 python3; do
    if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
        2>/dev/null; then
      found=$candidate
      break
    fi
  done
  if [[ -n $found ]]; then
    run "$found" -m venv "$venv"
  else  # uv brings a Python of its own
    need python3
    run python3 -m pip install --user uv
    run python3 -m uv venv --seed --python=3.12 "$venv"
  fi
  run "$venv/bin/python" -m pip install -e "$root${extra:+[$extra]}"
}

start() {
  whole_number --processes "$processes" 1
  local refused=()
  (( processes == 1 )) || refused=(--distributed --coordinator --num_processes --process_id)
  trainer_flags "${refused[@]}" -- "$@"
  flags=("$@")
  logs=${logs:-$workdir/logs}
  [[ -z $devices ]] || whole_number --devices_per_process "$devices" 1
  whole_number --max_restarts "$max_restarts" 0
  whole_number --restart_delay "$restart_delay" 0
  whole_number --quick "$quick" 0
  find_python
  need setsid flock
  if (( dry_run )); then
    dry_start
    return
  fi
  mkdir -p "$logs"
  if (( detach )); then
    lock_is_free || fail "a run with its logs in $logs is going on; see \`status\`, \`stop\`"
    setsid nohup "${BASH_SOURCE[0]}" start "${own[@]}" "--logs=$logs" -- "${flags[@]}" \
      < /dev/null > "$logs/launcher.log" 2>&1 &
    while lock_is_free; do
      kill -0 "$!" 2>/dev/null || fail "it did not start; see $logs/launcher.log"
      sleep 0.2
    done
    echo "started; follow it with: $(quoted "${BASH_SOURCE[0]}" logs "--logs=$logs")"
    return
  fi
  exec 9> "$logs/lock"
  flock --nonblock 9 ||
    fail "a run with its logs in $logs is going on; see \`status\`, \`stop\`"
  trap 'on_stop 143' TERM
  trap 'on_stop 130' INT
  trap 'on_stop 129' HUP
  touch "$logs/process-0.log"
  echo running > "$logs/result"
  local status
  supervise && status=0 || status=$?
  case $status in
    0) echo "done" > "$logs/result" ;;
    129 | 130 | 143) echo stopped > "$logs/result" ;;
    *) echo "failed $status" > "$logs/result" ;;
  esac
  return "$status"
}

dry_start() {
  local i
  free_port
  quoted mkdir -p "$logs"
  echo
  for (( i = 0; i < processes; ++i )); do
    command_of "$i"
    echo "setsid $(quoted "${command[@]}") >> $(quoted "$logs/process-$i.log") 2>&1 &"
  done
}

lock_is_free() {
  [[ ! -e $logs/lock ]] || flock --nonblock "$logs/lock" true
}

known_logs() {
  logs=${logs:-${workdir:+$workdir/logs}}
  [[ -n $logs ]] || fail "no --workdir=DIR: of which run?"
  (( dry_run )) || [[ -d $logs ]] || fail "no run has written logs into $logs"
}

logs() {
  known_logs
  if (( dry_run )); then
    echo "tail -n 50 -F $(quoted "$logs")/process-*.log"
  else
    exec tail -n 50 -F "$logs"/process-*.log
  fi
}

# First line: running, done, stopped, failed STATUS, or vanished (killed, or the machine is gone).
status() {
  known_logs
  if (( dry_run )); then
    run cat "$logs/result"
    run tail -n 3 "$logs/process-0.log"
    return
  fi
  local word=never
  [[ ! -e $logs/result ]] || word=$(< "$logs/result")
  if lock_is_free; then
    [[ $word != running ]] || word=vanished
  else
    word=running
  fi
  echo "$word"
  tail -n 3 "$logs/process-0.log" 2>/dev/null || true
}

stop() {
  known_logs
  if (( dry_run )); then
    echo "kill -TERM \$(cut -d ' ' -f 1 $(quoted "$logs/pids"))"
    run flock "$logs/lock" true
    return
  fi
  if lock_is_free; then
    echo "nothing runs with its logs in $logs"
    return
  fi
  local ids
  read -r -a ids < "$logs/pids"
  # The first is this script; if somebody has killed it, its processes are told themselves.
  if tr '\0' ' ' < "/proc/${ids[0]}/cmdline" 2>/dev/null | grep -q local.sh; then
    kill -TERM "${ids[0]}"
  else
    kill -TERM "${ids[@]:1}" || true
  fi
  echo "waits until the run has saved and ended"
  flock "$logs/lock" true
}

if (( $# == 0 )); then
  usage >&2
  exit 2
fi
no_control_characters "$@"

subcommand=start extra='' processes=1 devices='' detach=0 logs='' workdir=''
own=()
while (( $# )); do
  case $1 in
    -h | --help) usage; exit 0 ;;
    install | start | logs | status | stop) subcommand=$1 ;;
    resume) subcommand=start ;;
    --extra=*) extra=${1#*=} ;;
    --processes=*) processes=${1#*=} own+=("$1") ;;
    --devices_per_process=*) devices=${1#*=} own+=("$1") ;;
    --max_restarts=*) max_restarts=${1#*=} own+=("$1") ;;
    --restart_delay=*) restart_delay=${1#*=} own+=("$1") ;;
    --quick=*) quick=${1#*=} own+=("$1") ;;
    --detach) detach=1 ;;
    --logs=*) logs=${1#*=} ;;
    --workdir=*) workdir=${1#*=} ;;
    --dry_run) dry_run=1 ;;
    --) shift; break ;;
    *) fail "unknown flag or subcommand '$1' (see --help); the trainer's flags come after --" ;;
  esac
  shift
done
[[ $subcommand == start || $# == 0 ]] || fail "$subcommand takes no flags of the trainer"

"$subcommand" "$@"
