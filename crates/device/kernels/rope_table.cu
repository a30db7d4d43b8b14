// out[t] = scale * growth * (cos(p * f) ..., sin(p * f) ...) with p = positions[t]
#include "common.cuh"

struct Args { Rows positions, out; u64 frequencies; f32 scale, step, rate; u32 padding; };

template <typename X, typename Y> __device__ void rope_table(const Args& args) {
    const f32* frequencies = reinterpret_cast<const f32*>(args.frequencies);
    const u32 half = args.out.width / 2;
    FOR_ELEMENTS(args.out, t, n) {
        const f32 position = f32(at<u32>(args.positions, t));
        const f32 angle = position * frequencies[n < half ? n : n - half];
        const f32 growth = args.rate == 0.0f ? 1.0f : 1.0f + args.rate * log1pf(floorf((position + 1.0f) / args.step));
        row<f32>(args.out, t)[n] = (n < half ? cosf(angle) : sinf(angle)) * (args.scale * growth);
    }
}

KERNEL(rope_table, Args, f32, f32)
