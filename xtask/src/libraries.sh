# To be read by the other scripts: finds NVRTC in the usual places, after the library path.
for folder in /usr/local/cuda/lib64 /usr/local/cuda-*/lib64 /usr/local/cuda*/targets/*/lib; do
    if [ -e "$folder/libnvrtc.so.13" ] || [ -e "$folder/libnvrtc.so" ]; then
        export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder"
        break
    fi
done
# A missing GPU is a failure here, not a skipped test.
export EPSMOE_TEST_ALL=1 RUST_BACKTRACE=0
