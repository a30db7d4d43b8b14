// States that go on token by token, by the gated delta rule or that of state spaces. A block has columns of the state of one
// value head of one sequence in registers, and lets token after token pass: PARTS neighbouring lanes share EACH columns, and
// lane `part` has 16 of their rows, those whose number, in fours, is `part` modulo PARTS, so that neighbours read
// neighbouring quads of a key. Worked example: of 128 rows, part 1 has 4 to 7, 36 to 39, 68 to 71 and 100 to 103.
//
// The more columns a lane has, the seldomer keys are read; the fewer, the more blocks there are. No bit depends on it.
#include "carried.cuh"
#include "tensor.cuh"

struct Args {
    Rows x, gates, states, out;
    Carried carried;
    u64 decay, bias, skip;
    u32 key_heads, value_heads, key_width, value_width;
    f32 floor;
    u32 padding;
};

constexpr u32 STATE_THREADS = 128, QUADS = 4;
constexpr u32 MANY = 4, FEW = 2; // columns of a lane; `launch/recurrent.rs` repeats them
constexpr f32 EPSILON = 1e-6f;

__device__ __forceinline__ f32 softplus(f32 x) { return x > 20.0f ? x : log1pf(expf(x)); }

// Four neighbours of a row as they are stored.
template <typename X> struct alignas(4 * sizeof(X)) Quad { X of[4]; };

