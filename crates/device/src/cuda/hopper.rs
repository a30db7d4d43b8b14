//! Products on Hopper: what `gemm_hopper.cuh` is given, and how an operation is cut into tiles for it.
//!
//! It adds up in the order of the other products on the tensor cores and gives their bits, so whether an operation
//! runs here is a question of speed alone: views that TMA cannot follow, and parts of few rows,
//! take the other kernels. The op suite compares the two, bit by bit.

use super::driver::{Context, CudaError, DeviceMemory, Element, Matrix, Stream, TensorMap};
use super::launch::GemmPart;
use super::layout::{Layout, twin};
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::Arc;

/// Rows of gate, then of up, that stand together in a weight: what a thread holds both factors of.
pub(super) const INTERLEAVED: usize = 8;

/// Rows and columns of a weight that one copy brings: `WEIGHT_TILE` and `K_BLOCK` of the source.
pub(super) const WEIGHT_PIECE: (u32, u32) = (128, 64);

/// Rows of x and out that one copy moves, and rows of codes where there are few.
const ROW_BOX: u32 = 32;
const FEW_ROW_BOX: u32 = 8;

/// Packed weight rows of a tile for few rows of codes: `TILE` of the source.
pub(super) const FEW_TILE: u32 = 64;

/// Blocks that fit into a kernel's arguments; more of them are listed in device memory. Repeats the number of the source.
pub(super) const OWN_BLOCKS: usize = 64;

/// Shared memory of a block: the ring, two staging areas, slots and barriers, and room to start on 1024 bytes.
pub(super) const SHARED_BYTES: usize = 231_424;

/// The same for products of few rows of codes: two blocks fit a multiprocessor.
pub(super) const FEW_SHARED_BYTES: usize = 112_352;

twin! {
    pub(super) struct Block = "Block" in "gemm.cuh" {
        pub(super) row0: u32,
        pub(super) rows: u32,
        pub(super) weight: u64,
    }
}

// SAFETY: all its bits may be zero.
unsafe impl bytemuck::Zeroable for Block {}
// SAFETY: plain integers without padding: two of four bytes, one of eight.
unsafe impl bytemuck::Pod for Block {}

twin! {
    pub(super) struct HopperArgs = "HopperArgs" in "hopper.cuh" {
        pub(super) rows: TensorMap,
        pub(super) out: TensorMap,
        pub(super) blocks: u64,
        pub(super) own: [Block; OWN_BLOCKS],
        pub(super) rows_start: u64,
        pub(super) out_start: u64,
        pub(super) bias: u64,
        pub(super) ticket: u64,
        pub(super) count: u32,
        pub(super) n: u32,
        pub(super) k: u32,
        pub(super) out_stride: u32,
        pub(super) columns: u32,
        pub(super) tile_rows: u32,
        pub(super) kind: u32,
        pub(super) parts: u32,
        pub(super) brick_bytes: u32,
        pub(super) rows_stride: u32,
        pub(super) powers: u32,
        pub(super) padding: u32,
    }
}

/// What the sources are held against.
pub(super) const LAYOUTS: &[&Layout] = &[Block::LAYOUT, HopperArgs::LAYOUT];

/// Zeroed memory for a lane's tickets; `stream` has yet to be waited for.
pub(super) fn tickets(context: &Arc<Context>, stream: &Stream) -> Result<DeviceMemory, CudaError> {
    let tickets = DeviceMemory::new(context, 2 * size_of::<u32>())?;
    // SAFETY: just allocated with that size, and nobody else has it yet.
    unsafe { stream.fill(tickets.start, 0, tickets.bytes) }?;
    Ok(tickets)
}

/// Where each part starts, if all of them are rows of one x and one out, of elements of `bytes`, the same rows of both, and
/// the tensor copy engine can follow them: on 16 bytes, in whole 16 bytes.
pub(super) fn common_rows(parts: &[GemmPart], bytes: [u64; 2]) -> Option<Vec<u32>> {
    let (first, [x_bytes, out_bytes]) = (parts.first()?, bytes);
    let fits = |start: u64, stride: u64, bytes: u64| {
        start.is_multiple_of(16)
            && (stride * bytes).is_multiple_of(16)
            && (1..1 << 32).contains(&(stride * bytes))
    };
    if !(fits(first.x, first.x_stride, x_bytes) && fits(first.out, first.out_stride, out_bytes)) {
        return None;
    }
    let row = |start: u64, from: u64, stride: u64| {
        let bytes = start.checked_sub(from)?;
        bytes.is_multiple_of(stride).then_some(bytes / stride)
    };
    let rows = parts.iter().map(|part| {
        if (part.x_stride, part.out_stride) != (first.x_stride, first.out_stride) {
            return None;
        }
        let at = row(part.x, first.x, x_bytes * first.x_stride)?;
        let same = row(part.out, first.out, out_bytes * first.out_stride)? == at;
        let end = at.checked_add(u64::from(part.rows))?;
        (same && u32::try_from(end).is_ok()).then_some(at as u32)
    });
    rows.collect()
}

