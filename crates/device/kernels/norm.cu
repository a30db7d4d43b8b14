// out[m] = round((x[m] - mean) / sqrt(variance + eps) * weight), one block a row; the mean counts as 0 for RMS.
#include "common.cuh"

struct Args { Rows x, out; u64 weight; f32 eps; u32 centred; };

template <typename X, typename Y> __device__ void norm(const Args& args) {
    const X* x = row<X>(args.x, blockIdx.x);
    Y* out = row<Y>(args.out, blockIdx.x);
    const f32* weight = reinterpret_cast<const f32*>(args.weight);
    const u32 width = args.x.width;

    f32 mean = 0.0f;
    if (args.centred) {
        f32 sum = 0.0f;
        for (u32 n = threadIdx.x; n < width; n += THREADS) sum += wide(x[n]);
        mean = block_sum(sum) / f32(width);
    }
    f32 squares = 0.0f;
    for (u32 n = threadIdx.x; n < width; n += THREADS) {
        f32 distance = wide(x[n]) - mean;
        squares += distance * distance;
    }
    const f32 factor = 1.0f / sqrtf(block_sum(squares) / f32(width) + args.eps);
    for (u32 n = threadIdx.x; n < width; n += THREADS) {
        out[n] = narrow<Y>((wide(x[n]) - mean) * factor * weight[n]);
    }
}

KERNEL(norm, Args, f32, f32)
KERNEL(norm, Args, f32, bf16)
KERNEL(norm, Args, bf16, f32)
KERNEL(norm, Args, bf16, bf16)
