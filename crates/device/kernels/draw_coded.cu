// Codes of numbers that follow from their places (`draw.cuh`): those that the host makes of them (`encode.rs`), bit by bit.
#include "codes.cuh"
#include "draw.cuh"
#include "scaled.cuh"

// e4m3 codes of blocks with a scale. A block of threads has 128 x 128 numbers: a warp every eighth row, a lane four columns, which end together with the rows.
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

constexpr u32 FEW = 32; // numbers of a row that share a scale of MXFP4

// The code of FP4 e2m1 that is nearest, ties to even, of at most 6.
__device__ __forceinline__ u32 to_e2m1(f32 value) {
    const f32 size = fabsf(value);
    const u32 code = (size > 0.25f) + (size >= 0.75f) + (size > 1.25f) + (size >= 1.75f) + (size > 2.5f) + (size >= 3.5f) + (size > 5.0f);
    return (__float_as_uint(value) >> 28 & 8) | code;
}

__device__ __forceinline__ f32 e2m1(u32 code) {
    const u32 rest = code & 7;
    const f32 size = rest < 2 ? 0.5f * rest : __uint_as_float(((rest >> 1) + 126) << 23 | (rest & 1) << 22);
    return code & 8 ? -size : size;
}

// 32 numbers as MXFP4.
struct Mxfp4 {
    f32 numbers[FEW];
    u32 scale; // e8m0

    __device__ __forceinline__ u32 code(u32 i) const { return to_e2m1(numbers[i] / factor(scale)); }

    static __device__ __forceinline__ f32 factor(u32 scale) { return __uint_as_float(scale << 23); }

    // What is lost under a scale.
    __device__ __forceinline__ double lost(u32 scale) const {
        double sum = 0.0;
#pragma unroll
        for (u32 i = 0; i < FEW; ++i) {
            const double lost = e2m1(to_e2m1(numbers[i] / factor(scale))) * factor(scale) - numbers[i];
            sum = fma(lost, lost, sum); // the square is exact
        }
        return sum;
    }

    // Of a row from column n on.
    template <typename X> __device__ __forceinline__ void take(const Args& args, u32 r, u32 n) {
        f32 most = 0.0f;
#pragma unroll
        for (u32 i = 0; i < FEW; ++i) {
            numbers[i] = number<X>(args, r, n + i);
            most = fmaxf(most, fabsf(numbers[i]));
        }
        scale = 127;
        if (most == 0.0f) return;
        // The power that brings the largest to between 4 and 8, or the next one, under which none is cut to 6.
        const int exponent = int(__float_as_uint(most) >> 23) - 2;
        const u32 low = min(max(exponent, 1), 254), high = min(max(exponent + 1, 1), 254);
        scale = lost(high) < lost(low) ? high : low;
    }
};

// Bricks of MXFP4 (`codes.cuh`), of which a thread makes one part of a row at a time.
template <typename X, typename> __device__ void draw_mxfp4(const Args& args) {
    const u32 parts = args.width / FEW, across = (args.width + BRICK - 1) / BRICK;
    const u64 all = u64(args.rows) * parts;
    for (u64 i = u64(blockIdx.x) * THREADS + threadIdx.x; i < all; i += u64(gridDim.x) * THREADS) {
        const u32 r = u32(i / parts), part = u32(i % parts) % 2, column = u32(i % parts) / 2;
        Mxfp4 of;
        of.take<X>(args, r, u32(i % parts) * FEW);
        const u64 row = packed_row(args, r);
        char* brick = reinterpret_cast<char*>(args.out) + (row / BRICK * across + column) * args.stride;
        const auto pair = [&](u32 at, u32 place) {
            const u32 second = E2m1::spread(of.code(2 * at + 1), place);
            return E2m1::spread(of.code(2 * at), place) | __funnelshift_l(second, second, 16);
        };
#pragma unroll
        for (u32 lane = 0; lane < 4; ++lane) {
            u32 word = 0;
#pragma unroll
            for (u32 place = 0; place < 4; ++place) word |= pair(place * 4 + lane, place);
            reinterpret_cast<u32*>(brick + codes_of<E2m1>(row % BRICK, lane))[part] = word;
        }
        // The power that is missing while codes lie in the places of a bf16 is in the scale.
        reinterpret_cast<unsigned short*>(brick + scales_of<E2m1, Short>(row % BRICK, 2))[part] = (of.scale + 126) << 7;
    }
}

// What MXFP4 folds into (`fold.rs`): e4m3 codes of blocks under a power of two that brings the largest weight of each to between 256 and
// 448. A block of threads has 128 x 128 numbers, a thread half of a row.
template <typename X, typename> __device__ void draw_folded(const Args& args) {
    constexpr int LOWEST = -9, HIGHEST = 8, FAR = 1 << 16; // powers of two of the bits that e4m3 has
    constexpr u32 PARTS = GROUP * GROUP / FEW / THREADS;
    __shared__ int least, most;
    const u32 down = (args.rows + GROUP - 1) / GROUP, across = (args.width + GROUP - 1) / GROUP;
    for (u32 block = blockIdx.y; block < down; block += gridDim.y) {
        if (threadIdx.x == 0) least = FAR, most = -FAR;
        __syncthreads();
        const u32 r = block * GROUP + threadIdx.x * PARTS * FEW / GROUP;
        const auto column = [&](u32 part) { return blockIdx.x * GROUP + (threadIdx.x * PARTS + part) * FEW % GROUP; };
        Mxfp4 of[PARTS];
        int low = FAR, high = -FAR;
#pragma unroll
        for (u32 part = 0; part < PARTS; ++part) {
            if (r >= args.rows || column(part) >= args.width) continue;
            of[part].take<X>(args, r, column(part));
            const int power = int(of[part].scale) - 127;
#pragma unroll
            for (u32 i = 0; i < FEW; ++i) {
                const int code = of[part].code(i) & 7, first = power + code / 2 - 1; // the power of its highest bit
                if (code) low = min(low, first - (code > 1 && code % 2)), high = max(high, first);
            }
        }
        if (high > -FAR) atomicMin(&least, low), atomicMax(&most, high);
        __syncthreads();
        const int power = most > -FAR ? max(most - HIGHEST, -126) : 0;
        if (threadIdx.x == 0) {
            reinterpret_cast<f32*>(args.scales)[block * across + blockIdx.x] = __uint_as_float((power + 127) << 23);
            if (least < FAR && least - power < LOWEST) *reinterpret_cast<u32*>(args.refused) = 1;
        }
        __syncthreads();
#pragma unroll
        for (u32 part = 0; part < PARTS; ++part) {
            if (r >= args.rows || column(part) >= args.width) continue;
            const f32 factor = Mxfp4::factor(of[part].scale) * __uint_as_float((127 - power) << 23);
            u32* out = reinterpret_cast<u32*>(args.out + place(args, r) + column(part));
#pragma unroll
            for (u32 i = 0; i < FEW; i += 4) {
                const auto weight = [&](u32 j) { return e2m1(of[part].code(i + j)) * factor; };
                out[i / 4] = encode(weight(0), weight(1)) | encode(weight(2), weight(3)) << 16;
            }
        }
    }
}

KERNEL(draw_blocks, Args, bf16, e4m3)
KERNEL(draw_folded, Args, bf16, e4m3)
KERNEL(draw_mxfp4, Args, bf16, u32)
