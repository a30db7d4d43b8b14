// Products of bf16 rows for Hopper with weights that are held in codes. A consumer decodes what it multiplies: weights are the
// operand of wgmma that may lie in registers, where a thread has two rows of what `codes.cuh` lays out for it. Which registers
// or memory an operand comes from changes no bit of the sums.
#include "codes.cuh"
#include "gemm_hopper.cuh"

static_assert(BRICK == K_BLOCK && 2 * BRICK == WEIGHT_TILE, "a brick for each warpgroup and stage");

// d[64 weights x COLS rows] (+)= a * b^T for 16 values of k, with weights in registers; `add` = 0 starts the sum.
template <int COLS>
struct CodedWgmma;
#define DEFINE_CODED_WGMMA(COLS, I, A, B, P)                                                                    \
    template <>                                                                                                 \
    struct CodedWgmma<COLS> {                                                                                   \
        static __device__ __forceinline__ void run(float* d, const u32 (&a)[4], u32 b, u32 add) {               \
            asm volatile("{\n .reg .pred p;\n .reg .b64 b;\n setp.ne.u32 p, " P ", 0;\n"                       \
                         " mov.b64 b, {" B ", " OPERAND_HIGH "};\n"                                             \
                         " wgmma.mma_async.sync.aligned.m64n" #COLS "k16.f32.bf16.bf16 {" REGS_##I              \
                         "}, {" A "}, b, p, 1, 1, 0;\n}"                                                        \
                         : OUT_##I                                                                              \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b), "r"(add));                       \
        }                                                                                                       \
    };
DEFINE_CODED_WGMMA(32, 0, "%16, %17, %18, %19", "%20", "%21")
DEFINE_CODED_WGMMA(64, 1, "%32, %33, %34, %35", "%36", "%37")
DEFINE_CODED_WGMMA(128, 3, "%64, %65, %66, %67", "%68", "%69")
DEFINE_CODED_WGMMA(192, 5, "%96, %97, %98, %99", "%100", "%101")
DEFINE_CODED_WGMMA(256, 7, "%128, %129, %130, %131", "%132", "%133")

// Two rows of a brick as the four steps of wgmma want them of a thread. `before` is done between reading codes and writing `a`.
template <typename Code, typename Affine, typename Before>
__device__ __forceinline__ void decode(u32 (&a)[4][4], const char* brick, u32 row, u32 parts, const Before& before) {
    TwoRows<Code, Affine> rows;
    rows.load(brick, row, parts);
    before();
#pragma unroll
    for (u32 step = 0; step < 4; ++step)
#pragma unroll
        for (u32 i = 0; i < 4; ++i) a[step][i] = rows.pair(i % 2, step, i / 2);
}

struct Coded {
    static constexpr bool WAITS = false;
    static constexpr u32 STEP = 64;

    static __device__ __forceinline__ void open(u64) {}

    // Bricks there are of a CTA's two: the last tile may reach beyond them, and nobody stores what comes of that.
    static __device__ __forceinline__ u32 bricks(const HopperArgs& a, u32 row) {
        return row < a.n ? min(div_up(a.n - row, BRICK), 2u) : 0;
    }

    static __device__ __forceinline__ u32 bytes(const HopperArgs& a, u32 row) { return bricks(a, row) * a.brick_bytes; }

    static __device__ __forceinline__ void load(const HopperArgs& a, u64 weight, u32 slot, u32 full, u32 block, u32 row) {
        const u64 across = div_up(a.k, BRICK);
        for (u32 i = 0; i < bricks(a, row); ++i)
            bulk_load(slot + i * (WEIGHT_BYTES / 2), weight + ((row / BRICK + i) * across + block) * a.brick_bytes,
                      a.brick_bytes, full);
    }

    // The sum over k for one tile of at most COLS rows. In tall tiles, which have no registers to spare, a warpgroup decodes a
    // block while the other one multiplies its own; in low ones it also decodes while its own block is multiplied.
    template <int COLS, int MAX_ROWS, typename Left>
    static __device__ __forceinline__ void multiply(const HopperArgs& args, float* acc, RowRing<MAX_ROWS>& ring, u32 base,
                                                    u32 blocks, u32 group, const Left& left) {
        extern __shared__ char shared[];
        constexpr u32 BUFFERS = MAX_ROWS > 64 ? 1 : 2;
        const u32 lane = threadIdx.x & 31, row = threadIdx.x / 32 % 4 * 16 + lane / 4;
        const u32 busy = min(1, blocks - 1);
        u32 previous = 0;
        // Where a block has been multiplied its slot is free, and so are the registers that it was decoded into.
        const auto release = [&](u32 b) {
            if (!b) return;
            wgmma_wait<BUFFERS - 1>();
            release_stage(base, previous, lane);
        };
        const auto one = [&](u32 (&a)[4][4], u32 b) {
            const u32 slot = base + ring.stage * RowRing<MAX_ROWS>::SLOT_BYTES, x = operand(slot + WEIGHT_BYTES);
            const char* brick = shared + (slot - smem_addr(shared)) + group * (WEIGHT_BYTES / 2);
            barrier_wait(base + BAR_FULL + 8 * ring.stage, ring.phase);
            const auto before = [&] {
                if (BUFFERS == 1) release(b);
            };
            const auto run = [&](auto code, auto affine) {
                decode<decltype(code), decltype(affine)>(a, brick, row, args.parts, before);
            };
            FOR_KIND(ALL_KINDS, args.kind, run)
            wgmma_fence();
#pragma unroll
            for (u32 step = 0; step < 4; ++step) CodedWgmma<COLS>::run(acc, a[step], x + 2 * step, step ? 1 : b);
            wgmma_commit();
            if (b == busy) left();
            if (BUFFERS == 2) release(b);
            previous = ring.stage;
            ring.next();
        };
        u32 a[BUFFERS][4][4];
        for (u32 b = 0; b < blocks; b += BUFFERS) {
#pragma unroll
            for (u32 i = 0; i < BUFFERS; ++i)
                if (b + i < blocks) one(a[i], b + i);
        }
        wgmma_wait<0>();
        release_stage(base, previous, lane);
        settle<COLS>(acc);
    }
};

HOPPER_VARIANT(codes, Coded, 256)
HOPPER_VARIANT(codes, Coded, 64)
HOPPER_WIDE(codes, Coded, 256)
HOPPER_WIDE(codes, Coded, 64)
