// What every product kernel shares: the list of parts, and which tile of which part comes next.
//
// out[m, n] = sum over k of x[m, k] * w[n, k]. A weight lies as rows of `weight_stride` elements, zero beyond k.
// Gate and up rows alternate eight by eight (gate 0..8, up 0..8, gate 8..16, ...), zero beyond their end, so that
// both factors of an output meet in one thread; `n` then counts both.
#pragma once
#include "common.cuh"

constexpr u32 OWN_PARTS = 4; // products that fit into the arguments

// One product. The twin of `launch::GemmPart`.
struct GemmPart {
    u64 x, weight, out;
    u64 bias;                 // float32 of the outputs, or null
    u64 x_stride, out_stride; // in elements
    u32 rows;
    u32 first_tile; // tiles of all parts before this one
    u32 n;          // packed weight rows
    u32 columns;    // of the output
    u32 wide;       // whether sums are stored in float32, where a kernel stores either
    u32 padding;
};

// A contiguous block of rows for one weight, in processing order. The twin of `hopper::Block`.
struct Block {
    u32 row0; // first row in the rows and out matrices
    u32 rows;
    u64 weight; // address of its TensorMap, written when the weight was loaded
};

// The twin of `launch::GemmArgs`.
struct GemmArgs {
    u64 parts; // GemmPart[part_count] in device memory; null: those here
    GemmPart own[OWN_PARTS];
    u64 weight_stride;
    u32 part_count, k;
    u32 vectors; // every x starts on 16 bytes and has a stride of whole 16 bytes
    u32 padding;
};

// The twin of `launch::CodedArgs`.
struct CodedArgs {
    GemmArgs gemm;
    u32 kind;        // which coding (`codes.cuh`)
    u32 parts;       // scales that a row of a brick has: 1, 2 or 4
    u32 brick_bytes;
    u32 gated;       // whether rows of gate and up alternate
    u32 stages;      // of the ring of `gemm_thin_coded.cu`
    u32 padding;
};

__device__ __forceinline__ const GemmPart* parts_of(const GemmArgs& args) {
    return args.parts ? reinterpret_cast<const GemmPart*>(args.parts) : args.own;
}

// Rows and columns where a tile starts; tiles of one part go down the rows first, so that its weights are read
// once from memory.
struct Tile {
    GemmPart part;
    u32 m, n;
};

template <u32 TILE_M, u32 TILE_N> __device__ __forceinline__ u32 tiles_of(const GemmArgs& args) {
    const GemmPart& last = parts_of(args)[args.part_count - 1];
    return last.first_tile + (last.rows + TILE_M - 1) / TILE_M * ((last.n + TILE_N - 1) / TILE_N);
}

template <u32 TILE_M, u32 TILE_N> __device__ __forceinline__ Tile locate(const GemmArgs& args, u32 tile) {
    Tile found;
    const GemmPart* parts = parts_of(args);
    u32 low = 0, high = args.part_count;
    while (high - low > 1) {
        u32 middle = (low + high) / 2;
        if (parts[middle].first_tile <= tile) low = middle;
        else high = middle;
    }
    found.part = parts[low];
    const u32 down = (found.part.rows + TILE_M - 1) / TILE_M, index = tile - found.part.first_tile;
    found.m = index % down * TILE_M;
    found.n = index / down * TILE_N;
    return found;
}

// Where a tile starts.
struct Place {
    const GemmPart& part;
    u32 m, n;
};

// The tile of a list of parts that is the `index`-th, by a whole warp at once: its lanes look at 32 parts each time.
template <u32 ROWS, u32 COLUMNS> __device__ __forceinline__ Place find(const GemmArgs& args, u32 index) {
    const GemmPart* parts = parts_of(args);
    u32 through = 0; // parts that start at or before the tile: the last of them has it
    for (u32 first = 0; first < args.part_count; first += 32) {
        const u32 part = first + threadIdx.x % 32;
        through += __popc(__ballot_sync(~0u, part < args.part_count && parts[part].first_tile <= index));
    }
    const GemmPart& part = parts[through - 1];
    const u32 down = (part.rows + ROWS - 1) / ROWS, at = index - part.first_tile;
    return {part, at % down * ROWS, at / down * COLUMNS};
}

// Stores sixteen channels of a transposed product, from where a tile starts on, of up to ROWS rows. A lane holds two neighbouring rows
// of channels lane/4 and lane/4 + 8: with gates, the second are their up factors.
template <typename Y, bool GATED, u32 ROWS>
__device__ __forceinline__ void store_transposed(const f32 (&sums)[ROWS / 8][4], const Place& tile) {
    const f32* bias = reinterpret_cast<const f32*>(tile.part.bias);
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (u32 j = 0; j < ROWS / 8; ++j)
#pragma unroll
        for (u32 v = 0; v < 2; ++v) {
            const u32 m = tile.m + j * 8 + lane % 4 * 2 + v;
            if (m >= tile.part.rows) continue;
            Y* out = reinterpret_cast<Y*>(tile.part.out) + m * tile.part.out_stride;
            if constexpr (GATED) {
                const u32 n = tile.n / 2 + lane / 4;
                if (n < tile.part.columns) out[n] = narrow<Y>(quick_silu(sums[j][v]) * sums[j][v + 2]);
            } else {
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    const u32 n = tile.n + half * 8 + lane / 4;
                    const f32 sum = sums[j][v + 2 * half];
                    if (n < tile.part.columns) out[n] = narrow<Y>(bias ? sum + bias[n] : sum);
                }
            }
        }
}
