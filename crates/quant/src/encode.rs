//! Weights become codes: the tensors that a checkpoint would keep of them, and what they lost.

use crate::element::{E2M1, E2M1_MAX, E4M3_MAX, e8m0, to_e2m1, to_e4m3};
use crate::{QuantError, StoredTensor, StoredType};
use half::bf16;
use serde_json::{Value, json};
use std::fmt;

/// Rows and columns of a block of FP8.
const FP8_BLOCK: usize = 128;

/// Columns that share a scale in MXFP4, INT4 and Q8_0.
const GROUP: usize = 32;

/// A coding that weights can be brought into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Target {
    /// FP8 e4m3, a float32 scale for 128 × 128 weights, as DeepSeek-V3 has it.
    Fp8PerBlock,
    /// FP4 e2m1, a power of two for 32 weights of a row, as `compressed-tensors` has it.
    Mxfp4,
    /// Four bits from −8 to 7, a bfloat16 scale for 32 weights of a row, as `compressed-tensors` has it.
    Int4,
    /// Signed bytes, a scale for 32 weights of a row, as GGUF's Q8_0: four a word with a bfloat16 scale, as
    /// `compressed-tensors` has them.
    Q8_0,
}

impl Target {
    /// All of them.
    pub const ALL: [Target; 4] = [Target::Fp8PerBlock, Target::Mxfp4, Target::Int4, Target::Q8_0];

    /// The coding of this name.
    pub fn named(name: &str) -> Option<Target> {
        Target::ALL.into_iter().find(|target| target.to_string() == name)
    }

    /// `quantization_config` of a checkpoint whose matrices are coded so, but for those of modules that stay as they are.
    pub fn config(self, plain: &[String]) -> Value {
        let compressed = |format: &str, bits: usize, kind: &str| {
            let weights = json!({
                "num_bits": bits, "type": kind, "strategy": "group", "group_size": GROUP, "symmetric": true, "dynamic": false,
            });
            let group = json!({
                "targets": ["Linear"], "input_activations": null, "output_activations": null, "weights": weights,
            });
            json!({
                "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed",
                "kv_cache_scheme": null, "config_groups": {"group_0": group}, "ignore": plain,
            })
        };
        match self {
            Target::Fp8PerBlock => json!({
                "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
                "weight_block_size": [FP8_BLOCK, FP8_BLOCK], "modules_to_not_convert": plain,
            }),
            Target::Mxfp4 => compressed("mxfp4-pack-quantized", 4, "float"),
            Target::Int4 => compressed("pack-quantized", 4, "int"),
            Target::Q8_0 => compressed("pack-quantized", 8, "int"),
        }
    }

    /// Whether a matrix of so many columns has such codes: groups must be whole.
    pub fn fits(self, columns: usize) -> bool {
        self == Target::Fp8PerBlock || columns.is_multiple_of(GROUP)
    }

    /// The tensors that a matrix `[rows, columns]` becomes: their names, formats and shapes. `name` is what a plain
    /// checkpoint calls it.
    pub fn tensors(self, name: &str, [rows, columns]: [usize; 2]) -> Vec<(String, StoredTensor)> {
        let stem = name.strip_suffix(".weight").unwrap_or(name);
        let tensor =
            |name: String, dtype, shape: &[usize]| (name, StoredTensor { dtype, shape: shape.to_vec() });
        let packed = |dtype, columns| tensor(format!("{stem}.weight_packed"), dtype, &[rows, columns]);
        let scales = |dtype| tensor(format!("{stem}.weight_scale"), dtype, &[rows, columns / GROUP]);
        let shape = || tensor(format!("{stem}.weight_shape"), StoredType::I64, &[2]);
        match self {
            Target::Fp8PerBlock => {
                let grid = [rows.div_ceil(FP8_BLOCK), columns.div_ceil(FP8_BLOCK)];
                vec![
                    tensor(name.to_owned(), StoredType::E4M3, &[rows, columns]),
                    tensor(format!("{name}_scale_inv"), StoredType::F32, &grid),
                ]
            }
            Target::Mxfp4 => vec![packed(StoredType::U8, columns / 2), scales(StoredType::U8)],
            Target::Int4 => vec![packed(StoredType::I32, columns / 8), scales(StoredType::BF16), shape()],
            Target::Q8_0 => vec![packed(StoredType::I32, columns / 4), scales(StoredType::BF16), shape()],
        }
    }

