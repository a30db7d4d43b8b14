//! Products of rows and weights: their list of parts, the shape of their tiles, and which kernels take them.

use super::{Launch, Refusal, Rows, is_empty, within};
use crate::cuda::bricks::{Bricks, SIDE};
use crate::cuda::driver::TensorMap;
use crate::cuda::hopper::{self, HopperArgs};
use crate::cuda::kernels::{
    CODED_MIDDLE, CODED_SMALL, GemmTile, LARGE, MIDDLE, PLAIN, SCALED_THIN, SHORT_THIN, SMALL, SQUARE, THIN,
};
use crate::cuda::layout::twin;
use crate::cuda::report::Report;
use crate::cuda::staging::Staged;
use crate::op::{self, Epilogue, ExpertGemm, Gemm};
use crate::{Buffer, DeviceError, Weight, WeightFormat};
use bytemuck::Zeroable;
use epsmoe_base::DType;

/// Parts that fit into a kernel's arguments; more of them are listed in device memory. Repeats the number of the source.
const OWN_PARTS: usize = 4;

twin! {
    pub(in crate::cuda) struct GemmPart = "GemmPart" in "gemm.cuh" {
        pub(in crate::cuda) x: u64,
        pub(in crate::cuda) weight: u64,
        pub(in crate::cuda) out: u64,
        pub(in crate::cuda) bias: u64,
        pub(in crate::cuda) x_stride: u64,
        pub(in crate::cuda) out_stride: u64,
        pub(in crate::cuda) rows: u32,
        pub(in crate::cuda) first_tile: u32,
        pub(in crate::cuda) n: u32,
        pub(in crate::cuda) columns: u32,
        pub(in crate::cuda) wide: u32,
        pub(in crate::cuda) padding: u32,
    }
}

// SAFETY: all its bits may be zero.
unsafe impl bytemuck::Zeroable for GemmPart {}
// SAFETY: plain integers without padding: six of eight bytes, six of four.
unsafe impl bytemuck::Pod for GemmPart {}

twin! {
    pub(super) struct GemmArgs = "GemmArgs" in "gemm.cuh" {
        parts: u64,
        own: [GemmPart; OWN_PARTS],
        weight_stride: u64,
        part_count: u32,
        k: u32,
        vectors: u32,
        padding: u32,
    }
}

twin! {
    pub(super) struct CodedArgs = "CodedArgs" in "gemm.cuh" {
        gemm: GemmArgs,
        kind: u32,
        parts: u32,
        brick_bytes: u32,
        gated: u32,
        stages: u32,
        padding: u32,
    }
}

twin! {
    pub(super) struct FewMap = "FewMap" in "gemm_thin_fp8.cu" {
        weight: u64,
        out: u64,
        bias: u64,
        out_stride: u32,
        columns: u32,
        first: u32,
        wide: u32,
    }
}

// SAFETY: all its bits may be zero.
unsafe impl Zeroable for FewMap {}

twin! {
    pub(super) struct FewArgs = "FewArgs" in "gemm_thin_fp8.cu" {
        gemm: HopperArgs,
        maps: [FewMap; OWN_PARTS],
        count: u32,
    }
}

/// What the products of one operation have in common.
struct Products<'a> {
    /// Of each product.
    weights: Vec<&'a Weight>,
    /// How their codes lie, if they are held in them.
    bricks: Option<Bricks>,
    epilogue: Epilogue,
    /// Formats of the input and the output; of several maps of the same rows that of the first.
    from: DType,
    to: DType,
    tile: GemmTile,
    /// The operation, if only the GPU knows how many rows each product has.
    decided: Option<Decided<'a>>,
}

impl Products<'_> {
    /// Of an element of the input and of the output.
    fn bytes(&self) -> [u64; 2] {
        [self.from, self.to].map(|dtype| dtype.bytes() as u64)
    }

    /// From a row of the input to the next.
    fn row_bytes(&self, part: &GemmPart) -> u64 {
        part.x_stride * self.bytes()[0]
    }
}

/// From a row of the output to the next: elements, or bytes of codes.
fn out_stride(products: &Products<'_>, part: &GemmPart) -> u32 {
    let bytes = if products.to == DType::U32 { 4 } else { 1 };
    part.out_stride as u32 * bytes
}

