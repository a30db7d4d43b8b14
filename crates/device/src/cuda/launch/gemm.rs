//! Products of rows and weights: their list of parts, the shape of their tiles, and which kernels take them.

use super::{Launch, Refusal, Rows, is_empty, within};
use crate::cuda::bricks::Bricks;
use crate::cuda::hopper::{self, HopperArgs};
use crate::cuda::kernels::{CODED_MIDDLE, CODED_SMALL, GemmTile, LARGE, MIDDLE, PLAIN, SMALL, SQUARE, THIN};
use crate::cuda::layout::twin;
use crate::cuda::report::Report;
use crate::cuda::staging::Staged;
use crate::op::{self, Epilogue, ExpertGemm, Gemm};
use crate::{Buffer, DeviceError, Weight, WeightFormat};
use bytemuck::Zeroable;
use epsmoe_base::DType;

twin! {
    pub(in crate::cuda) struct GemmPart = "GemmPart" in "gemm.cuh" {
        pub(in crate::cuda) x: u64,
        pub(in crate::cuda) weight: u64,
        pub(in crate::cuda) out: u64,
        pub(in crate::cuda) x_stride: u64,
        pub(in crate::cuda) out_stride: u64,
        pub(in crate::cuda) rows: u32,
        pub(in crate::cuda) first_tile: u32,
    }
}

// SAFETY: all its bits may be zero.
unsafe impl bytemuck::Zeroable for GemmPart {}
// SAFETY: plain integers without padding: five of eight bytes, two of four.
unsafe impl bytemuck::Pod for GemmPart {}

twin! {
    pub(super) struct GemmArgs = "GemmArgs" in "gemm.cuh" {
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
}

twin! {
    pub(super) struct CodedArgs = "CodedArgs" in "gemm_coded.cu" {
        gemm: GemmArgs,
        kind: u32,
        parts: u32,
        brick_bytes: u32,
        gated: u32,
        wide: u32,
        padding: u32,
    }
}

/// What the products of one operation have in common.
struct Products<'a> {
    /// Of each product.
    weights: Vec<&'a Weight>,
    /// How their codes lie, if they are held in them.
    bricks: Option<Bricks>,
    epilogue: Epilogue,
    bias: Option<&'a Weight>,
    /// Formats of the input and the output.
    from: DType,
    to: DType,
    /// Of the output.
    columns: usize,
    tile: GemmTile,
    /// The operation, if only the GPU knows how many rows each product has.
    decided: Option<Decided<'a>>,
}

impl Products<'_> {
    /// Of an element of the input and of the output.
    fn bytes(&self) -> [u64; 2] {
        [self.from, self.to].map(|dtype| dtype.bytes() as u64)
    }
}

/// Products of experts whose rows the GPU decides.
struct Decided<'a> {
    op: &'a ExpertGemm,
    /// Of these experts.
    starts: &'a Buffer,
}

twin! {
    pub(super) struct ListArgs = "Args" in "expert_parts.cu" {
        list: u64,
        x: u64,
        out: u64,
        starts: Rows,
        report: Report,
        count: u32,
        rows: u32,
        x_bytes: u32,
        out_bytes: u32,
        tile_rows: u32,
        tiles_across: u32,
    }
}

