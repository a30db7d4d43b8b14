// out[t] = table[ids[t]], the table in the checkpoint's own format
#include "common.cuh"

struct Args { Rows ids, table, out; Report report; };

template <typename X, typename Y> __device__ void embed(const Args& args) {
    FOR_RUNS(args.out, t, n, count) {
        u32 id = at<u32>(args.ids, t);
        if (id >= args.table.rows) {
            complain(args.report, TOKEN_ID, id, args.table.rows);
            continue;
        }
        write(row<Y>(args.out, t) + n, read(row<X>(args.table, id) + n, count), count);
    }
}

KERNEL(embed, Args, f32, f32)
KERNEL(embed, Args, f32, bf16)
KERNEL(embed, Args, bf16, f32)
KERNEL(embed, Args, bf16, bf16)
KERNEL(embed, Args, f16, f32)
KERNEL(embed, Args, f16, bf16)