    /// Codes a matrix of rows of `columns` finite weights: its [`tensors`](Target::tensors).
    pub fn encode(self, name: &str, weights: &[f32], columns: usize) -> Result<Vec<Encoded>, QuantError> {
        assert!(
            columns > 0 && weights.len().is_multiple_of(columns),
            "rows of `{name}` are whole; this is a bug"
        );
        let refused = |problem: String| Err(QuantError::new(format!("tensor `{name}`: {problem}")));
        if let Some(i) = weights.iter().position(|weight| !weight.is_finite()) {
            let (row, column, value) = (i / columns, i % columns, weights[i]);
            return refused(format!("row {row}, column {column} is {value}, which no coding has"));
        }
        if !self.fits(columns) {
            return refused(format!(
                "{self} needs whole groups of {GROUP} columns, of which it has {columns}"
            ));
        }
        let shape = [weights.len() / columns, columns];
        let bytes = match self {
            Target::Fp8PerBlock => fp8_per_block(weights, shape),
            Target::Mxfp4 => mxfp4(weights),
            Target::Int4 => int4(weights, shape),
            Target::Q8_0 => q8_0(weights, shape),
        };
        let tensors = self.tensors(name, shape).into_iter().zip(bytes);
        Ok(tensors.map(|((name, tensor), bytes)| Encoded { name, tensor, bytes }).collect())
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Target::Fp8PerBlock => "fp8_per_block",
            Target::Mxfp4 => "mxfp4",
            Target::Int4 => "int4",
            Target::Q8_0 => "q8_0",
        })
    }
}

/// A tensor to be stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// Its name.
    pub name: String,
    /// Its format and shape.
    pub tensor: StoredTensor,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// What coding has changed.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct CodingError {
    /// Sum of the squares of all differences.
    squared: f64,
    /// Sum of the squares of all weights.
    energy: f64,
    /// The largest difference.
    pub largest: f32,
}

impl CodingError {
    /// Adds a matrix: its weights, and those that its codes mean.
    pub fn add(&mut self, weights: &[f32], coded: &[f32]) {
        for (&weight, &coded) in weights.iter().zip(coded) {
            self.squared += squared(weight - coded);
            self.energy += squared(weight);
            self.largest = self.largest.max((weight - coded).abs());
        }
    }

    /// Root of the mean square of differences, relative to that of the weights; 0 where there are none.
    pub fn relative(&self) -> f64 {
        if self.energy == 0.0 { 0.0 } else { (self.squared / self.energy).sqrt() }
    }
}

fn largest(weights: impl Iterator<Item = f32>) -> f32 {
    weights.fold(0.0, |largest, weight| largest.max(weight.abs()))
}

fn squared(number: f32) -> f64 {
    f64::from(number).powi(2)
}

fn fp8_per_block(weights: &[f32], [rows, columns]: [usize; 2]) -> Vec<Vec<u8>> {
    let grid = [rows.div_ceil(FP8_BLOCK), columns.div_ceil(FP8_BLOCK)];
    let mut codes = vec![0; weights.len()];
    let mut scales = Vec::with_capacity(grid[0] * grid[1] * 4);
    for first_row in (0..rows).step_by(FP8_BLOCK) {
        for first in (0..columns).step_by(FP8_BLOCK) {
            let lines = (first_row..rows.min(first_row + FP8_BLOCK))
                .map(|row| row * columns + first..row * columns + columns.min(first + FP8_BLOCK));
            let block = lines.clone().flat_map(|line| weights[line].iter().copied());
            let scale = match largest(block) {
                0.0 => 1.0,
                largest => (largest / E4M3_MAX).max(f32::MIN_POSITIVE),
            };
            scales.extend(scale.to_le_bytes());
            for line in lines {
                let pairs = codes[line.clone()].iter_mut().zip(&weights[line]);
                pairs.for_each(|(code, &weight)| *code = to_e4m3(weight / scale));
            }
        }
    }
    vec![codes, scales]
}

