// States that go on token by token, by the gated delta rule or that of state spaces: a block has COLUMNS columns of the state of one value head of one sequence in registers, and lets
// token after token pass. Each column is shared by PARTS neighbouring lanes; lane `part` has the rows whose number, in
// fours, is `part` modulo PARTS, so that neighbours read neighbouring quads of a key. Worked example: of 32 rows, part 1
// has 4 to 7 and 20 to 23.
#include "carried.cuh"

struct Args {
    Rows x, gates, states, out;
    Carried carried;
    u64 decay, bias, skip;
    u32 key_heads, value_heads, key_width, value_width;
    f32 floor;
    u32 padding;
};

constexpr u32 STATE_THREADS = 128, PARTS = 4, COLUMNS = STATE_THREADS / PARTS;
// Tokens whose keys, queries and values are made ready at a time.
constexpr u32 TOKENS = 16;
constexpr f32 EPSILON = 1e-6f;

__device__ __forceinline__ f32 softplus(f32 x) { return x > 20.0f ? x : log1pf(expf(x)); }

// The sum over the lanes of a column; every one gets it.
__device__ __forceinline__ f32 column_sum(f32 value) {
    value += __shfl_xor_sync(~0u, value, 1);
    return value + __shfl_xor_sync(~0u, value, 2);
}

// A row of `width` numbers over the root of its squares and `divisor`, filled up with zeros to KEYS; by a warp.
template <u32 KEYS, typename X> __device__ __forceinline__ void normed(f32* out, const X* x, u32 width, f32 divisor) {
    f32 values[KEYS / 32], squares = 0.0f;
#pragma unroll
    for (u32 i = 0; i < KEYS / 32; ++i) {
        const u32 n = i * 32 + threadIdx.x % 32;
        values[i] = n < width ? wide(x[n]) : 0.0f;
        squares += values[i] * values[i];
    }
    const f32 factor = 1.0f / (sqrtf(warp_sum(squares) + EPSILON) * divisor);
#pragma unroll
    for (u32 i = 0; i < KEYS / 32; ++i) out[i * 32 + threadIdx.x % 32] = values[i] * factor;
}

// The same as it is.
template <u32 KEYS, typename X> __device__ __forceinline__ void widened(f32* out, const X* x, u32 width) {
#pragma unroll
    for (u32 i = 0; i < KEYS / 32; ++i) {
        const u32 n = i * 32 + threadIdx.x % 32;
        out[n] = n < width ? wide(x[n]) : 0.0f;
    }
}

