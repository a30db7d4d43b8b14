//! Blocks of GGUF files: 32 or 256 weights of a row, with scales in between.
//!
//! Every format is a list of numbers `w = d · code` or `w = d · code − m`, where `d` and `m` belong to a sub-block of
//! 16 or 32 weights. Products of a block's scale and a sub-block's are exact in float32, so that each weight is
//! rounded once.

use crate::element::{E2M1, e8m0};
use half::f16;
use std::fmt;
use std::ops::Range;

/// A format of GGUF's tensors that is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(non_camel_case_types, missing_docs, reason = "the format's own names")]
pub enum GgmlType {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2_K,
    Q3_K,
    Q4_K,
    Q5_K,
    Q6_K,
    IQ4_NL,
    IQ4_XS,
    MXFP4,
}

use GgmlType::*;

/// Number in the file, format, weights of a block, bytes of a block.
const TYPES: [(u32, GgmlType, usize, usize); 13] = [
    (2, Q4_0, 32, 18),
    (3, Q4_1, 32, 20),
    (6, Q5_0, 32, 22),
    (7, Q5_1, 32, 24),
    (8, Q8_0, 32, 34),
    (10, Q2_K, 256, 84),
    (11, Q3_K, 256, 110),
    (12, Q4_K, 256, 144),
    (13, Q5_K, 256, 176),
    (14, Q6_K, 256, 210),
    (20, IQ4_NL, 32, 18),
    (23, IQ4_XS, 256, 136),
    (39, MXFP4, 32, 17),
];

impl GgmlType {
    /// The formats that are read.
    pub fn all() -> impl Iterator<Item = GgmlType> {
        TYPES.into_iter().map(|(_, format, ..)| format)
    }

    /// The format of a number in a file.
    pub fn numbered(number: u32) -> Option<GgmlType> {
        TYPES.into_iter().find_map(|(of, format, ..)| (of == number).then_some(format))
    }

    /// Its number in a file.
    pub fn number(self) -> u32 {
        self.row().0
    }

    /// Weights of a block.
    pub fn block(self) -> usize {
        self.row().2
    }

    /// Bytes of a block.
    pub fn block_bytes(self) -> usize {
        self.row().3
    }

    fn row(self) -> (u32, GgmlType, usize, usize) {
        let row = TYPES.into_iter().find(|(_, format, ..)| *format == self);
        row.expect("every format is in the table; this is a bug")
    }

    /// Whole blocks become weights: `out` has as many as the blocks have.
    pub fn decode(self, blocks: &[u8], out: &mut [f32]) {
        let decode = match self {
            Q4_0 => q4_0,
            Q4_1 => q4_1,
            Q5_0 => q5_0,
            Q5_1 => q5_1,
            Q8_0 => q8_0,
            Q2_K => q2_k,
            Q3_K => q3_k,
            Q4_K => q4_k,
            Q5_K => q5_k,
            Q6_K => q6_k,
            IQ4_NL => iq4_nl,
            IQ4_XS => iq4_xs,
            MXFP4 => mxfp4,
        };
        let blocks = blocks.chunks_exact(self.block_bytes());
        blocks.zip(out.chunks_exact_mut(self.block())).for_each(|(block, out)| decode(block, out));
    }
}

/// Codes and scales apart, of the formats that are held as they are ([`crate::Format`]).
impl GgmlType {
    /// The codes of a block, in order, a byte each: signed, or what four bits hold.
    pub(crate) fn codes(self, block: &[u8], out: &mut [u8]) {
        match self {
            Q4_0 => halves_of(&block[2..], out),
            MXFP4 => halves_of(&block[1..], out),
            Q8_0 => out.copy_from_slice(&block[2..]),
            Q4_K => k_codes(&block[16..], out, |_, _| 0),
            Q5_K => k_codes(&block[48..], out, |s, i| ((block[16 + i] >> s) & 1) << 4),
            Q6_K => q6_codes(block, |at, q| out[at] = q.wrapping_sub(32)),
            _ => unreachable!("{self} is not held in its codes; this is a bug"),
        }
    }

