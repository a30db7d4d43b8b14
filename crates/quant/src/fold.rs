//! MXFP4 as FP8 blocks, without a loss: FP4 values reach over three powers of two and e4m3 over eighteen, so 128 × 128 weights whose
//! scales are not far apart are e4m3 codes under one power of two.

use crate::element::{E2M1, to_e4m3};
use crate::{Code, Codes, Format, Scale};

/// Rows and columns of a block.
const BLOCK: usize = 128;

/// Columns that are looked at together: every part is a multiple of it.
const PIECE: usize = 8;

/// Of e4m3, the power of two of the lowest bit that a code has, and of the highest: 1.5 · 2⁸ is below its 448.
const LOWEST: i32 = -9;
const HIGHEST: i32 = 8;

/// Powers that a factor on FP4 values has at least and at most in a block that folds: 4 and 6 reach to 2², 0.5 and 1.5 to 2⁻¹.
const LEAST: i32 = LOWEST - 2;
const MOST: i32 = HIGHEST + 1;

/// The lowest and the highest power of two of an FP4 value without its sign; nothing of zero.
const POWERS: [Option<(i32, i32)>; 8] = [
    None,
    Some((-1, -1)),
    Some((0, 0)),
    Some((-1, 0)),
    Some((1, 1)),
    Some((0, 1)),
    Some((2, 2)),
    Some((1, 2)),
];

impl Format {
    /// Whether codes of this format may be FP8 e4m3 with a power of two for every 128 × 128 as well, without a loss: their scales
    /// tell.
    pub fn may_fold(&self) -> bool {
        (self.code, self.scale, self.zeros) == (Code::E2M1, Scale::E8M0, false)
    }
}

impl Codes {
    /// The same weights, exactly, as FP8 e4m3 codes with a scale for every 128 × 128. Nothing for other codes than MXFP4, and where
    /// weights of a block are further apart than codes of one scale can be; zeros are not in the way.
    pub fn folded(&self) -> Option<Codes> {
        if !self.format.may_fold() {
            return None;
        }
        let format = Format { code: Code::E4M3, scale: Scale::F32, group: BLOCK, part: BLOCK, zeros: false };
        let mut folded = Codes {
            format,
            rows: self.rows,
            columns: self.columns,
            codes: vec![0; self.rows * self.columns],
            records: Vec::with_capacity(self.rows * format.groups(self.columns) * format.record_bytes()),
        };
        let tables: Vec<[u8; 16]> = (LEAST..=MOST).map(under_power).collect();
        for first_row in (0..self.rows).step_by(BLOCK) {
            let rows = first_row..self.rows.min(first_row + BLOCK);
            let mut scales = Vec::new();
            for first in (0..self.columns).step_by(BLOCK) {
                let pieces = || {
                    let starts = (first..self.columns.min(first + BLOCK)).step_by(PIECE);
                    rows.clone().flat_map(move |row| starts.clone().map(move |start| (row, start)))
                };
                let power = self.common_power(pieces())?;
                scales.extend(2f32.powi(power).to_le_bytes());
                for (row, start) in pieces() {
                    let factor = (self.power(row, start) - power).clamp(LEAST, MOST);
                    let table = &tables[(factor - LEAST) as usize];
                    let columns = start..self.columns.min(start + PIECE);
                    let out = &mut folded.codes[row * self.columns..][columns];
                    for (pair, byte) in out.chunks_mut(2).zip(&self.row(row)[start / 2..]) {
                        let codes = [byte & 15, byte >> 4];
                        pair.iter_mut().zip(codes).for_each(|(out, code)| *out = table[code as usize]);
                    }
                }
            }
            rows.for_each(|_| folded.records.extend_from_slice(&scales));
        }
        Some(folded)
    }

    /// The power of two that is the scale of a row from a column on.
    fn power(&self, row: usize, column: usize) -> i32 {
        i32::from(self.record(row, column / self.format.group)[0]) - 127
    }

    /// The power of two under which all pieces are exact in e4m3, if there is one: the largest weight takes the highest.
    fn common_power(&self, pieces: impl Iterator<Item = (usize, usize)>) -> Option<i32> {
        let mut reach: Option<(i32, i32)> = None;
        for (row, start) in pieces {
            let bytes = start / 2..self.columns.min(start + PIECE).div_ceil(2);
            let codes = self.row(row)[bytes].iter().flat_map(|byte| [byte & 7, byte >> 4 & 7]);
            let there = codes.filter_map(|code| POWERS[code as usize]);
            let Some((low, high)) = there.reduce(|a, b| (a.0.min(b.0), a.1.max(b.1))) else { continue };
            let power = self.power(row, start);
            let (low, high) = (low + power, high + power);
            reach = Some(reach.map_or((low, high), |(least, most)| (low.min(least), high.max(most))));
        }
        let Some((low, high)) = reach else { return Some(0) };
        // A scale is a normal number.
        let power = (high - HIGHEST).max(-126);
        (low - power >= LOWEST).then_some(power)
    }
}

