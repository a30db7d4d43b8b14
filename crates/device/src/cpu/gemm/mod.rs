//! Matrix kernels over packed weights: `C[M, N] = A[M, K] · W[N, K]ᵀ`.
//!
//! Weights are packed once ([`PackedMatrix`]) into panels of columns. One call multiplies several row
//! ranges, each by its own matrix (the experts of a stage, the heads of a projection), or a single one; all
//! use one micro-kernel.
//!
//! **Row invariance.** The bits of an output row depend on that row of `A`, on `W`, on the element types and on the
//! instruction set, and on nothing else: each output element is one chain of multiply-adds over `k` in rising order
//! (for AMX a chain of sums of a group of steps each), whatever the number of rows, the position of the row, the tile it
//! falls into, the number of threads or the grouping.

mod amx;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx_pieces;
mod avx2;
mod avx512;
mod coded;
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod decode_amx;
#[cfg(target_arch = "x86_64")]
mod decode_avx2;
#[cfg(target_arch = "x86_64")]
mod decode_avx512;
mod epilogue;
pub(crate) mod int8;
#[cfg(target_arch = "x86_64")]
mod int8_avx2;
#[cfg(target_arch = "x86_64")]
mod int8_avx512;
mod kernel;
mod pack;
pub mod peak;
mod scalar;
mod tiling;

pub(super) use epilogue::exp;
pub(super) use kernel::{BLOCK_STRIDE, Blocks, Functions, Prefetch, Tile};
pub(super) use pack::{AlignedWords, SourceRow, bf16_to_words, bytes_to_words};
pub use pack::{ElementType, PackedMatrix};
pub(super) use tiling::multiply;

use std::fmt;
use std::str::FromStr;

/// An instruction set the kernels are written for, from the slowest to the fastest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Portable Rust: separate multiply and add.
    Scalar,
    /// AVX2 and FMA, 8 lanes; bf16 is widened to f32.
    Avx2,
    /// AVX-512 (F, BW, VL, DQ), 16 lanes; bf16 uses VDPBF16PS where the processor has it and is
    /// widened to f32 otherwise.
    Avx512,
    /// AVX-512, and products with weights in tiles by TDPBF16PS, where Linux grants them: of bf16, and of f32 in three bf16
    /// pieces each, which is as exact as multiply-adds.
    Amx,
}

impl Isa {
    /// All levels, slowest first.
    pub const ALL: [Isa; 4] = [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Amx];

    /// The fastest level this processor supports.
    pub fn detect() -> Self {
        *Self::ALL.iter().rfind(|isa| isa.is_supported()).expect("scalar code runs anywhere")
    }

    /// Whether this processor can run the level.
    pub fn is_supported(self) -> bool {
        match self {
            Isa::Scalar => true,
            Isa::Avx2 => avx2::is_supported(),
            Isa::Avx512 => avx512::is_supported(),
            Isa::Amx => amx::is_supported(),
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
        })
    }
}

impl FromStr for Isa {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|isa| isa.to_string() == name);
        found.ok_or_else(|| format!("unknown instruction set {name:?}: use scalar, avx2, avx512 or amx"))
    }
}
