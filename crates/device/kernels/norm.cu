// out[m] = round((x[m] - mean) / sqrt(variance + eps) * weight), one block a row; the mean counts as 0 for RMS. A row
// whose squares have no finite sum is not finite itself.
#include "common.cuh"

struct Args { Rows x, out; u64 weight; f32 eps; u32 centred; Report report; };

#define FOR_RUNS_OF_ROW(width, n, count)                                                                     \
    for (u32 n = threadIdx.x * RUN; n < (width); n += THREADS * RUN)                                         \
        if (const u32 count = min((width) - n, RUN); true)

template <typename X, typename Y> __device__ void norm(const Args& args) {
    const X* x = row<X>(args.x, blockIdx.x);
    Y* out = row<Y>(args.out, blockIdx.x);
    const f32* weight = reinterpret_cast<const f32*>(args.weight);
    const u32 width = args.x.width;

    f32 mean = 0.0f;
    if (args.centred) {
        f32 sum = 0.0f;
        FOR_RUNS_OF_ROW(width, n, count) {
            const Run run = read(x + n, count);
            for (f32 value : run.values) sum += value;
        }
        mean = block_sum(sum) / f32(width);
    }
    f32 squares = 0.0f;
    FOR_RUNS_OF_ROW(width, n, count) {
        const Run run = read(x + n, count);
#pragma unroll
        for (u32 j = 0; j < RUN; ++j) {
            const f32 distance = j < count ? run.values[j] - mean : 0.0f;
            squares += distance * distance;
        }
    }
    const f32 variance = block_sum(squares) / f32(width);
    if (threadIdx.x == 0 && !finite(variance)) complain(args.report, NOT_FINITE, blockIdx.x, 0);
    const f32 factor = 1.0f / sqrtf(variance + args.eps);
    FOR_RUNS_OF_ROW(width, n, count) {
        Run run = read(x + n, count);
        const Run scales = read(weight + n, count);
#pragma unroll
        for (u32 j = 0; j < RUN; ++j) run.values[j] = (run.values[j] - mean) * factor * scales.values[j];
        write(out + n, run, count);
    }
}

KERNEL(norm, Args, f32, f32)
KERNEL(norm, Args, f32, bf16)
KERNEL(norm, Args, bf16, f32)
KERNEL(norm, Args, bf16, bf16)
