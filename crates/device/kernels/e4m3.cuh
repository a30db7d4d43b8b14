// FP8 e4m3: a sign, four bits of exponent (bias 7), three of fraction; 0x7f and 0xff are NaN.
#pragma once
#include "common.cuh"

struct e4m3 { unsigned char bits; };

constexpr f32 E4M3_LARGEST = 448.0f;

// The codes nearest to two values, the first in the lower byte, ties to even; what is beyond 448 becomes 448.
__device__ __forceinline__ u32 encode(f32 low, f32 high) {
#if __CUDA_ARCH__ >= 890
    unsigned short codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(high), "f"(low));
    return codes;
#else
    const auto code = [](f32 value) {
        const u32 sign = __float_as_uint(value) >> 24 & 0x80u;
        const f32 size = fabsf(value);
        if (size != size) return sign | 0x7fu;
        if (size >= E4M3_LARGEST) return sign | 0x7eu;
        // Below 2^-6 codes are multiples of 2^-9.
        if (size < 1.0f / 64.0f) return sign | u32(rintf(size * 512.0f));
        const u32 bits = __float_as_uint(size);
        return sign | ((bits + 0x7ffffu + (bits >> 20 & 1u)) >> 20) - (120u << 3);
    };
    return code(low) | code(high) << 8;
#endif
}

// What a code stands for: its bits are those of a float32 whose exponent counts from elsewhere.
__device__ __forceinline__ f32 decode(u32 code) {
    if ((code & 0x7fu) == 0x7fu) return __uint_as_float(0x7fffffffu);
    return __uint_as_float((code & 0x80u) << 24 | (code & 0x7fu) << 20) * 0x1p120f;
}

__device__ __forceinline__ f32 wide(e4m3 value) { return decode(value.bits); }

// The numbers of two neighbouring codes, which are in the second and the fourth byte of `bytes`, in bf16: as above, with three
// bits less to go. There is no NaN among codes of a cache.
__device__ __forceinline__ u32 decode_pair(u32 bytes) {
    constexpr u32 SCALE = 0x7b807b80, NOTHING = 0x80008000; // twice 2^120, and -0, which leaves a product as it is
    u32 pair;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"((bytes & 0x80008000) | (bytes >> 4 & 0x07f007f0)), "r"(SCALE), "r"(NOTHING));
    return pair;
}

// The numbers of eight codes.
__device__ __forceinline__ uint4 decode_piece(uint2 codes) {
    return make_uint4(decode_pair(__byte_perm(codes.x, 0, 0x1404)), decode_pair(__byte_perm(codes.x, 0, 0x3424)),
                      decode_pair(__byte_perm(codes.y, 0, 0x1404)), decode_pair(__byte_perm(codes.y, 0, 0x3424)));
}

template <> __device__ __forceinline__ Run read<e4m3>(const e4m3* from, u32 count) {
    Run run = {};
    for (u32 j = 0; j < RUN; ++j)
        if (j < count) run.values[j] = wide(from[j]);
    return run;
}

template <> __device__ __forceinline__ void write<e4m3>(e4m3* to, const Run& run, u32 count) {
    u32 words[2];
#pragma unroll
    for (u32 i = 0; i < 2; ++i)
        words[i] = encode(run.values[4 * i], run.values[4 * i + 1]) | encode(run.values[4 * i + 2], run.values[4 * i + 3]) << 16;
    if (count == RUN && reinterpret_cast<u64>(to) % 8 == 0) {
        *reinterpret_cast<uint2*>(to) = make_uint2(words[0], words[1]);
        return;
    }
    for (u32 j = 0; j < RUN; ++j)
        if (j < count) to[j].bits = words[j / 4] >> j % 4 * 8;
}

template <> __device__ __forceinline__ void read_runs<e4m3>(Run (&runs)[RUNS], const e4m3* row, u32 n, u32 width) {
    const bool vectors = n + (RUNS - 1) * STRIDE + RUN <= width && reinterpret_cast<u64>(row) % 8 == 0;
    uint2 held[RUNS];
#pragma unroll
    for (u32 i = 0; i < RUNS; ++i)
        if (vectors) held[i] = *reinterpret_cast<const uint2*>(row + n + i * STRIDE);
#pragma unroll
    for (u32 i = 0; i < RUNS; ++i) {
        const u32 at = n + i * STRIDE;
        if (!vectors) {
            runs[i] = at < width ? read(row + at, min(width - at, RUN)) : Run{};
            continue;
        }
#pragma unroll
        for (u32 j = 0; j < RUN; ++j) runs[i].values[j] = decode((j < 4 ? held[i].x : held[i].y) >> j % 4 * 8 & 0xffu);
    }
}
