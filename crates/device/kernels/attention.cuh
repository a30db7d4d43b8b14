// What attention kernels share: their arguments, and for those on the tensor cores which rows a block computes, what
// these see, and the softmax that is carried along.
//
// Keys are taken in steps of STEP positions that start at multiples of STEP, upwards. What a row computes depends on
// its position alone: steps that a row sees nothing of, taken for the sake of its neighbours, leave its numbers as
// they are.
//
// On the tensor cores each span of SPAN_KEYS positions, which start at multiples of SPAN_KEYS, has a softmax and sums of its own.
// Spans are put together upwards, by `Softmax::follow` and `blend`: so one token's spans may be summed up side by side.
#pragma once
#include "e4m3.cuh"
#include "tensor.cuh"

constexpr u32 STEP = 64;
constexpr u32 SPAN_KEYS = 4096; // `kernels.rs` repeats it
constexpr u32 NONE = ~0u;
constexpr u32 LINE = 8; // elements of a piece: 16 bytes of numbers, 8 of codes

// The twin of `launch::AttentionArgs`.
struct Args {
    Rows q, keys, values, starts, positions, blocks, out;
    Report report;
    u64 sinks; // a score of each head that belongs to no key; 0: none
    u32 block_size, heads, kv_heads;
    f32 scale;
    f32 value_scale; // of the sums
    u32 window;  // positions seen, itself included; 0: all
    u32 vectors; // every view of q, keys, values, out and each head in it starts on whole pieces
    u32 longest; // positions are below
    u32 stretch; // positions are cut into stretches of so many, of which a token sees its own; 0: they are not
    u32 padding;
    u64 scratch;       // WORDS words, zero between kernels, and room behind them
    u64 scratch_bytes; // of that room
};

constexpr u32 WORDS = 16384; // `kernels.rs` repeats it

// The first position that the token before position `end` sees.
__device__ __forceinline__ u32 first_seen(const Args& args, u32 end) {
    if (args.stretch) return (end - 1) / args.stretch * args.stretch;
    return args.window && end > args.window ? end - args.window : 0;
}

__device__ __forceinline__ f32 minus_infinity() { return __uint_as_float(0xff800000u); }

__device__ __forceinline__ f32 power_of_two(f32 x) {
    f32 result;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
    return result;
}

// Whether the sequences hold all tokens in order; what is wrong is said once. By a whole block.
__device__ __forceinline__ void check_starts(const Args& args) {
    const u32 tokens = args.positions.rows, sequences = args.starts.rows - 1;
    for (u32 b = threadIdx.x; b < sequences; b += blockDim.x) {
        const u32 start = at<u32>(args.starts, b), end = at<u32>(args.starts, b + 1);
        if ((b == 0 && start != 0) || end < start || end > tokens) complain(args.report, SPAN, b, start, end);
        else if (b + 1 == sequences && end != tokens) complain(args.report, TOKENS_HELD, end, tokens);
    }
    if (sequences == 0 && tokens != 0 && threadIdx.x == 0) complain(args.report, TOKENS_HELD, 0, tokens);
}

// Whether a token may stand at a position; if not, that is said.
__device__ __forceinline__ bool stands(const Args& args, u32 position) {
    const u32 block = position / args.block_size;
    if (block >= args.blocks.width) complain(args.report, CACHE_BLOCK, block, args.blocks.width);
    else if (position >= args.longest) complain(args.report, POSITION, position, args.longest);
    else return true;
    return false;
}

// Where the cached block of a position stands in memory, as the sequence says; NONE for positions not asked for.
__device__ __forceinline__ u32 block_of(const Args& args, u32 sequence, u32 position, bool wanted) {
    return wanted ? row<u32>(args.blocks, sequence)[position / args.block_size] : NONE;
}

// The row of the cache of a position in such a block; NONE if there is none.
__device__ __forceinline__ u32 slot_in(const Args& args, u32 block, u32 sequence, u32 position, bool wanted) {
    if (!wanted) return NONE;
    if (u64(block) * args.block_size + args.block_size > args.keys.rows) {
        complain(args.report, BLOCK_OUTSIDE, position / args.block_size, sequence);
        return NONE;
    }
    return block * args.block_size + position % args.block_size;
}

