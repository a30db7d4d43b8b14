// Each token's experts as slots, in ascending order. A thread per pair, which counts what comes before it.
#include "common.cuh"

struct Args { Rows experts, weights, slot_of, slots, slot_weights; Report report; };

extern "C" __global__ void __launch_bounds__(THREADS) assign_f32_f32(const __grid_constant__ Args args) {
    take_turn();
    const u32 k = args.experts.width, pairs = args.experts.rows * k;
    for (u32 pair = blockIdx.x * THREADS + threadIdx.x; pair < pairs; pair += gridDim.x * THREADS) {
        const u32 token = pair / k, mine = pair % k;
        const u32* experts = row<u32>(args.experts, token);
        const u32 expert = experts[mine];
        if (expert >= args.slot_of.rows) {
            complain(args.report, EXPERT, expert, args.slot_of.rows);
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
