// What products of FP8 rows and FP8 weights share, of many rows and of few.
//
// A row is its codes, then its scales; a weight is its TensorMap, then its scales, block rows by blocks of k.
#pragma once
#include "scaled.cuh"
#include "hopper.cuh"

constexpr u32 SCALED = 128;    // weights along n that share a scale, and values of k
constexpr u32 PIECE_ROWS = 64; // packed weight rows that TMA brings at once

// What the outputs are stored as: bf16, float32, or codes and scales as rows have.
enum Out { NARROW, WIDE, CODES };

__device__ __forceinline__ void store_shared(u32 addr, float value) { asm volatile("st.shared.f32 [%0], %1;" ::"r"(addr), "f"(value) : "memory"); }
__device__ __forceinline__ void store_shared(u32 addr, u16 value) { asm volatile("st.shared.u16 [%0], %1;" ::"r"(addr), "h"(value) : "memory"); }
__device__ __forceinline__ float load_shared(u32 addr) {
    float value;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(addr) : "memory");
    return value;
}

// value / scale, rounded as IEEE division is: `inverse` is the scale's inverse, rounded to nearest. Of zeros the sum loses the sign.
__device__ __forceinline__ float quotient(float value, float scale, float inverse) {
    const float near = __fmul_rn(value, inverse);
    return copysignf(__fmaf_rn(__fmaf_rn(-near, scale, value), inverse, near), value);
}

// The map was copied to the GPU, not handed over as an argument: TMA may hold what the address held before.
__device__ __forceinline__ void open_map(u64 weight) {
    asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" ::"l"(weight) : "memory");
}

__device__ __forceinline__ const float* weight_scales_of(u64 weight) { return reinterpret_cast<const float*>(weight + sizeof(TensorMap)); }
