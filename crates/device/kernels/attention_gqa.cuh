// Attention of bf16 heads of up to 64 or 128 elements on the tensor cores, for every processor since sm_80. A block
// takes 128 rows of one sequence and key head, 32 a warp; keys and values of a step arrive by cp.async while the
// other of the two is multiplied.
#pragma once
#include "attention.cuh"

constexpr u32 WARPS = 4, BLOCK = WARPS * 32;
constexpr u32 HEIGHT = WARPS * 32;

// Element offset of a 16-byte piece; pieces are permuted within a line so that eight lines meet all banks.
template <u32 WIDTH> __device__ __forceinline__ u32 place(u32 line, u32 piece) {
    return line * WIDTH + ((piece ^ (line & 7)) << 3);
}

// Elements of a piece that lie inside of `width`.
__device__ __forceinline__ u32 inside(u32 width, u32 piece) {
    return width > piece * LINE ? min(width - piece * LINE, LINE) : 0;
}

// COUNT lines of up to WIDTH columns into shared memory, zero beyond `width` and where there is no line. `find` tells
// where each starts in memory.
template <typename T, u32 WIDTH, u32 COUNT, typename Find>
__device__ __forceinline__ void fetch(bf16* to, u32 width, bool vectors, const void* anywhere, Find find) {
    constexpr u32 PIECES = WIDTH / LINE, LINES = BLOCK / PIECES;
    static_assert(LINES % 8 == 0, "a thread's lines share their place in the permutation");
    const u32 piece = threadIdx.x % PIECES, first = threadIdx.x / PIECES;
    const u32 elements = inside(width, piece);
    to += place<WIDTH>(first, piece);
    if (vectors) {
#pragma unroll
        for (u32 i = 0; i < COUNT / LINES; ++i) {
            const T* line = find(first + i * LINES);
            bring_piece(to + i * LINES * WIDTH, line + piece * LINE, line && elements, anywhere);
        }
        return;
    }
#pragma unroll 1
    for (u32 i = 0; i < COUNT / LINES; ++i) {
        const T* line = find(first + i * LINES);
        bring_slowly(to + i * LINES * WIDTH, line + piece * LINE, line ? elements : 0);
    }
}

// What `fetch` brought of a step becomes numbers, once it is there.
template <typename C, u32 WIDTH> __device__ __forceinline__ void settle(bf16* lines, bool vectors) {
    constexpr u32 PIECES = WIDTH / LINE, LINES = BLOCK / PIECES;
    if (sizeof(C) == sizeof(bf16) || !vectors) return;
#pragma unroll
    for (u32 i = 0; i < STEP / LINES; ++i)
        settle_piece<C>(lines + place<WIDTH>(threadIdx.x / PIECES, threadIdx.x % PIECES) + i * LINES * WIDTH);
}

