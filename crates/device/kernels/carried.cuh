// Sequences that carry states. The twin of `launch::CarriedArgs`.
#pragma once
#include "common.cuh"

struct Carried { Rows starts, positions, slots; Report report; };

// The new tokens of a sequence; none where something is wrong with them, which is reported.
struct Span { u32 start, end; };

__device__ __forceinline__ Span span_of(const Carried& carried, u32 sequence) {
    const u32 start = at<u32>(carried.starts, sequence), end = at<u32>(carried.starts, sequence + 1);
    if (end >= start && end <= carried.positions.rows) return {start, end};
    complain(carried.report, SPAN, sequence, start, end);
    return {0, 0};
}

// The slot that a sequence's state is read from (0) or left in (1), of so many; that many where it is none of them,
// which is reported.
__device__ __forceinline__ u32 slot_of(const Carried& carried, u32 sequence, u32 which, u32 slots) {
    const u32 slot = row<u32>(carried.slots, sequence)[which];
    if (slot < slots) return slot;
    complain(carried.report, SLOT, slot, slots);
    return slots;
}

// The sequence of new token t: the last one that starts at or before it.
__device__ __forceinline__ u32 sequence_of(const Carried& carried, u32 t) {
    u32 low = 0, high = carried.slots.rows;
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (at<u32>(carried.starts, middle) <= t) low = middle;
        else high = middle;
    }
    return low;
}
