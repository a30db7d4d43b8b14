#!/usr/bin/env bash
# Ready-made clients against `epsmoe serve`: starts a server of a tiny checkpoint, runs the Python and Node clients
# beside this file, types into its page in headless Chromium, fuzzes it by its own OpenAPI description, and ends it.
#
#   tests/clients/run.sh [python|node|browser|schema ...]      all four by default
#
# EPSMOE_BINARY names a program that is built already. Needs Python 3.11 with pip, and Node 20 with npm; Chromium is
# installed where apt-get can do that. Packages are pinned; they go to target/clients. What a registry does not give is
# skipped, and said so.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
work=$target/clients
parts=("$@")
[ ${#parts[@]} -gt 0 ] || parts=(python node browser schema)
mkdir -p "$work"

if [ -z "${EPSMOE_BINARY:-}" ]; then
    (cd "$root" && cargo build --release --quiet --bin epsmoe)
    export EPSMOE_BINARY=$target/release/epsmoe
fi
export EPSMOE_CHECKPOINT=$root/fixtures/olmoe
export EPSMOE_SCRATCH=$work
export EPSMOE_MODEL=tiny
export EPSMOE_API_KEY=key-of-the-client-tests
servers=()
trap 'for it in "${servers[@]}"; do kill $it 2>/dev/null; wait $it 2>/dev/null || true; done' EXIT

# Starts a server with these flags too, and waits until it answers; EPSMOE_BASE_URL is where.
serve() {
    local port
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    export EPSMOE_BASE_URL=http://127.0.0.1:$port
    "$EPSMOE_BINARY" serve "$EPSMOE_CHECKPOINT" --dtype float32 --port "$port" --served-model-name "$EPSMOE_MODEL" \
        --api-key "$EPSMOE_API_KEY" "$@" >>"$work/server.log" 2>&1 &
    servers+=($!)
    for _ in $(seq 150); do
        curl --silent --fail --output /dev/null "$EPSMOE_BASE_URL/health" && return
        kill -0 $! || { cat "$work/server.log"; exit 1; }
        sleep 0.2
    done
    echo "the server does not answer within 30 s"
    exit 1
}

skipped() {
    echo "SKIPPED: $1" >&2
}

# The installer of Python packages, the fast one. Without it there is no registry to be had, and the answer is no.
installer() {
    [ -x "$work/uv/bin/uv" ] && return
    python3 -m venv --clear "$work/uv"
    timeout 120 "$work/uv/bin/pip" install --quiet --disable-pip-version-check uv==0.13.9 || rm -rf "$work/uv"
    [ -x "$work/uv/bin/uv" ]
}

# A virtual environment of the packages in a file, made once.
environment() {
    local name=$1 requirements=$here/python/$2
    local stamp=$work/$name/$(sha256sum "$requirements" | cut -c1-16)
    [ -e "$stamp" ] && return
    "$work/uv/bin/uv" venv --quiet --clear --python python3 "$work/$name"
    timeout 600 "$work/uv/bin/uv" pip install --quiet --python "$work/$name/bin/python" --requirement "$requirements"
    touch "$stamp"
}

# The packages of Node, as they were locked.
node_packages() {
    timeout 60 npm view npm version >"$work/npm.log" 2>&1 || return 1
    mkdir -p "$work/node"
    cp "$here"/node/* "$work/node/"
    (cd "$work/node" && timeout 600 npm ci --silent --no-audit --no-fund)
}

run_python() {
    installer || { skipped "the Python clients, because their packages are not to be had from PyPI"; return; }
    environment python requirements.txt
    environment python-openai2 requirements-openai2.txt
    (cd "$here/python" && "$work/python/bin/pytest" -q -p no:cacheprovider -W ignore .)
    (cd "$here/python" && "$work/python-openai2/bin/pytest" -q -p no:cacheprovider -W ignore test_openai.py test_responses.py)
}

run_node() {
    node_packages || { skipped "the Node clients, because their packages are not to be had from npm"; return; }
    (cd "$work/node" && node --test clients.test.js)
}

run_browser() {
    node_packages || { skipped "the page in a browser, because its driver is not to be had from npm"; return; }
    if ! command -v chromium >/dev/null; then
        (apt-get update -qq && timeout 300 apt-get install -y -qq chromium) >"$work/apt.log" 2>&1 || true
    fi
    command -v chromium >/dev/null || { skipped "the page in a browser, because Chromium is not to be had from apt-get"; return; }
    (cd "$work/node" && node --test page.test.js)
}

run_schema() {
    installer || { skipped "schemathesis, because it is not to be had from PyPI"; return; }
    environment python requirements.txt
    # Who asks at random often forgets to say how many tokens are enough.
    local others=$EPSMOE_BASE_URL
    serve --max-model-len 512
    (cd "$work" && "$work/python/bin/schemathesis" run "$EPSMOE_BASE_URL/openapi.json" --no-color \
        --header "Authorization: Bearer $EPSMOE_API_KEY" --max-examples "${EPSMOE_SCHEMA_EXAMPLES:-25}" \
        --seed 1 --request-timeout 120)
    export EPSMOE_BASE_URL=$others
}

rm -f "$work/server.log"
serve
for part in "${parts[@]}"; do
    "run_$part"
done
for it in "${servers[@]}"; do
    kill -0 "$it" || { echo "a server ended on its own:"; tail -20 "$work/server.log"; exit 1; }
done
