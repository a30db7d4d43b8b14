// Rows of e4m3 codes that share a scale by GROUPs of neighbours.
#pragma once
#include "e4m3.cuh"

constexpr u32 GROUP = 128;
constexpr f32 LEAST = 1e-4f;

// The larger magnitude; a NaN stays.
__device__ __forceinline__ f32 larger(f32 most, f32 value) {
    const f32 size = fabsf(value);
    return size > most || size != size ? size : most;
}
