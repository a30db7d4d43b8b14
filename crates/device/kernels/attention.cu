// Attention in float32, one block a (token, head): for float32, and for heads that no kernel on the tensor cores takes.
#include "attention.cuh"

constexpr u32 ATTENTION_THREADS = 128;
constexpr u32 WARPS = ATTENTION_THREADS / 32;

// C is what keys and values are cached in, Y what queries and outputs are in.
template <typename C, typename Y> __device__ void attention(const Args& args) {
    extern __shared__ f32 shared[];
    __shared__ u32 slots[STEP];
    __shared__ f32 scores[STEP];
    __shared__ u32 sequence, outside;
    const u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const u32 t = blockIdx.x / args.heads, head = blockIdx.x % args.heads;
    const u32 kv_head = head / (args.heads / args.kv_heads);
    const u32 key_width = args.keys.width / args.kv_heads, value_width = args.values.width / args.kv_heads;
    f32* q = shared;
    f32* sums = shared + key_width;

    if (blockIdx.x == 0) check_starts(args);
    if (thread == 0) sequence = NONE, outside = 0;
    __syncthreads();
    for (u32 b = thread; b + 1 < args.starts.rows; b += ATTENTION_THREADS)
        if (at<u32>(args.starts, b) <= t && t < at<u32>(args.starts, b + 1)) sequence = b;
    const Y* query = row<Y>(args.q, t) + head * key_width;
    for (u32 n = thread; n < key_width; n += ATTENTION_THREADS) q[n] = wide(query[n]);
    for (u32 n = thread; n < value_width; n += ATTENTION_THREADS) sums[n] = 0.0f;
    __syncthreads();
    if (sequence == NONE) return;

    const u32 position = at<u32>(args.positions, t);
    if (!stands(args, position)) return;
    const u32* blocks = row<u32>(args.blocks, sequence);
    const u32 first = first_seen(args, position + 1);
    // A sink is a score that came before all others, of a value that is zero.
    f32 most = args.sinks ? sink_of(args, head) : minus_infinity(), total = args.sinks ? 1.0f : 0.0f;
    for (u32 base = first / STEP * STEP; base <= position; base += STEP) {
        const u32 from = first > base ? first - base : 0;
        const u32 to = position - base < STEP ? position - base + 1 : STEP;
        for (u32 i = warp; i < STEP; i += WARPS) {
            f32 score = minus_infinity();
            if (from <= i && i < to) {
                const u32 block = (base + i) / args.block_size;
                const u64 slot = u64(blocks[block]) * args.block_size + (base + i) % args.block_size;
                if (u64(blocks[block]) * args.block_size + args.block_size > args.keys.rows) {
                    if (lane == 0) {
                        complain(args.report, BLOCK_OUTSIDE, block, sequence);
                        outside = 1;
                    }
                    continue;
                }
                const C* key = row<C>(args.keys, u32(slot)) + kv_head * key_width;
                f32 dot = 0.0f;
                for (u32 n = lane; n < key_width; n += 32) dot += q[n] * wide(key[n]);
                score = warp_sum(dot) * args.scale;
                if (lane == 0) slots[i] = u32(slot);
            }
            if (lane == 0) scores[i] = score;
        }
        __syncthreads();
        if (outside) return;

        const f32 low = scores[lane], high = scores[lane + 32];
        const f32 now = fmaxf(most, warp_max(fmaxf(low, high)));
        const f32 kept = expf(most - now);
        total = total * kept + warp_sum(expf(low - now) + expf(high - now));
        most = now;
        __syncthreads();
        if (thread < STEP) scores[thread] = expf(scores[thread] - now);
        __syncthreads();
        for (u32 n = thread; n < value_width; n += ATTENTION_THREADS) {
            f32 sum = sums[n] * kept;
#pragma unroll 8
            for (u32 i = from; i < to; ++i)
                sum += scores[i] * wide(row<C>(args.values, slots[i])[kv_head * value_width + n]);
            sums[n] = sum;
        }
        __syncthreads();
    }
    Y* out = row<Y>(args.out, t) + head * value_width;
    for (u32 n = thread; n < value_width; n += ATTENTION_THREADS) out[n] = narrow<Y>(sums[n] / total * args.value_scale);
}

#define ATTENTION(C, Y)                                                                                      \
    extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS)                                          \
        attention_##C##_##Y(const __grid_constant__ Args args) {                                             \
        take_turn();                                                                                         \
        attention<C, Y>(args);                                                                               \
    }

ATTENTION(f32, f32)
ATTENTION(bf16, bf16)
ATTENTION(e4m3, f32)
ATTENTION(e4m3, bf16)
