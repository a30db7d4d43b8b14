// What products on Hopper share, whatever rows and weights are held in: how TMA, wgmma and clusters are told what to do, where things
// lie in shared memory, and the roles of a block's warps.
//
// Two CTAs of a cluster take neighbouring weight tiles of the same token rows: each loads half of the rows and multicasts it to
// both.
//
// Roles in a CTA of 384 threads: warpgroup 0 = loader warp, scheduler warp (two idle warps); warpgroups 1 and 2 = consumers.
#pragma once
#include "barrier.cuh"
#include "gemm.cuh"

typedef unsigned short u16;

constexpr u32 CLUSTER = 2;     // CTAs that share token rows by multicast
constexpr u32 OWN_BLOCKS = 64; // blocks that fit into the arguments

// How TMA finds a matrix, as the driver wrote it. The twin of `driver::TensorMap`.
struct alignas(128) TensorMap {
    u64 opaque[16];
};

// The twin of `hopper::HopperArgs`.
struct HopperArgs {
    TensorMap rows; // boxes of ROW_BOX rows by a line
    TensorMap out;  // boxes of ROW_BOX rows by the columns that leave together
    u64 blocks; // Block[count] in device memory; null: those here
    Block own[OWN_BLOCKS];
    u64 rows_start; // of rows that are codes and scales
    u64 out_start;  // row-major
    u64 bias;       // float32 of the outputs, or null
    u64 ticket;     // two words, zero before the first launch; every launch leaves them zero
    u32 count;
    u32 n;          // packed weight rows
    u32 k;
    u32 out_stride; // elements per out row, multiple of 8
    u32 columns;    // of out, multiple of 8
    u32 tile_rows;  // rows per tile, multiple of 32, at most the kernel's maximum
    // Of weights in codes, as in `CodedArgs`.
    u32 kind, parts, brick_bytes;
    u32 rows_stride; // bytes between rows that are codes and scales
    u32 powers;      // whether scales of codes that leave are powers of two
    u32 padding;
};

constexpr u32 LINE_BYTES = 128;     // k values of a row that one stage holds: a swizzled line
constexpr u32 ROW_BOX = 32;         // token rows per TMA box
constexpr u32 BOX_BYTES = ROW_BOX * LINE_BYTES;
constexpr u32 RING_BYTES = 196608;  // shared by all ring shapes: 4 x 48 KB, 6 x 32 KB or 8 x 24 KB
constexpr u32 STAGING_BYTES = 16384;  // per consumer warpgroup
constexpr u32 SLOTS = 2;              // tiles announced ahead
constexpr u32 CONSUMER_WARPS = 8;
constexpr u32 MAX_STAGES = 8;

constexpr u32 OFF_STAGING = RING_BYTES;
constexpr u32 OFF_SLOTS = OFF_STAGING + 2 * STAGING_BYTES;
constexpr u32 OFF_BARS = OFF_SLOTS + SLOTS * 16;
// barriers: ring full, ring empty, slot full, slot empty
constexpr u32 BAR_FULL = OFF_BARS;
constexpr u32 BAR_EMPTY = BAR_FULL + 8 * MAX_STAGES;
constexpr u32 BAR_SLOT_FULL = BAR_EMPTY + 8 * MAX_STAGES;
constexpr u32 BAR_SLOT_EMPTY = BAR_SLOT_FULL + 8 * SLOTS;

// ---------------------------------------------------------------------------------------------- PTX, one line each

__device__ __forceinline__ u32 smem_addr(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ u32 cluster_rank() {
    u32 r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}

// The address of the same shared-memory word in another CTA of the cluster.
__device__ __forceinline__ u32 peer_addr(u32 addr, u32 rank) {
    u32 r;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(r) : "r"(addr), "r"(rank));
    return r;
}

