//! Coded tensors become numbers: any rows and columns, a mebibyte of codes at a time.

use crate::coding::{Blocks, CodedTensor, Coding, Element, Order};
use crate::element::{E2M1, E4M3, E5M2, e8m0};
use crate::error::DAMAGED;
use crate::stored::StoredMatrix;
use crate::{GgmlType, QuantError, Rows, StoredTensors, StoredType};
use half::{bf16, f16};
use std::ops::Range;

/// Bytes of codes in memory at once.
const CHUNK: usize = 1 << 20;

/// What weights are decoded to: the float32 value, rounded once.
pub trait Value: Copy + Default {
    /// The nearest number of this format.
    fn nearest(value: f32) -> Self;
}

impl Value for f32 {
    fn nearest(value: f32) -> Self {
        value
    }
}

impl Value for bf16 {
    fn nearest(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

/// Bytes of a bfloat16.
impl Value for [u8; 2] {
    fn nearest(value: f32) -> Self {
        bf16::from_f32(value).to_le_bytes()
    }
}

impl CodedTensor {
    /// Decodes some columns of some rows, counted over all matrices, into `out`, row after row. Reads the codes of
    /// no other rows, and of the other columns only what lies in the same block or word.
    pub fn decode<S: StoredTensors, T: Value>(
        &self,
        source: &S,
        rows: Rows,
        columns: Range<usize>,
        out: &mut [T],
    ) -> Result<(), S::Error> {
        let [matrices, n, k] = self.shape;
        let inside = rows.span().end <= matrices * n && columns.start <= columns.end && columns.end <= k;
        assert!(
            inside && out.len() == rows.count * columns.len(),
            "{rows:?}, columns {columns:?} of `{}` {:?} into {}: this is a bug",
            self.name,
            self.shape,
            out.len()
        );
        if out.is_empty() {
            return Ok(());
        }
        self.check_stated_shape(source)?;
        match self.coding {
            Coding::Ggml(format) => self.ggml(source, format, rows, columns, out),
            Coding::Blocks(blocks) if blocks.order == Order::Rows => {
                self.rows_of_codes(source, blocks, rows, columns, out)
            }
            Coding::Blocks(blocks) => self.transposed(source, blocks, rows, columns, out),
        }
    }

    /// Refuses weights whose shape is written down as another one than the model's: what is packed into words fits several.
    pub(crate) fn check_stated_shape<S: StoredTensors>(&self, source: &S) -> Result<(), S::Error> {
        let Some(stated) = &self.stated_shape else { return Ok(()) };
        let mut bytes = Vec::new();
        stated.read(source, Rows::range(0..1), 0..2, &mut bytes)?;
        let number = |bytes: &[u8]| match *bytes {
            [a, b, c, d] => i64::from(i32::from_le_bytes([a, b, c, d])),
            _ => bytes.try_into().map_or(-1, i64::from_le_bytes),
        };
        let found: Vec<i64> = bytes.chunks_exact(bytes.len() / 2).map(number).collect();
        let [_, n, k] = self.shape;
        if found == [n as i64, k as i64] {
            return Ok(());
        }
        Err(QuantError::new(format!(
            "tensor `{}`: `{}` says that it is {found:?}, but config.json makes it [{n}, {k}]; the two are of different \
             models, or {DAMAGED}",
            self.name, stated.name
        ))
        .into())
    }

    fn ggml<S: StoredTensors, T: Value>(
        &self,
        source: &S,
        format: GgmlType,
        rows: Rows,
        columns: Range<usize>,
        out: &mut [T],
    ) -> Result<(), S::Error> {
        let wide = widened(&columns, format.block(), self.shape[2]);
        let crop = columns.start - wide.start..columns.end - wide.start;
        let mut blocks = Vec::new();
        let mut values = vec![0.0; wide.len()];
        let row_bytes = self.codes.dtype.bytes(wide.len());
        let mut out = out.chunks_exact_mut(columns.len());
        for chunk in rows.chunks(CHUNK / row_bytes) {
            self.codes.read(source, chunk, wide.clone(), &mut blocks)?;
            for (i, row) in blocks.chunks_exact(row_bytes).enumerate() {
                format.decode(row, &mut values);
                self.store(&values[crop.clone()], chunk.at(i), columns.start, next(&mut out))?;
            }
        }
        Ok(())
    }

    fn rows_of_codes<S: StoredTensors, T: Value>(
        &self,
        source: &S,
        blocks: Blocks,
        rows: Rows,
        columns: Range<usize>,
        out: &mut [T],
    ) -> Result<(), S::Error> {
        let Blocks { element, .. } = blocks;
        // Codes are read in the units of their tensor: a byte or a word of several.
        let unit = self.codes.dtype.block().1 * 8 / element.bits();
        let wide = columns.start / unit * unit..columns.end.next_multiple_of(unit);
        let stored = wide.start / unit..wide.end / unit;
        let crop = columns.start - wide.start..columns.end - wide.start;
        let row_bytes = self.codes.dtype.bytes(stored.len());
        let global = self.global(source)?;
        let mut codes = Vec::new();
        let mut values = vec![0.0; wide.len()];
        let mut out = out.chunks_exact_mut(columns.len());
        for chunk in rows.chunks(CHUNK / row_bytes) {
            self.codes.read(source, chunk, stored.clone(), &mut codes)?;
            let scales = self.scales(source, blocks, chunk, &columns)?;
            for (i, row) in codes.chunks_exact(row_bytes).enumerate() {
                unpack(element, row, &mut values);
                let values = &mut values[crop.clone()];
                scales
                    .apply(self.scale_row(chunk.at(i), blocks), columns.start, global, values)
                    .map_err(|column| self.zero_scale(chunk.at(i), column))?;
                self.store(values, chunk.at(i), columns.start, next(&mut out))?;
            }
        }
        Ok(())
    }

    /// Scales and zeros of some rows and columns.
    fn scales<S: StoredTensors>(
        &self,
        source: &S,
        blocks: Blocks,
        rows: Rows,
        columns: &Range<usize>,
    ) -> Result<Scales, S::Error> {
        let span = rows.span();
        let first_row = self.scale_row(span.start, blocks);
        let scale_rows = first_row..self.scale_row(span.end - 1, blocks) + 1;
        let wide = columns.start / blocks.columns..(columns.end - 1) / blocks.columns + 1;
        let mut bytes = Vec::new();
        let stored = self.part(&self.scales);
        stored.read(source, Rows::range(scale_rows.clone()), wide.clone(), &mut bytes)?;
        let scales = floats(stored.dtype, &bytes);
        let zeros = match &self.zeros {
            Some(zeros) => self.zeros(source, zeros, blocks.element, scale_rows, wide.clone())?,
            None => Vec::new(),
        };
        Ok(Scales { first: [first_row, wide.start], width: wide.len(), blocks, scales, zeros })
    }

    /// A rectangle of zeros: signed bytes, or words of neighbours along N, where each matrix has words of its own.
    pub(crate) fn zeros<S: StoredTensors>(
        &self,
        source: &S,
        stored: &StoredMatrix,
        element: Element,
        rows: Range<usize>,
        columns: Range<usize>,
    ) -> Result<Vec<f32>, S::Error> {
        let mut bytes = Vec::new();
        if stored.dtype == StoredType::I8 {
            stored.read(source, Rows::range(rows), columns, &mut bytes)?;
            return Ok(bytes.iter().map(|&zero| f32::from(zero as i8)).collect());
        }
        let (bits, each) = (element.bits(), 32 / element.bits());
        let per_matrix = self.scale_rows.max(1);
        let word_row = |row: usize| row / per_matrix * per_matrix.div_ceil(each) + row % per_matrix / each;
        let word_rows = word_row(rows.start)..word_row(rows.end - 1) + 1;
        stored.read(source, Rows::range(word_rows.clone()), columns.clone(), &mut bytes)?;
        let (words, _) = bytes.as_chunks();
        let mut zeros = Vec::with_capacity(rows.len() * columns.len());
        for row in rows {
            let first = (word_row(row) - word_rows.start) * columns.len();
            let shift = bits * (row % per_matrix % each);
            zeros.extend(
                words[first..first + columns.len()]
                    .iter()
                    .map(|&word| (u32::from_le_bytes(word) >> shift & ((1 << bits) - 1)) as f32),
            );
        }
        Ok(zeros)
    }

    /// The row of scales that belongs to a row.
    pub(crate) fn scale_row(&self, row: usize, blocks: Blocks) -> usize {
        let n = self.shape[1];
        row / n * self.scale_rows + row % n / blocks.rows
    }

    /// The scale of the whole tensor, and whether it divides.
    fn global<S: StoredTensors>(&self, source: &S) -> Result<Option<(f32, bool)>, S::Error> {
        let Some(global) = &self.global else { return Ok(None) };
        let mut bytes = Vec::new();
        global.scale.read(source, Rows::range(0..1), 0..1, &mut bytes)?;
        let scale = floats(global.scale.dtype, &bytes)[0];
        if scale.is_finite() && scale != 0.0 {
            return Ok(Some((scale, global.inverse)));
        }
        Err(self.error(format!("its scale `{}` is {scale}; {DAMAGED}", global.scale.name)).into())
    }

    /// Rounds decoded weights into their place. There must be neither NaN nor infinity among them.
    pub(crate) fn store<T: Value>(
        &self,
        values: &[f32],
        row: usize,
        first_column: usize,
        out: &mut [T],
    ) -> Result<(), QuantError> {
        out.iter_mut().zip(values).for_each(|(out, &value)| *out = T::nearest(value));
        let Some(i) = values.iter().position(|value| !is_weight(*value)) else { return Ok(()) };
        Err(self.error(format!(
            "row {row}, column {} is {}: a code or a scale is not a number of any weight; {DAMAGED}",
            first_column + i,
            values[i]
        )))
    }

    pub(crate) fn zero_scale(&self, row: usize, column: usize) -> QuantError {
        self.error(format!(
            "the scale at row {row}, column {column} is zero where weights are not; {DAMAGED}"
        ))
    }

    pub(crate) fn part<'a>(&self, part: &'a Option<StoredMatrix>) -> &'a StoredMatrix {
        part.as_ref().expect("codings in blocks have scales, transposed ones zeros; this is a bug")
    }

