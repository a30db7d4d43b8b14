// x[m] = sigmoid(gate[m]) * x[m], in place
#include "common.cuh"

struct Args { Rows gate, x; };

template <typename X, typename Y> __device__ void gate_rows(const Args& args) {
    FOR_RUNS(args.x, m, n, count) {
        X* x = row<X>(args.x, m) + n;
        const f32 factor = sigmoid(at<f32>(args.gate, m));
        Run run = read(x, count);
        for (f32& value : run.values) value *= factor;
        write(x, run, count);
    }
}

KERNEL(gate_rows, Args, f32, f32)
KERNEL(gate_rows, Args, bf16, bf16)
