// out[m] = out[m] + x[m], in place
#include "common.cuh"

struct Args { Rows x, out; };

template <typename X, typename Y> __device__ void add(const Args& args) {
    FOR_ELEMENTS(args.out, m, n) {
        Y* out = row<Y>(args.out, m) + n;
        *out = narrow<Y>(wide(*out) + wide(row<X>(args.x, m)[n]));
    }
}

KERNEL(add, Args, f32, f32)
KERNEL(add, Args, f32, bf16)
KERNEL(add, Args, bf16, f32)
KERNEL(add, Args, bf16, bf16)
