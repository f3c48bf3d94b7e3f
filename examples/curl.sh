#!/usr/bin/env bash
# A job with curl alone: submit it, lose the connection, come back, cancel another, and use files.
#
#   CLAUDE_JOBS_TOKEN=… examples/curl.sh [URL]
set -euo pipefail

url=${1:-${CLAUDE_JOBS_URL:-http://127.0.0.1:3000}}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The token goes in by a file: every user of the machine can read a command line.
(umask 077 && printf 'header = "Authorization: Bearer %s"\n' "${CLAUDE_JOBS_TOKEN:?}" >"$work/access")
api() { curl --silent --show-error --config "$work/access" "$@"; }

echo "== submit and follow; here the connection is cut after three seconds"
# --no-buffer: show each event as it comes. The header X-Job-Id names the job.
api --no-buffer --max-time 3 --dump-header "$work/headers" \
  --header 'Content-Type: application/json' \
  --data '{"prompt": "run sleep 5\nrun echo done", "workspace": "examples"}' \
  "$url/api/execute" | tee "$work/events" || true
job=$(tr -d '\r' <"$work/headers" | sed -n 's/^X-Job-Id: //Ip')

echo "== come back after the last event that came whole, until the end"
# An event is whole once the empty line behind it has come.
last=$(awk '/^id: / { id = $2 } /^$/ && id { whole = id } END { print whole + 0 }' "$work/events")
api --no-buffer --header "Last-Event-ID: $last" "$url/api/jobs/$job/events"

echo "== what is known about it"
api --fail-with-body "$url/api/jobs/$job"
echo

echo "== submit without waiting: the same key is the same job, so this can be sent again"
submit() {
  api --fail-with-body --retry 5 --retry-connrefused --header 'Prefer: respond-async' \
    --header "Idempotency-Key: $1" --header 'Content-Type: application/json' \
    --data '{"prompt": "work forever"}' "$url/api/execute" |
    sed -nE 's/^\{"id":"([^"]*)".*/\1/p'
}
key=example-$$-$RANDOM
other=$(submit "$key")
test "$other" = "$(submit "$key")"
echo "$other"

echo "== cancel it"
api --fail-with-body --request POST "$url/api/jobs/$other/cancel"
echo
api --no-buffer "$url/api/jobs/$other/events" | sed -n 's/^event: //p' | tail -n 1

echo "== upload a file, only if there is none yet; list, download, delete"
head -c 100000 /dev/urandom >"$work/data.bin"
api --fail-with-body --header 'If-None-Match: *' --upload-file "$work/data.bin" "$url/api/files/examples/data-$$.bin"
echo
api --fail-with-body "$url/api/files/examples?list"
echo
# --continue-at -: goes on where an earlier download broke.
head -c 40000 "$work/data.bin" >"$work/copy.bin"
api --fail --continue-at - --output "$work/copy.bin" "$url/api/files/examples/data-$$.bin"
cmp "$work/data.bin" "$work/copy.bin"
api --fail-with-body --request DELETE "$url/api/files/examples/data-$$.bin"
echo "== all done"
