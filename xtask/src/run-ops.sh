#!/bin/sh
# Runs the op suite on the first GPU of this host, then times products; a short table comes last.
# Needs a driver for CUDA 13 and NVRTC; where NVRTC is not on the library path, usual places are tried.
here=$(cd "$(dirname "$0")" && pwd)
for folder in /usr/local/cuda/lib64 /usr/local/cuda-*/lib64 /usr/local/cuda*/targets/*/lib; do
    if [ -e "$folder/libnvrtc.so.13" ] || [ -e "$folder/libnvrtc.so" ]; then
        export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder"
        break
    fi
done
log=$(mktemp)
# A missing GPU is a failure here, not a skipped test.
EPSMOE_TEST_ALL=1 RUST_BACKTRACE=0 "$here/op_suite" first_gpu --test-threads 4 >"$log" 2>&1
status=$?
grep -v '^test \|^$' "$log"
"$here/op_suite" speed --ignored --nocapture 2>&1 | grep -v '^test \|^running\|^$'
echo
grep '^test ' "$log" | sed 's/^test first_gpu:://'
rm -f "$log"
exit $status
