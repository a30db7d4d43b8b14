//! Cuts products into tasks for the pool and walks the tiles of each task.
//!
//! A *chunk* is a range of rows of one problem that a thread packs at once; a *task* is a chunk times
//! a range of panels. Within a task the weights are the slow stream: a block of a panel (at most
//! `BLOCK_STEPS · n` steps, a quarter of an L2 cache) stays in L2 while all tiles of rows pass over it,
//! and meanwhile the block that follows is prefetched, so that each weight comes from memory once a
//! chunk, in the background.

use super::kernel::{BLOCK_STEPS, BLOCK_STRIDE, Functions, Prefetch, Tile};
use super::pack::{AlignedWords, ElementType, PackedMatrix, bytes_to_words};
use crate::cpu::pool::{Claims, ComputePool};
use crate::cpu::prefetch;
use crate::host::{Element, GemmViews};
use epsmoe_base::DType;
use std::cell::RefCell;
use std::ops::Range;

/// Steps of a panel that the tiles pass over at a time: 256 KiB of weights for 32 columns. For a
/// longer K the sums wait in f32, which is exact.
const PANEL_BLOCK_STEPS: usize = 16 * BLOCK_STEPS;

/// Packed activations of a chunk, in words: 1 MiB, so that they stay in an L2 cache or nearly so.
const CHUNK_WORDS: usize = 1 << 18;

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
}

impl Plan {
    fn new<X: Element, Y: Element>(parts: &[GemmViews<'_, X, Y, PackedMatrix>], threads: usize) -> Self {
        let shape = parts[0].matrix;
        let panels = shape.panels();
        let Functions { tiles, chunk_rows, .. } = shape.functions();
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
                plan.chunks.push(Chunk { part, rows, first_task: 0, tasks: 0 });
            }
        }
        let total: usize = plan.chunks.iter().map(|chunk| cost(chunk.rows.len())).sum();
        let task_cost = (total / (threads * TASKS_PER_THREAD)).max(1);
        for chunk in &mut plan.chunks {
            chunk.first_task = plan.tasks;
            chunk.tasks = cost(chunk.rows.len()).div_ceil(task_cost).min(panels);
            plan.tasks += chunk.tasks;
        }
        plan
    }

    fn task(&self, number: usize) -> Task {
        let chunk_index = self.chunks.partition_point(|chunk| chunk.first_task <= number) - 1;
        let chunk = &self.chunks[chunk_index];
        Task {
            chunk: chunk_index,
            part: chunk.part,
            rows: chunk.rows.clone(),
            panels: even_part(0..self.panels, chunk.tasks, number - chunk.first_task),
        }
    }
}

/// Part `index` of `range` cut into `parts` parts whose lengths differ by at most one.
fn even_part(range: Range<usize>, parts: usize, index: usize) -> Range<usize> {
    let cut = |index| range.start + range.len() * index / parts;
    cut(index)..cut(index + 1)
}