    /// Appends the record of some neighbouring parts of a block.
    pub(crate) fn record(self, block: &[u8], parts: Range<usize>, record: &mut Vec<u8>) {
        match self {
            Q4_0 | Q8_0 => record.extend_from_slice(&block[..2]),
            MXFP4 => record.push(block[0]),
            Q4_K | Q5_K => {
                record.extend_from_slice(&block[..4]);
                let pairs = parts.map(|s| scale_and_min(&block[4..16], s));
                record.extend(pairs.clone().map(|pair| pair.0));
                record.extend(pairs.map(|pair| pair.1));
            }
            Q6_K => {
                record.extend_from_slice(&block[208..]);
                record.extend_from_slice(&block[192..208][parts]);
            }
            _ => unreachable!("{self} is not held in its codes; this is a bug"),
        }
    }
}

/// Low nibbles are the first half of the codes, high nibbles the second.
fn halves_of(nibbles: &[u8], out: &mut [u8]) {
    let (low, high) = out.split_at_mut(nibbles.len());
    for ((&byte, low), high) in nibbles.iter().zip(low).zip(high) {
        (*low, *high) = (byte & 15, byte >> 4);
    }
}

/// Codes of Q4_K and Q5_K; `above` gives what a code of a sub-block has beyond four bits.
fn k_codes(codes: &[u8], out: &mut [u8], above: impl Fn(usize, usize) -> u8) {
    for (s, out) in out.chunks_exact_mut(32).enumerate() {
        let codes = &codes[32 * (s / 2)..];
        for (i, out) in out.iter_mut().enumerate() {
            *out = (codes[i] >> (4 * (s % 2))) & 15 | above(s, i);
        }
    }
}

/// Half a block is four rows of 32 weights: low nibbles of 64 bytes, then their high nibbles; two bits more come
/// from 32 bytes, a row after the other.
fn q6_codes(block: &[u8], mut code: impl FnMut(usize, u8)) {
    let (low, high) = (&block[..128], &block[128..192]);
    for at in 0..256 {
        let (half, row, i) = (at / 128, at % 128 / 32, at % 32);
        let q = (low[64 * half + 32 * (row % 2) + i] >> (4 * (row / 2))) & 15;
        code(at, q | ((high[32 * half + i] >> (2 * row)) & 3) << 4);
    }
}

impl fmt::Display for GgmlType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Low nibbles are the first half of the weights, high nibbles the second.
fn halves(nibbles: &[u8], out: &mut [f32], value: impl Fn(usize, u8) -> f32) {
    let (low, high) = out.split_at_mut(nibbles.len());
    for (i, &byte) in nibbles.iter().enumerate() {
        low[i] = value(i, byte & 15);
        high[i] = value(i + nibbles.len(), byte >> 4);
    }
}

fn q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    halves(&block[2..], out, |_, q| d * (f32::from(q) - 8.0));
}

fn q4_1(block: &[u8], out: &mut [f32]) {
    let (d, m) = (half_at(block, 0), half_at(block, 2));
    halves(&block[4..], out, |_, q| d * f32::from(q) + m);
}

/// The fifth bit of weight `i` is bit `i` of a word.
fn fifth_bits(block: &[u8], at: usize) -> impl Fn(usize, u8) -> f32 {
    let word = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    move |i, q| f32::from(q | (((word >> i) & 1) << 4) as u8)
}

fn q5_0(block: &[u8], out: &mut [f32]) {
    let (d, q5) = (half_at(block, 0), fifth_bits(block, 2));
    halves(&block[6..], out, |i, q| d * (q5(i, q) - 16.0));
}

fn q5_1(block: &[u8], out: &mut [f32]) {
    let (d, m, q5) = (half_at(block, 0), half_at(block, 2), fifth_bits(block, 4));
    halves(&block[8..], out, |i, q| d * q5(i, q) + m);
}