/// Rows from those of the first part on that blocks are of.
fn rows_of(blocks: &[hopper::Block]) -> usize {
    blocks.iter().map(|block| block.row0 + block.rows).max().unwrap_or(1) as usize
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
        if self.maps_of_few_rows(op.epilogue, &busy)? {
            return Ok(());
        }
        // Maps of the same rows are no parts of one product.
        let alike = |left: &&op::GemmPart, right: &&op::GemmPart| {
            left.weight.format == right.weight.format && left.is_like(right) && left.x != right.x
        };
        busy.chunk_by(alike).try_for_each(|parts| self.gemm_of_alike(op.epilogue, parts))
    }

    /// Different maps of the same few rows in one launch, if there is a kernel: alone, each would take as long as it takes to begin.
    fn maps_of_few_rows(&mut self, epilogue: Epilogue, busy: &[&op::GemmPart]) -> Result<bool, Refusal> {
        let &[first, _, ..] = busy else { return Ok(false) };
        let together = busy.len() <= OWN_PARTS
            && epilogue == Epilogue::Store
            && busy.iter().all(|part| part.x == first.x && part.weight.format == first.weight.format);
        if !together {
            return Ok(false);
        }
        let products = self.products(epilogue, busy)?;
        if first.weight.format == WeightFormat::Fp8 {
            let parts = self.parts(&products, busy)?.0;
            return self.few_codes_of_maps(&products, &parts);
        }
        let across = busy.iter().map(|part| self.small_tiles(&part.weight)).sum::<Result<usize, _>>()?;
        let Some(tile) = self.thin_tile(&products, &[&first.x], (across, first.x.rows))? else {
            return Ok(false);
        };
        let products = Products { tile, ..products };
        let (parts, tiles) = self.parts(&products, busy)?;
        self.mma(&products, &parts, tiles)?;
        Ok(true)
    }

    /// What products have in common of which the rows are known.
    fn products<'a>(
        &self,
        epilogue: Epilogue,
        busy: &[&'a op::GemmPart],
    ) -> Result<Products<'a>, DeviceError> {
        let (first, rows) = (busy[0], busy.iter().map(|part| part.x.rows).sum());
        let bricks = self.weights.get(&first.weight)?.bricks;
        Ok(Products {
            weights: busy.iter().map(|part| &part.weight).collect(),
            bricks,
            epilogue,
            from: first.x.dtype,
            to: first.out.dtype,
            tile: tile_for(first.x.dtype, bricks, rows, busy.len()),
            decided: None,
        })
    }

    /// Products as a kernel sees them, and the number of their tiles.
    fn parts(
        &self,
        products: &Products<'_>,
        busy: &[&op::GemmPart],
    ) -> Result<(Vec<GemmPart>, u32), DeviceError> {
        let (mut parts, mut tiles) = (Vec::with_capacity(busy.len()), 0u32);
        for part in busy {
            let (rows, columns) = (part.x.rows as u32, products.tile.columns);
            let bias = part.bias.as_ref().map_or(Ok(0), |bias| self.weights.get(bias).map(|held| held.start));
            let described = self.part(&part.x, &part.weight, &part.out)?;
            let across = described.n.div_ceil(columns);
            parts.push(GemmPart { rows, first_tile: tiles, bias: bias?, ..described });
            tiles = tiles.saturating_add(rows.div_ceil(products.tile.rows).saturating_mul(across));
        }
        Ok((parts, tiles))
    }

    fn gemm_of_alike(&mut self, epilogue: Epilogue, busy: &[&op::GemmPart]) -> Result<(), Refusal> {
        let Some(first) = busy.first() else { return Ok(()) };
        let products = self.products(epilogue, busy)?;
        if first.weight.format == WeightFormat::Fp8 {
            return self.gemm_of_codes(&products, busy);
        }
        let inputs: Vec<&Buffer> = busy.iter().map(|part| &part.x).collect();
        let rows: usize = busy.iter().map(|part| part.x.rows).sum();
        let others = busy.len() * self.small_tiles(&first.weight)?;
        let tile = self.thin_tile(&products, &inputs, (others, rows / busy.len()))?.unwrap_or(products.tile);
        let products = Products { tile, ..products };
        let (parts, tiles) = self.parts(&products, busy)?;
        if self.takes_hopper(&products, &parts[0])
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
                from: op.x.dtype,
                to: op.out.dtype,
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
            from: op.x.dtype,
            to: op.out.dtype,
            tile: tile_for(op.x.dtype, weight.bricks, rows, likely),
            decided: Some(Decided { op, starts }),
        };
        let others = likely * self.small_tiles(&weights[0])?;
        let few = match (weight.bricks, rows / likely) {
            // With more rows than that some expert has more than a tile of eight.
            (None, 3..) => None,
            (None, _) => self.thin_tile(&products, &[&op.x], (others, 1))?,
            // Some have twice as many.
            (Some(_), each @ 5..=16) => self.thin_tile(&products, &[&op.x], (others, each.max(9)))?,
            (Some(_), each) => self.thin_tile(&products, &[&op.x], (others, each))?,
        };
        let products = Products { tile: few.unwrap_or(products.tile), ..products };
        let parts = weights.iter().map(|weight| self.part(&op.x, weight, &op.out));
        let parts = parts.collect::<Result<Vec<_>, _>>()?;
        if self.takes_hopper(&products, &parts[0])
            && hopper::common_rows(&parts[..1], products.bytes()).is_some()
        {
            let first = GemmPart { rows: rows as u32, ..parts[0] };
            return self.hopper(&products, &first, &even_blocks(rows, experts));
        }
        let columns = weight.rows.div_ceil(products.tile.columns as usize);
        let tiles = (rows / products.tile.rows as usize + likely) * columns;
        self.mma(&products, &parts, u32::try_from(tiles).unwrap_or(u32::MAX))
    }

    /// Products of rows in codes: by wgmma alone, for one row as for thousands.
    fn gemm_of_codes(&mut self, products: &Products<'_>, busy: &[&op::GemmPart]) -> Result<(), Refusal> {
        let (parts, _) = self.parts(products, busy)?;
        let starts = self.followed(products, &parts)?;
        let blocks: Vec<_> = starts.into_iter().zip(parts.iter().map(|part| part.rows)).collect();
        self.hopper(products, &parts[0], &blocks)
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
        let held = self.weights.get(weight)?;
        Ok(GemmPart {
            x: self.rows(x)?.start,
            weight: held.start,
            out: self.rows(out)?.start,
            bias: 0,
            x_stride: x.stride as u64,
            out_stride: out.stride as u64,
            rows: 0,
            first_tile: 0,
            n: held.rows as u32,
            columns: weight.shape.sources().1[0] as u32,
            wide: u32::from(out.dtype == DType::F32),
            padding: 0,
        })
    }

    /// Small tiles that lie beside each other along a weight.
    fn small_tiles(&self, weight: &Weight) -> Result<usize, DeviceError> {
        Ok(self.weights.get(weight)?.rows.div_ceil(SMALL.columns as usize))
    }

    /// The tile for products of so few rows each that `others`, the small tiles of all, would leave the GPU idle, or whose weights are in
    /// codes, if there is one.
    fn thin_tile(
        &self,
        products: &Products<'_>,
        inputs: &[&Buffer],
        (others, rows): (usize, usize),
    ) -> Result<Option<GemmTile>, DeviceError> {
        /// Blocks of other tiles on each multiprocessor that bring weights as fast as memory gives them.
        const ENOUGH: usize = 2;
        let weight = self.weights.get(products.weights[0])?;
        let on_vectors = |x: &&Buffer| -> Result<bool, DeviceError> {
            Ok(self.rows(x)?.start.is_multiple_of(16) && x.stride.is_multiple_of(8))
        };
        let step = if weight.bricks.is_some() { SIDE } else { GemmTile::THIN_STEP };
        let fits = self.kernels.has_hopper()
            && (products.from, weight.dtype) == (DType::BF16, DType::BF16)
            && weight.width.is_multiple_of(step);
        if !fits || !inputs.iter().map(on_vectors).collect::<Result<Vec<_>, _>>()?.into_iter().all(|on| on) {
            return Ok(None);
        }
        let takes = |tile: &GemmTile| rows <= tile.rows as usize;
        let Some(bricks) = weight.bricks else {
            let fills = others >= ENOUGH * self.multiprocessors as usize;
            return Ok(THIN.into_iter().find(takes).filter(|_| !fills));
        };
        let tiles = if bricks.is_short() { SHORT_THIN } else { SCALED_THIN };
        let tile = tiles.into_iter().find(takes);
        Ok(tile.map(|tile| tile.stages(thin_stages(&tile, bricks))))
    }

    fn takes_hopper(&self, products: &Products<'_>, first: &GemmPart) -> bool {
        // bfloat16 leaves in whole 16 bytes, without a bias; float32 as it comes.
        let leaves = products.to == DType::F32 && products.epilogue == Epilogue::Store
            || products.to == DType::BF16 && first.bias == 0 && first.columns.is_multiple_of(8);
        products.from == DType::BF16
            && leaves
            && !products.tile.thin
            && products.tile.rows > SMALL.rows
            && self.kernels.has_hopper()
    }

    /// Products by mma.sync or in float32, of at most so many tiles.
    fn mma(&mut self, products: &Products<'_>, parts: &[GemmPart], tiles: u32) -> Result<(), Refusal> {
        let tile = &products.tile;
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
        let (staged, listed) = self.list(parts, products, OWN_PARTS, "list_parts")?;
        let mut own = [GemmPart::zeroed(); OWN_PARTS];
        own.iter_mut().zip(parts).for_each(|(own, part)| *own = *part);
        let arguments = GemmArgs {
            parts: listed,
            own,
            weight_stride: weight.stride as u64,
            part_count: parts.len() as u32,
            k: weight.width as u32,
            vectors: u32::from(parts.iter().all(aligned)),
            padding: 0,
        };
        let gated = products.epilogue == Epilogue::SwiGlu;
        let Some(bricks) = products.bricks else {
            // Kernels for few rows store either.
            let to = if tile.thin { from } else { to };
            self.start_tiles(tile, (from, to), gated, 0, tiles, arguments)?;
            return staged.map_or(Ok(()), |staged| self.sent(&staged));
        };
        let arguments = CodedArgs {
            gemm: arguments,
            kind: bricks.kind(),
            parts: bricks.parts as u32,
            brick_bytes: bricks.bytes() as u32,
            gated: u32::from(gated),
            stages: tile.bricks / SHORT_THIN[0].bricks,
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
        let codes = products.weights[0].format == WeightFormat::Fp8;
        let gated = products.epilogue == Epilogue::SwiGlu;
        // Blocks whose outputs share a scale tell each other the largest of theirs.
        let together = if products.to == DType::U32 { 4 } else { 1 };
        let few = codes
            .then(|| hopper::plan_few_codes(&blocks, weight.rows, together, self.multiprocessors))
            .flatten();
        if let Some(plan) = few {
            return self.few_codes(products, plan, std::slice::from_ref(first), &blocks);
        }
        let rows = rows_of(&blocks);
        let narrow = (products.to == DType::BF16).then_some(first.columns as usize);
        let (plan, maps) = if codes {
            (
                hopper::plan_codes(&blocks, weight.rows, weight.width, self.multiprocessors),
                hopper::code_maps(first, rows, weight.width, products.row_bytes(first), narrow)?,
            )
        } else {
            (
                hopper::plan(&blocks, weight.rows, weight.width, self.multiprocessors),
                hopper::maps(first, rows, weight.width, narrow, gated)?,
            )
        };
        let (staged, arguments) = self.hopper_args(products, plan, first, &blocks, maps)?;
        let operations = match codes {
            true => ["gemm_fp8", "gated_fp8"],
            false => plan.operations(products.bricks.is_some()),
        };
        let kernel = self.kernels.get(operations[usize::from(gated)], products.from, products.to)?;
        let shared = within("gemm: tiles", hopper::SHARED_BYTES, kernel.shared_limit)?;
        self.start(&kernel.function, (plan.grid, 1), shared, arguments)?;
        staged.map_or(Ok(()), |staged| self.sent(&staged))
    }

    /// Several maps of the same few rows of codes in one launch, unless there are too many weights for that.
    fn few_codes_of_maps(&mut self, products: &Products<'_>, parts: &[GemmPart]) -> Result<bool, Refusal> {
        let block = hopper::Block { row0: 0, rows: parts[0].rows, weight: 0 };
        let n = parts.iter().map(|part| part.n.next_multiple_of(hopper::FEW_TILE) as usize).sum();
        let bytes = |part: &GemmPart| {
            [products.from, if part.wide == 1 { DType::F32 } else { DType::BF16 }]
                .map(|dtype| dtype.bytes() as u64)
        };
        let follows = |part: &GemmPart| hopper::common_rows(&[*part], bytes(part)).is_some();
        match hopper::plan_few_codes(&[block], n, 1, self.multiprocessors) {
            Some(plan) if parts.iter().all(follows) => {
                self.few_codes(products, plan, parts, &[block])?;
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    /// Products of few rows of codes: of one map, or experts' that are alike, or of several maps of the rows of one block.
    fn few_codes(
        &mut self,
        products: &Products<'_>,
        plan: hopper::Plan,
        parts: &[GemmPart],
        blocks: &[hopper::Block],
    ) -> Result<(), Refusal> {
        let (first, k) = (&parts[0], self.weights.get(products.weights[0])?.width);
        let rows = hopper::few_code_maps(first, rows_of(blocks), products.row_bytes(first), k)?;
        let (staged, gemm) = self.hopper_args(products, plan, first, blocks, rows)?;
        let mut maps = [FewMap::zeroed(); OWN_PARTS];
        let mut n = 0;
        for ((map, part), weight) in maps.iter_mut().zip(parts).zip(&products.weights) {
            *map = FewMap {
                weight: self.weights.get(weight)?.map,
                out: part.out,
                bias: part.bias,
                out_stride: out_stride(products, part),
                columns: part.columns,
                first: n / hopper::FEW_TILE,
                wide: part.wide,
            };
            n += part.n.next_multiple_of(hopper::FEW_TILE);
        }
        let arguments = FewArgs { gemm: HopperArgs { n, ..gemm }, maps, count: parts.len() as u32 };
        let (operation, to) = match products.epilogue {
            Epilogue::Store => ("gemm_thin_fp8", DType::BF16),
            Epilogue::SwiGlu => ("gated_thin_fp8", products.to),
        };
        let kernel = self.kernels.get(operation, products.from, to)?;
        let shared = within("gemm: tiles", hopper::FEW_SHARED_BYTES, kernel.shared_limit)?;
        self.start(&kernel.function, (plan.grid, 1), shared, arguments)?;
        staged.map_or(Ok(()), |staged| self.sent(&staged))
    }

    /// What all Hopper kernels are told, and what was sent for it.
    fn hopper_args(
        &mut self,
        products: &Products<'_>,
        plan: hopper::Plan,
        first: &GemmPart,
        blocks: &[hopper::Block],
        (rows, out): (TensorMap, TensorMap),
    ) -> Result<(Option<Staged>, HopperArgs), Refusal> {
        let weight = self.weights.get(products.weights[0])?;
        let (staged, listed) = self.list(blocks, products, hopper::OWN_BLOCKS, "list_blocks")?;
        let mut own = [hopper::Block::zeroed(); hopper::OWN_BLOCKS];
        own.iter_mut().zip(blocks).for_each(|(own, block)| *own = *block);
        let arguments = HopperArgs {
            rows,
            out,
            blocks: listed,
            own,
            rows_start: first.x,
            out_start: first.out,
            bias: first.bias,
            ticket: self.tickets,
            count: blocks.len() as u32,
            n: weight.rows as u32,
            k: weight.width as u32,
            out_stride: out_stride(products, first),
            columns: first.columns,
            tile_rows: plan.tile_rows,
            kind: products.bricks.map_or(0, Bricks::kind),
            parts: products.bricks.map_or(0, |bricks| bricks.parts as u32),
            brick_bytes: products.bricks.map_or(0, |bricks| bricks.bytes() as u32),
            rows_stride: products.row_bytes(first) as u32,
            powers: u32::from(self.power_scales),
            padding: 0,
        };
        Ok((staged, arguments))
    }

    /// Brings the list of several products to the GPU, which writes their rows into it if only it knows them. Up to `own` of
    /// them go with the arguments instead: a copy of their own would take the host and the lane longer than they do.
    fn list<T: bytemuck::Pod>(
        &mut self,
        list: &[T],
        products: &Products<'_>,
        own: usize,
        completing: &'static str,
    ) -> Result<(Option<Staged>, u64), Refusal> {
        if list.len() <= own && products.decided.is_none() {
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

/// Stages of a tile for few rows of weights in codes: as many as leave room for as many blocks on a multiprocessor as registers do.
fn thin_stages(stage: &GemmTile, bricks: Bricks) -> u32 {
    let room = match (bricks.is_short(), stage.rows) {
        (true, 0..=8) => 36 << 10,
        (true, _) => 44 << 10,
        (false, _) => 56 << 10,
    };
    let bytes = stage.shared_bytes + stage.bricks * bricks.bytes() as u32;
    (room / bytes).max(2)
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
