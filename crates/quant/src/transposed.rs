//! Codings whose tensors are `[K, N]`: AWQ and GPTQ.

use crate::codes::Codes;
use crate::coding::{Blocks, CodedTensor, Order};
use crate::decode::{Value, floats};
use crate::error::DAMAGED;
use crate::{Rows, StoredTensors};
use std::ops::Range;

/// Columns that are decoded together, a multiple of a word's eight.
const STRIP: usize = 64;

/// The nibble in which AWQ keeps each of a word's eight rows n.
const AWQ_NIBBLE: [usize; 8] = [0, 4, 1, 5, 2, 6, 3, 7];

/// Some columns k of some rows n, as the tensors have them.
struct Strip {
    blocks: Blocks,
    columns: Range<usize>,
    rows: Range<usize>,
    /// Of each column, among the groups below.
    group_of: Vec<usize>,
    /// Codes of eight, rows of words along n.
    words: Vec<u32>,
    /// One for each group and row n.
    scales: Vec<f32>,
    /// The same as they are stored.
    scale_bytes: Vec<u8>,
    /// Eight rows n in a word, for each group.
    zeros: Vec<u32>,
}

impl CodedTensor {
    pub(crate) fn transposed<S: StoredTensors, T: Value>(
        &self,
        source: &S,
        blocks: Blocks,
        rows: Rows,
        columns: Range<usize>,
        out: &mut [T],
    ) -> Result<(), S::Error> {
        let mut at = columns.start;
        while at < columns.end {
            let strip = at..columns.end.min((at / STRIP + 1) * STRIP);
            let strip = self.strip(source, blocks, rows.span(), strip)?;
            let mut values = [0.0; STRIP];
            for (i, out) in out.chunks_exact_mut(columns.len()).enumerate() {
                let values = &mut values[..strip.columns.len()];
                strip.row(rows.at(i), values).map_err(|column| self.zero_scale(rows.at(i), column))?;
                let first = strip.columns.start - columns.start;
                self.store(values, rows.at(i), strip.columns.start, &mut out[first..first + values.len()])?;
            }
            at = strip.columns.end;
        }
        Ok(())
    }

    /// The same as codes, with the records of their groups; whether neighbours along K are in a group, as records want it.
    pub(crate) fn transposed_codes<S: StoredTensors>(
        &self,
        source: &S,
        blocks: Blocks,
        rows: Rows,
        columns: Range<usize>,
        into: &mut Codes,
    ) -> Result<bool, S::Error> {
        let (format, row_bytes) = (into.format, into.format.row_bytes(columns.len()));
        let (groups, record) = (format.groups(columns.len()), format.record_bytes());
        into.records = vec![0; rows.count * groups * record];
        let scale_bytes = record - 1;
        let mut at = columns.start;
        while at < columns.end {
            let strip = at..columns.end.min((at / STRIP + 1) * STRIP);
            let strip = self.strip(source, blocks, rows.span(), strip)?;
            if !strip.is_in_order() {
                return Ok(false);
            }
            for i in 0..rows.count {
                let n = rows.at(i);
                for k in strip.columns.clone() {
                    let column = k - columns.start;
                    into.codes[i * row_bytes + column / 2] |= (strip.code(n, k) as u8) << (4 * (column % 2));
                    if column.is_multiple_of(format.group) {
                        let group = strip.group_of[k - strip.columns.start];
                        let to = &mut into.records[(i * groups + column / format.group) * record..][..record];
                        let scale = (group * strip.rows.len() + n - strip.rows.start) * scale_bytes;
                        to[..scale_bytes].copy_from_slice(&strip.scale_bytes[scale..][..scale_bytes]);
                        to[scale_bytes] = strip.zero(n, group) as u8;
                    }
                }
            }
            at = strip.columns.end;
        }
        Ok(true)
    }

