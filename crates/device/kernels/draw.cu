// out[place of r, n] = step * the signed 16-bit number that has the index first + r * row_step + n * column_step under a key:
// `Mix` of the host, four numbers of each of its words. Each is rounded to X, as a checkpoint would have it. Or what 128 x 128 of them
// are as e4m3 codes with a scale.
#include "scaled.cuh"

// Rows that stand together, `together` of them, begin `apart` rows after those before.
struct Args {
    u64 out, stride;
    u32 rows, width, together, apart;
    u64 key, first, row_step, column_step;
    f32 step;
    u32 padding;
    u64 scales; // of blocks of codes, block rows by blocks of columns
};

constexpr u64 GOLDEN = 0x9e3779b97f4a7c15;

__device__ __forceinline__ u64 scramble(u64 value) {
    u64 z = value + GOLDEN;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

template <typename X> __device__ __forceinline__ f32 number(const Args& args, u32 r, u32 n) {
    const u64 index = args.first + r * args.row_step + n * args.column_step;
    const u64 word = scramble(args.key + GOLDEN * (index / 4));
    return wide(narrow<X>(f32(short(word >> index % 4 * 16)) * args.step));
}

// Where a row begins, in elements.
__device__ __forceinline__ u64 place(const Args& args, u32 r) {
    return (u64(r / args.together) * args.apart + r % args.together) * args.stride;
}

template <typename X, typename Y> __device__ void draw(const Args& args) {
    const u32 n = blockIdx.x * THREADS + threadIdx.x;
    if (n >= args.width) return;
    for (u32 r = blockIdx.y; r < args.rows; r += gridDim.y)
        reinterpret_cast<Y*>(args.out)[place(args, r) + n] = narrow<Y>(number<X>(args, r, n));
}

// A block of threads has 128 x 128 numbers: a warp every eighth row, a lane four columns, which end together with the rows.
template <typename X, typename> __device__ void draw_blocks(const Args& args) {
    constexpr u32 WARPS = THREADS / 32, ROWS = GROUP / WARPS;
    __shared__ f32 largest[WARPS];
    const u32 warp = threadIdx.x / 32, n = blockIdx.x * GROUP + threadIdx.x % 32 * 4, across = (args.width + GROUP - 1) / GROUP;
    const u32 down = (args.rows + GROUP - 1) / GROUP;
    for (u32 block = blockIdx.y; block < down; block += gridDim.y) {
        f32 numbers[ROWS][4], most = 0.0f;
#pragma unroll
        for (u32 i = 0; i < ROWS; ++i)
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                const u32 r = block * GROUP + i * WARPS + warp;
                numbers[i][j] = r < args.rows && n < args.width ? number<X>(args, r, n + j) : 0.0f;
                most = fmaxf(most, fabsf(numbers[i][j]));
            }
        most = warp_max(most);
        if (threadIdx.x % 32 == 0) largest[warp] = most;
        __syncthreads();
#pragma unroll
        for (u32 other = 0; other < WARPS; ++other) most = fmaxf(most, largest[other]);
        __syncthreads();
        const f32 scale = most == 0.0f ? 1.0f : fmaxf(most / E4M3_LARGEST, 0x1p-126f);
        if (threadIdx.x == 0) reinterpret_cast<f32*>(args.scales)[block * across + blockIdx.x] = scale;
#pragma unroll
        for (u32 i = 0; i < ROWS; ++i) {
            const u32 r = block * GROUP + i * WARPS + warp;
            const f32* of = numbers[i];
            if (r < args.rows && n < args.width)
                *reinterpret_cast<u32*>(args.out + place(args, r) + n) =
                    encode(of[0] / scale, of[1] / scale) | encode(of[2] / scale, of[3] / scale) << 16;
        }
    }
}

KERNEL(draw, Args, bf16, f32)
KERNEL(draw, Args, bf16, bf16)
KERNEL(draw_blocks, Args, bf16, e4m3)
