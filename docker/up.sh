#!/bin/sh
# Starts the stack, or changes it to the images and settings of now. If there are several TorchServe containers, or are to
# be, those that are outdated are replaced one after the other: a new version that does not start costs one replica, also
# if this is repeated.
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
last=$port
if [ "$REPLICAS" -gt 1 ]; then # the engine gives each container a port of the range
  case $port in *[!0-9]*) fail "MANAGEMENT_PORT is '$port'. It must be the first of $REPLICAS ports." ;; esac
  last=$((port + REPLICAS - 1))
  export MANAGEMENT_PORT="$port-$last"
  if [ "${TS_DISABLE_TOKEN_AUTHORIZATION:-true}" != true ]; then
    fail "REPLICAS is $REPLICAS and tokens are on. Each TorchServe makes keys of its own, so no key would fit all replicas."
  fi
fi
export REPLICAS # compose.yaml: the scale

# containers: a line for each TorchServe container of the stack: 1 if it is healthy, otherwise 0; its management port, or 0;
# its id. Those that do not work come first, because whoever replaces them loses nothing, and then in the order of their
# ports, so that the lowest becomes free first.
containers() {
  docker ps --all --quiet --filter "label=com.docker.compose.project=$project" \
    --filter label=com.docker.compose.service=torchserve --filter label=com.docker.compose.oneoff=False |
    while read -r id; do # a container that was never started has no health and no ports
      docker inspect --format '{{with index .State "Health"}}{{if eq .Status "healthy"}}1{{else}}0{{end}}{{else}}0{{end}} {{with index .NetworkSettings.Ports "8081/tcp"}}{{(index . 0).HostPort}}{{else}}0{{end}} {{.Id}}' "$id"
    done | sort -n -k 1,1 -k 2,2
}

# is_current CONTAINER: has the image and the settings of now
is_current() {
  [ "$(docker inspect --format '{{index .Config.Labels "com.docker.compose.config-hash"}}' "$1")" = "$settings" ] || return 1
  image=$(docker inspect --format '{{.Config.Image}}' "$1")
  [ "$(docker inspect --format '{{.Image}}' "$1")" = "$(docker image inspect --format '{{.Id}}' "$image")" ]
}

# of OUTCOME: the lines of the containers that are current (0) or outdated (1)
of() {
  containers | while read -r line; do
    outcome=0
    is_current "${line##* }" || outcome=1
    [ "$outcome" != "$1" ] || echo "$line"
  done
}

ids() {
  sed 's/.* //'
}

# count [PATTERN]: the number of lines on standard input
count() {
  grep -c "${1:-.}" || true
}

# port_is_free: one of the management ports that the replicas are to have is free
port_is_free() {
  case $port in *[!0-9]*) return 0 ;; esac
  [ "$(containers | while read -r _ held _; do
    if [ "$held" -ge "$port" ] && [ "$held" -le "$last" ]; then echo "$held"; fi
  done | count)" -lt "$REPLICAS" ]
}

# ready: waits until the current containers are healthy
ready() {
  if ! CONTAINERS=$(of 0 | ids) sh "$here/wait.sh" >/dev/null; then
    echo "error: The new replica does not become ready; its log is above. $(of 1 | count '^1 ') with the images and settings" \
      "of before still serve. Correct the cause and repeat the same \`make up\`, which replaces this replica first." >&2
    exit 1
  fi
}

# settle: makes the current containers serve, before an outdated one is stopped. Some do not if `make up` failed before, or
# was interrupted.
settle() {
  current=$(of 0 | ids)
  [ -n "$current" ] || return 0
  for id in $current; do
    case $(docker inspect --format '{{if .State.Health}}{{.State.Health.Status}}{{end}} {{.RestartCount}}' "$id") in
      "healthy "* | "starting 0") ;;
      *) docker restart --time 180 "$id" >/dev/null ;;
    esac
  done
  ready
}

# add TOTAL COMPOSE-COMMAND...: creates TorchServe containers until there are TOTAL, and leaves those that exist
add() {
  total=$1
  shift
  before=$(of 0 | count)
  "$@" up --detach --no-deps --no-recreate --scale "torchserve=$total" torchserve
  if [ "$(of 0 | count)" -le "$before" ]; then
    fail "The new replica has another hash of its settings than '$* config --hash torchserve' prints, so it is unknown which" \
      "replicas are outdated. This release of compose cannot replace replicas: use another one, or make down and up."
  fi
  ready
}

# compose also starts what a service depends on
case " ${services:-torchserve} " in
  *" torchserve "* | *" proxy "* | *" page "*) ;;
  *)
    # shellcheck disable=SC2086 # several words
    "$@" up --detach $services
    exec sh "$here/wait.sh" "$@" ;;
esac
there=$(containers | count)
if [ "$there" -gt 1 ] || { [ "$there" -eq 1 ] && [ "$REPLICAS" -gt 1 ]; }; then
  settings=$("$@" config --hash torchserve)
  settings=${settings##* }
  [ -n "$settings" ] || fail "'$* config --hash torchserve' prints nothing."
  if [ "$(of 1 | count)" -gt 0 ]; then settle; fi
  if [ "$there" -lt "$REPLICAS" ]; then add "$REPLICAS" "$@"; fi
  for id in $(of 1 | ids); do
    echo "Replacing $(docker inspect --format '{{.Name}}' "$id" | cut -c 2-): it answers what it has accepted, and stops."
    docker stop --time 180 "$id" >/dev/null
    docker rm "$id" >/dev/null
    # with fewer replicas than before, the ports for the new ones may still be in use
    if [ "$(of 0 | count)" -lt "$REPLICAS" ] && port_is_free; then add "$(($(containers | count) + 1))" "$@"; fi
  done
fi
# shellcheck disable=SC2086 # several words
"$@" up --detach $services
exec sh "$here/wait.sh" "$@"
