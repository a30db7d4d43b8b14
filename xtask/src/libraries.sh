# To be read by the other scripts: finds NVRTC and NCCL in the usual places, after the library path.
for folder in /usr/local/cuda/lib64 /usr/local/cuda-*/lib64 /usr/local/cuda*/targets/*/lib; do
    if [ -e "$folder/libnvrtc.so.13" ] || [ -e "$folder/libnvrtc.so" ]; then
        export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$folder"
        break
    fi
done
# NCCL, where Python brings it and nobody else does.
case $(ldconfig -p 2>/dev/null) in
*libnccl.so*) ;;
*)
    nccl=$(python3 -c 'import nvidia.nccl; print(nvidia.nccl.__path__[0] + "/lib")' 2>/dev/null) || true
    [ -z "$nccl" ] || export LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$nccl"
    ;;
esac
# A missing GPU is a failure here, not a skipped test.
export EPSMOE_TEST_ALL=1 RUST_BACKTRACE=0
