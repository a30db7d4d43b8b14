// In every head: (a, b) -> (a cos - b sin, b cos + a sin), in place; a thread turns one pair.
#include "common.cuh"

// `pairs` is a view whose width counts pairs over all heads.
struct Args { Rows x, rope_table, pairs; u32 head_width, first, interleaved, padding; };

template <typename X, typename Y> __device__ void rotate(const Args& args) {
    const u32 half = args.rope_table.width / 2;
    FOR_ELEMENTS(args.pairs, t, n) {
        u32 head = n / half, i = n % half;
        X* turned = row<X>(args.x, t) + head * args.head_width + args.first;
        X* a = turned + (args.interleaved ? 2 * i : i);
        X* b = turned + (args.interleaved ? 2 * i + 1 : i + half);
        f32 cos = row<f32>(args.rope_table, t)[i], sin = row<f32>(args.rope_table, t)[i + half];
        f32 x = wide(*a), y = wide(*b);
        *a = narrow<X>(x * cos - y * sin);
        *b = narrow<X>(y * cos + x * sin);
    }
}

KERNEL(rotate, Args, f32, f32)
KERNEL(rotate, Args, bf16, bf16)
