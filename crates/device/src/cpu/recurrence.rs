//! One token of one head that carries a state, columns of its state side by side.

use crate::threaded::RecurrentToken;

/// Columns that are taken together: as many running sums as stay in registers, while the rows of the state pass.
const COLUMNS: usize = 32;

/// The state goes on by a token. All instruction sets give the same bits: products and sums are rounded apart.
pub(super) fn step(state: &mut [f32], token: &RecurrentToken<'_>, out: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("avx2") {
        #[target_feature(enable = "avx2")]
        fn wide(state: &mut [f32], token: &RecurrentToken<'_>, out: &mut [f32]) {
            plain(state, token, out);
        }
        // SAFETY: the processor has the instructions, as was just asked.
        return unsafe { wide(state, token, out) };
    }
    plain(state, token, out);
}

#[inline(always)]
fn plain(state: &mut [f32], token: &RecurrentToken<'_>, out: &mut [f32]) {
    let width = out.len();
    for start in (0..width).step_by(COLUMNS) {
        let columns = start..width.min(start + COLUMNS);
        let (value, out) = (&token.value[columns.clone()], &mut out[columns.clone()]);
        match <&mut [f32; COLUMNS]>::try_from(&mut *out) {
            Ok(out) => some_columns(state, width, start, token, value, out),
            Err(_) => some_columns(state, width, start, token, value, out),
        }
    }
}

/// Columns `start..` of the state, as many as `out` has; what is at hand is a fixed number of them or a slice.
#[inline(always)]
fn some_columns<C: AsMut<[f32]> + ?Sized>(
    state: &mut [f32],
    width: usize,
    start: usize,
    token: &RecurrentToken<'_>,
    value: &[f32],
    out: &mut C,
) {
    let out = out.as_mut();
    let count = out.len();
    let mut sums = [0.0f32; COLUMNS];
    let sums = &mut sums[..count];
    if token.corrects {
        for (row, key) in state.chunks_exact_mut(width).zip(token.key) {
            for (state, sum) in row[start..][..count].iter_mut().zip(&mut *sums) {
                *sum += key * (*state * token.decay);
            }
        }
    }
    sums.iter_mut().zip(value).for_each(|(sum, value)| *sum = (value - *sum) * token.beta);
    out.fill(0.0);
    for ((row, key), query) in state.chunks_exact_mut(width).zip(token.key).zip(token.query) {
        for ((state, delta), out) in row[start..][..count].iter_mut().zip(&*sums).zip(&mut *out) {
            *state = *state * token.decay + key * delta;
            *out += query * *state;
        }
    }
    out.iter_mut().zip(value).for_each(|(out, value)| *out += token.skip * value);
}
