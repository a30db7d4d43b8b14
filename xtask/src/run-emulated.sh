#!/bin/sh
# One rank of eight on the first GPU of this host, the other seven EMULATED. Needs a driver for CUDA 13 and NVRTC. Figures are
# written to JSON files here; a short table of those that are there comes last.
#
#   run-emulated.sh [PART …]     parts, all by default:
#
# profile   what work costs on this GPU: profile.toml, which the others predict with if it is here
# layers    MoE layers of four models over three links
# drawn     layers drawn at random by a seed: model, tokens, link and three schedules each, to hold predictions against
# share     DeepSeek-V2's layer with multiprocessors left to copies
# model     DeepSeek-V2 whole, with a page of one layer's lanes
# ablation  strategies, kernels and stages of four ranks that share the GPU, over a link as many times slower
here=$(cd "$(dirname "$0")" && pwd)
. "$here/libraries.sh"
parts=${*:-profile layers drawn share model ablation}
epsmoe=$here/epsmoe
status=0

is_wanted() {
    case " $parts " in *" $1 "*) return 0 ;; *) return 1 ;; esac
}

# Runs epsmoe for so many seconds at most; what it says goes to a file of that name.
within() {
    seconds=$1 name=$2
    shift 2
    timeout "$seconds" "$epsmoe" "$@" >"$name.txt" 2>"$name.err" || {
        code=$?
        status=1
        echo "$name ended with $code: $(tail -1 "$name.err")"
    }
}

profile() {
    if [ -e profile.toml ]; then echo --profile profile.toml; fi
}

layer() {
    seconds=$1 name=$2
    shift 2
    # shellcheck disable=SC2046
    within "$seconds" "$name" bench layer --device cuda --emulate-rank 0/8 $(profile) --json "$name.json" "$@"
}

if is_wanted profile; then
    within 60 profile profile --device cuda -dp 8 --max-seconds 20 --out profile.toml
fi
if is_wanted layers; then
    for model in deepseek-v2:2,6,8,4 qwen3-30b-a3b:2,5,6,3 mixtral-8x7b: deepseek-v3:3,10,13,6; do
        cut=${model#*:} model=${model%%:*}
        set -- --contender serial --contender staged:1 --contender two-batch
        for stages in ${cut:+2 4 8 16 $cut}; do
            set -- "$@" --contender "staged:$stages"
        done
        for tokens in 2048 8192; do
            layer 50 "layer-$model-$tokens" --model "preset:$model" --tokens "$tokens" --num-iters 5 --link 50GB/s \
                --link 155GB/s --link 320GB/s "$@" --contender auto
        done
    done
fi
if is_wanted drawn; then
    python3 "$here/emulated.py" draw 20 >drawn.txt
    while read -r cell model tokens rate; do
        layer 20 "drawn-$cell" --model "preset:$model" --tokens "$tokens" --num-iters 4 --link "${rate}GB/s" \
            --contender serial --contender auto --draw 3 --seed "$cell"
    done <drawn.txt
fi
if is_wanted share; then
    for reserved in 0 8 16; do
        layer 30 "share-$reserved" --model preset:deepseek-v2 --tokens 2048,8192 --num-iters 5 --link 155GB/s \
            --reserve $reserved --contender serial --contender staged:2 --contender staged:4 --contender staged:8
    done
fi
if is_wanted model; then
    # shellcheck disable=SC2046
    within 150 model-deepseek-v2 bench --device cuda --dtype bfloat16 --model preset:deepseek-v2 --emulate-rank 0/8 \
        --link 155GB/s --batch-size 64 --input-len 1024 --num-iters 4 $(profile) --contender serial --contender staged:2 \
        --contender staged:4 --contender auto --explain --json model-deepseek-v2.json --report model-deepseek-v2.html
fi
if is_wanted ablation; then
    for model in deepseek-v2 mixtral-8x7b; do
        # shellcheck disable=SC2046
        within 60 "ablation-$model" bench --ablation --device cuda:0 --dtype bfloat16 --model "preset:$model" -dp 4 -ep \
            --hf-overrides '{"num_hidden_layers": 3}' --link 40GB/s --batch-size 8 --input-len 1024 --num-iters 4 \
            --max-model-len 2048 --max-num-batched-tokens 2048 --max-seconds 12 --json "ablation-$model.json"
    done
fi
python3 "$here/emulated.py"
exit $status