/// How TMA finds x, and out if that is bfloat16, of so many columns; else twice x: `rows` rows from those of the first part on.
pub(super) fn maps(
    first: &GemmPart,
    rows: usize,
    k: usize,
    narrow: Option<usize>,
    gated: bool,
) -> Result<(TensorMap, TensorMap), CudaError> {
    let across = if gated { 32 } else { 64 };
    let x = row_map(Element::Bf16, first.x, [rows, k], first.x_stride, 64)?;
    let out = |columns| row_map(Element::Bf16, first.out, [rows, columns], first.out_stride, across);
    Ok((x, narrow.map_or(Ok(x), out)?))
}

/// The same of rows of codes, each of so many bytes.
pub(super) fn code_maps(
    first: &GemmPart,
    rows: usize,
    k: usize,
    row_bytes: u64,
    narrow: Option<usize>,
) -> Result<(TensorMap, TensorMap), CudaError> {
    let x = row_map(Element::Byte, first.x, [rows, k], row_bytes, 128)?;
    let out = |columns| row_map(Element::Bf16, first.out, [rows, columns], first.out_stride, 64);
    Ok((x, narrow.map_or(Ok(x), out)?))
}

/// The same for products of few rows, which store by themselves: twice of the rows, in boxes of few and of more.
pub(super) fn few_code_maps(
    first: &GemmPart,
    rows: usize,
    row_bytes: u64,
    k: usize,
) -> Result<(TensorMap, TensorMap), CudaError> {
    let boxes_of = |boxed| {
        let (start, width, stride, piece) = (first.x, k, row_bytes as usize, (boxed, 128));
        TensorMap::new(&Matrix { start, rows, width, stride, element: Element::Byte, piece })
    };
    Ok((boxes_of(FEW_ROW_BOX)?, boxes_of(ROW_BOX)?))
}

fn row_map(
    element: Element,
    start: u64,
    [rows, width]: [usize; 2],
    stride: u64,
    across: u32,
) -> Result<TensorMap, CudaError> {
    TensorMap::new(&Matrix { start, rows, width, stride: stride as usize, element, piece: (ROW_BOX, across) })
}

/// A kernel, the height of its tiles and the blocks to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    pub(super) tile_rows: u32,
    pub(super) grid: u32,
}

impl Plan {
    /// The kernels of `Epilogue::Store` and `Epilogue::SwiGlu`, for weights in bfloat16 or in codes.
    pub(super) fn operations(&self, coded: bool) -> [&'static str; 2] {
        match (self.tile_rows, coded) {
            (0..=64, false) => ["gemm_hopper64", "gated_hopper64"],
            (65..=128, false) => ["gemm_hopper128", "gated_hopper128"],
            (_, false) => ["gemm_hopper256", "gated_hopper256"],
            (0..=64, true) => ["gemm_codes64", "gated_codes64"],
            (_, true) => ["gemm_codes256", "gated_codes256"],
        }
    }
}

/// Rows of each tile of a block: equal ones, so that none leaves a sliver behind. Repeats `even_tile` of the source.
fn even_tile(rows: u32, limit: u32) -> u32 {
    if rows == 0 { 0 } else { rows.div_ceil(rows.div_ceil(limit)).next_multiple_of(ROW_BOX) }
}

