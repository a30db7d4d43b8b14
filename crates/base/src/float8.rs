//! Numbers of eight bits, and rows of them that carry their scales.

/// Values of the 256 codes of FP8 e4m3: a sign, four bits of exponent (bias 7), three of fraction; no infinity,
/// and NaN at 0x7f and 0xff.
pub static E4M3: [f32; 256] = {
    let mut values = floats(4, 7);
    values[0x7f] = f32::NAN;
    values[0xff] = f32::NAN;
    values
};

/// Values of the 256 codes of FP8 e5m2: half precision without its lower byte.
pub static E5M2: [f32; 256] = {
    let mut values = floats(5, 15);
    let mut code = 0x7c;
    while code < 0x80 {
        values[code] = if code == 0x7c { f32::INFINITY } else { f32::NAN };
        values[code + 0x80] = -values[code];
        code += 1;
    }
    values
};

/// The largest finite value of e4m3.
pub const E4M3_MAX: f32 = 448.0;

/// The e4m3 code nearest to a value, ties to even; what is beyond ±448 becomes ±448.
pub fn to_e4m3(value: f32) -> u8 {
    let sign = ((value.to_bits() >> 24) & 0x80) as u8;
    let magnitude = value.abs();
    if value.is_nan() {
        return sign | 0x7f;
    }
    if magnitude >= E4M3_MAX {
        return sign | 0x7e;
    }
    // Below 2^−6 codes are multiples of 2^−9; the eighth of them is the first normal number's code.
    if magnitude < 1.0 / 64.0 {
        return sign | (magnitude * 512.0).round_ties_even() as u8;
    }
    let bits = magnitude.to_bits();
    let rounded = bits + 0x7_ffff + ((bits >> 20) & 1);
    sign | ((rounded >> 20) - ((127 - 7) << 3)) as u8
}

/// The bits of the value of an e4m3 code in float32, of which the lower half is zero: no table, so that loops over codes
/// become vector instructions.
#[inline(always)]
pub fn e4m3_bits(code: u8) -> u32 {
    let (sign, size) = (u32::from(code & 0x80) << 24, u32::from(code & 0x7f));
    let normal = (size << 20) + ((127 - 7) << 23);
    // Below 2^−6 codes are multiples of 2^−9.
    let small = (size as f32 * (1.0 / 512.0)).to_bits();
    let bits = if size < 8 { small } else { normal };
    sign | if size == 0x7f { 0x7fc0_0000 } else { bits }
}

/// Values of all codes of a sign, `exponent` bits and the fraction, infinities and NaN not yet among them.
const fn floats(exponent: u32, bias: i32) -> [f32; 256] {
    let fraction = 7 - exponent;
    let mut values = [0.0; 256];
    let mut code = 0;
    while code < 128 {
        let power = (code >> fraction) as i32;
        let steps = (code & ((1 << fraction) - 1)) as f32;
        let unit = 1.0 / (1 << fraction) as f32;
        let value = match power {
            0 => steps * unit * power_of_two(1 - bias),
            _ => (1.0 + steps * unit) * power_of_two(power - bias),
        };
        values[code] = value;
        values[code + 128] = -value;
        code += 1;
    }
    values
}

const fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits(((exponent + 127) as u32) << 23)
}

/// Neighbours in a row that share a scale; the last of a row may be fewer.
pub const SCALE_GROUP: usize = 128;

/// What scales of rows may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RowScales {
    /// Any number: `max(amax, 1e-4) / 448`.
    #[default]
    Exact,
    /// Powers of two: the next one, where that is none.
    Powers,
}

