// x = factor * x, in place
#include "common.cuh"

struct Args { Rows x; f32 factor; u32 padding; };

template <typename X, typename Y> __device__ void scale(const Args& args) {
    FOR_RUNS(args.x, m, n, count) {
        X* x = row<X>(args.x, m) + n;
        Run run = read(x, count);
        for (f32& value : run.values) value *= args.factor;
        write(x, run, count);
    }
}

KERNEL(scale, Args, f32, f32)
KERNEL(scale, Args, bf16, bf16)
