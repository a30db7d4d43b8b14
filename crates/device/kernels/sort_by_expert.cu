// The copies of a rank's tokens, sorted by expert, then token. A block per expert; each of its warps looks through a
// stretch of the pairs: it counts first, and knows from the counts of all where its copies go. No atomics, so the
// order is that of the pairs.
#include "common.cuh"

struct Args {
    Rows experts, weights, starts, tokens, copies, factors;
    Report report;
};

constexpr u32 WARPS = 32;

// Sum over a block of WARPS warps of what each warp's first lane gives; every thread gets the sum of the warps
// before its own, and of all.
__device__ __forceinline__ u32 warps_before(u32 value, u32& total) {
    __shared__ u32 values[WARPS];
    __syncthreads();
    if (threadIdx.x % 32 == 0) values[threadIdx.x / 32] = value;
    __syncthreads();
    u32 before = 0;
    total = 0;
    for (u32 warp = 0; warp < WARPS; ++warp) {
        if (warp < threadIdx.x / 32) before += values[warp];
        total += values[warp];
    }
    return before;
}

extern "C" __global__ void __launch_bounds__(WARPS * 32) sort_by_expert_f32_f32(const __grid_constant__ Args args) {
    const u32 expert = blockIdx.x, experts = args.starts.rows - 1, k = args.experts.width;
    const u32 pairs = args.experts.rows * k, lane = threadIdx.x % 32;
    const u32 stretch = (pairs + WARPS * 32 - 1) / (WARPS * 32) * 32;
    const u32 from = min(threadIdx.x / 32 * stretch, pairs), to = min(from + stretch, pairs);
    const auto expert_of = [&](u32 pair) { return row<u32>(args.experts, pair / k)[pair % k]; };

    u32 mine = 0, below = 0;
#pragma unroll 4
    for (u32 pair = from + lane; pair < to; pair += 32) {
        const u32 other = expert_of(pair);
        mine += other == expert;
        below += other < expert;
        if (expert == 0 && other >= experts) complain(args.report, EXPERT, other, experts);
    }
    mine = __reduce_add_sync(~0u, mine);
    below = __reduce_add_sync(~0u, below);
    u32 start, count;
    warps_before(below, start);
    u32 copy = start + warps_before(mine, count);
    if (threadIdx.x == 0) {
        *row<u32>(args.starts, expert) = start;
        if (expert + 1 == experts) *row<u32>(args.starts, experts) = start + count;
    }
    for (u32 first = from; first < to; first += 32) {
        const u32 pair = first + lane;
        const bool here = pair < to && expert_of(pair) == expert;
        const u32 matches = __ballot_sync(~0u, here);
        if (here) {
            const u32 token = pair / k, at = copy + __popc(matches & ((1u << lane) - 1));
            const u32* of_token = row<u32>(args.experts, token);
            u32 place = token * k;
            for (u32 slot = 0; slot < k; ++slot) place += of_token[slot] < expert;
            *row<u32>(args.tokens, at) = token;
            *row<u32>(args.copies, place) = at;
            *row<f32>(args.factors, place) = row<f32>(args.weights, token)[pair % k];
        }
        copy += __popc(matches);
    }
}
