//! Codes in one order, whatever file they came from: what a processor holds that computes with coded weights.
//!
//! A matrix is rows of codes, of two in a byte the even column in the low nibble, and a *record* of scales for each row and
//! group of columns. A weight is `(code − zero) · scale`, or `code · scale − minimum` where a format has minima; either is
//! exact in float32 or rounded once, as [`CodedTensor::decode`] has it, and then rounded to bfloat16.

use crate::coding::{Blocks, CodedTensor, Coding, Element, Order};
use crate::element::{E2M1, E4M3, e8m0};
use crate::{Encoded, GgmlType, Hints, QuantError, Rows, StoredTensor, StoredTensors, StoredType, Target};
use half::{bf16, f16};
use std::fmt;
use std::ops::Range;

/// What a code means before its scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// FP4 e2m1.
    E2M1,
    /// Four bits without a sign. Without zeros or minima, eight stands for zero.
    U4,
    /// Signed bytes.
    I8,
    /// FP8 e4m3.
    E4M3,
}

impl Code {
    /// Bits of a code.
    pub fn bits(self) -> usize {
        match self {
            Code::E2M1 | Code::U4 => 4,
            Code::I8 | Code::E4M3 => 8,
        }
    }

    /// What a code means; of [`Code::U4`] the number itself.
    pub fn value(self, code: u8) -> f32 {
        match self {
            Code::E2M1 => E2M1[code as usize & 15],
            Code::U4 => f32::from(code & 15),
            Code::I8 => f32::from(code as i8),
            Code::E4M3 => E4M3[code as usize],
        }
    }
}

/// How a record gives a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scale {
    /// A power of two.
    E8M0,
    /// IEEE half precision.
    F16,
    /// bfloat16.
    BF16,
    /// IEEE single precision.
    F32,
    /// A half-precision factor, and signed bytes for each [`Format::part`] of the group, whose product is the scale.
    Nested,
    /// Two half-precision factors, and bytes of either for each [`Format::part`] of the group: the products are scale and
    /// minimum.
    NestedWithMinima,
}

/// A format in which weights can be held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Format {
    /// What a code means.
    pub code: Code,
    /// How a record gives scales.
    pub scale: Scale,
    /// Columns of a record, a multiple of [`Format::part`].
    pub group: usize,
    /// Columns that have one scale, a multiple of eight.
    pub part: usize,
    /// Whether a record ends in a byte that is the code of zero.
    pub zeros: bool,
}

impl Format {
    /// Whether codes of this format may be FP8 e4m3 with a scale for every 128 × 128 weights: rows tell.
    pub fn may_be_fp8_blocks(&self) -> bool {
        (self.code, self.group, self.part, self.zeros) == (Code::E4M3, 128, 128, false)
    }

    /// Whether weights of this format may be multiplied as FP8 blocks: because they are such, or fold into them.
    pub fn may_become_fp8_blocks(&self) -> bool {
        self.may_be_fp8_blocks() || self.may_fold()
    }

    /// Bytes of a record.
    pub fn record_bytes(&self) -> usize {
        self.fields().map(|field| field.len()).sum()
    }

    /// The numbers of a record, as ranges of its bytes: factors, then a byte of each part or the zero.
    pub fn fields(&self) -> impl Iterator<Item = Range<usize>> + use<> {
        let parts = self.group / self.part;
        let (wide, count, narrow) = match self.scale {
            Scale::E8M0 => (1, 1, 0),
            Scale::F16 | Scale::BF16 => (2, 1, 0),
            Scale::F32 => (4, 1, 0),
            Scale::Nested => (2, 1, parts),
            Scale::NestedWithMinima => (2, 2, 2 * parts),
        };
        let narrow = narrow + usize::from(self.zeros);
        let factors = (0..count).map(move |i| i * wide..(i + 1) * wide);
        factors.chain((0..narrow).map(move |i| count * wide + i..count * wide + i + 1))
    }

    /// Bytes of a row of codes.
    pub fn row_bytes(&self, columns: usize) -> usize {
        (columns * self.code.bits()).div_ceil(8)
    }

    /// Records of a row.
    pub fn groups(&self, columns: usize) -> usize {
        columns.div_ceil(self.group)
    }

