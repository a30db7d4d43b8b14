// tokens[m] = the column of the largest logit of row m, the lowest of equal ones. A row with a NaN, or whose largest is
// infinite, is complained of.
#include "common.cuh"

struct Args { Rows logits, tokens; Report report; };

extern "C" __global__ void __launch_bounds__(THREADS) argmax_f32_f32(const __grid_constant__ Args args) {
    const f32* logits = row<f32>(args.logits, blockIdx.x);
    f32 most = logits[0];
    u32 best = 0;
    // Within a thread columns ascend, so the first of equal ones stays.
    for (u32 n = threadIdx.x; n < args.logits.width; n += THREADS) {
        if (logits[n] != logits[n]) complain(args.report, NOT_FINITE, blockIdx.x, 0);
        if (logits[n] > most) most = logits[n], best = n;
    }
    __shared__ f32 mosts[THREADS];
    __shared__ u32 bests[THREADS];
    mosts[threadIdx.x] = most;
    bests[threadIdx.x] = best;
    for (u32 half = THREADS / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x >= half) continue;
        const u32 other = threadIdx.x + half;
        const bool further = mosts[other] > mosts[threadIdx.x];
        const bool earlier = mosts[other] == mosts[threadIdx.x] && bests[other] < bests[threadIdx.x];
        if (further || earlier) mosts[threadIdx.x] = mosts[other], bests[threadIdx.x] = bests[other];
    }
    if (threadIdx.x != 0) return;
    if (!finite(mosts[0])) complain(args.report, NOT_FINITE, blockIdx.x, 0);
    *row<u32>(args.tokens, blockIdx.x) = bests[0];
}
