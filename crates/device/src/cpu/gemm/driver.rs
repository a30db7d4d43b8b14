//! Cuts products into tasks for the pool and walks the tiles of each task.
//!
//! A *chunk* is a range of rows of one problem that a thread packs at once; a *task* is a chunk times
//! a range of panels. Within a task the weights are the slow stream: a block of a panel (at most
//! `BLOCK_STEPS · n` steps, a quarter of an L2 cache) stays in L2 while all tiles of rows pass over it,
//! and meanwhile the block that follows is prefetched, so that each weight comes from memory once a
//! chunk, in the background. Where a chunk has so few rows that the kernels wait for weights all the time,
//! they take several panels at once and prefetch by themselves.

use super::epilogue::Finish;
use super::kernel::{BLOCK_STEPS, Blocks, Functions, Prefetch, SPARE_ROWS, Several, Tile};
use super::pack::{AlignedWords, ElementType, PackedMatrix};
use crate::cpu::pool::{Claims, ComputePool};
use crate::cpu::{prefetch, prefetch_all};
use crate::host::{Element, GemmViews, even_part};
use epsmoe_base::DType;
use std::cell::RefCell;
use std::ops::Range;

/// Steps of a panel that the tiles pass over at a time: 256 KiB of weights for 32 columns. For a
/// longer K the sums wait in f32, which is exact.
const PANEL_BLOCK_STEPS: usize = 16 * BLOCK_STEPS;

/// Packed activations of a chunk, in words: half a MiB. An L2 cache has room for more, but does not forget what was used
/// longest ago first: with a MiB and two blocks of weights, a cache of 2 MiB has already lost some of it.
const CHUNK_WORDS: usize = 1 << 17;

/// Tasks a thread should get, so that threads finish at about the same time.
const TASKS_PER_THREAD: usize = 32;

/// Below this many rows a panel's time is that of reading it, so it is counted as this many rows.
const ROWS_OF_A_PANEL_READ: usize = 8;

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
struct Chunk {
    part: usize,
    rows: Range<usize>,
    /// The kernels for several panels at once, where the rows are so few that reading weights is all that counts.
    several: Option<&'static Several>,
    first_task: usize,
    tasks: usize,
}

/// All tasks of one call, numbered chunk by chunk.
struct Plan {
    chunks: Vec<Chunk>,
    panels: usize,
    tasks: usize,
}

/// One task: some panels of one chunk.
struct Task {
    chunk: usize,
    part: usize,
    rows: Range<usize>,
    panels: Range<usize>,
    several: Option<&'static Several>,
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

    /// All of `panels` one by one.
    fn alone(panels: Range<usize>) -> impl Iterator<Item = PanelGroup> {
        panels.map(|first| PanelGroup { first, apart: 0, count: 1 })
    }

    /// All of `panels` as neighbours, at most `most` at once.
    fn neighbours(panels: Range<usize>, most: usize) -> impl Iterator<Item = PanelGroup> {
        let end = panels.end;
        panels.step_by(most).map(move |first| PanelGroup { first, apart: 1, count: most.min(end - first) })
    }

    /// All of `panels` in pairs, but for the last of an odd number. Each half of the pairs then is one stream of weights, in
    /// which a panel is followed by its neighbour.
    fn pairs(panels: Range<usize>) -> impl Iterator<Item = PanelGroup> {
        let apart = panels.len() / 2;
        let paired = panels.start..panels.start + apart;
        let pairs = paired.map(move |first| PanelGroup { first, apart, count: 2 });
        pairs.chain(Self::alone(panels.start + 2 * apart..panels.end))
    }

    /// All of `panels` as kernels for `several` take them, if there are such.
    fn of(panels: Range<usize>, several: Option<&Several>) -> Box<dyn Iterator<Item = PanelGroup>> {
        match several {
            None => Box::new(Self::alone(panels)),
            Some(several) if several.neighbours => Box::new(Self::neighbours(panels, several.panels)),
            Some(_) => Box::new(Self::pairs(panels)),
        }
    }
}

