#!/bin/sh
# Runs the contract of fabrics over ranks that share the first GPU of this host, and, where there are several GPUs, over
# ranks that have one each; a short table comes last. Needs a driver for CUDA 13 and NVRTC.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/libraries.sh"
log=$(mktemp)
"$here/fabric_suite" gpu --test-threads 4 >"$log" 2>&1
status=$?
"$here/device_units" of_a_gpu >>"$log" 2>&1 || status=$?
grep -v '^test \|^$' "$log"
echo
grep '^test ' "$log"
rm -f "$log"
exit $status
