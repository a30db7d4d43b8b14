// out[place of r, n] = step * the signed 16-bit number that has the index first + r * row_step + n * column_step under a key:
// `Mix` of the host, four numbers of each of its words. Each is rounded to X, as a checkpoint would have it.
#include "common.cuh"

// Rows that stand together, `together` of them, begin `apart` rows after those before.
struct Args {
    u64 out, stride;
    u32 rows, width, together, apart;
    u64 key, first, row_step, column_step;
    f32 step;
    u32 padding;
};

constexpr u64 GOLDEN = 0x9e3779b97f4a7c15;

__device__ __forceinline__ u64 scramble(u64 value) {
    u64 z = value + GOLDEN;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
}

template <typename X, typename Y> __device__ void draw(const Args& args) {
    const u32 n = blockIdx.x * THREADS + threadIdx.x;
    if (n >= args.width) return;
    for (u32 r = blockIdx.y; r < args.rows; r += gridDim.y) {
        const u64 index = args.first + r * args.row_step + n * args.column_step;
        const u64 word = scramble(args.key + GOLDEN * (index / 4));
        const f32 number = f32(short(word >> index % 4 * 16)) * args.step;
        const u64 place = u64(r / args.together) * args.apart + r % args.together;
        reinterpret_cast<Y*>(args.out)[place * args.stride + n] = narrow<Y>(wide(narrow<X>(number)));
    }
}

KERNEL(draw, Args, bf16, f32)
KERNEL(draw, Args, bf16, bf16)