impl Plan {
    fn new<X: Element, Y: Element>(parts: &[GemmViews<'_, X, Y, PackedMatrix>], threads: usize) -> Self {
        let shape = parts[0].matrix;
        let panels = shape.panels();
        let Functions { tiles, several, chunk_rows, .. } = shape.functions();
        let tile_rows = tiles.len();
        let most_rows = (CHUNK_WORDS / shape.steps().max(1)).min(*chunk_rows);
        let most_tiles = (most_rows / tile_rows).max(1);
        let cost = |rows: usize| rows.max(ROWS_OF_A_PANEL_READ) * panels;
        let mut plan = Plan { chunks: Vec::new(), panels, tasks: 0 };
        for (part, views) in parts.iter().enumerate() {
            // Rows are cut into tiles first, so that chunks do not end in tiles that are half empty.
            let (rows, tiles) = (0..views.x.rows, views.x.rows.div_ceil(tile_rows));
            for chunk in even_parts(0..tiles, tiles.div_ceil(most_tiles)) {
                let rows = even_part(rows.clone(), tiles, chunk.start).start
                    ..even_part(rows.clone(), tiles, chunk.end).start;
                let several = (rows.len() <= several.tiles.len()).then_some(several);
                plan.chunks.push(Chunk { part, rows, several, first_task: 0, tasks: 0 });
            }
        }
        let total: usize = plan.chunks.iter().map(|chunk| cost(chunk.rows.len())).sum();
        let task_cost = (total / (threads * TASKS_PER_THREAD)).max(1);
        for chunk in &mut plan.chunks {
            chunk.first_task = plan.tasks;
            chunk.tasks = cost(chunk.rows.len())
                .div_ceil(task_cost)
                .min(panels.div_ceil(panels_together(chunk.several)));
            plan.tasks += chunk.tasks;
        }
        plan
    }

    fn task(&self, number: usize) -> Task {
        let chunk_index = self.chunks.partition_point(|chunk| chunk.first_task <= number) - 1;
        let chunk = &self.chunks[chunk_index];
        let together = panels_together(chunk.several);
        let groups = even_part(0..self.panels.div_ceil(together), chunk.tasks, number - chunk.first_task);
        Task {
            chunk: chunk_index,
            part: chunk.part,
            rows: chunk.rows.clone(),
            panels: groups.start * together..self.panels.min(groups.end * together),
            several: chunk.several,
        }
    }
}

/// Panels between which tasks are not cut.
fn panels_together(several: Option<&Several>) -> usize {
    several.filter(|several| !several.neighbours).map_or(1, |several| several.panels)
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
    /// Activations of a chunk: tile after tile; within a tile block after block of `BLOCK_STEPS`
    /// steps; within a block row after row, `BLOCK_STRIDE` words each.
    activations: AlignedWords,
    /// f32 sums of a chunk for one panel, `[rows, width]`.
    sums: AlignedWords,
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = RefCell::new(Scratch {
        activations: AlignedWords::zeros(0),
        sums: AlignedWords::zeros(0),
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
                if packed_chunk != Some(task.chunk) {
                    self.pack_activations(&task, &mut scratch.activations);
                    packed_chunk = Some(task.chunk);
                }
                self.run(&task, next.as_ref(), scratch);
            }
        });
    }

    /// The tiles of a task's chunk, as ranges of its rows counted from 0: a kernel for several panels takes all rows.
    fn tiles(&self, task: &Task) -> impl ExactSizeIterator<Item = Range<usize>> {
        let most = self.shape.functions().tiles.len();
        let count = if task.several.is_some() { 1 } else { task.rows.len().div_ceil(most) };
        even_parts(0..task.rows.len(), count)
    }

    /// Words that one row takes in `Scratch::activations`.
    fn packed_row_words(&self) -> usize {
        self.shape.functions().blocks.row_words(self.shape.steps())
    }

    fn pack_activations(&self, task: &Task, packed: &mut AlignedWords) {
        let (rows, x) = (&task.rows, &self.parts[task.part].x);
        let row_words = self.packed_row_words();
        let Blocks { steps, stride, pack } = self.shape.functions().blocks;
        packed.grow(rows.len() * row_words + SPARE_ROWS * stride);
        let per_block = steps * size_of::<u32>();
        for tile in self.tiles(task) {
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
        let matrix = self.parts[task.part].matrix;
        let (at_once, block_steps) = match task.several {
            None => (1, PANEL_BLOCK_STEPS),
            Some(several) if several.neighbours => (several.panels, steps),
            Some(several) => (several.panels, PANEL_BLOCK_STEPS),
        };
        scratch.sums.grow((at_once * task.rows.len() + SPARE_ROWS) * width);
        for group in PanelGroup::of(task.panels.clone(), task.several) {
            for start in (0..steps).step_by(block_steps) {
                let block = start..steps.min(start + block_steps);
                let last = block.end == steps && group.first + group.count == task.panels.end;
                let following = match next {
                    Some(next) if last => self.parts[next.part].matrix.panel(next.panels.start).as_ptr(),
                    _ => matrix.panel(group.first).as_ptr().wrapping_add(block.end * width),
                };
                self.multiply_block(task, group, block, following.cast(), scratch);
            }
        }
    }

    /// Adds one block of a panel, or of two, to the sums of all tiles, prefetching the block that follows. A tile whose
    /// sums will be complete asks for its lines of the output, and is stored at once.
    fn multiply_block(
        &self,
        task: &Task,
        group: PanelGroup,
        block: Range<usize>,
        following: *const u8,
        scratch: &mut Scratch,
    ) {
        let functions = self.shape.functions();
        let kernels = match task.several {
            Some(several) if several.neighbours || group.count > 1 => several.tiles,
            _ => functions.tiles,
        };
        let width = functions.width();
        let matrix = self.parts[task.part].matrix;
        let [weights, last] = [group.first, group.first + (group.count - 1) * group.apart]
            .map(|panel| &matrix.panel(panel)[block.start * width..block.end * width]);
        let row_words = self.packed_row_words();
        let tiles = self.tiles(task);
        let count = tiles.len();
        for (index, rows) in tiles.enumerate() {
            let first_block = functions.blocks.row_words(block.start) * rows.len();
            let end = rows.end * row_words + SPARE_ROWS * functions.blocks.stride;
            let activations = &scratch.activations[rows.start * row_words..end][first_block..];
            let own_sums = group.count * rows.len() * width;
            let sums = &mut scratch.sums[rows.start * width..][..own_sums + SPARE_ROWS * width];
            let outputs = task.rows.start + rows.start..task.rows.start + rows.end;
            let complete = block.end == self.shape.steps();
            if complete {
                group.panels().for_each(|panel| self.prefetch_outputs(task.part, outputs.clone(), panel));
            }
            let share = size_of_val(weights) / count;
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
                    self.store(task.part, outputs.clone(), panel, sums);
                }
            }
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
        fn panels(groups: impl Iterator<Item = PanelGroup>) -> Vec<Vec<usize>> {
            groups.map(|group| group.panels().collect()).collect()
        }
        assert_eq!(panels(PanelGroup::pairs(8..13)), [vec![8, 10], vec![9, 11], vec![12]]);
        assert_eq!(panels(PanelGroup::neighbours(8..13, 3)), [vec![8, 9, 10], vec![11, 12]]);
        assert_eq!(panels(PanelGroup::alone(8..13)), [[8], [9], [10], [11], [12]]);
    }
}
