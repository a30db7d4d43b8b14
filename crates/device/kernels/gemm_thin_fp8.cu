// Products of few FP8 rows and FP8 weights for Hopper, where what takes time is to bring the weights and to begin. The sums are those
// of `gemm_hopper_fp8.cu`, bit by bit, for up to 64 rows a tile.
//
// Weights are the 64-row operand of wgmma here and rows the other one, of 8 to 64: a block takes 64 packed weight rows, so that there are
// as many blocks as bring weights as fast as memory gives them, two a multiprocessor. One thread keeps a ring of blocks of k full, a warp
// another one of scales, and four warps multiply: products of one block of k are made while those of the one before are scaled. What
// leaves as codes has a scale for 128 outputs: four blocks are a cluster then, and tell each other the largest of their 32.
#include "gemm_fp8.cuh"

constexpr u32 MOST_MAPS = 4;                      // that rows are multiplied with in one launch
constexpr u32 TILE = 64;                          // packed weight rows of a block
constexpr u32 WEIGHT_BYTES = TILE * LINE_BYTES;   // of a block of k
constexpr u32 FEW_BOX = 8;                        // token rows per TMA box, where a tile has no more; else ROW_BOX
constexpr u32 MOST_ROWS = 64;                     // of a tile
constexpr u32 SHARERS = 4;                        // blocks whose outputs share a scale
constexpr u32 MULTIPLIERS = 128, FEW_THREADS = MULTIPLIERS + 64;
constexpr u32 CHUNK = 8, CHUNKS = 4;              // blocks of k whose scales come together, and how many such are under way

constexpr u32 FEW_SHARED_BYTES = 112352;          // repeated by hopper.rs
constexpr u32 FEW_RING_BYTES = 82944;             // 9 stages of 8 rows, 6 of 32 or 5 of 64
constexpr u32 MOST_STAGES = 9;
constexpr u32 PITCH = TILE + 4;                   // floats between staged rows: four lanes of a fragment meet different banks
constexpr u32 OFF_SUMS = FEW_RING_BYTES;
constexpr u32 OFF_FACTORS = OFF_SUMS + MOST_ROWS * PITCH * 4;
constexpr u32 FACTOR_BYTES = (MOST_ROWS + 4) * 4;  // of a block of k: rows' scales, then those of weights, on 16 bytes
constexpr u32 OFF_LARGEST = OFF_FACTORS + CHUNKS * CHUNK * FACTOR_BYTES;
constexpr u32 LARGEST_BYTES = MOST_ROWS * SHARERS * 4;
constexpr u32 OFF_FULL = OFF_LARGEST + 2 * LARGEST_BYTES;
constexpr u32 OFF_EMPTY = OFF_FULL + 8 * MOST_STAGES;
constexpr u32 OFF_TOLD = OFF_EMPTY + 8 * MOST_STAGES;  // two barriers
constexpr u32 OFF_CHUNK_FULL = OFF_TOLD + 16;
constexpr u32 OFF_CHUNK_EMPTY = OFF_CHUNK_FULL + 8 * CHUNKS;
static_assert(OFF_CHUNK_EMPTY + 8 * CHUNKS + 1024 == FEW_SHARED_BYTES, "");

// One of several maps that lie beside each other as if they were one weight, each from a tile of its own on; or what all experts have
// in common. The twin of `launch::FewMap`.
struct FewMap {
    u64 weight;     // as of a Block, which has it where there is one map
    u64 out;        // row-major
    u64 bias;       // float32 of the outputs, or null
    u32 out_stride; // elements per out row, multiple of 8; of codes bytes
    u32 columns;    // of out, multiple of 8
    u32 first;      // its first tile
    u32 wide;       // whether outputs are float32, where they are no codes
};

// The twin of `launch::FewArgs`.
struct FewArgs {
    HopperArgs gemm; // `n`: packed weight rows of all maps, each in whole tiles
    FewMap maps[MOST_MAPS];
    u32 count; // of maps
};

