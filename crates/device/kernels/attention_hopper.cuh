// Attention of bf16 heads of 64 to 256 elements for Hopper, whose cached blocks hold whole steps: TMA brings keys and
// values, wgmma multiplies. Bits are those of `attention_gqa.cuh` and `attention_few.cuh`, which take everything else.
//
// A block takes 128 rows of one sequence and key head. One thread keeps rings of keys and values full, or, of codes, a
// warpgroup that decodes them there; two warpgroups
// take 64 rows each. The tensor cores score the next step's keys and then multiply this step's powers by its values; as soon
// as the scores are there the warpgroup makes powers of them, while the values are still multiplied.
#pragma once
#include "attention.cuh"
#include "barrier.cuh"

constexpr u32 GROUP = 128, GROUPS = 2, BLOCK = (1 + GROUPS) * GROUP; // threads of a warpgroup, those that multiply
constexpr u32 ROWS = 64, HEIGHT = GROUPS * ROWS;                     // rows of a warpgroup, of a block
constexpr u32 COLUMNS = 64;                                          // of a chunk: lines of 128 bytes
constexpr u32 CHUNK = STEP * COLUMNS * 2;                            // bytes of 64 lines of a chunk
static_assert(ROWS == STEP, "queries, keys and values are cut into the same chunks");

// How TMA finds a matrix, as the driver wrote it. The twin of `driver::TensorMap`.
struct alignas(128) TensorMap {
    u64 opaque[16];
};

// The twin of `launch::HopperAttentionArgs`.
struct HopperArgs {
    TensorMap keys, values; // boxes of STEP rows by COLUMNS
    Args attention;
};

// What keys and values are cached in, their widths, steps that there is room for, and whether queries stay in registers: the tensor
// cores then read keys from shared memory alone.
template <typename C_, u32 KEY_, u32 VALUE_, u32 STAGES_, bool HELD_> struct Shape {
    static constexpr bool CODES = sizeof(C_) == 1;
    static constexpr u32 KEY = KEY_, VALUE = VALUE_, STAGES = STAGES_;
    static constexpr bool HELD = HELD_;
    static constexpr u32 KEYS = KEY / COLUMNS * CHUNK, VALUES = VALUE / COLUMNS * CHUNK; // bytes of a step
};

// What stands in shared memory; `kernels.rs` repeats its size.
template <typename S> struct Room {
    unsigned char queries[GROUPS][S::KEYS];
    unsigned char keys[S::STAGES][S::KEYS];
    unsigned char values[S::STAGES][S::VALUES];
    Sight<HEIGHT> sight;
    u32 carried[GROUPS]; // places of what the warpgroups put away
    u64 keys_full[S::STAGES], keys_empty[S::STAGES], values_full[S::STAGES], values_empty[S::STAGES];
};

// ----------------------------------------------------------------------------------------------------------- wgmma

// Operands lie in 128-byte swizzled lines, eight of which repeat every 1024 bytes; where lines run along k, chunks are the
// leading step.
__device__ __forceinline__ u64 operand(u32 address) {
    constexpr u64 LAYOUT = (u64(1) << 62) | (u64(1024 / 16) << 32) | (u64(CHUNK / 16) << 16);
    return LAYOUT | ((address & 0x3ffff) >> 4);
}

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// At most PENDING groups of products are still under way.
template <u32 PENDING> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F16(i) F4(i), F4(i + 4), F4(i + 8), F4(i + 12)

// d[64 rows x 64 positions] = queries * keys^T for 16 columns, added to d if `more`.
__device__ __forceinline__ void score(f32 (&d)[32], u64 a, u64 b, u32 more) {
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %34, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
                 "%26,%27,%28,%29,%30,%31"
                 "}, %32, %33, p, 1, 1, 0, 0;\n}"
                 : F16(0), F16(16)
                 : "l"(a), "l"(b), "r"(more));
}
__device__ __forceinline__ void score(f32 (&d)[32], const u32 (&a)[4], u64 b, u32 more) {
    asm volatile("{\n .reg .pred p;\n setp.ne.b32 p, %37, 0;\n"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,"
                 "%26,%27,%28,%29,%30,%31"
                 "}, {%32,%33,%34,%35}, %36, p, 1, 1, 0;\n}"
                 : F16(0), F16(16)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(more));
}

