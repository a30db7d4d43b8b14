// Products of FP8 rows and FP8 weights for Hopper, in two precisions: within 128 values of k tensor cores add up e4m3 codes, across
// them sums are float32. With b a block of 128 values of k, x and w codes, sx the scale of a row in b and sw that of 128 x 128 weights:
//
//     P_b = sum over k in b of x[m, k] * w[n, k]     four steps of wgmma, from zero
//     acc = fma(sx[m, b] * sw[n / 128, b], P_b, acc)     b ascending, from zero
//
// Tensor cores keep 13 bits of a sum of such products, so longer chains would lose what the codes still know.
//
// Rows are the 64-row operand of wgmma here: a thread then has two rows and so two scales of rows a block. A CTA has up to 128 rows by
// 256 packed weight rows. Where it has more than 64 rows each consumer warpgroup takes 64 of them, and one half of the weights after
// the other, so that there are registers for the sums of both halves and the products of one; else each takes one half. What it
// adds to which sum is the same either way. While one warpgroup scales its products the other multiplies.
#include "gemm_fp8.cuh"

constexpr u32 HALF = 128;                     // packed weight rows of a multiplication
constexpr u32 HALF_BYTES = HALF * LINE_BYTES;
constexpr u32 GROUP_ROWS = 64;                // rows of a warpgroup

// d[64 rows x 128 packed weights] (+)= a * b^T for 32 values of k; `add` = 0 starts the sum.
__device__ __forceinline__ void wgmma_fp8(float* d, u32 a, u32 b, u32 add) {
    asm volatile("{\n .reg .pred p;\n .reg .b64 a, b;\n setp.ne.u32 p, %66, 0;\n"
                 " mov.b64 a, {%64, " OPERAND_HIGH "};\n mov.b64 b, {%65, " OPERAND_HIGH "};\n"
                 " wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {" REGS_3 "}, a, b, p, 1, 1;\n}"
                 : OUT_3
                 : "r"(a), "r"(b), "r"(add));
}

