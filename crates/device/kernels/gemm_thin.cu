// Products of few bf16 rows for Hopper, where what takes time is to bring the weights and to begin: as many blocks as
// there are 16 channels, each with three warps that keep a ring of stages full and one that multiplies them by mma.sync.
//
// The product is computed transposed, as in `gemm_hopper.cu`: 16 channels are the rows of an mma, eight token rows its
// columns. Every output is one chain over k in steps of 16, so its bits are those of every other product kernel.
#include "barrier.cuh"
#include "gemm.cuh"

constexpr u32 CHANNELS = 16;
constexpr u32 DEPTH = 256;             // k-values of a stage
constexpr u32 LINE = DEPTH * 2 + 16;   // bytes of a row of a stage: eight rows meet all banks
constexpr u32 LOADERS = 3, BLOCK = 32 * (1 + LOADERS); // warps that bring stages; threads, with those of the one that multiplies

template <bool GATED, u32 ROWS, u32 STAGES> struct Thin {
    static constexpr u32 STAGE = (CHANNELS + ROWS) * LINE;
    const GemmArgs& args;
    const u32 ring, full, empty; // stages, and their barriers
    const u32 warp, lane, depths; // the last: stages of a tile

    __device__ __forceinline__ Thin(const GemmArgs& args, u32 ring)
        : args(args), ring(ring), full(ring + STAGES * STAGE), empty(full + STAGES * 8), warp(threadIdx.x / 32),
          lane(threadIdx.x % 32), depths((args.k + DEPTH - 1) / DEPTH) {}

    __device__ __forceinline__ u32 bytes(u32 depth) const { return min(args.k - depth * DEPTH, DEPTH) * 2; }

    // ------------------------------------------------------------------------------------------------- the loaders

    // Lines of a stage: a lane brings the same 16 bytes of every third.
    template <u32 LINES>
    __device__ __forceinline__ void bring(u32 to, u64 from, u64 stride, u32 lines, u32 depth) const {
        const u32 first = warp - 1;
        to += first * LINE + lane * 16;
        from += (first * stride + depth * DEPTH) * 2 + lane * 16;
        if (lane * 16 >= bytes(depth)) return;
#pragma unroll
        for (u32 i = 0; i < (LINES + LOADERS - 1) / LOADERS; ++i) {
            if (first + i * LOADERS < lines) copy_async(to, reinterpret_cast<const void*>(from), 16);
            to += LOADERS * LINE, from += LOADERS * stride * 2;
        }
    }

    // What a tile is made of.
    struct Source {
        u64 weights, rows, apart; // where they start, and elements from a row to the next
        u32 channels, count;      // of weights and of rows
    };

    __device__ __forceinline__ Source source_of(const Place& tile) const {
        const GemmPart& part = tile.part;
        return {part.weight + tile.n * args.weight_stride * 2, part.x + tile.m * part.x_stride * 2, part.x_stride,
                min(part.n - tile.n, CHANNELS), min(part.rows - tile.m, ROWS)};
    }

    __device__ __forceinline__ void bring_weights(const Source& from, u32 depth, u32 slot) const {
        bring<CHANNELS>(ring + slot * STAGE, from.weights, args.weight_stride, from.channels, depth);
    }

    __device__ __forceinline__ void bring_rows(const Source& from, u32 depth, u32 slot) const {
        bring<ROWS>(ring + slot * STAGE + CHANNELS * LINE, from.rows, from.apart, from.count, depth);
        barrier_follow(full + 8 * slot);
    }

    // The stages of all tiles of the block, as fast as there is room.
    __device__ __forceinline__ void load(u32 tiles) const {
        u32 sent = 0;
        for (u32 index = blockIdx.x; index < tiles; index += gridDim.x) {
            const Source tile = source_of(find<ROWS, CHANNELS>(args, index));
            // Weights do not wait for what runs before; where parts are listed, the list does.
            const u32 ahead = index == blockIdx.x && !args.parts ? min(depths, STAGES) : 0;
            for (u32 depth = 0; depth < ahead; ++depth) bring_weights(tile, depth, depth);
            if (ahead) take_turn();
            for (u32 depth = 0; depth < depths; ++depth, ++sent) {
                const u32 slot = sent % STAGES;
                if (sent >= STAGES) barrier_wait(empty + 8 * slot, sent / STAGES % 2 ^ 1);
                if (depth >= ahead) bring_weights(tile, depth, slot);
                bring_rows(tile, depth, slot);
            }
        }
    }

    // ------------------------------------------------------------------------------------------------ the multiplier

    // What 32 k-values are multiplied from.
    struct Step {
        u32 first[4], second[4]; // weights of 16 k-values each
        u32 rows[ROWS / 8][4];
    };

    __device__ __forceinline__ void take(Step& step, u32 weights, u32 rows) const {
        load_matrices(step.first, weights);
        load_matrices(step.second, weights + 32);
#pragma unroll
        for (u32 j = 0; j < ROWS / 8; ++j) load_matrices(step.rows[j], rows + j * 8 * LINE);
    }

    __device__ __forceinline__ void multiply_step(f32 (&sums)[ROWS / 8][4], const Step& step) const {
#pragma unroll
        for (u32 j = 0; j < ROWS / 8; ++j) multiply(sums[j], step.first, step.rows[j][0], step.rows[j][1]);
#pragma unroll
        for (u32 j = 0; j < ROWS / 8; ++j) multiply(sums[j], step.second, step.rows[j][2], step.rows[j][3]);
    }

    __device__ __forceinline__ void multiply_stage(f32 (&sums)[ROWS / 8][4], u32 depth, u32 slot) const {
        const u32 weights = ring + slot * STAGE + lane % 16 * LINE + lane / 16 * 16, end = bytes(depth);
        const u32 rows = ring + slot * STAGE + (CHANNELS + lane % 8) * LINE + lane / 8 * 16;
        Step steps[2];
        take(steps[0], weights, rows);
#pragma unroll
        for (u32 i = 0; i < DEPTH / 32; ++i) {
            if (i * 64 >= end) break;
            // What comes next is on its way while this is multiplied.
            if ((i + 1) * 64 < end) take(steps[(i + 1) % 2], weights + (i + 1) * 64, rows + (i + 1) * 64);
            multiply_step(sums, steps[i % 2]);
        }
    }

    __device__ __forceinline__ void multiply_all(u32 tiles) const {
        u32 taken = 0;
        for (u32 index = blockIdx.x; index < tiles; index += gridDim.x) {
            f32 sums[ROWS / 8][4] = {};
            for (u32 depth = 0; depth < depths; ++depth, ++taken) {
                const u32 slot = taken % STAGES;
                barrier_wait(full + 8 * slot, taken / STAGES % 2);
                multiply_stage(sums, depth, slot);
                __syncwarp();
                if (lane == 0) barrier_arrive(empty + 8 * slot);
            }
            const Place tile = find<ROWS, CHANNELS>(args, index);
            if (tile.part.wide) store_transposed<f32, GATED, ROWS>(sums, tile);
            else store_transposed<bf16, GATED, ROWS>(sums, tile);
        }
    }

    __device__ __forceinline__ void run() const {
        if (threadIdx.x == 0) {
            for (u32 slot = 0; slot < STAGES; ++slot) {
                barrier_init(full + 8 * slot, 32 * LOADERS);
                barrier_init(empty + 8 * slot, 1);
            }
            barriers_made();
        }
        __syncthreads();
        // Where parts are listed, what runs before makes the list.
        const bool multiplies = warp == 0, first = args.parts || multiplies || blockIdx.x >= tiles_of<ROWS, CHANNELS>(args);
        if (first) take_turn();
        const u32 tiles = tiles_of<ROWS, CHANNELS>(args);
        if (multiplies) multiply_all(tiles);
        else load(tiles);
    }
};

// The variants: most rows of a tile, stages, which `kernels.rs` repeats. Two blocks a multiprocessor leave registers enough for none to spill.
#define VARIANT(name, GATED, ROWS, STAGES)                                                                    \
    extern "C" __global__ void __launch_bounds__(BLOCK, 2) name##ROWS##_bf16_bf16(const __grid_constant__ GemmArgs args) { \
        extern __shared__ __align__(128) unsigned char shared[];                                             \
        Thin<GATED, ROWS, STAGES>(args, shared_address(shared)).run();                                       \
    }

VARIANT(gemm_thin, false, 8, 5)
VARIANT(gated_thin, true, 8, 5)
VARIANT(gemm_thin, false, 16, 4)
VARIANT(gated_thin, true, 16, 4)
VARIANT(gemm_thin, false, 32, 4)
VARIANT(gated_thin, true, 32, 4)
