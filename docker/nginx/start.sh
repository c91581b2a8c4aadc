#!/bin/sh
# Renders nginx.conf from the environment into /tmp, checks it, and starts nginx. It replaces the image's entrypoint, so
# that any image with nginx works, as any user, on a read-only file system.
#
#   TORCHSERVE_HOST   torchserve  host name or IPv4 address of the server
#   TORCHSERVE_PORT   8080        port of the inference API
#   SUPERVISOR_PORT   8083        port of the supervisor, which reports readiness
#   UPSTREAM_TIMEOUT  25          seconds until an unanswered request gets 504; time in the queue counts
#   MAX_BODY          16m         size limit of a body; compose.yaml sets TorchServe's max_request_size to the same
#   PROXY_RATE        200r/s      rate limit of one client's predictions
#   BURST             400         requests that one client may send above that rate
#   CONNECTIONS       256         concurrent predictions of one client
#   LARGE_BODIES      16          concurrent predictions of all clients with a body over 1 MB, or a compressed one
#   LARGE_BODIES_OF_CLIENT  4     the same for one client
#   TRUSTED_PROXIES               networks of load balancers in front, whose X-Forwarded-For is trusted
#   CORS_ORIGINS                  origins whose pages may send requests and read answers; * for all
#   INVOCATIONS_MODEL             the model of requests to /invocations that name no model
#   LISTEN            8080        port, or address:port
#   LISTEN_TLS        8443        the same for TLS, which is on if a certificate and its key are mounted
#   TLS_PORT          8443        the TLS port that clients use; plain HTTP is redirected to it
#   ALLOW_PLAIN       false       true: serve plain HTTP as well, instead of redirecting it
#   PAGE_HOST                     host name or IPv4 address of the page; without it, no page is published
#   PAGE_PORT         7860        port of the page
#   TRACE_ENDPOINT                where TorchServe sends traces (docs/tracing.md); without it, no request is traced
#   TRACE_RATIO       0.1         the part of the requests that is traced, from 0 to 1
#   TRACE_CLIENTS     true        a client's traceparent decides whether its request is traced; false: the ratio does
#   LISTEN_INSIDE     8079        port, or address:port, where the page asks the models: without TLS, inside the stack
set -eu

crt=/etc/bundle/tls/tls.crt
key=/etc/bundle/tls/tls.key
run=/tmp/nginx
gate=/run/gate # files of the servers: bundle/supervisor/gate.py
stale=5 # seconds after which a server without a beat counts as hung
replacements=

fail() {
  echo "error: $*" >&2
  exit 1
}

# setting NAME VALUE PATTERN EXPECTED: replaces @NAME@ in nginx.conf by VALUE, which must match PATTERN
setting() {
  if printf '%s\n' "$2" | grep -Evqx -e "$3"; then
    fail "$1 is '$2'. It must be $4."
  fi
  replacements="${replacements}s|@$1@|$2|g;"
}