// C is what keys and values are cached in.
template <typename C, u32 WIDTH> __device__ __forceinline__ void attention(const Args& args) {
    constexpr u32 PIECES = WIDTH / LINE;
    constexpr u32 KEYS = STEP / 8, COLUMNS = WIDTH / 8; // pieces of 8 columns of scores and outputs
    extern __shared__ __align__(128) bf16 shared[];
    __shared__ Sight<HEIGHT> sight;
    __shared__ u32 slots[2][STEP];
    __shared__ u32 carried;
    bf16* queries = shared;
    bf16* keys = queries + HEIGHT * WIDTH;
    bf16* values = keys + STEP * WIDTH;
    const u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const u32 kv_head = blockIdx.y;
    const u32 key_width = args.keys.width / args.kv_heads, value_width = args.values.width / args.kv_heads;

    if (blockIdx.x == 0 && blockIdx.y == 0) check_starts(args);
    const Tile tile = locate<HEIGHT>(args, blockIdx.x);
    if (tile.sequence == NONE) return;
    sight.look(args, tile, kv_head);
    __syncthreads();
    const auto fetch_cached = [&](bf16* to, const Rows& cache, u32 width, const u32* slots) {
        const C* start = reinterpret_cast<const C*>(cache.start) + kv_head * width;
        fetch<C, WIDTH, STEP>(to, width, args.vectors, start, [&](u32 line) {
            return slots[line] == NONE ? nullptr : start + slots[line] * cache.stride;
        });
    };
    fetch<bf16, WIDTH, HEIGHT>(queries, key_width, args.vectors, reinterpret_cast<const void*>(args.q.start),
                         [&](u32 line) { return sight.find(args.q, line, key_width); });

    const u32 high = sight.high, start = sight.low / STEP * STEP;
    const auto seen = [&](u32 position) { return sight.low <= position && position < high; };
    // A warp without rows only helps to fetch.
    const u32 warp_rows = tile.rows > warp * 32 ? min(tile.rows - warp * 32, 32u) : 0;
    u32 warp_end = 0;
    if (warp_rows > 0) warp_end = __reduce_max_sync(~0u, sight.end[warp * 32 + lane]);
    const f32 scale = args.scale * 1.4426950408889634f;
    Softmax softmax[4];
    if (args.sinks) {
        // A sink is a score that came before all others, of a value that is zero; scores are counted before their factor.
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            const u32 line = warp * 32 + lane / 4 + 8 * i;
            if (sight.token[line] == NONE) continue;
            softmax[i].most = sink_of(args, sight.head[line]) / args.scale;
            softmax[i].total = lane % 4 == 0 ? 1.0f : 0.0f;
        }
    }
    f32 sums[2][COLUMNS][4] = {};
    const Carry<BLOCK, 8 * COLUMNS, 4> carry{args, &carried, &sight.first[warp * 32 + lane / 4], start, thread, 0, scale};
    carry.open(high);

    if (high > 0 && thread < STEP) {
        const u32 position = start + thread;
        const u32 block = block_of(args, tile.sequence, position, seen(position));
        slots[0][thread] = slot_in(args, block, tile.sequence, position, seen(position));
    }
    __syncthreads();
    if (high > 0) fetch_cached(keys, args.keys, key_width, slots[0]);
    copies_commit();
    u32 turn = 0;
    for (u32 base = start; base < high; base += STEP, turn ^= 1) {
        if (base > start && base % SPAN_KEYS == 0) carry.end_span(softmax, sums[0][0], base, false);
        const u32 coming = base + STEP + thread;
        const bool coming_seen = thread < STEP && seen(coming);
        const u32 block = block_of(args, tile.sequence, coming, coming_seen);
        copies_wait<0>();
        settle<C, WIDTH>(keys, args.vectors);
        __syncthreads(); // the keys are there, and the last step's values are done with
        fetch_cached(values, args.values, value_width, slots[turn]);
        copies_commit();

        const bool busy = base < warp_end;
        f32 scores[2][KEYS][4] = {};
        if (busy) {
#pragma unroll
            for (u32 step = 0; step < WIDTH / 16; ++step) {
                u32 a[2][4];
#pragma unroll
                for (u32 i = 0; i < 2; ++i)
                    load_matrices(a[i], shared_address(queries + place<WIDTH>(warp * 32 + i * 16 + lane % 16,
                                                                              step * 2 + lane / 16)));
#pragma unroll
                for (u32 j = 0; j < KEYS / 2; ++j) {
                    u32 b[4];
                    load_matrices(b, shared_address(keys + place<WIDTH>(j * 16 + lane % 8 + lane / 16 * 8,
                                                                        step * 2 + lane / 8 % 2)));
#pragma unroll
                    for (u32 i = 0; i < 2; ++i) {
                        multiply(scores[i][2 * j], a[i], b[0], b[1]);
                        multiply(scores[i][2 * j + 1], a[i], b[2], b[3]);
                    }
                }
            }
        }
        if (thread < STEP) slots[turn ^ 1][thread] = slot_in(args, block, tile.sequence, coming, coming_seen);
        copies_wait<0>();
        settle<C, WIDTH>(values, args.vectors);
        __syncthreads(); // the values are there, and the keys are done with
        if (base + STEP < high) fetch_cached(keys, args.keys, key_width, slots[turn ^ 1]);
        copies_commit();
        if (!busy) continue;

        const bool partly = base < sight.inner_low || base + STEP > sight.inner_high;
        u32 powers[2][KEYS / 2][4];
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            // The i-th row of a thread lies in piece i / 2, in the first or second half of each four numbers.
            f32 (&mine)[KEYS][4] = scores[i / 2];
            const u32 half = i % 2 * 2;
            if (partly) {
                const u32 line = warp * 32 + lane / 4 + 8 * i, first = sight.first[line], end = sight.end[line];
#pragma unroll
                for (u32 j = 0; j < KEYS; ++j)
#pragma unroll
                    for (u32 v = 0; v < 2; ++v) {
                        const u32 position = base + j * 8 + lane % 4 * 2 + v;
                        if (position < first || position >= end) mine[j][half + v] = minus_infinity();
                    }
            }
            f32 most = minus_infinity();
#pragma unroll
            for (u32 j = 0; j < KEYS; ++j) most = fmaxf(most, fmaxf(mine[j][half], mine[j][half + 1]));
            const f32 kept = softmax[i].raise(quad_max(most), scale);
#pragma unroll
            for (u32 j = 0; j < KEYS; ++j) {
                const f32 low = softmax[i].power(mine[j][half], scale), high = softmax[i].power(mine[j][half + 1], scale);
                softmax[i].add(low, high);
                powers[i / 2][j / 2][j % 2 * 2 + i % 2] = narrow_pair(low, high);
            }
#pragma unroll
            for (u32 j = 0; j < COLUMNS; ++j) sums[i / 2][j][half] *= kept, sums[i / 2][j][half + 1] *= kept;
        }