/// The kernel and the tile height that are done soonest, by a model of the cycles of a tile: a linear cost of each
/// 64 k-values, never less than the weights take to arrive, and what nothing hides of its end.
pub(super) fn plan(blocks: &[Block], n: usize, k: usize, multiprocessors: u32) -> Plan {
    /// Up to so many tiles, handing them out is played through; more even out.
    const FEW: u64 = 512;
    let clusters = (multiprocessors / 2).max(1) as usize;
    let (pairs, depth) = (n.div_ceil(256).max(1) as u64, k.div_ceil(64) as u64);
    // A little sooner is not worth reading weights more often.
    let sooner = |end: u64, soonest: u64| end * 1000 < soonest * 985;
    let mut best: Option<(u64, u32, u64)> = None;
    let mut seen = Vec::new();
    for limit in (1..=8).rev().map(|boxes| boxes * ROW_BOX) {
        let heights: Vec<u32> = blocks.iter().map(|block| even_tile(block.rows, limit)).collect();
        if heights == seen {
            continue;
        }
        let cost =
            |rows: u32| depth * (130 + 37 * u64::from(rows.next_multiple_of(ROW_BOX)) / 10).max(550) + 1500;
        let busy = || blocks.iter().zip(&heights).filter(|pair| pair.0.rows > 0);
        let tiles: u64 =
            busy().map(|(block, &height)| u64::from(block.rows.div_ceil(height))).sum::<u64>() * pairs;
        let tallest = heights.iter().copied().max().unwrap_or(0).max(ROW_BOX);
        let work = |(block, &height): (&Block, &u32)| {
            let rest = block.rows % height;
            u64::from(block.rows / height) * cost(height) + if rest > 0 { cost(rest) } else { 0 }
        };
        let even = busy().map(work).sum::<u64>() * pairs / clusters as u64;
        if best.is_some_and(|(soonest, ..)| !sooner(even, soonest)) {
            // However its tiles are handed out, this height is not the one.
            continue;
        }
        let end = if tiles <= FEW {
            let mut free: BinaryHeap<Reverse<u64>> = vec![Reverse(0); clusters].into();
            let mut end = 0;
            for (block, &height) in busy() {
                for _ in 0..pairs {
                    for row in (0..block.rows).step_by(height as usize) {
                        let Some(mut start) = free.peek_mut() else { continue };
                        start.0 += cost(height.min(block.rows - row));
                        end = end.max(start.0);
                    }
                }
            }
            end
        } else {
            // The last tiles end half a tile apart on average.
            even + cost(tallest) / 2
        };
        if best.is_none_or(|(soonest, ..)| sooner(end, soonest)) {
            best = Some((end, tallest, tiles));
        }
        seen = heights;
    }
    let (_, tile_rows, tiles) = best.unwrap_or((0, ROW_BOX, 1));
    Plan { tile_rows, grid: 2 * (clusters as u64).min(tiles.max(1)) as u32 }
}

/// The same for rows in codes, whose tiles have up to 64 or up to 128 rows and 256 packed rows of the weights, by the cycles
/// that the tensor cores take of a tile.
pub(super) fn plan_codes(blocks: &[Block], n: usize, k: usize, multiprocessors: u32) -> Plan {
    let clusters = u64::from(multiprocessors / 2).max(1);
    let (pairs, depth) = (n.div_ceil(512).max(1) as u64, k.div_ceil(128) as u64);
    let of = |tile_rows: u32| {
        let cost = |rows: u32| depth * if rows > 64 { 1100 } else { 650 } + 2500;
        let busy = blocks.iter().map(|block| block.rows).filter(|&rows| rows > 0);
        let tiles: u64 = busy.clone().map(|rows| u64::from(rows.div_ceil(tile_rows))).sum::<u64>() * pairs;
        let work = |rows: u32| {
            let rest = rows % tile_rows;
            u64::from(rows / tile_rows) * cost(tile_rows) + if rest > 0 { cost(rest) } else { 0 }
        };
        let even = busy.map(work).sum::<u64>() * pairs / clusters;
        // Few tiles end together in rounds, many half a tile apart.
        let rounds = tiles.div_ceil(clusters) * cost(tile_rows);
        (rounds.min(even + cost(tile_rows) / 2), tiles)
    };
    let ((tall, tall_tiles), (low, low_tiles)) = (of(128), of(64));
    let (tile_rows, tiles) = if low < tall { (64, low_tiles) } else { (128, tall_tiles) };
    Plan { tile_rows, grid: 2 * clusters.min(tiles.max(1)) as u32 }
}