/// The e4m3 codes of FP4 values times a power of two.
fn under_power(power: i32) -> [u8; 16] {
    std::array::from_fn(|code| to_e4m3(E2M1[code] * 2f32.powi(power)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use epsmoe_base::Mix;

    fn mxfp4(rows: usize, columns: usize) -> Codes {
        let format = Format { code: Code::E2M1, scale: Scale::E8M0, group: 32, part: 32, zeros: false };
        Codes {
            format,
            rows,
            columns,
            codes: vec![0; rows * columns / 2],
            records: vec![127; rows * columns.div_ceil(32)],
        }
    }

    fn bits(codes: &Codes) -> Vec<u32> {
        let mut values = vec![0.0; codes.rows * codes.columns];
        values.chunks_exact_mut(codes.columns).enumerate().for_each(|(row, out)| codes.decode(row, out));
        values.into_iter().map(f32::to_bits).collect()
    }

    /// Two weights of one block, every code under every scale beside every other: those that e4m3 can have under one scale fold, by
    /// trying all scales, and no others; and nothing changes, not even the sign of a zero.
    #[test]
    fn two_weights_fold_exactly_where_some_scale_has_both() {
        let exact = |value: f32| E4M3_VALUES.contains(&value);
        for apart in 0..24 {
            for (a, b) in (0..256).map(|pair| (pair as u8 & 15, pair as u8 >> 4)) {
                let mut codes = mxfp4(2, 32);
                codes.records = vec![100, 100 + apart];
                (codes.codes[0], codes.codes[16]) = (a, b);
                let values = [E2M1[a as usize], E2M1[b as usize] * 2f32.powi(i32::from(apart))];
                let fits =
                    (-40..40).any(|power| values.iter().all(|value| exact((value * 2f32.powi(power)).abs())));
                match codes.folded() {
                    Some(folded) => {
                        assert!(fits, "codes {a} and {b}, {apart} apart");
                        assert_eq!(bits(&folded), bits(&codes), "codes {a} and {b}, {apart} apart");
                    }
                    None => assert!(!fits, "codes {a} and {b}, {apart} apart, do not fold"),
                }
            }
        }
    }

    static E4M3_VALUES: [f32; 127] = {
        let mut values = [0.0; 127];
        let mut code = 0;
        while code < 127 {
            values[code] = crate::element::E4M3[code];
            code += 1;
        }
        values
    };

    #[test]
    fn random_matrices_fold_to_the_same_weights() {
        let seed = 2112;
        println!("seed {seed}");
        let mut mix = Mix::new(seed);
        for (rows, columns) in [(1, 64), (128, 128), (130, 96), (257, 320), (40, 1408)] {
            let mut codes = mxfp4(rows, columns);
            codes.codes.iter_mut().for_each(|byte| *byte = mix.below(256) as u8);
            codes.records.iter_mut().for_each(|record| *record = 60 + mix.below(15) as u8);
            let folded = codes.folded().expect("14 powers are few enough");
            assert!(folded.format.may_be_fp8_blocks());
            assert_eq!(bits(&folded), bits(&codes), "{rows} x {columns}");
            // One weight of the last block becomes too large for its neighbours, unless its group is all zeros.
            let last = codes.records.len() - 1;
            codes.records[last] = 200;
            assert!(codes.folded().is_none(), "{rows} x {columns}");
            codes.codes.iter_mut().rev().take(16).for_each(|byte| *byte = 0x80);
            let folded = codes.folded().expect("zeros are not in the way");
            assert_eq!(bits(&folded), bits(&codes), "{rows} x {columns}");
        }
    }

    #[test]
    fn other_codes_do_not_fold() {
        let mut codes = mxfp4(1, 32);
        codes.format.code = Code::U4;
        assert!(codes.folded().is_none());
    }

    /// The largest and the smallest scales that a format has.
    #[test]
    fn scales_at_the_ends() {
        for record in [0, 1, 254] {
            let mut codes = mxfp4(1, 32);
            codes.codes.fill(0x71);
            codes.records[0] = record;
            if let Some(folded) = codes.folded() {
                assert_eq!(bits(&folded), bits(&codes), "record {record}");
            }
        }
    }
}
