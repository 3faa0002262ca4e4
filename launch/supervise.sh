# Keeps a training run going: starts it again after a crash, until it is done. Sourced.
# shellcheck shell=bash
#
# The script that sources this defines
#
#   start_all      starts the run's processes in the background, their ids in `pids`
#   ask_to_stop    asks them, once, to save and end
#   end_all        ends what is left of them
#   unfinished     whether processes that ended well have stopped before the last step
#   say            tells the user and the log

max_restarts=5  # after so many crashes in quick succession it gives up
restart_delay=10  # seconds before the first restart; doubles with every further one
quick=600  # a run that lasted so many seconds starts a new count of crashes
readonly MAX_DELAY=300
readonly PATIENCE=30  # seconds that the others have to end after one process has failed
readonly USER_ERROR=2 STORAGE_ERROR=74  # as in videogpt_jax/cli.py

pids=()
stopping=0
stop_status=143  # of a run that was stopped by the signal TERM, as shells have it

on_stop() {  # status that the script ends with
  (( ! stopping )) || return 0
  stopping=1 stop_status=$1
  say "asks the run to save and stop"
  ask_to_stop
}

nap() {  # seconds; bash acts on a signal in `wait`, not in `sleep`
  sleep "$1" 9>&- &
  wait "$!" || true
}

backoff() {  # number of the restart; seconds to wait before it
  local delay=$(( restart_delay * 2 ** ($1 > 10 ? 9 : $1 - 1) ))
  echo "$(( delay <= MAX_DELAY ? delay : MAX_DELAY ))"
}

pause() {  # seconds, cut short when the run is to stop
  local left=$1
  for (( ; left > 0 && ! stopping; --left )); do
    nap 1
  done
  (( ! stopping )) || say "stopped"
}

# Waits for all processes. Returns the status of the first one that failed, or 0.
wait_all() {
  local left=("${pids[@]}") running pid status first=0 failed_at=0
  while :; do
    running=()
    for pid in "${left[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        running+=("$pid")
        continue
      fi
      wait "$pid" && status=0 || status=$?
      if (( status && ! first )); then
        first=$status failed_at=$SECONDS
      fi
    done
    (( ${#running[@]} )) || return "$first"
    # The others wait for the failed one, and may do so for ever.
    if (( first && SECONDS - failed_at >= PATIENCE )); then
      say "a process ended with status ${first}; ends the others"
      end_all
    fi
    left=("${running[@]}")
    nap 0.5
  done
}

# Returns 0: done; 2: the user's error; `stop_status`: stopped; else the status of the crash.
# Storage that fails delays a run and never ends it, unless max_restarts is 0: then somebody else
# starts it again.
supervise() {
  local crashes=0 outages=0 begun status delay
  while :; do
    begun=$SECONDS
    start_all
    wait_all && status=0 || status=$?
    end_all
    if (( stopping )); then
      (( ! status )) || say "warning: the run ended with status ${status} while it stopped"
      say "stopped; the same command goes on from the last checkpoint"
      return "$stop_status"
    fi
    if (( status == 0 )); then
      if unfinished; then
        say "the run was stopped from elsewhere; the same command goes on"
        return "$stop_status"
      fi
      say "done"
      return 0
    fi
    if (( status == USER_ERROR )); then
      say "the run refused its input (status 2, the reason is above); no use to start it again"
      return "$status"
    fi
    (( SECONDS - begun < quick )) || crashes=0 outages=0
    if (( status == STORAGE_ERROR && max_restarts )); then
      (( ++outages ))
      delay=$(backoff "$outages")
      say "storage refused the run (status ${status}, the reason is above) after" \
        "$(( SECONDS - begun )) s; starts it again in ${delay} s"
      pause "$delay"
      (( ! stopping )) || return "$stop_status"
      continue
    fi
    (( ++crashes ))
    if (( crashes > max_restarts )); then
      say "crashed with status ${status} after $(( SECONDS - begun )) s, crash ${crashes} in a" \
        "row; gives up"
      return "$status"
    fi
    outages=0
    delay=$(backoff "$crashes")
    say "crashed with status ${status} after $(( SECONDS - begun )) s; restart ${crashes} of at" \
      "most ${max_restarts} in ${delay} s"
    pause "$delay"
    (( ! stopping )) || return "$stop_status"
  done
}
