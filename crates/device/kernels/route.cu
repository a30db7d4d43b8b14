// The top_k best experts of a token and their weights, one warp a token; ties go to the lower number.
#include "common.cuh"

struct Args {
    Rows logits, experts, weights;
    u64 bias;   // float32 of the experts, or null
    u64 scales; // likewise
    f32 scale;
    u32 top_k;
    u32 score;        // 0 softmax, 1 sigmoid, 2 sigmoid of the best logits, 3 sparse mixer
    u32 normalise;    // chosen weights are divided by their sum
    u32 groups, kept; // 0 groups: no restriction
    u32 two_best;     // a group is judged by the sum of its two best, else by its best
    f32 epsilon;      // added to a sum of sigmoid scores
    f32 jitter;       // of a sparse mixer
    u32 padding;
};

// Larger for the better choice: by value in total order, then by the lower number.
__device__ __forceinline__ u64 rank_of(f32 value, u32 index) {
    u32 bits = __float_as_uint(value);
    bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    return u64(bits) << 32 | (~index & 0xffffffffu);
}

__device__ __forceinline__ u32 index_of(u64 rank) { return ~u32(rank); }

__device__ __forceinline__ u64 warp_best(u64 best) {
    for (int step = 16; step > 0; step >>= 1) {
        u64 other = __shfl_xor_sync(~0u, best, step);
        best = other > best ? other : best;
    }
    return best;
}

// The best of ranks[0..count], which is then taken out of the running.
__device__ __forceinline__ u32 take_best(u64* ranks, u32 count, u32 lane) {
    u64 best = 0;
    for (u32 i = lane; i < count; i += 32) best = ranks[i] > best ? ranks[i] : best;
    u32 index = index_of(warp_best(best));
    __syncwarp();
    if (lane == 0 && index < count) ranks[index] = 0;
    __syncwarp();
    return index;
}

// The weight of an expert that a sparse mixer chose: its softmax over those still in the running that are near it.
__device__ __forceinline__ f32 mixed(const f32* logits, const u64* ranks, u32 experts, u32 expert, f32 jitter, u32 lane) {
    const f32 most = logits[expert];
    f32 total = 0.0f;
    for (u32 e = lane; e < experts; e += 32) {
        if (ranks[e] == 0 && e != expert) continue;
        const f32 behind = (most - logits[e]) / fmaxf(fabsf(logits[e]), most);
        if (!(behind > 2.0f * jitter)) total += expf(logits[e] - most); // also where it is a NaN, of equal logits of 0
    }
    return 1.0f / warp_sum(total);
}

extern "C" __global__ void __launch_bounds__(32) route_f32_f32(const __grid_constant__ Args args) {
    take_turn();
    // Ranks of the experts, ranks of the groups, then scores and preferences.
    extern __shared__ u64 shared[];
    const u32 lane = threadIdx.x, t = blockIdx.x, experts = args.logits.width;
    u64* ranks = shared;
    u64* judged = ranks + experts;
    f32* scores = reinterpret_cast<f32*>(judged + args.groups);
    f32* preference = scores + experts;
    const f32* logits = row<f32>(args.logits, t);
    const f32* bias = reinterpret_cast<const f32*>(args.bias);

    if (args.score == 1 || args.score == 2) {
        for (u32 e = lane; e < experts; e += 32) scores[e] = sigmoid(logits[e]);
    } else {
        f32 most = __uint_as_float(0xff800000u);
        for (u32 e = lane; e < experts; e += 32) most = fmaxf(most, logits[e]);
        most = warp_max(most);
        f32 total = 0.0f;
        for (u32 e = lane; e < experts; e += 32) {
            scores[e] = expf(logits[e] - most);
            total += scores[e];
        }
        total = warp_sum(total);
        for (u32 e = lane; e < experts; e += 32) scores[e] /= total;
    }
    for (u32 e = lane; e < experts; e += 32) {
        const f32 compared = args.score < 2 ? scores[e] : logits[e];
        preference[e] = bias ? compared + bias[e] : compared;
    }
    __syncwarp();

    for (u32 e = lane; e < experts; e += 32) ranks[e] = rank_of(preference[e], e);
    if (args.groups) {
        const u32 size = experts / args.groups;
        for (u32 g = lane; g < args.groups; g += 32) {
            // The two best of the group, by value.
            u64 first = 0, second = 0;
            for (u32 e = g * size; e < (g + 1) * size; ++e) {
                u64 rank = rank_of(preference[e], e);
                if (rank > first) {
                    second = first;
                    first = rank;
                } else if (rank > second) {
                    second = rank;
                }
            }
            f32 judgement = preference[index_of(first)];
            if (args.two_best && second) judgement += preference[index_of(second)];
            judged[g] = rank_of(judgement, g);
        }
        __syncwarp();
        for (u32 kept = 0; kept < args.kept; ++kept) take_best(judged, args.groups, lane);
        // Groups still in the running were not among the best kept ones.
        for (u32 e = lane; e < experts; e += 32)
            if (judged[e / size] != 0) ranks[e] = 0;
    }
    __syncwarp();

    u32* chosen = row<u32>(args.experts, t);
    f32* weights = row<f32>(args.weights, t);
    f32 total = 0.0f;
    for (u32 slot = 0; slot < args.top_k; ++slot) {
        u32 expert = take_best(ranks, experts, lane);
        // Out of range only if nothing was left, which the shapes exclude.
        f32 weight = expert < experts ? scores[expert] : 0.0f;
        if (args.score == 3 && expert < experts) weight = mixed(logits, ranks, experts, expert, args.jitter, lane);
        if (lane == 0) {
            chosen[slot] = expert;
            weights[slot] = weight;
        }
        total += weight;
    }
    __syncwarp();
    f32 divisor = !args.normalise ? 1.0f : args.score == 1 || args.score == 2 ? total + args.epsilon : total;
    for (u32 slot = lane; slot < args.top_k; slot += 32) {
        const f32 weight = weights[slot] / divisor * args.scale;
        weights[slot] = args.scales ? weight * reinterpret_cast<const f32*>(args.scales)[chosen[slot]] : weight;
    }
}