    pub(crate) fn error(&self, problem: impl std::fmt::Display) -> QuantError {
        QuantError::new(format!("tensor `{}`: {problem}", self.name))
    }
}

/// Whether it is a number that bfloat16 can hold.
fn is_weight(value: f32) -> bool {
    value.abs() <= bf16::MAX.to_f32()
}

/// A rectangle of scales and zeros.
struct Scales {
    /// Its first row and column in the tensor's grid.
    first: [usize; 2],
    width: usize,
    blocks: Blocks,
    scales: Vec<f32>,
    /// Empty if the element's zero serves all.
    zeros: Vec<f32>,
}

impl Scales {
    /// Values of codes from a column on become weights. Where a scale is zero and a weight would not be, the column is
    /// the error.
    fn apply(
        &self,
        row: usize,
        first_column: usize,
        global: Option<(f32, bool)>,
        values: &mut [f32],
    ) -> Result<(), usize> {
        let block = self.blocks.columns;
        let line = (row - self.first[0]) * self.width;
        let mut done = 0;
        while done < values.len() {
            let column = first_column + done;
            let at = line + column / block - self.first[1];
            let end = values.len().min(done + block - column % block);
            let scale = self.scales[at];
            let zero = self.zeros.get(at).copied().unwrap_or(self.blocks.element.zero());
            let values = &mut values[done..end];
            if scale == 0.0 && values.iter().any(|&value| value != zero) {
                return Err(column);
            }
            match global {
                None => values.iter_mut().for_each(|value| *value = (*value - zero) * scale),
                Some((global, false)) => values.iter_mut().for_each(|value| *value = *value * scale * global),
                Some((global, true)) => values.iter_mut().for_each(|value| *value = *value * scale / global),
            }
            done = end;
        }
        Ok(())
    }
}

