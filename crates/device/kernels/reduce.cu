// out[m] = round(sum over starts[m] <= i < starts[m + 1] of weights[i] * x[index[i]] + addend[m]), from left to
// right in float32. A thread folds a run of columns of one row.
#include "common.cuh"

struct Args { Rows x, starts, index, weights, addend, out; Report report; u32 weighted, added; };

template <typename X, typename Y> __device__ void reduce(const Args& args) {
    FOR_RUNS(args.out, m, n, count) {
        const u32 first = at<u32>(args.starts, m), end = at<u32>(args.starts, m + 1);
        const u32 limit = args.index.rows + 1;
        if (first >= limit || end >= limit) {
            complain(args.report, TERM, first >= limit ? first : end, limit);
            continue;
        }
        if (end < first) {
            complain(args.report, TERMS_DESCEND, end, first);
            continue;
        }
        Run total = {};
        for (u32 term = first; term < end; ++term) {
            const u32 source = at<u32>(args.index, term);
            if (source >= args.x.rows) {
                complain(args.report, SOURCE_ROW, source, args.x.rows);
                continue;
            }
            const Run x = read(row<X>(args.x, source) + n, count);
            const f32 weight = args.weighted ? at<f32>(args.weights, term) : 1.0f;
#pragma unroll
            for (u32 j = 0; j < RUN; ++j) total.values[j] += weight * x.values[j];
        }
        if (args.added) {
            const Run addend = read(row<X>(args.addend, m) + n, count);
#pragma unroll
            for (u32 j = 0; j < RUN; ++j) total.values[j] += addend.values[j];
        }
        write(row<Y>(args.out, m) + n, total, count);
    }
}

KERNEL(reduce, Args, f32, f32)
KERNEL(reduce, Args, f32, bf16)
KERNEL(reduce, Args, bf16, f32)
KERNEL(reduce, Args, bf16, bf16)
