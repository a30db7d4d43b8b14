//! Numbers of eight and four bits: what each code means, and the code nearest to a value.

pub use epsmoe_base::float8::{E4M3, E4M3_MAX, E5M2, to_e4m3};

/// Values of the sixteen codes of FP4 e2m1.
pub static E2M1: [f32; 16] =
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

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

#[cfg(test)]
mod tests {
    use super::*;
    use epsmoe_base::Mix;

    #[test]
    fn powers_of_two_mean_what_they_say() {
        assert_eq!([0, 121, 127, 254].map(e8m0), [2f32.powi(-127), 2f32.powi(-6), 1.0, 2f32.powi(127)]);
        assert!(e8m0(0xff).is_nan());
    }

    /// The nearest of all values, the even code of two that are as near.
    fn nearest(value: f32) -> usize {
        let distance = |code: usize| (f64::from(E2M1[code]) - f64::from(value.abs())).abs();
        let best = (0..8).min_by(|&a, &b| distance(a).total_cmp(&distance(b)).then((a & 1).cmp(&(b & 1))));
        best.expect("there are codes") + if value.is_sign_negative() { 8 } else { 0 }
    }

    #[test]
    fn the_nearest_code_is_chosen() {
        let seed = 71;
        println!("seed {seed}");
        let mut mix = Mix::new(seed);
        let check = |value: f32| assert_eq!(to_e2m1(value) as usize, nearest(value), "e2m1 of {value}");
        for _ in 0..20_000 {
            check(mix.signed() * 2f32.powi(mix.below(24) as i32 - 12));
        }
        // Every value, and every middle of two.
        E2M1.iter().for_each(|&value| check(value));
        E2M1[..8].windows(2).for_each(|pair| check((pair[0] + pair[1]) / 2.0));
        assert_eq!([f32::INFINITY, -1e9].map(to_e2m1), [7, 15]);
    }
}
