// The assignments of all rows, slot by slot and in the order of the rows, and those of each sum. A block per slot.
#include "matches.cuh"

struct Args { Rows slots, order, sums, weights, factors, starts, rows, terms; Report report; u32 travelled, padding; };

BLOCK_PER_BIN(sort) {
    take_turn();
    const u32 slot = blockIdx.x, local = args.starts.rows - 1, width = args.slots.width, count = args.slots.rows;
    const u32 all = args.rows.rows;
    const auto slots_of = [&](u32 r) -> const u32* {
        const u32 m = args.travelled ? at<u32>(args.order, r) : r;
        return m < count ? row<u32>(args.slots, m) : nullptr;
    };
    const auto wanted = [&](u32 r) {
        const u32* slots = slots_of(r);
        if (!slots) return false;
        const u32 place = place_of(slots, width, slot);
        return place < width && slots[place] == slot;
    };
    const Stretch stretch(count);
    u32 mine = 0, below = 0, found;
    for (u32 first = stretch.from; first < stretch.to; first += 32) {
        const u32 r = first + threadIdx.x % 32;
        bool here = false;
        if (r < stretch.to) {
            const u32* slots = slots_of(r);
            if (slots) {
                const u32 place = place_of(slots, width, slot);
                here = place < width && slots[place] == slot;
                below += place;
                for (u32 other = 0; slot == 0 && other < width; ++other)
                    if (slots[other] != NONE && slots[other] >= local) complain(args.report, SLOT, slots[other], local);
            } else {
                complain(args.report, SOURCE_ROW, at<u32>(args.order, r), count);
            }
        }
        mine += keep(first, here);
    }
    const u32 start = block_total(below);
    const u32 rank = warps_before(mine, found);
    if (threadIdx.x == 0) {
        *row<u32>(args.starts, slot) = start;
        if (slot + 1 == local) {
            *row<u32>(args.starts, local) = start + found;
            const bool fewer = !args.travelled && start + found < all;
            if (start + found != all && !fewer) complain(args.report, ASSIGNMENTS, start + found, all);
        }
    }
    // In place there may be fewer, of some rows none.
    if (!args.travelled && slot + 1 == local)
        for (u32 unused = start + found + threadIdx.x; unused < all; unused += WARPS * 32) *row<u32>(args.rows, unused) = NONE;
    for (u32 r = threadIdx.x; !args.travelled && slot == 0 && r < count; r += WARPS * 32)
        if (*row<u32>(args.slots, r) == NONE)
            for (u32 place = 0; place < width; ++place) row<u32>(args.terms, r)[place] = NONE;
    share(stretch, rank, found, wanted, [&](u32 r, u32 match) {
        const u32 assignment = start + match;
        if (assignment >= all) return complain(args.report, SOURCE_ROW, assignment, all);
        const u32 m = args.travelled ? at<u32>(args.order, r) : r;
        const u32 sum = args.travelled ? at<u32>(args.sums, m) : m;
        if (sum >= count) return complain(args.report, SOURCE_ROW, sum, count);
        const u32* slots = row<u32>(args.slots, m);
        const u32 place = place_of(slots, width, slot);
        const bool last = place + 1 == width || slots[place + 1] == NONE;
        *row<u32>(args.rows, assignment) = r;
        u32* terms = row<u32>(args.terms, sum);
        terms[place] = assignment;
        for (u32 rest = place + 1; last && rest < width; ++rest) terms[rest] = NONE;
        if (!args.travelled) return;
        const f32* weights = row<f32>(args.weights, m);
        f32* factors = row<f32>(args.factors, sum);
        factors[place] = weights[place];
        for (u32 rest = place + 1; last && rest < width; ++rest) factors[rest] = 0.0f;
    });
}
