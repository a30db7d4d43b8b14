// out[m] = round((x[m] - mean) / sqrt(variance + eps) * weight); the mean counts as 0 for RMS. A row whose squares have no
// finite sum is not finite itself. A block takes a row, or, where rows are narrow, each of its warps takes one: what the other
// warps of a block would add is zero, so the bits are the same.
#include "common.cuh"

struct Args { Rows x, out; u64 weight; f32 eps; u32 centred; Report report; };

constexpr u32 NARROW = 32 * RUN; // columns of a warp; `launch/norm.rs` repeats it

#define FOR_RUNS_OF_ROW(width, n, count)                                                                     \
    for (u32 n = threadIdx.x * RUN; n < (width); n += THREADS * RUN)                                         \
        if (const u32 count = min((width) - n, RUN); true)

__device__ __forceinline__ f32 sum_of(const Run& run) {
    f32 sum = 0.0f;
    for (f32 value : run.values) sum += value;
    return sum;
}

// Adds the squares of a run's distances from the mean.
__device__ __forceinline__ void add_squares(f32& squares, const Run& run, f32 mean, u32 count) {
#pragma unroll
    for (u32 j = 0; j < RUN; ++j) {
        const f32 distance = j < count ? run.values[j] - mean : 0.0f;
        squares += distance * distance;
    }
}

template <typename Y>
__device__ __forceinline__ void store(Y* out, Run run, const f32* weight, f32 mean, f32 factor, u32 count) {
    const Run scales = read(weight, count);
#pragma unroll
    for (u32 j = 0; j < RUN; ++j) run.values[j] = (run.values[j] - mean) * factor * scales.values[j];
    write(out, run, count);
}

template <typename X, typename Y> __device__ void norm_narrow(const Args& args) {
    const u32 m = (blockIdx.x * THREADS + threadIdx.x) / 32, n = threadIdx.x % 32 * RUN, width = args.x.width;
    if (m >= args.x.rows) return;
    const u32 count = n < width ? min(width - n, RUN) : 0;
    const Run run = read(row<X>(args.x, m) + n, count);
    const f32 mean = args.centred ? warp_sum(sum_of(run)) / f32(width) : 0.0f;
    f32 squares = 0.0f;
    add_squares(squares, run, mean, count);
    const f32 variance = warp_sum(squares) / f32(width);
    if (n == 0 && !finite(variance)) complain(args.report, NOT_FINITE, m, 0);
    const f32 factor = 1.0f / sqrtf(variance + args.eps);
    if (count > 0) store(row<Y>(args.out, m) + n, run, reinterpret_cast<const f32*>(args.weight) + n, mean, factor, count);
}

template <typename X, typename Y> __device__ void norm(const Args& args) {
    const u32 width = args.x.width;
    if (width <= NARROW) return norm_narrow<X, Y>(args);
    const X* x = row<X>(args.x, blockIdx.x);
    Y* out = row<Y>(args.out, blockIdx.x);
    const f32* weight = reinterpret_cast<const f32*>(args.weight);

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
    FOR_RUNS_OF_ROW(width, n, count) add_squares(squares, read(x + n, count), mean, count);
    const f32 variance = block_sum(squares) / f32(width);
    if (threadIdx.x == 0 && !finite(variance)) complain(args.report, NOT_FINITE, blockIdx.x, 0);
    const f32 factor = 1.0f / sqrtf(variance + args.eps);
    FOR_RUNS_OF_ROW(width, n, count) store(out + n, read(x + n, count), weight + n, mean, factor, count);
}

KERNEL(norm, Args, f32, f32)
KERNEL(norm, Args, f32, bf16)
KERNEL(norm, Args, bf16, f32)
KERNEL(norm, Args, bf16, bf16)
