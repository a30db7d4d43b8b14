//! Numbers of eight and four bits: what each code means, and the code nearest to a value.

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

/// Values of the sixteen codes of FP4 e2m1.
pub static E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// The largest finite value of e4m3.
pub const E4M3_MAX: f32 = 448.0;

/// The largest value of e2m1.
pub const E2M1_MAX: f32 = 6.0;

/// The scale 2^(code − 127) of e8m0; 0xff is NaN, and there is neither zero nor sign.
pub fn e8m0(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22), // 2^−127 is below the normal numbers.
        0xff => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

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

/// The e2m1 code nearest to a value, ties to even; what is beyond ±6 becomes ±6. NaN has no code and becomes 6.
pub fn to_e2m1(value: f32) -> u8 {
    let sign = ((value.to_bits() >> 28) & 8) as u8;
    let code = match value.abs() {
        magnitude if magnitude <= 0.25 => 0,
        magnitude if magnitude < 0.75 => 1,
        magnitude if magnitude <= 1.25 => 2,
        magnitude if magnitude < 1.75 => 3,
        magnitude if magnitude <= 2.5 => 4,
        magnitude if magnitude < 3.5 => 5,
        magnitude if magnitude <= 5.0 => 6,
        _ => 7,
    };
    sign | code
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

#[cfg(test)]
mod tests {
    use super::*;
    use epsmoe_base::Mix;
    use half::f16;

    #[test]
    fn codes_mean_what_their_formats_say() {
        let e4m3 = [0x00, 0x01, 0x07, 0x08, 0x38, 0x40, 0x7e, 0xb4].map(|code| E4M3[code]);
        assert_eq!(e4m3, [0.0, 0.001953125, 0.013671875, 0.015625, 1.0, 2.0, 448.0, -0.75]);
        assert!(E4M3[0x7f].is_nan() && E4M3[0xff].is_nan());
        assert!(E4M3[0x80] == 0.0 && E4M3[0x80].is_sign_negative());
        assert_eq!([0, 121, 127, 254].map(e8m0), [2f32.powi(-127), 2f32.powi(-6), 1.0, 2f32.powi(127)]);
        assert!(e8m0(0xff).is_nan());
        for code in 0..=255u8 {
            let half = f16::from_bits(u16::from(code) << 8).to_f32();
            assert!(E5M2[code as usize] == half || (half.is_nan() && E5M2[code as usize].is_nan()), "{code}");
        }
    }

    /// The nearest of all values, the even code of two that are as near.
    fn nearest(values: &[f32], value: f32) -> usize {
        let half = values.len() / 2;
        let codes = (0..half).filter(|&code| !values[code].is_nan());
        let distance = |code: usize| (f64::from(values[code]) - f64::from(value.abs())).abs();
        let best = codes
            .min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1))))
            .expect("there are codes");
        if value.is_sign_negative() { best + half } else { best }
    }

    #[test]
    fn encoders_choose_the_nearest_code() {
        let seed = 71;
        println!("seed {seed}");
        let mut mix = Mix::new(seed);
        let check = |value: f32| {
            assert_eq!(to_e4m3(value) as usize, nearest(&E4M3, value), "e4m3 of {value}");
            assert_eq!(to_e2m1(value) as usize, nearest(&E2M1, value), "e2m1 of {value}");
        };
        for _ in 0..20_000 {
            check(mix.signed() * 2f32.powi(mix.below(24) as i32 - 12));
        }
        // Every value, and every middle of two.
        let finite: Vec<f32> = (0..0x7f).map(|code| E4M3[code]).collect();
        finite.iter().chain(&E2M1).for_each(|&value| check(value));
        finite.windows(2).chain(E2M1[..8].windows(2)).for_each(|pair| check((pair[0] + pair[1]) / 2.0));
        assert_eq!([f32::INFINITY, -1e9, f32::NAN].map(to_e4m3), [0x7e, 0xfe, 0x7f]);
        assert_eq!([f32::INFINITY, -1e9].map(to_e2m1), [7, 15]);
    }
}
