//! From an operation to a kernel and its arguments.

use super::Memory;
use super::driver::{Copy2d, CudaError, End, Event, EventPool, Function, Stream};
use super::hopper::{self, HopperArgs};
use super::kernels::{
    ATTENTION_64, ATTENTION_128, ATTENTION_MLA, AttentionTile, GemmTile, Kernels, LARGE, MIDDLE, MLA_WIDTHS,
    PLAIN, SMALL, SQUARE,
};
use super::report::Report;
use super::staging::{Staged, Staging};
use super::weights::WeightStore;
use crate::op::{
    self, Attention, Epilogue, ExpertGemm, Gemm, GroupScore, Norm, NormKind, Op, Reduce, RopeTable, Rotate,
    Route, TopKRouter,
};
use crate::op::{HostToDevice, RopeStyle, Score};
use crate::{Buffer, DeviceError, Weight};
use epsmoe_base::{DType, Fault};
use std::sync::Arc;

/// Threads of a block that goes element by element; `THREADS` in `common.cuh`.
const THREADS: usize = 256;

/// Columns that a thread takes at once; `RUN` in `common.cuh`.
const RUN: usize = 8;

/// Threads of a warp, and columns that one takes at once; `RUNS * STRIDE` in `common.cuh`.
const WARP: usize = 32;
const STRETCH: usize = 4 * WARP * RUN;

/// Most blocks along the second axis of a grid.
const MOST_ROWS: usize = 65_535;

/// The twin of `Rows` in `common.cuh`: a buffer as a kernel sees it.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct Rows {
    start: u64,
    stride: u64,
    rows: u32,
    width: u32,
}

/// Arguments of a kernel that follows indices: its three views and where to complain.
#[repr(C)]
#[derive(Clone, Copy)]
struct Indexed {
    views: [Rows; 3],
    report: Report,
}

/// The twin of `GemmPart` in `gemm.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct GemmPart {
    pub(super) x: u64,
    pub(super) weight: u64,
    pub(super) out: u64,
    pub(super) x_stride: u64,
    pub(super) out_stride: u64,
    pub(super) rows: u32,
    pub(super) first_tile: u32,
}

// SAFETY: all its bits may be zero.
unsafe impl bytemuck::Zeroable for GemmPart {}
// SAFETY: plain integers without padding: five of eight bytes, two of four.
unsafe impl bytemuck::Pod for GemmPart {}

/// The twin of `GemmArgs` in `gemm.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct GemmArgs {
    parts: u64,
    only: GemmPart,
    bias: u64,
    part_count: u32,
    padding: u32,
    n: u32,
    k: u32,
    weight_stride: u64,
    vectors: u32,
    columns: u32,
}

/// What the products of one operation have in common.
struct Products<'a> {
    /// Of each product.
    weights: Vec<&'a Weight>,
    epilogue: Epilogue,
    bias: Option<&'a Weight>,
    /// Formats of the input and the output.
    from: DType,
    to: DType,
    /// Of the output.
    columns: usize,
    tile: GemmTile,
    /// The operation, if only the GPU knows how many rows each product has.
    decided: Option<&'a ExpertGemm>,
}

/// The twin of `Args` in `attention.cuh`.
#[repr(C)]
#[derive(Clone, Copy)]
struct AttentionArgs {
    q: Rows,
    keys: Rows,
    values: Rows,
    starts: Rows,
    positions: Rows,
    blocks: Rows,
    out: Rows,
    report: Report,
    block_size: u32,
    heads: u32,
    kv_heads: u32,
    scale: f32,
    window: u32,
    vectors: u32,
}

/// Why an operation did not start.
pub(super) enum Refusal {
    /// Its arguments are at fault.
    Arguments(DeviceError),
    /// The GPU is at fault, now or in earlier work.
    Gpu(CudaError),
    /// Work that is no operation stopped the world.
    World(Fault),
}

impl From<DeviceError> for Refusal {
    fn from(error: DeviceError) -> Self {
        Refusal::Arguments(error)
    }
}

