// Products of bf16 rows for Hopper: weights and rows arrive by TMA, wgmma multiplies. What weights are held in is a
// parameter: `gemm_hopper.cu` has those in bf16, `gemm_hopper_coded.cu` those in codes.
//
// The product is computed transposed: the weights are the 64-row operand of wgmma and the token rows its column
// operand. wgmma takes columns in steps of 8, so a tile can hold 32, 64, ... 256 token rows with no padding
// beyond the next multiple of 32, whatever load an expert has, and one launch mixes all of them. The weight side
// of a tile is fixed: 128 packed rows per CTA, 64 per consumer warpgroup. With the rows that the CTAs of a cluster share, a full
// tile pair (256 weights x 256 rows) pulls 32 KB per CTA and 64-wide k block through L2 instead of 48 KB.
//
// Every output is one accumulator that takes k in steps of 16, ascending, in one wgmma chain. Neither the height
// of a tile nor the place of a row in it, nor the number of CTAs, changes that order. K is never split.
#pragma once
#include "hopper.cuh"

constexpr u32 K_BLOCK = 64;         // one line of bf16
constexpr u32 WEIGHT_TILE = 128;    // packed weight rows per CTA
constexpr u32 WEIGHT_BYTES = WEIGHT_TILE * LINE_BYTES;

// ----------------------------------------------------------------------------------------------------------- wgmma

// d[64 weights x COLS rows] (+)= a * b^T for 16 values of k; `add` = 0 starts the sum.
template <int COLS>
struct Wgmma;
#define DEFINE_WGMMA(COLS, I, A, B, P)                                                                          \
    template <>                                                                                                 \
    struct Wgmma<COLS> {                                                                                        \
        static __device__ __forceinline__ void run(float* d, u32 a, u32 b, u32 add) {                           \
            asm volatile("{\n .reg .pred p;\n .reg .b64 a, b;\n setp.ne.u32 p, " P ", 0;\n"                    \
                         " mov.b64 a, {" A ", " OPERAND_HIGH "};\n mov.b64 b, {" B ", " OPERAND_HIGH "};\n"     \
                         " wgmma.mma_async.sync.aligned.m64n" #COLS "k16.f32.bf16.bf16 {" REGS_##I              \
                         "}, a, b, p, 1, 1, 0, 0;\n}"                                                           \
                         : OUT_##I                                                                              \
                         : "r"(a), "r"(b), "r"(add));                                                           \
        }                                                                                                       \
    };
DEFINE_WGMMA(32, 0, "%16", "%17", "%18")
DEFINE_WGMMA(64, 1, "%32", "%33", "%34")
DEFINE_WGMMA(96, 2, "%48", "%49", "%50")
DEFINE_WGMMA(128, 3, "%64", "%65", "%66")
DEFINE_WGMMA(160, 4, "%80", "%81", "%82")
DEFINE_WGMMA(192, 5, "%96", "%97", "%98")
DEFINE_WGMMA(224, 6, "%112", "%113", "%114")
DEFINE_WGMMA(256, 7, "%128", "%129", "%130")

template <int MAX_ROWS> using RowRing = Ring<WEIGHT_BYTES + MAX_ROWS * LINE_BYTES>;

// Packed weight rows 16q..16q+7 are gate channels 8q..8q+7 and rows 16q+8..16q+15 the same channels of up, so a
// thread's fragment holds the gate and up sums of the same channel and rows: acc[4j], acc[4j+1] gate, acc[4j+2],
// acc[4j+3] up, for rows 8j + 2*(lane%4) + {0,1}. The staging block is laid out as the 64-byte swizzle of the out
// map wants it, which also keeps stmatrix free of bank conflicts.
template <int MAX_ROWS>
__device__ __forceinline__ void finish_swiglu(const float* acc, u32 staging, const Target& t, u32 thread, u32 id) {
    const u32 lane = thread & 31, warp = thread / 32;
    if (thread == 0) tma_store_read<0>();
    warpgroup_barrier(id);  // the previous tile has left the staging block
#pragma unroll
    for (int j = 0; j < MAX_ROWS / 32; ++j) {
        if (j * 32 < t.rows) {
            u32 v[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float* f = acc + 16 * j + 4 * i;
                v[i] = pack_bf16(quick_silu(f[0]) * f[2], quick_silu(f[1]) * f[3]);
            }
            u32 row = 32 * j + lane;
            stmatrix_trans(staging + row * 64 + ((warp ^ ((row >> 1) & 3)) << 4), v[0], v[1], v[2], v[3]);
        }
    }
    fence_for_tma();
    warpgroup_barrier(id);
    send_block<4, MAX_ROWS, 1>(t, staging, 0, thread);
}

