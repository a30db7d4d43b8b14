// Attention over cached latents for Hopper: one key head whose values are the leading columns of its keys, up to 576
// and 512 elements, bf16, multiplied by wgmma.
//
// A block takes 64 rows, a row being a token and a head. A step's cached rows lie once in shared memory, as keys and
// as values, and the next step's arrive by cp.async meanwhile. Each of two warpgroups scores half of a step's
// positions and sums half of the values' columns; scores' maxima and powers cross over in shared memory.
#pragma once
#include "attention.cuh"

constexpr u32 GROUP = 128, BLOCK = 2 * GROUP; // threads of a warpgroup, of a block
constexpr u32 HEIGHT = 64;
constexpr u32 KEY_CHUNKS = 9, VALUE_CHUNKS = 8; // of 64 columns, at most
constexpr u32 CHUNK_COLUMNS = 64;
constexpr u32 CHUNK = HEIGHT * CHUNK_COLUMNS;  // elements of 64 lines of a chunk: 8 KB
static_assert(HEIGHT == STEP, "queries, cached rows and powers share a layout");

// Offset in a chunk: lines of 128 bytes whose 16-byte pieces are permuted as wgmma expects.
__device__ __forceinline__ u32 place(u32 line, u32 piece) { return line * CHUNK_COLUMNS + ((piece ^ (line & 7)) << 3); }

// ----------------------------------------------------------------------------------------------------------- wgmma

// Operands lie in 128-byte swizzled lines, eight of which repeat every 1024 bytes. Where lines run along k, chunks of
// 64 columns are the leading step.
__device__ __forceinline__ u64 operand(u32 address) {
    constexpr u64 LAYOUT = (u64(1) << 62) | (u64(1024 / 16) << 32) | (u64(CHUNK * 2 / 16) << 16);
    return LAYOUT | ((address & 0x3ffff) >> 4);
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

#define F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F16(i) F4(i), F4(i + 4), F4(i + 8), F4(i + 12)

// d[64 rows x 32 positions] += queries * keys^T for 16 columns.
__device__ __forceinline__ void multiply_keys(f32 (&d)[16], u64 a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,"
                 "%15}, %16, %17, 1, 1, 1, 0, 0;"
                 : F16(0)
                 : "l"(a), "l"(b));
}

// d[64 rows x 256 columns] += powers * values for 16 positions.
__device__ __forceinline__ void multiply_values(f32 (&d)[128], u64 a, u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,"
                 "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,"
                 "%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,"
                 "%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,"
                 "%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, "
                 "%128, %129, 1, 1, 1, 0, 1;"
                 : F16(0), F16(16), F16(32), F16(48), F16(64), F16(80), F16(96), F16(112)
                 : "l"(a), "l"(b));
}

// --------------------------------------------------------------------------------------------------------- fetching