template <bool DELTA, u32 KEYS, typename X> __device__ void recurrence(const Args& args) {
    constexpr u32 QUADS = KEYS / (4 * PARTS);
    __shared__ __align__(16) f32 keys[TOKENS][KEYS], queries[TOKENS][KEYS];
    __shared__ f32 values[TOKENS][COLUMNS], decays[TOKENS], betas[TOKENS];
    const u32 heads = args.value_heads, width = args.value_width;
    const u32 tiles = (width + COLUMNS - 1) / COLUMNS, first_column = blockIdx.x % tiles * COLUMNS;
    const u32 head = blockIdx.x / tiles % heads, sequence = blockIdx.x / tiles / heads;
    const u32 key_head = head / (heads / args.key_heads), slots = args.states.rows / heads;

    const Span span = span_of(args.carried, sequence);
    if (span.start == span.end) return;
    const u32 from = slot_of(args.carried, sequence, 0, slots), to = slot_of(args.carried, sequence, 1, slots);
    if (from == slots || to == slots) return;

    const Kept kept = kept_of(args.carried, sequence, span, slots);

    const u32 thread = threadIdx.x, warp = thread / 32, part = thread % PARTS, own = thread / PARTS;
    const u32 column = first_column + own;
    const bool begins = at<u32>(args.carried.positions, span.start) == 0;
    f32 state[QUADS][4];
    const f32* before = row<f32>(args.states, from * heads + head);
#pragma unroll
    for (u32 i = 0; i < QUADS; ++i)
#pragma unroll
        for (u32 j = 0; j < 4; ++j) {
            const u32 n = (i * PARTS + part) * 4 + j;
            state[i][j] = begins || n >= args.key_width || column >= width ? 0.0f : before[n * width + column];
        }

    const auto leave = [&](u32 slot) {
        f32* after = row<f32>(args.states, slot * heads + head);
#pragma unroll
        for (u32 i = 0; i < QUADS; ++i)
#pragma unroll
            for (u32 j = 0; j < 4; ++j) {
                const u32 n = (i * PARTS + part) * 4 + j;
                if (n < args.key_width && column < width) after[n * width + column] = state[i][j];
            }
    };

    const f32 rate = expf(reinterpret_cast<const f32*>(args.decay)[head]);
    const f32 bias = reinterpret_cast<const f32*>(args.bias)[head];
    const f32 skip = DELTA ? 0.0f : reinterpret_cast<const f32*>(args.skip)[head];
    const f32 root = sqrtf(f32(args.key_width));
    for (u32 base = span.start; base < span.end; base += TOKENS) {
        const u32 count = min(TOKENS, span.end - base);
        __syncthreads();
        for (u32 t = warp; t < count; t += STATE_THREADS / 32) {
            const X* query = row<X>(args.x, base + t) + key_head * args.key_width;
            const X* key = query + args.key_heads * args.key_width;
            if constexpr (DELTA) {
                normed<KEYS>(queries[t], query, args.key_width, root);
                normed<KEYS>(keys[t], key, args.key_width, 1.0f);
            } else {
                widened<KEYS>(queries[t], query, args.key_width);
                widened<KEYS>(keys[t], key, args.key_width);
            }
        }
        for (u32 i = thread; i < count * COLUMNS; i += STATE_THREADS) {
            const u32 t = i / COLUMNS, n = first_column + i % COLUMNS;
            const X* value = row<X>(args.x, base + t) + 2 * args.key_heads * args.key_width + head * width;
            values[t][i % COLUMNS] = n < width ? wide(value[n]) : 0.0f;
        }
        if (thread < count) {
            const f32* gates = row<f32>(args.gates, base + thread);
            const f32 step = softplus(gates[DELTA ? heads + head : head] + bias);
            const f32 floored = DELTA ? step : fmaxf(step, args.floor);
            betas[thread] = DELTA ? sigmoid(gates[head]) : floored;
            decays[thread] = expf(-rate * floored);
        }
        __syncthreads();
        for (u32 t = 0; t < count; ++t) {
            const float4* key = reinterpret_cast<const float4*>(keys[t]);
            const float4* query = reinterpret_cast<const float4*>(queries[t]);
            const f32 decay = decays[t];
            f32 held[4] = {}, seen[4] = {};
#pragma unroll
            for (u32 i = 0; i < QUADS; ++i) {
                const float4 quad = key[i * PARTS + part];
                const f32 of[4] = {quad.x, quad.y, quad.z, quad.w};
#pragma unroll
                for (u32 j = 0; j < 4; ++j) {
                    state[i][j] *= decay;
                    if constexpr (DELTA) held[j] += of[j] * state[i][j];
                }
            }
            const f32 total = DELTA ? column_sum((held[0] + held[1]) + (held[2] + held[3])) : 0.0f;
            const f32 delta = (values[t][own] - total) * betas[t];
#pragma unroll
            for (u32 i = 0; i < QUADS; ++i) {
                const float4 quad = key[i * PARTS + part], looking = query[i * PARTS + part];
                const f32 of[4] = {quad.x, quad.y, quad.z, quad.w};
                const f32 by[4] = {looking.x, looking.y, looking.z, looking.w};
#pragma unroll
                for (u32 j = 0; j < 4; ++j) {
                    state[i][j] += of[j] * delta;
                    seen[j] += by[j] * state[i][j];
                }
            }
            const f32 result = column_sum((seen[0] + seen[1]) + (seen[2] + seen[3]));
            if (part == 0 && column < width)
                row<f32>(args.out, base + t)[head * width + column] = DELTA ? result : result + skip * values[t][own];
            if (base + t + 1 == kept.end) leave(kept.slot);
        }
    }

    leave(to);
}

#define RECURRENCE(NAME, DELTA, KEYS, X)                                                                     \
    extern "C" __global__ void __launch_bounds__(STATE_THREADS)                                              \
        NAME##KEYS##_##X##_f32(const __grid_constant__ Args args) {                                          \
        take_turn();                                                                                         \
        recurrence<DELTA, KEYS, X>(args);                                                                    \
    }

RECURRENCE(delta, true, 128, f32)
RECURRENCE(delta, true, 128, bf16)
RECURRENCE(delta, true, 256, f32)
RECURRENCE(delta, true, 256, bf16)
RECURRENCE(space, false, 128, f32)
RECURRENCE(space, false, 128, bf16)
RECURRENCE(space, false, 256, f32)
RECURRENCE(space, false, 256, bf16)
