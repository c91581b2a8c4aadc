#!/bin/sh
# Starts the stack, or changes it to the images and settings of now. If there are several TorchServe containers, or are to
# be, those that are outdated are replaced one after the other: a new version that does not start costs one replica.
# Usage: REPLICAS=N up.sh PROJECT SERVICES COMPOSE-COMMAND...   (SERVICES: "" for all)
set -eu
project=$1 services=$2
shift 2
here=$(dirname "$0")

fail() {
  echo "error: $*" >&2
  exit 2
}

case $REPLICAS in
  [1-9] | [1-9][0-9]) ;;
  *) fail "REPLICAS is '$REPLICAS'. It must be a whole number from 1 to 99." ;;
esac
port=${MANAGEMENT_PORT:-8081}
if [ "$REPLICAS" -gt 1 ]; then # the engine gives each container a port of the range
  case $port in *[!0-9]*) fail "MANAGEMENT_PORT is '$port'. It must be the first of $REPLICAS ports." ;; esac
  export MANAGEMENT_PORT="$port-$((port + REPLICAS - 1))"
  if [ "${TS_DISABLE_TOKEN_AUTHORIZATION:-true}" != true ]; then
    fail "REPLICAS is $REPLICAS and tokens are on. Each TorchServe makes keys of its own, so no key would fit all replicas."
  fi
fi
export REPLICAS

# containers: the ids of all TorchServe containers of the stack; those that do not work come first, because whoever
# replaces them loses nothing, and then in the order of their management ports, so that the lowest becomes free first
containers() {
  docker ps --all --quiet --filter "label=com.docker.compose.project=$project" \
    --filter label=com.docker.compose.service=torchserve --filter label=com.docker.compose.oneoff=False |
    while read -r id; do
      docker inspect --format '{{if eq .State.Health.Status "healthy"}}1{{else}}0{{end}} {{with index .NetworkSettings.Ports "8081/tcp"}}{{(index . 0).HostPort}}{{else}}0{{end}} {{.Id}}' "$id"
    done | sort -n -k 1,1 -k 2,2 | sed 's/.* //'
}

# is_current CONTAINER: has the image and the settings of now
is_current() {
  [ "$(docker inspect --format '{{index .Config.Labels "com.docker.compose.config-hash"}}' "$1")" = "$settings" ] || return 1
  image=$(docker inspect --format '{{.Config.Image}}' "$1")
  [ "$(docker inspect --format '{{.Image}}' "$1")" = "$(docker image inspect --format '{{.Id}}' "$image")" ]
}

# of OUTCOME: the containers that are current (0) or outdated (1)
of() {
  for id in $(containers); do
    outcome=0
    is_current "$id" || outcome=1
    [ "$outcome" != "$1" ] || echo "$id"
  done
}

count() {
  echo "$1" | grep -c . || true
}

# add TOTAL COMPOSE-COMMAND...: creates TorchServe containers until there are TOTAL, and leaves those that exist
add() {
  total=$1
  shift
  "$@" up --detach --no-deps --no-recreate --scale "torchserve=$total" torchserve
  if ! CONTAINERS=$(of 0) sh "$here/wait.sh" "$@" >/dev/null; then
    echo "error: The new replica does not become ready; its log is above. $(count "$(of 1)") with the images and settings" \
      "of before still serve. Correct the cause and repeat \`make up\`, which replaces this replica first." >&2
    exit 1
  fi
}

case " ${services:-torchserve} " in
  *" torchserve "*) ;;
  *)
    # shellcheck disable=SC2086 # several words
    "$@" up --detach $services
    exec sh "$here/wait.sh" "$@" ;;
esac
there=$(count "$(containers)")
if [ "$there" -gt 1 ] || { [ "$there" -eq 1 ] && [ "$REPLICAS" -gt 1 ]; }; then
  settings=$("$@" config --hash torchserve | sed 's/.* //')
  if [ "$there" -lt "$REPLICAS" ]; then add "$REPLICAS" "$@"; fi
  for id in $(of 1); do
    echo "Replacing $(docker inspect --format '{{.Name}}' "$id" | cut -c 2-): it answers what it has accepted, and stops."
    docker stop --time 180 "$id" >/dev/null
    docker rm "$id" >/dev/null
    if [ "$(count "$(of 0)")" -lt "$REPLICAS" ]; then add "$(($(count "$(containers)") + 1))" "$@"; fi
  done
fi
# shellcheck disable=SC2086 # several words
"$@" up --detach --scale "torchserve=$REPLICAS" $services
exec sh "$here/wait.sh" "$@"
