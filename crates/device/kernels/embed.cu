// out[t] = table[ids[t]], the table in the checkpoint's own format
#include "common.cuh"

struct Args { Rows ids, table, out; Report report; };

template <typename X, typename Y> __device__ void embed(const Args& args) {
    FOR_ELEMENTS(args.out, t, n) {
        u32 id = at<u32>(args.ids, t);
        if (id >= args.table.rows) {
            complain(args.report, TOKEN_ID, id, args.table.rows);
            continue;
        }
        row<Y>(args.out, t)[n] = narrow<Y>(wide(row<X>(args.table, id)[n]));
    }
}

KERNEL(embed, Args, f32, f32)
KERNEL(embed, Args, f32, bf16)
KERNEL(embed, Args, bf16, f32)
KERNEL(embed, Args, bf16, bf16)
KERNEL(embed, Args, f16, f32)
KERNEL(embed, Args, f16, bf16)
