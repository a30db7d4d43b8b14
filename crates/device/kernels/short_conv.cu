// out[t, c] = silu(sum over k of weight[c, k] * x[t - taps + 1 + k, c] + bias[c]), within each sequence; then its last taps - 1 rows
// of x become its state, and those before another token a state that is kept.
#include "carried.cuh"

// `kept` is a view [sequences, width] that only counts.
struct Args { Rows x, states, out, kept; Carried carried; u64 weight, bias; u32 taps, padding; };

template <typename X, typename Y> __device__ void short_conv(const Args& args) {
    const f32* weight = reinterpret_cast<const f32*>(args.weight);
    const u32 taps = args.taps, states = args.states.rows / (taps - 1);
    FOR_RUNS(args.out, t, n, count) {
        const u32 sequence = sequence_of(args.carried, t);
        const Span span = span_of(args.carried, sequence);
        const u32 from = slot_of(args.carried, sequence, 0, states), position = at<u32>(args.carried.positions, t);
        if (t < span.start || t >= span.end || from == states) continue;
        Run sums = {};
        if (args.bias) sums = read(reinterpret_cast<const f32*>(args.bias) + n, count);
        for (u32 k = 0; k < taps; ++k) {
            const u32 back = taps - 1 - k, within = t - span.start;
            if (back > position) continue;
            const X* row_of = back <= within ? row<X>(args.x, t - back)
                                             : row<X>(args.states, (from + 1) * (taps - 1) - (back - within));
            const Run input = read(row_of + n, count);
#pragma unroll
            for (u32 j = 0; j < RUN; ++j)
                if (j < count) sums.values[j] += weight[(n + j) * taps + k] * input.values[j];
        }
        for (f32& value : sums.values) value = silu(value);
        write(row<Y>(args.out, t) + n, sums, count);
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

KERNEL(short_conv, Args, f32, f32)
KERNEL(short_conv, Args, bf16, f32)
KERNEL(short_conv, Args, bf16, bf16)
KERNEL(keep_rows, Args, f32, f32)
KERNEL(keep_rows, Args, bf16, f32)
KERNEL(keep_rows, Args, bf16, bf16)
