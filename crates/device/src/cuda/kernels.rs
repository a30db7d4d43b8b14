//! The kernels: their sources, compiled for the GPU at hand and kept on disk.

mod cache;
mod loaded;
mod parts;

pub(super) use loaded::Kernels;

use super::bricks::SIDE;
use super::driver::Context;
use super::nvrtc;
use crate::DeviceError;
use cache::Cache;
use cudarc::driver::sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
use epsmoe_base::{DType, by_threads, cores};
use parts::{options, parts_for};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The environment variable that names the folder of compiled kernels; without it they are kept in
/// `$XDG_CACHE_HOME/epsmoe/kernels` or `~/.cache/epsmoe/kernels`.
pub const CACHE_VARIABLE: &str = "EPSMOE_KERNEL_CACHE";

const HEADERS: [(&str, &str); 21] = [
    ("common.cuh", include_str!("../../kernels/common.cuh")),
    ("turn.cuh", include_str!("../../kernels/turn.cuh")),
    ("draw.cuh", include_str!("../../kernels/draw.cuh")),
    ("barrier.cuh", include_str!("../../kernels/barrier.cuh")),
    ("tensor.cuh", include_str!("../../kernels/tensor.cuh")),
    ("matches.cuh", include_str!("../../kernels/matches.cuh")),
    ("gemm.cuh", include_str!("../../kernels/gemm.cuh")),
    ("gemm_mma.cuh", include_str!("../../kernels/gemm_mma.cuh")),
    ("hopper.cuh", include_str!("../../kernels/hopper.cuh")),
    ("gemm_hopper.cuh", include_str!("../../kernels/gemm_hopper.cuh")),
    ("gemm_fp8.cuh", include_str!("../../kernels/gemm_fp8.cuh")),
    ("codes.cuh", include_str!("../../kernels/codes.cuh")),
    ("e4m3.cuh", include_str!("../../kernels/e4m3.cuh")),
    ("scaled.cuh", include_str!("../../kernels/scaled.cuh")),
    ("attention.cuh", include_str!("../../kernels/attention.cuh")),
    ("attention_gqa.cuh", include_str!("../../kernels/attention_gqa.cuh")),
    ("attention_mla.cuh", include_str!("../../kernels/attention_mla.cuh")),
    ("attention_hopper.cuh", include_str!("../../kernels/attention_hopper.cuh")),
    ("attention_few.cuh", include_str!("../../kernels/attention_few.cuh")),
    ("slot_bias.cuh", include_str!("../../kernels/slot_bias.cuh")),
    ("carried.cuh", include_str!("../../kernels/carried.cuh")),
];

/// The architecture of kernels that use wgmma and TMA.
const HOPPER: &str = "sm_90a";

const F32: DType = DType::F32;
const BF16: DType = DType::BF16;
const F16: DType = DType::F16;
const E4M3: DType = DType::E4M3;
/// Rows of codes and scales, as words.
const CODES: DType = DType::U32;

/// A kernel's operation and the formats it reads and writes; in the source it is called `op_from_to`.
type Key = (&'static str, DType, DType);

/// One source file: one operation, for some pairs of formats.
struct Source {
    file: &'static str,
    text: &'static str,
    operations: &'static [&'static str],
    formats: &'static [(DType, DType)],
    threads: u32,
    /// The one architecture that can run it, if not every one can.
    only: Option<&'static str>,
}

impl Source {
    fn is_for(&self, architecture: &str) -> bool {
        self.only.is_none_or(|only| only == architecture)
    }
}

macro_rules! sources {
    ($($stem:literal: [$($operation:literal),*] in $formats:expr, $threads:literal threads $(on $only:literal)?;)*) => {
        /// Every source file, each at one address.
        static SOURCES: &[Source] = &[$(Source {
            file: concat!($stem, ".cu"),
            text: include_str!(concat!("../../kernels/", $stem, ".cu")),
            operations: &[$($operation),*],
            formats: &$formats,
            threads: $threads,
            only: [$(Some($only),)? None][0],
        }),*];
    };
}

