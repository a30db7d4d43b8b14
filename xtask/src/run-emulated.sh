#!/bin/sh
# One rank of eight on the first GPU of this host, the other seven EMULATED: MoE layers of four models over three links,
# then DeepSeek-V2 whole. A short table comes last; figures are written to JSON files here. Needs a driver for CUDA 13 and
# NVRTC. Argument: layers, model or all (the default).
here=$(cd "$(dirname "$0")" && pwd)
. "$here/libraries.sh"
what=${1:-all}
if [ "$what" != model ]; then
    for model in deepseek-v2:2,6,8,4 deepseek-v3:3,10,13,6 qwen3-30b-a3b:2,5,6,3 mixtral-8x7b:; do
        name=${model%%:*}
        cut=${model#*:}
        set -- --contender serial --contender staged:1 --contender two-batch
        for stages in ${cut:+2 4 8 16 $cut}; do
            set -- "$@" --contender "staged:$stages"
        done
        "$here/epsmoe" bench layer --device cuda --model "preset:$name" --emulate-rank 0/8 --tokens 2048,8192 --num-iters 5 \
            --link 50GB/s --link 155GB/s --link 320GB/s "$@" --contender auto --draw 3 --seed 20 --driver-calls \
            --json "layer-$name.json" >"layer-$name.txt" ||
            exit 1
    done
fi
if [ "$what" != layers ]; then
    "$here/epsmoe" bench --device cuda --dtype bfloat16 --model preset:deepseek-v2 --emulate-rank 0/8 --link 155GB/s \
        --batch-size 64 --input-len 1024 --num-iters 4 --contender serial --contender staged:4 --contender auto --explain \
        --json model-deepseek-v2.json --report model-deepseek-v2.html >model-deepseek-v2.txt || exit 1
    cat model-deepseek-v2.txt
fi
[ "$what" = model ] || for file in layer-*.txt; do sed -n '/^Summary/,$p' "$file"; done