    /// Bits of a weight, scales included.
    pub fn bits(&self) -> f64 {
        self.code.bits() as f64 + (8 * self.record_bytes()) as f64 / self.group as f64
    }

    /// Scale, zero and minimum of part `part` of a group, from its record.
    pub fn affine(&self, record: &[u8], part: usize) -> Affine {
        let half = |at: usize| f16::from_le_bytes([record[at], record[at + 1]]).to_f32();
        let parts = self.group / self.part;
        let (scale, minimum) = match self.scale {
            Scale::E8M0 => (e8m0(record[0]), 0.0),
            Scale::F16 => (half(0), 0.0),
            Scale::BF16 => (bf16::from_le_bytes([record[0], record[1]]).to_f32(), 0.0),
            Scale::F32 => (f32::from_le_bytes([record[0], record[1], record[2], record[3]]), 0.0),
            Scale::Nested => (half(0) * f32::from(record[2 + part] as i8), 0.0),
            Scale::NestedWithMinima => {
                (half(0) * f32::from(record[4 + part]), half(2) * f32::from(record[4 + parts + part]))
            }
        };
        let zero = match self.code {
            Code::U4 if self.zeros => f32::from(record[self.record_bytes() - 1]),
            _ if self.zeros => f32::from(record[self.record_bytes() - 1] as i8),
            Code::U4 if self.scale != Scale::NestedWithMinima => 8.0,
            _ => 0.0,
        };
        Affine { scale, zero, minimum }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = match (self.code, self.scale) {
            (Code::E2M1, _) => "mxfp4",
            (Code::U4, _) => "int4",
            (Code::I8, _) => "int8",
            (Code::E4M3, _) => "fp8",
        };
        write!(f, "{name} in groups of {}", self.part)?;
        match (self.zeros, self.scale) {
            (true, _) => f.write_str(" with zeros"),
            (_, Scale::NestedWithMinima) => f.write_str(" with minima"),
            _ => Ok(()),
        }
    }
}

/// What makes weights of codes: `(code − zero) · scale − minimum`, of which zero or minimum is nought.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Affine {
    /// See above.
    pub scale: f32,
    /// See above.
    pub zero: f32,
    /// See above.
    pub minimum: f32,
}

/// A matrix in codes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Codes {
    /// How they are coded.
    pub format: Format,
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// Rows of [`Format::row_bytes`].
    pub codes: Vec<u8>,
    /// Rows of [`Format::groups`] records.
    pub records: Vec<u8>,
}

impl Codes {
    /// Matrices of one format and as many columns, the rows of each behind those of the one before.
    ///
    /// # Panics
    /// If there are none, or they differ in format or columns.
    pub fn stacked(matrices: Vec<Codes>) -> Codes {
        let below = |mut whole: Codes, more: Codes| {
            let kind = |codes: &Codes| (codes.format, codes.columns);
            assert_eq!(kind(&whole), kind(&more), "matrices that are stacked differ in kind");
            whole.rows += more.rows;
            whole.codes.extend(more.codes);
            whole.records.extend(more.records);
            whole
        };
        matrices.into_iter().reduce(below).expect("a matrix to stack others on")
    }

    /// The codes of a row.
    pub fn row(&self, row: usize) -> &[u8] {
        let bytes = self.format.row_bytes(self.columns);
        &self.codes[row * bytes..][..bytes]
    }

    /// The record of a group of a row.
    pub fn record(&self, row: usize, group: usize) -> &[u8] {
        let bytes = self.format.record_bytes();
        &self.records[(row * self.format.groups(self.columns) + group) * bytes..][..bytes]
    }

    /// Decodes a row, before it is rounded to bfloat16.
    pub fn decode(&self, row: usize, out: &mut [f32]) {
        let Format { code, group, part, .. } = self.format;
        let codes = self.row(row);
        for (index, out) in out.chunks_mut(part).enumerate() {
            let first = index * part;
            let record = self.record(row, first / group);
            let Affine { scale, zero, minimum } = self.format.affine(record, first % group / part);
            let weight = |byte: u8| (code.value(byte) - zero) * scale - minimum;
            match code.bits() {
                4 => {
                    let weights: [f32; 16] = std::array::from_fn(|code| weight(code as u8));
                    for (pair, &byte) in out.chunks_mut(2).zip(&codes[first / 2..]) {
                        let nibbles = [byte & 15, byte >> 4];
                        pair.iter_mut().zip(nibbles).for_each(|(out, code)| *out = weights[code as usize]);
                    }
                }
                _ => out.iter_mut().zip(&codes[first..]).for_each(|(out, &byte)| *out = weight(byte)),
            }
        }
    }
}

