#!/bin/sh
# Ranks on the GPUs of this host: one each where there are several, else they share the first. Eight minutes at most; a short
# table comes last. Needs a driver for CUDA 13, NVRTC and, for processes, NCCL.
#
#   run-ranks.sh [RANKS [PART …]]     RANKS as many as GPUs by default; parts, all by default:
#
# suites      the contract of fabrics and every fixture over two and four ranks that are threads
# processes   the contract over NCCL, every fixture over two and four processes
# killed      processes over NCCL of which one is killed
# layers      MoE layers of three models: threads with copies from GPU to GPU, processes with NCCL, and one rank, the others
#             emulated over a link as fast as those copies; rows in bfloat16, and of the larger cells in FP8
# decode      steps of a token a sequence, four layers of two models, counted and gathered: ranks that are threads
# model       Qwen3-30B-A3B whole, prefill and decode, threads and processes
here=$(cd "$(dirname "$0")" && pwd)
. "$here/libraries.sh"
gpus=$(nvidia-smi -L | wc -l)
ranks=${1:-$gpus}
[ $# -gt 0 ] && shift
parts=${*:-suites processes killed layers decode model}
status=0
# NVLink's multicast is the fabric manager's to give.
export NCCL_NVLS_ENABLE=0 EPSMOE_TEST_FIXTURES="$here/fixtures"
epsmoe=$here/epsmoe

is_wanted() {
    case " $parts " in *" $1 "*) return 0 ;; *) return 1 ;; esac
}

# Runs tests, and shows how each ended, after what the last ones said.
tests() {
    log=$(mktemp)
    "$@" >"$log" 2>&1 || status=$?
    grep -v '^test \|^$\|over NCCL, .*: equal' "$log" | tail -20
    grep -c 'over NCCL, .*: equal' "$log" | sed 's/$/ models over NCCL, each equal to threads/'
    grep '^test \|^test result' "$log"
    cat "$log" >>tests.log
    rm -f "$log"
}

# A world of so many processes, those of odd rank on the second GPU if there is one. The last is killed while tokens come:
# rank 0 must name it, and all others must end, not with zero, within twice their deadline.
killed() {
    size=$1 timeout=5 pids='' log=killed-$1.log
    port=$((20000 + $$ % 20000 + size))
    for rank in $(seq $((size - 1)) -1 0); do
        if [ "$rank" = 0 ]; then
            set -- generate --model "$here/fixtures/mixtral" --device cuda:0 --link none -dp "$size" -ep --timeout $timeout \
                --prompt Hi --ignore-eos --max-tokens -1
        else
            set -- worker
        fi
        host=$(if [ "$size" -gt "$gpus" ]; then echo "rank-$rank"; fi)
        env CUDA_VISIBLE_DEVICES=$((rank % gpus)) ${host:+NCCL_HOSTID=$host} RANK="$rank" WORLD_SIZE="$size" \
            LOCAL_WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port EPSMOE_SECRET=of-this-script \
            "$epsmoe" "$@" >"killed-$rank.out" 2>"killed-$rank.err" &
        pids="$! $pids"
        [ -n "$last" ] || last=$!
    done
    for _ in $(seq 300); do
        [ -s killed-0.out ] && break
        sleep 0.1
    done
    sleep 0.1
    begun=$(date +%s%N)
    kill -KILL "$last"
    ends=''
    for pid in $pids; do
        wait "$pid"
        ends="$ends $?"
    done
    took=$((($(date +%s%N) - begun) / 1000000))
    cat killed-*.err >"$log"
    case "$ends " in *" 0 "*) verdict='A PROCESS ENDED WITH ZERO' ;; *) verdict=ok ;; esac
    [ "$took" -lt $((2000 * timeout)) ] || verdict='TOO LATE'
    grep -q "rank $((size - 1)) (process $last on " killed-0.err || verdict='RANK 0 DOES NOT NAME IT'
    [ "$verdict" = ok ] || status=1
    echo "killed, the last of $size processes over NCCL: $verdict; all ended in $took ms, with$ends; rank 0: $(tail -1 killed-0.err)"
    rm -f killed-*.out killed-*.err
    last=''
}

