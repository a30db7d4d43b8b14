//! Cuts products into tasks for the pool and walks the tiles of each task.
//!
//! A *chunk* is a range of rows of one problem that a thread packs at once; a *task* is a chunk times
//! a range of panels. Within a task the weights are the slow stream: a block of a panel (at most
//! `PANEL_BLOCK_STEPS`, a quarter of an L2 cache) stays in L2 while all tiles of rows pass over it,
//! and meanwhile the block that follows is prefetched, so that each weight comes from memory once a
//! chunk, in the background. Where a chunk has so few rows that the kernels wait for weights all the time,
//! they take several panels at once and prefetch by themselves.
//!
//! Weights in codes are decoded a short block of a panel at a time, into words that stay in L1 while all tiles of rows pass over
//! them.

use super::coded::{CodedProducts, CodedTile, Layout, SIDE, TILE};
use super::epilogue::Finish;
use super::kernel::{
    BLOCK_STEPS, Blocks, Functions, Grouping, PANEL_BLOCK_STEPS, Prefetch, SPARE_ROWS, Tile,
};
use super::pack::{AlignedWords, ElementType, PackedMatrix};
use crate::cpu::pool::{Claims, ComputePool};
use crate::cpu::{prefetch, prefetch_all};
use crate::threaded::{Element, GemmViews, even_part};
use epsmoe_base::DType;
use std::cell::RefCell;
use std::ops::Range;

/// Tasks a thread should get, so that threads finish at about the same time.
const TASKS_PER_THREAD: usize = 32;

/// Below this many rows a panel's time is that of reading it, so it is counted as this many rows.
const ROWS_OF_A_PANEL_READ: usize = 8;

/// Steps of a panel of codes that are decoded at a time: a multiple of the steps in any block of activations.
const DECODED_STEPS: usize = BLOCK_STEPS;