/// Weights that are not zero and lie outside have no place among codes that are held: rounding them to bfloat16 by
/// multiplication could overflow, or meet numbers below the normal ones.
const SMALLEST: f32 = f32::from_bits((127 - 90) << 23);
const LARGEST: f32 = f32::from_bits((127 + 90) << 23);

/// The largest scale of FP8 that is held: the exponent of a code is corrected together with it.
const LARGEST_OF_E4M3: f32 = 64.0;

impl CodedTensor {
    /// The format in which some columns can be held; nothing if there is none for this coding or for where they begin.
    pub fn format(&self, columns: &Range<usize>) -> Option<Format> {
        let whole = self.whole_format()?;
        // Groups begin at the first column that is asked for.
        let common = |length: usize| if columns.start == 0 { length } else { gcd(length, columns.start) };
        let group = common(whole.group);
        let part = if whole.group == whole.part { group } else { whole.part };
        let most = columns.len().next_multiple_of(part);
        let group = group.min(most);
        // Where parts have scales of their own, no column cuts one.
        let cut = whole.group != whole.part && group < whole.part;
        let part = part.min(group);
        (!cut && part > 0 && part.is_multiple_of(8) && group.is_multiple_of(part)).then_some(Format {
            group,
            part,
            ..whole
        })
    }

    fn whole_format(&self) -> Option<Format> {
        let blocks = match self.coding {
            Coding::Ggml(format) => return ggml_format(format),
            Coding::Blocks(blocks) => blocks,
        };
        let code = match blocks.element {
            Element::E4M3 => Code::E4M3,
            Element::E2M1 => Code::E2M1,
            Element::U4 => Code::U4,
            Element::U8 | Element::I8 => Code::I8,
            Element::E5M2 => return None,
        };
        let scale = match self.part(&self.scales).dtype {
            StoredType::F32 => Scale::F32,
            StoredType::F16 => Scale::F16,
            StoredType::BF16 => Scale::BF16,
            StoredType::E8M0 | StoredType::U8 => Scale::E8M0,
            _ => return None,
        };
        // One group for whole rows is as long as they are.
        let group =
            if blocks.columns >= self.shape[2] { self.shape[2].next_multiple_of(8) } else { blocks.columns };
        let whole = self.global.is_none() && !self.act_order;
        whole.then_some(Format { code, scale, group, part: group, zeros: blocks.zeros })
    }

    /// The codes of some columns of some rows, in the [`Format`] that these columns have. Nothing if they are such that
    /// they cannot be held.
    pub fn codes<S: StoredTensors>(
        &self,
        source: &S,
        rows: Rows,
        columns: Range<usize>,
    ) -> Result<Option<Codes>, S::Error> {
        let Some(format) = self.format(&columns) else { return Ok(None) };
        self.check_stated_shape(source)?;
        let mut into = Codes {
            format,
            rows: rows.count,
            columns: columns.len(),
            codes: vec![0; rows.count * format.row_bytes(columns.len())],
            records: Vec::with_capacity(rows.count * format.groups(columns.len()) * format.record_bytes()),
        };
        match self.coding {
            Coding::Ggml(blocks) => self.ggml_codes(source, blocks, rows, columns.clone(), &mut into)?,
            Coding::Blocks(blocks) if blocks.order == Order::Rows => {
                self.codes_of_rows(source, blocks, rows, columns.clone(), &mut into)?;
            }
            Coding::Blocks(blocks) => {
                if !self.transposed_codes(source, blocks, rows, columns.clone(), &mut into)? {
                    return Ok(None);
                }
            }
        }
        Ok(self.holdable(&into, rows, columns.start)?.then_some(into))
    }

