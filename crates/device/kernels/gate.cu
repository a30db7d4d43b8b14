// out[m, n] = gating(gate[m, n]) * x[m, n]
#include "common.cuh"

struct Args { Rows gate, x, out; u32 linear, padding; };

template <typename X, typename Y> __device__ void gate(const Args& args) {
    FOR_RUNS(args.out, m, n, count) {
        const Run gates = read(row<Y>(args.gate, m) + n, count);
        Run run = read(row<X>(args.x, m) + n, count);
#pragma unroll
        for (u32 j = 0; j < RUN; ++j)
            run.values[j] *= args.linear ? silu(gates.values[j]) : sigmoid(gates.values[j]);
        write(row<Y>(args.out, m) + n, run, count);
    }
}

KERNEL(gate, Args, f32, f32)
KERNEL(gate, Args, f32, bf16)
KERNEL(gate, Args, bf16, bf16)
