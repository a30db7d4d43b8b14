// out[t] = scale * (cos(p * f) ..., sin(p * f) ...) with p = positions[t]
#include "common.cuh"

struct Args { Rows positions, out; u64 frequencies; f32 scale; u32 padding; };

template <typename X, typename Y> __device__ void rope_table(const Args& args) {
    const f32* frequencies = reinterpret_cast<const f32*>(args.frequencies);
    const u32 half = args.out.width / 2;
    FOR_ELEMENTS(args.out, t, n) {
        f32 angle = f32(at<u32>(args.positions, t)) * frequencies[n < half ? n : n - half];
        row<f32>(args.out, t)[n] = (n < half ? cosf(angle) : sinf(angle)) * args.scale;
    }
}

KERNEL(rope_table, Args, f32, f32)