    fn codes_of_rows<S: StoredTensors>(
        &self,
        source: &S,
        blocks: Blocks,
        rows: Rows,
        columns: Range<usize>,
        into: &mut Codes,
    ) -> Result<(), S::Error> {
        let bits = blocks.element.bits();
        let unit = self.codes.dtype.block().1 * 8 / bits;
        // What follows the last column in its word is read with it.
        let stored = columns.start / unit..columns.end.div_ceil(unit);
        let lead = (columns.start % unit) * bits / 8;
        let read_bytes = self.codes.dtype.bytes(stored.len()).max(1);
        let row_bytes = into.format.row_bytes(columns.len()).max(1);
        let mut out = into.codes.chunks_exact_mut(row_bytes);
        let mut bytes = Vec::new();
        for chunk in rows.chunks(CHUNK / read_bytes) {
            self.codes.read(source, chunk, stored.clone(), &mut bytes)?;
            for (row, out) in bytes.chunks_exact(read_bytes).zip(&mut out) {
                out.copy_from_slice(&row[lead..lead + row_bytes]);
            }
        }
        if blocks.element == Element::U8 {
            into.codes.iter_mut().for_each(|code| *code ^= 0x80);
        }
        if rows.count == 0 {
            return Ok(());
        }
        // All scales of these rows and columns.
        let span = rows.span();
        let scale_rows = self.scale_row(span.start, blocks)..self.scale_row(span.end - 1, blocks) + 1;
        let wide = columns.start / blocks.columns..columns.end.div_ceil(blocks.columns);
        let scales = self.part(&self.scales);
        scales.read(source, Rows::range(scale_rows.clone()), wide.clone(), &mut bytes)?;
        let zeros = match &self.zeros {
            Some(zeros) => self.zeros(source, zeros, blocks.element, scale_rows.clone(), wide.clone())?,
            None => Vec::new(),
        };
        let size = scales.dtype.bytes(1);
        for i in 0..rows.count {
            let line = (self.scale_row(rows.at(i), blocks) - scale_rows.start) * wide.len();
            for first in columns.clone().step_by(into.format.group) {
                let at = line + first / blocks.columns - wide.start;
                into.records.extend_from_slice(&bytes[at * size..][..size]);
                if let Some(&zero) = zeros.get(at) {
                    let zero = if blocks.element == Element::U8 { zero - 128.0 } else { zero };
                    into.records.push(zero as i16 as u8);
                }
            }
        }
        Ok(())
    }

    fn ggml_codes<S: StoredTensors>(
        &self,
        source: &S,
        format: GgmlType,
        rows: Rows,
        columns: Range<usize>,
        into: &mut Codes,
    ) -> Result<(), S::Error> {
        let block = format.block();
        let wide = columns.start / block * block..columns.end.next_multiple_of(block);
        let read_bytes = self.codes.dtype.bytes(wide.len()).max(1);
        let row_bytes = into.format.row_bytes(columns.len()).max(1);
        let mut bytes = Vec::new();
        let mut codes = vec![0; wide.len()];
        let mut row_out = into.codes.chunks_exact_mut(row_bytes);
        for chunk in rows.chunks(CHUNK / read_bytes) {
            self.codes.read(source, chunk, wide.clone(), &mut bytes)?;
            for (row, out) in bytes.chunks_exact(read_bytes).zip(&mut row_out) {
                let stored = row.chunks_exact(format.block_bytes());
                stored.clone().zip(codes.chunks_exact_mut(block)).for_each(|(b, out)| format.codes(b, out));
                let codes = &codes[columns.start - wide.start..][..columns.len()];
                match into.format.code.bits() {
                    4 => codes.chunks(2).zip(out).for_each(|(pair, out)| {
                        *out = pair[0] | pair.get(1).copied().unwrap_or(0) << 4;
                    }),
                    _ => out.copy_from_slice(codes),
                }
                for group in 0..into.format.groups(columns.len()) {
                    let first = columns.start + group * into.format.group;
                    let block_bytes = &row[(first - wide.start) / block * format.block_bytes()..];
                    let parts = first % block / into.format.part;
                    let parts = parts..parts + into.format.group / into.format.part;
                    format.record(&block_bytes[..format.block_bytes()], parts, &mut into.records);
                }
            }
        }
        Ok(())
    }

