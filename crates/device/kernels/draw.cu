// Numbers that follow from their places (`draw.cuh`).
#include "draw.cuh"

template <typename X, typename Y> __device__ void draw(const Args& args) {
    const u32 n = blockIdx.x * THREADS + threadIdx.x;
    if (n >= args.width) return;
    for (u32 r = blockIdx.y; r < args.rows; r += gridDim.y)
        reinterpret_cast<Y*>(args.out)[place(args, r) + n] = narrow<Y>(number<X>(args, r, n));
}

KERNEL(draw, Args, bf16, f32)
KERNEL(draw, Args, bf16, bf16)