fn pairs(codes: impl ExactSizeIterator<Item = u8>, into: &mut Vec<u8>) {
    let mut low = None;
    for code in codes {
        match low.take() {
            None => low = Some(code),
            Some(low) => into.push(low | code << 4),
        }
    }
}

fn mxfp4(weights: &[f32]) -> Vec<Vec<u8>> {
    let mut codes = Vec::with_capacity(weights.len() / 2);
    let mut scales = Vec::with_capacity(weights.len() / GROUP);
    for group in weights.chunks_exact(GROUP) {
        let scale = power_of_two(group);
        scales.push(scale);
        pairs(group.iter().map(|&weight| to_e2m1(weight / e8m0(scale))), &mut codes);
    }
    vec![codes, scales]
}

/// The scale of a group of MXFP4: of the power that brings the largest weight to between 4 and 8, and the next one, under
/// which none is cut to 6, the one that loses less.
fn power_of_two(group: &[f32]) -> u8 {
    let largest = largest(group.iter().copied());
    if largest == 0.0 {
        return 127;
    }
    let exponent = (largest.to_bits() >> 23) as i32 - E2M1_MAX.log2() as i32;
    let [low, high] = [exponent, exponent + 1].map(|code| code.clamp(1, 254) as u8);
    let lost = |code: u8| {
        let scale = e8m0(code);
        let lost = |&weight: &f32| squared(E2M1[to_e2m1(weight / scale) as usize] * scale - weight);
        group.iter().map(lost).sum::<f64>()
    };
    if lost(high) < lost(low) { high } else { low }
}

/// Rows and columns as a tensor of their own.
fn as_words(shape: [usize; 2]) -> Vec<u8> {
    shape.map(|width| (width as i64).to_le_bytes()).concat()
}

fn int4(weights: &[f32], shape: [usize; 2]) -> Vec<Vec<u8>> {
    let mut codes = Vec::with_capacity(weights.len() / 2);
    let mut scales = Vec::with_capacity(weights.len() / GROUP * 2);
    for group in weights.chunks_exact(GROUP) {
        let scale = int4_scale(group);
        scales.extend(bf16::from_f32(scale).to_le_bytes());
        pairs(group.iter().map(|&weight| (int4_code(weight, scale) + 8.0) as u8), &mut codes);
    }
    vec![codes, scales, as_words(shape)]
}

/// The whole number from −8 to 7 that is nearest to a weight over its scale.
fn int4_code(weight: f32, scale: f32) -> f32 {
    (weight / scale).round_ties_even().clamp(-8.0, 7.0)
}

/// The scale of a group of INT4: of some between those that cut no weight and those that are finer but cut the largest
/// ones, the one that loses least.
fn int4_scale(group: &[f32]) -> f32 {
    let largest = largest(group.iter().copied());
    let mut best = (f64::INFINITY, 1.0);
    for parts in [7.0, 7.5, 8.0, 8.5, 9.0, 9.5] {
        let scale = bf16::from_f32(largest / parts).to_f32();
        if scale < f32::MIN_POSITIVE {
            continue;
        }
        let lost = |&weight: &f32| squared(int4_code(weight, scale) * scale - weight);
        let lost = group.iter().map(lost).sum::<f64>();
        if lost < best.0 {
            best = (lost, scale);
        }
    }
    best.1
}

/// The largest weight of a group becomes ±127. Bytes are stored plus 128.
fn q8_0(weights: &[f32], shape: [usize; 2]) -> Vec<Vec<u8>> {
    let mut codes = Vec::with_capacity(weights.len());
    let mut scales = Vec::with_capacity(weights.len() / GROUP * 2);
    for group in weights.chunks_exact(GROUP) {
        let scale = bf16::from_f32(largest(group.iter().copied()) / 127.0);
        let scale = if scale.to_f32() < f32::MIN_POSITIVE { bf16::ONE } else { scale };
        scales.extend(scale.to_le_bytes());
        let code = |&weight: &f32| (weight / scale.to_f32()).round_ties_even().clamp(-128.0, 127.0) + 128.0;
        codes.extend(group.iter().map(|weight| code(weight) as u8));
    }
    vec![codes, scales, as_words(shape)]
}