if is_wanted suites; then
    tests "$here/fabric_suite" gpu --test-threads 4
    tests "$here/device_units" of_a_gpu
    tests "$here/model_suite" gpu:: --test-threads 4 --skip bits_of_batches
fi
if is_wanted processes; then
    tests "$here/fabric_suite" ranks_over_nccl --test-threads 1
    tests "$here/model_suite" gpu_processes --test-threads 1
fi
if is_wanted killed; then
    last=''
    killed 2
    killed 4
fi
if is_wanted layers && [ "$gpus" -gt 1 ]; then
    "$here/fabric_suite" ranks_over_nccl::speed --ignored --nocapture | grep 'GB/s' | tee speed.txt
    rate=$(sed -n 's/^copies: .* \([0-9]*\) GB.*/\1/p' speed.txt)
    "$epsmoe" profile --device cuda -dp "$ranks" --max-seconds 15 --out profile.toml >profile.log 2>&1 || status=$?
    for model in deepseek-v2:3 qwen3-30b-a3b:2 mixtral-8x7b:2; do
        # One whole MoE layer, and the last, which does not count.
        layers=${model#*:} model=${model%:*}
        set -- --contender serial
        for stages in 2 4 8; do
            # No more than there are experts.
            [ "$model" = mixtral-8x7b ] && [ $((stages * ranks)) -gt 8 ] || set -- "$@" --contender "staged:$stages"
        done
        set -- "$@" --contender two-batch --contender auto
        for wire in bfloat16 fp8; do
            [ "$wire" = fp8 ] && sizes=8192 || sizes=2048,8192
            "$epsmoe" bench layer --device cuda --model "preset:$model" --emulate-rank "0/$ranks" --tokens $sizes \
                --num-iters 5 --link "${rate:-155}GB/s" --profile profile.toml --wire-dtype $wire "$@" \
                --json "emulated-$wire-$model.json" >"emulated-$wire-$model.txt" 2>&1 || status=$?
            for tokens in $(echo $sizes | tr , ' '); do
                for kind in thread process; do
                    name=real-$kind-$wire-$tokens-$model
                    "$epsmoe" bench --device cuda --dtype bfloat16 --model "preset:$model" -dp "$ranks" -ep --link none \
                        --hf-overrides "{\"num_hidden_layers\": $layers}" --batch-size $((tokens / 1024 * ranks)) \
                        --input-len 1024 --num-iters 7 --max-seconds 2 --wire-dtype "$wire" --profile profile.toml "$@" \
                        --distributed-executor-backend $kind --explain --json "$name.json" >"$name.txt" 2>&1 || status=$?
                done
            done
        done
    done
fi
if is_wanted decode; then
    device=$(if [ "$gpus" -lt "$ranks" ]; then echo cuda:0; else echo cuda; fi)
    for model in deepseek-v2-lite qwen3-30b-a3b; do
        for batch in 1 8 32; do
            for gather in 0 512; do
                name=decode-$model-$batch-$gather
                timeout 40 "$epsmoe" bench --device "$device" --dtype bfloat16 --model "preset:$model" -dp "$ranks" -ep \
                    --link none --hf-overrides '{"num_hidden_layers": 4}' --batch-size $((batch * ranks)) --input-len 128 \
                    --output-len 65 --num-iters 5 --max-seconds 3 --gather-tokens $gather --contender serial --contender auto \
                    --json "$name.json" >"$name.txt" 2>&1 || status=$?
            done
        done
    done
fi
if is_wanted model && [ "$gpus" -gt 1 ]; then
    for kind in process thread; do
        name=model-$kind-qwen3-30b-a3b
        "$epsmoe" bench --device cuda --dtype bfloat16 --model preset:qwen3-30b-a3b -dp "$ranks" -ep --link none \
            --batch-size $((8 * ranks)) --input-len 1024 --output-len 33 --num-iters 5 --max-seconds 10 \
            $(if [ -e profile.toml ]; then echo --profile profile.toml; fi) --contender serial --contender staged:2 \
            --contender auto --distributed-executor-backend $kind --json "$name.json" >"$name.txt" 2>&1 || status=$?
        cat "$name.txt"
    done
fi
python3 "$here/ranks.py"
exit $status
