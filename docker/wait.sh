#!/bin/sh
# Waits until every TorchServe of the stack is healthy (all workers of every model are READY), and its page, if there is
# one.
# Usage: wait.sh COMPOSE-COMMAND...   ($CONTAINERS: wait only for these of TorchServe)
set -eu
seconds=${WAIT_SECONDS:-600}
start=$(date +%s)

# healthy NAME CONTAINERS: waits until the containers are healthy; false if there are none
healthy() {
  name=$1 containers=$2
  [ -n "$containers" ] || return 1
  for container in $containers; do
    restarts=$(docker inspect --format '{{.RestartCount}}' "$container")
    while :; do
      passed=$(($(date +%s) - start))
      # without a HEALTHCHECK, or if it was never started, a container has no health
      state=$(docker inspect --format '{{if .State.Health}}{{.State.Health.Status}}{{else}}{{.State.Status}}{{end}} {{.RestartCount}}' "$container")
      case $state in
        "healthy "*) break ;;
        "running "*)
          echo "error: The image of $name has no HEALTHCHECK, so nothing says when it is ready." >&2
          exit 1 ;;
        *" $restarts") ;;
        *) # the restart policy has restarted it
          docker logs --tail 60 "$container" >&2
          echo "error: $name exited during startup. Its last log lines are above." >&2
          exit 1 ;;
      esac
      if [ "$passed" -gt "$seconds" ]; then
        docker logs --tail 60 "$container" >&2
        echo "error: $name is not ready after $seconds s. Its last log lines are above." >&2
        exit 1
      fi
      [ ! -t 1 ] || printf '\rwaiting for %s: %s s' "$name" "$passed"
      sleep 1
    done
  done
  [ ! -t 1 ] || printf '\r'
}

servers=${CONTAINERS:-$("$@" ps -q torchserve)}
if healthy TorchServe "$servers"; then echo "All models are READY after $passed s."; fi
[ -z "${CONTAINERS:-}" ] && [ -n "${PAGE_HOST:-}" ] || exit 0
case ${BIND:-} in '' | 0.0.0.0) address=127.0.0.1 ;; *) address=$BIND ;; esac
page=$("$@" ps -q page)
if healthy "the page" "$page"; then echo "The page is at http://$address:${PORT:-8080}/page/"; fi