// 64 lines of `width` columns into chunks, zero beyond the width and where there is no line; `find` tells where each
// starts in memory. A thread brings the same piece of every chunk, of two lines.
template <typename T, typename Find>
__device__ __forceinline__ void fetch(bf16* to, u32 width, bool vectors, const void* anywhere, Find find) {
    constexpr u32 PIECES = CHUNK_COLUMNS / LINE, LINES = BLOCK / PIECES;
    const u32 column = threadIdx.x % PIECES * LINE, chunks = (width + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS;
#pragma unroll
    for (u32 i = 0; i < HEIGHT / LINES; ++i) {
        const u32 line = threadIdx.x / PIECES + i * LINES;
        const T* from = find(line);
        bf16* target = to + place(line, threadIdx.x % PIECES);
        if (vectors) {
#pragma unroll
            for (u32 c = 0; c < KEY_CHUNKS; ++c) {
                const bool there = from && column + c * CHUNK_COLUMNS < width;
                if (c < chunks) bring_piece(target + c * CHUNK, from + column + c * CHUNK_COLUMNS, there, anywhere);
            }
        } else {
#pragma unroll 1
            for (u32 c = 0; c < chunks; ++c) {
                const u32 at = column + c * CHUNK_COLUMNS;
                bring_slowly(target + c * CHUNK, from + at, from && at < width ? min(width - at, LINE) : 0);
            }
        }
    }
}

// What `fetch` brought of a step becomes numbers, once it is there.
template <typename C> __device__ __forceinline__ void settle(bf16* lines, u32 chunks, bool vectors) {
    constexpr u32 PIECES = CHUNK_COLUMNS / LINE, LINES = BLOCK / PIECES;
    if (sizeof(C) == sizeof(bf16) || !vectors) return;
#pragma unroll
    for (u32 i = 0; i < HEIGHT / LINES; ++i) {
        bf16* at = lines + place(threadIdx.x / PIECES + i * LINES, threadIdx.x % PIECES);
        // All are read before any is written.
        uint2 codes[KEY_CHUNKS];
#pragma unroll
        for (u32 c = 0; c < KEY_CHUNKS; ++c)
            if (c < chunks) codes[c] = *reinterpret_cast<const uint2*>(at + c * CHUNK);
#pragma unroll
        for (u32 c = 0; c < KEY_CHUNKS; ++c)
            if (c < chunks) *reinterpret_cast<uint4*>(at + c * CHUNK) = decode_piece(codes[c]);
    }
}

// ------------------------------------------------------------------------------------------------------- the kernel

// What stands in shared memory for the host to reserve; `kernels.rs` repeats its size.
struct Room {
    bf16 queries[KEY_CHUNKS * CHUNK];
    bf16 cached[2][KEY_CHUNKS * CHUNK];
    bf16 powers[CHUNK];
    Sight<HEIGHT> sight;
    u32 slots[2][STEP];
    u32 carried; // place of what is put away
    f32 greatest[2][HEIGHT]; // of the scores of each half of the positions
};

// C is what rows are cached in.
template <typename C> __device__ __forceinline__ void attention_mla(const Args& args) {
    extern __shared__ __align__(1024) unsigned char shared[];
    Room& room = *reinterpret_cast<Room*>(shared);
    Sight<HEIGHT>& sight = room.sight;
    u32 (&slots)[2][STEP] = room.slots;
    f32 (&greatest)[2][HEIGHT] = room.greatest;
    const u32 thread = threadIdx.x, lane = thread % 32, half = thread / GROUP;
    const u32 line = thread % GROUP / 32 * 16 + lane / 4; // this thread's rows: this one and the eighth after it
    const u32 key_width = args.keys.width, value_width = args.values.width;
    const u32 key_chunks = (key_width + CHUNK_COLUMNS - 1) / CHUNK_COLUMNS;

    if (blockIdx.x == 0) check_starts(args);
    const Tile tile = locate<HEIGHT>(args, blockIdx.x);
    if (tile.sequence == NONE) return;
    sight.look(args, tile, 0);
    __syncthreads();
    const auto fetch_step = [&](bf16* to, const u32* slots) {
        fetch<C>(to, key_width, args.vectors, reinterpret_cast<const void*>(args.keys.start),
                 [&](u32 line) { return slots[line] == NONE ? nullptr : row<C>(args.keys, slots[line]); });
    };
    fetch<bf16>(room.queries, key_width, args.vectors, reinterpret_cast<const void*>(args.q.start),
                [&](u32 line) { return sight.find(args.q, line, key_width); });

    const u32 high = sight.high, start = sight.low / STEP * STEP;
    const auto seen = [&](u32 position) { return sight.low <= position && position < high; };
    const f32 scale = args.scale * 1.4426950408889634f;
    Softmax softmax[2];
    f32 sums[128];
#pragma unroll
    for (u32 i = 0; i < 128; ++i) sums[i] = 0.0f;

    if (high == 0) return;
    const Carry<BLOCK, 128, 2> carry{args, &room.carried, &sight.first[line], start, thread, 0, scale};
    carry.open(high);
    if (thread < STEP) {
        const u32 position = start + thread;
        const u32 block = block_of(args, tile.sequence, position, seen(position));
        slots[0][thread] = slot_in(args, block, tile.sequence, position, seen(position));
    }
    if (thread >= GROUP && thread < GROUP + STEP) {
        const u32 position = start + STEP + thread - GROUP;
        const u32 block = block_of(args, tile.sequence, position, seen(position));
        slots[1][thread - GROUP] = slot_in(args, block, tile.sequence, position, seen(position));
    }
    __syncthreads();
    fetch_step(room.cached[0], slots[0]);
    copies_commit();
    u32 turn = 0;
    for (u32 base = start; base < high; base += STEP, turn ^= 1) {
        const u32 coming = base + 2 * STEP + thread;
        const bool coming_seen = thread < STEP && seen(coming);
        const u32 block = block_of(args, tile.sequence, coming, coming_seen);
        copies_wait<0>();
        settle<C>(room.cached[turn], key_chunks, args.vectors);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads(); // this step's rows are there, and the last step's are done with
        const u32 keys = shared_address(room.cached[turn]);
        f32 scores[16];
#pragma unroll
        for (u32 i = 0; i < 16; ++i) scores[i] = 0.0f;
        u64 a = operand(shared_address(room.queries)), b = operand(keys + half * (STEP / 2 * 128));
        wgmma_fence();
#pragma unroll 1
        for (u32 chunk = 0; chunk < key_chunks; ++chunk) {
#pragma unroll
            for (u32 step = 0; step < CHUNK_COLUMNS / 16; ++step) multiply_keys(scores, a + step * 2, b + step * 2);
            a += CHUNK * 2 / 16, b += CHUNK * 2 / 16;
        }
        wgmma_commit();
        if (base + STEP < high) fetch_step(room.cached[turn ^ 1], slots[turn ^ 1]);
        copies_commit();
        wgmma_wait();

#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const u32 first = sight.first[line + 8 * i], end = sight.end[line + 8 * i];
            f32 most = minus_infinity();
#pragma unroll
            for (u32 j = 0; j < 4; ++j)
#pragma unroll
                for (u32 v = 0; v < 2; ++v) {
                    f32& score = scores[4 * j + 2 * i + v];
                    const u32 position = base + half * (STEP / 2) + j * 8 + lane % 4 * 2 + v;
                    if (position < first || position >= end) score = minus_infinity();
                    most = fmaxf(most, score);
                }
            most = quad_max(most);
            if (lane % 4 == 0) greatest[half][line + 8 * i] = most;
        }
        __syncthreads(); // also: slots[turn ^ 1] were used by all
        f32 kept[2];
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const u32 own = line + 8 * i;
            kept[i] = softmax[i].raise(fmaxf(greatest[0][own], greatest[1][own]), scale);
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                const f32 low = softmax[i].power(scores[4 * j + 2 * i], scale);
                const f32 high = softmax[i].power(scores[4 * j + 2 * i + 1], scale);
                softmax[i].add(low, high);
                *reinterpret_cast<u32*>(room.powers + place(own, half * 4 + j) + lane % 4 * 2) = narrow_pair(low, high);
            }
        }
        if (thread < STEP) slots[turn][thread] = slot_in(args, block, tile.sequence, coming, coming_seen);
        // Factors of one change nothing.
        if (__any_sync(~0u, kept[0] != 1.0f || kept[1] != 1.0f)) {
#pragma unroll
            for (u32 i = 0; i < 128; ++i) sums[i] *= kept[i / 2 % 2];
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        __syncthreads(); // the powers are there
        const u32 powers = shared_address(room.powers), values = keys + half * (VALUE_CHUNKS / 2) * CHUNK * 2;
        wgmma_fence();
#pragma unroll
        for (u32 step = 0; step < STEP / 16; ++step)
            multiply_values(sums, operand(powers + step * 32), operand(values + step * 2048));
        wgmma_commit();
        wgmma_wait();
        const u32 next = base + STEP;
        if (next % SPAN_KEYS == 0 || next >= high) carry.end_span(softmax, sums, next, next >= high);
    }

    // Each half of the threads has the powers of half of the positions.
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        softmax[i].total = quad_sum(softmax[i].total);
        if (lane % 4 == 0) greatest[half][line + 8 * i] = softmax[i].total;
    }
    __syncthreads();
    // A warp's outputs go through the queries' place, to be stored in whole pieces.
    bf16* staged = room.queries + half * (VALUE_CHUNKS / 2) * CHUNK;
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        const u32 own = line + 8 * i;
        const f32 factor = args.value_scale / (greatest[0][own] + greatest[1][own]);
#pragma unroll
        for (u32 j = 0; j < 32; ++j)
            *reinterpret_cast<u32*>(staged + j / 8 * CHUNK + place(own, j % 8) + lane % 4 * 2) =
                narrow_pair(sums[4 * j + 2 * i] * factor, sums[4 * j + 2 * i + 1] * factor);
    }
    __syncwarp();
    const u32 top = thread % GROUP / 32 * 16, column = half * (VALUE_CHUNKS / 2) * CHUNK_COLUMNS + lane * LINE;
#pragma unroll 4
    for (u32 at = top; at < top + 16; ++at) {
        if (sight.end[at] == 0 || column >= value_width) continue;
        bf16* to = sight.find(args.out, at, value_width) + column;
        store_piece(to, staged + lane / 8 * CHUNK + place(at, lane % 8), min(value_width - column, LINE), args.vectors);
    }
    carry.close(high);
}

#define LATENT(C)                                                                                            \
    extern "C" __global__ void __launch_bounds__(BLOCK, 1)                                                   \
        attention_mla_##C##_bf16(const __grid_constant__ Args args) {                                        \
        take_turn();                                                                                         \
        attention_mla<C>(args);                                                                              \
    }
