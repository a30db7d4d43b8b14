// cache[slots[t]] = x[t]
#include "common.cuh"

struct Args { Rows x, slots, cache; Report report; };

template <typename X, typename Y> __device__ void kv_write(const Args& args) {
    FOR_RUNS(args.x, t, n, count) {
        u32 slot = at<u32>(args.slots, t);
        if (slot >= args.cache.rows) {
            complain(args.report, CACHE_SLOT, slot, args.cache.rows);
            continue;
        }
        write(row<Y>(args.cache, slot) + n, read(row<X>(args.x, t) + n, count), count);
    }
}

KERNEL(kv_write, Args, f32, f32)
KERNEL(kv_write, Args, f32, bf16)
KERNEL(kv_write, Args, bf16, bf16)
