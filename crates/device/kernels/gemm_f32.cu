// Products in plain float32 arithmetic, for verification and for float32 inputs: every output is one chain of
// fused multiply-adds over k in order.
#include "gemm.cuh"

constexpr u32 TILE = 64;
constexpr u32 DEPTH = 16;

// The row of a weight whose sums stand in column `n` of a tile: with gates, each beside its up factor.
template <bool GATED> __device__ __forceinline__ u32 weight_row(u32 n) {
    return GATED ? n / 16 * 16 + n % 2 * 8 + n % 16 / 2 : n;
}

template <typename X, typename W, bool GATED> __device__ void gemm(const GemmArgs& args) {
    __shared__ f32 xs[DEPTH][TILE + 4], ws[DEPTH][TILE + 4];
    const u32 down = threadIdx.x / 16 * 4, across = threadIdx.x % 16 * 4;
    const u32 tiles = tiles_of<TILE, TILE>(args);
    for (u32 tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
        const Tile at = locate<TILE, TILE>(args, tile);
        const X* x = reinterpret_cast<const X*>(at.part.x);
        const W* w = reinterpret_cast<const W*>(at.part.weight);
        f32 sums[4][4] = {};
        for (u32 depth = 0; depth < args.k; depth += DEPTH) {
            for (u32 i = threadIdx.x; i < TILE * DEPTH; i += THREADS) {
                const u32 k = i % DEPTH, line = i / DEPTH, m = at.m + line, n = weight_row<GATED>(at.n + line);
                const bool inside = depth + k < args.k;
                xs[k][line] = inside && m < at.part.rows ? wide(x[m * at.part.x_stride + depth + k]) : 0.0f;
                ws[k][line] = inside && n < at.part.n ? wide(w[n * args.weight_stride + depth + k]) : 0.0f;
            }
            __syncthreads();
#pragma unroll
            for (u32 k = 0; k < DEPTH; ++k)
#pragma unroll
                for (u32 i = 0; i < 4; ++i)
#pragma unroll
                    for (u32 j = 0; j < 4; ++j) sums[i][j] = fmaf(xs[k][down + i], ws[k][across + j], sums[i][j]);
            __syncthreads();
        }
        const f32* bias = reinterpret_cast<const f32*>(at.part.bias);
        f32* out = reinterpret_cast<f32*>(at.part.out);
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 m = at.m + down + i;
            if (m >= at.part.rows) continue;
#pragma unroll
            for (u32 j = 0; j < 4; j += GATED ? 2 : 1) {
                const u32 n = (at.n + across + j) / (GATED ? 2 : 1);
                if (n >= at.part.columns) continue;
                if (GATED) out[m * at.part.out_stride + n] = silu(sums[i][j]) * sums[i][j + (GATED ? 1 : 0)];
                else out[m * at.part.out_stride + n] = sums[i][j] + (bias ? bias[n] : 0.0f);
            }
        }
    }
}

// Named by input, weight and what is stored; the output is float32.
#define GEMM(name, X, W, GATED)                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) name(const __grid_constant__ GemmArgs args) {      \
        take_turn();                                                                                         \
        gemm<X, W, GATED>(args);                                                                             \
    }

GEMM(gemm_plain_f32_f32, f32, f32, false)
GEMM(gated_plain_f32_f32, f32, f32, true)
GEMM(gemm_plain_f32_bf16, f32, bf16, false)
GEMM(gated_plain_f32_bf16, f32, bf16, true)