const SAME: [(DType, DType); 2] = [(F32, F32), (BF16, BF16)];
const ANY: [(DType, DType); 4] = [(F32, F32), (F32, BF16), (BF16, F32), (BF16, BF16)];

sources! {
    "draw": ["draw"] in [(BF16, F32), (BF16, BF16)], 256 threads;
    "draw_coded": ["draw_blocks", "draw_folded"] in [(BF16, E4M3)], 256 threads;
    "draw_coded": ["draw_mxfp4"] in [(BF16, CODES)], 256 threads;
    "copy": ["copy"] in ANY, 256 threads;
    "add": ["add"] in ANY, 256 threads;
    "clamp": ["clamp"] in SAME, 256 threads;
    "gate_rows": ["gate_rows"] in SAME, 256 threads;
    "scale": ["scale"] in SAME, 256 threads;
    "scale_terms": ["scale_terms"] in SAME, 256 threads;
    "soft_cap": ["soft_cap"] in SAME, 256 threads;
    "activate": ["activate"] in ANY, 256 threads;
    "add_slot_bias": ["add_slot_bias"] in SAME, 256 threads;
    "short_conv": ["short_conv", "keep_rows"] in [(F32, F32), (BF16, F32), (BF16, BF16)], 256 threads;
    "recurrence": ["delta128", "delta128_few", "delta256", "delta256_few", "space128", "space128_few", "space256", "space256_few"]
        in [(F32, F32), (BF16, F32)], 128 threads;
    "gate": ["gate"] in [(F32, F32), (F32, BF16), (BF16, BF16)], 256 threads;
    "gather": ["gather"] in [(F32, F32), (F32, BF16), (BF16, F32), (BF16, BF16), (E4M3, F32), (E4M3, BF16)], 256 threads;
    "gather_fp8": ["to_fp8", "from_fp8", "through_fp8"] in SAME, 256 threads;
    "kv_write": ["kv_write"] in [(F32, F32), (F32, BF16), (BF16, BF16), (F32, E4M3), (BF16, E4M3)], 256 threads;
    "embed": ["embed"] in [(F32, F32), (F32, BF16), (BF16, F32), (BF16, BF16), (F16, F32), (F16, BF16)], 256 threads;
    "norm": ["norm", "norm_coded", "norm_narrow"] in ANY, 256 threads;
    "rope_table": ["rope_table"] in [(F32, F32)], 256 threads;
    "rotate": ["rotate"] in SAME, 256 threads;
    "reduce": ["reduce"] in ANY, 256 threads;
    "route": ["route"] in [(F32, F32)], 32 threads;
    "argmax": ["argmax"] in [(F32, F32)], 1024 threads;
    "assign": ["assign"] in [(F32, F32)], 256 threads;
    "count": ["count"] in [(F32, F32)], 1024 threads;
    "send_order": ["send_rows", "send_sums"] in [(F32, F32)], 1024 threads;
    "spread_slots": ["spread_slots"] in [(F32, F32)], 256 threads;
    "receive_order": ["receive_rows"] in [(F32, F32)], 256 threads;
    "receive_order": ["receive_sums"] in [(F32, F32)], 1024 threads;
    "sort": ["sort"] in [(F32, F32)], 1024 threads;
    "expert_parts": ["list_parts", "list_blocks"] in [(F32, F32)], 32 threads;
    "probe": ["spin"] in [(DType::U32, DType::U32)], 1024 threads;
    "probe": ["mark"] in [(DType::U32, DType::U32)], 256 threads;
    "attention": ["attention"] in [(F32, F32), (BF16, BF16), (E4M3, F32), (E4M3, BF16)], 128 threads;
    "attention_gqa": ["attention64", "attention128"] in [(BF16, BF16)], 128 threads;
    "attention_gqa_e4m3": ["attention64", "attention128"] in [(E4M3, BF16)], 128 threads;
    "attention_mla": ["attention_mla"] in [(BF16, BF16)], 256 threads on "sm_90a";
    "attention_mla_e4m3": ["attention_mla"] in [(E4M3, BF16)], 256 threads on "sm_90a";
    "attention_hopper": ["attention_hopper64", "attention_hopper128", "attention_hopper192", "attention_hopper256"] in [(BF16, BF16)], 384 threads on "sm_90a";
    "attention_hopper_e4m3": ["attention_hopper64", "attention_hopper128", "attention_hopper192", "attention_hopper256"] in [(E4M3, BF16)], 384 threads on "sm_90a";
    "attention_few": ["attention_scores"] in [(BF16, BF16)], 128 threads;
    "attention_few": ["attention_sums"] in [(BF16, BF16)], 320 threads;
    "attention_few_e4m3": ["attention_scores"] in [(E4M3, BF16)], 128 threads;
    "attention_few_e4m3": ["attention_sums"] in [(E4M3, BF16)], 320 threads;
    "gemm_f32": ["gemm_plain", "gated_plain"] in [(F32, F32), (F32, BF16)], 256 threads;
    "gemm_bf16": ["gemm_large", "gated_large", "gemm_square", "gated_square", "gemm_middle", "gated_middle"] in [(BF16, F32), (BF16, BF16)],
        256 threads;
    "gemm_bf16": ["gemm_small", "gated_small"] in [(BF16, F32), (BF16, BF16)], 128 threads;
    "gemm_thin": ["gemm_thin8", "gated_thin8", "gemm_thin16", "gated_thin16", "gemm_thin32", "gated_thin32"]
        in [(BF16, BF16)], 128 threads on "sm_90a";
    "gemm_coded": ["coded_middle"] in [(BF16, BF16)], 256 threads;
    "gemm_coded": ["coded_small"] in [(BF16, BF16)], 128 threads;
    "gemm_thin_coded": ["short_thin8", "short_thin16", "scaled_thin8", "scaled_thin16"] in [(BF16, BF16)], 160 threads on "sm_90a";
    "gemm_hopper": ["gemm_hopper256", "gated_hopper256", "gemm_hopper128", "gated_hopper128", "gemm_hopper64", "gated_hopper64"]
        in [(BF16, BF16)], 384 threads on "sm_90a";
    "gemm_hopper": ["gemm_hopper256", "gemm_hopper128", "gemm_hopper64"] in [(BF16, F32)], 384 threads on "sm_90a";
    "gemm_hopper_coded": ["gemm_codes256", "gated_codes256", "gemm_codes64", "gated_codes64"] in [(BF16, BF16)],
        384 threads on "sm_90a";
    "gemm_hopper_coded": ["gemm_codes256", "gemm_codes64"] in [(BF16, F32)], 384 threads on "sm_90a";
    "gemm_hopper_fp8": ["gemm_fp8"] in [(CODES, BF16), (CODES, F32)], 384 threads on "sm_90a";
    "gemm_hopper_fp8": ["gated_fp8"] in [(CODES, BF16), (CODES, CODES)], 384 threads on "sm_90a";
    "gemm_thin_fp8": ["gemm_thin_fp8"] in [(CODES, BF16)], 192 threads on "sm_90a";
    "gemm_thin_fp8": ["gated_thin_fp8"] in [(CODES, BF16), (CODES, CODES)], 192 threads on "sm_90a";
}