// The rows of a block. A row is a query: a token and one of the heads that share a key head. Rows of a sequence are
// counted token by token.
struct Tile {
    u32 sequence; // NONE: nothing is left for this block
    u32 token;    // the sequence's first
    u32 row;      // first row of the sequence that is of the tile
    u32 rows;     // rows of the sequence from there on
};

// Which tile of HEIGHT rows is the `index`-th, sequence after sequence; in each the last comes first, because it has
// the most to do. By whole warps.
template <u32 HEIGHT> __device__ __forceinline__ Tile locate(const Args& args, u32 index) {
    const u32 lane = threadIdx.x % 32, sequences = args.starts.rows - 1, tokens = args.positions.rows;
    const u32 group = args.heads / args.kv_heads;
    Tile tile = {NONE, 0, 0, 0};
    for (u32 base = 0; base < sequences; base += 32) {
        const u32 b = base + lane;
        const u32 start = b < sequences ? at<u32>(args.starts, b) : 0;
        const u32 end = b < sequences ? at<u32>(args.starts, b + 1) : 0;
        const u32 rows = start < end && end <= tokens ? (end - start) * group : 0;
        const u32 tiles = (rows + HEIGHT - 1) / HEIGHT;
        u32 reached = tiles; // tiles up to and including this lane's sequence
        for (u32 step = 1; step < 32; step *= 2) {
            const u32 before = __shfl_up_sync(~0u, reached, step);
            if (lane >= step) reached += before;
        }
        const u32 beyond = __ballot_sync(~0u, reached > index);
        if (beyond) {
            const u32 found = __ffs(beyond) - 1;
            tile.sequence = base + found;
            tile.token = __shfl_sync(~0u, start, found);
            tile.row = (__shfl_sync(~0u, reached, found) - 1 - index) * HEIGHT;
            tile.rows = __shfl_sync(~0u, rows, found) - tile.row;
            return tile;
        }
        index -= __shfl_sync(~0u, reached, 31);
    }
    return tile;
}

// The rows of a tile: which token and head each is, and that it sees the positions first..end; `low..high` are seen by
// some row, `inner_low..inner_high` by all.
template <u32 HEIGHT> struct Sight {
    u32 token[HEIGHT], head[HEIGHT]; // NONE past the sequence
    u32 first[HEIGHT], end[HEIGHT];
    u32 low, high, inner_low, inner_high;

    // By a whole block; complete after the next barrier.
    __device__ __forceinline__ void look(const Args& args, const Tile& tile, u32 kv_head) {
        if (threadIdx.x == 0) low = NONE, high = 0, inner_low = 0, inner_high = NONE;
        __syncthreads();
        const u32 group = args.heads / args.kv_heads;
        for (u32 r = threadIdx.x; r < HEIGHT; r += blockDim.x) {
            u32 from = 0, to = 0;
            token[r] = NONE;
            if (r < tile.rows) {
                token[r] = tile.token + (tile.row + r) / group;
                head[r] = kv_head * group + (tile.row + r) % group;
                const u32 position = at<u32>(args.positions, token[r]);
                if (stands(args, position)) to = position + 1, from = first_seen(args, to);
            }
            first[r] = from, end[r] = to;
            if (to > 0) {
                atomicMin(&low, from), atomicMax(&high, to);
                atomicMax(&inner_low, from), atomicMin(&inner_high, to);
            }
        }
    }

    // Where a row's query or output of `width` elements starts; null past the sequence.
    __device__ __forceinline__ bf16* find(const Rows& view, u32 r, u32 width) const {
        return token[r] == NONE ? nullptr : row<bf16>(view, token[r]) + head[r] * width;
    }
};

// A piece of the cache, on its way to its place in shared memory beside other work; zero unless it is `there`. Codes arrive in the
// first half of the place: whoever brought them decodes them where they are.
__device__ __forceinline__ void bring_piece(bf16* to, const bf16* from, bool there, const void* anywhere) {
    copy_async(shared_address(to), there ? from : anywhere, there ? 16 : 0);
}
__device__ __forceinline__ void bring_piece(bf16* to, const e4m3* from, bool there, const void* anywhere) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(shared_address(to)), "l"(there ? from : anywhere), "r"(there ? 8 : 0)
                 : "memory");
}

