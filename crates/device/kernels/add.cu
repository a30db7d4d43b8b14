// out[m] = out[m] + x[m], in place
#include "common.cuh"

struct Args { Rows x, out; };

template <typename X, typename Y> __device__ void add(const Args& args) {
    FOR_RUNS(args.out, m, n, count) {
        Y* out = row<Y>(args.out, m) + n;
        Run sum = read(out, count);
        const Run x = read(row<X>(args.x, m) + n, count);
        for (u32 j = 0; j < RUN; ++j) sum.values[j] += x.values[j];
        write(out, sum, count);
    }
}

KERNEL(add, Args, f32, f32)
KERNEL(add, Args, f32, bf16)
KERNEL(add, Args, bf16, f32)
KERNEL(add, Args, bf16, bf16)