fn even_parts(range: Range<usize>, parts: usize) -> impl Iterator<Item = Range<usize>> {
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

    /// The tiles of a chunk, as ranges of its rows counted from 0.
    fn tiles(&self, rows: usize) -> impl Iterator<Item = Range<usize>> {
        even_parts(0..rows, rows.div_ceil(self.shape.functions().tiles.len()))
    }

    /// Words that one row takes in `Scratch::activations`.
    fn packed_row_words(&self) -> usize {
        self.shape.steps().div_ceil(BLOCK_STEPS) * BLOCK_STRIDE
    }

    fn pack_activations(&self, task: &Task, packed: &mut AlignedWords) {
        let (rows, x) = (&task.rows, &self.parts[task.part].x);
        let row_words = self.packed_row_words();
        packed.grow(rows.len() * row_words);
        let per_block = BLOCK_STEPS * size_of::<u32>();
        for tile in self.tiles(rows.len()) {
            let tile_words = &mut packed[tile.start * row_words..tile.end * row_words];
            for (index, row) in tile.clone().enumerate() {
                let row = x.row(rows.start + row);
                let blocks = tile_words.chunks_exact_mut(tile.len() * BLOCK_STRIDE);
                for (block, bytes) in blocks.zip(bytemuck::cast_slice(row).chunks(per_block)) {
                    bytes_to_words(bytes, &mut block[index * BLOCK_STRIDE..][..BLOCK_STEPS]);
                }
            }
        }
    }

    fn run(&self, task: &Task, next: Option<&Task>, scratch: &mut Scratch) {
        let steps = self.shape.steps();
        let width = self.shape.functions().width();
        let matrix = self.parts[task.part].matrix;
        scratch.sums.grow(task.rows.len() * width);
        for panel in task.panels.clone() {
            for start in (0..steps).step_by(PANEL_BLOCK_STEPS) {
                let block = start..steps.min(start + PANEL_BLOCK_STEPS);
                let last = block.end == steps && panel + 1 == task.panels.end;
                let following = match next {
                    Some(next) if last => self.parts[next.part].matrix.panel(next.panels.start).as_ptr(),
                    _ => matrix.panel(panel).as_ptr().wrapping_add(block.end * width),
                };
                self.multiply_block(task, panel, block, following.cast(), scratch);
            }
        }
    }

    /// Adds one block of a panel to the sums of all tiles, prefetching the block that follows. A tile whose sums will be
    /// complete asks for its lines of the output, and is stored at once.
    fn multiply_block(
        &self,
        task: &Task,
        panel: usize,
        block: Range<usize>,
        following: *const u8,
        scratch: &mut Scratch,
    ) {
        let functions = self.shape.functions();
        let width = functions.width();
        let weights = &self.parts[task.part].matrix.panel(panel)[block.start * width..block.end * width];
        let row_words = self.packed_row_words();
        let tiles = self.tiles(task.rows.len());
        let count = task.rows.len().div_ceil(functions.tiles.len());
        for (index, rows) in tiles.enumerate() {
            let first_block = block.start / BLOCK_STEPS * rows.len() * BLOCK_STRIDE;
            let activations =
                &scratch.activations[rows.start * row_words..rows.end * row_words][first_block..];
            let sums = &mut scratch.sums[rows.start * width..rows.end * width];
            let outputs = task.rows.start + rows.start..task.rows.start + rows.end;
            let complete = block.end == self.shape.steps();
            if complete {
                self.prefetch_outputs(task.part, outputs.clone(), panel);
            }
            let share = size_of_val(weights) / count;
            let tile = Tile {
                steps: block.len(),
                activations: activations.as_ptr(),
                weights: weights.as_ptr(),
                sums: sums.as_mut_ptr().cast(),
                more: block.start > 0,
                prefetch: Prefetch::new(following.wrapping_add(index * share), share, block.len()),
            };
            // SAFETY: the table exists only where its instructions do; `weights` has `width` words a
            // step, `sums` a row of `width` for each row, and `activations` all blocks of these rows
            // from this one on.
            unsafe { functions.tiles[rows.len() - 1](tile) }
            if complete {
                self.store(task.part, outputs, panel, bytemuck::cast_slice_mut(sums));
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
    fn store(&self, part: usize, rows: Range<usize>, panel: usize, sums: &mut [f32]) {
        let functions = self.shape.functions();
        let width = functions.width();
        if self.shape.gated() {
            // SAFETY: the table exists only where its instructions do.
            unsafe { (functions.swiglu)(sums, functions.lanes) }
        }
        let first = panel * self.shape.panel_columns();
        let columns = first..self.shape.columns().min(first + self.shape.panel_columns());
        for (m, sums) in rows.zip(sums.chunks_exact_mut(width)) {
            let sums = &mut sums[..columns.len()];
            if let Some(bias) = self.bias {
                sums.iter_mut().zip(&bias[columns.clone()]).for_each(|(sum, bias)| *sum += bias);
            }
            // SAFETY: tasks differ in rows or in panels, and parts do not overlap.
            let out = unsafe { self.parts[part].out.columns_shared(m, columns.clone()) };
            match Y::DTYPE {
                DType::F32 => bytemuck::cast_slice_mut(out).copy_from_slice(sums),
                // SAFETY: the table exists only where its instructions do.
                _ => unsafe { (functions.round_to_bf16)(sums, bytemuck::cast_slice_mut(out)) },
            }
        }
    }
}
