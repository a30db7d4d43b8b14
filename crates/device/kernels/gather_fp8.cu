// out[m] = x[index[m]] where the index names a row, or x[m] without an index, to or from rows of e4m3 codes: four codes a word, the first in its lowest byte, then a float32
// scale for every GROUP of columns. What is encoded is rounded to bfloat16 first. A half warp has a group at a time.
#include "scaled.cuh"

struct Args {
    Rows x, index, out;
    Report report;
    u32 powers, padding; // whether scales are powers of two
};

__device__ __forceinline__ Run decode(const Codes& codes, f32 scale) {
    Run run;
#pragma unroll
    for (u32 i = 0; i < RUN; ++i) run.values[i] = decode(codes.words[i / 4] >> i % 4 * 8 & 0xffu) * scale;
    return run;
}

template <typename T> __device__ __forceinline__ void read_rounded(Run (&runs)[RUNS], const T* row, u32 n, u32 width) {
    read_runs(runs, row, n, width);
#pragma unroll
    for (u32 i = 0; i < RUNS * RUN; ++i) runs[i / RUN].values[i % RUN] = wide(narrow<bf16>(runs[i / RUN].values[i % RUN]));
}

// The row that a row of the output comes from; all threads of a warp have the same.
__device__ __forceinline__ bool source_of(const Args& args, u32 m, u32& source) {
    source = args.index.start ? at<u32>(args.index, m) : m;
    if (source < args.x.rows) return true;
    if (source == ~0u) return false;
    complain(args.report, SOURCE_ROW, source, args.x.rows);
    return false;
}

template <typename X, typename> __device__ void to_fp8(const Args& args) {
    const u32 width = args.x.width;
    const Rows numbers = {0, 0, args.out.rows, width};
    FOR_STRETCHES(numbers, m, n) {
        u32 source;
        if (!source_of(args, m, source)) continue;
        Run runs[RUNS];
        read_rounded(runs, row<X>(args.x, source), n, width);
        u32* to = row<u32>(args.out, m);
#pragma unroll
        for (u32 i = 0; i < RUNS; ++i) {
            const f32 scale = scale_of(runs[i], args.powers);
            const Codes codes = encode(runs[i], scale);
            const u32 column = n + i * STRIDE;
            if (column < width) store(to, column, width, codes, scale);
        }
    }
}

template <typename Y, typename> __device__ void from_fp8(const Args& args) {
    const u32 width = args.out.width, words = (width + 3) / 4;
    FOR_STRETCHES(args.out, m, n) {
        u32 source;
        if (!source_of(args, m, source)) continue;
        const u32* from = row<u32>(args.x, source);
        Codes codes[RUNS] = {};
        f32 scales[RUNS] = {};
#pragma unroll
        for (u32 i = 0; i < RUNS; ++i) {
            const u32 column = n + i * STRIDE;
            if (column >= width) continue;
            const u32* place = from + column / 4;
            if (width - column > 4 && reinterpret_cast<u64>(place) % 8 == 0) {
                const uint2 both = *reinterpret_cast<const uint2*>(place);
                codes[i].words[0] = both.x;
                codes[i].words[1] = both.y;
            } else {
                codes[i].words[0] = place[0];
                if (width - column > 4) codes[i].words[1] = place[1];
            }
            scales[i] = __uint_as_float(from[words + column / GROUP]);
        }
        Run runs[RUNS];
#pragma unroll
        for (u32 i = 0; i < RUNS; ++i) runs[i] = decode(codes[i], scales[i]);
        write_runs(row<Y>(args.out, m), runs, n, width);
    }
}

template <typename X, typename> __device__ void through_fp8(const Args& args) {
    FOR_STRETCHES(args.out, m, n) {
        u32 source;
        if (!source_of(args, m, source)) continue;
        Run runs[RUNS];
        read_rounded(runs, row<X>(args.x, source), n, args.out.width);
#pragma unroll
        for (u32 i = 0; i < RUNS; ++i) {
            const f32 scale = scale_of(runs[i], args.powers);
            runs[i] = decode(encode(runs[i], scale), scale);
        }
        write_runs(row<X>(args.out, m), runs, n, args.out.width);
    }
}

KERNEL(to_fp8, Args, f32, f32)
KERNEL(to_fp8, Args, bf16, bf16)
KERNEL(from_fp8, Args, f32, f32)
KERNEL(from_fp8, Args, bf16, bf16)
KERNEL(through_fp8, Args, f32, f32)
KERNEL(through_fp8, Args, bf16, bf16)
