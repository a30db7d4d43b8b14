// Attention of few tokens, as when every sequence has one: what the kernels for many rows compute in one block a sequence
// is spread over the whole GPU, in the same order and with the same bits.
//
// Two kernels, whose blocks take a *unit* each: a token and up to 16 of its query heads that share a key head.
// `attention_scores` gives each step of 64 keys a block. `attention_sums` gives each 32 columns of the values of each span a
// block, which goes through all its steps: what the softmax carries along is the same. Scores and their maxima wait in scratch
// memory in between, and so do the sums of spans for the last block of those columns, which puts them together.
//
// What a step waits for is little: the greatest score so far is known from the maxima alone, so that warps make the
// powers of several steps at the same time, and only sums go from step to step.
#pragma once
#include "attention.cuh"
#include "barrier.cuh"

constexpr u32 BLOCK = 128, WARPS = BLOCK / 32; // of `attention_scores`
constexpr u32 HEADS = 16;                      // of a unit
constexpr u32 TILE = HEADS * STEP;             // scores of a step

// The twin of `launch::FewArgs`.
struct FewArgs {
    Args attention;
    u64 scores; // [unit, step] tiles of float32, ordered for those who take them up: see `score_of`
    u64 most;   // [unit, step, HEADS] float32: their maxima
    u64 parts;  // [unit, columns, span] `Part`s
    u32 steps, spans; // of a unit there is room for: as many as the longest may have
    u32 tiles;  // of heads that share a key head
    u32 halves; // powers are added up by halves of a step, as `attention_mla` does
    u32 unit;   // the first of this launch
    u32 padding;
};

// Where a pair of scores stands in a step: position half * 32 + eighth * 8 + pair * 2, and the one after it.
__device__ __forceinline__ u32 score_of(u32 eighth, u32 head, u32 half, u32 pair) {
    return eighth * (HEADS * 8) + head * 8 + half * 4 + pair;
}

// What the heads of a unit see.
struct Unit {
    u32 token, kv_head, head, heads; // the first of its query heads, and how many there are
    u32 sequence;                    // NONE: something is wrong, or the token is nobody's
    u32 first, end;                  // positions
    u32 base, steps;                 // of the first step, and how many there are
    u32 tile;                        // of the first step's scores
    u32 span, spans;                 // the steps are those of which span, and how many there are
};

