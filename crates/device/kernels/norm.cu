// out[m] = round((x[m] - mean) / sqrt(variance + eps) * weight + bias); the mean counts as 0 for RMS. A row whose squares have no
// finite sum is not finite itself. Before, what is added may come to x, which is stored; afterwards, heads may be turned, and rows
// may be left as e4m3 codes besides: those of what is stored, rounded to bfloat16.
//
// A block takes a row, or, where rows are narrow and not wanted as codes, each of its warps or halves of warps takes one: what the other lanes of a
// block would add is zero, so the bits are the same.
#include "scaled.cuh"
#include "turn.cuh"

struct Args {
    Rows x, out;
    Rows added;      // likewise, or nothing
    Rows rope_table; // of tokens, each of `heads` rows, or nothing
    Rows codes;      // or nothing
    u64 weight, bias;
    f32 eps;
    u32 centred;
    Report report;
    u32 heads, interleaved;
    u32 groups; // row m has the weights of group m % groups
    u32 powers; // whether scales of codes are powers of two
};

constexpr u32 NARROW = 32 * RUN; // columns of a warp; `launch/norm.rs` repeats it

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

// The norm of a run from column n on, as it is stored.
template <typename Y>
__device__ __forceinline__ void scale(const Args& args, Run& run, u32 m, u32 n, f32 mean, f32 factor, u32 count) {
    const u32 at = m % args.groups * args.x.width + n;
    const Run scales = read(reinterpret_cast<const f32*>(args.weight) + at, count);
    Run added = {};
    if (args.bias) added = read(reinterpret_cast<const f32*>(args.bias) + at, count);
#pragma unroll
    for (u32 j = 0; j < RUN; ++j) {
        const f32 normed = (run.values[j] - mean) * factor * scales.values[j];
        run.values[j] = wide(narrow<Y>(args.bias ? normed + added.values[j] : normed));
    }
}

// A run of a row, with what is added to it.
template <typename X> __device__ __forceinline__ Run take(const Args& args, u32 m, u32 n, u32 count) {
    X* x = row<X>(args.x, m) + n;
    Run run = read(x, count);
    if (args.added.start) {
        const Run added = read(row<X>(args.added, m) + n, count);
#pragma unroll
        for (u32 j = 0; j < RUN; ++j) run.values[j] = wide(narrow<X>(run.values[j] + added.values[j]));
        write(x, run, count);
    }
    return run;
}

// Stores a run from column n on, if there is any of it, as numbers and, CODED, as codes; by whole half warps, which have a group of columns.
template <typename Y, bool CODED> __device__ __forceinline__ void leave(const Args& args, Run run, u32 m, u32 n, u32 count) {
    if (count > 0) write(row<Y>(args.out, m) + n, run, count);
    if (!CODED) return;
#pragma unroll
    for (u32 j = 0; j < RUN; ++j) run.values[j] = j < count ? wide(narrow<bf16>(run.values[j])) : 0.0f;
    const f32 scale = scale_of(run, args.powers);
    if (count > 0) store(row<u32>(args.codes, m), n, args.out.width, encode(run, scale), scale);
}

