#!/bin/sh
# Times whole models of random weights on the first GPU of this host, then products and experts in turns with PyTorch
# where there is one; a short table comes last. Needs a driver for CUDA 13, NVRTC and Python 3. Arguments go to
# peers.py; with `--models`, only the models are timed, and with `--peers` first, only the products.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/libraries.sh"
if [ "$1" != --peers ]; then
    for model in deepseek-v2-lite qwen3-30b-a3b olmoe-1b-7b; do
        "$here/epsmoe" bench --model preset:$model --device cuda --dtype bfloat16 --data-parallel-size 1 --link none \
            --schedule serial --batch-size 8 --input-len 1024 --output-len 1 --num-iters 5 --json $model.json || exit 1
    done
fi
case "$1" in
    --models) exit 0 ;;
    --peers) shift ;;
esac
exec python3 "$here/peers.py" "$here/op_suite" "$@"
