// Attention of few tokens, as when every sequence has one: what the kernels for many rows compute in one block a sequence
// is spread over the whole GPU, in the same order and with the same bits.
//
// Two kernels, whose blocks take a *unit* each: a token and up to 16 of its query heads that share a key head.
// `attention_scores` gives each step of 64 keys a block. `attention_sums` gives each 32 columns of the values a block,
// which goes through all steps: so no sum over keys is cut, and what the softmax carries along is the same. Scores
// and their maxima wait in scratch memory in between.
#include "attention.cuh"

constexpr u32 BLOCK = 128, WARPS = BLOCK / 32;
constexpr u32 HEADS = 16;           // of a unit
constexpr u32 SLICE = WARPS * 8;    // columns of the values of a block: eight a warp
constexpr u32 TILE = HEADS * STEP;  // scores of a step

// The twin of `launch::FewArgs`.
struct FewArgs {
    Args attention;
    u64 scores; // [unit, step] tiles of float32, ordered for those who take them up: see `score_of`
    u64 most;   // [unit, step, HEADS] float32: their maxima
    u32 steps;  // of a unit there is room for: as many as the longest may have
    u32 tiles;  // of heads that share a key head
    u32 halves; // powers are added up by halves of a step, as `attention_mla` does
    u32 padding;
};

// Where a thread finds the scores of a step that it turns into powers: those of one head, of one half of the positions,
// of the pairs that a lane of an mma holds. In the j-th eighth of a half it has one pair.
__device__ __forceinline__ u32 score_of(u32 eighth, u32 head, u32 half, u32 pair) {
    return eighth * BLOCK + head * 8 + half * 4 + pair;
}

// What the heads of a unit see.
struct Unit {
    u32 token, kv_head, head, heads; // the first of its query heads, and how many there are
    u32 sequence;                    // NONE: something is wrong, or the token is nobody's
    u32 first, end;                  // positions
    u32 base, steps;                 // of the first step, and how many there are
};

// By a whole block.
__device__ __forceinline__ Unit look(const FewArgs& few, u32 index) {
    const Args& args = few.attention;
    __shared__ u32 sequence;
    const u32 group = args.heads / args.kv_heads, tile = index % few.tiles;
    Unit unit;
    unit.kv_head = index / few.tiles % args.kv_heads;
    unit.token = index / few.tiles / args.kv_heads;
    unit.head = unit.kv_head * group + tile * HEADS;
    unit.heads = min(group - tile * HEADS, HEADS);
    if (threadIdx.x == 0) sequence = NONE;
    __syncthreads();
    for (u32 b = threadIdx.x; b + 1 < args.starts.rows; b += BLOCK)
        if (at<u32>(args.starts, b) <= unit.token && unit.token < at<u32>(args.starts, b + 1)) sequence = b;
    const u32 position = at<u32>(args.positions, unit.token);
    __syncthreads();
    unit.sequence = sequence;
    unit.end = position + 1;
    unit.first = args.window && unit.end > args.window ? unit.end - args.window : 0;
    unit.base = unit.first / STEP * STEP;
    unit.steps = position / STEP - unit.first / STEP + 1;
    if (!stands(args, position)) unit.sequence = NONE;
    return unit;
}

// ---------------------------------------------------------------------------------------------------------- scores

// Queries and the keys of a step lie in chunks of 64 columns, in lines of 128 bytes, queries first; the pieces of a line
// are permuted so that eight lines meet all banks.
constexpr u32 LINES = HEADS + STEP, CHUNK_PIECES = 8;

__device__ __forceinline__ u32 place(u32 line, u32 piece) {
    return ((piece / CHUNK_PIECES * LINES + line) * CHUNK_PIECES + ((piece ^ line) & 7)) * LINE;
}