// Stores four 8x8 fragments: lane i names the 16-byte memory row i % 8 of fragment i / 8.
__device__ __forceinline__ void stmatrix(u32 addr, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

// The factors of a block of k: of a thread's two rows by two halves of the weights, or by gate and up.
struct Factors {
    float rows[2], weights[2];
};

// Where a thread finds them.
struct Scales {
    const float* rows[2];
    const float* weights[2];

    __device__ __forceinline__ Factors of(u32 block) const {
        return {{rows[0][block], rows[1][block]}, {__ldg(weights[0] + block), __ldg(weights[1] + block)}};
    }
};

// Which warpgroup multiplies next: they take turns, so that the products of one are scaled while the other's are made.
__device__ __forceinline__ void await_turn(u32 group) {
#ifndef NO_TURNS
    asm volatile("bar.sync %0, 256;" ::"r"(3 + group) : "memory");
#endif
}
__device__ __forceinline__ void give_turn(u32 group) {
#ifndef NO_TURNS
    asm volatile("bar.arrive %0, 256;" ::"r"(4 - group) : "memory");
#endif
}

constexpr u32 OFF_MOST = 64 * 80;  // of a staging block: the largest of each row, behind rows of 64 codes

__device__ __forceinline__ void all_consumers() { asm volatile("bar.sync 5, 256;" ::: "memory"); }

template <Out OUT, bool GATED>
struct Fp8 {
    static constexpr u32 K_BLOCK = SCALED, TILE = 2 * HALF, STEP = GROUP_ROWS, WEIGHT_BYTES = 2 * HALF_BYTES;
    using Ring = ::Ring<WEIGHT_BYTES + 2 * GROUP_ROWS * LINE_BYTES>;

    static __device__ __forceinline__ void open(u64 weight) { open_map(weight); }

    static __device__ __forceinline__ u32 bytes(const HopperArgs&, u32) { return WEIGHT_BYTES; }

    static __device__ __forceinline__ void load(const HopperArgs&, u64 weight, u32 slot, u32 full, u32 block, u32 row) {
        const TensorMap* map = reinterpret_cast<const TensorMap*>(weight);
#pragma unroll
        for (u32 i = 0; i < TILE; i += PIECE_ROWS) tma_load_2d(slot + i * LINE_BYTES, map, full, block * K_BLOCK, row + i);
    }

    // The scales of a tile's weights: of its halves, or of gate and up, which alternate in both halves.
    static __device__ __forceinline__ void weight_scales(const HopperArgs& a, u64 weight, u32 tile, u32 blocks, const float* (&scales)[2]) {
        const float* all = weight_scales_of(weight);
        const u32 down = div_up(a.columns, SCALED);  // block rows of a matrix
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const u32 row = GATED ? i * down + min(tile, down - 1) : min(2 * tile + i, down - 1);
            scales[i] = all + (u64)row * blocks;
        }
    }

    // acc += the products of one half, each with its factor.
    static __device__ __forceinline__ void promote(float* acc, const float* products, const float (&factors)[2][2], u32 half) {
#pragma unroll
        for (u32 j = 0; j < HALF / 8; ++j)
#pragma unroll
            for (u32 i = 0; i < 4; ++i)
                acc[4 * j + i] = __fmaf_rn(factors[i / 2][GATED ? j % 2 : half], products[4 * j + i], acc[4 * j + i]);
    }

    // The sums over k of a warpgroup's 64 rows: of both halves of the weights, or of the half that is the warpgroup's.
    template <u32 HALVES>
    static __device__ __forceinline__ void multiply(float* acc, Ring& ring, u32 base, u32 blocks, u32 group, const Scales& scales) {
        const u32 lane = threadIdx.x & 31;
#pragma unroll
        for (u32 i = 0; i < HALVES * 64; ++i) acc[i] = 0.0f;
        Factors next = scales.of(0);
        for (u32 b = 0; b < blocks; ++b) {
            const Factors now = next;
            const u32 slot = base + ring.stage * Ring::SLOT_BYTES;
            const u32 x = operand(slot + WEIGHT_BYTES + (HALVES == 2 ? group * GROUP_ROWS * LINE_BYTES : 0));
            barrier_wait(base + BAR_FULL + 8 * ring.stage, ring.phase);
            next = scales.of(min(b + 1, blocks - 1));
            float factors[2][2];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) factors[i / 2][i % 2] = __fmul_rn(now.rows[i / 2], now.weights[i % 2]);
#pragma unroll
            for (u32 h = 0; h < HALVES; ++h) {
                const u32 half = HALVES == 2 ? h : group, w = operand(slot + half * HALF_BYTES);
                float products[64];
                await_turn(group);
                wgmma_fence();
#pragma unroll
                for (u32 step = 0; step < 4; ++step) wgmma_fp8(products, x + 2 * step, w + 2 * step, step);
                wgmma_commit();
                give_turn(group);
                wgmma_wait<0>();
                settle<128>(products);
                if (h == HALVES - 1) release_stage(base, ring.stage, lane);
                promote(acc + h * 64, products, factors, h);
            }
            ring.next();
        }
    }

    // Output `i` of fragment j, 8 columns, that a thread has of its row `row`.
    static __device__ __forceinline__ float output(const float* acc, u32 j, u32 row, u32 i) {
        const float* f = acc + (GATED ? 8 * j : 4 * j) + 2 * row + i;
        return GATED ? quick_silu(f[0]) * f[4] : f[0];
    }

    static __device__ __forceinline__ u32 pair(const float* acc, u32 j, u32 row) {
        return pack_bf16(output(acc, j, row, 0), output(acc, j, row, 1));
    }

    // Adds the bias of a thread's columns of COLUMNS.
    template <u32 COLUMNS> static __device__ __forceinline__ void add_bias(float* acc, const float* bias, u32 columns) {
#pragma unroll
        for (u32 j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const u32 column = 8 * j + 2 * (threadIdx.x & 3) + i;
                const float more = column < columns ? __ldg(bias + column) : 0.0f;
                acc[4 * j + i] += more;
                acc[4 * j + 2 + i] += more;
            }
    }

    // COLUMNS columns leave as bf16, 128 a round, which fill the staging block as two pieces of 64.
    template <u32 COLUMNS>
    static __device__ __forceinline__ void finish_bf16(const float* acc, Target t, u32 staging, u32 thread, u32 id) {
        const u32 lane = thread & 31, row = thread / 32 * 16 + (lane & 15);
        constexpr u32 ROUND = COLUMNS < 128 ? COLUMNS : 128;
#pragma unroll
        for (u32 from = 0; from < COLUMNS; from += ROUND) {
            if (thread == 0) tma_store_read<0>();
            warpgroup_barrier(id);  // what was staged before has left
#pragma unroll
            for (u32 j = 0; j < ROUND / 8; j += 2) {
                const u32 at = from / 8 + j, chunk = (j & 7) + (lane >> 4);
                stmatrix(staging + j / 8 * 8192 + row * 128 + ((chunk ^ (row & 7)) << 4), pair(acc, at, 0), pair(acc, at, 1),
                         pair(acc, at + 1, 0), pair(acc, at + 1, 1));
            }
            fence_for_tma();
            warpgroup_barrier(id);
#pragma unroll
            for (u32 piece = 0; piece < ROUND; piece += 64) {
                if (t.columns) send_block<8, GROUP_ROWS, 0>(t, staging + piece * 128, 0, thread);
                t.out += 64;
                t.column += 64;
                t.columns -= min(t.columns, 64u);
            }
        }
    }

    // COLUMNS columns leave as float32, from registers: four lanes have 32 bytes of a row.
    template <u32 COLUMNS>
    static __device__ __forceinline__ void finish_f32(const float* acc, float* out, u32 stride, u32 rows, u32 columns, u32 thread) {
        const u32 lane = thread & 31;
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 row = thread / 32 * 16 + lane / 4 + 8 * half;
            if (row >= rows) continue;
            float* to = out + (u64)row * stride + 2 * (lane & 3);
#pragma unroll
            for (u32 j = 0; j < COLUMNS / 8; ++j)
                if (8 * j < columns)
                    *reinterpret_cast<float2*>(to + 8 * j) =
                        make_float2(output(acc, j, half, 0), output(acc, j, half, 1));
        }
    }

    // COLUMNS columns leave as codes with their scale, which 128 columns share: of all warpgroups if they have half of them
    // each. What is coded is rounded to bf16 first, as everywhere.
    template <u32 COLUMNS>
    static __device__ __forceinline__ void finish_codes(float* acc, char* out, u32 stride, u32 width, u32 column, u32 rows, u32 staging,
                                                        u32 other, u32 thread, u32 id, bool powers) {
        constexpr u32 PITCH = COLUMNS + 16;  // rows of the staging block, on different banks
        const u32 lane = thread & 31, most = OFF_MOST;
        float scales[2], inverse[2];
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 row = thread / 32 * 16 + lane / 4 + 8 * half;
            float largest = LEAST;
#pragma unroll
            for (u32 j = 0; j < COLUMNS / 8; ++j)
#pragma unroll
                for (u32 i = 0; i < 2; ++i) {
                    float& f = acc[8 * j + 2 * half + i];
                    f = wide(narrow<bf16>(output(acc, j, half, i)));
                    largest = larger(largest, f);
                }
#pragma unroll
            for (u32 step = 1; step < 4; step *= 2) largest = larger(largest, __shfl_xor_sync(~0u, largest, step));
            if (COLUMNS < SCALED && (lane & 3) == 0) store_shared(staging + most + row * 4, largest);
            scales[half] = largest;
        }
        if (COLUMNS < SCALED) {
            all_consumers();
#pragma unroll
            for (u32 half = 0; half < 2; ++half)
                scales[half] = larger(scales[half], load_shared(other + most + (thread / 32 * 16 + lane / 4 + 8 * half) * 4));
            all_consumers();  // the next tile's may come
        }
        warpgroup_barrier(id);  // what was staged before has been read
