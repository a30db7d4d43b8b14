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

// The scale of codes of which the largest has this magnitude; with `powers` a power of two, the next one where it is none.
__device__ __forceinline__ f32 scale_for(f32 most, bool powers) {
    const f32 scale = __fdiv_rn(most, E4M3_LARGEST);
    return powers && finite(scale) ? __uint_as_float((__float_as_uint(scale) + 0x7fffffu) & ~0x7fffffu) : scale;
}

// The scale of the group that the lane's run is of: by the largest magnitude of the half warp's runs, and never 0.
__device__ __forceinline__ f32 scale_of(const Run& run, bool powers) {
    f32 most = LEAST;
#pragma unroll
    for (f32 value : run.values) most = larger(most, value);
#pragma unroll
    for (u32 step = 8; step > 0; step >>= 1) most = larger(most, __shfl_xor_sync(~0u, most, step));
    return scale_for(most, powers);
}

// The words of a run's codes.
struct Codes { u32 words[RUN / 4]; };

__device__ __forceinline__ Codes encode(const Run& run, f32 scale) {
    Codes codes;
#pragma unroll
    for (u32 i = 0; i < RUN; i += 4)
        codes.words[i / 4] = encode(run.values[i] / scale, run.values[i + 1] / scale) |
                             encode(run.values[i + 2] / scale, run.values[i + 3] / scale) << 16;
    return codes;
}

// A run's codes from `column` on, and the scale of the group that begins there, to a row of codes of so many numbers.
__device__ __forceinline__ void store(u32* row, u32 column, u32 width, const Codes& codes, f32 scale) {
    u32* place = row + column / 4;
    if (width - column > 4 && reinterpret_cast<u64>(place) % 8 == 0) {
        *reinterpret_cast<uint2*>(place) = make_uint2(codes.words[0], codes.words[1]);
    } else {
        place[0] = codes.words[0];
        if (width - column > 4) place[1] = codes.words[1];
    }
    if (column % GROUP == 0) row[(width + 3) / 4 + column / GROUP] = __float_as_uint(scale);
}
