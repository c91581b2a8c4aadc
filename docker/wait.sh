#!/bin/sh
# Waits until the stack's TorchServe is healthy (all workers of every model are READY), and its page, if there is one.
# Usage: wait.sh COMPOSE-COMMAND...
set -eu
seconds=${WAIT_SECONDS:-600}
start=$(date +%s)

# healthy SERVICE NAME COMPOSE-COMMAND...: waits until the service is healthy; false if it is not among those started
healthy() {
  service=$1 name=$2
  shift 2
  container=$("$@" ps -q "$service") || exit 1
  [ -n "$container" ] || return 1
  restarts=$(docker inspect --format '{{.RestartCount}}' "$container")
  while :; do
    passed=$(($(date +%s) - start))
    state=$(docker inspect --format '{{.State.Health.Status}} {{.RestartCount}}' "$container")
    case $state in
      "healthy "*) break ;;
      *" $restarts") ;;
      *) # the restart policy has restarted it
        "$@" logs --tail 60 "$service" >&2
        echo "error: $name exited during startup. Its last log lines are above." >&2
        exit 1 ;;
    esac
    if [ "$passed" -gt "$seconds" ]; then
      "$@" logs --tail 60 "$service" >&2
      echo "error: $name is not ready after $seconds s. Its last log lines are above." >&2
      exit 1
    fi
    [ ! -t 1 ] || printf '\rwaiting for %s: %s s' "$name" "$passed"
    sleep 1
  done
  [ ! -t 1 ] || printf '\r'
}

if healthy torchserve TorchServe "$@"; then echo "All models are READY after $passed s."; fi
[ -n "${PAGE_HOST:-}" ] || exit 0
case ${BIND:-} in '' | 0.0.0.0) address=127.0.0.1 ;; *) address=$BIND ;; esac
if healthy page "the page" "$@"; then echo "The page is at http://$address:${PORT:-8080}/page/"; fi
