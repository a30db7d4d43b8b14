// How weights lie that are held in codes, and how codes become the bf16 numbers that they mean, in registers that multiply.
//
// A weight lies in *bricks* of 64 packed rows by 64 k-values, those of one row of bricks one after the other, so that a tile is
// a single stream. A brick is its codes, then its scales:
//
//   codes of row 0: lane 0, lane 1, lane 2, lane 3 | row 1 | ... | row 63 | scales of row 0 | row 8 | row 1 | row 9 | ...
//
// with codes of four bits those of rows 0 and 8 of lane 0, of lane 1, ... (`codes_of`). Lane q of four has what mma.sync and wgmma want of it in one load: of each of the four steps of 16 along k the pairs 2q, 2q + 1 (half
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
// (word & MASK) | more, which the assembler would make two instructions of if it saw that both are constants.
template <u32 MASK> __device__ __forceinline__ u32 masked_or(u32 word, u32 more) {
    u32 both;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(both) : "r"(word), "n"(MASK), "r"(more));
    return both;
}
constexpr u32 ONE = 0x3f803f80, NOTHING = 0x80008000; // twice 1, and -0, which leaves a sum as it is

// Codings: what codes mean before their scale, exact in bf16. A lane's sixteen codes of a row are WORDS words.

// FP4 e2m1, times 2^-126: sign, exponent and fraction in their places. Code i of either half of a word is step i / 2, half
// i % 2 of two steps. The bits of three of the codes lie such that one rotation brings them all there; those of the last one are
// in place but for the fraction, as the four cannot all lie so.
struct E2m1 {
    static constexpr u32 WORDS = 2;
    static __device__ __forceinline__ u32 pair(const u32 (&words)[WORDS], u32 step, u32 half) {
        const u32 word = words[step / 2], i = step % 2 * 2 + half;
        if (i == 3) return (word & 0x81808180) | (word >> 8 & 0x00400040);
        return (i == 0 ? word << 6 : i == 1 ? word << 2 : __funnelshift_r(word, word, 4)) & 0x81c081c0;
    }
    // The bits of a code in the lower half of a word, or of its sign in the upper one.
    static __device__ __forceinline__ u32 spread(u32 code, u32 i) {
        const u32 sign = code >> 3, rest = code & 7;
        if (i == 3) return sign << 15 | rest >> 1 << 7 | (rest & 1) << 14;
        return i == 0 ? sign << 9 | rest : i == 1 ? sign << 13 | rest << 4 : sign << 19 | rest << 10;
    }
};

// Four bits less ZERO, nibble i of either half of a word. With 128 before them they are the fraction of a bf16.
template <u32 ZERO> struct Nibble {
    static constexpr u32 WORDS = 2;
    static __device__ __forceinline__ u32 pair(const u32 (&words)[WORDS], u32 step, u32 half) {
        const u32 above = masked_or<0x000f000f>(words[step / 2] >> (step % 2 * 8 + half * 4), 0x43004300);
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
        return fused_pair(masked_or<0x007f007f>(bytes, 0x43004300), ONE, masked_or<0x00800080>(bytes, 0xc300c300));
    }
};

// What makes a weight of a value, rounded to bf16 once.

// A scale in bf16: the product is exact before it is rounded. It lies in either half of a word, which costs no instruction.
struct Short {
    static constexpr u32 BYTES = 2;
    u32 word;
    bool high;
    // Those of two rows, `parts` of either: a part is four steps or two.
    static __device__ __forceinline__ void load(Short (&affine)[2][4], const char* from, u32 parts) {
        uint2 held;
        if (parts == 2) {
            held = *reinterpret_cast<const uint2*>(from);
        } else {
            const u32 both = *reinterpret_cast<const u32*>(from);
            held = make_uint2(__byte_perm(both, 0, 0x1010), __byte_perm(both, 0, 0x3232));
        }
#pragma unroll
        for (u32 step = 0; step < 4; ++step) affine[0][step] = {held.x, step > 1}, affine[1][step] = {held.y, step > 1};
    }
    __device__ __forceinline__ u32 of(u32 values) const {
        u32 d;
        if (high)
            asm("{\n .reg .b16 low, high;\n .reg .b32 both;\n mov.b32 {low, high}, %2;\n mov.b32 both, {high, high};\n"
                " fma.rn.bf16x2 %0, %1, both, %3;\n}" : "=r"(d) : "r"(values), "r"(word), "r"(NOTHING));
        else
            asm("{\n .reg .b16 low, high;\n .reg .b32 both;\n mov.b32 {low, high}, %2;\n mov.b32 both, {low, low};\n"
                " fma.rn.bf16x2 %0, %1, both, %3;\n}" : "=r"(d) : "r"(values), "r"(word), "r"(NOTHING));
        return d;
    }
};