__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release.aligned;\n barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// These two take a shared::cluster address (peer_addr), so they reach this CTA and its peer alike. Spelling out
// cluster scope would cost a full memory barrier per call. None is needed: what the barriers order is TMA traffic
// and wgmma reads, or data that st.async counts.
__device__ __forceinline__ void barrier_arrive_cluster(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void barrier_expect_cluster(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

__device__ __forceinline__ void warpgroup_barrier(u32 id) { asm volatile("bar.sync %0, 128;" ::"r"(id) : "memory"); }

__device__ __forceinline__ void tma_load_2d(u32 dst, const TensorMap* map, u32 bar, u32 x, u32 y) {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(dst),
        "l"(map), "r"(bar), "r"(x), "r"(y)
        : "memory");
}

// Writes the box at the same offset, and counts it on the same barrier, in every CTA of the cluster.
__device__ __forceinline__ void tma_load_2d_all(u32 dst, const TensorMap* map, u32 bar, u32 x, u32 y) {
    const u16 mask = (1 << CLUSTER) - 1;
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4}], [%2], "
        "%5;" ::"r"(dst),
        "l"(map), "r"(bar), "r"(x), "r"(y), "h"(mask)
        : "memory");
}

__device__ __forceinline__ void tma_store_2d(const TensorMap* map, u32 src, u32 x, u32 y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(src), "r"(x), "r"(y) : "memory");
}
__device__ __forceinline__ void tma_store_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// At most PENDING groups of stores have yet to read their shared memory.
template <int PENDING>
__device__ __forceinline__ void tma_store_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
__device__ __forceinline__ void tma_store_finish() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
__device__ __forceinline__ void fence_for_tma() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ u32 atomic_add(u32* p, u32 v) {
    u32 old;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(p), "r"(v) : "memory");
    return old;
}

__device__ __forceinline__ u32 pack_bf16(float lo, float hi) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
    return r;
}

// Stores four 8x8 fragments transposed: lane i names the 16-byte memory row i % 8 of fragment i / 8.
__device__ __forceinline__ void stmatrix_trans(u32 addr, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(addr), "r"(a), "r"(b), "r"(c), "r"(d)
                 : "memory");
}

__device__ __forceinline__ uint4 load_shared16(u32 addr) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(addr) : "memory");
    return v;
}