// d[64 packed weights x N rows] (+)= a * b^T for 32 values of k; `add` = 0 starts the sum.
#define FEW_REGS_8 "%0,%1,%2,%3"
#define FEW_REGS_16 FEW_REGS_8 ",%4,%5,%6,%7"
#define FEW_OUT_8 F4(0)
#define FEW_OUT_16 F4(0), F4(4)
#define WGMMA_FEW(N, REGS, OUT, A, B, ADD)                                                                              \
    asm volatile("{\n .reg .pred p;\n .reg .b64 a, b;\n setp.ne.u32 p, " ADD ", 0;\n"                                   \
                 " mov.b64 a, {" A ", " OPERAND_HIGH "};\n mov.b64 b, {" B ", " OPERAND_HIGH "};\n"                     \
                 " wgmma.mma_async.sync.aligned.m64n" #N "k32.f32.e4m3.e4m3 {" REGS "}, a, b, p, 1, 1;\n}"              \
                 : OUT                                                                                                  \
                 : "r"(a), "r"(b), "r"(add))

template <u32 N> __device__ __forceinline__ void wgmma_few(float* d, u32 a, u32 b, u32 add);
template <> __device__ __forceinline__ void wgmma_few<8>(float* d, u32 a, u32 b, u32 add) { WGMMA_FEW(8, FEW_REGS_8, FEW_OUT_8, "%4", "%5", "%6"); }
template <> __device__ __forceinline__ void wgmma_few<16>(float* d, u32 a, u32 b, u32 add) { WGMMA_FEW(16, FEW_REGS_16, FEW_OUT_16, "%8", "%9", "%10"); }
template <> __device__ __forceinline__ void wgmma_few<32>(float* d, u32 a, u32 b, u32 add) { WGMMA_FEW(32, REGS_0, OUT_0, "%16", "%17", "%18"); }
template <> __device__ __forceinline__ void wgmma_few<64>(float* d, u32 a, u32 b, u32 add) { WGMMA_FEW(64, REGS_1, OUT_1, "%32", "%33", "%34"); }

__device__ __forceinline__ void copy_async4(u32 to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ float2 load_shared8(u32 addr) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(addr) : "memory");
    return v;
}

__device__ __forceinline__ float4 floats(uint4 v) {
    return make_float4(__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w));
}

