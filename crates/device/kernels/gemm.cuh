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
