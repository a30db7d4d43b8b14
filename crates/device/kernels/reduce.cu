// out[m] = round(sum over starts[m] <= i < starts[m + 1] of weights[i] * x[index[i]] + addend[m]), from left to
// right in float32. A lane folds some runs of columns of one row.
#include "common.cuh"

struct Args { Rows x, starts, index, weights, addend, out; Report report; u32 weighted, added; };

template <typename X, typename Y> __device__ void reduce(const Args& args) {
    FOR_STRETCHES(args.out, m, n) {
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
        Run total[RUNS] = {};
        const auto add = [&](const X* from, f32 weight) {
            Run x[RUNS];
            read_runs(x, from, n, args.out.width);
#pragma unroll
            for (u32 i = 0; i < RUNS * RUN; ++i) total[i / RUN].values[i % RUN] += weight * x[i / RUN].values[i % RUN];
        };
        for (u32 term = first; term < end; ++term) {
            const u32 source = at<u32>(args.index, term);
            if (source >= args.x.rows) {
                complain(args.report, SOURCE_ROW, source, args.x.rows);
                continue;
            }
            add(row<X>(args.x, source), args.weighted ? at<f32>(args.weights, term) : 1.0f);
        }
        if (args.added) add(row<X>(args.addend, m), 1.0f);
        write_runs(row<Y>(args.out, m), total, n, args.out.width);
    }
}

KERNEL(reduce, Args, f32, f32)
KERNEL(reduce, Args, f32, bf16)
KERNEL(reduce, Args, bf16, f32)
KERNEL(reduce, Args, bf16, bf16)