    /// Whether all weights can be held; an error where a code or a scale is one of no weight.
    fn holdable(&self, codes: &Codes, rows: Rows, first: usize) -> Result<bool, QuantError> {
        let Format { code, part, group, .. } = codes.format;
        let mut values = vec![0.0; codes.columns];
        let mut holdable = true;
        for row in 0..codes.rows {
            codes.decode(row, &mut values);
            if !values.iter().all(|v| *v == 0.0 || (SMALLEST..=LARGEST).contains(&v.abs())) {
                holdable = false;
                self.store(&values, rows.at(row), first, &mut vec![bf16::ZERO; codes.columns])?;
            }
            for at in (0..codes.columns).step_by(part) {
                let affine = codes.format.affine(codes.record(row, at / group), at % group / part);
                holdable &= code != Code::E4M3 || affine.scale.abs() <= LARGEST_OF_E4M3;
                // Blocks with minima mean what they say with a scale of zero too, and the other ones of GGUF.
                let says = matches!(self.coding, Coding::Blocks(_)) && affine.scale == 0.0;
                if says && (at..codes.columns.min(at + part)).any(|k| codes.value(row, k) != affine.zero) {
                    return Err(self.zero_scale(rows.at(row), first + at));
                }
            }
        }
        Ok(holdable)
    }
}

impl Codes {
    /// What a code means before its scale.
    fn value(&self, row: usize, k: usize) -> f32 {
        let codes = self.row(row);
        match self.format.code.bits() {
            4 => self.format.code.value(codes[k / 2] >> (4 * (k % 2))),
            _ => self.format.code.value(codes[k]),
        }
    }
}

impl Target {
    /// The format in which a matrix of so many columns is held when it was coded so.
    pub fn format(self, columns: usize) -> Format {
        let (code, scale, group) = match self {
            Target::Fp8PerBlock => (Code::E4M3, Scale::F32, 128.min(columns.next_multiple_of(8))),
            Target::Mxfp4 => (Code::E2M1, Scale::E8M0, 32),
            Target::Int4 => (Code::U4, Scale::BF16, 32),
            Target::Q8_0 => (Code::I8, Scale::BF16, 32),
        };
        Format { code, scale, group, part: group, zeros: false }
    }

    /// Codes rows of `columns` finite weights, to be held. Nothing for numbers that cannot be.
    pub fn codes(self, name: &str, weights: &[f32], columns: usize) -> Result<Option<Codes>, QuantError> {
        let shape = [weights.len() / columns, columns];
        let made = Made(self.encode(name, weights, columns)?);
        let hints = Hints { block: Some([128, 128]), group: Some(32), ..Hints::default() };
        let coded = CodedTensor::detect(name, &shape, &hints, |name| made.find(name))?;
        let coded = coded.ok_or_else(|| QuantError::new(format!("`{name}` has no codes; this is a bug")))?;
        coded.codes(&made, Rows::range(0..shape[0]), 0..columns)
    }
}

/// Tensors that were just coded.
struct Made(Vec<Encoded>);

impl Made {
    fn named(&self, name: &str) -> Option<&Encoded> {
        self.0.iter().find(|encoded| encoded.name == name)
    }
}

impl StoredTensors for Made {
    type Error = QuantError;

    fn find(&self, name: &str) -> Option<StoredTensor> {
        self.named(name).map(|encoded| encoded.tensor.clone())
    }

    fn fill(&self, name: &str, first: u64, into: &mut [u8]) -> Result<(), QuantError> {
        let encoded = self.named(name).ok_or_else(|| QuantError::new(format!("there is no `{name}`")))?;
        into.copy_from_slice(&encoded.bytes[first as usize..][..into.len()]);
        Ok(())
    }
}

/// Bytes of codes in memory at once, beside what becomes of them.
const CHUNK: usize = 1 << 20;

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

fn ggml_format(format: GgmlType) -> Option<Format> {
    let (code, scale, part) = match format {
        GgmlType::Q4_0 => (Code::U4, Scale::F16, 32),
        GgmlType::Q8_0 => (Code::I8, Scale::F16, 32),
        GgmlType::MXFP4 => (Code::E2M1, Scale::E8M0, 32),
        GgmlType::Q4_K => (Code::U4, Scale::NestedWithMinima, 32),
        GgmlType::Q5_K => (Code::I8, Scale::NestedWithMinima, 32),
        GgmlType::Q6_K => (Code::I8, Scale::Nested, 16),
        _ => return None,
    };
    Some(Format { code, scale, group: format.block(), part, zeros: false })
}
