// tokens[m] = the column of the largest logit of row m, the lowest of equal ones. A row with a NaN, or whose largest is
// infinite, is complained of. A block takes a row.
#include "common.cuh"

constexpr u32 BLOCK = 1024, WARPS = BLOCK / 32;

struct Args { Rows logits, tokens; Report report; };

// A logit and its column.
struct Candidate { f32 value; u32 column; };

__device__ __forceinline__ Candidate better(const Candidate& one, const Candidate& other) {
    const bool further = other.value > one.value, earlier = other.value == one.value && other.column < one.column;
    return further || earlier ? other : one;
}

__device__ __forceinline__ Candidate best_of_warp(Candidate best) {
    for (int step = 16; step > 0; step >>= 1)
        best = better(best, {__shfl_xor_sync(~0u, best.value, step), __shfl_xor_sync(~0u, best.column, step)});
    return best;
}

extern "C" __global__ void __launch_bounds__(BLOCK) argmax_f32_f32(const __grid_constant__ Args args) {
    take_turn();
    const f32* logits = row<f32>(args.logits, blockIdx.x);
    const u32 thread = threadIdx.x, width = args.logits.width;
    Candidate best = {logits[0], 0};
    bool numbers = true;
    // Within a thread columns ascend, so the first of equal ones stays.
    const auto consider = [&](f32 value, u32 column) {
        numbers = numbers && value == value;
        if (value > best.value) best = {value, column};
    };
    constexpr u32 PIECE = 4, AHEAD = 4; // columns of a load, and loads under way
    const bool vectors = reinterpret_cast<u64>(logits) % 16 == 0;
    const u32 whole = vectors ? width / (PIECE * AHEAD * BLOCK) * (PIECE * AHEAD * BLOCK) : 0;
    for (u32 start = thread * PIECE; start < whole; start += PIECE * AHEAD * BLOCK) {
        float4 pieces[AHEAD];
#pragma unroll
        for (u32 i = 0; i < AHEAD; ++i) pieces[i] = *reinterpret_cast<const float4*>(logits + start + i * PIECE * BLOCK);
#pragma unroll
        for (u32 i = 0; i < AHEAD; ++i) {
            const u32 column = start + i * PIECE * BLOCK;
            consider(pieces[i].x, column), consider(pieces[i].y, column + 1);
            consider(pieces[i].z, column + 2), consider(pieces[i].w, column + 3);
        }
    }
    for (u32 column = whole + thread; column < width; column += BLOCK) consider(logits[column], column);
    if (!numbers) complain(args.report, NOT_FINITE, blockIdx.x, 0);

    __shared__ Candidate bests[WARPS];
    best = best_of_warp(best);
    if (thread % 32 == 0) bests[thread / 32] = best;
    __syncthreads();
    if (thread >= WARPS) return;
    best = best_of_warp(bests[thread]);
    if (thread != 0) return;
    if (!finite(best.value)) complain(args.report, NOT_FINITE, blockIdx.x, 0);
    *row<u32>(args.tokens, blockIdx.x) = best.column;
}
