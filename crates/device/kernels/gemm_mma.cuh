// What products by mma.sync share: tiles of DEPTH k-values in shared memory, brought by cp.async, and where sums go.
//
// Every output is one chain of mma.m16n8k16 over k in steps of 16 from zero on, in every kernel and every tile size:
// its bits do not depend on them.
#pragma once
#include "gemm.cuh"
#include "tensor.cuh"

constexpr u32 DEPTH = 64;             // k-values of a stage: rows of 128 bytes
constexpr u32 CHUNKS = DEPTH * 2 / 16; // pieces of 16 bytes in such a row

// Element offset of a 16-byte piece; pieces are permuted within a row so that eight rows meet all banks.
__device__ __forceinline__ u32 place(u32 line, u32 chunk) { return line * DEPTH + ((chunk ^ (line & 7)) << 3); }

// What a thread brings of one operand: always the same 16-byte piece of every STEP-th row of a tile, so that
// addresses only move on by constants.
template <u32 LINES, u32 BLOCK> struct Loader {
    static constexpr u32 STEP = BLOCK / CHUNKS;
    static_assert(LINES % STEP == 0 && STEP % 8 == 0, "rows share their place in the permutation");

    const bf16* source; // the first row's piece at k = 0
    u64 step;           // elements from one row of the thread to the next
    u32 lines;          // rows of the operand from the thread's first on
    u32 offset;         // of the first row's piece in a stage
    u32 k;              // of the piece, within a stage

    // Rows from `first` on of [rows, ...], `stride` elements apart.
    __device__ __forceinline__ Loader(const bf16* from, u64 stride, u32 first, u32 rows) {
        const u32 line = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        source = from + (first + line) * stride + chunk * 8;
        step = STEP * stride;
        lines = rows > first + line ? rows - first - line : 0;
        offset = place(line, chunk);
        k = chunk * 8;
    }

    // k-values from `depth` on of [..., width] to a stage; zero outside of the operand.
    __device__ __forceinline__ void fetch(bf16* to, u32 depth, u32 width, bool vectors) const {
        const u32 left = width > depth + k ? min(width - depth - k, 8u) : 0;
        const bf16* from = source + depth;
        bf16* target = to + offset;
#pragma unroll
        for (u32 i = 0; i < LINES / STEP; ++i) {
            const u32 here = i * STEP < lines ? left : 0;
            // Where nothing is there, nothing is read.
            if (vectors) copy_async(shared_address(target), from, here * 2);
            else copy_slowly(target, from, here);
            from += step;
            target += STEP * DEPTH;
        }
    }
};

// Two neighbours, stored at once.
template <typename Y> struct __align__(2 * sizeof(Y)) Pair { Y first, second; };

template <typename Y>
__device__ __forceinline__ void store(const GemmPart& part, u32 m, u32 n, f32 first, f32 second) {
    if (m >= part.rows || n >= part.columns) return;
    Y* out = reinterpret_cast<Y*>(part.out) + m * part.out_stride;
    const f32* bias = reinterpret_cast<const f32*>(part.bias);
    const bool both = n + 1 < part.columns;
    if (bias) first += bias[n], second += both ? bias[n + 1] : 0.0f;
    if (both && reinterpret_cast<u64>(out + n) % sizeof(Pair<Y>) == 0) {
        *reinterpret_cast<Pair<Y>*>(out + n) = {narrow<Y>(first), narrow<Y>(second)};
        return;
    }
    out[n] = narrow<Y>(first);
    if (both) out[n + 1] = narrow<Y>(second);
}

// Stores what a warp has summed, from row m and column n of packed weights on. A lane holds two neighbouring columns of
// rows lane/4 and lane/4 + 8 of each 16 x 8 piece; the up factors of a piece of gates are in the next.
template <typename Y, u32 STEPS_M, u32 STEPS_N>
__device__ __forceinline__ void finish(const GemmPart& part, u32 first_m, u32 first_n, bool gated, const f32 (&sums)[STEPS_M][STEPS_N][4]) {
    const u32 lane = threadIdx.x % 32, fold = gated ? 2 : 1;
#pragma unroll
    for (u32 i = 0; i < STEPS_M; ++i)
#pragma unroll
        for (u32 j = 0; j < STEPS_N; ++j) {
            if (gated && j % 2) continue;
            const u32 m = first_m + i * 16 + lane / 4, n = (first_n + j * 8) / fold + lane % 4 * 2;
            f32 values[4];
#pragma unroll
            for (u32 v = 0; v < 4; ++v)
                values[v] = gated ? quick_silu(sums[i][j][v]) * sums[i][(j + 1) % STEPS_N][v] : sums[i][j][v];
            store<Y>(part, m, n, values[0], values[1]);
            store<Y>(part, m + 8, n, values[2], values[3]);
        }
}
