// x[m] = x[m] + the bias of its slot, in place
#include "slot_bias.cuh"

struct Args { Rows x; SlotBias bias; };

template <typename X, typename Y> __device__ void add_slot_bias(const Args& args) {
    FOR_RUNS(args.x, m, n, count) {
        X* x = row<X>(args.x, m) + n;
        const f32* bias = bias_of(args.bias, m);
        if (!bias) continue;
        Run run = read(x, count);
        for (u32 j = 0; j < count; ++j) run.values[j] += bias[n + j];
        write(x, run, count);
    }
}

KERNEL(add_slot_bias, Args, f32, f32)
KERNEL(add_slot_bias, Args, bf16, bf16)