impl Launch<'_> {
    pub(super) fn gemm(&mut self, op: &Gemm) -> Result<(), Refusal> {
        let busy: Vec<&op::GemmPart> = op.parts.iter().filter(|part| !is_empty(&part.out)).collect();
        for parts in busy.chunk_by(|left, right| left.weight.format == right.weight.format) {
            self.gemm_of_one_format(op, parts)?;
        }
        Ok(())
    }

    fn gemm_of_one_format(&mut self, op: &Gemm, busy: &[&op::GemmPart]) -> Result<(), Refusal> {
        let Some(first) = busy.first() else { return Ok(()) };
        let rows: usize = busy.iter().map(|part| part.x.rows).sum();
        if first.weight.format == WeightFormat::Fp8 {
            return self.gemm_of_codes(op, busy);
        }
        let weight = self.weights.get(&first.weight)?;
        let products = Products {
            weights: busy.iter().map(|part| &part.weight).collect(),
            bricks: weight.bricks,
            epilogue: op.epilogue,
            bias: op.bias.as_ref(),
            from: first.x.dtype,
            to: first.out.dtype,
            columns: first.out.width,
            tile: tile_for(first.x.dtype, weight.bricks, rows, busy.len()),
            decided: None,
        };
        let inputs: Vec<&Buffer> = busy.iter().map(|part| &part.x).collect();
        let tile =
            self.thin_tile(&products, &inputs, (busy.len(), rows / busy.len()))?.unwrap_or(products.tile);
        let products = Products { tile, ..products };
        let columns = (weight.rows as u32).div_ceil(products.tile.columns);
        let mut parts = Vec::with_capacity(busy.len());
        let mut tiles = 0u32;
        for part in busy {
            let rows = part.x.rows as u32;
            parts.push(GemmPart { rows, first_tile: tiles, ..self.part(&part.x, &part.weight, &part.out)? });
            tiles = tiles.saturating_add(rows.div_ceil(products.tile.rows).saturating_mul(columns));
        }
        if self.takes_hopper(&products)
            && let Some(starts) = hopper::common_rows(&parts, products.bytes())
        {
            let rows = parts.iter().map(|part| part.rows);
            let blocks: Vec<_> = starts.into_iter().zip(rows).collect();
            return self.hopper(&products, &parts[0], &blocks);
        }
        self.mma(&products, &parts, tiles)
    }

    /// Products whose rows only the GPU knows: the shape of tiles, and how many there may be, follow from the number
    /// of all rows.
    pub(super) fn expert_gemm(&mut self, op: &ExpertGemm) -> Result<(), Refusal> {
        if is_empty(&op.out) {
            return Ok(());
        }
        let mut first = 0;
        for weights in op.weights.chunk_by(|left, right| left.format == right.format) {
            let end = first + weights.len();
            self.experts_of_one_format(op, &op.starts.rows(first..end + 1)?, weights)?;
            first = end;
        }
        Ok(())
    }

    fn experts_of_one_format(
        &mut self,
        op: &ExpertGemm,
        starts: &Buffer,
        weights: &[Weight],
    ) -> Result<(), Refusal> {
        let (rows, experts) = (op.x.rows, weights.len());
        let likely = rows.min(experts).max(1);
        let weight = self.weights.get(&weights[0])?;
        if weights[0].format == WeightFormat::Fp8 {
            let first = GemmPart { rows: rows as u32, ..self.part(&op.x, &weights[0], &op.out)? };
            let products = Products {
                weights: weights.iter().collect(),
                bricks: None,
                epilogue: op.epilogue,
                bias: None,
                from: op.x.dtype,
                to: op.out.dtype,
                columns: weights[0].shape.sources().1[0],
                tile: LARGE,
                decided: Some(Decided { op, starts }),
            };
            self.followed(&products, &[first])?;
            return self.hopper(&products, &first, &even_blocks(rows, experts));
        }
        let products = Products {
            weights: weights.iter().collect(),
            bricks: weight.bricks,
            epilogue: op.epilogue,
            bias: None,
            from: op.x.dtype,
            to: op.out.dtype,
            columns: op.out.width,
            tile: tile_for(op.x.dtype, weight.bricks, rows, likely),
            decided: Some(Decided { op, starts }),
        };
        // With more rows than that some expert has more than a tile of eight.
        let few = if rows / likely <= 2 { self.thin_tile(&products, &[&op.x], (likely, 1))? } else { None };
        let products = Products { tile: few.unwrap_or(products.tile), ..products };
        let parts = weights.iter().map(|weight| self.part(&op.x, weight, &op.out));
        let parts = parts.collect::<Result<Vec<_>, _>>()?;
        if self.takes_hopper(&products) && hopper::common_rows(&parts[..1], products.bytes()).is_some() {
            let first = GemmPart { rows: rows as u32, ..parts[0] };
            return self.hopper(&products, &first, &even_blocks(rows, experts));
        }
        let columns = weight.rows.div_ceil(products.tile.columns as usize);
        let tiles = (rows / products.tile.rows as usize + likely) * columns;
        self.mma(&products, &parts, u32::try_from(tiles).unwrap_or(u32::MAX))
    }

    /// Products of rows in codes: by wgmma alone, for one row as for thousands.
    fn gemm_of_codes(&mut self, op: &Gemm, busy: &[&op::GemmPart]) -> Result<(), Refusal> {
        let Some(first) = busy.first() else { return Ok(()) };
        let products = Products {
            weights: busy.iter().map(|part| &part.weight).collect(),
            bricks: None,
            epilogue: op.epilogue,
            bias: op.bias.as_ref(),
            from: first.x.dtype,
            to: first.out.dtype,
            columns: first.weight.shape.sources().1[0],
            tile: LARGE,
            decided: None,
        };
        let part = |part: &&op::GemmPart| {
            let rows = part.x.rows as u32;
            Ok(GemmPart { rows, ..self.part(&part.x, &part.weight, &part.out)? })
        };
        let parts = busy.iter().map(part).collect::<Result<Vec<_>, DeviceError>>()?;
        let starts = self.followed(&products, &parts)?;
        let blocks: Vec<_> = starts.into_iter().zip(parts.iter().map(|part| part.rows)).collect();
        self.hopper(&products, &parts[0], &blocks)
    }

    /// Where the parts of products start that no other kernel takes.
    fn followed(&self, products: &Products<'_>, parts: &[GemmPart]) -> Result<Vec<u32>, DeviceError> {
        hopper::common_rows(parts, products.bytes()).ok_or_else(|| {
            DeviceError::Unsupported(format!(
                "gemm: the rows that {} is multiplied with, and those that come of it, must each be rows of one buffer that \
                 start on 16 bytes",
                products.weights[0].name
            ))
        })
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

    /// The tile for so many products of so few rows each that other tiles would leave the GPU idle, if there is one.
    fn thin_tile(
        &self,
        products: &Products<'_>,
        inputs: &[&Buffer],
        (parts, rows): (usize, usize),
    ) -> Result<Option<GemmTile>, DeviceError> {
        /// Blocks of other tiles on each multiprocessor that bring weights as fast as memory gives them.
        const ENOUGH: usize = 2;
        let weight = self.weights.get(products.weights[0])?;
        let on_vectors = |x: &&Buffer| -> Result<bool, DeviceError> {
            Ok(self.rows(x)?.start.is_multiple_of(16) && x.stride.is_multiple_of(8))
        };
        let fits = self.kernels.has_hopper()
            && weight.bricks.is_none()
            && (products.from, weight.dtype) == (DType::BF16, DType::BF16)
            && weight.width.is_multiple_of(GemmTile::THIN_STEP);
        if !fits || !inputs.iter().map(on_vectors).collect::<Result<Vec<_>, _>>()?.into_iter().all(|on| on) {
            return Ok(None);
        }
        let others = parts * weight.rows.div_ceil(SMALL.columns as usize);
        let fills = others >= ENOUGH * self.multiprocessors as usize;
        Ok(THIN.into_iter().find(|tile| rows <= tile.rows as usize).filter(|_| !fills))
    }

    fn takes_hopper(&self, products: &Products<'_>) -> bool {
        // bfloat16 leaves in whole 16 bytes, without a bias; float32 as it comes.
        let leaves = products.to == DType::F32 && products.epilogue == Epilogue::Store
            || products.to == DType::BF16 && products.bias.is_none() && products.columns.is_multiple_of(8);
        products.from == DType::BF16
            && leaves
            && !products.tile.is_thin()
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
        let gated = products.epilogue == Epilogue::SwiGlu;
        let Some(bricks) = products.bricks else {
            self.start_tiles(tile, (from, to), gated, 0, tiles, arguments)?;
            return staged.map_or(Ok(()), |staged| self.sent(&staged));
        };
        let arguments = CodedArgs {
            gemm: arguments,
            kind: bricks.kind(),
            parts: bricks.parts as u32,
            brick_bytes: bricks.bytes() as u32,
            gated: u32::from(gated),
            wide: u32::from(to == DType::F32),
            padding: 0,
        };
        self.start_tiles(tile, (from, DType::BF16), gated, arguments.brick_bytes, tiles, arguments)?;
        staged.map_or(Ok(()), |staged| self.sent(&staged))
    }

    /// Starts a kernel of products on at most so many tiles, each with bricks of so many bytes.
    fn start_tiles<A: Copy>(
        &self,
        tile: &GemmTile,
        (from, to): (DType, DType),
        gated: bool,
        brick_bytes: u32,
        tiles: u32,
        arguments: A,
    ) -> Result<(), Refusal> {
        let kernel = self.kernels.get(tile.operations[usize::from(gated)], from, to)?;
        let shared = (tile.shared_bytes + tile.bricks * brick_bytes) as usize;
        let shared = within("gemm: tiles", shared, kernel.shared_limit)?;
        let blocks = tiles.min(self.multiprocessors * self.kernels.resident(&kernel, shared));
        self.start(&kernel.function, (blocks, 1), shared, arguments)
    }

    /// Products by wgmma: `blocks` are the first row and the rows of each, from those of the first part on, or what
    /// they may be where only the GPU knows.
    fn hopper(
        &mut self,
        products: &Products<'_>,
        first: &GemmPart,
        blocks: &[(u32, u32)],
    ) -> Result<(), Refusal> {
        // Weights in bfloat16 are found by their map, those in FP8 too, behind which their scales stand.
        let maps = products.weights.iter().map(|weight| {
            let held = self.weights.get(weight)?;
            Ok(if held.bricks.is_some() { held.start } else { held.map })
        });
        let maps = maps.collect::<Result<Vec<u64>, DeviceError>>()?;
        let weight = self.weights.get(products.weights[0])?;
        let block = |(&(row0, rows), weight): (&(u32, u32), u64)| hopper::Block { row0, rows, weight };
        let blocks: Vec<hopper::Block> = blocks.iter().zip(maps).map(block).collect();
        let gated = products.epilogue == Epilogue::SwiGlu;
        let rows = blocks.iter().map(|block| block.row0 + block.rows).max().unwrap_or(1) as usize;
        let codes = products.weights[0].format == WeightFormat::Fp8;
        let row_bytes = first.x_stride * products.from.bytes() as u64;
        let narrow = (products.to == DType::BF16).then_some(products.columns);
        // Blocks whose outputs share a scale tell each other the largest of theirs.
        let together = if products.to == DType::U32 { 4 } else { 1 };
        let few = codes
            .then(|| hopper::plan_few_codes(&blocks, weight.rows, together, self.multiprocessors))
            .flatten();
        let (plan, (x, out)) = if let Some(plan) = few {
            (plan, hopper::few_code_maps(first, rows, row_bytes, weight.width)?)
        } else if codes {
            (
                hopper::plan_codes(&blocks, weight.rows, weight.width, self.multiprocessors),
                hopper::code_maps(first, rows, weight.width, row_bytes, narrow)?,
            )
        } else {
            (
                hopper::plan(&blocks, weight.rows, weight.width, self.multiprocessors),
                hopper::maps(first, rows, weight.width, narrow, gated)?,
            )
        };
        // Codes are stored as bytes.
        let out_stride = if products.to == DType::U32 { 4 * first.out_stride } else { first.out_stride };
        let mut own = [hopper::Block::zeroed(); hopper::OWN_BLOCKS];
        // Few go with the arguments: a copy of their own would take the host and the lane longer than they do.
        let (staged, listed) = match own.get_mut(..blocks.len()) {
            Some(own) if products.decided.is_none() => {
                own.copy_from_slice(&blocks);
                (None, 0)
            }
            _ => self.list(&blocks, products, "list_blocks")?,
        };
        let arguments = HopperArgs {
            rows: x,
            out,
            blocks: listed,
            own,
            rows_start: first.x,
            out_start: first.out,
            bias: products.bias.map_or(Ok(0), |bias| self.weights.get(bias).map(|held| held.start))?,
            ticket: self.tickets,
            count: blocks.len() as u32,
            n: weight.rows as u32,
            k: weight.width as u32,
            out_stride: out_stride as u32,
            columns: products.columns as u32,
            tile_rows: plan.tile_rows,
            kind: products.bricks.map_or(0, Bricks::kind),
            parts: products.bricks.map_or(0, |bricks| bricks.parts as u32),
            brick_bytes: products.bricks.map_or(0, |bricks| bricks.bytes() as u32),
            rows_stride: row_bytes as u32,
        };
        let (operations, shared) = match (codes, few) {
            (_, Some(_)) => (["gemm_thin_fp8", "gated_thin_fp8"], hopper::FEW_SHARED_BYTES),
            (true, None) => (["gemm_fp8", "gated_fp8"], hopper::SHARED_BYTES),
            (false, None) => (plan.operations(products.bricks.is_some()), hopper::SHARED_BYTES),
        };
        let kernel = self.kernels.get(operations[usize::from(gated)], products.from, products.to)?;
        let shared = within("gemm: tiles", shared, kernel.shared_limit)?;
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
        if list.len() == 1 && products.decided.is_none() {
            return Ok((None, 0));
        }
        let (staged, listed) = match &mut self.kept {
            Some(kept) => (None, kept.bring(bytemuck::cast_slice(list))?),
            None => {
                let staged = self.stage(bytemuck::cast_slice(list))?;
                let listed = self.staging.to_device(&staged, size_of_val(list), self.stream)?;
                (Some(staged), listed)
            }
        };
        if let Some(decided) = &products.decided {
            let bytes = |buffer: &Buffer| {
                u32::try_from(buffer.stride * buffer.dtype.bytes()).map_err(|_| {
                    DeviceError::Shape(format!("gemm: the rows of {buffer:?} are too far apart"))
                })
            };
            let across = self.weights.get(products.weights[0])?.rows as u32;
            let arguments = ListArgs {
                list: listed,
                x: self.rows(&decided.op.x)?.start,
                out: self.rows(&decided.op.out)?.start,
                starts: self.rows(decided.starts)?,
                report: self.report,
                count: list.len() as u32,
                rows: decided.op.x.rows as u32,
                x_bytes: bytes(&decided.op.x)?,
                out_bytes: bytes(&decided.op.out)?,
                tile_rows: products.tile.rows,
                tiles_across: across.div_ceil(products.tile.columns),
            };
            let kernel = self.kernels.get(completing, DType::F32, DType::F32)?;
            self.start(&kernel.function, (1, 1), 0, arguments)?;
        }
        Ok((staged, listed))
    }
}

/// First rows and rows of experts that may have any, as a plan guesses them: all alike.
fn even_blocks(rows: usize, experts: usize) -> Vec<(u32, u32)> {
    let start = |expert: usize| (rows * expert / experts) as u32;
    (0..experts).map(|expert| (start(expert), start(expert + 1) - start(expert))).collect()
}

/// Float32 rows are multiplied in float32; others by the tile that wastes least for the rows of one of `parts`.
fn tile_for(dtype: DType, bricks: Option<Bricks>, rows: usize, parts: usize) -> GemmTile {
    if dtype == DType::F32 {
        return PLAIN;
    }
    match (rows / parts.max(1), bricks) {
        (0..=16, None) => SMALL,
        (17..=64, None) => MIDDLE,
        (65..=128, None) => SQUARE,
        (_, None) => LARGE,
        (0..=16, Some(_)) => CODED_SMALL,
        (_, Some(_)) => CODED_MIDDLE,
    }
}
