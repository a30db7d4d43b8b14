// out[t, c] = silu(sum over k of weight[c, k] * x[t - taps + 1 + k, c] + bias[c]), within each sequence; then its last taps - 1 rows
// of x become its state, and those before another token a state that is kept.
#include "carried.cuh"

// `kept` is a view [sequences, width] that only counts; a thread takes `each` tokens in a row, so that it reads its weights and most rows
// once.
struct Args { Rows x, states, out, kept; Carried carried; u64 weight, bias; u32 taps, each; };

// Most tokens that an output depends on; of fewer, those before count as zero.
constexpr u32 TAPS = 4;
// Rows that are on their way at a time.
constexpr u32 HELD = 4;

// The sequence of a token, and what is before its new tokens.
struct Before {
    u32 start, end, from, position;

    // Whether token t is one of a sequence's new tokens, and where the rows before them are: if not, nothing is written.
    __device__ __forceinline__ bool look(const Args& args, u32 t, u32 states) {
        const u32 sequence = sequence_of(args.carried, t);
        const Span span = span_of(args.carried, sequence);
        start = span.start, end = span.end, from = slot_of(args.carried, sequence, 0, states);
        if (t < start || t >= end || from == states) return false;
        position = at<u32>(args.carried.positions, start);
        return true;
    }

    // Columns n to n + count of the row so many tokens before token t.
    template <typename X> __device__ __forceinline__ Run read_before(const Args& args, u32 t, u32 back, u32 n, u32 count) const {
        const u32 within = t - start, kept = args.taps - 1;
        if (back > kept || back > position + within) return Run{};
        return read((back <= within ? row<X>(args.x, t - back) : row<X>(args.states, (from + 1) * kept - (back - within))) + n, count);
    }
};

template <typename X, typename Y> __device__ void short_conv(const Args& args) {
    const u32 taps = args.taps, states = args.states.rows / (taps - 1), runs = (args.out.width + RUN - 1) / RUN;
    const u32 index = blockIdx.x * THREADS + threadIdx.x, tokens = args.out.rows;
    const u32 n = index % runs * RUN, count = min(args.out.width - n, RUN), first = index / runs * args.each;
    if (first >= tokens) return;
    const f32* weight = reinterpret_cast<const f32*>(args.weight) + n * taps;
    f32 weights[RUN][TAPS] = {};
    if (taps == TAPS && count == RUN && args.weight % 16 == 0) {
#pragma unroll
        for (u32 j = 0; j < RUN; ++j) {
            const float4 all = reinterpret_cast<const float4*>(weight)[j];
            weights[j][0] = all.x, weights[j][1] = all.y, weights[j][2] = all.z, weights[j][3] = all.w;
        }
    } else {
#pragma unroll
        for (u32 j = 0; j < RUN; ++j)
#pragma unroll
            for (u32 k = 0; k < TAPS; ++k)
                if (j < count && k + taps >= TAPS) weights[j][k] = weight[j * taps + k + taps - TAPS];
    }
    Run bias = {};
    if (args.bias) bias = read(reinterpret_cast<const f32*>(args.bias) + n, count);

    const u32 last = min(first + args.each, tokens);
#pragma unroll 1
    for (u32 t = first; t < last;) {
        Before before;
        if (!before.look(args, t, states)) {
            ++t;
            continue;
        }
        Run rows[TAPS]; // of the last tokens
#pragma unroll
        for (u32 k = 0; k < TAPS - 1; ++k) rows[k + 1] = before.read_before<X>(args, t, TAPS - 1 - k, n, count);
        const u32 end = min(before.end, last);
#pragma unroll 1
        for (; t < end; t += HELD) {
            Run coming[HELD];
            read_rows(coming, row<X>(args.x, t) + n, args.x.stride, end - t, count);
#pragma unroll
            for (u32 i = 0; i < HELD; ++i) {
                if (t + i >= end) break;
#pragma unroll
                for (u32 k = 0; k < TAPS - 1; ++k) rows[k] = rows[k + 1];
                rows[TAPS - 1] = coming[i];
                Run sums = bias;
#pragma unroll
                for (u32 k = 0; k < TAPS; ++k)
#pragma unroll
                    for (u32 j = 0; j < RUN; ++j) sums.values[j] += weights[j][k] * rows[k].values[j];
#pragma unroll
                for (f32& value : sums.values) value = silu(value);
                write(row<Y>(args.out, t + i) + n, sums, count);
            }
        }
        t = end;
    }
}

template <typename X, typename Y> __device__ void keep_rows(const Args& args) {
    const u32 kept = args.taps - 1, states = args.states.rows / kept;
    FOR_RUNS(args.kept, sequence, n, count) {
        const Span span = span_of(args.carried, sequence);
        if (span.start == span.end) continue;
        const u32 from = slot_of(args.carried, sequence, 0, states), to = slot_of(args.carried, sequence, 1, states);
        if (from == states || to == states) continue;
        const u32 before = at<u32>(args.carried.positions, span.start);
        // Rows move towards the front: each is read before it is written.
        const auto keep = [&](u32 slot, u32 end) {
            const u32 tokens = end - span.start;
            for (u32 i = 0; i < kept; ++i) {
                const u32 back = kept - i;
                Run row_of = {};
                if (back <= tokens) row_of = read(row<X>(args.x, end - back) + n, count);
                else if (back <= before + tokens) row_of = read(row<X>(args.states, from * kept + i + tokens) + n, count);
                write(row<X>(args.states, slot * kept + i) + n, row_of, count);
            }
        };
        const Kept other = kept_of(args.carried, sequence, span, states);
        if (other.end != 0) keep(other.slot, other.end);
        keep(to, span.end);
    }
}

#define SHORT_CONV(X, Y)                                                                                     \
    extern "C" __global__ void __launch_bounds__(THREADS, 2)                                                 \
        short_conv_##X##_##Y(const __grid_constant__ Args args) {                                            \
        take_turn();                                                                                         \
        short_conv<X, Y>(args);                                                                              \
    }

SHORT_CONV(f32, f32)
SHORT_CONV(bf16, f32)
SHORT_CONV(bf16, bf16)
KERNEL(keep_rows, Args, f32, f32)
KERNEL(keep_rows, Args, bf16, f32)
KERNEL(keep_rows, Args, bf16, bf16)
