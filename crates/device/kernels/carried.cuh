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

// The slot that a sequence's state is read from (0) or left in (1, 2), of so many; that many where it is none of them,
// which is reported.
__device__ __forceinline__ u32 slot_of(const Carried& carried, u32 sequence, u32 which, u32 slots) {
    const u32 slot = row<u32>(carried.slots, sequence)[which];
    if (slot < slots) return slot;
    complain(carried.report, SLOT, slot, slots);
    return slots;
}

// A slot in which a sequence's state is left as it is before token `end` of the step; `end` is 0 where there is none. What is
// wrong with it is reported.
struct Kept { u32 slot, end; };

__device__ __forceinline__ Kept kept_of(const Carried& carried, u32 sequence, Span span, u32 slots) {
    const u32 after = row<u32>(carried.slots, sequence)[3];
    if (after == 0) return {0, 0};
    if (after > span.end - span.start) {
        complain(carried.report, SPAN, sequence, span.start, span.start + after);
        return {0, 0};
    }
    const u32 slot = slot_of(carried, sequence, 2, slots);
    return {slot, slot == slots ? 0 : span.start + after};
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
