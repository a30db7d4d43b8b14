#!/bin/sh
# Runs every fixture on the first GPU of this host, then a server of each: what a request is answered must not depend on
# what else is served. A short table comes last. Needs a driver for CUDA 13 and NVRTC.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/libraries.sh"
export EPSMOE_TEST_FIXTURES="$here/fixtures"
log=$(mktemp)
"$here/model_suite" gpu:: --test-threads 4 >"$log" 2>&1
models=$?
"$here/server_suite" company::gpu:: --test-threads 2 >>"$log" 2>&1
servers=$?
grep -v '^test \|^$' "$log"
echo
grep '^test ' "$log" | sed 's/^test gpu::/models /; s/^test company::gpu::/server /'
rm -f "$log"
[ $models -eq 0 ] && [ $servers -eq 0 ]
