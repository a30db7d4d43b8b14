// Which rows each expert's product has, written where the product kernels look for it, from where the rows of each
// expert start. One warp goes through the experts.
#include "gemm.cuh"

struct Args {
    u64 list;     // GemmPart[count] or Block[count]: all but what the rows decide is there
    u64 x, out;   // of all experts
    Rows starts;  // [count + 1]
    Report report;
    u32 count;
    u32 rows;     // of x and out
    u32 x_bytes, out_bytes; // from a row to the next
    u32 tile_rows, tiles_across;
};

// Calls each(expert, first row, rows).
template <typename Each> __device__ __forceinline__ void for_experts(const Args& args, Each each) {
    for (u32 first = 0; first < args.count; first += 32) {
        const u32 expert = first + threadIdx.x;
        u32 start = 0, end = 0;
        if (expert < args.count) {
            start = at<u32>(args.starts, expert);
            end = at<u32>(args.starts, expert + 1);
            if (end < start) complain(args.report, ROWS_DESCEND, expert, end, start);
            else if (end > args.rows) complain(args.report, ROWS_END, end, args.rows + 1);
            if (end < start || end > args.rows) start = end = 0;
        }
        each(expert, start, end - start);
    }
}

extern "C" __global__ void __launch_bounds__(32) list_parts_f32_f32(const __grid_constant__ Args args) {
    take_turn();
    GemmPart* parts = reinterpret_cast<GemmPart*>(args.list);
    u32 before = 0; // tiles of the experts before these 32
    for_experts(args, [&](u32 expert, u32 start, u32 rows) {
        const u32 tiles = (rows + args.tile_rows - 1) / args.tile_rows * args.tiles_across;
        u32 through = tiles;
        for (u32 step = 1; step < 32; step <<= 1) {
            const u32 other = __shfl_up_sync(~0u, through, step);
            if (threadIdx.x >= step) through += other;
        }
        if (expert < args.count) {
            parts[expert].x = args.x + u64(start) * args.x_bytes;
            parts[expert].out = args.out + u64(start) * args.out_bytes;
            parts[expert].rows = rows;
            parts[expert].first_tile = before + through - tiles;
        }
        before += __shfl_sync(~0u, through, 31);
    });
}

extern "C" __global__ void __launch_bounds__(32) list_blocks_f32_f32(const __grid_constant__ Args args) {
    take_turn();
    Block* blocks = reinterpret_cast<Block*>(args.list);
    for_experts(args, [&](u32 expert, u32 start, u32 rows) {
        if (expert < args.count) blocks[expert].row0 = start, blocks[expert].rows = rows;
    });
}