// How products without an activation leave: as 64 channels of up to 128 rows, which fill the staging block. A taller
// tile leaves in two rounds, the second of which WAITS in registers, as bf16, until the next tile keeps the tensor
// cores busy, if registers are left. (Gated products leave at once: their second round would wait as sums, and cost more than it hides.)
template <int MAX_ROWS, bool WAITS>
struct Rounds {
    static constexpr int ROWS = MAX_ROWS < 128 ? MAX_ROWS : 128, WORDS = ROWS / 4;
    static constexpr bool TWO = MAX_ROWS > ROWS;

    u32 words[TWO && WAITS ? WORDS : 1];
    Target target;
    bool waiting = false;

    static __device__ __forceinline__ void pack(u32* words, const float* acc) {
#pragma unroll
        for (int i = 0; i < WORDS; ++i) words[i] = pack_bf16(acc[2 * i], acc[2 * i + 1]);
    }

    __device__ __forceinline__ void send(const u32* words, u32 from, u32 staging, u32 thread, u32 id) const {
        const u32 lane = thread & 31, warp = thread / 32;
        if (thread == 0) tma_store_read<0>();
        warpgroup_barrier(id);  // what was staged before has left
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) {
            u32 row = 4 * i + (lane & 7) + ((lane >> 4) << 3), chunk = 2 * warp + ((lane >> 3) & 1);
            stmatrix_trans(staging + row * 128 + ((chunk ^ (row & 7)) << 4), words[i], words[i + 1], words[i + 2], words[i + 3]);
        }
        fence_for_tma();
        warpgroup_barrier(id);
        send_block<8, ROWS, 0>(target, staging, from, thread);
    }

    __device__ __forceinline__ void first(const float* acc, const Target& t, u32 staging, u32 thread, u32 id) {
        target = t;
        u32 now[WORDS];
        pack(now, acc);
        send(now, 0, staging, thread, id);
        if (!TWO) return;
        waiting = t.rows > ROWS;
        if (WAITS) {
            pack(words, acc + 2 * WORDS);
        } else if (waiting) {
            pack(now, acc + 2 * WORDS);
            send(now, ROWS, staging, thread, id);
        }
    }

    __device__ __forceinline__ void second(u32 staging, u32 thread, u32 id) {
        if (!TWO || !WAITS || !waiting) return;
        waiting = false;
        send(words, ROWS, staging, thread, id);
    }
};

// How products leave as float32: straight from registers, with their bias if they have one. A thread has two channels, eight apart, of
// two neighbouring rows of every eight, so that eight lanes write 32 bytes of a row.
template <int MAX_ROWS>
__device__ __forceinline__ void finish_wide(const float* acc, const HopperArgs& a, const Work& t, u32 column, u32 thread) {
    const u32 lane = thread & 31;
    const float* bias = reinterpret_cast<const float*>(a.bias);
#pragma unroll
    for (u32 half = 0; half < 2; ++half) {
        const u32 channel = column + thread / 32 * 16 + lane / 4 + 8 * half;
        if (channel >= a.columns) continue;
        const float more = bias ? __ldg(bias + channel) : 0.0f;
        float* out = reinterpret_cast<float*>(a.out_start) + (u64)(t.row0 + 2 * (lane & 3)) * a.out_stride + channel;
#pragma unroll
        for (u32 j = 0; j < MAX_ROWS / 8; ++j)
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const float sum = acc[4 * j + 2 * half + i];
                if (8 * j + 2 * (lane & 3) + i < t.rows) out[(u64)(8 * j + i) * a.out_stride] = bias ? sum + more : sum;
            }
    }
}

// What products leave as: activated, as bf16 or as float32.
enum Leaving { GATED, NARROW, WIDE };

