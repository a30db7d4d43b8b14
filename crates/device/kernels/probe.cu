// What the probes start: a kernel that holds multiprocessors while something else is tried, and one that leaves a mark.
#include "common.cuh"

// The twin of `bench::Spin`.
struct Spin {
    u64 flag;    // u32 in device or host memory: leave once it has come to `number`
    u64 arrived; // u32 in device memory, zero between two launches: blocks that run
    u64 started; // u32 in host memory: set once all blocks run
    u64 cycles;  // leave after so many in any case
    u32 number;
    u32 padding;
};

// It takes all registers of its multiprocessor, besides the shared memory: else kernels that the driver copies with find room
// beside it.
constexpr u32 WIDE = 1024, HELD = 52;

extern "C" __global__ void __launch_bounds__(WIDE) spin_u32_u32(const __grid_constant__ Spin args) {
    take_turn();
    u32 held[HELD];
#pragma unroll
    for (u32 i = 0; i < HELD; ++i) held[i] = *reinterpret_cast<volatile u32*>(args.arrived);
    if (threadIdx.x == 0) {
        const u64 began = clock64();
        u32* arrived = reinterpret_cast<u32*>(args.arrived);
        if (atomicAdd(arrived, 1u) == gridDim.x - 1) {
            *arrived = 0;
            *reinterpret_cast<volatile u32*>(args.started) = 1;
        }
        while (int(*reinterpret_cast<volatile u32*>(args.flag) - args.number) < 0 && clock64() - began < args.cycles) __nanosleep(200);
    }
    __syncthreads();
#pragma unroll
    for (u32 i = 1; i < HELD; ++i) held[0] += held[i] * i;
    if (held[0] == ~0u) *reinterpret_cast<volatile u32*>(args.started) = held[0]; // so that all of them are wanted
}

// The twin of `bench::Mark`.
struct Mark {
    u64 at; // u32 in host memory
    u32 value;
    u32 padding;
};

template <typename, typename> __device__ void mark(const Mark& args) {
    if (threadIdx.x == 0) {
        *reinterpret_cast<volatile u32*>(args.at) = args.value;
        __threadfence_system();
    }
}

KERNEL(mark, Mark, u32, u32)
