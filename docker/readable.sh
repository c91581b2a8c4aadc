#!/bin/sh
# Makes the files that compose.yaml mounts readable for the users of the containers. After a clone with umask 077, only
# their owner can read them. Keys and archives are the operator's: for them, it says what to do.
# Usage: readable.sh [FILE|FOLDER...], which are mounted, too
set -eu
docker=$(dirname "$0")
tls=$docker/nginx/tls

fail() {
  echo "error: $*" >&2
  exit 1
}

# folders that cannot be opened, and files that cannot be read, by users other than the owner and its group
hidden() {
  find "$@" '(' -type d ! -perm -005 -o -type f ! -perm -004 ')' -print
}

find "$docker/nginx" "$docker/prometheus" "$docker/grafana" ! -path "$tls/*" \
  '(' -type d ! -perm -005 -o -type f ! -perm -004 ')' -exec chmod o+rX {} + ||
  fail "The containers cannot read files in docker/, and their modes cannot be changed. As their owner: chmod -R o+rX docker"

unreadable=$(find "$tls" -type f -name 'tls.*' ! -perm -004 ! -user 101 ! -group 101 -print)
[ -z "$unreadable" ] || fail "The proxy cannot read" $unreadable "as user 101. As root: chown 101" $unreadable

for path in "$@"; do
  unreadable=$(hidden "$path")
  [ -z "$unreadable" ] || fail "The container's user cannot read" $unreadable". Let it: chmod -R o+rX $path"
done
