// x[index[n, j] - first] = weights[n, j] * x[index[n, j] - first], in place; what lies outside of x is left out.
#include "common.cuh"

struct Args { Rows x, index, weights, terms; u32 first, padding; };

template <typename X, typename Y> __device__ void scale_terms(const Args& args) {
    const u32 width = args.index.width;
    FOR_RUNS(args.terms, term, n, count) {
        // NONE, and what comes before the first, are far beyond the last.
        const u32 m = row<u32>(args.index, term / width)[term % width] - args.first;
        if (m >= args.x.rows) continue;
        const f32 factor = row<f32>(args.weights, term / width)[term % width];
        X* x = row<X>(args.x, m) + n;
        Run run = read(x, count);
        for (f32& value : run.values) value *= factor;
        write(x, run, count);
    }
}

KERNEL(scale_terms, Args, f32, f32)
KERNEL(scale_terms, Args, bf16, bf16)
