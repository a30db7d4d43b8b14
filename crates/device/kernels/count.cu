// Token histograms over slots: assignments, rows by first and by last slot. A block per slot.
#include "matches.cuh"

struct Args { Rows slots, block_starts, counts; Report report; };

BLOCK_PER_BIN(count) {
    take_turn();
    const u32 slot = blockIdx.x, k = args.slots.width, pairs = args.slots.rows * k;
    const u32 block = at<u32>(args.block_starts, slot);
    u32 all = 0, first = 0, last = 0;
    for (u32 pair = threadIdx.x; pair < pairs; pair += WARPS * 32) {
        const u32* slots = row<u32>(args.slots, pair / k);
        const u32 place = pair % k, other = slots[place];
        if (slot == 0 && other >= args.block_starts.rows && other != NONE)
            complain(args.report, SLOT, other, args.block_starts.rows);
        if (other != slot) continue;
        all += 1;
        // Slots ascend: those of another rank lie before this rank's first, or after its last.
        first += place == 0 || slots[place - 1] < block;
        const u32 next = place + 1 < k ? slots[place + 1] : NONE;
        last += next >= args.block_starts.rows || at<u32>(args.block_starts, next) != block;
    }
    all = block_total(all), first = block_total(first), last = block_total(last);
    if (threadIdx.x == 0) {
        row<u32>(args.counts, 0)[slot] = all;
        row<u32>(args.counts, 1)[slot] = first;
        row<u32>(args.counts, 2)[slot] = last;
    }
}
