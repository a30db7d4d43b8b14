// out[m] = round(sum over j of weights[m, j] * x[index[m, j]] + addend[m]), from left to right in float32, up to the
// first index that is none. A lane folds some runs of columns of one row.
#include "common.cuh"

struct Args { Rows x, index, weights, addend, out; Report report; u32 weighted, added; };

template <typename X, typename Y> __device__ void reduce(const Args& args) {
    FOR_STRETCHES(args.out, m, n) {
        Run total[RUNS] = {};
        const auto add = [&](const X* from, f32 weight) {
            Run x[RUNS];
            read_runs(x, from, n, args.out.width);
#pragma unroll
            for (u32 i = 0; i < RUNS * RUN; ++i) total[i / RUN].values[i % RUN] += weight * x[i / RUN].values[i % RUN];
        };
        const u32* index = row<u32>(args.index, m);
        for (u32 term = 0; term < args.index.width; ++term) {
            const u32 source = index[term];
            if (source == ~0u) break;
            if (source >= args.x.rows) {
                complain(args.report, SOURCE_ROW, source, args.x.rows);
                continue;
            }
            add(row<X>(args.x, source), args.weighted ? row<f32>(args.weights, m)[term] : 1.0f);
        }
        if (args.added) add(row<X>(args.addend, m), 1.0f);
        write_runs(row<Y>(args.out, m), total, n, args.out.width);
    }
}

KERNEL(reduce, Args, f32, f32)
KERNEL(reduce, Args, f32, bf16)
KERNEL(reduce, Args, bf16, f32)
KERNEL(reduce, Args, bf16, bf16)