impl From<CudaError> for Refusal {
    fn from(error: CudaError) -> Self {
        Refusal::Gpu(error)
    }
}

/// What a launch needs besides the operation. Whoever makes one holds the lock on enqueueing, and the hazard
/// check has passed: that is why the memory named by the operation may be given to a kernel.
pub(super) struct Launch<'a> {
    pub(super) kernels: &'a Kernels,
    pub(super) weights: &'a WeightStore,
    pub(super) staging: &'a mut Staging,
    pub(super) events: &'a Arc<EventPool>,
    pub(super) stream: &'a Stream,
    /// Where products of this lane draw their tiles from.
    pub(super) tickets: u64,
    pub(super) memory: &'a Memory,
    pub(super) report: Report,
    /// Multiprocessors that products may fill.
    pub(super) multiprocessors: u32,
}

impl Launch<'_> {
    /// Enqueues an operation that passed its own check.
    pub(super) fn run(&mut self, op: &Op) -> Result<(), Refusal> {
        match op {
            Op::HostToDevice(op) => self.host_to_device(op),
            Op::Gemm(op) => self.gemm(op),
            Op::Norm(op) => self.norm(op),
            Op::RopeTable(op) => self.rope_table(op),
            Op::Rotate(op) => self.rotate(op),
            Op::Attention(op) => self.attention(op),
            Op::Route(op) => self.route(op),
            Op::ArgMax(op) => {
                if is_empty(&op.logits) {
                    return Ok(());
                }
                #[repr(C)]
                #[derive(Clone, Copy)]
                struct Args([Rows; 2], Report);
                let arguments = Args([self.rows(&op.logits)?, self.rows(&op.tokens)?], self.report);
                let kernel = self.kernels.get("argmax", DType::F32, DType::F32)?;
                self.start(&kernel.function, (op.logits.rows as u32, 1), 0, arguments)
            }
            Op::AssignSlots(op) => self.assign_slots(op),
            Op::CountSlots(op) => self.count_slots(op),
            Op::SendOrder(op) => self.send_order(op),
            Op::ReceiveOrder(op) => self.receive_order(op),
            Op::SortBySlot(op) => self.sort_by_slot(op),
            Op::ExpertGemm(op) => self.expert_gemm(op),
            Op::Reduce(op) => self.reduce(op),
            Op::Embed(op) => {
                let table = self.weights.get(&op.table)?;
                let rows = Rows {
                    start: table.start,
                    stride: table.stride as u64,
                    rows: table.rows as u32,
                    width: table.width as u32,
                };
                let views = [self.rows(&op.ids)?, rows, self.rows(&op.out)?];
                let arguments = Indexed { views, report: self.report };
                self.runs("embed", table.dtype, op.out.dtype, &op.out, arguments)
            }
            Op::KvWrite(op) => {
                let views = [self.rows(&op.x)?, self.rows(&op.slots)?, self.rows(&op.cache)?];
                let arguments = Indexed { views, report: self.report };
                self.runs("kv_write", op.x.dtype, op.cache.dtype, &op.x, arguments)
            }
            Op::Gather(op) => {
                let views = [self.rows(&op.x)?, self.rows(&op.index)?, self.rows(&op.out)?];
                let arguments = Indexed { views, report: self.report };
                self.stretches("gather", op.x.dtype, op.out.dtype, &op.out, arguments)
            }
            Op::Add(op) => {
                let arguments = [self.rows(&op.x)?, self.rows(&op.out)?];
                self.runs("add", op.x.dtype, op.out.dtype, &op.out, arguments)
            }
            Op::Copy(op) => {
                let arguments = [self.rows(&op.x)?, self.rows(&op.out)?];
                self.runs("copy", op.x.dtype, op.out.dtype, &op.out, arguments)
            }
            Op::Clamp(op) => {
                #[repr(C)]
                #[derive(Clone, Copy)]
                struct Args(Rows, f32, u32);
                let arguments = Args(self.rows(&op.x)?, op.limit, 0);
                self.runs("clamp", op.x.dtype, op.x.dtype, &op.x, arguments)
            }
            Op::GateRows(op) => {
                let arguments = [self.rows(&op.gate)?, self.rows(&op.x)?];
                self.runs("gate_rows", op.x.dtype, op.x.dtype, &op.x, arguments)
            }
        }
    }

    fn host_to_device(&mut self, op: &HostToDevice) -> Result<(), Refusal> {
        let width = op.out.width;
        if op.words.is_empty() {
            return Ok(());
        }
        let to = self.rows(&op.out)?;
        let longest = Staging::LONGEST / size_of::<u32>();
        // Rows without gaps are one long row, which may be cut anywhere; others are cut between rows.
        let (width, stride, piece) = if op.out.stride == width || op.out.rows == 1 {
            (1, 1, longest)
        } else {
            (width, op.out.stride, longest / width * width)
        };
        if piece == 0 {
            return Err(
                DeviceError::Shape(format!("host_to_device: the rows of {:?} are too long", op.out)).into()
            );
        }
        for (index, words) in op.words.chunks(piece).enumerate() {
            let staged = self.stage(bytemuck::cast_slice(words))?;
            let (bytes, rows) = (width * size_of::<u32>(), words.len() / width);
            let start = to.start + (index * (piece / width) * stride * size_of::<u32>()) as u64;
            let copy = match width {
                1 if stride == 1 => Copy2d {
                    from: End::Host(staged.host.cast()),
                    from_pitch: bytes * rows,
                    to: End::Device(start),
                    to_pitch: bytes * rows,
                    width: bytes * rows,
                    rows: 1,
                },
                _ => Copy2d {
                    from: End::Host(staged.host.cast()),
                    from_pitch: bytes,
                    to: End::Device(start),
                    to_pitch: stride * size_of::<u32>(),
                    width: bytes,
                    rows,
                },
            };
            // SAFETY: the ring's piece is ours until `sent`'s event; the target is declared by the operation and
            // ordered by the hazard check.
            unsafe { self.stream.copy(&copy) }?;
            self.sent(&staged)?;
        }
        Ok(())
    }

    fn norm(&mut self, op: &Norm) -> Result<(), Refusal> {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Args {
            x: Rows,
            out: Rows,
            weight: u64,
            eps: f32,
            centred: u32,
            report: Report,
        }
        if is_empty(&op.out) {
            return Ok(());
        }
        let arguments = Args {
            x: self.rows(&op.x)?,
            out: self.rows(&op.out)?,
            weight: self.weights.get(&op.weight)?.start,
            eps: op.eps,
            centred: u32::from(op.kind == NormKind::Layer),
            report: self.report,
        };
        let kernel = self.kernels.get("norm", op.x.dtype, op.out.dtype)?;
        self.start(&kernel.function, (op.out.rows as u32, 1), 0, arguments)
    }

    fn rope_table(&mut self, op: &RopeTable) -> Result<(), Refusal> {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Args {
            positions: Rows,
            out: Rows,
            frequencies: u64,
            scale: f32,
            padding: u32,
        }
        let arguments = Args {
            positions: self.rows(&op.positions)?,
            out: self.rows(&op.out)?,
            frequencies: self.weights.get(&op.frequencies)?.start,
            scale: op.scale,
            padding: 0,
        };
        self.elements("rope_table", DType::F32, DType::F32, &op.out, arguments)
    }

    fn rotate(&mut self, op: &Rotate) -> Result<(), Refusal> {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Args {
            x: Rows,
            angles: Rows,
            pairs: Rows,
            head_width: u32,
            first: u32,
            interleaved: u32,
            padding: u32,
        }
        let pairs = Buffer { width: op.x.width / op.head_width * (op.angles.width / 2), ..op.x.clone() };
        let arguments = Args {
            x: self.rows(&op.x)?,
            angles: self.rows(&op.angles)?,
            pairs: Rows { rows: pairs.rows as u32, width: pairs.width as u32, ..Rows::default() },
            head_width: op.head_width as u32,
            first: op.start as u32,
            interleaved: u32::from(op.style == RopeStyle::Interleaved),
            padding: 0,
        };
        self.elements("rotate", op.x.dtype, op.x.dtype, &pairs, arguments)
    }

    fn reduce(&mut self, op: &Reduce) -> Result<(), Refusal> {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Args {
            x: Rows,
            index: Rows,
            weights: Rows,
            addend: Rows,
            out: Rows,
            report: Report,
            weighted: u32,
            added: u32,
        }
        let optional =
            |buffer: &Option<Buffer>| buffer.as_ref().map_or(Ok(Rows::default()), |buffer| self.rows(buffer));
        let arguments = Args {
            x: self.rows(&op.x)?,
            index: self.rows(&op.index)?,
            weights: optional(&op.weights)?,
            addend: optional(&op.addend)?,
            out: self.rows(&op.out)?,
            report: self.report,
            weighted: u32::from(op.weights.is_some()),
            added: u32::from(op.addend.is_some()),
        };
        self.stretches("reduce", op.x.dtype, op.out.dtype, &op.out, arguments)
    }

    fn route(&mut self, op: &Route) -> Result<(), Refusal> {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Args {
            logits: Rows,
            experts: Rows,
            weights: Rows,
            bias: u64,
            scale: f32,
            top_k: u32,
            sigmoid: u32,
            normalise: u32,
            groups: u32,
            kept: u32,
            two_best: u32,
            epsilon: f32,
        }
        if is_empty(&op.logits) {
            return Ok(());
        }
        let groups = op.gate.groups;
        let arguments = Args {
            logits: self.rows(&op.logits)?,
            experts: self.rows(&op.experts)?,
            weights: self.rows(&op.weights)?,
            bias: op.bias.as_ref().map_or(Ok(0), |bias| self.weights.get(bias).map(|held| held.start))?,
            scale: op.gate.scale,
            top_k: op.gate.top_k as u32,
            sigmoid: u32::from(op.gate.score == Score::Sigmoid),
            normalise: u32::from(op.gate.normalise),
            groups: groups.map_or(0, |limit| limit.groups as u32),
            kept: groups.map_or(0, |limit| limit.kept as u32),
            two_best: u32::from(groups.is_some_and(|limit| limit.by == GroupScore::TopTwoSum)),
            epsilon: TopKRouter::EPSILON,
        };
        // A rank of eight bytes for every expert and group, a score and a preference for every expert.
        let shared = 16 * op.logits.width + 8 * arguments.groups as usize;
        let kernel = self.kernels.get("route", DType::F32, DType::F32)?;
        let shared = within("route: experts", shared, kernel.shared_limit)?;
        self.start(&kernel.function, (op.logits.rows as u32, 1), shared, arguments)
    }

    fn attention(&mut self, op: &Attention) -> Result<(), Refusal> {
        if is_empty(&op.q) {
            return Ok(());
        }
        let (key_width, value_width) = (op.key_width(), op.value_width());
        let [q, keys, values, out] = [&op.q, &op.keys, &op.values, &op.out].map(|buffer| self.rows(buffer));
        let (q, keys, values, out) = (q?, keys?, values?, out?);
        let on_vectors = |rows: &Rows| rows.start.is_multiple_of(16) && rows.stride.is_multiple_of(8);
        let vectors = [q, keys, values, out].iter().all(on_vectors)
            && [key_width, value_width].iter().all(|width| width.is_multiple_of(8));
        let arguments = AttentionArgs {
            q,
            keys,
            values,
            starts: self.rows(&op.sequence_starts)?,
            positions: self.rows(&op.positions)?,
            blocks: self.rows(&op.blocks)?,
            out,
            report: self.report,
            block_size: op.block_size as u32,
            heads: op.heads as u32,
            kv_heads: op.kv_heads as u32,
            scale: op.scale,
            window: op.window.map_or(0, |window| u32::try_from(window).unwrap_or(0)),
            vectors: u32::from(vectors),
        };
        let grid = |blocks: usize| {
            u32::try_from(blocks).map_err(|_| {
                DeviceError::Unsupported(format!("attention: {:?} has too many rows for one launch", op.q))
            })
        };
        let dtypes = (op.q.dtype, op.out.dtype);
        let Some(tile) = attention_tile_for(op, self.kernels.has_hopper()) else {
            let kernel = self.kernels.get("attention", dtypes.0, dtypes.1)?;
            let shared = size_of::<f32>() * (key_width + value_width);
            let shared = within("attention: elements of a head", shared, kernel.shared_limit)?;
            return self.start(&kernel.function, (grid(op.q.rows * op.heads)?, 1), shared, arguments);
        };
        // Where sequences start only the GPU knows: each may leave one tile unfilled.
        let rows = op.q.rows * (op.heads / op.kv_heads);
        let tiles = rows.div_ceil(tile.rows as usize) + op.blocks.rows;
        let kernel = self.kernels.get(tile.operation, dtypes.0, dtypes.1)?;
        let shared = within("attention: a tile", tile.shared_bytes as usize, kernel.shared_limit)?;
        self.start(&kernel.function, (grid(tiles)?, op.kv_heads as u32), shared, arguments)
    }

    fn gemm(&mut self, op: &Gemm) -> Result<(), Refusal> {
        let busy: Vec<&op::GemmPart> = op.parts.iter().filter(|part| !is_empty(&part.out)).collect();
        let Some(first) = busy.first() else { return Ok(()) };
        let rows: usize = busy.iter().map(|part| part.x.rows).sum();
        let products = Products {
            weights: busy.iter().map(|part| &part.weight).collect(),
            epilogue: op.epilogue,
            bias: op.bias.as_ref(),
            from: first.x.dtype,
            to: first.out.dtype,
            columns: first.out.width,
            tile: tile_for(first.x.dtype, rows, busy.len()),
            decided: None,
        };
        let columns = (self.weights.get(&first.weight)?.rows as u32).div_ceil(products.tile.columns);
        let mut parts = Vec::with_capacity(busy.len());
        let mut tiles = 0u32;
        for part in &busy {
            let rows = part.x.rows as u32;
            parts.push(GemmPart { rows, first_tile: tiles, ..self.part(&part.x, &part.weight, &part.out)? });
            tiles = tiles.saturating_add(rows.div_ceil(products.tile.rows).saturating_mul(columns));
        }
        if self.takes_hopper(&products)
            && let Some(starts) = hopper::common_rows(&parts, products.columns)
        {
            let rows = parts.iter().map(|part| part.rows);
            let blocks: Vec<_> = starts.into_iter().zip(rows).collect();
            return self.hopper(&products, &parts[0], &blocks);
        }
        self.mma(&products, &parts, tiles)
    }

    /// Products whose rows only the GPU knows: the shape of tiles, and how many there may be, follow from the number
    /// of all rows.
    fn expert_gemm(&mut self, op: &ExpertGemm) -> Result<(), Refusal> {
        let (rows, experts) = (op.x.rows, op.weights.len());
        if is_empty(&op.out) {
            return Ok(());
        }
        let likely = rows.min(experts).max(1);
        let products = Products {
            weights: op.weights.iter().collect(),
            epilogue: op.epilogue,
            bias: None,
            from: op.x.dtype,
            to: op.out.dtype,
            columns: op.out.width,
            tile: tile_for(op.x.dtype, rows, likely),
            decided: Some(op),
        };
        let parts = op.weights.iter().map(|weight| self.part(&op.x, weight, &op.out));
        let parts = parts.collect::<Result<Vec<_>, _>>()?;
        if self.takes_hopper(&products) && hopper::common_rows(&parts[..1], products.columns).is_some() {
            let even =
                |expert: usize| ((rows * expert / experts) as u32, (rows * (expert + 1) / experts) as u32);
            let blocks: Vec<_> = (0..experts).map(even).map(|(start, end)| (start, end - start)).collect();
            let first = GemmPart { rows: rows as u32, ..parts[0] };
            return self.hopper(&products, &first, &blocks);
        }
        let columns = self.weights.get(&op.weights[0])?.rows.div_ceil(products.tile.columns as usize);
        let tiles = (rows / products.tile.rows as usize + likely) * columns;
        self.mma(&products, &parts, u32::try_from(tiles).unwrap_or(u32::MAX))
    }

    /// A product as a kernel sees it, but for its rows.
    fn part(&self, x: &Buffer, weight: &Weight, out: &Buffer) -> Result<GemmPart, DeviceError> {
        Ok(GemmPart {
            x: self.rows(x)?.start,
            weight: self.weights.get(weight)?.start,
            out: self.rows(out)?.start,
            x_stride: x.stride as u64,
            out_stride: out.stride as u64,
            rows: 0,
            first_tile: 0,
        })
    }

    fn takes_hopper(&self, products: &Products<'_>) -> bool {
        (products.from, products.to) == (DType::BF16, DType::BF16)
            && products.bias.is_none()
            && products.tile.rows > SMALL.rows
            && self.kernels.has_hopper()
    }

    /// Products by mma.sync or in float32, of at most so many tiles.
    fn mma(&mut self, products: &Products<'_>, parts: &[GemmPart], tiles: u32) -> Result<(), Refusal> {
        let Products { tile, columns, .. } = products;
        let weight = self.weights.get(products.weights[0])?;
        let (from, to) = match products.from {
            DType::F32 => (DType::F32, weight.dtype),
            from if from == weight.dtype => (from, products.to),
            from => {
                let message =
                    format!("gemm: no product of {from} rows and {} weights on a GPU", weight.dtype);
                return Err(DeviceError::Unsupported(message).into());
            }
        };
        let aligned = |part: &GemmPart| part.x.is_multiple_of(16) && part.x_stride.is_multiple_of(8);
        let (staged, listed) = self.list(parts, products, "list_parts")?;
        let arguments = GemmArgs {
            parts: listed,
            only: parts[0],
            bias: products.bias.map_or(Ok(0), |bias| self.weights.get(bias).map(|held| held.start))?,
            part_count: parts.len() as u32,
            padding: 0,
            n: weight.rows as u32,
            k: weight.width as u32,
            weight_stride: weight.stride as u64,
            vectors: u32::from(parts.iter().all(aligned)),
            columns: *columns as u32,
        };
        let operation = tile.operations[usize::from(products.epilogue == Epilogue::SwiGlu)];
        let kernel = self.kernels.get(operation, from, to)?;
        let shared = within("gemm: tiles", tile.shared_bytes as usize, kernel.shared_limit)?;
        let blocks = tiles.min(self.multiprocessors * kernel.resident);
        self.start(&kernel.function, (blocks, 1), shared, arguments)?;
        staged.map_or(Ok(()), |staged| self.sent(&staged))
    }

    /// Products by wgmma: `blocks` are the first row and the rows of each, from those of the first part on, or what
    /// they may be where only the GPU knows.
    fn hopper(
        &mut self,
        products: &Products<'_>,
        first: &GemmPart,
        blocks: &[(u32, u32)],
    ) -> Result<(), Refusal> {
        let maps = products.weights.iter().map(|weight| Ok(self.weights.get(weight)?.map));
        let maps = maps.collect::<Result<Vec<u64>, DeviceError>>()?;
        let weight = self.weights.get(products.weights[0])?;
        let block = |(&(row0, rows), weight): (&(u32, u32), u64)| hopper::Block { row0, rows, weight };
        let blocks: Vec<hopper::Block> = blocks.iter().zip(maps).map(block).collect();
        let gated = products.epilogue == Epilogue::SwiGlu;
        let plan = hopper::plan(&blocks, weight.rows, weight.width, self.multiprocessors);
        let rows = blocks.iter().map(|block| block.row0 + block.rows).max().unwrap_or(1) as usize;
        let (x, out) = hopper::maps(first, rows, weight.width, products.columns, gated)?;
        let (staged, listed) = self.list(&blocks, products, "list_blocks")?;
        let arguments = HopperArgs {
            rows: x,
            out,
            blocks: listed,
            only: blocks[0],
            out_start: first.out,
            ticket: self.tickets,
            count: blocks.len() as u32,
            n: weight.rows as u32,
            k: weight.width as u32,
            out_stride: first.out_stride as u32,
            columns: products.columns as u32,
            tile_rows: plan.tile_rows,
        };
        let kernel = self.kernels.get(plan.operations[usize::from(gated)], DType::BF16, DType::BF16)?;
        let shared = within("gemm: tiles", hopper::SHARED_BYTES, kernel.shared_limit)?;
        self.start(&kernel.function, (plan.grid, 1), shared, arguments)?;
        staged.map_or(Ok(()), |staged| self.sent(&staged))
    }

    /// Brings the list of several products to the GPU, which writes their rows into it if only it knows them. A single
    /// product goes with the arguments instead.
    fn list<T: bytemuck::Pod>(
        &mut self,
        list: &[T],
        products: &Products<'_>,
        completing: &'static str,
    ) -> Result<(Option<Staged>, u64), Refusal> {
        #[repr(C)]
        #[derive(Clone, Copy)]
        struct Args {
            list: u64,
            starts: Rows,
            report: Report,
            count: u32,
            rows: u32,
            x_bytes: u32,
            out_bytes: u32,
            tile_rows: u32,
            tiles_across: u32,
        }
        if list.len() == 1 && products.decided.is_none() {
            return Ok((None, 0));
        }
        let staged = self.stage(bytemuck::cast_slice(list))?;
        let listed = self.staging.to_device(&staged, size_of_val(list), self.stream)?;
        if let Some(decided) = &products.decided {
            let bytes = |buffer: &Buffer| {
                u32::try_from(buffer.stride * buffer.dtype.bytes()).map_err(|_| {
                    DeviceError::Shape(format!("gemm: the rows of {buffer:?} are too far apart"))
                })
            };
            let across = self.weights.get(products.weights[0])?.rows as u32;
            let arguments = Args {
                list: listed,
                starts: self.rows(&decided.starts)?,
                report: self.report,
                count: list.len() as u32,
                rows: decided.x.rows as u32,
                x_bytes: bytes(&decided.x)?,
                out_bytes: bytes(&decided.out)?,
                tile_rows: products.tile.rows,
                tiles_across: across.div_ceil(products.tile.columns),
            };
            let kernel = self.kernels.get(completing, DType::F32, DType::F32)?;
            self.start(&kernel.function, (1, 1), 0, arguments)?;
        }
        Ok((Some(staged), listed))
    }

    /// Starts a kernel over the rows of `over`, whose threads take runs of columns; its arguments are the kernel's own
    /// struct.
    fn runs<A: Copy>(
        &mut self,
        operation: &'static str,
        from: DType,
        to: DType,
        over: &Buffer,
        arguments: A,
    ) -> Result<(), Refusal> {
        self.threads(operation, from, to, over, over.rows * over.width.div_ceil(RUN), arguments)
    }

    /// Starts a kernel over the rows of `over`, whose warps take stretches of columns; its arguments are the kernel's
    /// own struct.
    fn stretches<A: Copy>(
        &mut self,
        operation: &'static str,
        from: DType,
        to: DType,
        over: &Buffer,
        arguments: A,
    ) -> Result<(), Refusal> {
        self.threads(operation, from, to, over, over.rows * over.width.div_ceil(STRETCH) * WARP, arguments)
    }

    pub(super) fn threads<A: Copy>(
        &mut self,
        operation: &'static str,
        from: DType,
        to: DType,
        over: &Buffer,
        threads: usize,
        arguments: A,
    ) -> Result<(), Refusal> {
        if is_empty(over) {
            return Ok(());
        }
        let kernel = self.kernels.get(operation, from, to)?;
        // A kernel counts all threads in 32 bits.
        if threads > u32::MAX as usize / 2 {
            let message = format!("{operation}: {over:?} is too large for one launch");
            return Err(DeviceError::Unsupported(message).into());
        }
        self.start(&kernel.function, (threads.div_ceil(THREADS) as u32, 1), 0, arguments)
    }

    /// Starts a kernel over the elements of `over`; its arguments are the kernel's own struct.
    fn elements<A: Copy>(
        &mut self,
        operation: &'static str,
        from: DType,
        to: DType,
        over: &Buffer,
        arguments: A,
    ) -> Result<(), Refusal> {
        if is_empty(over) {
            return Ok(());
        }
        let kernel = self.kernels.get(operation, from, to)?;
        let blocks = (over.width.div_ceil(THREADS) as u32, over.rows.min(MOST_ROWS) as u32);
        self.start(&kernel.function, blocks, 0, arguments)
    }

    pub(super) fn start<A: Copy>(
        &self,
        function: &Function,
        blocks: (u32, u32),
        shared_bytes: u32,
        arguments: A,
    ) -> Result<(), Refusal> {
        // SAFETY: each caller gives the twin of the kernel's own argument struct; the buffers in it lie inside
        // their allocations, were declared by the operation and are ordered by the hazard check; indices in
        // memory are checked by the kernel before they are followed.
        unsafe { self.stream.launch(function, blocks, shared_bytes, &arguments) }?;
        Ok(())
    }

    /// A buffer as a kernel sees it.
    pub(super) fn rows(&self, buffer: &Buffer) -> Result<Rows, DeviceError> {
        let narrow = |size: usize| {
            u32::try_from(size).map_err(|_| {
                DeviceError::Shape(format!("{buffer:?} has more rows or columns than a kernel counts"))
            })
        };
        Ok(Rows {
            start: self.memory.address(buffer)?,
            stride: buffer.stride as u64,
            rows: narrow(buffer.rows)?,
            width: narrow(buffer.width)?,
        })
    }

    fn stage(&mut self, bytes: &[u8]) -> Result<Staged, Refusal> {
        if bytes.len() > Staging::LONGEST {
            let message = format!("{} bytes of arguments are too many for one operation", bytes.len());
            return Err(DeviceError::Unsupported(message).into());
        }
        let staged = self.staging.fill(bytes)?;
        staged.ok_or_else(|| {
            DeviceError::Unsupported("the GPU does not take in what is sent to it".into()).into()
        })
    }

    fn sent(&mut self, staged: &Staged) -> Result<(), Refusal> {
        let event: Event = self.events.record(self.stream)?;
        self.staging.sent(staged, event);
        Ok(())
    }
}

