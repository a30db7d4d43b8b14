// The slots' rank's view: where the rows of every source are, and where their sums go. Metadata that contradicts what
// was announced is refused.
#include "matches.cuh"

struct Args { Rows slots, bins, order, sums; Report report; u32 local, padding; };

enum Column : u32 { FIRST_ROW, RECEIVED, SUM, LASTS, ASSIGNED };

__device__ __forceinline__ const u32* bin(const Args& args, u32 source, u32 slot) {
    return row<u32>(args.bins, source * args.local + slot);
}

// The bin of a metadata row: the last one that starts at or before it.
__device__ __forceinline__ u32 bin_of(const Args& args, u32 m) {
    u32 low = 0, high = args.bins.rows;
    while (low + 1 < high) {
        const u32 middle = (low + high) / 2;
        if (row<u32>(args.bins, middle)[FIRST_ROW] <= m) low = middle; else high = middle;
    }
    return low;
}

__device__ __forceinline__ u32 used(const Args& args, const u32* slots) {
    return place_of(slots, args.slots.width, NONE);
}

// A thread per row.
extern "C" __global__ void __launch_bounds__(THREADS) receive_rows_f32_f32(const __grid_constant__ Args args) {
    take_turn();
    for (u32 m = blockIdx.x * THREADS + threadIdx.x; m < args.slots.rows; m += gridDim.x * THREADS) {
        const u32* slots = row<u32>(args.slots, m);
        const u32 at_bin = bin_of(args, m), source = at_bin / args.local, first = at_bin % args.local;
        u32 count = 0;
        while (count < args.slots.width && slots[count] != NONE) ++count;
        bool good = true;
        const auto refuse = [&](Cause cause, u32 got, u32 want) {
            if (good) complain(args.report, cause, m, source, got, want);
            good = false;
        };
        for (u32 place = count; place < args.slots.width; ++place)
            if (slots[place] != NONE) refuse(ROW_STRAY, slots[place], 0);
        for (u32 place = 1; place < count; ++place)
            if (slots[place - 1] >= slots[place]) refuse(ROW_DESCENDS, slots[place], slots[place - 1]);
        if (count == 0) refuse(ROW_EMPTY, 0, 1);
        else if (slots[count - 1] >= args.local) refuse(ROW_SLOT, slots[count - 1], args.local);
        else if (slots[0] != first) refuse(ROW_FIRST, slots[0], first);
        if (!good) continue;
        const u32* start = row<u32>(args.bins, at_bin);
        const u32 received = start[RECEIVED] + (m - start[FIRST_ROW]);
        if (received >= args.order.rows) complain(args.report, SOURCE_ROW, received, args.order.rows);
        else *row<u32>(args.order, received) = m;
    }
}

// A block per slot.
BLOCK_PER_BIN(receive_sums) {
    take_turn();
    const u32 slot = blockIdx.x, width = args.slots.width, sources = args.bins.rows / args.local;
    // The source of a row, and how many of a column its sources before have.
    const auto before = [&](u32 m, u32 column, u32& source) {
        u32 sum = 0;
        for (source = 0; source + 1 < sources && bin(args, source + 1, 0)[FIRST_ROW] <= m; ++source)
            sum += bin(args, source, slot)[column];
        return sum;
    };
    const auto last = [&](u32 m) {
        const u32* slots = row<u32>(args.slots, m);
        const u32 count = used(args, slots);
        return count > 0 && slots[count - 1] == slot;
    };
    const u32 lasts = for_matches(args.slots.rows, last, [&](u32 m, u32 rank) {
        u32 source;
        const u32 others = before(m, LASTS, source);
        const u32* announced = bin(args, source, slot);
        if (rank < others || rank - others >= announced[LASTS])
            return complain(args.report, ROW_LAST, m, source, slot, announced[LASTS]);
        const u32 sum = announced[SUM] + rank - others;
        if (sum >= args.sums.rows) complain(args.report, SOURCE_ROW, sum, args.sums.rows);
        else *row<u32>(args.sums, m) = sum;
    });
    const auto here = [&](u32 m) {
        const u32* slots = row<u32>(args.slots, m);
        const u32 place = place_of(slots, width, slot);
        return place < width && slots[place] == slot;
    };
    const u32 assigned = for_matches(args.slots.rows, here, [&](u32 m, u32 rank) {
        u32 source;
        const u32 others = before(m, ASSIGNED, source);
        const u32 announced = bin(args, source, slot)[ASSIGNED];
        if (rank < others || rank - others >= announced) complain(args.report, ROW_ASSIGNED, m, source, slot, announced);
    });
    u32 want_lasts = 0, want_assigned = 0;
    for (u32 source = threadIdx.x; source < sources; source += WARPS * 32) {
        want_lasts += bin(args, source, slot)[LASTS];
        want_assigned += bin(args, source, slot)[ASSIGNED];
    }
    want_lasts = block_total(want_lasts), want_assigned = block_total(want_assigned);
    if (threadIdx.x == 0 && lasts != want_lasts) complain(args.report, ROWS_COUNTED, lasts, want_lasts);
    if (threadIdx.x == 0 && assigned != want_assigned) complain(args.report, ROWS_WITH_SLOT, slot, assigned, want_assigned);
}