extern "C" __global__ void __launch_bounds__(BLOCK) attention_scores_bf16_bf16(const __grid_constant__ FewArgs few) {
    extern __shared__ __align__(128) bf16 lines[];
    __shared__ u32 slots[STEP];
    __shared__ f32 mosts[WARPS][HEADS];
    take_turn();
    const Args& args = few.attention;
    const u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32, step = blockIdx.x;
    if (blockIdx.x == 0 && blockIdx.y == 0) check_starts(args);
    const Unit unit = look(few, blockIdx.y);
    if (unit.sequence == NONE || step >= unit.steps) return;
    const u32 base = unit.base + step * STEP;
    if (thread < STEP) {
        const u32 position = base + thread;
        const bool seen = unit.first <= position && position < unit.end;
        const u32 block = block_of(args, unit.sequence, position, seen);
        slots[thread] = slot_in(args, block, unit.sequence, position, seen);
    }
    __syncthreads();
    const u32 width = args.keys.width / args.kv_heads, pieces = (width + 15) / 16 * 2;
    constexpr u32 TOGETHER = 16; // threads that bring neighbouring pieces of a line
    for (u32 line = thread / TOGETHER; line < LINES; line += BLOCK / TOGETHER) {
        const bf16* from = nullptr;
        if (line < unit.heads) from = row<bf16>(args.q, unit.token) + (unit.head + line) * width;
        else if (line >= HEADS && slots[line - HEADS] != NONE)
            from = row<bf16>(args.keys, slots[line - HEADS]) + unit.kv_head * width;
        for (u32 piece = thread % TOGETHER; piece < pieces; piece += TOGETHER) {
            const bool there = from && piece * LINE < width;
            const void* anywhere = reinterpret_cast<const void*>(args.q.start);
            copy_async(shared_address(lines + place(line, piece)), there ? from + piece * LINE : anywhere, there ? 16 : 0);
        }
    }
    copies_commit();
    copies_wait<0>();
    __syncthreads();

    f32 scores[2][4] = {};
    const u32 own = HEADS + warp * 16 + lane % 8 + lane / 16 * 8;
#pragma unroll 4
    for (u32 piece = 0; piece < pieces; piece += 2) {
        u32 a[4], b[4];
        load_matrices(a, shared_address(lines + place(lane % 16, piece + lane / 16)));
        load_matrices(b, shared_address(lines + place(own, piece + lane / 8 % 2)));
        multiply(scores[0], a, b[0], b[1]);
        multiply(scores[1], a, b[2], b[3]);
    }
    f32 most[2] = {minus_infinity(), minus_infinity()};
    const u64 tile = u64(blockIdx.y) * few.steps + step;
    float2* to = reinterpret_cast<float2*>(few.scores) + tile * (TILE / 2);
#pragma unroll
    for (u32 j = 0; j < 2; ++j) {
#pragma unroll
        for (u32 v = 0; v < 4; ++v) {
            const u32 position = base + warp * 16 + j * 8 + lane % 4 * 2 + v % 2;
            if (position < unit.first || position >= unit.end) scores[j][v] = minus_infinity();
            most[v / 2] = fmaxf(most[v / 2], scores[j][v]);
        }
#pragma unroll
        for (u32 i = 0; i < 2; ++i)
            to[score_of(warp % 2 * 2 + j, lane / 4 + 8 * i, warp / 2, lane % 4)] =
                make_float2(scores[j][2 * i], scores[j][2 * i + 1]);
    }
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        most[i] = quad_max(most[i]);
        if (lane % 4 == 0) mosts[warp][lane / 4 + 8 * i] = most[i];
    }
    __syncthreads();
    if (thread < HEADS) {
        const f32 all = fmaxf(fmaxf(mosts[0][thread], mosts[1][thread]), fmaxf(mosts[2][thread], mosts[3][thread]));
        reinterpret_cast<f32*>(few.most)[tile * HEADS + thread] = all;
    }
}

// ------------------------------------------------------------------------------------------------------------ sums

constexpr u32 STAGES = 5; // steps on their way

struct Stage {
    float2 scores[TILE / 2];
    bf16 values[STEP * SLICE];
    f32 most[HEADS];
};

// Offset of a piece in lines of 64 bytes, two of which meet all banks.
__device__ __forceinline__ u32 value_place(u32 line, u32 piece) { return line * SLICE + ((piece ^ (line >> 1 & 3)) << 3); }
// Offset in lines of 128 bytes.
__device__ __forceinline__ u32 power_place(u32 line, u32 piece) { return line * STEP + ((piece ^ (line & 7)) << 3); }