fn q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    block[2..].iter().zip(out).for_each(|(&q, out)| *out = d * f32::from(q as i8));
}

fn mxfp4(block: &[u8], out: &mut [f32]) {
    let scale = e8m0(block[0]);
    halves(&block[1..], out, |_, q| E2M1[q as usize] * scale);
}

/// The sixteen values of the IQ4 formats.
const IQ4: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

fn iq4_nl(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    halves(&block[2..], out, |_, q| d * f32::from(IQ4[q as usize]));
}

fn iq4_xs(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    let low = &block[4..8];
    for (i, (nibbles, out)) in block[8..].chunks_exact(16).zip(out.chunks_exact_mut(32)).enumerate() {
        let scale = (low[i / 2] >> (4 * (i % 2))) & 15 | (((high >> (2 * i)) & 3) << 4) as u8;
        let d = d * (f32::from(scale) - 32.0);
        halves(nibbles, out, |_, q| d * f32::from(IQ4[q as usize]));
    }
}

/// Two bits a weight. Sub-block `s` of 16: byte `s` of the scales has its scale below and its minimum above; its
/// codes are two bits of 16 bytes, the same bits for two neighbours, the next bits for the next two.
fn q2_k(block: &[u8], out: &mut [f32]) {
    let (scales, codes) = (&block[..16], &block[16..80]);
    let (d, dmin) = (half_at(block, 80), half_at(block, 82));
    for (s, out) in out.chunks_exact_mut(16).enumerate() {
        let (d, m) = (d * f32::from(scales[s] & 15), dmin * f32::from(scales[s] >> 4));
        let (codes, shift) = quarter(codes, s);
        codes.iter().zip(out).for_each(|(&byte, out)| *out = d * f32::from((byte >> shift) & 3) - m);
    }
}

/// The sixteen bytes that hold two bits of sub-block `s`, and where: bytes of the first 32 serve eight sub-blocks.
fn quarter(codes: &[u8], s: usize) -> (&[u8], usize) {
    let first = 32 * (s / 8) + 16 * (s % 2);
    (&codes[first..first + 16], 2 * (s % 8 / 2))
}

/// Two bits as in [`q2_k`], a third in the mask, and scales of six bits.
fn q3_k(block: &[u8], out: &mut [f32]) {
    let (mask, codes, scales, d) = (&block[..32], &block[32..96], &block[96..108], half_at(block, 108));
    for (s, out) in out.chunks_exact_mut(16).enumerate() {
        let low = (scales[s % 8] >> (4 * (s / 8))) & 15;
        let high = (scales[8 + s % 4] >> (2 * (s / 4))) & 3;
        let d = d * (f32::from(low | high << 4) - 32.0);
        let (codes, shift) = quarter(codes, s);
        let mask = &mask[16 * (s % 2)..];
        for (i, out) in out.iter_mut().enumerate() {
            let third = (mask[i] >> (s / 2)) & 1;
            *out = d * (f32::from((codes[i] >> shift) & 3 | third << 2) - 4.0);
        }
    }
}

/// Scale and minimum of sub-block `s` of 32, six bits each, from the twelve bytes of Q4_K and Q5_K.
fn scale_and_min(bytes: &[u8], s: usize) -> (u8, u8) {
    match s {
        0..4 => (bytes[s] & 63, bytes[s + 4] & 63),
        _ => {
            let low = bytes[s + 4];
            ((low & 15) | (bytes[s - 4] >> 6) << 4, (low >> 4) | (bytes[s] >> 6) << 4)
        }
    }
}

/// Bytes of nibbles serve two sub-blocks of 32, low nibbles the first.
fn q4_k(block: &[u8], out: &mut [f32]) {
    k_nibbles(block, &block[16..], out, |_, _| 0);
}

/// As [`q4_k`], with fifth bits: bit `s` of byte `i` belongs to weight `i` of sub-block `s`.
fn q5_k(block: &[u8], out: &mut [f32]) {
    let fifth = &block[16..48];
    k_nibbles(block, &block[48..], out, |s, i| ((fifth[i] >> s) & 1) << 4);
}