/// The same for few rows in codes, if weights are so few that the tiles above would leave the GPU idle: tiles of up to 64 rows and
/// 64 packed rows of the weights, of which `together` blocks are a cluster.
pub(super) fn plan_few_codes(
    blocks: &[Block],
    n: usize,
    together: u32,
    multiprocessors: u32,
) -> Option<Plan> {
    const MOST: u32 = 64;
    /// Blocks that fit a multiprocessor together.
    const RESIDENT: u32 = 2;
    let busy = || blocks.iter().map(|block| block.rows).filter(|&rows| rows > 0);
    let tiles_of = |tile_rows: u32, columns: u32| {
        busy().map(|rows| rows.div_ceil(tile_rows)).sum::<u32>() * (n as u32).div_ceil(columns)
    };
    let (rows, parts) = (busy().sum::<u32>(), busy().count() as u32);
    if rows > MOST * parts || tiles_of(MOST, 512) >= multiprocessors / 2 {
        return None;
    }
    let tile_rows = busy().max().unwrap_or(1).clamp(FEW_ROW_BOX, MOST).next_power_of_two();
    let tiles = tiles_of(tile_rows, FEW_TILE * together).max(1);
    // Not all clusters fit that would by count, and one more round of a few takes as long as one of all.
    let resident = multiprocessors * RESIDENT / together;
    let clusters = match together {
        1 => resident.clamp(1, tiles),
        _ => tiles.div_ceil(tiles.div_ceil((resident - resident / 16).max(1))),
    };
    Some(Plan { tile_rows, grid: clusters * together })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blocks(rows: &[u32]) -> Vec<Block> {
        let starts = rows.iter().scan(0, |end, &rows| Some(std::mem::replace(end, *end + rows)));
        starts.zip(rows).map(|(row0, &rows)| Block { row0, rows, weight: 0 }).collect()
    }

    #[test]
    fn plans_follow_the_rows() {
        let plan = |rows: &[u32]| plan(&blocks(rows), 3072, 5120, 132);
        assert_eq!(plan(&[20]).operations(false)[0], "gemm_hopper64");
        assert_eq!(plan(&[20]).grid, 24, "a cluster for each of twelve tiles");
        assert_eq!(plan(&[4096; 20]).tile_rows, 256);
        assert_eq!(plan(&[4096; 20]).grid, 132);
        assert_eq!(plan(&[0, 300, 0]).grid % 2, 0);
    }

    #[test]
    fn parts_are_rows_of_one_matrix_or_not() {
        let part = |x: u64, out: u64, rows: u32| GemmPart {
            x,
            out,
            rows,
            x_stride: 8,
            out_stride: 16,
            ..bytemuck::Zeroable::zeroed()
        };
        let rows = |parts: &[GemmPart]| common_rows(parts, [2; 2]);
        assert_eq!(rows(&[part(64, 128, 3), part(64 + 5 * 16, 128 + 5 * 32, 1)]), Some(vec![0, 5]));
        assert_eq!(rows(&[part(64, 128, 3), part(64 + 5 * 16, 128 + 4 * 32, 1)]), None, "other rows");
        assert_eq!(rows(&[part(64, 128, 3), part(64 + 8, 128 + 5 * 32, 1)]), None, "other columns");
        assert_eq!(rows(&[part(66, 128, 3)]), None, "not on 16 bytes");
        assert_eq!(common_rows(&[part(64, 128, 3), part(64 + 160, 128 + 320, 1)], [4, 4]), Some(vec![0, 5]));
    }

    #[test]
    fn codes_come_in_low_tiles_where_tall_ones_would_leave_the_gpu_idle() {
        let tile_rows = |rows: &[u32]| plan_codes(&blocks(rows), 3072, 5120, 132).tile_rows;
        assert_eq!(tile_rows(&[4096; 20]), 128);
        assert_eq!(tile_rows(&[1; 20]), 64);
        assert_eq!(tile_rows(&[128; 4]), 64, "of 66 clusters 24 would be busy for twice as long");
    }

    #[test]
    fn few_rows_of_codes_have_tiles_of_their_own_where_weights_are_few() {
        let plan = |rows: &[u32], n, together| plan_few_codes(&blocks(rows), n, together, 132);
        assert_eq!(plan(&[1], 5120, 1), Some(Plan { tile_rows: 8, grid: 80 }));
        assert_eq!(plan(&[1; 8], 1536, 4), Some(Plan { tile_rows: 8, grid: 192 }));
        assert_eq!(plan(&[9; 8], 2048, 1), Some(Plan { tile_rows: 16, grid: 256 }));
        assert_eq!(
            plan(&[1; 6], 2816, 4).map(|plan| plan.grid),
            Some(132),
            "two rounds of 33 clusters, not one of 62"
        );
        assert_eq!(plan(&[1; 112], 1536, 4), None, "many weights");
        assert_eq!(plan(&[65], 512, 1), None, "many rows");
    }
}
