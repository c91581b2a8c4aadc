#!/bin/sh
# Renders nginx.conf out of the environment into /tmp, checks it, and becomes nginx. It is here instead of the image's
# own entrypoint, so that any image with nginx will do, as any user, on a read-only file system.
#
#   TORCHSERVE_HOST   torchserve  host name or IPv4 address of the server
#   TORCHSERVE_PORT   8080        its inference API
#   SUPERVISOR_PORT   8083        its supervisor, which knows whether it is ready
#   UPSTREAM_TIMEOUT  25          seconds for an answer, its wait in a queue included: after them it is 504
#   MAX_BODY          16m         the largest body; TorchServe has a limit of its own, max_request_size
#   PROXY_RATE        200r/s      predictions of one client
#   BURST             400         how far a client may be ahead of that rate
#   CONNECTIONS       256         predictions of one client at the same time
#   LARGE_BODIES      16          predictions of all clients at the same time whose body is more than a megabyte,
#   LARGE_BODIES_OF_CLIENT  4     and of one client
#   TRUSTED_PROXIES               networks of load balancers in front, whose X-Forwarded-For is believed
#   LISTEN            8080        port, or address:port
#   LISTEN_TLS        8443        the same for TLS, which is on when there are a certificate and its key
#   TLS_PORT          8443        where clients reach it: plain HTTP is redirected there,
#   ALLOW_PLAIN       false       unless this is true
set -eu

crt=/etc/bundle/tls/tls.crt
key=/etc/bundle/tls/tls.key
run=/tmp/nginx
replacements=

fail() {
  echo "error: $*" >&2
  exit 1
}

# setting NAME VALUE PATTERN MEANING: VALUE is what @NAME@ in nginx.conf stands for
setting() {
  if printf '%s\n' "$2" | grep -Evqx -e "$3"; then
    fail "$1 is '$2', and must be $4."
  fi
  replacements="${replacements}s|@$1@|$2|g;"
}

number='[1-9][0-9]{0,8}'
port='[1-9][0-9]{0,4}'
network='[0-9a-fA-F.:]+(/[0-9]+)?'
setting TORCHSERVE_HOST "${TORCHSERVE_HOST:=torchserve}" '[A-Za-z0-9_.-]+' "a host name or an IPv4 address"
setting TORCHSERVE_PORT "${TORCHSERVE_PORT:=8080}" "$port" "a port"
setting SUPERVISOR_PORT "${SUPERVISOR_PORT:=8083}" "$port" "a port"
setting UPSTREAM_TIMEOUT "${UPSTREAM_TIMEOUT:-25}" "$number" "a whole number of seconds"
setting MAX_BODY "${MAX_BODY:-16m}" "${number}[kKmM]?" "a size like 16m, and not 0"
setting PROXY_RATE "${PROXY_RATE:-200r/s}" "${number}r/[sm]" "a rate like 200r/s or 30r/m"
setting BURST "${BURST:-400}" "$number" "a whole number of at least 1"
setting CONNECTIONS "${CONNECTIONS:-256}" '[1-9][0-9]{0,3}' "a whole number from 1 to 9999"
setting LARGE_BODIES "${LARGE_BODIES:-16}" '[1-9][0-9]{0,3}' "a whole number from 1 to 9999"
setting LARGE_BODIES_OF_CLIENT "${LARGE_BODIES_OF_CLIENT:-4}" '[1-9][0-9]{0,3}' "a whole number from 1 to 9999"
setting LISTEN "${LISTEN:-8080}" "([0-9.]+:)?$port" "a port, or address:port"
setting LISTEN_TLS "${LISTEN_TLS:-8443}" "([0-9.]+:)?$port" "a port, or address:port"
setting TLS_PORT "${TLS_PORT:-8443}" "$port" "a port"
setting ALLOW_PLAIN "${ALLOW_PLAIN:=false}" 'true|false' "true or false"
trusted=
for proxy in ${TRUSTED_PROXIES:-}; do
  setting TRUSTED_PROXIES "$proxy" "$network" "networks like 10.0.0.0/8, with blanks between them"
  trusted="${trusted}set_real_ip_from $proxy; "
done

if [ -e "$crt" ] && [ -e "$key" ]; then
  for file in "$crt" "$key"; do
    [ -r "$file" ] || fail "$file cannot be read by user $(id -u), who runs this: chown or chmod it."
  done
  drop=plain
  if [ "$ALLOW_PLAIN" = true ]; then drop=redirect; fi
elif [ -e "$crt" ] || [ -e "$key" ]; then
  fail "TLS takes both $crt and $key, and there is only one of them."
else
  drop='tls|redirect'
fi

mkdir -p "$run"
sed -E -e "s|@TRUSTED_PROXIES@|$trusted|" -e "$replacements" -e "/# if ($drop)\$/,/# end\$/d" \
  /etc/bundle/nginx.conf >"$run/nginx.conf"

# The server's addresses, a line each: none while it does not run, several when it is scaled
addresses() {
  case $TORCHSERVE_HOST in
    *[!0-9.]*) getent hosts "$TORCHSERVE_HOST" | sed -e 's/[[:space:]].*//' -e '/:/s/.*/[&]/' | sort -u ;;
    *) echo "$TORCHSERVE_HOST" ;;
  esac
}

# upstream FILE PORT: writes the upstream's servers. One slow model must not take a server out of rotation: max_fails.
# Each twice, because nginx sends a request to another server again, never to the same one.
upstream() {
  if [ -n "$known" ]; then
    echo "$known" | sed "s|.*|server &:$2 max_fails=0; server &:$2 max_fails=0;|" >"$run/$1.servers"
  else
    echo "server 127.0.0.1:$2 down;" >"$run/$1.servers"
  fi
}

upstreams() {
  upstream inference "$TORCHSERVE_PORT"
  upstream supervisor "$SUPERVISOR_PORT"
}

certificate() {
  cat "$crt" "$key" 2>/dev/null | cksum
}

# A server that was made anew has another address, and a certificate is renewed every few weeks: nginx reads both again
# and finishes what is in flight; idle connections it closes. Without an address the last one is kept.
follow() {
  while sleep 2 && kill -0 "$$" 2>/dev/null; do
    found=$(addresses)
    renewed=$(certificate)
    if [ "${found:-$known}" = "$known" ] && [ "$renewed" = "$current" ]; then continue; fi
    known=${found:-$known} current=$renewed
    upstreams
    if [ -s "$run/nginx.pid" ]; then kill -HUP "$$"; fi
  done
}

known=$(addresses)
current=$(certificate)
upstreams
nginx -t -q -e /dev/stderr -c "$run/nginx.conf"
follow &
exec nginx -e /dev/stderr -c "$run/nginx.conf" -g 'daemon off;'
