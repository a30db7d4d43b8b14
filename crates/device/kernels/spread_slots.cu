// The metadata of all tokens for every rank, and where each token's sums come back. A thread per rank and token.
#include "matches.cuh"

struct Args { Rows slots, weights, rank_starts, metadata, sums; Report report; };

extern "C" __global__ void __launch_bounds__(THREADS) spread_slots_f32_f32(const __grid_constant__ Args args) {
    take_turn();
    const u32 k = args.slots.width, tokens = args.slots.rows, ranks = args.rank_starts.rows - 1;
    const u32 all = at<u32>(args.rank_starts, ranks);
    for (u32 to = blockIdx.x * THREADS + threadIdx.x; to < ranks * tokens; to += gridDim.x * THREADS) {
        const u32 rank = to / tokens, token = to % tokens;
        const u32* slots = row<u32>(args.slots, token);
        const f32* weights = row<f32>(args.weights, token);
        u32* metadata = row<u32>(args.metadata, to);
        u32* sums = row<u32>(args.sums, token);
        const u32 start = at<u32>(args.rank_starts, rank);
        const u32 from = place_of(slots, k, start), behind = place_of(slots, k, at<u32>(args.rank_starts, rank + 1));
        for (u32 place = 0; place < k; ++place) {
            const bool used = from + place < behind;
            metadata[place] = used ? slots[from + place] - start : NONE;
            metadata[k + place] = used ? __float_as_uint(weights[from + place]) : 0;
        }
        const u32 next = behind < k ? slots[behind] : NONE;
        if (rank + 1 == ranks && next != NONE) complain(args.report, SLOT, next, all);
        // How many ranks of the token come before this one.
        u32 before = 0;
        for (u32 place = 0, other = 0; place < from; ++before) {
            while (slots[place] >= at<u32>(args.rank_starts, other + 1)) ++other;
            while (place < from && slots[place] < at<u32>(args.rank_starts, other + 1)) ++place;
        }
        if (from < behind) {
            if (before >= args.sums.width) complain(args.report, RANKS_OF_TOKEN, token, args.sums.width);
            else sums[before] = to;
        }
        // Behind the last, or where there is none.
        if (next == NONE && (from < behind || (rank == 0 && from == 0)))
            for (u32 rest = before + (from < behind); rest < args.sums.width; ++rest) sums[rest] = NONE;
    }
}