__device__ __forceinline__ void store_global16(void* p, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// ----------------------------------------------------------------------------------------------------------- wgmma

// Both operands lie K-major in 128-byte swizzled lines: 8 lines of 128 bytes repeat every 1024 bytes (the stride
// field, in 16-byte units). Only the low word moves; the high word is a constant of the layout.
__device__ __forceinline__ u32 operand(u32 addr) { return ((addr & 0x3ffff) >> 4) | (1u << 16); }
#define OPERAND_HIGH "0x40000040"

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

#define REGS_0 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define REGS_1 REGS_0 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define REGS_2 REGS_1 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define REGS_3 REGS_2 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define REGS_4 REGS_3 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79"
#define REGS_5 REGS_4 ",%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"
#define REGS_6 REGS_5 ",%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111"
#define REGS_7 REGS_6 ",%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define F16(i) F4(i), F4(i + 4), F4(i + 8), F4(i + 12)
#define OUT_0 F16(0)
#define OUT_1 OUT_0, F16(16)
#define OUT_2 OUT_1, F16(32)
#define OUT_3 OUT_2, F16(48)
#define OUT_4 OUT_3, F16(64)
#define OUT_5 OUT_4, F16(80)
#define OUT_6 OUT_5, F16(96)
#define OUT_7 OUT_6, F16(112)

// -------------------------------------------------------------------------------------------------- ring and slots

template <u32 BYTES>
struct Ring {
    static constexpr u32 SLOT_BYTES = BYTES;
    static constexpr u32 STAGES = RING_BYTES / SLOT_BYTES;
    u32 stage, phase;
    __device__ __forceinline__ void next() {
        if (++stage == STAGES) {
            stage = 0;
            phase ^= 1;
        }
    }
};

// What the scheduler tells everyone about a tile. rows == 0 ends the kernel.
struct Work {
    u32 row0, rows;  // token rows
    u32 pair;        // index of the weight tiles of this cluster
    u32 block;       // index into the blocks
};

struct SlotCursor {
    u32 slot, phase;
    __device__ __forceinline__ void next() {
        if (++slot == SLOTS) {
            slot = 0;
            phase ^= 1;
        }
    }
};

// Reads the next tile; one lane a warp then hands the slot back to the scheduler, which lives in CTA 0 of the
// cluster. LANES names the lanes that call: they leave the wait one by one, and the slot may go only when the
// last of them has read it.
template <u32 LANES>
__device__ __forceinline__ Work take_tile(u32 base, SlotCursor& c, bool hand_back) {
    barrier_wait(base + BAR_SLOT_FULL + 8 * c.slot, c.phase);
    uint4 v = load_shared16(base + OFF_SLOTS + 16 * c.slot);
    Work t = {v.x, v.y, v.z, v.w};
    // The slot goes back when its words are here, not when they were asked for. A load may wait behind stores to a memory that others keep busy,
    // and the arrival, which goes another way, would overtake it: the scheduler's next word came first, and a warpgroup took the end for its tile.
    t.rows = __any_sync(LANES, v.y) ? v.y : 0;
    if (hand_back) barrier_arrive_cluster(peer_addr(base + BAR_SLOT_EMPTY + 8 * c.slot, 0));
    c.next();
    return t;
}

// ------------------------------------------------------------------------------------------------------- scheduler

__device__ __forceinline__ u32 div_up(u32 a, u32 b) { return (a + b - 1) / b; }
__device__ __forceinline__ u32 round_up(u32 a, u32 b) { return div_up(a, b) * b; }

// An expert's rows are cut into equal tiles, so that no expert leaves a sliver behind a row of full tiles; of multiples of STEP.
template <u32 STEP> __device__ __forceinline__ u32 even_tile(u32 rows, u32 limit) {
    return rows ? round_up(div_up(rows, div_up(rows, limit)), STEP) : 0;
}

__device__ __forceinline__ const Block* blocks_of(const HopperArgs& a) {
    return a.blocks ? reinterpret_cast<const Block*>(a.blocks) : a.own;
}

// Which tile of an expert the i-th ticket gets: up to 8 row tiles by as many weight pairs as there are clusters
// run together, so that both operands of a wave stay in L2.
__device__ __forceinline__ void place(u32 i, u32 row_tiles, u32 pairs, u32& row_tile, u32& pair) {
    const u32 GROUP = 8;
    u32 groups = div_up(row_tiles, GROUP), per = div_up(row_tiles, groups);
    u32 g = i / (per * pairs), rest = i - g * per * pairs;
    u32 width = min(per, row_tiles - g * per);
    pair = rest / width;
    row_tile = g * per + rest % width;
}

__device__ __forceinline__ void announce(u32 base, u32 slot, const Work& t, u32 lane) {
    if (lane >= CLUSTER) return;
    u32 at = peer_addr(base + OFF_SLOTS + 16 * slot, lane), full = peer_addr(base + BAR_SLOT_FULL + 8 * slot, lane);
    barrier_expect_cluster(full, 16);
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%2, %3, %4, %5}, [%1];" ::"r"(at), "r"(full),
                 "r"(t.row0), "r"(t.rows), "r"(t.pair), "r"(t.block)
                 : "memory");
}

// Finds tiles by ascending tickets: walks the blocks forward, 32 at a time, one a lane of a warp. `pairs` tiles lie beside each other
// along the weights.
template <u32 STEP> struct TileWalk {
    const Block* blocks;
    const u32 count, limit, pairs;
    u32 first = 0, before = 0;             // first block of the 32 at hand, tiles before it
    u32 row0 = 0, rows = 0, height = 0;    // this lane's block, and the height of its tiles
    u32 last = 0;                          // tiles up to and including this lane's block
    bool loaded = false;

    __device__ __forceinline__ TileWalk(const HopperArgs& a, u32 pairs)
        : blocks(blocks_of(a)), count(a.count), limit(a.tile_rows), pairs(pairs) {}

    __device__ __forceinline__ void take32(u32 lane) {
        row0 = rows = 0;
        if (first + lane < count) {
            row0 = blocks[first + lane].row0;
            rows = blocks[first + lane].rows;
        }
        height = even_tile<STEP>(rows, limit);
        last = height ? div_up(rows, height) * pairs : 0;
        for (int d = 1; d < 32; d <<= 1) {
            u32 up = __shfl_up_sync(~0u, last, d);
            if (lane >= d) last += up;
        }
        loaded = true;
    }

    // The tile of a ticket; of no rows if there are no more. By a whole warp.
    __device__ __forceinline__ Work find(u32 ticket) {
        const u32 lane = threadIdx.x & 31;
        while (first < count) {
            if (!loaded) take32(lane);
            const u32 hit = __ballot_sync(~0u, ticket - before < last);
            if (!hit) {
                before += __shfl_sync(~0u, last, 31);
                first += 32;
                loaded = false;
                continue;
            }
            const u32 owner = __ffs(hit) - 1;
            const u32 all = __shfl_sync(~0u, rows, owner), h = __shfl_sync(~0u, height, owner);
            const u32 upto = owner ? __shfl_sync(~0u, last, owner - 1) : 0;
            u32 row_tile, pair;
            place(ticket - before - upto, div_up(all, h), pairs, row_tile, pair);
            return {__shfl_sync(~0u, row0, owner) + row_tile * h, min(h, all - row_tile * h), pair, first + owner};
        }
        return {0, 0, 0, 0};
    }
};

