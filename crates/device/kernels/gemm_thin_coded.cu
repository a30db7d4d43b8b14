// Products of few bf16 rows with weights that are held in codes, for Hopper: a warp keeps a ring of stages full, by bulk copies, and four
// decode sixteen channels each and multiply them by mma.sync. What takes time is to issue what decodes, so nothing else is in its way:
// no barrier of all warps, no address of a copy, and every operand in one load.
//
// The product is computed transposed, as in `gemm_thin.cu`; every output is one chain over k in steps of 16, so its bits are those of
// every other product kernel.
#include "barrier.cuh"
#include "codes.cuh"
#include "gemm.cuh"

constexpr u32 CHANNELS = 16;              // of a warp that multiplies
constexpr u32 WARPS = BRICK / CHANNELS;   // that share a brick
constexpr u32 BLOCK = 32 * (1 + WARPS);   // threads, with those of the warp that brings stages
constexpr u32 BRICKS = 4;                 // of a stage
constexpr u32 DEPTH = BRICKS * BRICK;     // k-values of a stage
constexpr u32 LINE = DEPTH * 2 + 16;      // bytes of a row of a stage: eight rows meet all banks

template <typename Code, typename Affine, u32 ROWS> struct ThinCoded {
    const CodedArgs& coded;
    const GemmArgs& args;
    const char* shared; // stages: bricks, then lines of rows
    const u32 ring, barriers;
    const u32 warp, lane, depths; // the last: stages of a tile

    __device__ __forceinline__ ThinCoded(const CodedArgs& coded, const char* shared)
        : coded(coded), args(coded.gemm), shared(shared), ring(shared_address(shared)),
          barriers(ring + coded.stages * stage_bytes()), warp(threadIdx.x / 32), lane(threadIdx.x % 32),
          depths((args.k + DEPTH - 1) / DEPTH) {}

    __device__ __forceinline__ u32 stage_bytes() const { return BRICKS * coded.brick_bytes + ROWS * LINE; }
    __device__ __forceinline__ u32 full(u32 slot) const { return barriers + 16 * slot; }
    __device__ __forceinline__ u32 empty(u32 slot) const { return barriers + 16 * slot + 8; }
    __device__ __forceinline__ u32 bricks(u32 depth) const { return min(args.k / BRICK - depth * BRICKS, BRICKS); }

    // The next slot, and the parity that its barriers have there.
    struct Turn {
        u32 slot = 0, parity = 0;
        __device__ __forceinline__ void next(u32 stages) {
            if (++slot == stages) slot = 0, parity ^= 1;
        }
    };

    // ---------------------------------------------------------------------------------------------------- the loader

    // What a tile is made of.
    struct Source {
        u64 weights, x, apart; // where they start, and bytes from a row of x to the next
        u32 rows;
    };

    __device__ __forceinline__ Source source_of(const Place& tile) const {
        const GemmPart& part = tile.part;
        const u64 bricks = u64(tile.n / BRICK) * (args.k / BRICK), apart = part.x_stride * 2;
        return {part.weight + bricks * coded.brick_bytes, part.x + tile.m * apart, apart, min(part.rows - tile.m, ROWS)};
    }

    __device__ __forceinline__ void bring_weights(const Source& from, u32 depth, u32 slot) const {
        if (lane == 0)
            bulk_load(ring + slot * stage_bytes(), from.weights + u64(depth) * BRICKS * coded.brick_bytes,
                      bricks(depth) * coded.brick_bytes, full(slot));
    }

    __device__ __forceinline__ void bring_rows(const Source& from, u32 depth, u32 slot) const {
        const u32 rows = from.rows, bytes = bricks(depth) * BRICK * 2;
        if (lane == 0) barrier_expect(full(slot), bricks(depth) * coded.brick_bytes + rows * bytes);
        __syncwarp();
        for (u32 row = lane; row < rows; row += 32)
            bulk_load(ring + slot * stage_bytes() + BRICKS * coded.brick_bytes + row * LINE,
                      from.x + row * from.apart + depth * DEPTH * 2, bytes, full(slot));
    }

    // The stages of all tiles of the block, as fast as there is room.
    __device__ __forceinline__ void load(u32 tiles) const {
        Turn at;
        at.parity = 1; // of barriers that nobody has passed yet
        for (u32 index = blockIdx.x; index < tiles; index += gridDim.x) {
            const Source tile = source_of(find<ROWS, BRICK>(args, index));
            // Weights do not wait for what runs before; where parts are listed, the list does.
            const u32 ahead = index == blockIdx.x && !args.parts ? min(depths, coded.stages) : 0;
            for (u32 depth = 0; depth < ahead; ++depth) bring_weights(tile, depth, depth);
            if (ahead) take_turn();
            for (u32 depth = 0; depth < depths; ++depth) {
                barrier_wait(empty(at.slot), at.parity);
                if (depth >= ahead) bring_weights(tile, depth, at.slot);
                bring_rows(tile, depth, at.slot);
                at.next(coded.stages);
            }
        }
    }

    // ------------------------------------------------------------------------------------------------ the multipliers

    __device__ __forceinline__ void multiply_stage(f32 (&sums)[ROWS / 8][4], u32 depth, u32 slot) const {
        const char* brick = shared + slot * stage_bytes();
        const u32 rows = ring + slot * stage_bytes() + BRICKS * coded.brick_bytes + lane % 8 * LINE + lane / 8 * 16;
        const u32 first = warp * CHANNELS + lane / 4, end = bricks(depth);
        TwoRows<Code, Affine> weights[2];
        weights[0].load(brick, first, coded.parts);
#pragma unroll
        for (u32 i = 0; i < BRICKS; ++i) {
            if (i >= end) break;
            // What comes next is on its way while this is multiplied.
            if (i + 1 < end) weights[(i + 1) % 2].load(brick + (i + 1) * coded.brick_bytes, first, coded.parts);
#pragma unroll
            for (u32 pair = 0; pair < 2; ++pair) {
                u32 x[ROWS / 8][4];
#pragma unroll
                for (u32 j = 0; j < ROWS / 8; ++j) load_matrices(x[j], rows + (i * 2 + pair) * 64 + j * 8 * LINE);
#pragma unroll
                for (u32 half = 0; half < 2; ++half) {
                    const auto& of = weights[i % 2];
                    const u32 step = pair * 2 + half;
                    const u32 a[4] = {of.pair(0, step, 0), of.pair(1, step, 0), of.pair(0, step, 1), of.pair(1, step, 1)};
#pragma unroll
                    for (u32 j = 0; j < ROWS / 8; ++j) multiply(sums[j], a, x[j][half * 2], x[j][half * 2 + 1]);
                }
            }
        }
    }

    __device__ __forceinline__ void multiply_all(u32 tiles) const {
        Turn at;
        for (u32 index = blockIdx.x; index < tiles; index += gridDim.x) {
            f32 sums[ROWS / 8][4] = {};
            for (u32 depth = 0; depth < depths; ++depth) {
                barrier_wait(full(at.slot), at.parity);
                multiply_stage(sums, depth, at.slot);
                __syncwarp();
                if (lane == 0) barrier_arrive(empty(at.slot));
                at.next(coded.stages);
            }
            Place tile = find<ROWS, BRICK>(args, index);
            tile.n += warp * CHANNELS;
            if (coded.gated) store_transposed<bf16, true, ROWS>(sums, tile);
            else if (tile.part.wide) store_transposed<f32, false, ROWS>(sums, tile);
            else store_transposed<bf16, false, ROWS>(sums, tile);
        }
    }

    __device__ __forceinline__ void run() const {
        if (threadIdx.x == 0) {
            for (u32 slot = 0; slot < coded.stages; ++slot) {
                barrier_init(full(slot), 1);
                barrier_init(empty(slot), WARPS);
            }
            barriers_made();
        }
        __syncthreads();
        // Where parts are listed, what runs before makes the list.
        const bool multiplies = warp < WARPS;
        if (args.parts || multiplies || blockIdx.x >= tiles_of<ROWS, BRICK>(args)) take_turn();
        const u32 tiles = tiles_of<ROWS, BRICK>(args);
        if (multiplies) multiply_all(tiles);
        else load(tiles);
    }
};

// The variants: scales, most rows of a tile, and blocks that are to fit a multiprocessor, for which `launch/gemm.rs` leaves room.
// `kernels.rs` repeats the rows.
#define VARIANT(name, KINDS, ROWS, RESIDENT)                                                                 \
    extern "C" __global__ void __launch_bounds__(BLOCK, RESIDENT)                                            \
        name##_thin##ROWS##_bf16_bf16(const __grid_constant__ CodedArgs args) {                              \
        extern __shared__ __align__(128) char shared[];                                                      \
        const auto run = [&](auto code, auto affine) {                                                       \
            ThinCoded<decltype(code), decltype(affine), ROWS>(args, shared).run();                           \
        };                                                                                                   \
        FOR_KIND(KINDS, args.kind, run)                                                                      \
    }

VARIANT(short, SHORT_KINDS, 8, 6)
VARIANT(short, SHORT_KINDS, 16, 5)
VARIANT(scaled, SCALED_KINDS, 8, 4)
VARIANT(scaled, SCALED_KINDS, 16, 4)