// Over a warp, or each half of it.
__device__ __forceinline__ f32 lanes_sum(f32 value, u32 lanes) {
    if (lanes == 32) value += __shfl_xor_sync(~0u, value, 16);
    for (int step = 8; step > 0; step >>= 1) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

// Turns the runs of a head, which the lanes hold in order; by whole warps.
__device__ __forceinline__ void turn_head(const Args& args, Run& run, u32 token, u32 n) {
    const u32 half = args.rope_table.width / 2;
    const f32* table = row<f32>(args.rope_table, token);
    if (args.interleaved) {
        if (n >= 2 * half) return;
#pragma unroll
        for (u32 j = 0; j < RUN; j += 2) turn(run.values[j], run.values[j + 1], table[(n + j) / 2], table[half + (n + j) / 2]);
        return;
    }
    const bool first = n < half;
    Run other;
#pragma unroll
    for (u32 j = 0; j < RUN; ++j)
        other.values[j] = __shfl_sync(~0u, run.values[j], first ? threadIdx.x % 32 + half / RUN : threadIdx.x % 32 - half / RUN);
    if (n >= 2 * half) return;
    const u32 i = first ? n : n - half;
    const Run cos = read(table + i, RUN), sin = read(table + half + i, RUN);
#pragma unroll
    for (u32 j = 0; j < RUN; ++j) {
        if (first) turn(run.values[j], other.values[j], cos.values[j], sin.values[j]);
        else turn(other.values[j], run.values[j], cos.values[j], sin.values[j]);
    }
}

template <typename X, typename Y> __device__ void norm_narrow(const Args& args) {
    const u32 width = args.x.width, lanes = width <= NARROW / 2 ? 16 : 32;
    const u32 m = (blockIdx.x * THREADS + threadIdx.x) / lanes, n = threadIdx.x % lanes * RUN;
    const bool there = m < args.x.rows;
    const u32 count = there && n < width ? min(width - n, RUN) : 0;
    Run run = {};
    if (count > 0) run = take<X>(args, m, n, count);
    const f32 mean = args.centred ? lanes_sum(sum_of(run), lanes) / f32(width) : 0.0f;
    f32 squares = 0.0f;
    add_squares(squares, run, mean, count);
    const f32 variance = lanes_sum(squares, lanes) / f32(width);
    if (there && n == 0 && !finite(variance)) complain(args.report, NOT_FINITE, m, blockIdx.y);
    const f32 factor = 1.0f / sqrtf(variance + args.eps);
    if (count > 0) scale<Y>(args, run, m, n, mean, factor, count);
    if (args.rope_table.start) turn_head(args, run, there ? m / args.heads : 0, n);
    if (count > 0) write(row<Y>(args.out, m) + n, run, count);
}

// Rows of up to PIECES * THREADS runs, which stay in registers.
template <typename X, typename Y, u32 PIECES, bool CODED> __device__ void norm_held(const Args& args) {
    const u32 width = args.x.width, m = blockIdx.x;
    const auto column = [&](u32 piece) { return (piece * THREADS + threadIdx.x) * RUN; };
    const auto length = [&](u32 piece) { return column(piece) < width ? min(width - column(piece), RUN) : 0; };
    Run runs[PIECES] = {};
#pragma unroll
    for (u32 piece = 0; piece < PIECES; ++piece)
        if (length(piece) > 0) runs[piece] = take<X>(args, m, column(piece), length(piece));
    f32 mean = 0.0f, squares = 0.0f;
    if (args.centred) {
        f32 sum = 0.0f;
#pragma unroll
        for (u32 piece = 0; piece < PIECES; ++piece)
            for (f32 value : runs[piece].values) sum += value;
        mean = block_sum(sum) / f32(width);
    }
#pragma unroll
    for (u32 piece = 0; piece < PIECES; ++piece) add_squares(squares, runs[piece], mean, length(piece));
    const f32 variance = block_sum(squares) / f32(width);
    if (threadIdx.x == 0 && !finite(variance)) complain(args.report, NOT_FINITE, m, 0);
    const f32 factor = 1.0f / sqrtf(variance + args.eps);
#pragma unroll
    for (u32 piece = 0; piece < PIECES; ++piece) {
        const u32 n = column(piece), count = length(piece);
        if (count > 0) scale<Y>(args, runs[piece], m, n, mean, factor, count);
        leave<Y, CODED>(args, runs[piece], m, n, count);
    }
}

#define FOR_RUNS_OF_ROW(width, n, count)                                                                     \
    for (u32 n = threadIdx.x * RUN; n < (width); n += THREADS * RUN)                                         \
        if (const u32 count = min((width) - n, RUN); true)

template <typename X, typename Y, bool CODED> __device__ void norm_wide(const Args& args) {
    const u32 width = args.x.width, m = blockIdx.x;
    X* x = row<X>(args.x, m);
    if (args.added.start) FOR_RUNS_OF_ROW(width, n, count) take<X>(args, m, n, count);
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
    if (threadIdx.x == 0 && !finite(variance)) complain(args.report, NOT_FINITE, m, 0);
    const f32 factor = 1.0f / sqrtf(variance + args.eps);
    for (u32 n = threadIdx.x * RUN; n < (width + GROUP - 1) / GROUP * GROUP; n += THREADS * RUN) {
        const u32 count = n < width ? min(width - n, RUN) : 0;
        Run run = {};
        if (count > 0) {
            run = read(x + n, count);
            scale<Y>(args, run, m, n, mean, factor, count);
        }
        leave<Y, CODED>(args, run, m, n, count);
    }
}

template <typename X, typename Y, bool CODED = false> __device__ void norm(const Args& args) {
    constexpr u32 PIECE = THREADS * RUN;
    const u32 width = args.x.width;
    if (width <= PIECE) norm_held<X, Y, 1, CODED>(args);
    else if (width <= 2 * PIECE) norm_held<X, Y, 2, CODED>(args);
    else if (width <= 4 * PIECE) norm_held<X, Y, 4, CODED>(args);
    else norm_wide<X, Y, CODED>(args);
}

// Three blocks a multiprocessor keep memory busy, as many as have room without codes.
#define CODED_KERNEL(X, Y)                                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS, 3) norm_coded_##X##_##Y(const __grid_constant__ Args args) {  \
        take_turn();                                                                                                    \
        norm<X, Y, true>(args);                                                                                         \
    }

// Queries and keys, say: what belongs to one is the blocks of a row of the grid. The twin of `norm::NarrowArgs`.
struct Narrow { Args parts[2]; };

template <typename X, typename Y> __device__ void norm_narrow(const Narrow& args) { norm_narrow<X, Y>(args.parts[blockIdx.y]); }

KERNEL(norm, Args, f32, f32)
KERNEL(norm, Args, f32, bf16)
KERNEL(norm, Args, bf16, f32)
KERNEL(norm, Args, bf16, bf16)
CODED_KERNEL(f32, f32)
CODED_KERNEL(f32, bf16)
CODED_KERNEL(bf16, f32)
CODED_KERNEL(bf16, bf16)
KERNEL(norm_narrow, Narrow, f32, f32)
KERNEL(norm_narrow, Narrow, f32, bf16)
KERNEL(norm_narrow, Narrow, bf16, f32)
KERNEL(norm_narrow, Narrow, bf16, bf16)
