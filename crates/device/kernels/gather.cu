// out[m] = x[index[m]], where the index names a row
#include "e4m3.cuh"

struct Args { Rows x, index, out; Report report; };

template <typename X, typename Y> __device__ void gather(const Args& args) {
    FOR_STRETCHES(args.out, m, n) {
        u32 source = at<u32>(args.index, m);
        if (source == ~0u) continue;
        if (source >= args.x.rows) {
            complain(args.report, SOURCE_ROW, source, args.x.rows);
            continue;
        }
        Run runs[RUNS];
        read_runs(runs, row<X>(args.x, source), n, args.out.width);
        write_runs(row<Y>(args.out, m), runs, n, args.out.width);
    }
}

KERNEL(gather, Args, f32, f32)
KERNEL(gather, Args, f32, bf16)
KERNEL(gather, Args, bf16, f32)
KERNEL(gather, Args, bf16, bf16)
KERNEL(gather, Args, e4m3, f32)
KERNEL(gather, Args, e4m3, bf16)