// A piece that has arrived and that this thread brought becomes numbers, if it is in codes.
template <typename C> __device__ __forceinline__ void settle_piece(bf16* at) {
    if constexpr (sizeof(C) == 1) *reinterpret_cast<uint4*>(at) = decode_piece(*reinterpret_cast<const uint2*>(at));
}

// A piece that begins anywhere, as numbers and at once; `elements` are read and the rest are zero.
__device__ __forceinline__ void bring_slowly(bf16* to, const bf16* from, u32 elements) { copy_slowly(to, from, elements); }
__device__ __forceinline__ void bring_slowly(bf16* to, const e4m3* from, u32 elements) {
    u32 words[2] = {};
    for (u32 j = 0; j < elements; ++j) words[j / 4] |= u32(from[j].bits) << (j % 4 * 8);
    *reinterpret_cast<uint4*>(to) = decode_piece(make_uint2(words[0], words[1]));
}

// The score of a head that belongs to no key; args.sinks is not 0.
__device__ __forceinline__ f32 sink_of(const Args& args, u32 head) {
    return reinterpret_cast<const f32*>(args.sinks)[head];
}

// The softmax of a row, carried from step to step.
struct Softmax {
    f32 most = minus_infinity(); // of the scores so far
    f32 total = 0.0f;            // of this thread's powers

    // Where a product is rounded is written out here: kernels that give the same bits must not leave it to the compiler.

    // Takes up the greatest score of a step; gives what sums so far are to be multiplied with.
    __device__ __forceinline__ f32 raise(f32 score, f32 scale) {
        const f32 before = most;
        most = fmaxf(most, score);
        const f32 kept = power_of_two((before - base()) * scale);
        total = __fmul_rn(total, kept);
        return kept;
    }

    // Of a score, against the greatest so far.
    __device__ __forceinline__ f32 power(f32 score, f32 scale) const {
        return power_of_two(__fmaf_rn(score, scale, -__fmul_rn(base(), scale)));
    }

    // Takes up what a softmax had of the spans before; gives what the sums of those and of this span are to be multiplied with.
    __device__ __forceinline__ float2 follow(f32 earlier_most, f32 earlier_total, f32 scale) {
        const f32 own = most;
        most = fmaxf(earlier_most, own);
        const float2 shares = make_float2(power_of_two((earlier_most - base()) * scale), power_of_two((own - base()) * scale));
        total = blend(earlier_total, total, shares);
        return shares;
    }

    // Sums of earlier spans and of this one together. A share of zero leaves the other as it is: its share is one.
    static __device__ __forceinline__ f32 blend(f32 earlier, f32 own, float2 shares) {
        const f32 both = __fmaf_rn(earlier, shares.x, __fmul_rn(own, shares.y));
        return shares.y == 0.0f ? earlier : shares.x == 0.0f ? own : both;
    }

    // Takes up two powers.
    __device__ __forceinline__ void add(f32 low, f32 high) { total = __fadd_rn(total, __fadd_rn(low, high)); }

    // What scores are counted from: finite even if nothing was seen yet.
    __device__ __forceinline__ f32 base() const { return most == minus_infinity() ? 0.0f : most; }
};

// The greatest, and the sum, over the four lanes that share a row.
__device__ __forceinline__ f32 quad_max(f32 value) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, 1));
    return fmaxf(value, __shfl_xor_sync(~0u, value, 2));
}
__device__ __forceinline__ f32 quad_sum(f32 value) {
    value += __shfl_xor_sync(~0u, value, 1);
    return value + __shfl_xor_sync(~0u, value, 2);
}