template <typename Weights, int MAX_ROWS, Leaving LEAVING>
__device__ __forceinline__ void consume(const HopperArgs& a, u32 base) {
    const u32 group = threadIdx.x / 128 - 1, thread = threadIdx.x & 127, lane = threadIdx.x & 31;
    const u32 blocks = div_up(a.k, K_BLOCK), rank = cluster_rank();
    const u32 staging = base + OFF_STAGING + group * STAGING_BYTES;
    const u32 width = LEAVING == GATED ? 32 : 64;  // output columns of this warpgroup
    RowRing<MAX_ROWS> ring = {0, 0};
    SlotCursor cursor = {0, 0};
    Rounds<MAX_ROWS, Weights::WAITS> rounds;
    const auto left = [&] { if (LEAVING == NARROW) rounds.second(staging, thread, 1 + group); };
    float acc[MAX_ROWS / 2];
#pragma unroll
    for (int i = 0; i < MAX_ROWS / 2; ++i) acc[i] = 0.0f;
    while (true) {
        Work t = take_tile<~0u>(base, cursor, lane == 0);
        if (!t.rows) break;
        // The products that there are kernels for: of as many rows as a multiple of STEP, or of 32.
        u32 steps = t.rows > 32 ? round_up(t.rows, Weights::STEP) / 32 : 1;
#define CASE(C)                                                                                           \
    if (MAX_ROWS >= C && C % Weights::STEP == 0 && steps == C / 32) {                                     \
        Weights::template multiply < MAX_ROWS >= C && C % Weights::STEP == 0 ? C : 32,                    \
            MAX_ROWS > (a, acc, ring, base, blocks, group, left);                                         \
    } else
        CASE(256) CASE(224) CASE(192) CASE(160) CASE(128) CASE(96) CASE(64) {
            Weights::template multiply<32, MAX_ROWS>(a, acc, ring, base, blocks, group, left);
        }
#undef CASE
        u32 column = ((t.pair * CLUSTER + rank) * 2 + group) * width;
        u32 columns = column < a.columns ? a.columns - column : 0;
        u64 at = (u64)t.row0 * a.out_stride + column;
        if (LEAVING == WIDE) {
            finish_wide<MAX_ROWS>(acc, a, t, column, thread);
        } else if (columns) {
            Target target = {&a.out, reinterpret_cast<u16*>(a.out_start) + at, a.out_stride, t.row0, column, t.rows, columns};
            if (LEAVING == GATED) finish_swiglu<MAX_ROWS>(acc, staging, target, thread, 1 + group);
            else rounds.first(acc, target, staging, thread, 1 + group);
        }
        warpgroup_barrier(1 + group);  // the warps of a group start a tile together: none may begin it while another still sends the last one
    }
    left();
    if (thread == 0) tma_store_finish();  // the staging block must outlive its readers
}

// What a kernel multiplies: rows of bf16 by `Weights`, in tiles of up to MAX_ROWS rows, and what leaves.
template <typename Weights, int MAX_ROWS, Leaving LEAVING>
struct Products : Weights {
    using Ring = RowRing<MAX_ROWS>;
    static constexpr u32 K_BLOCK = ::K_BLOCK, TILE = WEIGHT_TILE, STEP = ROW_BOX, WEIGHT_BYTES = ::WEIGHT_BYTES;

    static __device__ __forceinline__ void consume(const HopperArgs& a, u32 base) {
        ::consume<Weights, MAX_ROWS, LEAVING>(a, base);
    }
};

// The variants: most rows of a tile.
#define HOPPER_VARIANT(name, Weights, MAX_ROWS)                                                               \
    HOPPER_KERNEL(gemm_##name##MAX_ROWS##_bf16_bf16, Products<Weights, MAX_ROWS, NARROW>)              \
    HOPPER_KERNEL(gated_##name##MAX_ROWS##_bf16_bf16, Products<Weights, MAX_ROWS, GATED>)

// The same that give float32.
#define HOPPER_WIDE(name, Weights, MAX_ROWS)                                                                  \
    HOPPER_KERNEL(gemm_##name##MAX_ROWS##_bf16_f32, Products<Weights, MAX_ROWS, WIDE>)
