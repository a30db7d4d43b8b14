// out[m] = x[m]
#include "common.cuh"

struct Args { Rows x, out; };

template <typename X, typename Y> __device__ void copy(const Args& args) {
    FOR_ELEMENTS(args.out, m, n) row<Y>(args.out, m)[n] = narrow<Y>(wide(row<X>(args.x, m)[n]));
}

KERNEL(copy, Args, f32, f32)
KERNEL(copy, Args, f32, bf16)
KERNEL(copy, Args, bf16, f32)
KERNEL(copy, Args, bf16, bf16)
