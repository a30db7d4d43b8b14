// What the probes start: a kernel that holds multiprocessors while something else is tried, and one that leaves a mark.
#include "common.cuh"

// The twin of `bench::Spin`.
struct Spin {
    u64 flag;    // u32 in host memory: leave once it is not zero
    u64 arrived; // u32 in device memory, zero between two launches: blocks that run
    u64 started; // u32 in host memory: set once all blocks run
    u64 cycles;  // leave after so many in any case
};

template <typename, typename> __device__ void spin(const Spin& args) {
    if (threadIdx.x == 0) {
        const u64 began = clock64();
        u32* arrived = reinterpret_cast<u32*>(args.arrived);
        if (atomicAdd(arrived, 1u) == gridDim.x - 1) {
            *arrived = 0;
            *reinterpret_cast<volatile u32*>(args.started) = 1;
        }
        while (*reinterpret_cast<volatile u32*>(args.flag) == 0 && clock64() - began < args.cycles) __nanosleep(200);
    }
    __syncthreads();
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

KERNEL(spin, Spin, u32, u32)
KERNEL(mark, Mark, u32, u32)