/// Every part's product, `out[m] = x[m] · Wᵀ (+ bias)`; for a gated matrix `silu(x[m] · Gᵀ) · (x[m] · Uᵀ)`.
/// All matrices have the same shape, type and form: the operation was checked.
pub(crate) fn multiply<X: Element, Y: Element>(
    pool: &mut ComputePool,
    parts: &mut [GemmViews<'_, X, Y, PackedMatrix>],
    bias: Option<&[f32]>,
) {
    let Some(first) = parts.first() else { return };
    let shape = first.matrix;
    for part in parts.iter() {
        assert!(part.matrix.same_kind(shape), "the matrices of one product differ in kind");
        assert_eq!(ElementType::of(X::DTYPE), shape.element(), "activations and weights differ in type");
    }
    let plan = Plan::new(parts, pool.threads());
    let product = Product { parts, plan: &plan, shape, bias };
    pool.run_claims(plan.tasks, |claims| product.work(claims));
}

/// A chunk of rows and how its panels are split into tasks.
#[derive(Clone)]
struct Chunk {
    part: usize,
    rows: Range<usize>,
    /// The kernels for 1, 2, … rows, and the panels that they take at once.
    tiles: &'static [unsafe fn(Tile)],
    grouping: Grouping,
    first_task: usize,
    tasks: usize,
}

impl Chunk {
    /// Its tiles, as ranges of its rows counted from 0.
    fn tiles(&self) -> impl ExactSizeIterator<Item = Range<usize>> + use<> {
        even_parts(0..self.rows.len(), self.rows.len().div_ceil(self.tiles.len()))
    }
}

/// All tasks of one call, numbered chunk by chunk.
struct Plan {
    chunks: Vec<Chunk>,
    panels: usize,
    tasks: usize,
}

/// One task: some panels of one chunk.
struct Task {
    chunk_index: usize,
    chunk: Chunk,
    panels: Range<usize>,
}

/// Panels, each `apart` panels after the one before, which a kernel takes at once.
#[derive(Clone, Copy, Debug, PartialEq)]
struct PanelGroup {
    first: usize,
    apart: usize,
    count: usize,
}

impl PanelGroup {
    fn panels(self) -> impl Iterator<Item = usize> {
        (0..self.count).map(move |index| self.first + index * self.apart)
    }
}

impl Grouping {
    /// Panels between which tasks are not cut.
    fn together(self) -> usize {
        match self {
            Grouping::Pairs => 2,
            Grouping::Runs(_) => 1,
        }
    }

    /// Tasks for `threads` that `panels` are cut into, at most: where a run ends, a thread pauses in reading weights.
    fn most_tasks(self, panels: usize, threads: usize) -> usize {
        match self {
            Grouping::Pairs => panels.div_ceil(2),
            Grouping::Runs(most) => {
                panels.div_ceil(most.div_ceil(2)).next_multiple_of(threads).min(panels).max(1)
            }
        }
    }

    /// Panels at once, at most.
    fn most(self) -> usize {
        match self {
            Grouping::Pairs => 2,
            Grouping::Runs(most) => most,
        }
    }

    /// Steps of a panel that the tiles pass over at a time.
    fn block_steps(self, steps: usize) -> usize {
        match self {
            Grouping::Runs(most) if most > 1 => steps.max(1),
            _ => PANEL_BLOCK_STEPS,
        }
    }

    /// All of `panels` in runs of neighbours, or in pairs, but for the last of an odd number. Each half of the pairs then is
    /// one stream of weights, in which a panel is followed by its neighbour.
    fn groups(self, panels: Range<usize>) -> impl Iterator<Item = PanelGroup> {
        let (end, pairs) = (panels.end, panels.len() / 2);
        let (paired, apart, step) = match self {
            Grouping::Pairs => (panels.start..panels.start + pairs, pairs, 1),
            Grouping::Runs(most) => (panels.start..panels.start, 1, most),
        };
        let others = paired.start + 2 * paired.len()..end;
        let runs = others.step_by(step);
        let runs = runs.map(move |first| PanelGroup { first, apart: 1, count: step.min(end - first) });
        paired.map(move |first| PanelGroup { first, apart, count: 2 }).chain(runs)
    }
}

impl Plan {
    fn new<X: Element, Y: Element>(parts: &[GemmViews<'_, X, Y, PackedMatrix>], threads: usize) -> Self {
        let shape = parts[0].matrix;
        let (panels, functions) = (shape.panels(), shape.functions());
        let Functions { tiles, run_words, several, chunk, blocks, .. } = functions;
        let most_rows = (chunk.words / blocks.row_words(shape.steps()).max(1)).min(chunk.rows);
        let most_tiles = (most_rows / tiles.len()).max(1);
        let run = run_words / shape.panel_words().max(1);
        let cost = |rows: usize| rows.max(ROWS_OF_A_PANEL_READ) * panels;
        let mut plan = Plan { chunks: Vec::new(), panels, tasks: 0 };
        for (part, views) in parts.iter().enumerate() {
            // Rows are cut into tiles first, so that chunks do not end in tiles that are half empty.
            let (rows, count) = (0..views.x.rows, views.x.rows.div_ceil(tiles.len()));
            for chunk in even_parts(0..count, count.div_ceil(most_tiles)) {
                let rows = even_part(rows.clone(), count, chunk.start).start
                    ..even_part(rows.clone(), count, chunk.end).start;
                let (tiles, grouping) = if let Some((_, products)) = shape.coded_products() {
                    (*tiles, Grouping::Runs((products.panels)(rows.len())))
                } else if shape.coded().is_some() {
                    // Sums of one row in one panel would wait for each other.
                    let pairs = rows.len() == 1 && !functions.fused.is_empty();
                    (*tiles, if pairs { Grouping::Pairs } else { Grouping::Runs(1) })
                } else if rows.len() <= several.tiles.len() {
                    (several.tiles, several.grouping)
                } else {
                    (*tiles, Grouping::Runs(run.max(1)))
                };
                plan.chunks.push(Chunk { part, rows, tiles, grouping, first_task: 0, tasks: 0 });
            }
        }
        let total: usize = plan.chunks.iter().map(|chunk| cost(chunk.rows.len())).sum();
        let task_cost = (total / (threads * TASKS_PER_THREAD)).max(1);
        for chunk in &mut plan.chunks {
            chunk.first_task = plan.tasks;
            let most = chunk.grouping.most_tasks(panels, threads);
            chunk.tasks = cost(chunk.rows.len()).div_ceil(task_cost).min(most);
            plan.tasks += chunk.tasks;
        }
        plan
    }

    fn task(&self, number: usize) -> Task {
        let chunk_index = self.chunks.partition_point(|chunk| chunk.first_task <= number) - 1;
        let chunk = self.chunks[chunk_index].clone();
        let together = chunk.grouping.together();
        let groups = even_part(0..self.panels.div_ceil(together), chunk.tasks, number - chunk.first_task);
        let panels = groups.start * together..self.panels.min(groups.end * together);
        Task { chunk_index, chunk, panels }
    }
}

/// Where step `step` of a panel begins; the end of the panel if there is no such step.
fn step_at(matrix: &PackedMatrix, panel: usize, step: usize) -> *const u8 {
    match matrix.coded() {
        None => {
            let words = step * matrix.functions().width();
            matrix.panel(panel).as_ptr().wrapping_add(words).cast()
        }
        Some(layout) => {
            let k = elements(matrix.element(), step..step, matrix.k()).start;
            matrix.coded_panel(&layout, panel).as_ptr().wrapping_add(layout.offset(k))
        }
    }
}

/// The elements along K that some steps have.
fn elements(element: ElementType, steps: Range<usize>, k: usize) -> Range<usize> {
    let each = match element {
        ElementType::F32 => 1,
        ElementType::Bf16 => 2,
    };
    (steps.start * each).min(k)..(steps.end * each).min(k)
}

fn even_parts(range: Range<usize>, parts: usize) -> impl ExactSizeIterator<Item = Range<usize>> {
    (0..parts).map(move |index| even_part(range.clone(), parts, index))
}

/// One call of [`multiply`].
struct Product<'a, 'v, X, Y> {
    parts: &'a [GemmViews<'v, X, Y, PackedMatrix>],
    plan: &'a Plan,
    shape: &'a PackedMatrix,
    bias: Option<&'a [f32]>,
}

/// A thread's buffers, kept from call to call.
struct Scratch {
    /// Activations of a chunk: tile after tile, in each as `Blocks` says.
    activations: AlignedWords,
    /// f32 sums of a chunk for the panels at hand, tile after tile `[panels, rows, width]`.
    sums: AlignedWords,
    /// The block of a panel at hand, if it had to be decoded.
    weights: AlignedWords,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        activations: AlignedWords::zeros(0),
        sums: AlignedWords::zeros(0),
        weights: AlignedWords::zeros(0),
    });
}

