// cache[slots[t]] = x[t] / scale, of keys and of values: those of one are the blocks of a row of the grid.
#include "e4m3.cuh"

// Rows and their cache. The twin of `rows::KvRows`.
struct KvRows { Rows x, cache; f32 scale; u32 padding; };

struct Args { KvRows parts[2]; Rows slots; Report report; };

// Whether a slot is in the cache; if not, that is said.
__device__ __forceinline__ bool is_inside(const Args& args, const KvRows& part, u32 slot) {
    if (slot < part.cache.rows) return true;
    complain(args.report, CACHE_SLOT, slot, part.cache.rows);
    return false;
}

template <typename X, typename Y> __device__ void kv_write(const Args& args) {
    const KvRows& part = args.parts[blockIdx.y];
    FOR_RUNS(part.x, t, n, count) {
        const u32 slot = at<u32>(args.slots, t);
        if (is_inside(args, part, slot)) write(row<Y>(part.cache, slot) + n, read(row<X>(part.x, t) + n, count), count);
    }
}

// What is not finite has no code: it stops the world here, instead of being a number later on.
template <typename X> __device__ void kv_write_codes(const Args& args) {
    const KvRows& part = args.parts[blockIdx.y];
    FOR_RUNS(part.x, t, n, count) {
        const u32 slot = at<u32>(args.slots, t);
        if (!is_inside(args, part, slot)) continue;
        Run run = read(row<X>(part.x, t) + n, count);
        bool whole = true;
#pragma unroll
        for (u32 j = 0; j < RUN; ++j) {
            whole &= finite(run.values[j]);
            run.values[j] /= part.scale;
        }
        if (whole) write(row<e4m3>(part.cache, slot) + n, run, count);
        else complain(args.report, NOT_FINITE, t, blockIdx.y);
    }
}
template <> __device__ void kv_write<f32, e4m3>(const Args& args) { kv_write_codes<f32>(args); }
template <> __device__ void kv_write<bf16, e4m3>(const Args& args) { kv_write_codes<bf16>(args); }

KERNEL(kv_write, Args, f32, f32)
KERNEL(kv_write, Args, f32, bf16)
KERNEL(kv_write, Args, bf16, bf16)
KERNEL(kv_write, Args, f32, e4m3)
KERNEL(kv_write, Args, bf16, e4m3)
