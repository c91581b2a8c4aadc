#!/bin/sh
# Waits until the stack's TorchServe is healthy: all workers of every model are READY. Usage: wait.sh COMPOSE-COMMAND...
set -eu
seconds=${WAIT_SECONDS:-600}
container=$("$@" ps -q torchserve)
[ -n "$container" ] || exit 0 # TorchServe is not among the started services
restarts=$(docker inspect --format '{{.RestartCount}}' "$container")
start=$(date +%s)
while :; do
  passed=$(($(date +%s) - start))
  state=$(docker inspect --format '{{.State.Health.Status}} {{.RestartCount}}' "$container")
  case $state in
    "healthy "*) break ;;
    *" $restarts") ;;
    *) # the restart policy has restarted it
      "$@" logs --tail 60 torchserve >&2
      echo "error: TorchServe exited during startup. Its last log lines are above." >&2
      exit 1 ;;
  esac
  if [ "$passed" -gt "$seconds" ]; then
    "$@" logs --tail 60 torchserve >&2
    echo "error: The models are not READY after $seconds s. TorchServe's last log lines are above." >&2
    exit 1
  fi
  [ ! -t 1 ] || printf '\rwaiting for the models: %s s' "$passed"
  sleep 1
done
[ ! -t 1 ] || printf '\r'
echo "All models are READY after $passed s."
