// Products of bf16 rows and bf16 weights for Hopper.
#include "gemm_hopper.cuh"

// Weights in bf16, which TMA finds by a map each.
struct Plain {
    static constexpr bool WAITS = true;
    static constexpr u32 STEP = 32;

    // The map was copied to the GPU, not handed over as an argument: TMA may hold what the address held before.
    static __device__ __forceinline__ void open(u64 weight) {
        asm volatile("fence.proxy.tensormap::generic.acquire.sys [%0], 128;" ::"l"(weight) : "memory");
    }

    static __device__ __forceinline__ u32 bytes(const HopperArgs&, u32) { return WEIGHT_BYTES; }

    static __device__ __forceinline__ void load(const HopperArgs&, u64 weight, u32 slot, u32 full, u32 block, u32 row) {
        tma_load_2d(slot, reinterpret_cast<const TensorMap*>(weight), full, block * K_BLOCK, row);
    }

    // The sum over k for one tile of at most COLS rows. Two k blocks are in flight; a slot is released when the next
    // block has been issued. Once the tensor cores have work, what the last tile left to do is done beside them.
    template <int COLS, int MAX_ROWS, typename Left>
    static __device__ __forceinline__ void multiply(const HopperArgs&, float* acc, RowRing<MAX_ROWS>& ring, u32 base, u32 blocks,
                                                    u32 group, const Left& left) {
        const u32 lane = threadIdx.x & 31;
        const u32 busy = min(1, blocks - 1);
        u32 previous = 0;
        for (u32 b = 0; b < blocks; ++b) {
            u32 slot = base + ring.stage * RowRing<MAX_ROWS>::SLOT_BYTES;
            u32 w = operand(slot + group * (WEIGHT_BYTES / 2)), x = operand(slot + WEIGHT_BYTES);
            barrier_wait(base + BAR_FULL + 8 * ring.stage, ring.phase);
            wgmma_fence();
            Wgmma<COLS>::run(acc, w, x, b);
            Wgmma<COLS>::run(acc, w + 2, x + 2, 1);
            Wgmma<COLS>::run(acc, w + 4, x + 4, 1);
            Wgmma<COLS>::run(acc, w + 6, x + 6, 1);
            wgmma_commit();
            if (b == busy) left();
            if (b) {
                wgmma_wait<1>();
                release_stage(base, previous, lane);
            }
            previous = ring.stage;
            ring.next();
        }
        wgmma_wait<0>();
        release_stage(base, previous, lane);
        settle<COLS>(acc);
    }
};

HOPPER_VARIANT(hopper, Plain, 256)
HOPPER_VARIANT(hopper, Plain, 128)
HOPPER_VARIANT(hopper, Plain, 64)
HOPPER_WIDE(hopper, Plain, 256)
HOPPER_WIDE(hopper, Plain, 128)
HOPPER_WIDE(hopper, Plain, 64)