#pragma unroll
        for (u32 step = 0; step < STEP / 16; ++step)
#pragma unroll
            for (u32 j = 0; j < COLUMNS / 2; ++j) {
                u32 b[4];
                load_transposed(b, shared_address(values + place<WIDTH>(step * 16 + lane % 16, j * 2 + lane / 16)));
#pragma unroll
                for (u32 i = 0; i < 2; ++i) {
                    multiply(sums[i][2 * j], powers[i][step], b[0], b[1]);
                    multiply(sums[i][2 * j + 1], powers[i][step], b[2], b[3]);
                }
            }
    }
    if (high > 0) carry.end_span(softmax, sums[0][0], high, true);
    carry.close(high);
    if (warp_rows == 0) return;

    // A warp's outputs go through its own queries' place, to be stored in whole pieces.
#pragma unroll
    for (u32 i = 0; i < 4; ++i) {
        const f32 factor = args.value_scale / quad_sum(softmax[i].total);
        const u32 line = warp * 32 + lane / 4 + 8 * i, half = i % 2 * 2;
#pragma unroll
        for (u32 j = 0; j < COLUMNS; ++j)
            *reinterpret_cast<u32*>(queries + place<WIDTH>(line, j) + lane % 4 * 2) =
                narrow_pair(sums[i / 2][j][half] * factor, sums[i / 2][j][half + 1] * factor);
    }
    __syncwarp();
    const u32 piece = lane % PIECES, elements = inside(value_width, piece);
#pragma unroll 4
    for (u32 line = warp * 32 + lane / PIECES; line < warp * 32 + 32; line += 32 / PIECES) {
        if (sight.end[line] == 0 || elements == 0) continue;
        bf16* to = sight.find(args.out, line, value_width) + piece * LINE;
        store_piece(to, queries + place<WIDTH>(line, piece), elements, args.vectors);
    }
}

#define GROUPED(C, WIDTH)                                                                                    \
    extern "C" __global__ void __launch_bounds__(BLOCK, 2)                                                   \
        attention##WIDTH##_##C##_bf16(const __grid_constant__ Args args) {                                   \
        take_turn();                                                                                         \
        attention<C, WIDTH>(args);                                                                           \
    }
