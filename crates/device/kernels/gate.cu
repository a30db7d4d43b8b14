// x[m] = sigmoid(gate[m]) * x[m], in place
#include "common.cuh"

struct Args { Rows gate, x; };

template <typename X, typename Y> __device__ void gate(const Args& args) {
    FOR_ELEMENTS(args.x, m, n) {
        X* x = row<X>(args.x, m) + n;
        *x = narrow<X>(wide(*x) * sigmoid(at<f32>(args.gate, m)));
    }
}

KERNEL(gate, Args, f32, f32)
KERNEL(gate, Args, bf16, bf16)
