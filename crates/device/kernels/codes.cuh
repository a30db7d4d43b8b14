// How weights lie that are held in codes, and how codes become the bf16 numbers that they mean, in registers that multiply.
//
// A weight lies in *bricks* of 64 packed rows by 64 k-values, those of one row of bricks one after the other, so that a tile is
// a single stream. A brick is its codes, then its scales:
//
//   codes of row 0: lane 0, lane 1, lane 2, lane 3 | row 1 | ... | row 63 | scales of row 0 | row 1 | ...
//
// Lane q of four has what mma.sync and wgmma want of it in one load: of each of the four steps of 16 along k the pairs 2q, 2q + 1 (half
// 0) and 2q + 8, 2q + 9 (half 1). Which bits of its words those are the codings below say, and `cuda/bricks.rs` for the host.
#pragma once
#include "tensor.cuh"

constexpr u32 BRICK = 64; // rows of a brick, and its columns

// a * b + c of two bf16, rounded once.
__device__ __forceinline__ u32 fused_pair(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
constexpr u32 ONE = 0x3f803f80, NOTHING = 0x80008000; // twice 1, and -0, which leaves a sum as it is

// Codings: what codes mean before their scale, exact in bf16. A lane's sixteen codes of a row are WORDS words.

// FP4 e2m1, times 2^-126: sign, exponent and fraction in their places. Code i of either half of a word is step i / 2, half
// i % 2 of two steps. The bits of three of the codes lie such that a shift brings them all there; those of the last one are
// what is left, 14, 13, 11 and 10.
struct E2m1 {
    static constexpr u32 WORDS = 2;
    static __device__ __forceinline__ u32 pair(const u32 (&words)[WORDS], u32 step, u32 half) {
        const u32 word = words[step / 2], i = step % 2 * 2 + half;
        if (i < 3) return (word << (3 * i)) & 0x81c081c0;
        return ((word << 1) & 0x80008000) | ((word >> 5) & 0x01000100) | ((word >> 4) & 0x00c000c0);
    }
};

// Four bits less ZERO, nibble i of either half of a word. With 128 before them they are the fraction of a bf16.
template <u32 ZERO> struct Nibble {
    static constexpr u32 WORDS = 2;
    static __device__ __forceinline__ u32 pair(const u32 (&words)[WORDS], u32 step, u32 half) {
        const u32 above = (words[step / 2] >> (step % 2 * 8 + half * 4) & 0x000f000f) | 0x43004300;
        return fused_pair(above, ONE, (0xc300 | ZERO) * 0x10001);
    }
};

// Bytes: those of half 0 in the lower byte of either half of a step's word, those of half 1 above. FP8 e4m3, times 2^-120.
struct E4m3 {
    static constexpr u32 WORDS = 4;
    static __device__ __forceinline__ u32 pair(const u32 (&words)[WORDS], u32 step, u32 half) {
        const u32 sign = half ? words[step] : words[step] << 8, rest = half ? words[step] >> 4 : words[step] << 4;
        return (sign & 0x80008000) | (rest & 0x07f007f0);
    }
};

// Signed bytes: seven bits with 128 before them, less 128 or 256.
struct Signed {
    static constexpr u32 WORDS = 4;
    static __device__ __forceinline__ u32 pair(const u32 (&words)[WORDS], u32 step, u32 half) {
        const u32 bytes = words[step] >> (8 * half);
        return fused_pair((bytes & 0x007f007f) | 0x43004300, ONE, (bytes & 0x00800080) | 0xc300c300);
    }
};

// What makes a weight of a value, rounded to bf16 once.

// A scale in bf16: the product is exact before it is rounded.
struct Short {
    static constexpr u32 BYTES = 2;
    u32 scale;
    __device__ __forceinline__ void load(const char* at) {
        scale = *reinterpret_cast<const unsigned short*>(at) * 0x10001u;
    }
    __device__ __forceinline__ u32 of(u32 values) const { return fused_pair(values, scale, NOTHING); }
};

__device__ __forceinline__ f32 first_of(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ f32 second_of(u32 pair) { return __uint_as_float(pair & 0xffff0000); }

// A scale in float32.
struct Scaled {
    static constexpr u32 BYTES = 4;
    f32 scale;
    __device__ __forceinline__ void load(const char* at) { scale = *reinterpret_cast<const f32*>(at); }
    __device__ __forceinline__ u32 of(u32 values) const {
        return narrow_pair(first_of(values) * scale, second_of(values) * scale);
    }
};

// The same, and what is added.
struct Shifted {
    static constexpr u32 BYTES = 8;
    f32 scale, more;
    __device__ __forceinline__ void load(const char* at) {
        const float2 both = *reinterpret_cast<const float2*>(at);
        scale = both.x, more = both.y;
    }
    __device__ __forceinline__ u32 of(u32 values) const {
        return narrow_pair(fmaf(first_of(values), scale, more), fmaf(second_of(values), scale, more));
    }
};

// What one row of a warp's weights is decoded from: the lane's codes, and what makes weights of them in each of the four steps.
// Everything is read before anything is decoded, so that a warp waits for shared memory once.
template <typename Code, typename Affine> struct Row {
    u32 words[Code::WORDS];
    Affine affine[4];

    __device__ __forceinline__ void load(const char* brick, u32 row, u32 parts) {
        constexpr u32 LANE_BYTES = Code::WORDS * 4, ROW_BYTES = 4 * LANE_BYTES;
        const char* codes = brick + row * ROW_BYTES + threadIdx.x % 4 * LANE_BYTES;
        if constexpr (Code::WORDS == 2) {
            const uint2 held = *reinterpret_cast<const uint2*>(codes);
            words[0] = held.x, words[1] = held.y;
        } else {
            const uint4 held = *reinterpret_cast<const uint4*>(codes);
            words[0] = held.x, words[1] = held.y, words[2] = held.z, words[3] = held.w;
        }
        // A part is four steps, two or one.
        const char* scales = brick + BRICK * ROW_BYTES + row * parts * Affine::BYTES;
        affine[0].load(scales);
        affine[2].load(scales + parts / 2 * Affine::BYTES);
        affine[1] = affine[0], affine[3] = affine[2];
        if (parts == 4) {
            affine[1].load(scales + Affine::BYTES);
            affine[3].load(scales + 3 * Affine::BYTES);
        }
    }

    // What mma.sync and wgmma take of this row in a step, of either half.
    __device__ __forceinline__ u32 pair(u32 step, u32 half) const {
        return affine[step].of(Code::pair(words, step, half));
    }
};

// Calls run(Code, Affine) of a kind; `bricks.rs` repeats the numbers.
#define FOR_KIND(kind, run)                                                                                  \
    switch (kind) {                                                                                          \
        case 0: run(E2m1{}, Short{}); break;                                                                     \
        case 1: run(Nibble<8>{}, Short{}); break;                                                                \
        case 2: run(Nibble<0>{}, Shifted{}); break;                                                              \
        case 3: run(Signed{}, Short{}); break;                                                                   \
        case 4: run(Signed{}, Scaled{}); break;                                                                  \
        case 5: run(Signed{}, Shifted{}); break;                                                                 \
        case 6: run(E4m3{}, Short{}); break;                                                                     \
        case 7: run(E4m3{}, Scaled{}); break;                                                                    \
    }