/// The scale of some neighbours; not finite if one of them is not.
///
/// ```
/// # use epsmoe_base::float8::{RowScales, scale_of};
/// assert_eq!(scale_of([3.0, -3.5], RowScales::Powers), 1.0 / 128.0); // 3.5 / 448 is one
/// assert_eq!(scale_of([3.0, -3.6], RowScales::Powers), 1.0 / 64.0);
/// assert_eq!(scale_of([3.0, -3.6], RowScales::Exact), 3.6 / 448.0);
/// ```
pub fn scale_of(values: impl IntoIterator<Item = f32>, scales: RowScales) -> f32 {
    /// What groups of nothing but tiny numbers are scaled by, so that nothing is divided by zero.
    const LEAST: f32 = 1e-4;
    // `f32::max` would drop a NaN.
    let larger =
        |most: f32, value: f32| if value.abs() > most || value.is_nan() { value.abs() } else { most };
    let scale = values.into_iter().fold(LEAST, larger) / E4M3_MAX;
    match scales {
        // A fraction, if there is one, carries into the exponent.
        RowScales::Powers if scale.is_finite() => f32::from_bits((scale.to_bits() + 0x7f_ffff) & !0x7f_ffff),
        _ => scale,
    }
}

/// Words of a row of `width` codes: four codes a word, the first in its lowest byte, then the scales, as the bits of
/// float32.
pub const fn scaled_words(width: usize) -> usize {
    width.div_ceil(4) + width.div_ceil(SCALE_GROUP)
}

/// Writes a row as e4m3 codes `number / scale` with a scale for every [`SCALE_GROUP`]; `number` is what an element counts
/// as, `words` are [`scaled_words`] of the row's width.
///
/// Worked example: `[1.0, −0.3, 0.007, 3.5]` in bfloat16 has the scale 3.5 / 448 = 0.0078125 and the codes
/// `70 e2 36 7e`, which mean 1.0, −0.3125, 0.00683594 and 3.5.
pub fn encode_row<T: Copy>(row: &[T], number: impl Fn(T) -> f32, scales: RowScales, words: &mut [u32]) {
    let (codes, kept) = words.split_at_mut(row.len().div_ceil(4));
    let groups = row.chunks(SCALE_GROUP).zip(codes.chunks_mut(SCALE_GROUP / 4)).zip(kept);
    for ((group, codes), kept) in groups {
        let scale = scale_of(group.iter().map(|&element| number(element)), scales);
        for (elements, word) in group.chunks(4).zip(codes) {
            let mut bytes = [0; 4];
            bytes.iter_mut().zip(elements).for_each(|(code, &x)| *code = to_e4m3(number(x) / scale));
            *word = u32::from_le_bytes(bytes);
        }
        *kept = scale.to_bits();
    }
}

