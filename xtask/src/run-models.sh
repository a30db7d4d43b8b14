#!/bin/sh
# Runs every fixture on the first GPU of this host; a short table comes last. Needs a driver for CUDA 13 and NVRTC.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/libraries.sh"
export EPSMOE_TEST_FIXTURES="$here/fixtures"
log=$(mktemp)
"$here/model_suite" gpu:: --test-threads 4 >"$log" 2>&1
status=$?
grep -v '^test \|^$' "$log"
echo
grep '^test ' "$log" | sed 's/^test gpu:://'
rm -f "$log"
exit $status
