// A bias for rows that are sorted by slot.
#pragma once
#include "common.cuh"

// The twin of `launch::SlotBiasArgs`.
struct SlotBias {
    u64 bias;   // `width` float32 a slot; 0: none
    Rows starts;
    Report report;
    u32 first;  // what row 0 counts as
    u32 width;
};

// The bias of row m: that of the last slot that starts at or before it. Null if the row is in no slot, which is said.
__device__ __forceinline__ const f32* bias_of(const SlotBias& slots, u32 m) {
    const u32 wanted = m + slots.first;
    u32 low = 0, high = slots.starts.rows - 1; // starts[low] <= wanted < starts[high], if the row is in a slot
    if (wanted < at<u32>(slots.starts, 0) || wanted >= at<u32>(slots.starts, high)) {
        complain(slots.report, SOURCE_ROW, wanted, at<u32>(slots.starts, high));
        return nullptr;
    }
    while (high - low > 1) {
        const u32 middle = (low + high) / 2;
        if (at<u32>(slots.starts, middle) <= wanted) low = middle;
        else high = middle;
    }
    return reinterpret_cast<const f32*>(slots.bias) + u64(low) * slots.width;
}
