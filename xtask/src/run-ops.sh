#!/bin/sh
# Runs the op suite on the first GPU of this host, then times products and attention; a short table comes last.
# Needs a driver for CUDA 13 and NVRTC.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/libraries.sh"
log=$(mktemp)
"$here/op_suite" first_gpu --test-threads 4 >"$log" 2>&1
status=$?
grep -v '^test \|^$' "$log"
"$here/op_suite" speed --ignored --nocapture --test-threads 1 2>&1 | grep -v '^test \|^running\|^$'
echo
grep '^test ' "$log" | sed 's/^test first_gpu:://'
rm -f "$log"
exit $status
