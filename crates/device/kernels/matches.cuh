// Stable counting sorts without atomics: a block per bin goes through all candidates, each of its warps through a
// stretch of them. It counts first, and knows from the counts of all where its matches go; then threads share the matches.
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

// What is known of candidates by the words of their matches, 32 at a time, as far as a block keeps them.
constexpr u32 KEPT = 2048;
// Matches that a block lists, so that its threads share them evenly.
constexpr u32 LISTED = 8192;

__device__ __forceinline__ u32* kept_words() {
    __shared__ u32 words[KEPT];
    return words;
}

__device__ __forceinline__ u32* listed_matches() {
    __shared__ u32 list[LISTED];
    return list;
}

// Keeps which of the 32 candidates from `first` on are wanted; returns how many.
__device__ __forceinline__ u32 keep(u32 first, bool wanted) {
    const u32 matches = __ballot_sync(~0u, wanted);
    if (threadIdx.x % 32 == 0 && first / 32 < KEPT) kept_words()[first / 32] = matches;
    return __popc(matches);
}

// Calls each(n, rank) for every candidate of a warp's stretch that is wanted, in order, counting on from `rank`.
template <typename Wanted, typename Each>
__device__ __forceinline__ void visit(const Stretch& stretch, u32 rank, Wanted wanted, Each each) {
    const u32 lane = threadIdx.x % 32;
    for (u32 first = stretch.from; first < stretch.to; first += 32) {
        const u32 n = first + lane;
        const u32 matches = first / 32 < KEPT ? kept_words()[first / 32] : __ballot_sync(~0u, n < stretch.to && wanted(n));
        if (matches >> lane & 1) each(n, rank + __popc(matches & ((1u << lane) - 1)));
        rank += __popc(matches);
    }
}

// Calls found(n, rank) for every candidate that is wanted, of `total`: those of a warp's stretch, all of which it has kept, count
// from `rank` on.
template <typename Wanted, typename Found>
__device__ __forceinline__ void share(const Stretch& stretch, u32 rank, u32 total, Wanted wanted, Found found) {
    __syncwarp();
    if (total > LISTED) return visit(stretch, rank, wanted, found);
    visit(stretch, rank, wanted, [](u32 n, u32 rank) { listed_matches()[rank] = n; });
    __syncthreads();
    for (u32 match = threadIdx.x; match < total; match += WARPS * 32) found(listed_matches()[match], match);
}

// The same for all candidates below `count`; returns how many are wanted.
template <typename Wanted, typename Found>
__device__ __forceinline__ u32 for_matches(u32 count, Wanted wanted, Found found) {
    const Stretch stretch(count);
    u32 mine = 0, total;
    for (u32 first = stretch.from; first < stretch.to; first += 32) {
        const u32 n = first + threadIdx.x % 32;
        mine += keep(first, n < stretch.to && wanted(n));
    }
    const u32 rank = warps_before(mine, total);
    share(stretch, rank, total, wanted, found);
    return total;
}

constexpr u32 NONE = ~0u; // fills up rows of indices

// Where a slot is, or would be, in an ascending row of `width` slots that NONE fills up.
__device__ __forceinline__ u32 place_of(const u32* slots, u32 width, u32 slot) {
    u32 place = 0;
    // All of them, so that no load waits for the one before.
    for (u32 at = 0; at < width; ++at) place += slots[at] < slot;
    return place;
}