/// What codes mean before scales and zeros; `values` has as many as `codes` hold.
fn unpack(element: Element, codes: &[u8], values: &mut [f32]) {
    let each = |values: &mut [f32], value: &dyn Fn(u8) -> f32| {
        values.iter_mut().zip(codes).for_each(|(out, &code)| *out = value(code));
    };
    let pairs = |values: &mut [f32], table: &[f32; 16]| {
        let (pairs, _) = values.as_chunks_mut::<2>();
        for (pair, &byte) in pairs.iter_mut().zip(codes) {
            *pair = [table[(byte & 15) as usize], table[(byte >> 4) as usize]];
        }
    };
    const WHOLE: [f32; 16] = [0., 1., 2., 3., 4., 5., 6., 7., 8., 9., 10., 11., 12., 13., 14., 15.];
    match element {
        Element::E4M3 => each(values, &|code| E4M3[code as usize]),
        Element::E5M2 => each(values, &|code| E5M2[code as usize]),
        Element::U8 => each(values, &|code| f32::from(code)),
        Element::I8 => each(values, &|code| f32::from(code as i8)),
        Element::E2M1 => pairs(values, &E2M1),
        Element::U4 => pairs(values, &WHOLE),
    }
}

/// Numbers of scales, exactly.
pub(crate) fn floats(dtype: StoredType, bytes: &[u8]) -> Vec<f32> {
    let (pairs, _) = bytes.as_chunks();
    let (quads, _) = bytes.as_chunks();
    match dtype {
        StoredType::F32 => quads.iter().map(|&quad| f32::from_le_bytes(quad)).collect(),
        StoredType::BF16 => pairs.iter().map(|&pair| bf16::from_le_bytes(pair).to_f32()).collect(),
        StoredType::F16 => pairs.iter().map(|&pair| f16::from_le_bytes(pair).to_f32()).collect(),
        StoredType::E4M3 => bytes.iter().map(|&code| E4M3[code as usize]).collect(),
        // Powers of two, under either name.
        _ => bytes.iter().map(|&code| e8m0(code)).collect(),
    }
}

fn widened(columns: &Range<usize>, unit: usize, most: usize) -> Range<usize> {
    columns.start / unit * unit..columns.end.next_multiple_of(unit).min(most)
}

fn next<'a, T>(rows: &mut impl Iterator<Item = &'a mut [T]>) -> &'a mut [T] {
    rows.next().expect("there are as many rows to write as to read; this is a bug")
}