/// The kernel on the tensor cores that takes such heads, if one does. Only what is the same in every step of a model
/// decides: kernels differ in bits.
fn attention_tile_for(op: &Attention, hopper: bool) -> Option<AttentionTile> {
    let (keys, values) = (op.key_width(), op.value_width());
    let start = |buffer: &Buffer| (buffer.allocation, buffer.offset, buffer.stride);
    let latent = op.kv_heads == 1 && start(&op.keys) == start(&op.values) && values <= keys;
    match keys.max(values) {
        _ if op.q.dtype != DType::BF16 || op.scale <= 0.0 => None,
        0..=64 => Some(ATTENTION_64),
        65..=128 => Some(ATTENTION_128),
        _ => (hopper && latent && keys <= MLA_WIDTHS.0 && values <= MLA_WIDTHS.1).then_some(ATTENTION_MLA),
    }
}

/// Float32 rows are multiplied in float32; others by the tile that wastes least for the rows of one of `parts`.
fn tile_for(dtype: DType, rows: usize, parts: usize) -> GemmTile {
    if dtype == DType::F32 {
        return PLAIN;
    }
    match rows / parts.max(1) {
        0..=16 => SMALL,
        17..=64 => MIDDLE,
        65..=128 => SQUARE,
        _ => LARGE,
    }
}

fn is_empty(buffer: &Buffer) -> bool {
    buffer.rows == 0 || buffer.width == 0
}

fn within(what: &str, bytes: usize, limit: u32) -> Result<u32, DeviceError> {
    u32::try_from(bytes).ok().filter(|&bytes| bytes <= limit).ok_or_else(|| {
        DeviceError::Unsupported(format!("{what} take {bytes} bytes of shared memory, this GPU has {limit}"))
    })
}