// Other scales of two rows, one by one; a part may be one step, too.
template <typename Affine> __device__ __forceinline__ void load_each(Affine (&affine)[2][4], const char* from, u32 parts) {
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        const char* scales = from + i * parts * Affine::BYTES;
        affine[i][0].load(scales);
        affine[i][2].load(scales + parts / 2 * Affine::BYTES);
        affine[i][1] = affine[i][0], affine[i][3] = affine[i][2];
        if (parts == 4) {
            affine[i][1].load(scales + Affine::BYTES);
            affine[i][3].load(scales + 3 * Affine::BYTES);
        }
    }
}

__device__ __forceinline__ f32 first_of(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ f32 second_of(u32 pair) { return __uint_as_float(pair & 0xffff0000); }

// A scale in float32.
struct Scaled {
    static constexpr u32 BYTES = 4;
    f32 scale;
    __device__ __forceinline__ void load(const char* at) { scale = *reinterpret_cast<const f32*>(at); }
    static __device__ __forceinline__ void load(Scaled (&affine)[2][4], const char* from, u32 parts) { load_each(affine, from, parts); }
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
    static __device__ __forceinline__ void load(Shifted (&affine)[2][4], const char* from, u32 parts) { load_each(affine, from, parts); }
    __device__ __forceinline__ u32 of(u32 values) const {
        return narrow_pair(fmaf(first_of(values), scale, more), fmaf(second_of(values), scale, more));
    }
};

// Rows of a brick that lie beside each other, r and r + 8: what a lane multiplies of sixteen rows is then in one piece. Which of all rows in
// the order in which they lie a row is:
__device__ __forceinline__ u32 order_of(u32 row) { return row / 16 * 16 + row % 8 * 2 + row / 8 % 2; }

// Where in a brick the codes of a row for a lane are: those of four bits lane by lane, those of eight row by row.
template <typename Code> __device__ __forceinline__ u32 codes_of(u32 row, u32 lane) {
    if (Code::WORDS == 2) return row / 16 * 512 + row % 8 * 64 + lane * 16 + row / 8 % 2 * 8;
    return row * 64 + lane * 16;
}

// The same of the scales of a row that has `parts`.
template <typename Code, typename Affine> __device__ __forceinline__ u32 scales_of(u32 row, u32 parts) {
    return BRICK * Code::WORDS * 16 + order_of(row) * parts * Affine::BYTES;
}

// What rows r and r + 8 of a warp's weights are decoded from: the lane's codes, and what makes weights of them in each of the four
// steps. Everything is read before anything is decoded, so that a warp waits for shared memory once.
template <typename Code, typename Affine> struct TwoRows {
    u32 words[2][Code::WORDS];
    Affine affine[2][4];

    __device__ __forceinline__ void load(const char* brick, u32 row, u32 parts) {
        const char* codes = brick + codes_of<Code>(row, threadIdx.x % 4);
        if constexpr (Code::WORDS == 2) {
            const uint4 held = *reinterpret_cast<const uint4*>(codes);
            words[0][0] = held.x, words[0][1] = held.y, words[1][0] = held.z, words[1][1] = held.w;
        } else {
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const uint4 held = *reinterpret_cast<const uint4*>(codes + i * 8 * 64);
                words[i][0] = held.x, words[i][1] = held.y, words[i][2] = held.z, words[i][3] = held.w;
            }
        }
        Affine::load(affine, brick + scales_of<Code, Affine>(row, parts), parts);
    }

    // What mma.sync and wgmma take of either row in a step, of either half.
    __device__ __forceinline__ u32 pair(u32 i, u32 step, u32 half) const {
        return affine[i][step].of(Code::pair(words[i], step, half));
    }
};

// Calls run(Code, Affine) of a kind: those with scales in bf16, those in float32, and all. `bricks.rs` repeats the numbers.
#define SHORT_KINDS(run)                          \
    case 0: run(E2m1{}, Short{}); break;          \
    case 1: run(Nibble<8>{}, Short{}); break;     \
    case 2: run(Signed{}, Short{}); break;        \
    case 3: run(E4m3{}, Short{}); break;
#define SCALED_KINDS(run)                         \
    case 4: run(Nibble<0>{}, Shifted{}); break;   \
    case 5: run(Signed{}, Scaled{}); break;       \
    case 6: run(Signed{}, Shifted{}); break;      \
    case 7: run(E4m3{}, Scaled{}); break;
#define ALL_KINDS(run) SHORT_KINDS(run) SCALED_KINDS(run)
#define FOR_KIND(KINDS, kind, run) \
    switch (kind) { KINDS(run) }
