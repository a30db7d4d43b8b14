// out[m] = x[m]
#include "common.cuh"

struct Args { Rows x, out; };

template <typename X, typename Y> __device__ void copy(const Args& args) {
    FOR_RUNS(args.out, m, n, count) write(row<Y>(args.out, m) + n, read(row<X>(args.x, m) + n, count), count);
}

KERNEL(copy, Args, f32, f32)
KERNEL(copy, Args, f32, bf16)
KERNEL(copy, Args, bf16, f32)
KERNEL(copy, Args, bf16, bf16)
