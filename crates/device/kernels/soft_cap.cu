// x[m] = cap * tanh(x[m] / cap), in place
#include "common.cuh"

struct Args { Rows x; f32 cap; u32 padding; };

template <typename X, typename Y> __device__ void soft_cap(const Args& args) {
    FOR_RUNS(args.x, m, n, count) {
        X* x = row<X>(args.x, m) + n;
        Run run = read(x, count);
        for (f32& value : run.values) value = tanhf(value / args.cap) * args.cap;
        write(x, run, count);
    }
}

KERNEL(soft_cap, Args, f32, f32)
KERNEL(soft_cap, Args, bf16, bf16)
