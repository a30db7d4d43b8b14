// Each token's experts as slots, in ascending order. A thread per pair, which counts what comes before it.
#include "common.cuh"

struct Args { Rows experts, weights, slot_of, slots, slot_weights, kept; Report report; u32 slotless, padding; };

constexpr u32 NONE = ~0u;

// The weights of a token's experts that have no slot, added in the order of their numbers.
__device__ __forceinline__ f32 kept_weight(const Args& args, u32 token) {
    const u32* experts = row<u32>(args.experts, token);
    f32 sum = 0.0f;
    for (u32 least = args.slot_of.rows;;) {
        u32 next = NONE, at = 0;
        for (u32 place = 0; place < args.experts.width; ++place)
            if (experts[place] >= least && experts[place] < next) next = experts[place], at = place;
        if (next == NONE) return sum;
        sum += row<f32>(args.weights, token)[at];
        least = next + 1;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) assign_f32_f32(const __grid_constant__ Args args) {
    take_turn();
    const u32 k = args.experts.width, pairs = args.experts.rows * k;
    for (u32 pair = blockIdx.x * THREADS + threadIdx.x; pair < pairs; pair += gridDim.x * THREADS) {
        const u32 token = pair / k, mine = pair % k;
        const u32* experts = row<u32>(args.experts, token);
        const u32 expert = experts[mine];
        if (expert >= args.slot_of.rows + args.slotless) {
            complain(args.report, EXPERT, expert, args.slot_of.rows + args.slotless);
            continue;
        }
        if (mine == 0 && args.slotless) *row<f32>(args.kept, token) = kept_weight(args, token);
        if (expert >= args.slot_of.rows) {
            // Its place is behind those of all slots.
            u32 place = 0;
            for (u32 other = 0; other < k; ++other) place += experts[other] < args.slot_of.rows || other < mine;
            row<u32>(args.slots, token)[place] = NONE;
            row<f32>(args.slot_weights, token)[place] = 0.0f;
            continue;
        }
        u32 sum = 0;
        for (u32 place = 0; place < k; ++place) sum += experts[place];
        const u32 replica = sum % args.slot_of.width, slot = row<u32>(args.slot_of, expert)[replica];
        u32 place = 0;
        for (u32 other = 0; other < k; ++other) {
            if (other == mine || experts[other] >= args.slot_of.rows) continue;
            const u32 beside = row<u32>(args.slot_of, experts[other])[replica];
            place += beside < slot;
            if (beside == slot && other < mine) complain(args.report, EXPERT_TWICE, token, expert);
        }
        row<u32>(args.slots, token)[place] = slot;
        row<f32>(args.slot_weights, token)[place] = row<f32>(args.weights, token)[mine];
    }
}
