#!/bin/sh
# Ranks on the GPUs of this host: one each where there are several, else they share the first. `suites` runs the contract of
# fabrics, every fixture over two and four ranks, and ranks that are processes; `layers`, on several GPUs, the MoE layers of three models, schedules
# in turns, rows in bfloat16 and in FP8. A short table comes last. Needs a driver for CUDA 13 and NVRTC. Argument: suites,
# layers or all (the default).
here=$(cd "$(dirname "$0")" && pwd)
. "$here/libraries.sh"
what=${1:-all}
status=0
if [ "$what" != layers ]; then
    log=$(mktemp)
    "$here/fabric_suite" gpu --test-threads 4 >"$log" 2>&1 || status=$?
    "$here/device_units" of_a_gpu >>"$log" 2>&1 || status=$?
    EPSMOE_TEST_FIXTURES="$here/fixtures" "$here/model_suite" gpu:: --test-threads 4 \
        --skip bits_of_batches >>"$log" 2>&1 || status=$?
    grep -v '^test \|^$' "$log" | tail -20
    echo
    grep '^test \|^test result' "$log"
    rm -f "$log"
fi
gpus=$(nvidia-smi -L | wc -l)
# Ranks that are processes, over NCCL: the logits of a prompt are those of ranks that are threads, bit for bit.
if [ "$what" != layers ]; then
    if [ "$gpus" -gt 1 ]; then device=cuda; else device=cuda:0; fi
    for model in olmoe deepseek_v2 qwen3_moe; do
        for flags in "-dp 2 -ep" "-dp 2 -ep --schedule staged --stages 2" "-tp 2" "-tp 2 -ep" "-dp 2" "-dp 4 -ep"; do
            case "$flags" in *4*) [ "$gpus" = 1 ] || [ "$gpus" -gt 3 ] || continue ;; esac
            for ranks in thread process; do
                # shellcheck disable=SC2086
                timeout 120 "$here/epsmoe" logits --model "$here/fixtures/$model" --device $device --link none $flags \
                    --ids 5,6,7,8,9,10,11,12,13,14 --distributed-executor-backend $ranks --out "$ranks.safetensors" \
                    >"$ranks.log" 2>&1 || { status=1; tail -3 "$ranks.log"; }
            done
            if cmp -s thread.safetensors process.safetensors; then same=equal; else same=DIFFERENT status=1; fi
            echo "processes over NCCL, $model $flags: $same"
            rm -f thread.safetensors process.safetensors
        done
    done
fi
if [ "$what" != suites ] && [ "$gpus" -gt 1 ]; then
    for model in deepseek-v2 qwen3-30b-a3b mixtral-8x7b; do
        for sequences in 2 8; do
            for wire in bfloat16 fp8; do
                name="ranks-$model-$((sequences * 1024))-$wire"
                set -- --contender serial
                for stages in 1 2 4 8; do
                    [ "$model" = mixtral-8x7b ] && [ "$stages" -gt 2 ] || set -- "$@" --contender "staged:$stages"
                done
                "$here/epsmoe" bench --device cuda --dtype bfloat16 --model "preset:$model" -dp "$gpus" -ep --link none \
                    --hf-overrides '{"num_hidden_layers": 3}' --batch-size $((sequences * gpus)) --input-len 1024 \
                    --num-iters 9 --max-seconds 5 --wire-dtype "$wire" "$@" --contender two-batch --contender auto \
                    --json "$name.json" >"$name.txt" 2>&1 || status=$?
            done
        done
    done
    for file in ranks-*.txt; do echo "== $file"; grep '^|\|^ranks\|serial\|staged\|auto\|two' "$file"; done
fi
exit $status
