// Products of bf16 rows and weights that are held in codes, on the tensor cores, for every processor since sm_80.
//
// A code becomes the bf16 number that it means in the registers that multiply with it, in the chain of `gemm_mma.cuh`: bits
// are those of the same product with weights in bf16. So much less is read, which is what products of few rows wait for.
#include "codes.cuh"
#include "gemm_mma.cuh"

static_assert(BRICK == DEPTH, "a stage is as deep as a brick");
constexpr u32 MOST_BYTES = 6144; // of a brick; `bricks.rs` repeats it

// TILE_M x TILE_N outputs a block, shared by DOWN x ACROSS warps.
template <typename Code, typename Affine, u32 DOWN, u32 ACROSS, u32 TILE_M, u32 TILE_N, u32 STAGES>
__device__ __forceinline__ void multiply_coded(const CodedArgs& coded) {
    constexpr u32 BLOCK = DOWN * ACROSS * 32, BRICKS = TILE_N / BRICK;
    constexpr u32 WARP_M = TILE_M / DOWN, WARP_N = TILE_N / ACROSS;
    constexpr u32 STEPS_M = WARP_M / 16, STEPS_N = WARP_N / 8;
    extern __shared__ __align__(128) char shared[];
    const GemmArgs& args = coded.gemm;
    const u32 brick_bytes = coded.brick_bytes, parts = coded.parts;
    bf16* xs = reinterpret_cast<bf16*>(shared);
    char* bricks = shared + STAGES * TILE_M * DEPTH * sizeof(bf16);
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 warp_m = warp / ACROSS * WARP_M, warp_n = warp % ACROSS * WARP_N;
    const u32 stages = (args.k + DEPTH - 1) / DEPTH;
    const u32 tiles = tiles_of<TILE_M, TILE_N>(args);

    for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const Tile at = locate<TILE_M, TILE_N>(args, tile);
        const Loader<TILE_M, BLOCK> x(reinterpret_cast<const bf16*>(at.part.x), at.part.x_stride, at.m, at.part.rows);
        const char* weight = reinterpret_cast<const char*>(at.part.weight) + u64(at.n / BRICK) * stages * brick_bytes;
        const u32 own = threadIdx.x * 16; // where a thread's pieces of a brick begin
        const auto fetch = [&](u32 stage) {
            if (stage < stages) {
                const u32 slot = stage % STAGES;
                x.fetch(xs + slot * TILE_M * DEPTH, stage * DEPTH, args.k, args.vectors);
#pragma unroll
                for (u32 i = 0; i < BRICKS; ++i) {
                    // There are whole bricks, but the last tile may reach beyond them: nobody stores what comes of that.
                    if (at.n + i * BRICK >= at.part.n) break;
                    const char* from = weight + (u64(i) * stages + stage) * brick_bytes + own;
                    const u32 to = shared_address(bricks + (slot * BRICKS + i) * brick_bytes + own);
#pragma unroll
                    for (u32 piece = 0; piece < MOST_BYTES; piece += BLOCK * 16)
                        if (own + piece < brick_bytes) copy_async(to + piece, from + piece, 16);
                }
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
            const char* brick = bricks + (stage % STAGES * BRICKS + warp_n / BRICK) * brick_bytes;
            TwoRows<Code, Affine> rows[STEPS_N / 2];
#pragma unroll
            for (u32 j = 0; j < STEPS_N / 2; ++j) rows[j].load(brick, warp_n % BRICK + j * 16 + lane / 4, parts);
#pragma unroll
            for (u32 step = 0; step < DEPTH / 16; ++step) {
                u32 a[STEPS_M][4];
#pragma unroll
                for (u32 i = 0; i < STEPS_M; ++i)
                    load_matrices(a[i], shared_address(x_tile + place(warp_m + i * 16 + lane % 16, step * 2 + lane / 16)));
#pragma unroll
                for (u32 j = 0; j < STEPS_N; ++j) {
                    const u32 b0 = rows[j / 2].pair(j % 2, step, 0), b1 = rows[j / 2].pair(j % 2, step, 1);
#pragma unroll
                    for (u32 i = 0; i < STEPS_M; ++i) multiply(sums[i][j], a[i], b0, b1);
                }
            }
        }
        const u32 m = at.m + warp_m, n = at.n + warp_n;
        if (at.part.wide) finish<f32, STEPS_M, STEPS_N>(at.part, m, n, coded.gated, sums);
        else finish<bf16, STEPS_M, STEPS_N>(at.part, m, n, coded.gated, sums);
        // The next tile overwrites what slower warps may still be reading.
        __syncthreads();
    }
}

// The variants: tile, warps down and across, stages, blocks on a multiprocessor. `kernels.rs` repeats the tiles and
// stages for the host.
#define VARIANT(size, RESIDENT, DOWN, ACROSS, TILE_M, TILE_N, STAGES)                                        \
    extern "C" __global__ void __launch_bounds__(DOWN * ACROSS * 32, RESIDENT)                               \
        coded_##size##_bf16_bf16(const __grid_constant__ CodedArgs args) {                                   \
        take_turn();                                                                                         \
        const auto run = [&](auto code, auto affine) {                                                       \
            multiply_coded<decltype(code), decltype(affine), DOWN, ACROSS, TILE_M, TILE_N, STAGES>(args);    \
        };                                                                                                   \
        FOR_KIND(ALL_KINDS, args.kind, run)                                                                             \
    }

VARIANT(middle, 2, 2, 4, 64, 128, 4)
VARIANT(small, 4, 1, 4, 16, 64, 8)
