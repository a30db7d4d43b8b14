// x = max(-limit, min(limit, x)), in place
#include "common.cuh"

struct Args { Rows x; f32 limit; u32 padding; };

template <typename X, typename Y> __device__ void clamp(const Args& args) {
    FOR_ELEMENTS(args.x, m, n) {
        X* x = row<X>(args.x, m) + n;
        f32 value = wide(*x);
        // Comparisons, so that a NaN stays one.
        value = value > args.limit ? args.limit : value < -args.limit ? -args.limit : value;
        *x = narrow<X>(value);
    }
}

KERNEL(clamp, Args, f32, f32)
KERNEL(clamp, Args, bf16, bf16)