impl<X: Element, Y: Element> Product<'_, '_, X, Y> {
    /// Runs the tasks one thread claims.
    fn work(&self, mut claims: Claims<'_>) {
        SCRATCH.with_borrow_mut(|scratch| {
            let mut packed_chunk = None;
            while let Some(number) = claims.next() {
                let task = self.plan.task(number);
                let next = claims.look_ahead().map(|number| self.plan.task(number));
                if packed_chunk != Some(task.chunk_index) {
                    self.pack_activations(&task.chunk, &mut scratch.activations);
                    packed_chunk = Some(task.chunk_index);
                }
                self.run(&task, next.as_ref(), scratch);
            }
        });
    }

    /// Words that one row takes in `Scratch::activations`.
    fn packed_row_words(&self) -> usize {
        self.shape.functions().blocks.row_words(self.shape.steps())
    }

    fn pack_activations(&self, chunk: &Chunk, packed: &mut AlignedWords) {
        let (rows, x) = (&chunk.rows, &self.parts[chunk.part].x);
        if let Some((layout, CodedProducts { words, pack, .. })) = self.shape.coded_products() {
            let rows: Vec<&[u8]> = rows.clone().map(|row| bytemuck::cast_slice(x.row(row))).collect();
            packed.grow(words(&layout, rows.len()));
            // SAFETY: the table exists only where its instructions do.
            unsafe { pack(&layout, self.shape.element(), &rows, packed) };
            return;
        }
        let row_words = self.packed_row_words();
        let Blocks { steps, stride, pack } = self.shape.functions().blocks;
        packed.grow(rows.len() * row_words + SPARE_ROWS * stride);
        let per_block = steps * size_of::<u32>();
        for tile in chunk.tiles() {
            let tile_words = &mut packed[tile.start * row_words..tile.end * row_words];
            for (index, row) in tile.clone().enumerate() {
                let row = rows.start + row;
                let (row, next) = (x.row(row), x.row((row + 1).min(rows.end - 1)));
                let (row, next): (&[u8], &[u8]) = (bytemuck::cast_slice(row), bytemuck::cast_slice(next));
                let blocks = tile_words.chunks_exact_mut(tile.len() * stride);
                // The next row is on its way meanwhile: a processor does not look past the end of a row.
                for ((block, bytes), soon) in blocks.zip(row.chunks(per_block)).zip(next.chunks(per_block)) {
                    prefetch_all(soon);
                    // SAFETY: the table exists only where its instructions do.
                    unsafe { pack(bytes, &mut block[index * stride..][..stride]) };
                }
            }
        }
    }