// The sum over PARTS neighbouring lanes; every one gets it.
template <u32 PARTS> __device__ __forceinline__ f32 parts_sum(f32 value) {
#pragma unroll
    for (u32 step = PARTS / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

// The same of COUNT values at once, and in the same order: lane `part` gets that of value `part / (PARTS / COUNT)`.
template <u32 PARTS, u32 COUNT> __device__ __forceinline__ f32 spread_sums(f32 (&values)[COUNT], u32 part) {
    u32 left = COUNT;
#pragma unroll
    for (u32 step = PARTS / 2; step > 0; step /= 2) {
        if (left == 1) {
            values[0] += __shfl_xor_sync(~0u, values[0], step);
            continue;
        }
        // Half of the lanes go on with half of the values.
        left /= 2;
        const bool upper = part & step;
#pragma unroll
        for (u32 i = 0; i < COUNT / 2; ++i) {
            if (i >= left) continue;
            const f32 given = upper ? values[i] : values[i + left];
            values[i] = (upper ? values[i + left] : values[i]) + __shfl_xor_sync(~0u, given, step);
        }
    }
    return values[0];
}

// What a lane reads of a token: its rows of the key and the query, the value of one of its columns, and what weighs it.
template <u32 PARTS> struct Token {
    f32 key[4 * QUADS], query[4 * QUADS], value;
    float4 gates;

    __device__ __forceinline__ void take(const f32* keys, const f32* queries, float4 gated, f32 of_column, u32 part) {
#pragma unroll
        for (u32 i = 0; i < QUADS; ++i) {
            const float4 k = reinterpret_cast<const float4*>(keys)[i * PARTS + part];
            const float4 q = reinterpret_cast<const float4*>(queries)[i * PARTS + part];
            key[4 * i] = k.x, key[4 * i + 1] = k.y, key[4 * i + 2] = k.z, key[4 * i + 3] = k.w;
            query[4 * i] = q.x, query[4 * i + 1] = q.y, query[4 * i + 2] = q.z, query[4 * i + 3] = q.w;
        }
        value = of_column, gates = gated;
    }
};

template <bool DELTA, u32 KEYS, u32 EACH, typename X> __device__ __forceinline__ void recurrence(const Args& args) {
    constexpr u32 PARTS = KEYS / (4 * QUADS), TOKENS = STATE_THREADS / PARTS, COLUMNS = TOKENS * EACH;
    // Quads of a token that a lane makes ready, and those of them that are of its values; not every lane may have one.
    constexpr u32 VALUES = (COLUMNS + 4 * PARTS - 1) / (4 * PARTS), PIECES = 2 * QUADS + VALUES;
    // Whether the next tokens are on their way while these pass.
    constexpr bool AHEAD = sizeof(X) == 2;
    // Where there are registers for it, a token is read while the one before passes.
    constexpr bool EARLY = EACH <= FEW;
    __shared__ __align__(16) f32 keys[TOKENS][KEYS], queries[TOKENS][KEYS], values[TOKENS][COLUMNS];
    __shared__ float4 gated[TOKENS]; // decay, beta, and what the query sees of the key
    __shared__ Quad<X> next[AHEAD ? PIECES : 1][STATE_THREADS];
    const u32 heads = args.value_heads, width = args.value_width, key_width = args.key_width;
    const u32 tiles = (width + COLUMNS - 1) / COLUMNS, first_column = blockIdx.x % tiles * COLUMNS;
    const u32 head = blockIdx.x / tiles % heads, sequence = blockIdx.x / tiles / heads;
    const u32 key_head = head / (heads / args.key_heads), slots = args.states.rows / heads;

    const Span span = span_of(args.carried, sequence);
    if (span.start == span.end) return;
    const u32 from = slot_of(args.carried, sequence, 0, slots), to = slot_of(args.carried, sequence, 1, slots);
    if (from == slots || to == slots) return;
    const Kept kept = kept_of(args.carried, sequence, span, slots);

    const u32 thread = threadIdx.x, part = thread % PARTS, own = thread / PARTS, column = first_column + own * EACH;
    const bool begins = at<u32>(args.carried.positions, span.start) == 0;
    f32 state[4 * QUADS][EACH];
    // The lane's part of a state in memory: a function of where each number of it is, and of the number.
    const auto for_state = [&](u32 slot, auto each) {
        // Or the compiler would keep all addresses in registers while tokens pass.
        u32 pitch = width, first = part * 4;
        asm volatile("" : "+r"(pitch), "+r"(first));
        f32* start = row<f32>(args.states, slot * heads + head) + column;
#pragma unroll
        for (u32 i = 0; i < 4 * QUADS; ++i) {
            const u32 n = i / 4 * PARTS * 4 + first + i % 4;
#pragma unroll
            for (u32 e = 0; e < EACH; ++e)
                if (n < key_width && column + e < pitch) each(start[n * pitch + e], state[i][e]);
        }
    };
#pragma unroll
    for (u32 i = 0; i < 4 * QUADS * EACH; ++i) state[i / EACH][i % EACH] = 0.0f;
    if (!begins) for_state(from, [](f32 stored, f32& number) { number = stored; });

    // A lane makes the quads of one token ready that it reads of all: of its query, its key and its values.
    const X* queries_of = row<X>(args.x, 0) + key_head * key_width;
    const X* values_of = row<X>(args.x, 0) + 2 * args.key_heads * key_width + head * width + first_column;
    const u32 to_key = args.key_heads * key_width, columns = min(width - first_column, COLUMNS);
    struct Place { const X* from; u32 left; };
    const auto place = [&](u32 piece, u32 t) -> Place {
        const u64 start = u64(t) * args.x.stride;
        if (piece >= 2 * QUADS) {
            const u32 n = ((piece - 2 * QUADS) * PARTS + part) * 4;
            return {values_of + start + n, n < columns ? columns - n : 0};
        }
        const u32 n = (piece % QUADS * PARTS + part) * 4;
        return {queries_of + (piece < QUADS ? 0 : to_key) + start + n, n < key_width ? key_width - n : 0};
    };
    const u64 starts = reinterpret_cast<u64>(queries_of) | reinterpret_cast<u64>(values_of);
    const bool on_quads = (starts | (args.x.stride | to_key) * sizeof(X)) % sizeof(Quad<X>) == 0;
    const bool ahead = AHEAD && on_quads && key_width % 4 == 0 && columns % 4 == 0;
    f32 gate = 0.0f, other = 0.0f;
    const auto bring = [&](u32 t) {
        if (t < span.end) {
            const f32* gates = row<f32>(args.gates, t) + head;
            gate = gates[0], other = DELTA ? gates[heads] : 0.0f;
            if (ahead) {
#pragma unroll
                for (u32 piece = 0; piece < PIECES; ++piece) {
                    const Place at = place(piece, t);
                    if (at.left > 0) copy_few_async<sizeof(Quad<X>)>(shared_address(&next[AHEAD ? piece : 0][thread]), at.from);
                }
            }
        }
        copies_commit();
    };
    const auto read_quad = [&](f32 (&of)[4], u32 piece, u32 t) {
        const Place at = place(piece, t);
        if (ahead) {
            const Quad<X> quad = next[AHEAD ? piece : 0][thread];
#pragma unroll
            for (u32 j = 0; j < 4; ++j) of[j] = at.left > 0 ? wide(quad.of[j]) : 0.0f;
        } else {
#pragma unroll
            for (u32 j = 0; j < 4; ++j) of[j] = j < at.left ? wide(at.from[j]) : 0.0f;
        }
    };

    const f32 rate = expf(reinterpret_cast<const f32*>(args.decay)[head]);
    const f32 bias = reinterpret_cast<const f32*>(args.bias)[head];
    const f32 skip = DELTA ? 0.0f : reinterpret_cast<const f32*>(args.skip)[head];
    const f32 root = sqrtf(f32(key_width));
    const auto store_quad = [](f32* to, const f32 (&of)[4], f32 factor) {
        *reinterpret_cast<float4*>(to) = make_float4(of[0] * factor, of[1] * factor, of[2] * factor, of[3] * factor);
    };
    const auto prepare = [&](u32 t) {
        f32 query[QUADS][4], key[QUADS][4], squares = 0.0f, key_squares = 0.0f, both = 0.0f;
#pragma unroll
        for (u32 i = 0; i < QUADS; ++i) {
            read_quad(query[i], i, t);
            read_quad(key[i], QUADS + i, t);
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                squares += query[i][j] * query[i][j];
                key_squares += key[i][j] * key[i][j];
                both += query[i][j] * key[i][j];
            }
        }
        const f32 of_query = DELTA ? 1.0f / (sqrtf(parts_sum<PARTS>(squares) + EPSILON) * root) : 1.0f;
        const f32 of_key = DELTA ? 1.0f / sqrtf(parts_sum<PARTS>(key_squares) + EPSILON) : 1.0f;
        both = parts_sum<PARTS>(both) * of_query * of_key;
#pragma unroll
        for (u32 i = 0; i < QUADS; ++i) {
            store_quad(&queries[own][(i * PARTS + part) * 4], query[i], of_query);
            store_quad(&keys[own][(i * PARTS + part) * 4], key[i], of_key);
        }
#pragma unroll
        for (u32 i = 0; i < VALUES; ++i) {
            const u32 n = (i * PARTS + part) * 4;
            if (n >= COLUMNS) continue;
            f32 quad[4];
            read_quad(quad, 2 * QUADS + i, t);
            store_quad(&values[own][n], quad, 1.0f);
        }
        if (part == 0) {
            const f32 step = softplus((DELTA ? other : gate) + bias);
            const f32 floored = DELTA ? step : fmaxf(step, args.floor);
            gated[own] = make_float4(expf(-rate * floored), DELTA ? sigmoid(gate) : floored, both, 0.0f);
        }
    };

    // Of the sums over a column's lanes each lane gets one: with the delta rule lower lanes what keys see of the state, upper ones, and
    // all lanes without it, what queries see, of column `mine` of theirs.
    constexpr u32 SUMS = DELTA ? 2 * EACH : EACH, LANES = PARTS / SUMS;
    const u32 mine = part / LANES % EACH;
    const bool writes = part % LANES == 0 && part / LANES >= SUMS - EACH && column + mine < width;
    f32* out = row<f32>(args.out, span.start) + head * width + column + mine;
    u32 base = span.start;
    bring(base + own);
#pragma unroll 1
    for (u32 last = kept.end == 0; last < 2; ++last) {
        const u32 end = last ? span.end : kept.end;
#pragma unroll 1
        while (base < end) {
            const u32 count = min(TOKENS, end - base);
            copies_wait<0>();
            __syncthreads(); // the tokens before are done with
            prepare(min(base + own, span.end - 1));
            __syncthreads();
            base += count;
            bring(base + own);
            Token<PARTS> token;
            if constexpr (EARLY) token.take(keys[0], queries[0], gated[0], values[0][own * EACH + mine], part);
#pragma unroll 2
            for (u32 t = 0; t < count; ++t, out += args.out.stride) {
                Token<PARTS> coming;
                const u32 at = EARLY && t + 1 < count ? t + 1 : t;
                coming.take(keys[at], queries[at], gated[at], values[at][own * EACH + mine], part);
                if constexpr (!EARLY) token = coming;
                f32 sums[SUMS] = {};
#pragma unroll
                for (u32 i = 0; i < 4 * QUADS; ++i)
#pragma unroll
                    for (u32 e = 0; e < EACH; ++e) {
                        if constexpr (DELTA) sums[e] += token.key[i] * state[i][e];
                        sums[SUMS - EACH + e] += token.query[i] * state[i][e];
                    }
                const f32 decay = token.gates.x, beta = token.gates.y, look = token.gates.z, value = token.value;
                // What is seen of the state before the token; of what the token adds to it a query sees `look` times as much.
                const f32 seen = decay * spread_sums<PARTS, SUMS>(sums, part);
                f32 added = beta * (DELTA ? value - seen : value), deltas[EACH];
#pragma unroll
                for (u32 e = 0; e < EACH; ++e) deltas[e] = __shfl_sync(~0u, added, e * LANES, PARTS);
                if constexpr (DELTA) added = __shfl_sync(~0u, added, mine * LANES, PARTS);
#pragma unroll
                for (u32 i = 0; i < 4 * QUADS; ++i)
#pragma unroll
                    for (u32 e = 0; e < EACH; ++e) state[i][e] = state[i][e] * decay + token.key[i] * deltas[e];
                const f32 result = seen + look * added;
                if (writes) *out = DELTA ? result : result + skip * value;
                if constexpr (EARLY) token = coming;
            }
        }
        for_state(last ? to : kept.slot, [](f32& stored, f32 number) { stored = number; });
    }
}

// At least four blocks are to be on a multiprocessor.
#define RECURRENCE(NAME, DELTA, KEYS, X)                                                                     \
    extern "C" __global__ void __launch_bounds__(STATE_THREADS, 4)                                           \
        NAME##KEYS##_##X##_f32(const __grid_constant__ Args args) {                                          \
        take_turn();                                                                                         \
        recurrence<DELTA, KEYS, MANY, X>(args);                                                              \
    }                                                                                                        \
    extern "C" __global__ void __launch_bounds__(STATE_THREADS, 4)                                           \
        NAME##KEYS##_few_##X##_f32(const __grid_constant__ Args args) {                                      \
        take_turn();                                                                                         \
        recurrence<DELTA, KEYS, FEW, X>(args);                                                               \
    }

RECURRENCE(delta, true, 128, f32)
RECURRENCE(delta, true, 128, bf16)
RECURRENCE(delta, true, 256, f32)
RECURRENCE(delta, true, 256, bf16)
RECURRENCE(space, false, 128, f32)
RECURRENCE(space, false, 128, bf16)
RECURRENCE(space, false, 256, f32)
RECURRENCE(space, false, 256, bf16)