number='[1-9][0-9]{0,8}'
port='[1-9][0-9]{0,4}'
network='[0-9a-fA-F.:]+(/[0-9]+)?'
origin_pattern='https?://([A-Za-z0-9._-]+|\[[0-9a-fA-F:.]+\])(:[0-9]+)?'
setting TORCHSERVE_HOST "${TORCHSERVE_HOST:=torchserve}" '[A-Za-z0-9_.-]+' "a host name or an IPv4 address"
setting TORCHSERVE_PORT "${TORCHSERVE_PORT:=8080}" "$port" "a port"
setting SUPERVISOR_PORT "${SUPERVISOR_PORT:=8083}" "$port" "a port"
setting UPSTREAM_TIMEOUT "${UPSTREAM_TIMEOUT:=25}" "$number" "a whole number of seconds"
setting MAX_BODY "${MAX_BODY:-16m}" "${number}[kKmM]?" "a size like 16m, greater than 0"
setting PROXY_RATE "${PROXY_RATE:-200r/s}" "${number}r/[sm]" "a rate like 200r/s or 30r/m"
setting BURST "${BURST:-400}" "$number" "a whole number greater than 0"
setting CONNECTIONS "${CONNECTIONS:-256}" '[1-9][0-9]{0,3}' "a whole number from 1 to 9999"
setting LARGE_BODIES "${LARGE_BODIES:-16}" '[1-9][0-9]{0,3}' "a whole number from 1 to 9999"
setting LARGE_BODIES_OF_CLIENT "${LARGE_BODIES_OF_CLIENT:-4}" '[1-9][0-9]{0,3}' "a whole number from 1 to 9999"
setting INVOCATIONS_MODEL "${INVOCATIONS_MODEL:-}" '[A-Za-z0-9._-]*' "the name of a model"
setting LISTEN "${LISTEN:-8080}" "([0-9.]+:)?$port" "a port, or address:port"
setting LISTEN_TLS "${LISTEN_TLS:-8443}" "([0-9.]+:)?$port" "a port, or address:port"
setting TLS_PORT "${TLS_PORT:-8443}" "$port" "a port"
setting ALLOW_PLAIN "${ALLOW_PLAIN:=false}" 'true|false' "true or false"
setting PAGE_HOST "${PAGE_HOST:=}" '[A-Za-z0-9_.-]*' "a host name or an IPv4 address"
setting PAGE_PORT "${PAGE_PORT:=7860}" "$port" "a port"
setting LISTEN_INSIDE "${LISTEN_INSIDE:-8079}" "([0-9.]+:)?$port" "a port, or address:port"
setting TRACE_RATIO "${TRACE_RATIO:=0.1}" '0(\.[0-9]{1,4})?|1(\.0{1,4})?' "a number from 0 to 1 with at most four decimal places"
setting TRACE_CLIENTS "${TRACE_CLIENTS:-true}" 'true|false' "true or false"
replacements="${replacements}s|@SHUTDOWN_TIMEOUT@|$((UPSTREAM_TIMEOUT + 10))|;"
trusted=
for proxy in ${TRUSTED_PROXIES:-}; do
  setting TRUSTED_PROXIES "$proxy" "$network" "a list of networks like 10.0.0.0/8, separated by spaces"
  trusted="${trusted}set_real_ip_from $proxy; "
done
any_origin='' origins='' vary=''
set -f # a star is no pattern for file names
for origin in ${CORS_ORIGINS:-}; do
  if [ "$origin" = '*' ]; then
    any_origin='*'
  else
    setting CORS_ORIGINS "$origin" "$origin_pattern" "a list of origins like https://app.example.com, or *"
    origins="$origins\"$origin\" \$http_origin; " vary=Origin
  fi
done
set +f
if [ "$any_origin" ]; then origins='' vary=''; fi
replacements="${replacements}s|@ANY_ORIGIN@|$any_origin|;s|@ORIGINS@|$origins|;s|@VARY@|$vary|;"

# 0.125 is 12.50 %; nginx takes no 0 %
drawn=
case $TRACE_RATIO in
  1*) drawn='100% 01;' ;;
  0.*[1-9]*)
    digits=$(printf '%s000' "${TRACE_RATIO#0.}" | cut -c 1-4)
    drawn="$(echo "$digits" | sed -E 's/^(..)(..)$/\1.\2/;s/^0([0-9])/\1/')% 01;" ;;
esac
exposed=
if [ "${TRACE_ENDPOINT:=}" ]; then exposed=', traceresponse'; fi
replacements="${replacements}s|@TRACE_DRAWN@|$drawn|;s|@TRACE_EXPOSED@|$exposed|;"

if [ -e "$crt" ] && [ -e "$key" ]; then
  for file in "$crt" "$key"; do
    [ -r "$file" ] || fail "$file cannot be read by user $(id -u), which runs nginx. Change its owner or mode."
  done
  drop=plain
  if [ "$ALLOW_PLAIN" = true ]; then drop=redirect; fi