fn k_nibbles(block: &[u8], codes: &[u8], out: &mut [f32], above: impl Fn(usize, usize) -> u8) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let mut bytes = [0; 256];
    k_codes(codes, &mut bytes, above);
    for (s, (out, codes)) in out.chunks_exact_mut(32).zip(bytes.chunks_exact(32)).enumerate() {
        let (scale, min) = scale_and_min(&block[4..16], s);
        let (d, m) = (d * f32::from(scale), dmin * f32::from(min));
        out.iter_mut().zip(codes).for_each(|(out, &q)| *out = d * f32::from(q) - m);
    }
}

/// Sixteen weights share a scale.
fn q6_k(block: &[u8], out: &mut [f32]) {
    let (scales, d) = (&block[192..208], half_at(block, 208));
    q6_codes(block, |at, q| {
        out[at] = d * f32::from(scales[at / 16] as i8) * (f32::from(q) - 32.0);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decoded(format: GgmlType, block: &[u8]) -> Vec<f32> {
        assert_eq!(block.len(), format.block_bytes());
        let mut out = vec![f32::NAN; format.block()];
        format.decode(block, &mut out);
        out
    }

    fn half(value: f32) -> [u8; 2] {
        f16::from_f32(value).to_le_bytes()
    }

    #[test]
    fn q8_0_is_a_scale_times_bytes() {
        let mut block = vec![0x00, 0x38, 0xf0, 0xf1, 0xf2];
        block.resize(34, 0);
        assert_eq!(decoded(Q8_0, &block)[..4], [-8.0, -7.5, -7.0, 0.0]);
    }

    /// d = ½, dmin = ¼, scales 1 2 3 4 17 34 51 63, minima 5 6 7 8 16 33 50 62, codes i mod 16.
    #[test]
    fn q4_k_scales_are_where_they_are_packed() {
        let mut block = [half(0.5), half(0.25)].concat();
        block.extend([0x41, 0x82, 0xc3, 0xc4, 0x45, 0x86, 0xc7, 0xc8, 0x01, 0x12, 0x23, 0xef]);
        block.extend((0..128).map(|byte| (byte % 16) as u8 * 0x11));
        let weights = decoded(Q4_K, &block);
        assert_eq!((weights[33], weights[255]), (-0.5, 457.0));
        let pairs: Vec<_> = (0..8).map(|s| scale_and_min(&block[4..16], s)).collect();
        assert_eq!(pairs, [(1, 5), (2, 6), (3, 7), (4, 8), (17, 16), (34, 33), (51, 50), (63, 62)]);
    }

    /// d = ⅛, scales −8 … 7, codes (7 i mod 64) − 32.
    #[test]
    fn q6_k_joins_four_bits_and_two() {
        let mut block = vec![0; 210];
        for i in 0..256usize {
            let (q, half, row, l) = ((7 * i % 64) as u8, i / 128, i % 128 / 32, i % 32);
            block[64 * half + 32 * (row % 2) + l] |= (q & 15) << (4 * (row / 2));
            block[128 + 32 * half + l] |= (q >> 4) << (2 * row);
        }
        (0..16).for_each(|s| block[192 + s] = (s as i8 - 8) as u8);
        block[208..].copy_from_slice(&half(0.125));
        assert_eq!(decoded(Q6_K, &block)[17], -20.125);
    }

    #[test]
    fn nibbles_of_mxfp4_are_halves_of_the_block() {
        let mut block = vec![121, 0x72];
        block.resize(17, 0);
        let weights = decoded(MXFP4, &block);
        assert_eq!((weights[0], weights[1], weights[16]), (0.015625, 0.0, 0.09375));
    }

    #[test]
    fn numbers_of_formats_are_unique() {
        for format in GgmlType::all() {
            assert_eq!(GgmlType::numbered(format.number()), Some(format));
        }
        assert_eq!(GgmlType::numbered(16), None);
    }
}