// By a whole block: the unit of so many in this launch.
__device__ __forceinline__ Unit look(const FewArgs& few, u32 of_launch) {
    const Args& args = few.attention;
    __shared__ u32 sequence;
    const u32 index = few.unit + of_launch;
    const u32 group = args.heads / args.kv_heads, tile = index % few.tiles;
    Unit unit;
    unit.kv_head = index / few.tiles % args.kv_heads;
    unit.token = index / few.tiles / args.kv_heads;
    unit.head = unit.kv_head * group + tile * HEADS;
    unit.heads = min(group - tile * HEADS, HEADS);
    if (threadIdx.x == 0) sequence = NONE;
    __syncthreads();
    for (u32 b = threadIdx.x; b + 1 < args.starts.rows; b += blockDim.x)
        if (at<u32>(args.starts, b) <= unit.token && unit.token < at<u32>(args.starts, b + 1)) sequence = b;
    const u32 position = at<u32>(args.positions, unit.token);
    __syncthreads();
    unit.sequence = sequence;
    unit.end = position + 1;
    unit.first = first_seen(args, unit.end);
    unit.base = unit.first / STEP * STEP;
    unit.steps = position / STEP - unit.first / STEP + 1;
    unit.tile = of_launch * few.steps;
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

// C is what keys are cached in.
template <typename C> __device__ __forceinline__ void attention_scores(const FewArgs& few) {
    extern __shared__ __align__(128) bf16 lines[];
    __shared__ u32 slots[STEP];
    __shared__ f32 mosts[WARPS][HEADS];
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
    const auto pieces_of = [&](u32 line, auto each) {
        for (u32 piece = thread % TOGETHER; piece < pieces; piece += TOGETHER) each(lines + place(line, piece), piece * LINE);
    };
    const auto bring = [&](u32 line, auto* from) {
        const void* anywhere = reinterpret_cast<const void*>(args.q.start);
        pieces_of(line, [&](bf16* to, u32 at) { bring_piece(to, from + at, from && at < width, anywhere); });
    };
    for (u32 line = thread / TOGETHER; line < HEADS; line += BLOCK / TOGETHER)
        bring(line, line < unit.heads ? row<const bf16>(args.q, unit.token) + (unit.head + line) * width : nullptr);
    for (u32 line = thread / TOGETHER; line < STEP; line += BLOCK / TOGETHER)
        bring(HEADS + line, slots[line] != NONE ? row<const C>(args.keys, slots[line]) + unit.kv_head * width : nullptr);
    copies_commit();
    copies_wait<0>();
    for (u32 line = thread / TOGETHER; line < STEP; line += BLOCK / TOGETHER)
        pieces_of(HEADS + line, [&](bf16* at, u32) { settle_piece<C>(at); });
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
    const u64 tile = unit.tile + step;
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

constexpr u32 SUMMERS = 4, MAKERS = 6;            // warps that sum eight columns each, and warps that make powers
constexpr u32 SLICE = SUMMERS * 8;                // columns of the values of a block
constexpr u32 SUMS_BLOCK = 32 * (SUMMERS + MAKERS);
constexpr u32 STAGES = 12;                        // steps under way: what makes a step begins when its place is free

// What the spans but for one wait with: of each thread that sums, and of each head. `kernels.rs` repeats its size.
struct Part {
    float4 sums[32 * SUMMERS];
    f32 totals[32 * SUMMERS];
    f32 most[HEADS];
};
static_assert(sizeof(Part) == 2624, "as `kernels.rs` has it");

// A step, ready to be summed.
struct Stage {
    uint4 powers[STEP / 16][32];  // of 16 positions each, as an mma's lanes take them
    float4 pairs[HEADS][4][2];    // of a head and a lane's pairs: sums of two powers, by eighths of the first half, then the second
    bf16 values[STEP * SLICE];
    f32 kept[HEADS];
};

// Offset of a piece in lines of 64 bytes, two of which meet all banks.
__device__ __forceinline__ u32 value_place(u32 line, u32 piece) { return line * SLICE + ((piece ^ (line >> 1 & 3)) << 3); }

// The block's span of its unit, into shared memory, by a whole block; false where there is none.
__device__ __forceinline__ bool look_at_span(const FewArgs& few, Unit& shared) {
    const u32 units = gridDim.y / few.spans;
    Unit unit = look(few, blockIdx.y % units);
    const u32 first = unit.first / SPAN_KEYS;
    // Last spans come last: they may be short, and then share a multiprocessor with others.
    unit.span = blockIdx.y / units, unit.spans = (unit.end - 1) / SPAN_KEYS - first + 1;
    if (unit.sequence == NONE || unit.span >= unit.spans) return false;
    const u32 start = max((first + unit.span) * SPAN_KEYS, unit.base), skipped = (start - unit.base) / STEP;
    unit.base = start, unit.tile += skipped;
    unit.steps = min(unit.steps - skipped, (SPAN_KEYS - start % SPAN_KEYS) / STEP);
    if (threadIdx.x == 0) shared = unit;
    __syncthreads();
    return true;
}

// C is what values are cached in.
template <typename C> struct Sums {
    static constexpr bool CODES = sizeof(C) == 1;
    const FewArgs& few;
    const Args& args;
    const Unit& unit; // in shared memory, as there are few registers
    Stage* stages;
    f32* most; // [HEADS] of the span
    const u32 full, empty; // barriers of the stages
    const u32 warp, lane, column;
    const f32 scale;

    // What a softmax of a head has before the first key of a span; `total` only for those who add it up.
    __device__ __forceinline__ Softmax begin(u32 head) const {
        Softmax softmax;
        if (args.sinks && unit.span == 0 && head < unit.heads) {
            softmax.most = sink_of(args, unit.head + head) / args.scale;
            softmax.total = 1.0f;
        }
        return softmax;
    }

    // ------------------------------------------------------------------------------------------------ making powers

    // The slot of a step's first position, if all of the step lie in one cached block.
    __device__ __forceinline__ u32 find_values(u32 step) const {
        const u32 position = unit.base + step * STEP;
        const bool wanted = step < unit.steps && args.block_size % STEP == 0;
        return slot_in(args, block_of(args, unit.sequence, position, wanted), unit.sequence, position, wanted);
    }

    // A lane brings the same piece of eight lines.
    __device__ __forceinline__ void bring_values(u32 first, u32 step) const {
        const u32 width = args.values.width / args.kv_heads, piece = lane % 4, base = unit.base + step * STEP;
        bf16* to = stages[step % STAGES].values + value_place(lane / 4, piece);
        const C* start = reinterpret_cast<const C*>(args.values.start);
        const u32 at = unit.kv_head * width + column + piece * LINE;
        if (first != NONE && unit.first <= base && base + STEP <= unit.end && column + SLICE <= width) {
            const C* from = row<C>(args.values, first + lane / 4) + at;
#pragma unroll
            for (u32 i = 0; i < STEP / 8; ++i, from += 8 * args.values.stride) bring_piece(to + i * (8 * SLICE), from, true, start);
            return;
        }
#pragma unroll 1
        for (u32 i = 0; i < STEP / 8; ++i) {
            const u32 position = base + i * 8 + lane / 4;
            const bool seen = unit.first <= position && position < unit.end;
            const u32 slot = slot_in(args, block_of(args, unit.sequence, position, seen), unit.sequence, position, seen);
            const bool there = slot != NONE && column + piece * LINE < width;
            bring_piece(to + i * (8 * SLICE), there ? row<C>(args.values, slot) + at : start, there, start);
        }
    }

    // What a lane brought of a step, and of the steps before, is there: it becomes numbers.
    __device__ __forceinline__ void settle_values(u32 step) const {
        bf16* at = stages[step % STAGES].values + value_place(lane / 4, lane % 4);
#pragma unroll
        for (u32 half = 0; half < 2; ++half, at += 4 * (8 * SLICE)) {
            uint2 codes[4];
#pragma unroll
            for (u32 i = 0; i < 4; ++i) codes[i] = *reinterpret_cast<const uint2*>(at + i * (8 * SLICE));
#pragma unroll
            for (u32 i = 0; i < 4; ++i) *reinterpret_cast<uint4*>(at + i * (8 * SLICE)) = decode_piece(codes[i]);
        }
    }

    // The scores of a step that a lane turns into powers: of heads lane / 4 and lane / 4 + 8, pairs lane % 4.
    __device__ __forceinline__ void read_scores(float2 (&scores)[2][8], u32 step) const {
        const float2* from = reinterpret_cast<const float2*>(few.scores) + u64(unit.tile + step) * (TILE / 2);
#pragma unroll
        for (u32 i = 0; i < 2; ++i)
#pragma unroll
            for (u32 j = 0; j < 8; ++j) scores[i][j] = __ldcg(from + score_of(j % 4, lane / 4 + 8 * i, j / 4, lane % 4));
    }

    // The maxima of a step that a warp makes, of heads lane / 4 and lane / 4 + 8, after those of the steps since its last one.
    __device__ __forceinline__ void read_maxima(f32 (&maxima)[2][MAKERS], u32 step) const {
        const f32* from = reinterpret_cast<const f32*>(few.most) + u64(unit.tile) * HEADS + lane / 4;
#pragma unroll
        for (u32 back = 0; back < MAKERS; ++back)
#pragma unroll
            for (u32 i = 0; i < 2; ++i)
                // Before the first step, it is taken once more.
                maxima[i][back] = __ldcg(from + (step > back ? step - back : 0) * HEADS + 8 * i);
    }

    __device__ __forceinline__ void make(Softmax (&softmax)[2], const f32 (&maxima)[2][MAKERS], const float2 (&scores)[2][8], u32 step) const {
        Stage& stage = stages[step % STAGES];
        u32 powers[STEP / 16][4];
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const u32 head = lane / 4 + 8 * i;
#pragma unroll
            for (u32 back = 1; back < MAKERS; ++back)
                if (step >= back) softmax[i].most = fmaxf(softmax[i].most, maxima[i][back]);
            const f32 kept = softmax[i].raise(maxima[i][0], scale);
            if (lane % 4 == 0) stage.kept[head] = kept;
            f32 pairs[8];
#pragma unroll
            for (u32 j = 0; j < 8; ++j) {
                const f32 low = softmax[i].power(scores[i][j].x, scale), high = softmax[i].power(scores[i][j].y, scale);
                pairs[j] = __fadd_rn(low, high);
                powers[j / 2][j % 2 * 2 + i] = narrow_pair(low, high);
            }
            stage.pairs[head][lane % 4][0] = make_float4(pairs[0], pairs[1], pairs[2], pairs[3]);
            stage.pairs[head][lane % 4][1] = make_float4(pairs[4], pairs[5], pairs[6], pairs[7]);
        }
#pragma unroll
        for (u32 k = 0; k < STEP / 16; ++k) stage.powers[k][lane] = make_uint4(powers[k][0], powers[k][1], powers[k][2], powers[k][3]);
    }

    // Every MAKERS-th step, by a warp.
    __device__ __forceinline__ void make_all(u32 maker) const {
        Softmax softmax[2] = {begin(lane / 4), begin(lane / 4 + 8)};
        if (maker < unit.steps) bring_values(find_values(maker), maker);
        u32 first = find_values(maker + MAKERS);
        take_turn();
        float2 scores[2][8];
        f32 maxima[2][MAKERS];
        if (maker < unit.steps) read_scores(scores, maker), read_maxima(maxima, maker);
        const auto bring_next = [&](u32 next) {
            if (next >= STAGES) barrier_wait(empty + 8 * (next % STAGES), next / STAGES % 2 ^ 1);
            bring_values(first, next);
            first = find_values(next + MAKERS);
        };
        if constexpr (CODES) copies_commit();
        for (u32 step = maker; step < unit.steps; step += MAKERS) {
            const u32 slot = step % STAGES, next = step + MAKERS;
            if constexpr (!CODES) barrier_follow(full + 8 * slot);
            make(softmax, maxima, scores, step);
            if (step + 1 == unit.steps && lane % 4 == 0) most[lane / 4] = softmax[0].most, most[lane / 4 + 8] = softmax[1].most;
            if constexpr (CODES) {
                // Values of the next step are on their way while those of this one are decoded.
                if (next < unit.steps) bring_next(next);
                copies_commit();
                copies_wait<1>();
                settle_values(step);
                barrier_arrive(full + 8 * slot);
            }
            barrier_arrive(full + 8 * slot);
            if (next >= unit.steps) break;
            read_scores(scores, next), read_maxima(maxima, next);
            if constexpr (!CODES) bring_next(next);
        }
    }

    // ------------------------------------------------------------------------------------------------------ summing

    // What a lane sums of a step.
    struct Share {
        uint4 powers[STEP / 16];
        u32 values[STEP / 32][4];
        f32 kept[2];     // of rows lane / 4 and lane / 4 + 8
        f32 head_kept;   // of the head whose total the thread adds up
        float4 pairs[2]; // its powers: of the thread's half, then of the other
    };

    // Takes a step out of its stage, which is free then.
    __device__ __forceinline__ void take(Share& share, u32 step) const {
        const u32 slot = step % STAGES, thread = threadIdx.x, head = thread / 8, half = thread / 4 % 2;
        const Stage& stage = stages[slot];
        barrier_wait(full + 8 * slot, step / STAGES % 2);
#pragma unroll
        for (u32 k = 0; k < STEP / 16; ++k) share.powers[k] = stage.powers[k][lane];
#pragma unroll
        for (u32 i = 0; i < STEP / 32; ++i)
            load_transposed(share.values[i], shared_address(stage.values + value_place(i * 32 + lane, warp)));
        share.kept[0] = stage.kept[lane / 4], share.kept[1] = stage.kept[lane / 4 + 8];
        share.head_kept = stage.kept[head];
        share.pairs[0] = stage.pairs[head][thread % 4][half], share.pairs[1] = stage.pairs[head][thread % 4][half ^ 1];
        __syncwarp();
        if (lane == 0) barrier_arrive(empty + 8 * slot);
    }

    __device__ __forceinline__ void sum(f32 (&sums)[4], f32& total, const Share& share) const {
        sums[0] *= share.kept[0], sums[1] *= share.kept[0], sums[2] *= share.kept[1], sums[3] *= share.kept[1];
#pragma unroll
        for (u32 k = 0; k < STEP / 16; ++k) {
            const u32 a[4] = {share.powers[k].x, share.powers[k].y, share.powers[k].z, share.powers[k].w};
            multiply(sums, a, share.values[k / 2][k % 2 * 2], share.values[k / 2][k % 2 * 2 + 1]);
        }
        total = __fmul_rn(total, share.head_kept);
        const auto add = [&](const float4& pairs) {
            total = __fadd_rn(total, pairs.x), total = __fadd_rn(total, pairs.y);
            total = __fadd_rn(total, pairs.z), total = __fadd_rn(total, pairs.w);
        };
        add(share.pairs[0]);
        // One thread adds up both halves; the other's sum is not used.
        if (!few.halves) add(share.pairs[1]);
    }

    __device__ __forceinline__ void sum_all(f32 (&factors)[HEADS]) const {
        const u32 head = threadIdx.x / 8, half = threadIdx.x / 4 % 2, pair = threadIdx.x % 4;
        const u32 steps = unit.steps;
        f32 sums[4] = {}, total = pair == 0 ? begin(head).total : 0.0f;
        Share shares[2];
        take(shares[0], 0);
        for (u32 step = 0; step < steps; step += 2) {
            if (step + 1 < steps) take(shares[1], step + 1);
            sum(sums, total, shares[0]);
            if (step + 1 == steps) break;
            if (step + 2 < steps) take(shares[0], step + 2);
            sum(sums, total, shares[1]);
        }
        if (unit.spans > 1 && !put_together(sums, total)) return;
        const f32 quad = quad_sum(total), other = __shfl_xor_sync(~0u, quad, 4);
        if (half == 0 && pair == 0) factors[head] = args.value_scale / (few.halves ? quad + other : quad);
        meet();
        const u32 width = args.values.width / args.kv_heads, at_column = column + warp * 8 + lane % 4 * 2;
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const u32 row_of_unit = lane / 4 + 8 * i;
            if (row_of_unit >= unit.heads || at_column >= width) continue;
            const f32 factor = factors[row_of_unit];
            bf16* out = row<bf16>(args.out, unit.token) + (unit.head + row_of_unit) * width + at_column;
            *reinterpret_cast<u32*>(out) = narrow_pair(sums[2 * i] * factor, sums[2 * i + 1] * factor);
        }
    }

    // --------------------------------------------------------------------------------------------- putting together

    __device__ __forceinline__ void meet() const { asm volatile("bar.sync 1, %0;" ::"n"(32 * SUMMERS) : "memory"); }

    // Leaves what the span gave; the last block to do so goes on, with what all spans give.
    __device__ __forceinline__ bool put_together(f32 (&sums)[4], f32& total) const {
        __shared__ u32 left;
        const u32 thread = threadIdx.x, columns = blockIdx.y % (gridDim.y / few.spans) * gridDim.x + blockIdx.x;
        Part* parts = reinterpret_cast<Part*>(few.parts) + u64(columns) * few.spans;
        u32* count = reinterpret_cast<u32*>(args.scratch) + columns;
        __stcg(&parts[unit.span].sums[thread], make_float4(sums[0], sums[1], sums[2], sums[3]));
        __stcg(&parts[unit.span].totals[thread], total);
        if (thread < HEADS) __stcg(&parts[unit.span].most[thread], most[thread]);
        meet();
        if (thread == 0) asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(left) : "l"(count) : "memory");
        meet();
        if (left + 1 < unit.spans) return false;
        if (thread == 0) *count = 0;
        // Of the heads of the sums, and of that of the total.
        const u32 heads[3] = {lane / 4, lane / 4 + 8, thread / 8};
        Softmax all[3];
#pragma unroll 1
        for (u32 i = 0; i < unit.spans; ++i) {
            const float4 own = __ldcg(&parts[i].sums[thread]);
            const f32 own_total = __ldcg(&parts[i].totals[thread]);
            float2 shares[3];
#pragma unroll
            for (u32 j = 0; j < 3; ++j) {
                Softmax softmax;
                softmax.most = __ldcg(&parts[i].most[heads[j]]), softmax.total = own_total;
                shares[j] = make_float2(0.0f, 1.0f);
                if (i > 0) shares[j] = softmax.follow(all[j].most, all[j].total, scale);
                all[j] = softmax;
            }
            sums[0] = Softmax::blend(sums[0], own.x, shares[0]), sums[1] = Softmax::blend(sums[1], own.y, shares[0]);
            sums[2] = Softmax::blend(sums[2], own.z, shares[1]), sums[3] = Softmax::blend(sums[3], own.w, shares[1]);
        }
        total = all[2].total;
        return true;
    }
};

