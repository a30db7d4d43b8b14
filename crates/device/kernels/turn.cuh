// Rotation of a pair of elements.
#pragma once
#include "common.cuh"

// (a, b) -> (a cos - b sin, b cos + a sin). Where a product is rounded is written out: several kernels give the same bits.
__device__ __forceinline__ void turn(f32& a, f32& b, f32 cos, f32 sin) {
    const f32 x = a, y = b;
    a = __fmaf_rn(x, cos, -__fmul_rn(y, sin));
    b = __fmaf_rn(y, cos, __fmul_rn(x, sin));
}