/// The shape of a product kernel's tiles, and the shared memory of a block; repeats the numbers of the source.
#[derive(Clone, Copy)]
pub(super) struct GemmTile {
    /// Of `Epilogue::Store` and `Epilogue::SwiGlu`.
    pub(super) operations: [&'static str; 2],
    pub(super) rows: u32,
    pub(super) columns: u32,
    pub(super) shared_bytes: u32,
    /// Bricks that are in shared memory besides, where weights are held in codes.
    pub(super) bricks: u32,
    /// Whether it is for few rows, by a kernel that brings weights at the speed of memory.
    pub(super) thin: bool,
}

/// Bytes of a row of a stage.
const DEPTH_BYTES: u32 = 128;

const fn tensor_tile(operations: [&'static str; 2], rows: u32, columns: u32, stages: u32) -> GemmTile {
    GemmTile {
        operations,
        rows,
        columns,
        shared_bytes: stages * (rows + columns) * DEPTH_BYTES,
        bricks: 0,
        thin: false,
    }
}

const fn coded_tile(operation: &'static str, rows: u32, columns: u32, stages: u32) -> GemmTile {
    let bricks = stages * columns / SIDE as u32;
    GemmTile {
        operations: [operation; 2],
        rows,
        columns,
        shared_bytes: stages * rows * DEPTH_BYTES,
        bricks,
        thin: false,
    }
}

/// Float32 arithmetic.
pub(super) const PLAIN: GemmTile = GemmTile {
    operations: ["gemm_plain", "gated_plain"],
    rows: 64,
    columns: 64,
    shared_bytes: 0,
    bricks: 0,
    thin: false,
};
/// Tensor cores, for few rows in a part up to many. All give the same bits.
pub(super) const SMALL: GemmTile = tensor_tile(["gemm_small", "gated_small"], 16, 64, 6);
pub(super) const MIDDLE: GemmTile = tensor_tile(["gemm_middle", "gated_middle"], 64, 128, 4);
pub(super) const LARGE: GemmTile = tensor_tile(["gemm_large", "gated_large"], 128, 256, 3);
pub(super) const SQUARE: GemmTile = tensor_tile(["gemm_square", "gated_square"], 128, 128, 3);

const fn thin_tile(operations: [&'static str; 2], rows: u32, stages: u32) -> GemmTile {
    let columns = GemmTile::THIN;
    let shared_bytes = stages * ((rows + columns) * LINE_BYTES + BARRIER_BYTES);
    GemmTile { operations, rows, columns, shared_bytes, bricks: 0, thin: true }
}

/// Bytes of a row of a stage of the kernels for few rows, and of a stage's two barriers.
const LINE_BYTES: u32 = 2 * 256 + 16;
const BARRIER_BYTES: u32 = 16;

/// Tensor cores of Hopper, for few rows: so many blocks that weights arrive at the speed of memory. The same bits too.
pub(super) const THIN: [GemmTile; 3] = [
    thin_tile(["gemm_thin8", "gated_thin8"], 8, 5),
    thin_tile(["gemm_thin16", "gated_thin16"], 16, 4),
    thin_tile(["gemm_thin32", "gated_thin32"], 32, 4),
];

/// One stage of the same for weights in codes, of which there are as many as fit.
const fn coded_thin_stage(operation: &'static str, rows: u32) -> GemmTile {
    let (columns, shared_bytes) = (SIDE as u32, rows * LINE_BYTES + BARRIER_BYTES);
    GemmTile { operations: [operation; 2], rows, columns, shared_bytes, bricks: 4, thin: true }
}

/// Weights in codes, for few rows on Hopper: those with scales in bfloat16, and in float32.
pub(super) const SHORT_THIN: [GemmTile; 2] =
    [coded_thin_stage("short_thin8", 8), coded_thin_stage("short_thin16", 16)];
pub(super) const SCALED_THIN: [GemmTile; 2] =
    [coded_thin_stage("scaled_thin8", 8), coded_thin_stage("scaled_thin16", 16)];

impl GemmTile {
    /// Columns of the tiles for few rows of weights in bfloat16.
    const THIN: u32 = 16;
    /// What k is a multiple of there.
    pub(super) const THIN_STEP: usize = 32;

    /// So many stages of what is one.
    pub(super) fn stages(self, stages: u32) -> GemmTile {
        GemmTile { shared_bytes: stages * self.shared_bytes, bricks: stages * self.bricks, ..self }
    }
}

/// The same for weights in codes.
pub(super) const CODED_SMALL: GemmTile = coded_tile("coded_small", 16, 64, 8);
pub(super) const CODED_MIDDLE: GemmTile = coded_tile("coded_middle", 64, 128, 4);

const TILES: [GemmTile; 7] = [PLAIN, SMALL, MIDDLE, SQUARE, LARGE, CODED_SMALL, CODED_MIDDLE];

/// What an attention kernel on the tensor cores takes at once, and the shared memory of a block; repeats the numbers of
/// the source. A row is a token and one of the heads that share a key head.
#[derive(Clone, Copy)]
pub(super) struct AttentionTile {
    pub(super) operation: &'static str,
    pub(super) rows: u32,
    pub(super) shared_bytes: u32,
}

const fn grouped_tile(operation: &'static str, width: u32) -> AttentionTile {
    const STEP: u32 = 64;
    let rows = 128;
    AttentionTile { operation, rows, shared_bytes: (rows + 2 * STEP) * width * 2 }
}

/// Heads of up to so many elements.
pub(super) const ATTENTION_64: AttentionTile = grouped_tile("attention64", 64);
pub(super) const ATTENTION_128: AttentionTile = grouped_tile("attention128", 128);

/// A kernel for heads of exactly so many elements.
#[derive(Clone, Copy)]
pub(super) struct HopperAttention {
    /// Of a key and of a value.
    pub(super) widths: [usize; 2],
    pub(super) tile: AttentionTile,
}

const fn hopper_attention(operation: &'static str, widths: [usize; 2], stages: u32) -> HopperAttention {
    let (rows, step, key, value) = (128, FEW_STEP as u32, widths[0] as u32, widths[1] as u32);
    // Queries, rings of keys and values; of each row its token, head and what it sees, of all rows together; what is put away;
    // barriers.
    let shared_bytes = (rows * key + stages * step * (key + value)) * 2 + (4 * rows + 6) * 4 + 4 * stages * 8;
    HopperAttention { widths, tile: AttentionTile { operation, rows, shared_bytes } }
}

/// In cached blocks of whole steps, by TMA and wgmma: the bits of the ones above, where these take such heads.
pub(super) const ATTENTION_HOPPER: [HopperAttention; 4] = [
    hopper_attention("attention_hopper64", [64, 64], 4),
    hopper_attention("attention_hopper128", [128, 128], 4),
    hopper_attention("attention_hopper192", [192, 128], 4),
    hopper_attention("attention_hopper256", [256, 256], 2),
];
/// One key head of up to 576 elements whose leading ones, up to 512, are the values; Hopper only.
pub(super) const ATTENTION_MLA: AttentionTile =
    AttentionTile { operation: "attention_mla", rows: 64, shared_bytes: 28 * 8192 + 2072 };
pub(super) const MLA_WIDTHS: (usize, usize) = (576, 512);

/// What the kernels for few tokens take at once: keys of a step, query heads and columns of values of a block.
pub(super) const FEW_STEP: usize = 64;
pub(super) const FEW_HEADS: usize = 16;
pub(super) const FEW_COLUMNS: usize = 32;

/// Positions whose keys have a softmax and sums of their own, on the tensor cores; `SPAN_KEYS` in `attention.cuh`.
pub(super) const SPAN_KEYS: usize = 4096;

/// Words at the start of scratch memory that are zero between kernels; `WORDS` in `attention.cuh`.
pub(super) const SCRATCH_WORDS: usize = 16384;

/// What a block leaves that sums up one of several spans.
pub(super) const FEW_PART_BYTES: usize = 128 * (16 + 4) + FEW_HEADS * 4;

/// Shared memory for the steps that are under way to the sums: powers, sums of pairs, values and factors of each.
pub(super) const FEW_SUMS_BYTES: usize = 12 * (2048 + 2048 + FEW_STEP * FEW_COLUMNS * 2 + FEW_HEADS * 4);

/// Shared memory for queries and the keys of a step, in chunks of 64 columns.
pub(super) const fn few_shared_bytes(key_width: usize) -> usize {
    key_width.div_ceil(64) * (FEW_HEADS + FEW_STEP) * 128
}

/// What one kernel takes of a multiprocessor, as its compiler says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelUse {
    /// Its source file.
    pub file: &'static str,
    /// Its name.
    pub kernel: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of registers kept in memory: stores and loads together.
    pub spilled: u32,
}

/// Compiles every kernel for an architecture such as `sm_90a`, without a GPU and without the cache on disk, and
/// tells what each uses. Fails if NVRTC is missing or a kernel does not compile.
pub fn check_kernels(architecture: &str) -> Result<Vec<KernelUse>, DeviceError> {
    nvrtc::version()?;
    let parts = parts_for(architecture);
    let mut options = options(architecture);
    options.push("--ptxas-options=-v".into());
    let uses = by_threads(cores(), parts.len(), |part| {
        let compiled = parts[part].compile(&options)?;
        Ok::<_, DeviceError>(kernel_uses(parts[part].source.file, &compiled.log))
    })?;
    Ok(uses.into_iter().flatten().collect())
}

/// What [`warm_kernels`] found and did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Warmed {
    /// Where compiled kernels are kept.
    pub folder: PathBuf,
    /// Files of machine code that were there already.
    pub kept: usize,
    /// Files that were made now.
    pub compiled: usize,
}

/// Compiles every kernel for an architecture such as `sm_90a` and keeps it on disk, so that no later start waits for
/// the compiler. Needs NVRTC, but no GPU. Calls `each(files done, files)`.
///
/// # Errors
/// NVRTC is missing, a kernel does not compile for that architecture, or the folder cannot be written.
pub fn warm_kernels(architecture: &str, each: impl Fn(usize, usize) + Sync) -> Result<Warmed, DeviceError> {
    let cache = Cache::open(architecture, nvrtc::version()?);
    let unwritable = |why: &str| {
        DeviceError::Unsupported(format!("compiled kernels cannot be kept: {why}; set {CACHE_VARIABLE}"))
    };
    let folder = cache.folder().ok_or_else(|| unwritable("there is no home folder, or none to write to"))?;
    let (parts, done) = (parts_for(architecture), AtomicUsize::new(0));
    let compiled = by_threads(cores(), parts.len(), |part| {
        let part = &parts[part];
        let missing = cache.kept(part).is_none();
        if missing {
            cache.renew(part)?;
            if cache.kept(part).is_none() {
                return Err(unwritable(&format!("{} has no room for them", folder.display())));
            }
        }
        each(done.fetch_add(1, Ordering::Relaxed) + 1, parts.len());
        Ok(missing)
    })?;
    let compiled = compiled.into_iter().filter(|&missing| missing).count();
    Ok(Warmed { folder: folder.to_owned(), kept: parts.len() - compiled, compiled })
}

/// Reads what the assembler says of each kernel:
/// `Compiling entry function 'copy_f32_f32' for 'sm_90a'`, then bytes of spills, then registers.
fn kernel_uses(file: &'static str, log: &str) -> Vec<KernelUse> {
    let number_before = |line: &str, unit: &str| {
        let before = line.split(unit).next()?;
        (before.len() < line.len()).then(|| before.split_whitespace().last()?.parse::<u32>().ok())?
    };
    let mut uses: Vec<KernelUse> = Vec::new();
    for line in log.lines() {
        if let Some(kernel) = line.split("entry function '").nth(1).and_then(|rest| rest.split('\'').next()) {
            uses.push(KernelUse { file, kernel: kernel.to_owned(), registers: 0, spilled: 0 });
        }
        let Some(last) = uses.last_mut() else { continue };
        for unit in [" bytes spill stores", " bytes spill loads"] {
            last.spilled += number_before(line, unit).unwrap_or(0);
        }
        if line.contains("Used ") {
            last.registers = number_before(line, " registers").unwrap_or(last.registers);
        }
    }
    uses
}

fn short(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::BF16 => "bf16",
        DType::F16 => "f16",
        DType::U32 => "u32",
        DType::E4M3 => "e4m3",
    }
}