// Where the THREADS threads of a block, or of a part of it, put away what their rows have of the spans before: the softmax of
// ROWS rows of each thread, and SUMS sums, every four of which are of two rows. There are places for about as many blocks as run
// at a time; who finds none waits until one is given back, which nobody who has one waits for.
template <u32 THREADS, u32 SUMS, u32 ROWS> struct Carry {
    const Args& args;
    u32* place;           // which one, in shared memory
    const u32* first;     // of a thread's row i at 8 * i: the first position that it sees
    const u32 start;      // the first position taken, a multiple of STEP
    const u32 thread, barrier; // of these threads
    const f32 scale;

    // Whether there are several spans before position `end`: then a place is opened, a barrier away from the first span's end, and
    // closed after the last one's.
    __device__ __forceinline__ bool several(u32 end) const { return end > start && (end - 1) / SPAN_KEYS * SPAN_KEYS > start; }

    __device__ __forceinline__ void open(u32 end) const {
        if (thread != 0 || !several(end)) return;
        const u32 places = u32(min(args.scratch_bytes / BYTES, u64(WORDS)));
        u32 at = ((blockIdx.x * gridDim.y + blockIdx.y) * (blockDim.x / THREADS) + barrier) % places, other;
        while (true) {
            asm volatile("atom.acquire.gpu.global.cas.b32 %0, [%1], 0, 1;" : "=r"(other) : "l"(taken() + at) : "memory");
            if (other == 0) break;
            at = at + 1 == places ? 0 : at + 1;
        }
        *place = at;
    }

    __device__ __forceinline__ void close(u32 end) const {
        if (!several(end)) return;
        asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(THREADS) : "memory");
        if (thread == 0) asm volatile("st.release.gpu.global.u32 [%0], 0;" ::"l"(taken() + *place) : "memory");
    }

    // After the last step of a span, which is before position `end`. But for the `last` span, rows that see nothing before that
    // keep what they have: what comes before all keys.
    __device__ __forceinline__ void end_span(Softmax (&softmax)[ROWS], f32* sums, u32 end, bool last) const {
        const u32 position = (end - 1) / SPAN_KEYS * SPAN_KEYS;
        if (position > start) take_up(softmax, sums, position);
        if (last) return;
#pragma unroll
        for (u32 i = 0; i < ROWS; ++i) {
            __stcg(softmaxes() + i * THREADS, make_float2(softmax[i].most, softmax[i].total));
            if (first[8 * i] < end) softmax[i] = Softmax();
        }
#pragma unroll
        for (u32 i = 0; i < SUMS; i += 4) {
            __stcg(pieces() + i / 4 * THREADS, make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]));
            sums[i] = sums[i + 1] = sums[i + 2] = sums[i + 3] = 0.0f;
        }
    }

  private:
    static constexpr u32 BYTES = THREADS * (SUMS * 4 + ROWS * 8);

    // Puts what was put away before what the span at `position` gave. Each thread reads only what it wrote.
    __device__ __forceinline__ void take_up(Softmax (&softmax)[ROWS], f32* sums, u32 position) const {
        float2 shares[ROWS];
#pragma unroll
        for (u32 i = 0; i < ROWS; ++i) {
            const float2 earlier = __ldcg(softmaxes() + i * THREADS);
            shares[i] = make_float2(0.0f, 1.0f);
            if (first[8 * i] < position) shares[i] = softmax[i].follow(earlier.x, earlier.y, scale);
        }
#pragma unroll
        for (u32 i = 0; i < SUMS; i += 4) {
            // All at once would take more registers than there are.
            if (i % 32 == 0) asm volatile("" ::: "memory");
            const float4 earlier = __ldcg(pieces() + i / 4 * THREADS);
            const u32 row = i / (2 * SUMS / ROWS) * 2;
            sums[i] = Softmax::blend(earlier.x, sums[i], shares[row]);
            sums[i + 1] = Softmax::blend(earlier.y, sums[i + 1], shares[row]);
            sums[i + 2] = Softmax::blend(earlier.z, sums[i + 2], shares[row + 1]);
            sums[i + 3] = Softmax::blend(earlier.w, sums[i + 3], shares[row + 1]);
        }
    }

    __device__ __forceinline__ u32* taken() const { return reinterpret_cast<u32*>(args.scratch); }
    __device__ __forceinline__ float4* pieces() const {
        return reinterpret_cast<float4*>(args.scratch + WORDS * 4 + u64(*place) * BYTES) + thread;
    }
    __device__ __forceinline__ float2* softmaxes() const {
        return reinterpret_cast<float2*>(args.scratch + WORDS * 4 + u64(*place) * BYTES + THREADS * SUMS * 4) + thread;
    }
};
