//! The layer equals the plain mixture of experts that it stands for.

use crate::world::{Case, Setup, random_policy, rounded, run};
use epsmoe_base::float8::{RowScales, decode_row, encode_row};
use epsmoe_base::{DType, Mix, RowFormat, WireDType, WireFormat, env::test_seed};
use epsmoe_device::op::Score;
use epsmoe_plan::SlotMap;

/// `Σ a[i] · b[i]` for every row of `matrix`.
fn times(matrix: &[f32], x: &[f64]) -> Vec<f64> {
    matrix.chunks(x.len()).map(|row| row.iter().zip(x).map(|(&w, x)| f64::from(w) * x).sum()).collect()
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `down( silu(gate·x) ⊙ (up·x) )`.
fn mlp(case: &Case, name: &str, inner: usize, x: &[f64]) -> Vec<f64> {
    let part = |part: &str| times(&case.tensor(&format!("{name} {part}"), inner, case.hidden), x);
    let gated: Vec<f64> = part("gate").iter().zip(part("up")).map(|(g, u)| g * sigmoid(*g) * u).collect();
    times(&case.tensor(&format!("{name} down"), case.hidden, inner), &gated)
}

/// A token as its experts see it, whether it travelled or not.
fn travelled(case: &Case, x: &[f64]) -> Vec<f64> {
    if case.wire.is_none_or(|wire| wire.dispatch != RowFormat::Fp8) {
        return x.to_vec();
    }
    let mut words = vec![0; RowFormat::Fp8.elements(x.len()).1];
    encode_row(x, |x| rounded(DType::BF16, x as f32), RowScales::Exact, &mut words);
    let mut back = vec![0.0; x.len()];
    decode_row(&words, &mut back, |number| f64::from(rounded(case.dtype, number)));
    back
}

/// One token through the first layer, in float64; nothing if its choice of experts is too close to call.
fn definition(case: &Case, x: &[f64]) -> Option<Vec<f64>> {
    let experts = case.choices();
    let logits = times(&case.tensor("0 router", experts, case.hidden), x);
    let total: f64 = logits.iter().map(|logit| logit.exp()).sum();
    let score = |logit: &f64| match case.router.score {
        Score::Softmax => logit.exp() / total,
        _ => sigmoid(*logit),
    };
    let scores: Vec<f64> = logits.iter().map(score).collect();
    let bias = case.bias(0);
    let preference =
        |expert: usize| scores[expert] + bias.as_ref().map_or(0.0, |bias| f64::from(bias[expert]));
    let mut order: Vec<usize> = (0..experts).collect();
    order.sort_by(|&a, &b| preference(b).total_cmp(&preference(a)));
    let (chosen, others) = order.split_at(case.router.top_k);
    if others.first().is_some_and(|&next| preference(chosen[chosen.len() - 1]) - preference(next) < 1e-5) {
        return None;
    }
    let sum: f64 =
        if case.router.normalise { chosen.iter().map(|&expert| scores[expert]).sum() } else { 1.0 };
    let travelled = travelled(case, x);
    let mut y = vec![0.0; case.hidden];
    let mut add =
        |factor: f64, more: Vec<f64>| y.iter_mut().zip(more).for_each(|(y, more)| *y += factor * more);
    for &expert in chosen {
        let weight = scores[expert] / sum * f64::from(case.router.scale);
        let name = format!("0 expert {expert}");
        if expert >= case.map.experts() {
            add(weight, x.to_vec());
        } else if case.scaled_inputs {
            let scaled: Vec<f64> = travelled.iter().map(|x| weight * x).collect();
            add(1.0, mlp(case, &name, case.inner, &scaled));
        } else {
            add(weight, mlp(case, &name, case.inner, &travelled));
        }
    }
    if let Some(inner) = case.shared {
        let gate = || sigmoid(times(&case.tensor("0 shared gate", 1, case.hidden), x)[0]);
        add(if case.shared_gate { gate() } else { 1.0 }, mlp(case, "0 shared", inner, x));
    }
    Some(y)
}

fn check(dtype: DType) {
    let seed = test_seed();
    let (mut tokens, mut unclear) = (0, 0);
    for index in 0..40 {
        let mut mix = Mix::keyed(seed, &[index]);
        let case = Case::random(mix.next_u64(), dtype, 1);
        let policy = random_policy(&case.map, &mut mix);
        let shown = format!("seed {seed}, case {index}, {policy}, {case:?}");
        for (rank, got) in run(&case, &Setup::new(policy)).into_iter().enumerate() {
            let y = got.unwrap_or_else(|fault| panic!("{fault}: {shown}")).y;
            let x: Vec<f64> = case.input(rank).into_iter().map(f64::from).collect();
            for (token, (x, y)) in x.chunks(case.hidden).zip(y.chunks(case.hidden)).enumerate() {
                tokens += 1;
                let Some(want) = definition(&case, x) else {
                    unclear += 1;
                    continue;
                };
                let want: Vec<f32> = want.into_iter().map(|value| value as f32).collect();
                let wrong = dtype.tolerance().first_violation(y, &want);
                assert_eq!(wrong, None, "rank {rank}, token {token}: {shown}");
            }
        }
    }
    assert!(unclear * 20 < tokens, "{unclear} of {tokens} tokens unclear, seed {seed}");
}

#[test]
fn a_layer_is_the_plain_mixture_in_float32() {
    check(DType::F32);
}

#[test]
fn a_layer_is_the_plain_mixture_in_bfloat16() {
    check(DType::BF16);
}

/// Experts that see rows in FP8 give something else than experts that see them whole, on one rank as on two.
#[test]
fn rows_in_fp8_are_rows_in_fp8() {
    for ranks in [1, 2] {
        let map = SlotMap::contiguous(8, ranks).unwrap();
        let plain = Case { map, tokens: vec![24; ranks], layers: 1, ..Case::fixed() };
        let coded = Case { wire: Some(WireFormat::of(WireDType::Fp8, plain.dtype)), ..plain.clone() };
        let y = |case| run(case, &Setup::serial()).into_iter().flat_map(|got| got.unwrap().y);
        let pairs = || y(&plain).zip(y(&coded));
        let rms = |values: &mut dyn Iterator<Item = f32>| values.map(|x| x * x).sum::<f32>().sqrt();
        let error = rms(&mut pairs().map(|(plain, coded)| plain - coded)) / rms(&mut y(&plain));
        assert!((0.003..0.06).contains(&error), "{ranks} ranks: {error}");
    }
}