// One warp of CTA 0 draws tickets for the whole cluster. A CTA has TILE weight rows.
template <u32 TILE, u32 STEP>
__device__ void schedule(const HopperArgs& a, u32 base) {
    const u32 lane = threadIdx.x & 31, clusters = gridDim.x / CLUSTER;
    u32* tickets = reinterpret_cast<u32*>(a.ticket);
    u32 ticket = 0;
    if (lane == 0) ticket = atomic_add(tickets, 1);  // in flight while the blocks are read
    TileWalk<STEP> walk(a, div_up(a.n, TILE * CLUSTER));
    SlotCursor cursor = {0, 1};
    while (true) {
        const Work t = walk.find(__shfl_sync(~0u, ticket, 0));
        // One lane waits: a lane that polled late could miss a whole phase, because the readers answer as soon as
        // another lane announces.
        if (lane == 0) barrier_wait(base + BAR_SLOT_EMPTY + 8 * cursor.slot, cursor.phase);
        __syncwarp();
        announce(base, cursor.slot, t, lane);
        cursor.next();
        if (!t.rows) break;
        if (lane == 0) ticket = atomic_add(tickets, 1);
    }
    // The last cluster to leave resets both words for the next launch.
    if (lane == 0) {
        __threadfence();
        if (atomic_add(tickets + 1, 1) == clusters - 1) {
            tickets[0] = 0;
            tickets[1] = 0;
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- loader

// `Operands` says how weights are brought, and what a stage is of.
template <typename Operands>
__device__ void load_tiles(const HopperArgs& a, u32 base) {
    const u32 rank = cluster_rank(), blocks = div_up(a.k, Operands::K_BLOCK);
    typename Operands::Ring ring = {0, 1};
    SlotCursor cursor = {0, 0};
    u32 current = ~0u;
    u64 weight = 0;
    while (true) {
        Work t = take_tile<1>(base, cursor, true);
        if (!t.rows) break;
        if (t.block != current) {
            current = t.block;
            weight = blocks_of(a)[t.block].weight;
            Operands::open(weight);
        }
        const u32 boxes = div_up(t.rows, ROW_BOX), weight_row = (t.pair * CLUSTER + rank) * Operands::TILE;
        const u32 weight_bytes = Operands::bytes(a, weight_row);
        for (u32 b = 0; b < blocks; ++b) {
            u32 full = base + BAR_FULL + 8 * ring.stage, slot = base + ring.stage * Operands::Ring::SLOT_BYTES;
            barrier_wait(base + BAR_EMPTY + 8 * ring.stage, ring.phase);
            barrier_expect(full, weight_bytes + boxes * BOX_BYTES);
            Operands::load(a, weight, slot, full, b, weight_row);
            for (u32 x = rank; x < boxes; x += CLUSTER)
                tma_load_2d_all(slot + Operands::WEIGHT_BYTES + x * BOX_BYTES, &a.rows, full, b * Operands::K_BLOCK, t.row0 + x * ROW_BOX);
            ring.next();
        }
    }
}

// ------------------------------------------------------------------------------------------------------- consumers

// Every warp of every CTA that reads a ring slot reports to both loaders, since each loader writes into both CTAs.
__device__ __forceinline__ void release_stage(u32 base, u32 stage, u32 lane) {
    if (lane < CLUSTER) barrier_arrive_cluster(peer_addr(base + BAR_EMPTY + 8 * stage, lane));
}

// After the last wgmma of a tile: no read of a sum moves above the wait.
template <int COLS> __device__ __forceinline__ void settle(float* acc) {
#pragma unroll
    for (int i = 0; i < COLS / 2; ++i) asm volatile("" : "+f"(acc[i])::"memory");
}

// Where a warpgroup's part of a tile goes.
struct Target {
    const TensorMap* map;  // boxes of ROW_BOX rows by the warpgroup's columns
    u16* out;              // row 0, column 0 of this part
    u32 stride, row0, column;
    u32 rows, columns;  // valid extent
};

// Sends a staged block of up to ROWS rows of CHUNKS * 16 bytes, starting at row `from` of the part, to out. TMA
// takes whole boxes; it would overwrite the next expert with a partial one, so the rows that are left go by
// ordinary stores. Called by the whole warpgroup after a barrier; thread 0 owns the store groups.
template <int CHUNKS, int ROWS, int SHIFT>
__device__ __forceinline__ void send_block(const Target& t, u32 staging, u32 from, u32 thread) {
    const u32 rows = min(t.rows - from, (u32)ROWS), boxed = rows / ROW_BOX * ROW_BOX;
    if (thread == 0) {
        for (u32 r = 0; r < boxed; r += ROW_BOX) tma_store_2d(t.map, staging + r * CHUNKS * 16, t.column, t.row0 + from + r);
        tma_store_commit();
    }
    if (boxed != rows) {
        const u32 chunk = thread % CHUNKS;
        if (chunk * 8 < t.columns) {
            for (u32 row = boxed + thread / CHUNKS; row < rows; row += 128 / CHUNKS) {
                uint4 v = load_shared16(staging + row * (CHUNKS * 16) + ((chunk ^ ((row >> SHIFT) & (CHUNKS - 1))) << 4));
                store_global16(t.out + (u64)(from + row) * t.stride + chunk * 8, v);
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------- kernel

template <typename Operands>
__device__ __forceinline__ void hopper_gemm(const HopperArgs& a) {
    take_turn();
    extern __shared__ char shared[];
    const u32 base = (smem_addr(shared) + 1023) & ~1023u;  // the swizzle pattern repeats every 1024 bytes
    const u32 warp = threadIdx.x / 32;
    if (threadIdx.x == 0) {
        asm volatile("prefetch.tensormap [%0];" ::"l"(&a.rows) : "memory");
        asm volatile("prefetch.tensormap [%0];" ::"l"(&a.out) : "memory");
        for (u32 s = 0; s < Operands::Ring::STAGES; ++s) {
            barrier_init(base + BAR_FULL + 8 * s, 1);
            barrier_init(base + BAR_EMPTY + 8 * s, CONSUMER_WARPS * CLUSTER);
        }
        for (u32 s = 0; s < SLOTS; ++s) {
            barrier_init(base + BAR_SLOT_FULL + 8 * s, 1);
            barrier_init(base + BAR_SLOT_EMPTY + 8 * s, (CONSUMER_WARPS + 1) * CLUSTER);
        }
        barriers_made();
    }
    cluster_sync();
    if (warp < 4) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp == 0) {
            if ((threadIdx.x & 31) == 0) load_tiles<Operands>(a, base);
        } else if (warp == 1 && cluster_rank() == 0) {
            schedule<Operands::TILE, Operands::STEP>(a, base);
        }
        __syncwarp();
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
        Operands::consume(a, base);
    }
    cluster_sync();  // no CTA leaves while its peer may still signal its barriers
}

// A kernel of products of some operands.
#define HOPPER_KERNEL(name, ...)                                                                       \
    extern "C" __global__ void __cluster_dims__(CLUSTER, 1, 1) __launch_bounds__(384, 1)                      \
        name(const __grid_constant__ HopperArgs args) {                                                       \
        hopper_gemm<__VA_ARGS__>(args);                                                                       \
    }
