// What every kernel shares: number formats, views of rows, sums in a fixed order, and how a kernel says that
// an index points outside. No CUDA header is needed: NVRTC alone compiles this.
#pragma once

typedef float f32;
typedef unsigned int u32;
typedef unsigned long long u64;

// Sixteen-bit formats are only stored; arithmetic is done in float32.
struct bf16 { unsigned short bits; };
struct f16 { unsigned short bits; };

__device__ __forceinline__ f32 wide(f32 value) { return value; }
__device__ __forceinline__ f32 wide(bf16 value) { return __uint_as_float(u32(value.bits) << 16); }
__device__ __forceinline__ f32 wide(f16 value) {
    f32 result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}

// The nearest number of a format, ties to even.
template <typename T> __device__ __forceinline__ T narrow(f32 value);
template <> __device__ __forceinline__ f32 narrow<f32>(f32 value) { return value; }
template <> __device__ __forceinline__ bf16 narrow<bf16>(f32 value) {
    bf16 result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
    return result;
}

// Kernels of a lane start early, as soon as every block of the one before has begun: so the first thing a kernel does is to
// wait until all that was enqueued before it is done. What it reads that no kernel writes (weights) it may fetch earlier.
// Only then may the next one be let in, or work of two kernels back could still be under way beside it.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_successor_in() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void take_turn() {
    wait_for_predecessor();
    let_successor_in();
}

// A view [rows, width]; `stride` elements between the starts of two rows. The twin of `launch::Rows`.
struct Rows {
    u64 start;
    u64 stride;
    u32 rows;
    u32 width;
};

template <typename T> __device__ __forceinline__ T* row(const Rows& view, u32 m) {
    return reinterpret_cast<T*>(view.start) + m * view.stride;
}

// The element of a single-column view.
template <typename T> __device__ __forceinline__ T at(const Rows& view, u32 m) { return *row<T>(view, m); }

// What can be wrong with numbers that arrive in memory. The twin of `report::Cause`.
enum Cause : u32 {
    TOKEN_ID = 1,      // first is not below second
    CACHE_SLOT = 2,    // likewise
    SOURCE_ROW = 3,    // likewise
    TOKENS_HELD = 6,   // sequences hold first of second tokens
    SPAN = 7,          // sequence first spans tokens second..third
    CACHE_BLOCK = 8,   // first is not below second
    BLOCK_OUTSIDE = 9, // cache block first of sequence second is outside the cache
    EXPERT = 10,       // first is not below second
    ROWS_DESCEND = 11, // rows of expert first end at second, but start at third
    ROWS_END = 12,     // first is not below second
    NOT_FINITE = 13,   // row first, of the operation's part second, holds a NaN or an infinity
    POSITION = 14,     // first is not below second
    EXPERT_TWICE = 20, // token first is sent to expert second twice
    SLOT = 21,         // first is not below second
    ROWS_COUNTED = 22, // first rows are counted, expected second
    RANKS_OF_TOKEN = 23, // token first is sent to more than second ranks
    // Of metadata row first, from source second: third is wrong, fourth was expected.
    ROW_STRAY = 24, ROW_DESCENDS = 25, ROW_EMPTY = 26, ROW_SLOT = 27, ROW_FIRST = 28, ROW_LAST = 29, ROW_ASSIGNED = 30,
    ROWS_WITH_SLOT = 31, // slot first has second rows, expected third
    ASSIGNMENTS = 32,  // there are first, expected second
};

// Where a kernel says what is wrong: the first thread to claim the report writes it, for the host to read.
struct Report {
    u64 claim;  // one word of device memory, zero until claimed
    u64 page;   // words of host memory: filled, serial, cause, first, second, third, fourth
    u32 serial; // which operation this is
    u32 padding;
};

__device__ __noinline__ void complain(const Report& report, Cause cause, u32 first, u32 second, u32 third = 0,
                                      u32 fourth = 0) {
    if (atomicCAS(reinterpret_cast<u32*>(report.claim), 0u, 1u) != 0u) return;
    volatile u32* page = reinterpret_cast<volatile u32*>(report.page);
    page[1] = report.serial;
    page[2] = cause;
    page[3] = first;
    page[4] = second;
    page[5] = third;
    page[6] = fourth;
    __threadfence_system();
    page[0] = 1u;
}

