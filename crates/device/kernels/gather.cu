// out[m] = x[index[m]]
#include "common.cuh"

struct Args { Rows x, index, out; Report report; };

template <typename X, typename Y> __device__ void gather(const Args& args) {
    FOR_RUNS(args.out, m, n, count) {
        u32 source = at<u32>(args.index, m);
        if (source >= args.x.rows) {
            complain(args.report, SOURCE_ROW, source, args.x.rows);
            continue;
        }
        write(row<Y>(args.out, m) + n, read(row<X>(args.x, source) + n, count), count);
    }
}

KERNEL(gather, Args, f32, f32)
KERNEL(gather, Args, f32, bf16)
KERNEL(gather, Args, bf16, f32)
KERNEL(gather, Args, bf16, bf16)
