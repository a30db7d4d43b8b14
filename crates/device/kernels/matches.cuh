// Stable counting sorts without atomics: a block per bin goes through all candidates, each of its warps through a
// stretch of them. It counts first, and knows from the counts of all where its matches go.
#pragma once
#include "common.cuh"

constexpr u32 WARPS = 32;

#define BLOCK_PER_BIN(name) extern "C" __global__ void __launch_bounds__(WARPS * 32) name##_f32_f32(const __grid_constant__ Args args)

// Sum over the warps of a block of what each warp's first lane gives; every thread gets the sum of the warps before its
// own, and of all.
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

// Sum over all threads of a block.
__device__ __forceinline__ u32 block_total(u32 value) {
    u32 total;
    warps_before(__reduce_add_sync(~0u, value), total);
    return total;
}

// Sum of a row's first `count` elements, by the whole block.
__device__ __forceinline__ u32 sum_before(const u32* histogram, u32 count) {
    u32 mine = 0;
    for (u32 bin = threadIdx.x; bin < count; bin += WARPS * 32) mine += histogram[bin];
    return block_total(mine);
}

// The candidates of a warp.
struct Stretch {
    u32 from, to;
    __device__ __forceinline__ explicit Stretch(u32 count) {
        const u32 length = (count / (WARPS * 32) + 1) * 32;
        from = min(threadIdx.x / 32 * length, count);
        to = min(from + length, count);
    }
};

// Calls found(n, rank) for every candidate that is wanted, in order, counting on from `rank`.
template <typename Wanted, typename Found>
__device__ __forceinline__ void visit(const Stretch& stretch, u32 rank, Wanted wanted, Found found) {
    const u32 lane = threadIdx.x % 32;
    for (u32 first = stretch.from; first < stretch.to; first += 32) {
        const u32 n = first + lane;
        const bool here = n < stretch.to && wanted(n);
        const u32 matches = __ballot_sync(~0u, here);
        if (here) found(n, rank + __popc(matches & ((1u << lane) - 1)));
        rank += __popc(matches);
    }
}

// The same for all candidates below `count`; returns how many are wanted.
template <typename Wanted, typename Found>
__device__ __forceinline__ u32 for_matches(u32 count, Wanted wanted, Found found) {
    const Stretch stretch(count);
    u32 mine = 0, total;
    for (u32 n = stretch.from + threadIdx.x % 32; n < stretch.to; n += 32) mine += wanted(n);
    const u32 rank = warps_before(__reduce_add_sync(~0u, mine), total);
    visit(stretch, rank, wanted, found);
    return total;
}

constexpr u32 NONE = ~0u; // fills up rows of indices

// Where a slot is, or would be, in an ascending row of `width` slots that NONE fills up.
__device__ __forceinline__ u32 place_of(const u32* slots, u32 width, u32 slot) {
    u32 place = 0;
    while (place < width && slots[place] < slot) ++place;
    return place;
}