    fn run(&self, task: &Task, next: Option<&Task>, scratch: &mut Scratch) {
        let steps = self.shape.steps();
        let width = self.shape.functions().width();
        let Task { chunk: Chunk { part, rows, grouping, .. }, panels, .. } = task;
        let matrix = self.parts[*part].matrix;
        let coded = self.shape.coded();
        let block_steps = if coded.is_some() { DECODED_STEPS } else { grouping.block_steps(steps) };
        if coded.is_some() {
            let decoded = self.shape.coded_products().map_or(0, |(_, products)| products.decoded_words);
            scratch.weights.grow(decoded.max((DECODED_STEPS + SIDE) * width));
        }
        let sums_rows = grouping.most() * rows.len() + SPARE_ROWS.max(TILE[0]);
        scratch.sums.grow(sums_rows * width);
        for group in grouping.groups(panels.clone()) {
            let last_panels = group.first + group.count == panels.end;
            let ordered = self.shape.coded_products().map(|(layout, products)| (layout, products.multiply));
            let fused = self.shape.functions().fused.get(rows.len() - 1).copied();
            if let Some((layout, multiply)) = ordered.or(coded.zip(fused)) {
                let following = match next {
                    Some(next) if last_panels => (self.parts[next.chunk.part].matrix, next.panels.start),
                    None if last_panels => (matrix, group.first),
                    _ => (matrix, group.first + group.count),
                };
                let following = following.0.coded_panel(&layout, following.1).as_ptr();
                self.multiply_codes(multiply, &task.chunk, group, &layout, following, scratch);
                continue;
            }
            for start in (0..steps).step_by(block_steps) {
                let block = start..steps.min(start + block_steps);
                let last = block.end == steps && last_panels;
                let following = match next {
                    Some(next) if last => step_at(self.parts[next.chunk.part].matrix, next.panels.start, 0),
                    _ => step_at(matrix, group.first, block.end),
                };
                self.multiply_block(&task.chunk, group, block, following, scratch);
            }
        }
    }

    /// Adds one block of some panels to the sums of all tiles, prefetching the block that follows. A tile whose sums will
    /// be complete asks for its lines of the output, and is stored at once.
    fn multiply_block(
        &self,
        chunk: &Chunk,
        group: PanelGroup,
        block: Range<usize>,
        following: *const u8,
        scratch: &mut Scratch,
    ) {
        let functions = self.shape.functions();
        let kernels = match chunk.grouping {
            Grouping::Pairs if group.count == 1 => functions.tiles,
            _ => chunk.tiles,
        };
        let width = functions.width();
        let matrix = self.parts[chunk.part].matrix;
        let Scratch { activations: packed, sums: all_sums, weights: decoded } = scratch;
        let ([weights, last], bytes) = match matrix.coded() {
            None => {
                let weights = [group.first, group.first + (group.count - 1) * group.apart]
                    .map(|panel| &matrix.panel(panel)[block.start * width..block.end * width]);
                (weights, size_of_val(weights[0]))
            }
            Some(layout) => {
                let k = elements(matrix.element(), block.clone(), matrix.k());
                let bytes = layout.offset(k.end) - layout.offset(k.start);
                // SAFETY: the table exists only where its instructions do.
                unsafe {
                    let panel = matrix.coded_panel(&layout, group.first);
                    (functions.decode)(&layout, panel, k, matrix.element(), decoded);
                }
                ([&decoded[..block.len() * width]; 2], bytes)
            }
        };
        let row_words = self.packed_row_words();
        let tiles = chunk.tiles();
        let count = tiles.len();
        for (index, rows) in tiles.enumerate() {
            let first_block = functions.blocks.row_words(block.start) * rows.len();
            let end = rows.end * row_words + SPARE_ROWS * functions.blocks.stride;
            let activations = &packed[rows.start * row_words..end][first_block..];
            let own_sums = group.count * rows.len() * width;
            let sums = &mut all_sums[group.count * rows.start * width..][..own_sums + SPARE_ROWS * width];
            let outputs = chunk.rows.start + rows.start..chunk.rows.start + rows.end;
            let complete = block.end == self.shape.steps();
            if complete {
                group.panels().for_each(|panel| self.prefetch_outputs(chunk.part, outputs.clone(), panel));
            }
            let share = bytes / count;
            let tile = Tile {
                steps: block.len(),
                panels: group.count,
                activations: activations.as_ptr(),
                weights: [weights, last].map(<[u32]>::as_ptr),
                sums: sums.as_mut_ptr().cast(),
                more: block.start > 0,
                prefetch: Prefetch::new(following.wrapping_add(index * share), share, block.len()),
            };
            // SAFETY: the table exists only where its instructions do; the weights of each panel have `width` words a
            // step, `sums` a row of `width` for each panel and row, and `activations` all blocks of these rows
            // from this one on, both with the spare rows.
            unsafe { kernels[rows.len() - 1](tile) }
            if complete {
                let sums = bytemuck::cast_slice(&sums[..own_sums]).chunks_exact(rows.len() * width);
                for (panel, sums) in group.panels().zip(sums) {
                    self.store(chunk.part, outputs.clone(), panel, sums);
                }
            }
        }
    }