    fn strip<S: StoredTensors>(
        &self,
        source: &S,
        blocks: Blocks,
        rows: Range<usize>,
        columns: Range<usize>,
    ) -> Result<Strip, S::Error> {
        let packed = eighths(&rows);
        let mut group_of = self.groups_of(source, blocks, &columns)?;
        let first = group_of.iter().copied().min().unwrap_or(0);
        let last = group_of.iter().copied().max().unwrap_or(0);
        let groups = Rows::range(first..last + 1);
        group_of.iter_mut().for_each(|group| *group -= first);
        let (down, across) = match blocks.order {
            Order::Awq => (columns.clone(), packed.clone()),
            _ => (eighths(&columns), rows.clone()),
        };
        let mut bytes = Vec::new();
        self.codes.read(source, Rows::range(down), across, &mut bytes)?;
        let words = as_words(&bytes);
        self.part(&self.zeros).read(source, groups, packed, &mut bytes)?;
        let zeros = as_words(&bytes);
        let scales = self.part(&self.scales);
        scales.read(source, groups, rows.clone(), &mut bytes)?;
        let scales = floats(scales.dtype, &bytes);
        Ok(Strip { blocks, columns, rows, group_of, words, scales, scale_bytes: bytes, zeros })
    }

    /// The group of each of some columns: the one that its place says, or GPTQ's table of groups if columns were quantised in an
    /// order of their own (act-order).
    fn groups_of<S: StoredTensors>(
        &self,
        source: &S,
        blocks: Blocks,
        columns: &Range<usize>,
    ) -> Result<Vec<usize>, S::Error> {
        let Some(groups) = &self.groups else {
            return Ok(columns.clone().map(|k| k / blocks.columns).collect());
        };
        let mut bytes = Vec::new();
        groups.read(source, Rows::range(0..1), columns.clone(), &mut bytes)?;
        let of: Vec<usize> = as_words(&bytes).into_iter().map(|group| group as usize).collect();
        let count = self.shape[2].div_ceil(blocks.columns);
        if let Some(at) = of.iter().position(|&group| group >= count) {
            return Err(self
                .error(format!(
                    "`{}` puts column {} into group {} of {count}; {DAMAGED}",
                    groups.name,
                    columns.start + at,
                    of[at]
                ))
                .into());
        }
        Ok(of)
    }
}

impl Strip {
    /// Whether the groups of columns are those that their places say.
    fn is_in_order(&self) -> bool {
        let place = |k: usize| k / self.blocks.columns - self.columns.start / self.blocks.columns;
        self.columns.clone().zip(&self.group_of).all(|(k, &group)| group == place(k))
    }

    /// The weights of a row. Where a scale is zero and a weight would not be, the column is the error.
    fn row(&self, n: usize, values: &mut [f32]) -> Result<(), usize> {
        for (value, k) in values.iter_mut().zip(self.columns.clone()) {
            let group = self.group_of[k - self.columns.start];
            let code = self.code(n, k) - self.zero(n, group);
            let scale = self.scales[group * self.rows.len() + n - self.rows.start];
            if scale == 0.0 && code != 0.0 {
                return Err(k);
            }
            *value = code * scale;
        }
        Ok(())
    }

    fn code(&self, n: usize, k: usize) -> f32 {
        let (word, nibble) = match self.blocks.order {
            Order::Awq => {
                let packed = eighths(&self.rows);
                let down = k - self.columns.start;
                (self.words[down * packed.len() + n / 8 - packed.start], AWQ_NIBBLE[n % 8])
            }
            _ => {
                let down = k / 8 - self.columns.start / 8;
                (self.words[down * self.rows.len() + n - self.rows.start], k % 8)
            }
        };
        (word >> (4 * nibble) & 15) as f32
    }

    fn zero(&self, n: usize, group: usize) -> f32 {
        let packed = eighths(&self.rows);
        let word = self.zeros[group * packed.len() + n / 8 - packed.start];
        let (nibble, offset) = match self.blocks.order {
            Order::Gptq { zero_offset } => (n % 8, zero_offset),
            _ => (AWQ_NIBBLE[n % 8], 0),
        };
        (word >> (4 * nibble) & 15) as f32 + f32::from(offset)
    }
}

/// The words that hold some numbers, eight a word.
fn eighths(range: &Range<usize>) -> Range<usize> {
    range.start / 8..range.end.div_ceil(8)
}

fn as_words(bytes: &[u8]) -> Vec<u32> {
    let (words, _) = bytes.as_chunks();
    words.iter().map(|&word| u32::from_le_bytes(word)).collect()
}
