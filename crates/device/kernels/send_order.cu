// The source rank's orders: rows by first slot, then token; sums by last slot, then as the rows leave. A block per slot.
#include "matches.cuh"

struct Args { Rows slots, weights, block_starts, counts, tokens, last, metadata, sums; Report report; };

// Whether the slot at `place` is on the rank whose slots start at `block`, given that one before it is.
__device__ __forceinline__ bool stays(const Args& args, const u32* slots, u32 place, u32 block) {
    return place < args.slots.width && slots[place] < args.block_starts.rows &&
           at<u32>(args.block_starts, slots[place]) == block;
}

BLOCK_PER_BIN(send_rows) {
    take_turn();
    const u32 slot = blockIdx.x, k = args.slots.width, rows = args.tokens.rows;
    const u32 block = at<u32>(args.block_starts, slot);
    const u32 start = sum_before(row<u32>(args.counts, 1), slot);
    const auto wanted = [&](u32 token) {
        const u32* slots = row<u32>(args.slots, token);
        const u32 place = place_of(slots, k, slot);
        return place < k && slots[place] == slot && (place == 0 || slots[place - 1] < block);
    };
    const u32 found = for_matches(args.slots.rows, wanted, [&](u32 token, u32 rank) {
        const u32 to = start + rank;
        if (to >= rows) return complain(args.report, SOURCE_ROW, to, rows);
        const u32* slots = row<u32>(args.slots, token);
        const f32* weights = row<f32>(args.weights, token);
        u32* metadata = row<u32>(args.metadata, to);
        u32 place = place_of(slots, k, slot), used = 0;
        for (; stays(args, slots, place, block); ++place, ++used) {
            metadata[used] = slots[place] - block;
            metadata[k + used] = __float_as_uint(weights[place]);
        }
        *row<u32>(args.tokens, to) = token;
        *row<u32>(args.last, to) = slots[place - 1];
        for (; used < k; ++used) metadata[used] = NONE, metadata[k + used] = 0;
    });
    if (threadIdx.x == 0 && slot + 1 == args.block_starts.rows && start + found != rows)
        complain(args.report, ROWS_COUNTED, start + found, rows);
}

BLOCK_PER_BIN(send_sums) {
    take_turn();
    const u32 slot = blockIdx.x, k = args.slots.width;
    // Tokens that are sent nowhere.
    for (u32 token = threadIdx.x; slot == 0 && token < args.slots.rows; token += WARPS * 32)
        if (*row<u32>(args.slots, token) == NONE)
            for (u32 rank = 0; rank < args.sums.width; ++rank) row<u32>(args.sums, token)[rank] = NONE;
    const u32 start = sum_before(row<u32>(args.counts, 2), slot);
    const auto wanted = [&](u32 from) { return at<u32>(args.last, from) == slot; };
    for_matches(args.last.rows, wanted, [&](u32 from, u32 rank) {
        const u32 token = at<u32>(args.tokens, from);
        if (token >= args.slots.rows) return complain(args.report, SOURCE_ROW, token, args.slots.rows);
        const u32* slots = row<u32>(args.slots, token);
        // How many ranks of the token come before this one.
        u32 ranks = 0, place = 0;
        while (place < k && slots[place] < args.block_starts.rows) {
            const u32 block = at<u32>(args.block_starts, slots[place]);
            while (stays(args, slots, place, block)) ++place;
            if (slots[place - 1] >= slot) break;
            ++ranks;
        }
        u32* sums = row<u32>(args.sums, token);
        if (ranks >= args.sums.width) return complain(args.report, RANKS_OF_TOKEN, token, args.sums.width);
        sums[ranks] = start + rank;
        const u32 next = place_of(slots, k, slot) + 1;
        if (next == k || slots[next] == NONE)
            for (u32 rest = ranks + 1; rest < args.sums.width; ++rest) sums[rest] = NONE;
    });
}