// d[64 rows x columns] += powers * values for 16 positions.
__device__ __forceinline__ void weigh(f32 (&d)[32], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,"
                 "%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, {%32,%33,%34,%35}, %36, 1, 1, 1, 1;"
                 : F16(0), F16(16)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void weigh(f32 (&d)[64], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,"
                 "%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,"
                 "%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}, "
                 "{%64,%65,%66,%67}, %68, 1, 1, 1, 1;"
                 : F16(0), F16(16), F16(32), F16(48)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
__device__ __forceinline__ void weigh(f32 (&d)[128], const u32 (&a)[4], u64 b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
                 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,"
                 "%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,"
                 "%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,"
                 "%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,"
                 "%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,"
                 "%126,%127"
                 "}, {%128,%129,%130,%131}, %132, 1, 1, 1, 1;"
                 : F16(0), F16(16), F16(32), F16(48), F16(64), F16(80), F16(96), F16(112)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// No read or write of these moves over what stands here, and their registers are not used for anything else before.
template <u32 COUNT> __device__ __forceinline__ void hold(f32 (&d)[COUNT]) {
#pragma unroll
    for (u32 i = 0; i < COUNT; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
template <u32 COUNT> __device__ __forceinline__ void hold(u32 (&d)[COUNT][4]) {
#pragma unroll
    for (u32 i = 0; i < 4 * COUNT; ++i) asm volatile("" : "+r"(d[i / 4][i % 4])::"memory");
}

// --------------------------------------------------------------------------------------------------------- fetching

// Offset in chunks of 64 lines of 128 bytes whose 16-byte pieces are permuted as TMA and wgmma do.
__device__ __forceinline__ u32 place(u32 line, u32 piece) {
    return piece / 8 * CHUNK + line * 128 + (((piece ^ line) & 7) << 4);
}

__device__ __forceinline__ void bring_box(u32 to, const TensorMap* map, u32 barrier, u32 column, u32 row) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
                     "r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}

// Brings the steps of a tile one after the other, as there is room. By one thread.
template <typename S>
__device__ __forceinline__ void fetch_steps(const HopperArgs& all, Room<S>& room, const Tile& tile, u32 start, u32 high) {
    const Args& args = all.attention;
    u32 count = 0;
    for (u32 base = start; base < high; base += STEP, ++count) {
        const u32 stage = count % S::STAGES, parity = count / S::STAGES % 2 ^ 1;
        const u32 block = block_of(args, tile.sequence, base, true);
        // A block that is outside the cache is complained of, and another read in its place.
        const u32 slot = slot_in(args, block, tile.sequence, base, true), row = slot == NONE ? 0 : slot;
        const auto bring = [&](unsigned char* to, const TensorMap* map, u32 width, u64& full, u64& empty) {
            if (count >= S::STAGES) barrier_wait(shared_address(&empty), parity);
            barrier_expect(shared_address(&full), width / COLUMNS * CHUNK);
#pragma unroll
            for (u32 chunk = 0; chunk < width / COLUMNS; ++chunk)
                bring_box(shared_address(to) + chunk * CHUNK, map, shared_address(&full), blockIdx.y * width + chunk * COLUMNS, row);
        };
        bring(room.keys[stage], &all.keys, S::KEY, room.keys_full[stage], room.keys_empty[stage]);
        bring(room.values[stage], &all.values, S::VALUE, room.values_full[stage], room.values_empty[stage]);
    }
}

// Each thread of a warpgroup has the same piece of every sixteenth line of every chunk, whose places are so far apart.
constexpr u32 LINES_APART = GROUP / 8, PLACES_APART = LINES_APART * 128, SHARE = STEP / LINES_APART;

// A step of codes on their way into its place, WIDTH columns of the rows from `first` on.
template <u32 WIDTH> __device__ __forceinline__ void bring_codes(unsigned char* to, const Rows& cache, u32 first) {
    const u32 line = threadIdx.x / 8, piece = threadIdx.x % 8;
    const e4m3* from = row<e4m3>(cache, first + line) + blockIdx.y * WIDTH + piece * LINE;
    unsigned char* at = to + place(line, piece);
    // Without a whole step there is no block, and nothing that is looked at.
    if (cache.rows < STEP) return;
#pragma unroll
    for (u32 i = 0; i < SHARE; ++i, from += LINES_APART * cache.stride)
#pragma unroll
        for (u32 chunk = 0; chunk < WIDTH / COLUMNS; ++chunk)
            bring_piece(reinterpret_cast<bf16*>(at + chunk * CHUNK + i * PLACES_APART), from + chunk * COLUMNS, true, from);
}

// The same pieces, once they are there, as numbers. All of a chunk are read before any is written.
template <u32 WIDTH> __device__ __forceinline__ void settle_codes(unsigned char* to) {
    unsigned char* at = to + place(threadIdx.x / 8, threadIdx.x % 8);
#pragma unroll
    for (u32 chunk = 0; chunk < WIDTH / COLUMNS; ++chunk) {
        uint2 codes[SHARE];
#pragma unroll
        for (u32 i = 0; i < SHARE; ++i) codes[i] = *reinterpret_cast<const uint2*>(at + chunk * CHUNK + i * PLACES_APART);
#pragma unroll
        for (u32 i = 0; i < SHARE; ++i)
            *reinterpret_cast<uint4*>(at + chunk * CHUNK + i * PLACES_APART) = decode_piece(codes[i]);
    }
}

// As `fetch_steps`, of codes: keys of a step are a turn, and so are its values.
template <typename S>
__device__ __forceinline__ void decode_steps(const HopperArgs& all, Room<S>& room, const Tile& tile, u32 start, u32 high) {
    // Turns on their way. Values wait for the place of those STAGES steps before, which is left once keys of the second step after
    // those are there: one more, and both sides would wait.
    constexpr u32 AHEAD = 2 * S::STAGES - 3;
    const Args& args = all.attention;
    const u32 turns = high > start ? (high - start + STEP - 1) / STEP * 2 : 0;
    const auto bring = [&](u32 turn) {
        const u32 count = turn / 2, stage = count % S::STAGES, parity = count / S::STAGES % 2 ^ 1;
        if (turn < turns) {
            const u32 base = start + count * STEP, block = block_of(args, tile.sequence, base, true);
            // A block that is outside the cache is complained of, and another read in its place.
            const u32 slot = slot_in(args, block, tile.sequence, base, true), first = slot == NONE ? 0 : slot;
            u64& empty = turn % 2 ? room.values_empty[stage] : room.keys_empty[stage];
            if (count >= S::STAGES) barrier_wait(shared_address(&empty), parity);
            if (turn % 2) bring_codes<S::VALUE>(room.values[stage], args.values, first);
            else bring_codes<S::KEY>(room.keys[stage], args.keys, first);
        }
        copies_commit();
    };
    for (u32 turn = 0; turn < AHEAD; ++turn) bring(turn);
    for (u32 turn = 0; turn < turns; ++turn) {
        copies_wait<AHEAD - 1>();
        const u32 stage = turn / 2 % S::STAGES;
        if (turn % 2) settle_codes<S::VALUE>(room.values[stage]);
        else settle_codes<S::KEY>(room.keys[stage]);
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
        barrier_arrive(shared_address(turn % 2 ? &room.values_full[stage] : &room.keys_full[stage]));
        bring(turn + AHEAD);
    }
}

// ------------------------------------------------------------------------------------------------------ a warpgroup

__device__ __forceinline__ void group_barrier(u32 group) {
    asm volatile("bar.sync %0, %1;" ::"r"(group + 1), "n"(GROUP) : "memory");
}

template <typename S>
__device__ __forceinline__ void attend(const Args& args, Room<S>& room, u32 start, u32 high) {
    constexpr u32 KEY_PIECES = S::KEY / LINE, VALUE_PIECES = S::VALUE / LINE;
    const Sight<HEIGHT>& sight = room.sight;
    const u32 group = threadIdx.x / GROUP - 1, thread = threadIdx.x % GROUP, lane = thread % 32;
    const u32 first_line = group * ROWS, line = thread / 32 * 16 + lane / 4; // this thread's rows: this and the eighth after
    unsigned char* own = room.queries[group];

    // Queries, zero past the sequence.
    for (u32 at = thread; at < ROWS * KEY_PIECES; at += GROUP) {
        const u32 piece = at % KEY_PIECES;
        const bf16* from = sight.find(args.q, first_line + at / KEY_PIECES, S::KEY);
        const void* anywhere = reinterpret_cast<const void*>(args.q.start);
        copy_async(shared_address(own) + place(at / KEY_PIECES, piece), from ? from + piece * LINE : anywhere, from ? 16 : 0);
    }
    u32 end = 0, inner_low = 0, inner_high = NONE; // of this warpgroup's rows
    for (u32 at = first_line + lane; at < first_line + ROWS; at += 32) {
        if (sight.end[at] == 0) continue;
        end = max(end, sight.end[at]);
        inner_low = max(inner_low, sight.first[at]), inner_high = min(inner_high, sight.end[at]);
    }
    end = __reduce_max_sync(~0u, end);
    inner_low = __reduce_max_sync(~0u, inner_low), inner_high = __reduce_min_sync(~0u, inner_high);
    const auto steps_to = [&](u32 end) { return end > start ? (end - start + STEP - 1) / STEP : 0; };
    const u32 steps = steps_to(end), all_steps = steps_to(high);

    const f32 scale = args.scale * 1.4426950408889634f;
    const Carry<GROUP, S::VALUE / 2, 2> carry{args, &room.carried[group], &sight.first[first_line + line], start, thread, group + 1, scale};
    carry.open(end);
    Softmax softmax[2];
    if (args.sinks) {
        // A sink is a score that came before all others, of a value that is zero; scores are counted before their factor.
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            const u32 at = first_line + line + 8 * i;
            if (sight.token[at] == NONE) continue;
            softmax[i].most = sink_of(args, sight.head[at]) / args.scale;
            softmax[i].total = lane % 4 == 0 ? 1.0f : 0.0f;
        }
    }
    f32 sums[S::VALUE / 2];
#pragma unroll
    for (u32 i = 0; i < S::VALUE / 2; ++i) sums[i] = 0.0f;
    f32 scores[STEP / 2], kept[2];
    u32 powers[STEP / 16][4];

    copies_commit();
    copies_wait<0>();
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    group_barrier(group);
    u32 held[S::HELD ? S::KEY / 16 : 1][4];
    if constexpr (S::HELD) {
#pragma unroll
        for (u32 at = 0; at < S::KEY / 16; ++at)
            load_matrices(held[at], shared_address(own) + place(thread / 32 * 16 + lane % 16, at * 2 + lane / 16));
    }

    const auto await_keys = [&](u32 step) {
        if (step < steps) barrier_wait(shared_address(&room.keys_full[step % S::STAGES]), step / S::STAGES % 2);
    };
    const auto score_step = [&](u32 step) {
        const u64 a = operand(shared_address(own)), b = operand(shared_address(room.keys[step % S::STAGES]));
        wgmma_fence();
#pragma unroll
        for (u32 at = 0; at < S::KEY / 16; ++at) {
            const u32 offset = at / 4 * (CHUNK / 16) + at % 4 * 2;
            if constexpr (S::HELD) score(scores, held[at], b + offset, at > 0);
            else score(scores, a + offset, b + offset, at > 0);
        }
        wgmma_commit();
    };
    // Scores become powers where they stand, and `kept` what sums are to be multiplied with.
    const auto soften = [&](u32 step) {
        const u32 base = start + step * STEP;
        const bool partly = base < inner_low || base + STEP > inner_high;
#pragma unroll
        for (u32 i = 0; i < 2; ++i) {
            if (partly) {
                const u32 first = sight.first[first_line + line + 8 * i], end = sight.end[first_line + line + 8 * i];
#pragma unroll
                for (u32 j = 0; j < STEP / 8; ++j)
#pragma unroll
                    for (u32 v = 0; v < 2; ++v) {
                        const u32 position = base + j * 8 + lane % 4 * 2 + v;
                        if (position < first || position >= end) scores[4 * j + 2 * i + v] = minus_infinity();
                    }
            }
            f32 most = minus_infinity();
#pragma unroll
            for (u32 j = 0; j < STEP / 8; ++j) most = fmaxf(most, fmaxf(scores[4 * j + 2 * i], scores[4 * j + 2 * i + 1]));
            kept[i] = softmax[i].raise(quad_max(most), scale);
#pragma unroll
            for (u32 j = 0; j < STEP / 8; ++j) {
                f32 &low = scores[4 * j + 2 * i], &high = scores[4 * j + 2 * i + 1];
                low = softmax[i].power(low, scale), high = softmax[i].power(high, scale);
                softmax[i].add(low, high);
            }
        }
    };
    // No product that reads powers may be under way.
    const auto round_powers = [&] {
#pragma unroll
        for (u32 j = 0; j < STEP / 8; ++j)
#pragma unroll
            for (u32 i = 0; i < 2; ++i) powers[j / 2][j % 2 * 2 + i] = narrow_pair(scores[4 * j + 2 * i], scores[4 * j + 2 * i + 1]);
    };
    const auto scale_sums = [&] {
        // Factors of one change nothing.
        if (__any_sync(~0u, kept[0] != 1.0f || kept[1] != 1.0f)) {
#pragma unroll
            for (u32 i = 0; i < S::VALUE / 2; ++i) sums[i] *= kept[i / 2 % 2];
        }
    };
    // Each warp says for itself that it is done.
    const auto release = [&](u64& empty) {
        if (lane == 0) barrier_arrive(shared_address(&empty));
    };

    // Values of a step, once they are there.
    const auto ready = [&](u32 step) {
        const u32 base = start + step * STEP, stage = step % S::STAGES;
        barrier_wait(shared_address(&room.values_full[stage]), step / S::STAGES % 2);
        unsigned char* values = room.values[stage];
        if (base + STEP > high) {
            // What stands in the cache behind the last token is anybody's: even times zero it may not count.
            for (u32 at = (high - base) * VALUE_PIECES + thread; at < STEP * VALUE_PIECES; at += GROUP)
                *reinterpret_cast<uint4*>(values + place(at / VALUE_PIECES, at % VALUE_PIECES)) = make_uint4(0, 0, 0, 0);
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            group_barrier(group);
        }
        return shared_address(values);
    };
    const auto weigh_step = [&](u32 values) {
        wgmma_fence();
#pragma unroll
        for (u32 at = 0; at < STEP / 16; ++at) weigh(sums, powers[at], operand(values + at * 2048));
        wgmma_commit();
    };

    for (u32 from = 0, to; from < steps; from = to) {
        // The steps of a span.
        to = min(steps, ((start / STEP + from) / (SPAN_KEYS / STEP) + 1) * (SPAN_KEYS / STEP) - start / STEP);
        await_keys(from);
        score_step(from);
        wgmma_wait<0>();
        hold(scores);
        release(room.keys_empty[from % S::STAGES]);
        soften(from);
        round_powers();
        await_keys(from + 1);
#pragma unroll 1
        for (u32 step = from; step + 1 < to; ++step) {
            hold(scores), hold(sums), hold(powers);
            score_step(step + 1);
            weigh_step(ready(step));
            wgmma_wait<1>();
            hold(scores);
            release(room.keys_empty[(step + 1) % S::STAGES]);
            soften(step + 1);
            // Also keeps the compiler from waiting for the sums before powers are made.
            await_keys(step + 2);
            wgmma_wait<0>();
            hold(sums), hold(powers);
            release(room.values_empty[step % S::STAGES]);
            scale_sums();
            round_powers();
        }
        weigh_step(ready(to - 1));
        wgmma_wait<0>();
        hold(sums);
        release(room.values_empty[(to - 1) % S::STAGES]);
        carry.end_span(softmax, sums, start + to * STEP, to == steps);
    }
    // Steps that only the other warpgroup sees.
    for (u32 step = steps; step < all_steps; ++step) {
        const u32 stage = step % S::STAGES, parity = step / S::STAGES % 2;
        barrier_wait(shared_address(&room.keys_full[stage]), parity);
        release(room.keys_empty[stage]);
        barrier_wait(shared_address(&room.values_full[stage]), parity);
        release(room.values_empty[stage]);
    }

    // A warp's outputs go through its own queries' place, to be stored in whole pieces.
#pragma unroll
    for (u32 i = 0; i < 2; ++i) {
        const f32 factor = args.value_scale / quad_sum(softmax[i].total);
#pragma unroll
        for (u32 j = 0; j < VALUE_PIECES; ++j)
            *reinterpret_cast<u32*>(own + place(line + 8 * i, j) + lane % 4 * 4) =
                narrow_pair(sums[4 * j + 2 * i] * factor, sums[4 * j + 2 * i + 1] * factor);
    }
    __syncwarp();
#pragma unroll 4
    for (u32 at = thread / 32 * 16 + lane / VALUE_PIECES; at < thread / 32 * 16 + 16; at += 32 / VALUE_PIECES) {
        if (sight.end[first_line + at] == 0) continue;
        bf16* to = sight.find(args.out, first_line + at, S::VALUE) + lane % VALUE_PIECES * LINE;
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(own + place(at, lane % VALUE_PIECES));
    }
    carry.close(end);
}

template <typename S> __device__ __forceinline__ void attention(const HopperArgs& all) {
    extern __shared__ __align__(1024) unsigned char shared[];
    Room<S>& room = *reinterpret_cast<Room<S>*>(shared);
    const Args& args = all.attention;
    if (threadIdx.x == 0) {
        for (u32 stage = 0; stage < S::STAGES; ++stage) {
            barrier_init(shared_address(&room.keys_full[stage]), S::CODES ? GROUP : 1);
            barrier_init(shared_address(&room.values_full[stage]), S::CODES ? GROUP : 1);
            barrier_init(shared_address(&room.keys_empty[stage]), GROUPS * GROUP / 32);
            barrier_init(shared_address(&room.values_empty[stage]), GROUPS * GROUP / 32);
        }
        barriers_made();
    }
    if (blockIdx.x == 0 && blockIdx.y == 0) check_starts(args);
    const Tile tile = locate<HEIGHT>(args, blockIdx.x);
    if (tile.sequence == NONE) return;
    room.sight.look(args, tile, blockIdx.y);
    __syncthreads();
    const u32 high = room.sight.high, start = high > 0 ? room.sight.low / STEP * STEP : 0;
    if (threadIdx.x < GROUP) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if constexpr (S::CODES) decode_steps<S>(all, room, tile, start, high);
        else if (threadIdx.x == 0) fetch_steps<S>(all, room, tile, start, high);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        attend<S>(args, room, start, high);
    }
}

#define HOPPER(C, KEY, VALUE, STAGES, HELD)                                                                  \
    extern "C" __global__ void __launch_bounds__(BLOCK, 1)                                                   \
        attention_hopper##KEY##_##C##_bf16(const __grid_constant__ HopperArgs args) {                        \
        take_turn();                                                                                         \
        attention<Shape<C, KEY, VALUE, STAGES, HELD>>(args);                                                 \
    }