elif [ -e "$crt" ] || [ -e "$key" ]; then
  fail "TLS needs both $crt and $key. One of them is missing."
else
  drop='tls|redirect'
fi
if [ -z "$PAGE_HOST" ]; then drop="$drop|page"; fi
if [ -z "$TRACE_ENDPOINT" ]; then drop="$drop|trace"; fi

mkdir -p "$run"
rm -f "$run/small.sock" # nginx leaves it behind when it is killed
sed -E -e "s|@TRUSTED_PROXIES@|$trusted|" -e "$replacements" -e "/# if ($drop)\$/,/# end\$/d" \
  /etc/bundle/nginx.conf >"$run/nginx.conf"

# addresses HOST: the addresses of a server, one per line: none while it is down, several when it is scaled. Of these,
# `getent hosts` shows one in Alpine's images, and may leave out those of IPv4 where there are others.
addresses() {
  case $1 in
    *[!0-9.]*) { getent ahostsv4 "$1" || getent ahosts "$1"; } | sed -e 's/[[:space:]].*//' -e '/:/s/.*/[&]/' | sort -u ;;
    *) echo "$1" ;;
  esac
}

# open: of the addresses on standard input, those of servers that neither start nor drain
open() {
  while read -r address; do
    [ -e "$gate/closed-$address" ] || echo "$address"
  done
}

# alive: of the addresses on standard input, those of servers that have answered their supervisors lately
alive() {
  while read -r address; do
    if beat=$(stat -c %Y "$gate/alive-$address" 2>/dev/null) && [ $(($(date +%s) - beat)) -le "$stale" ]; then
      echo "$address"
    fi
  done
}

# serving ADDRESSES: those to which requests are sent. If none is alive, all that are open: one server alone is never left
# out because it is slow.
serving() {
  open=$(echo "$1" | open)
  alive=$(echo "$open" | alive)
  echo "${alive:-$open}"
}

# upstream FILE PORT ADDRESSES: writes the upstream's servers. max_fails=0, because one slow model must not take a server
# out of rotation.
upstream() {
  if [ -n "$3" ]; then
    echo "$3" | sed "s|.*|server &:$2 max_fails=0;|" >"$run/$1.servers"
  else
    echo "server 127.0.0.1:$2 down;" >"$run/$1.servers"
  fi
}

upstreams() {
  upstream inference "$TORCHSERVE_PORT" "$used"
  upstream supervisor "$SUPERVISOR_PORT" "$used"
  upstream page "$PAGE_PORT" "$known_page"
}

certificate() {
  cat "$crt" "$key" 2>/dev/null | cksum
}

# Reload nginx when a server comes, goes, starts, drains, hangs or answers again, or when the certificate is renewed. A
# reload finishes requests in flight and closes idle connections. While a name does not resolve, its last addresses are
# kept.
follow() {
  while sleep 1 && kill -0 "$$" 2>/dev/null; do
    found=$(addresses "$TORCHSERVE_HOST")
    found_page=$(addresses "$PAGE_HOST")
    known=${found:-$known}
    now=$(serving "$known")
    renewed=$(certificate)
    if [ "$now ${found_page:-$known_page} $renewed" = "$used $known_page $current" ]; then continue; fi
    used=$now known_page=${found_page:-$known_page} current=$renewed
    upstreams
    if [ -s "$run/nginx.pid" ]; then kill -HUP "$$"; fi
  done
}

known=$(addresses "$TORCHSERVE_HOST")
known_page=$(addresses "$PAGE_HOST")
used=$(serving "$known")
current=$(certificate)
upstreams
nginx -t -q -e /dev/stderr -c "$run/nginx.conf"
follow &
exec nginx -e /dev/stderr -c "$run/nginx.conf" -g 'daemon off;'
