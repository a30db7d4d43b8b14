// x = max(-limit, min(limit, x)), in place
#include "common.cuh"

struct Args { Rows x; f32 limit; u32 padding; };

template <typename X, typename Y> __device__ void clamp(const Args& args) {
    FOR_RUNS(args.x, m, n, count) {
        X* x = row<X>(args.x, m) + n;
        Run run = read(x, count);
        // Comparisons, so that a NaN stays one.
        for (f32& value : run.values)
            value = value > args.limit ? args.limit : value < -args.limit ? -args.limit : value;
        write(x, run, count);
    }
}

KERNEL(clamp, Args, f32, f32)
KERNEL(clamp, Args, bf16, bf16)
