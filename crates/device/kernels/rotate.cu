// In every head: (a, b) -> (a cos - b sin, b cos + a sin), in place; a thread turns a run of pairs.
#include "turn.cuh"

// `pairs` is a view whose width counts pairs over all heads.
struct Args { Rows x, rope_table, pairs; u32 head_width, first, interleaved, padding; };

template <typename X, typename Y> __device__ void rotate(const Args& args) {
    const u32 half = args.rope_table.width / 2;
    FOR_RUNS(args.pairs, t, n, count) {
        const f32* table = row<f32>(args.rope_table, t);
        if (half % RUN == 0) {
            // All pairs of a run are of one head.
            const u32 i = n % half;
            X* head = row<X>(args.x, t) + n / half * args.head_width + args.first;
            X* one = head + (args.interleaved ? 2 * i : i);
            X* other = args.interleaved ? one + RUN : one + half;
            Run low = read(one, RUN), high = read(other, RUN);
            const Run cos = read(table + i, RUN), sin = read(table + half + i, RUN);
#pragma unroll
            for (u32 j = 0; j < RUN; ++j) {
                if (!args.interleaved) turn(low.values[j], high.values[j], cos.values[j], sin.values[j]);
                else if (j < RUN / 2) turn(low.values[2 * j], low.values[2 * j + 1], cos.values[j], sin.values[j]);
                else turn(high.values[2 * j - RUN], high.values[2 * j - RUN + 1], cos.values[j], sin.values[j]);
            }
            write(one, low, RUN);
            write(other, high, RUN);
            continue;
        }
        for (u32 pair = n; pair < n + count; ++pair) {
            const u32 i = pair % half;
            X* head = row<X>(args.x, t) + pair / half * args.head_width + args.first;
            X* a = head + (args.interleaved ? 2 * i : i);
            X* b = head + (args.interleaved ? 2 * i + 1 : i + half);
            f32 x = wide(*a), y = wide(*b);
            turn(x, y, table[i], table[i + half]);
            *a = narrow<X>(x);
            *b = narrow<X>(y);
        }
    }
}

KERNEL(rotate, Args, f32, f32)
KERNEL(rotate, Args, bf16, bf16)
