#!/usr/bin/env bash
# Ready-made clients against `epsmoe serve`: starts a server of a tiny checkpoint, runs the Python and Node clients
# beside this file, fuzzes the server by its own OpenAPI description, and ends the server.
#
#   tests/clients/run.sh [python|node|schema ...]      all three by default
#
# Needs Python 3.11 with pip, and Node 20 with npm. Packages are pinned; they go to target/clients.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
work=$target/clients
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(python node schema)
mkdir -p "$work"

(cd "$root" && cargo build --release --quiet --bin epsmoe)
export EPSMOE_BINARY=$target/release/epsmoe
export EPSMOE_CHECKPOINT=$root/fixtures/qwen3_moe
export EPSMOE_SCRATCH=$work
export EPSMOE_MODEL=tiny
export EPSMOE_API_KEY=key-of-the-client-tests
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export EPSMOE_BASE_URL=http://127.0.0.1:$port
"$EPSMOE_BINARY" serve "$EPSMOE_CHECKPOINT" --dtype float32 --port "$port" --served-model-name "$EPSMOE_MODEL" \
    --api-key "$EPSMOE_API_KEY" >"$work/server.log" 2>&1 &
server=$!
trap 'kill $server 2>/dev/null; wait $server 2>/dev/null || true' EXIT
for _ in $(seq 150); do
    curl --silent --fail --output /dev/null "$EPSMOE_BASE_URL/health" && break
    kill -0 $server || { cat "$work/server.log"; exit 1; }
    sleep 0.2
done

# A virtual environment of the packages in a file, made once.
environment() {
    local name=$1 requirements=$here/python/$2
    local stamp=$work/$name/$(sha256sum "$requirements" | cut -c1-16)
    [ -e "$stamp" ] && return
    python3 -m venv --clear "$work/$name"
    timeout 900 "$work/$name/bin/pip" install --quiet --disable-pip-version-check --requirement "$requirements"
    touch "$stamp"
}

run_python() {
    environment python requirements.txt
    environment python-openai2 requirements-openai2.txt
    (cd "$here/python" && "$work/python/bin/pytest" -q -p no:cacheprovider -W ignore .)
    (cd "$here/python" && "$work/python-openai2/bin/pytest" -q -p no:cacheprovider -W ignore test_openai.py)
}

run_node() {
    mkdir -p "$work/node"
    cp "$here"/node/* "$work/node/"
    (cd "$work/node" && timeout 600 npm ci --silent --no-audit --no-fund && node --test)
}

run_schema() {
    environment python requirements.txt
    (cd "$work" && "$work/python/bin/schemathesis" run "$EPSMOE_BASE_URL/openapi.json" --no-color \
        --header "Authorization: Bearer $EPSMOE_API_KEY" --max-examples "${EPSMOE_SCHEMA_EXAMPLES:-25}" \
        --seed 1 --request-timeout 60)
}

for part in "${parts[@]}"; do
    "run_$part"
done
kill -0 $server || { echo "the server ended on its own:"; tail -20 "$work/server.log"; exit 1; }
