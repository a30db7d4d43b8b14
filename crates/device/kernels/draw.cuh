// out[place of r, n] = step * the signed 16-bit number that has the index first + r * row_step + n * column_step under a key:
// `Mix` of the host, four numbers of each of its words. Each is rounded to X, as a checkpoint would have it.
#pragma once
#include "common.cuh"

// Rows that stand together, `together` of them, begin `apart` rows after those before.
struct Args {
    u64 out, stride;
    u32 rows, width, together, apart;
    u64 key, first, row_step, column_step;
    f32 step;
    u32 first_row; // of the weight, that the first one becomes
    u64 scales; // of blocks of codes, block rows by blocks of columns
    u64 refused; // a word that becomes 1 where codes cannot be what they were to be
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

// Which row of the weight a row becomes.
__device__ __forceinline__ u64 packed_row(const Args& args, u32 r) {
    return args.first_row + u64(r / args.together) * args.apart + r % args.together;
}

// Where it begins, in elements.
__device__ __forceinline__ u64 place(const Args& args, u32 r) { return packed_row(args, r) * args.stride; }