#pragma unroll
        for (u32 half = 0; half < 2; ++half) {
            const u32 row = thread / 32 * 16 + lane / 4 + 8 * half;
            scales[half] = scale_for(scales[half], powers);
            inverse[half] = __frcp_rn(scales[half]);
#pragma unroll
            for (u32 j = 0; j < COLUMNS / 8; ++j) {
                const float* f = acc + 8 * j + 2 * half;
                store_shared(staging + row * PITCH + 8 * j + 2 * (lane & 3),
                             u16(encode(quotient(f[0], scales[half], inverse[half]), quotient(f[1], scales[half], inverse[half]))));
            }
            if ((lane & 3) == 0 && row < rows && column % SCALED == 0 && column < width)
                *reinterpret_cast<float*>(out + (u64)row * stride + round_up(width, 4) + column / SCALED * 4) = scales[half];
        }
        warpgroup_barrier(id);
        constexpr u32 CHUNKS = COLUMNS / 16;
        const u32 at = column + thread % CHUNKS * 16;
        for (u32 row = thread / CHUNKS; row < rows; row += 128 / CHUNKS) {
            const uint4 v = load_shared16(staging + row * PITCH + thread % CHUNKS * 16);
            char* to = out + (u64)row * stride + at;
            if (at + 16 <= width) {
                store_global16(to, v);
            } else {
                const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (u32 i = 0; i < 4; ++i)
                    if (at + 4 * i < width) reinterpret_cast<u32*>(to)[i] = words[i];
            }
        }
    }

    // HALVES halves of the weights leave, of a tile whose first row of this warpgroup is `first`.
    template <u32 HALVES>
    static __device__ __forceinline__ void finish(float* acc, const HopperArgs& a, const Work& t, u32 first, u32 base, u32 group) {
        constexpr u32 WIDTH = GATED ? HALF / 2 : HALF, COLUMNS = HALVES * WIDTH;
        const u32 thread = threadIdx.x & 127, staging = base + OFF_STAGING + group * STAGING_BYTES;
        const u32 column = (t.pair * CLUSTER + cluster_rank()) * 2 * WIDTH + (HALVES == 1 ? group * WIDTH : 0);
        const u32 row0 = t.row0 + first, rows = min(t.rows - first, GROUP_ROWS);
        const u32 columns = column < a.columns ? a.columns - column : 0;
        if (!GATED && a.bias) add_bias<COLUMNS>(acc, reinterpret_cast<const float*>(a.bias) + column, columns);
        if (OUT == CODES) {
            finish_codes<COLUMNS>(acc, reinterpret_cast<char*>(a.out_start) + (u64)row0 * a.out_stride, a.out_stride, a.columns, column,
                                  rows, staging, base + OFF_STAGING + (1 - group) * STAGING_BYTES, thread, 1 + group, a.powers);
        } else if (OUT == WIDE) {
            finish_f32<COLUMNS>(acc, reinterpret_cast<float*>(a.out_start) + (u64)row0 * a.out_stride + column, a.out_stride, rows,
                                       columns, thread);
        } else {
            Target target = {&a.out, reinterpret_cast<u16*>(a.out_start) + (u64)row0 * a.out_stride + column, a.out_stride, row0, column, rows,
                             columns};
            finish_bf16<COLUMNS>(acc, target, staging, thread, 1 + group);
        }
    }

    static __device__ __forceinline__ void consume(const HopperArgs& a, u32 base) {
        const u32 group = threadIdx.x / 128 - 1, thread = threadIdx.x & 127, lane = threadIdx.x & 31;
        const u32 blocks = div_up(a.k, K_BLOCK), rank = cluster_rank();
        Ring ring = {0, 0};
        SlotCursor cursor = {0, 0};
        float acc[128];
        if (group == 1) give_turn(1);
        while (true) {
            const Work t = take_tile<~0u>(base, cursor, lane == 0);
            if (!t.rows) break;
            const bool tall = t.rows > GROUP_ROWS;
            const u32 first = tall ? group * GROUP_ROWS : 0;
            Scales scales;
            weight_scales(a, blocks_of(a)[t.block].weight, t.pair * CLUSTER + rank, blocks, scales.weights);
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const u32 row = first + thread / 32 * 16 + lane / 4 + 8 * i;
                scales.rows[i] = reinterpret_cast<const float*>(
                    a.rows_start + (u64)(t.row0 + min(row, t.rows - 1)) * a.rows_stride + round_up(a.k, 4));
            }
            if (tall) {
                multiply<2>(acc, ring, base, blocks, group, scales);
                finish<2>(acc, a, t, first, base, group);
            } else {
                if (!GATED && group == 1) scales.weights[0] = scales.weights[1];
                multiply<1>(acc, ring, base, blocks, group, scales);
                finish<1>(acc, a, t, first, base, group);
            }
            warpgroup_barrier(1 + group);  // none may begin a tile while another still sends the last one
        }
        if (group == 0) await_turn(0);
        if (thread == 0) tma_store_finish();  // the staging block must outlive its readers
    }
};

HOPPER_KERNEL(gemm_fp8_u32_bf16, Fp8<NARROW, false>)
HOPPER_KERNEL(gemm_fp8_u32_f32, Fp8<WIDE, false>)
HOPPER_KERNEL(gated_fp8_u32_bf16, Fp8<NARROW, true>)
HOPPER_KERNEL(gated_fp8_u32_u32, Fp8<CODES, true>)