extern "C" __global__ void __launch_bounds__(BLOCK) attention_sums_bf16_bf16(const __grid_constant__ FewArgs few) {
    __shared__ __align__(128) Stage stages[STAGES];
    __shared__ __align__(128) bf16 powers[2][HEADS * STEP];
    __shared__ f32 kept[2][HEADS];
    // What runs before is `attention_scores`, which began when everything before it was done: all but what that writes is
    // there.
    const Args& args = few.attention;
    const u32 thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
    const Unit unit = look(few, blockIdx.y);
    if (unit.sequence == NONE) return take_turn();
    const u32 width = args.values.width / args.kv_heads, column = blockIdx.x * SLICE;
    const u32 line = thread / 2, steps = unit.steps;
    const u64 tile = u64(blockIdx.y) * few.steps;
    const auto slot_of = [&](u32 step) {
        const u32 position = unit.base + step * STEP + line;
        const bool seen = step < steps && unit.first <= position && position < unit.end;
        return slot_in(args, block_of(args, unit.sequence, position, seen), unit.sequence, position, seen);
    };
    const auto fetch_values = [&](u32 step, u32 slot) {
        if (step < steps) {
            Stage& stage = stages[step % STAGES];
            const bf16* from = row<bf16>(args.values, slot == NONE ? 0 : slot) + unit.kv_head * width + column;
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const u32 piece = thread % 2 * 2 + i;
                const bool there = slot != NONE && column + piece * LINE < width;
                const void* anywhere = reinterpret_cast<const void*>(args.values.start);
                copy_async(shared_address(stage.values + value_place(line, piece)), there ? from + piece * LINE : anywhere,
                           there ? 16 : 0);
            }
        }
    };
    const auto fetch_scores = [&](u32 step) {
        if (step < steps) {
            Stage& stage = stages[step % STAGES];
#pragma unroll
            for (u32 i = 0; i < 2; ++i) {
                const uint4* scores = reinterpret_cast<const uint4*>(few.scores) + (tile + step) * (TILE / 4);
                copy_async(shared_address(stage.scores) + (thread + i * BLOCK) * 16, scores + thread + i * BLOCK, 16);
            }
            const uint4* most = reinterpret_cast<const uint4*>(few.most) + (tile + step) * (HEADS / 4);
            if (thread < HEADS / 4) copy_async(shared_address(stage.most) + thread * 16, most + thread, 16);
        }
        copies_commit();
    };

    // The softmax of a head: four or eight threads carry the same maximum along, and each its own powers' sum.
    const u32 head = thread / 8, half = thread / 4 % 2, pair = thread % 4;
    const f32 scale = args.scale * 1.4426950408889634f;
    Softmax softmax;
    if (args.sinks && head < unit.heads) {
        softmax.most = sink_of(args, unit.head + head) / args.scale;
        softmax.total = pair == 0 ? 1.0f : 0.0f;
    }
    const auto raise = [&](u32 step) {
        if (step >= steps) return;
        const Stage& stage = stages[step % STAGES];
        const f32 factor = softmax.raise(stage.most[head], scale);
        if (half == 0 && pair == 0) kept[step % 2][head] = factor;
        f32 low[4], high[4];
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            const float2 scores = stage.scores[score_of(j, head, half, pair)];
            low[j] = softmax.power(scores.x, scale), high[j] = softmax.power(scores.y, scale);
            *reinterpret_cast<u32*>(powers[step % 2] + power_place(head, half * 4 + j) + pair * 2) = narrow_pair(low[j], high[j]);
            softmax.add(low[j], high[j]);
        }
        if (few.halves) return;
        // One thread adds up both halves; the other's sum is not used.
#pragma unroll
        for (u32 j = 0; j < 4; ++j)
            softmax.add(__shfl_xor_sync(~0u, low[j], 4), __shfl_xor_sync(~0u, high[j], 4));
    };

#pragma unroll
    for (u32 step = 0; step + 1 < STAGES; ++step) fetch_values(step, slot_of(step));
    take_turn();
#pragma unroll
    for (u32 step = 0; step + 1 < STAGES; ++step) fetch_scores(step);
    u32 slot = slot_of(STAGES - 1);
    copies_wait<STAGES - 2>();
    __syncthreads();
    raise(0);
    f32 sums[4] = {};
    for (u32 step = 0; step < steps; ++step) {
        copies_wait<STAGES - 3>();
        __syncthreads(); // the next step is there, this one's powers are, and the last one is done with
        fetch_values(step + STAGES - 1, slot);
        fetch_scores(step + STAGES - 1);
        slot = slot_of(step + STAGES);
        const f32 first = kept[step % 2][lane / 4], second = kept[step % 2][lane / 4 + 8];
        sums[0] *= first, sums[1] *= first, sums[2] *= second, sums[3] *= second;
        const bf16* values = stages[step % STAGES].values;
#pragma unroll
        for (u32 i = 0; i < STEP / 32; ++i) {
            u32 a[2][4], b[4];
            load_transposed(b, shared_address(values + value_place(i * 32 + lane, warp)));
#pragma unroll
            for (u32 k = 0; k < 2; ++k)
                load_matrices(a[k], shared_address(powers[step % 2] + power_place(lane % 16, i * 4 + k * 2 + lane / 16)));
            multiply(sums, a[0], b[0], b[1]);
            multiply(sums, a[1], b[2], b[3]);
        }
        raise(step + 1);
    }
    const f32 quad = quad_sum(softmax.total), other = __shfl_xor_sync(~0u, quad, 4);
    __syncthreads();
    if (half == 0 && pair == 0) kept[0][head] = 1.0f / (few.halves ? quad + other : quad);
    __syncthreads();
    const u32 at_column = column + warp * 8 + lane % 4 * 2;
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        const u32 row_of_unit = lane / 4 + 8 * i;
        if (row_of_unit >= unit.heads || at_column >= width) continue;
        const f32 factor = kept[0][row_of_unit];
        bf16* out = row<bf16>(args.out, unit.token) + (unit.head + row_of_unit) * width + at_column;
        *reinterpret_cast<u32*>(out) = narrow_pair(sums[2 * i] * factor, sums[2 * i + 1] * factor);
    }
}
