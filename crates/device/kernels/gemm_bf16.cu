// Products of bf16 rows and bf16 weights on the tensor cores, summed in float32, for every processor since sm_80.
//
// A block holds tiles of DEPTH k-values in shared memory, STAGES of them in flight by cp.async, and multiplies them
// by mma.m16n8k16. Every output is one chain of these over k in steps of 16 from zero on, in every variant: its
// bits do not depend on the tile. On Hopper, wgmma in `gemm_hopper.cu` gives the same bits as well.
#include "gemm_mma.cuh"

// TILE_M x TILE_N outputs a block, shared by DOWN x ACROSS warps.
template <typename Y, bool GATED, u32 TILE_M, u32 TILE_N, u32 DOWN, u32 ACROSS, u32 STAGES>
__device__ __forceinline__ void gemm(const GemmArgs& args) {
    constexpr u32 BLOCK = DOWN * ACROSS * 32;
    constexpr u32 WARP_M = TILE_M / DOWN, WARP_N = TILE_N / ACROSS;
    constexpr u32 STEPS_M = WARP_M / 16, STEPS_N = WARP_N / 8;
    extern __shared__ __align__(128) bf16 shared[];
    bf16* xs = shared;
    bf16* ws = shared + STAGES * TILE_M * DEPTH;
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 warp_m = warp / ACROSS * WARP_M, warp_n = warp % ACROSS * WARP_N;
    const u32 stages = (args.k + DEPTH - 1) / DEPTH;

    const u32 tiles = tiles_of<TILE_M, TILE_N>(args);

    for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const Tile at = locate<TILE_M, TILE_N>(args, tile);
        const Loader<TILE_M, BLOCK> x(reinterpret_cast<const bf16*>(at.part.x), at.part.x_stride, at.m, at.part.rows);
        const Loader<TILE_N, BLOCK> w(reinterpret_cast<const bf16*>(at.part.weight), args.weight_stride, at.n, at.part.n);
        const auto fetch = [&](u32 stage) {
            if (stage < stages) {
                const u32 slot = stage % STAGES, depth = stage * DEPTH;
                x.fetch(xs + slot * TILE_M * DEPTH, depth, args.k, args.vectors);
                w.fetch(ws + slot * TILE_N * DEPTH, depth, u32(args.weight_stride), true);
            }
            copies_commit();
        };
        f32 sums[STEPS_M][STEPS_N][4] = {};
        for (u32 stage = 0; stage + 1 < STAGES; ++stage) fetch(stage);
        for (u32 stage = 0; stage < stages; ++stage) {
            copies_wait<STAGES - 2>();
            __syncthreads();
            fetch(stage + STAGES - 1);
            const bf16* x_tile = xs + stage % STAGES * TILE_M * DEPTH;
            const bf16* w_tile = ws + stage % STAGES * TILE_N * DEPTH;
#pragma unroll
            for (u32 step = 0; step < DEPTH / 16; ++step) {
                u32 a[STEPS_M][4], b[STEPS_N / 2][4];
#pragma unroll
                for (u32 i = 0; i < STEPS_M; ++i)
                    load_matrices(a[i], shared_address(x_tile + place(warp_m + i * 16 + lane % 16, step * 2 + lane / 16)));
#pragma unroll
                for (u32 j = 0; j < STEPS_N / 2; ++j)
                    load_matrices(b[j], shared_address(w_tile + place(warp_n + j * 16 + lane % 8 + lane / 16 * 8,
                                                                      step * 2 + lane / 8 % 2)));
#pragma unroll
                for (u32 i = 0; i < STEPS_M; ++i)
#pragma unroll
                    for (u32 j = 0; j < STEPS_N; ++j) multiply(sums[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
            }
        }
        finish<Y, STEPS_M, STEPS_N>(at.part, at.m + warp_m, at.n + warp_n, GATED, sums);
        // The next tile overwrites what slower warps may still be reading.
        __syncthreads();
    }
}

// The variants: tile, warps down and across, stages, blocks on a multiprocessor. `kernels.rs` repeats the tiles and
// stages for the host.
#define VARIANT(size, Y, TILE_M, TILE_N, DOWN, ACROSS, STAGES, RESIDENT)                                     \
    extern "C" __global__ void __launch_bounds__(DOWN * ACROSS * 32, RESIDENT)                               \
        gemm_##size##_bf16_##Y(const __grid_constant__ GemmArgs args) {                                      \
        take_turn();                                                                                         \
        gemm<Y, false, TILE_M, TILE_N, DOWN, ACROSS, STAGES>(args);                                          \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(DOWN * ACROSS * 32, RESIDENT)                               \
        gated_##size##_bf16_##Y(const __grid_constant__ GemmArgs args) {                                     \
        take_turn();                                                                                         \
        gemm<Y, true, TILE_M, TILE_N, DOWN, ACROSS, STAGES>(args);                                           \
    }

VARIANT(large, bf16, 128, 256, 2, 4, 3, 1)
VARIANT(large, f32, 128, 256, 2, 4, 3, 1)
VARIANT(square, bf16, 128, 128, 2, 4, 3, 2)
VARIANT(square, f32, 128, 128, 2, 4, 3, 2)
VARIANT(middle, bf16, 64, 128, 2, 4, 4, 2)
VARIANT(middle, f32, 64, 128, 2, 4, 4, 2)
VARIANT(small, bf16, 16, 64, 1, 4, 6, 3)
VARIANT(small, f32, 16, 64, 1, 4, 6, 3)