/// Multiprocessors of a GPU.
pub(super) fn multiprocessors(context: &Context) -> Result<u32, DeviceError> {
    Ok(context.attribute(CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_assembler_is_understood() {
        let log = "ptxas info    : Compiling entry function 'a_f32_f32' for 'sm_90a'\n\
                   ptxas info    : Function properties for a_f32_f32\n\
                   \x20   0 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n\
                   ptxas info    : Used 40 registers, used 1 barriers, 544 bytes cmem[0]\n\
                   ptxas info    : Compiling entry function 'b_f32_f32' for 'sm_90a'\n\
                   ptxas info    : Used 18 registers\n";
        let uses = kernel_uses("a.cu", log);
        let line = |kernel: &KernelUse| (kernel.kernel.clone(), kernel.registers, kernel.spilled);
        assert_eq!(
            uses.iter().map(line).collect::<Vec<_>>(),
            [("a_f32_f32".to_owned(), 40, 12), ("b_f32_f32".to_owned(), 18, 0)]
        );
    }

    /// A kernel that started early and did not wait would read what is not there yet.
    #[test]
    fn every_kernel_takes_its_turn() {
        for source in SOURCES.iter().filter(|source| source.file != "probe.cu") {
            // Those that `KERNEL` makes do in `common.cuh`, those that `HOPPER_VARIANT` and `HOPPER_KERNEL` make in `hopper.cuh`;
            // those of attention are made by the header that their file is named after.
            let its_own = |(file, _): &&(&str, &str)| {
                file.starts_with("attention_") && source.text.contains(&format!("#include \"{file}\""))
            };
            let text =
                HEADERS.iter().filter(its_own).fold(source.text.to_owned(), |text, (_, more)| text + more);
            let made_here = |line: &&str| {
                ["extern \"C\"", "BLOCK_PER_BIN("].iter().any(|start| line.trim_start().starts_with(start))
            };
            let kernels = text.lines().filter(made_here).count();
            let turns = text.matches("take_turn();").count();
            let by_macro = ["\nKERNEL(", "\nHOPPER_VARIANT(", "\nHOPPER_WIDE(", "\nHOPPER_KERNEL("]
                .iter()
                .any(|made| text.contains(made));
            assert!(by_macro || (turns >= 1 && turns >= kernels), "{}: {turns} of {kernels}", source.file);
        }
    }

    /// Runs wherever NVRTC is found; no GPU needed.
    #[test]
    fn every_kernel_compiles_and_those_on_tensor_cores_do_not_spill() {
        for architecture in ["sm_90a", "sm_80"] {
            let uses = match check_kernels(architecture) {
                Ok(uses) => uses,
                Err(missing) if nvrtc::version().is_err() => return eprintln!("skipped: {missing}"),
                Err(error) => panic!("{architecture}: {error}"),
            };
            for used in &uses {
                println!(
                    "{architecture} {:24} {:3} registers, {} bytes spilled",
                    used.kernel, used.registers, used.spilled
                );
            }
            let wanted: usize = SOURCES
                .iter()
                .filter(|source| source.is_for(architecture))
                .map(|source| source.operations.len() * source.formats.len())
                .sum();
            assert_eq!(uses.len(), wanted, "kernels found in the log");
            let on_tensor_cores =
                |used: &&KernelUse| ["gemm", "attention_"].iter().any(|start| used.file.starts_with(start));
            let spilling: Vec<_> =
                uses.iter().filter(|used| on_tensor_cores(used) && used.spilled > 0).collect();
            assert!(spilling.is_empty(), "{spilling:?}");
        }
    }
}