/// Reads a row that [`encode_row`] wrote: every code's value times its scale, in float32, as `element` makes them.
pub fn decode_row<T>(words: &[u32], row: &mut [T], element: impl Fn(f32) -> T) {
    let (codes, scales) = words.split_at(row.len().div_ceil(4));
    let groups = row.chunks_mut(SCALE_GROUP).zip(codes.chunks(SCALE_GROUP / 4)).zip(scales);
    for ((group, codes), scale) in groups {
        let scale = f32::from_bits(*scale);
        for (elements, word) in group.chunks_mut(4).zip(codes) {
            let values = word.to_le_bytes().map(|code| E4M3[usize::from(code)] * scale);
            elements.iter_mut().zip(values).for_each(|(out, value)| *out = element(value));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Mix;
    use half::{bf16, f16};

    #[test]
    fn codes_mean_what_their_formats_say() {
        let e4m3 = [0x00, 0x01, 0x07, 0x08, 0x38, 0x40, 0x7e, 0xb4].map(|code| E4M3[code]);
        assert_eq!(e4m3, [0.0, 0.001953125, 0.013671875, 0.015625, 1.0, 2.0, 448.0, -0.75]);
        assert!(E4M3[0x7f].is_nan() && E4M3[0xff].is_nan());
        assert!(E4M3[0x80] == 0.0 && E4M3[0x80].is_sign_negative());
        for code in 0..=255u8 {
            let half = f16::from_bits(u16::from(code) << 8).to_f32();
            assert!(E5M2[code as usize] == half || (half.is_nan() && E5M2[code as usize].is_nan()), "{code}");
        }
    }

    #[test]
    fn bits_are_those_of_the_values() {
        for code in 0..=255u8 {
            let (bits, value) = (e4m3_bits(code), E4M3[usize::from(code)]);
            let found = f32::from_bits(bits);
            assert!(found.to_bits() == value.to_bits() || (found.is_nan() && value.is_nan()), "{code:#x}");
            assert_eq!(bits & 0xffff, 0, "{code:#x} is exact in bfloat16");
        }
    }

    /// The nearest of all values, the even code of two that are as near.
    fn nearest(value: f32) -> usize {
        let distance = |code: usize| (f64::from(E4M3[code]) - f64::from(value.abs())).abs();
        let best = (0..0x7f).min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1))));
        best.unwrap() + if value.is_sign_negative() { 128 } else { 0 }
    }

    #[test]
    fn the_nearest_code_is_chosen() {
        let seed = 71;
        println!("seed {seed}");
        let mut mix = Mix::new(seed);
        let check = |value: f32| assert_eq!(to_e4m3(value) as usize, nearest(value), "e4m3 of {value}");
        for _ in 0..20_000 {
            check(mix.signed() * 2f32.powi(mix.below(24) as i32 - 12));
        }
        // Every value, and every middle of two.
        let finite: Vec<f32> = (0..0x7f).map(|code| E4M3[code]).collect();
        finite.iter().for_each(|&value| check(value));
        finite.windows(2).for_each(|pair| check((pair[0] + pair[1]) / 2.0));
        assert_eq!([f32::INFINITY, -1e9, f32::NAN].map(to_e4m3), [0x7e, 0xfe, 0x7f]);
    }

    fn coded(row: &[f32]) -> Vec<u32> {
        let mut words = vec![u32::MAX; scaled_words(row.len())];
        encode_row(row, |x| x, RowScales::Exact, &mut words);
        words
    }

    fn through(row: &[f32]) -> Vec<f32> {
        let mut back = vec![0.0; row.len()];
        decode_row(&coded(row), &mut back, |x| x);
        back
    }

    #[test]
    fn the_worked_example() {
        let row = [1.0f32, -0.3, 0.007, 3.5].map(|value| bf16::from_f32(value).to_f32());
        let words = coded(&row);
        assert_eq!(words, [u32::from_le_bytes([0x70, 0xe2, 0x36, 0x7e]), 0.0078125f32.to_bits()]);
        assert_eq!(through(&row), [1.0, -0.3125, 0.0068359375, 3.5]);
    }

    /// Groups have scales of their own, also a last one that is not whole; what came back once comes back again.
    #[test]
    fn rows_of_any_width_come_back_within_a_sixteenth() {
        let seed = 72;
        println!("seed {seed}");
        let mut mix = Mix::new(seed);
        for width in [1, 3, 4, 127, 128, 129, 200, 512, 1000] {
            let size = |at: usize| if (at / SCALE_GROUP).is_multiple_of(2) { 1.0 } else { 1000.0 };
            let row: Vec<f32> = (0..width).map(|at| mix.signed() * size(at)).collect();
            let back = through(&row);
            for (at, (value, back)) in row.iter().zip(&back).enumerate() {
                let near = (value - back).abs() <= value.abs() / 16.0 + size(at) / 448.0 / 512.0;
                assert!(near, "width {width}: {value} became {back}");
            }
            assert_eq!(through(&back), back, "width {width}");
        }
        assert_eq!(through(&[0.0; 200]), [0.0; 200]);
    }

    /// What is not finite is not finite on the other side, and its neighbours of the group neither.
    #[test]
    fn nan_and_infinity_do_not_get_lost() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 5, 127, 130] {
                let mut row = [1.0f32; 160];
                row[at] = bad;
                let back = through(&row);
                let group = at / SCALE_GROUP;
                for (other, value) in back.iter().enumerate() {
                    assert_eq!(value.is_finite(), other / SCALE_GROUP != group, "{bad} at {at}: {other}");
                }
            }
        }
    }
}
