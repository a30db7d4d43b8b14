#!/bin/sh
# Schedules of the expert pipeline over ranks that share the first GPU of this host, over an emulated link: a table, a
# JSON file and a page with the lanes of one layer for each model. Needs a driver for CUDA 13 and NVRTC. Arguments: ranks
# and link, by default 4 and 40GB/s. Ranks that share a GPU compute so many times more slowly: a link that is as many times
# slower stands for theirs.
here=$(cd "$(dirname "$0")" && pwd)
. "$here/libraries.sh"
ranks=${1:-4}
link=${2:-40GB/s}
# Three layers: DeepSeek-V2's first is dense, and a last layer computes only the tokens whose logits are wanted.
for model in deepseek-v2 qwen3-30b-a3b; do
    name=overlap-$model-$ranks
    "$here/epsmoe" bench --model preset:$model --hf-overrides '{"num_hidden_layers": 3}' --device cuda:0 --dtype bfloat16 \
        --data-parallel-size "$ranks" --enable-expert-parallel --link "$link" --batch-size $((2 * ranks)) --input-len 1024 \
        --num-iters 10 --max-seconds 20 --contender serial --contender two-batch --contender staged:2 --contender staged:4 \
        --contender staged:8 --contender staged:16 --contender auto --json $name.json --report $name.html \
        --trace $name.trace.json || exit 1
done