    /// The product with panels of codes by a kernel that decodes where it multiplies.
    fn multiply_codes(
        &self,
        multiply: unsafe fn(&CodedTile<'_>),
        chunk: &Chunk,
        group: PanelGroup,
        layout: &Layout,
        following: *const u8,
        scratch: &mut Scratch,
    ) {
        let matrix = self.parts[chunk.part].matrix;
        let rows = chunk.rows.len();
        let panel = |index: usize| matrix.coded_panel(layout, group.first + index * group.apart).as_ptr();
        let tile = CodedTile {
            layout,
            rows,
            panels: [panel(0), panel(group.count - 1)],
            count: group.count,
            activations: scratch.activations.as_ptr(),
            following,
            decoded: scratch.weights.as_mut_ptr(),
            sums: scratch.sums.as_mut_ptr().cast(),
        };
        // SAFETY: the table exists only where its instructions do; the activations of the chunk are one tile of all its rows,
        // and `sums` has a row of the panel's width for each panel and row.
        unsafe { multiply(&tile) }
        let sums: &[f32] = bytemuck::cast_slice(&scratch.sums[..group.count * rows * layout.width]);
        for (panel, sums) in group.panels().zip(sums.chunks_exact(rows * layout.width)) {
            self.store(chunk.part, chunk.rows.clone(), panel, sums);
        }
    }

    /// Asks for where the outputs of some rows in one panel begin.
    fn prefetch_outputs(&self, part: usize, rows: Range<usize>, panel: usize) {
        let first = panel * self.shape.panel_columns();
        for m in rows {
            // SAFETY: tasks differ in rows or in panels, and parts do not overlap.
            let output = unsafe { self.parts[part].out.columns_shared(m, first..first + 1) };
            prefetch(output.as_ptr().cast());
        }
    }

    /// Finishes the sums of some rows in one panel and stores them.
    fn store(&self, part: usize, rows: Range<usize>, panel: usize, sums: &[f32]) {
        let functions = self.shape.functions();
        let first = panel * self.shape.panel_columns();
        let columns = first..self.shape.columns().min(first + self.shape.panel_columns());
        let out = &self.parts[part].out;
        let finish = Finish {
            sums,
            gated: self.shape.gated(),
            bias: self.bias.map(|bias| &bias[columns.clone()]),
            columns: columns.len(),
            out: out.block_shared(rows, columns),
            stride: out.stride,
        };
        // SAFETY: the table exists only where its instructions do. The block lies in the view, and nobody else touches
        // it: tasks differ in rows or in panels, and parts do not overlap. A type has one `DTYPE`.
        unsafe {
            match Y::DTYPE {
                DType::F32 => (functions.store_f32)(&finish.cast()),
                _ => (functions.store_bf16)(&finish.cast()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Five panels from 8 on. In pairs 8 goes with 10 and 9 with 11, so that one stream reads 8 and 9 and another 10 and 11;
    /// 12 is left alone. Three neighbours at once are read in order.
    #[test]
    fn groups_of_panels_worked_example() {
        fn panels(grouping: Grouping) -> Vec<Vec<usize>> {
            grouping.groups(8..13).map(|group| group.panels().collect()).collect()
        }
        assert_eq!(panels(Grouping::Pairs), [vec![8, 10], vec![9, 11], vec![12]]);
        assert_eq!(panels(Grouping::Runs(3)), [vec![8, 9, 10], vec![11, 12]]);
        assert_eq!(panels(Grouping::Runs(1)), [[8], [9], [10], [11], [12]]);
    }
}