template <typename C> __device__ __forceinline__ void attention_sums(const FewArgs& few) {
    extern __shared__ __align__(128) unsigned char shared[];
    __shared__ u64 barriers[2 * STAGES];
    __shared__ f32 factors[HEADS], most[HEADS];
    __shared__ Unit unit;
    // What runs before is `attention_scores`, which began when everything before it was done: all but what that writes is
    // there.
    if (!look_at_span(few, unit)) return take_turn();
    const u32 full = shared_address(barriers), empty = full + 8 * STAGES, warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
        for (u32 slot = 0; slot < STAGES; ++slot) {
            barrier_init(full + 8 * slot, 2 * 32); // lanes, and what each brings
            barrier_init(empty + 8 * slot, SUMMERS);
        }
    }
    __syncthreads();
    const f32 scale = few.attention.scale * 1.4426950408889634f;
    const Sums<C> sums{few, few.attention, unit, reinterpret_cast<Stage*>(shared), most, full, empty, warp, threadIdx.x % 32,
                       blockIdx.x * SLICE, scale};
    if (warp < SUMMERS) sums.sum_all(factors);
    else sums.make_all(warp - SUMMERS);
}

#define SCORES(C)                                                                                            \
    extern "C" __global__ void __launch_bounds__(BLOCK)                                                      \
        attention_scores_##C##_bf16(const __grid_constant__ FewArgs few) {                                   \
        take_turn();                                                                                         \
        attention_scores<C>(few);                                                                            \
    }

// Blocks a multiprocessor has room for. Before Hopper the same sums want more registers than two blocks can have.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr u32 SUMS_AT_ONCE = 1;
#else
constexpr u32 SUMS_AT_ONCE = 2;
#endif

// Takes its turn itself: what it reads first was there before.
#define SUMS(C)                                                                                              \
    extern "C" __global__ void __launch_bounds__(SUMS_BLOCK, SUMS_AT_ONCE)                                   \
        attention_sums_##C##_bf16(const __grid_constant__ FewArgs few) {                                     \
        attention_sums<C>(few);                                                                              \
    }