// Sums and maxima over a warp; every lane gets the result, always in the same order.
__device__ __forceinline__ f32 warp_sum(f32 value) {
    for (int step = 16; step > 0; step >>= 1) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

__device__ __forceinline__ f32 warp_max(f32 value) {
    for (int step = 16; step > 0; step >>= 1) value = fmaxf(value, __shfl_xor_sync(~0u, value, step));
    return value;
}

// Threads of a block in kernels that go row by row.
constexpr u32 THREADS = 256;

// Sum over a block of THREADS; every thread gets the result.
__device__ __forceinline__ f32 block_sum(f32 value) {
    __shared__ f32 sums[THREADS / 32];
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    f32 total = 0.0f;
    for (u32 warp = 0; warp < THREADS / 32; ++warp) total += sums[warp];
    return total;
}

// Neither a NaN nor an infinity: zero times either is a NaN.
__device__ __forceinline__ bool finite(f32 x) { return x * 0.0f == 0.0f; }

__device__ __forceinline__ f32 sigmoid(f32 x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ f32 silu(f32 x) { return x / (1.0f + expf(-x)); }

// The same within a few units of the last place, for products that hide little of their epilogue. All kernels on the
// tensor cores use it, so that an output's bits do not depend on which of them made it.
__device__ __forceinline__ f32 quick_silu(f32 x) {
    f32 e, r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(x * -1.4426950408889634f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.0f + e));
    return x * r;
}

// Element by element: blocks along x share the columns of a row, blocks along y the rows.
#define FOR_ELEMENTS(view, m, n)                                                                            \
    for (u32 m = blockIdx.y; m < (view).rows; m += gridDim.y)                                               \
        for (u32 n = blockIdx.x * THREADS + threadIdx.x; n < (view).width; n += gridDim.x * THREADS)

// Columns that a thread takes at once, so that memory is touched 16 bytes at a time where rows start on 16 bytes.
constexpr u32 RUN = 8;

// Up to RUN neighbours of a row, in float32.
struct Run { f32 values[RUN]; };

template <typename T> __device__ __forceinline__ bool in_pieces(const T* row, u32 count) {
    return count == RUN && reinterpret_cast<u64>(row) % 16 == 0;
}

template <typename T> __device__ __forceinline__ Run read(const T* from, u32 count) {
    constexpr u32 PIECES = RUN * sizeof(T) / 16;
    union { uint4 pieces[PIECES]; T elements[RUN]; } held;
    Run run = {};
    if (in_pieces(from, count)) {
#pragma unroll
        for (u32 i = 0; i < PIECES; ++i) held.pieces[i] = reinterpret_cast<const uint4*>(from)[i];
#pragma unroll
        for (u32 j = 0; j < RUN; ++j) run.values[j] = wide(held.elements[j]);
    } else {
        for (u32 j = 0; j < RUN; ++j)
            if (j < count) run.values[j] = wide(from[j]);
    }
    return run;
}

template <typename T> __device__ __forceinline__ void write(T* to, const Run& run, u32 count) {
    constexpr u32 PIECES = RUN * sizeof(T) / 16;
    union { uint4 pieces[PIECES]; T elements[RUN]; } held;
    if (in_pieces(to, count)) {
#pragma unroll
        for (u32 j = 0; j < RUN; ++j) held.elements[j] = narrow<T>(run.values[j]);
#pragma unroll
        for (u32 i = 0; i < PIECES; ++i) reinterpret_cast<uint4*>(to)[i] = held.pieces[i];
    } else {
        for (u32 j = 0; j < RUN; ++j)
            if (j < count) to[j] = narrow<T>(run.values[j]);
    }
}

// The same of ROWS rows that are `apart` elements from each other, of which so many are there: all are on their way before any is
// looked at.
template <u32 ROWS, typename T>
__device__ __forceinline__ void read_rows(Run (&runs)[ROWS], const T* from, u64 apart, u32 rows, u32 count) {
    constexpr u32 PIECES = RUN * sizeof(T) / 16;
    if (rows >= ROWS && in_pieces(from, count) && apart * sizeof(T) % 16 == 0) {
        union { uint4 pieces[ROWS][PIECES]; T elements[ROWS][RUN]; } held;
#pragma unroll
        for (u32 i = 0; i < ROWS * PIECES; ++i)
            held.pieces[i / PIECES][i % PIECES] = reinterpret_cast<const uint4*>(from + i / PIECES * apart)[i % PIECES];
#pragma unroll
        for (u32 i = 0; i < ROWS * RUN; ++i) runs[i / RUN].values[i % RUN] = wide(held.elements[i / RUN][i % RUN]);
    } else {
#pragma unroll
        for (u32 i = 0; i < ROWS; ++i) runs[i] = i < rows ? read(from + i * apart, count) : Run{};
    }
}

// Run by run: `count` columns of row m from n on.
#define FOR_RUNS(view, m, n, count)                                                                          \
    for (u32 runs_ = ((view).width + RUN - 1) / RUN, at_ = blockIdx.x * THREADS + threadIdx.x;              \
         at_ < (view).rows * runs_; at_ += gridDim.x * THREADS)                                              \
        if (const u32 m = at_ / runs_, n = at_ % runs_ * RUN, count = min((view).width - n, RUN); true)

// Runs that a lane takes at once where a warp takes a stretch of one row: so many loads are under way at a time, enough
// to keep memory busy although their addresses must be looked up first. A lane's runs lie STRIDE columns apart, so that
// a warp always touches neighbours. Worked example: width 2048 is two stretches a row; in the first, lane 3 holds
// columns 24..32, 280..288, 536..544 and 792..800.
constexpr u32 RUNS = 4, STRIDE = 32 * RUN;

// Stretch by stretch, a warp each: n is the first column of the lane, which may lie beyond the row's end.
#define FOR_STRETCHES(view, m, n)                                                                            \
    for (u32 stretches_ = ((view).width + RUNS * STRIDE - 1) / (RUNS * STRIDE),                             \
             at_ = (blockIdx.x * THREADS + threadIdx.x) / 32;                                               \
         at_ < (view).rows * stretches_; at_ += gridDim.x * THREADS / 32)                                   \
        if (const u32 m = at_ / stretches_, n = at_ % stretches_ * (RUNS * STRIDE) + threadIdx.x % 32 * RUN; true)

// The lane's runs of a row whose first column here is n of `width`.
template <typename T> __device__ __forceinline__ void read_runs(Run (&runs)[RUNS], const T* row, u32 n, u32 width) {
    constexpr u32 PIECES = RUN * sizeof(T) / 16;
    if (n + (RUNS - 1) * STRIDE + RUN <= width && reinterpret_cast<u64>(row) % 16 == 0) {
        union { uint4 pieces[RUNS][PIECES]; T elements[RUNS][RUN]; } held;
#pragma unroll
        for (u32 i = 0; i < RUNS * PIECES; ++i)
            held.pieces[i / PIECES][i % PIECES] = reinterpret_cast<const uint4*>(row + n + i / PIECES * STRIDE)[i % PIECES];
#pragma unroll
        for (u32 i = 0; i < RUNS * RUN; ++i) runs[i / RUN].values[i % RUN] = wide(held.elements[i / RUN][i % RUN]);
    } else {
#pragma unroll
        for (u32 i = 0; i < RUNS; ++i) {
            const u32 at = n + i * STRIDE;
            runs[i] = at < width ? read(row + at, min(width - at, RUN)) : Run{};
        }
    }
}

template <typename T> __device__ __forceinline__ void write_runs(T* row, const Run (&runs)[RUNS], u32 n, u32 width) {
#pragma unroll
    for (u32 i = 0; i < RUNS; ++i) {
        const u32 at = n + i * STRIDE;
        if (at < width) write(row + at, runs[i], min(width - at, RUN));
    }
}

// Names a kernel `op_from_to` for the formats it reads and writes.
#define KERNEL(op, Args, X, Y)                                                                              \
    extern "C" __global__ void __launch_bounds__(THREADS) op##_##X##_##Y(const __grid_constant__ Args args) { \
        take_turn();                                                                                        \
        op<X, Y>(args);                                                                                     \
    }