template <bool GATED, bool CODED> struct Few {
    static constexpr u32 WIDTH = GATED ? TILE / 2 : TILE;  // outputs of a block
    static constexpr u32 BESIDE = CODED ? SHARERS : 1;

    struct Cursor {
        u32 stage = 0, phase = 0;
        __device__ __forceinline__ void next(u32 stages) {
            if (++stage == stages) stage = 0, phase ^= 1;
        }
    };

    // What a block multiplies with: a tile of a map, whose weight is at an address.
    struct Own {
        const FewMap& map;
        u64 weight;
        u32 tile;
    };

    const FewArgs& args;
    const HopperArgs& a;
    const u32 base, blocks, stage_bytes, stages;

    __device__ __forceinline__ Few(const FewArgs& args, u32 base)
        : args(args), a(args.gemm), base(base), blocks(div_up(a.k, SCALED)),
          stage_bytes(WEIGHT_BYTES + round_up(a.tile_rows, a.tile_rows <= FEW_BOX ? FEW_BOX : ROW_BOX) * LINE_BYTES),
          stages(min(FEW_RING_BYTES / stage_bytes, MOST_STAGES)) {}

    __device__ __forceinline__ u32 full(u32 stage) const { return base + OFF_FULL + 8 * stage; }
    __device__ __forceinline__ u32 empty(u32 stage) const { return base + OFF_EMPTY + 8 * stage; }
    __device__ __forceinline__ u32 chunk_full(u32 chunk) const { return base + OFF_CHUNK_FULL + 8 * chunk; }
    __device__ __forceinline__ u32 chunk_empty(u32 chunk) const { return base + OFF_CHUNK_EMPTY + 8 * chunk; }
    __device__ __forceinline__ u32 factors(u32 chunk, u32 b) const {
        return base + OFF_FACTORS + (chunk * CHUNK + b % CHUNK) * FACTOR_BYTES;
    }
    __device__ __forceinline__ u32 across() const { return div_up(a.n, TILE * BESIDE); }
    __device__ __forceinline__ Own own_of(const Work& t) const {
        const u32 tile = t.pair * BESIDE + (BESIDE > 1 ? cluster_rank() : 0);
        u32 i = 0;
        while (i + 1 < args.count && args.maps[i + 1].first <= tile) ++i;
        return {args.maps[i], args.count > 1 ? args.maps[i].weight : blocks_of(a)[t.block].weight, tile - args.maps[i].first};
    }

    // ------------------------------------------------------------------------------------------------- the loader

    // Bytes of rows that a stage is brought, in whole boxes.
    static __device__ __forceinline__ u32 row_bytes(const Work& t) {
        return round_up(t.rows, t.rows <= FEW_BOX ? FEW_BOX : ROW_BOX) * LINE_BYTES;
    }

    __device__ __forceinline__ void bring_weights(const Own& own, const Work& t, u32 b, u32 stage) const {
        barrier_expect(full(stage), WEIGHT_BYTES + row_bytes(t));
        tma_load_2d(base + stage * stage_bytes, reinterpret_cast<const TensorMap*>(own.weight), full(stage), b * SCALED, own.tile * TILE);
    }

    __device__ __forceinline__ void bring_rows(const Work& t, u32 b, u32 stage) const {
        const u32 to = base + stage * stage_bytes + WEIGHT_BYTES;
        if (t.rows <= FEW_BOX) {
            tma_load_2d(to, &a.rows, full(stage), b * SCALED, t.row0);
        } else {
            for (u32 row = 0; row < t.rows; row += ROW_BOX) tma_load_2d(to + row * LINE_BYTES, &a.out, full(stage), b * SCALED, t.row0 + row);
        }
    }

    // By one thread, but for finding tiles.
    __device__ __forceinline__ void load(u32 first, u32 step) const {
        const bool lead = (threadIdx.x & 31) == 0;
        TileWalk<FEW_BOX> walk(a, across());
        Cursor cursor = {0, 1};
        bool waited = a.blocks != 0;  // for what writes the list
        if (waited) take_turn();
        for (u32 unit = first;; unit += step) {
            const Work t = walk.find(unit);
            if (!t.rows) break;
            const Own own = own_of(t);
            // Weights do not wait for what runs before.
            const u32 ahead = waited ? 0 : min(blocks, stages);
            if (lead) {
                open_map(own.weight);
                for (u32 b = 0; b < ahead; ++b) bring_weights(own, t, b, b);
            }
            if (!waited) take_turn();
            waited = true;
            if (lead)
                for (u32 b = 0; b < blocks; ++b) {
                    barrier_wait(empty(cursor.stage), cursor.phase);
                    if (b >= ahead) bring_weights(own, t, b, cursor.stage);
                    bring_rows(t, b, cursor.stage);
                    cursor.next(stages);
                }
            __syncwarp();
        }
        if (!waited) take_turn();
    }

    // A chunk of scales, each lane some of them.
    __device__ __forceinline__ void bring_factors(const Work& t, const float* gate, const float* up, u32 b, u32 chunk) const {
        const u32 lane = threadIdx.x & 31, block = lane % CHUNK, to = factors(chunk, block);
        if (b + block < blocks) {
            for (u32 row = lane / CHUNK; row < t.rows; row += 32 / CHUNK)
                copy_async4(to + row * 4, reinterpret_cast<const void*>(a.rows_start + (u64)(t.row0 + row) * a.rows_stride + round_up(a.k, 4) +
                                                                         (b + block) * 4));
            if (lane < CHUNK) copy_async4(to + MOST_ROWS * 4, gate + b + block);
            else if (GATED && lane < 2 * CHUNK) copy_async4(to + MOST_ROWS * 4 + 4, up + b + block);
        }
        barrier_follow(chunk_full(chunk));
    }

    __device__ __forceinline__ void load_factors(u32 first, u32 step) const {
        TileWalk<FEW_BOX> walk(a, across());
        Cursor cursor = {0, 1};
        take_turn();
        for (u32 unit = first;; unit += step) {
            const Work t = walk.find(unit);
            if (!t.rows) break;
            const Own own = own_of(t);
            const u32 down = div_up(own.map.columns, SCALED), part = min(own.tile * WIDTH / SCALED, down - 1);
            const float* gate = weight_scales_of(own.weight) + (u64)part * blocks;
            for (u32 b = 0; b < blocks; b += CHUNK) {
                barrier_wait(chunk_empty(cursor.stage), cursor.phase);
                bring_factors(t, gate, gate + (u64)down * blocks, b, cursor.stage);
                cursor.next(CHUNKS);
            }
        }
    }

    // -------------------------------------------------------------------------------------------- the multipliers

    template <u32 N> __device__ __forceinline__ void begin(float* products, const Cursor& cursor) const {
        const u32 at = base + cursor.stage * stage_bytes, w = operand(at), x = operand(at + WEIGHT_BYTES);
        barrier_wait(full(cursor.stage), cursor.phase);
        wgmma_fence();
#pragma unroll
        for (u32 step = 0; step < 4; ++step) wgmma_few<N>(products, w + 2 * step, x + 2 * step, step);
        wgmma_commit();
    }

    // acc += the products of a block of k, each with its factor; a thread has rows 2 (lane % 4) and the next of every eight.
    template <u32 N> __device__ __forceinline__ void take(float* acc, float* products, u32 stage, Cursor& chunk, u32 b) const {
        settle<N>(products);
        const u32 lane = threadIdx.x & 31;
        if (lane == 0) barrier_arrive(empty(stage));
        if (b % CHUNK == 0) barrier_wait(chunk_full(chunk.stage), chunk.phase);
        const u32 from = factors(chunk.stage, b);
        const float gate = load_shared(from + MOST_ROWS * 4), up = GATED ? load_shared(from + MOST_ROWS * 4 + 4) : gate;
#pragma unroll
        for (u32 j = 0; j < N / 8; ++j) {
            const float2 x = load_shared8(from + (8 * j + 2 * (lane & 3)) * 4);
            acc[4 * j] = __fmaf_rn(__fmul_rn(x.x, gate), products[4 * j], acc[4 * j]);
            acc[4 * j + 1] = __fmaf_rn(__fmul_rn(x.y, gate), products[4 * j + 1], acc[4 * j + 1]);
            acc[4 * j + 2] = __fmaf_rn(__fmul_rn(x.x, up), products[4 * j + 2], acc[4 * j + 2]);
            acc[4 * j + 3] = __fmaf_rn(__fmul_rn(x.y, up), products[4 * j + 3], acc[4 * j + 3]);
        }
        if (b % CHUNK == CHUNK - 1 || b == blocks - 1) {
            __syncwarp();
            if (lane == 0) barrier_arrive(chunk_empty(chunk.stage));
            chunk.next(CHUNKS);
        }
    }

    template <u32 N> __device__ __forceinline__ void multiply(const Work& t, Cursor& cursor, Cursor& chunk, u32 tile) const {
        float acc[N / 2], first[N / 2], second[N / 2];
#pragma unroll
        for (u32 i = 0; i < N / 2; ++i) acc[i] = 0.0f;
        begin<N>(first, cursor);
        for (u32 b = 1;; b += 2) {
            const u32 one = cursor.stage;
            cursor.next(stages);
            if (b == blocks) {
                wgmma_wait<0>();
                take<N>(acc, first, one, chunk, b - 1);
                break;
            }
            begin<N>(second, cursor);
            wgmma_wait<1>();
            take<N>(acc, first, one, chunk, b - 1);
            const u32 two = cursor.stage;
            cursor.next(stages);
            if (b + 1 == blocks) {
                wgmma_wait<0>();
                take<N>(acc, second, two, chunk, b);
                break;
            }
            begin<N>(first, cursor);
            wgmma_wait<1>();
            take<N>(acc, second, two, chunk, b);
        }
        stage_sums<N>(acc);
        if (CODED) store_codes(t, tile);
        else store(t);
    }

    // Outputs go through shared memory, a row after the other.
    template <u32 N> __device__ __forceinline__ void stage_sums(const float* acc) const {
        const u32 thread = threadIdx.x, lane = thread & 31, warp = thread / 32, sums = base + OFF_SUMS;
        warpgroup_barrier(1);  // what was staged before has been read
#pragma unroll
        for (u32 j = 0; j < N / 8; ++j)
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const u32 to = sums + (8 * j + 2 * (lane & 3) + i) * PITCH * 4;
                const float first = acc[4 * j + i], second = acc[4 * j + 2 + i];
                if (GATED) {
                    const float value = quick_silu(first) * second;
                    store_shared(to + (warp * 8 + lane / 4) * 4, CODED ? wide(narrow<bf16>(value)) : value);
                } else {
                    store_shared(to + (warp * 16 + lane / 4) * 4, first);
                    store_shared(to + (warp * 16 + lane / 4 + 8) * 4, second);
                }
            }
        warpgroup_barrier(1);
    }

    __device__ __forceinline__ float4 staged(u32 row, u32 column) const {
        return floats(load_shared16(base + OFF_SUMS + (row * PITCH + column) * 4));
    }

    // As bf16 or float32, eight columns a thread.
    __device__ __forceinline__ void store(const Work& t) const {
        constexpr u32 PIECES = WIDTH / 8;
        const Own own = own_of(t);
        const FewMap& map = own.map;
        const u32 piece = threadIdx.x % PIECES * 8, column = own.tile * WIDTH + piece;
        if (column >= map.columns) return;
        float bias[8] = {};
        if (!GATED && map.bias)
#pragma unroll
            for (u32 i = 0; i < 8; ++i) bias[i] = __ldg(reinterpret_cast<const float*>(map.bias) + column + i);
        for (u32 row = threadIdx.x / PIECES; row < t.rows; row += MULTIPLIERS / PIECES) {
            float4 low = staged(row, piece), high = staged(row, piece + 4);
            if (!GATED && map.bias) {
                low.x += bias[0], low.y += bias[1], low.z += bias[2], low.w += bias[3];
                high.x += bias[4], high.y += bias[5], high.z += bias[6], high.w += bias[7];
            }
            const u64 to = (u64)(t.row0 + row) * map.out_stride + column;
            if (map.wide) {
                float4* out = reinterpret_cast<float4*>(reinterpret_cast<float*>(map.out) + to);
                out[0] = low;
                out[1] = high;
            } else {
                store_global16(reinterpret_cast<u16*>(map.out) + to, make_uint4(pack_bf16(low.x, low.y), pack_bf16(low.z, low.w),
                                                                                    pack_bf16(high.x, high.y), pack_bf16(high.z, high.w)));
            }
        }
    }

    // As codes and scales, four columns a thread. Tiles take the two rooms for the largest in turn.
    __device__ __forceinline__ void store_codes(const Work& t, u32 tile) const {
        const Own own = own_of(t);
        const FewMap& map = own.map;
        const u32 thread = threadIdx.x, part = thread & 7, column = own.tile * WIDTH + 4 * part;
        const u32 told = base + OFF_TOLD + tile % 2 * 8, largest = base + OFF_LARGEST + tile % 2 * LARGEST_BYTES;
        if (thread == 0) barrier_expect(told, t.rows * SHARERS * 4);
        for (u32 first = 0; first < t.rows; first += MULTIPLIERS / 8) {
            const u32 row = first + thread / 8;
            float most = LEAST;
            if (row < t.rows) {
                const float4 v = staged(row, 4 * part);
                most = larger(larger(larger(larger(most, v.x), v.y), v.z), v.w);
            }
#pragma unroll
            for (u32 step = 1; step < 8; step *= 2) most = larger(most, __shfl_xor_sync(~0u, most, step));
            if (part < SHARERS && row < t.rows) {
                const u32 to = peer_addr(largest + (row * SHARERS + cluster_rank()) * 4, part), told_there = peer_addr(told, part);
                asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(to),
                             "r"(__float_as_uint(most)), "r"(told_there)
                             : "memory");
            }
        }
        barrier_wait(told, tile / 2 % 2);
        if (column >= map.columns) return;
        for (u32 row = thread / 8; row < t.rows; row += MULTIPLIERS / 8) {
            const float4 all = floats(load_shared16(largest + row * SHARERS * 4)), v = staged(row, 4 * part);
            const float scale = scale_for(larger(larger(larger(larger(LEAST, all.x), all.y), all.z), all.w), a.powers);
            const float inverse = __frcp_rn(scale);
            char* out = reinterpret_cast<char*>(map.out) + (u64)(t.row0 + row) * map.out_stride;
            *reinterpret_cast<u32*>(out + column) =
                encode(quotient(v.x, scale, inverse), quotient(v.y, scale, inverse)) |
                encode(quotient(v.z, scale, inverse), quotient(v.w, scale, inverse)) << 16;
            if (column % SCALED == 0) *reinterpret_cast<float*>(out + round_up(map.columns, 4) + column / SCALED * 4) = scale;
        }
    }

    __device__ __forceinline__ void multiply_all(u32 first, u32 step) const {
        TileWalk<FEW_BOX> walk(a, across());
        Cursor cursor = {0, 0}, chunk = {0, 0};
        take_turn();
        u32 tile = 0;
        for (u32 unit = first;; unit += step, ++tile) {
            const Work t = walk.find(unit);
            if (!t.rows) break;
            if (t.rows <= 8) multiply<8>(t, cursor, chunk, tile);
            else if (t.rows <= 16) multiply<16>(t, cursor, chunk, tile);
            else if (t.rows <= 32) multiply<32>(t, cursor, chunk, tile);
            else multiply<64>(t, cursor, chunk, tile);
        }
    }

    __device__ __forceinline__ void run() const {
        if (threadIdx.x == 0) {
            for (u32 s = 0; s < stages; ++s) {
                barrier_init(full(s), 1);
                barrier_init(empty(s), MULTIPLIERS / 32);
            }
            for (u32 c = 0; c < CHUNKS; ++c) {
                barrier_init(chunk_full(c), 32);
                barrier_init(chunk_empty(c), MULTIPLIERS / 32);
            }
            for (u32 i = 0; i < 2; ++i) barrier_init(base + OFF_TOLD + 8 * i, 1);
            barriers_made();
        }
        if (BESIDE > 1) cluster_sync();
        else __syncthreads();
        const u32 first = blockIdx.x / BESIDE, step = gridDim.x / BESIDE;
        if (threadIdx.x < MULTIPLIERS) multiply_all(first, step);
        else if (threadIdx.x < MULTIPLIERS + 32) load(first, step);
        else load_factors(first, step);
        if (BESIDE > 1) cluster_sync();  // no block leaves while another may still tell it something
    }
};

#define FEW_KERNEL(name, GATED, CODED)                                                                                      \
    extern "C" __global__ void __cluster_dims__(Few<GATED, CODED>::BESIDE, 1, 1) __launch_bounds__(FEW_THREADS)             \
        name(const __grid_constant__ FewArgs args) {                                                                        \
        extern __shared__ char shared[];                                                                                    \
        Few<GATED, CODED>(args, (smem_addr(shared) + 1023) & ~1023u).run();                                                 \
    }

FEW_KERNEL(gemm_thin_fp8_u32_bf16, false, false)
FEW_KERNEL(gated_thin_fp8_u32_bf16, true, false)
FEW_KERNEL(gated_thin_fp8_u32_u32, true, true)
