#!/bin/sh
# Waits until the stack's TorchServe is healthy: every model with its workers READY. Usage: wait.sh COMPOSE-COMMAND...
set -eu
seconds=${WAIT_SECONDS:-600}
container=$("$@" ps -q torchserve)
[ -n "$container" ] || exit 0 # other services were started
restarts=$(docker inspect --format '{{.RestartCount}}' "$container")
start=$(date +%s)
while :; do
  passed=$(($(date +%s) - start))
  state=$(docker inspect --format '{{.State.Health.Status}} {{.RestartCount}}' "$container")
  case $state in
    "healthy "*) break ;;
    *" $restarts") ;;
    *) # its restart policy is at work
      "$@" logs --tail 60 torchserve >&2
      echo "error: TorchServe ended while it started: see above" >&2
      exit 1 ;;
  esac
  if [ "$passed" -gt "$seconds" ]; then
    "$@" logs --tail 60 torchserve >&2
    echo "error: after $seconds s the models are not READY: see above" >&2
    exit 1
  fi
  [ ! -t 1 ] || printf '\rwaiting for the models: %s s' "$passed"
  sleep 1
done
[ ! -t 1 ] || printf '\r'
echo "every model is READY after $passed s"
