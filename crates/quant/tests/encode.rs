//! Weights that are coded and decoded again.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

mod support;

use epsmoe_base::{Mix, env};
use epsmoe_quant::{CodedTensor, CodingError, Hints, QuantConfig, Rows, StoredTensors, StoredType, Target};
use support::Memory;

fn hints(target: Target) -> Hints {
    QuantConfig::parse(&target.config(&[])).unwrap().hints
}

fn stored(target: Target, weights: &[f32], columns: usize) -> Memory {
    let mut memory = Memory::default();
    for part in target.encode("x.weight", weights, columns).unwrap() {
        memory = memory.with(&part.name, part.tensor.dtype, &part.tensor.shape, &part.bytes);
    }
    memory
}

fn decoded(target: Target, stored: &Memory, rows: usize, columns: usize) -> Vec<f32> {
    let find = |name: &str| stored.find(name);
    let coded = CodedTensor::detect("x.weight", &[rows, columns], &hints(target), find).unwrap().unwrap();
    let mut weights = vec![f32::NAN; rows * columns];
    coded.decode(stored, Rows::range(0..rows), 0..columns, &mut weights).unwrap();
    weights
}

/// Numbers of a normal distribution, nearly: twelve uniform ones added up.
fn gaussian(mix: &mut Mix, count: usize, scale: f32) -> Vec<f32> {
    (0..count).map(|_| (0..12).map(|_| mix.unit()).sum::<f32>() - 6.0).map(|x| x * scale).collect()
}

#[test]
fn errors_are_those_of_the_formats() {
    let seed = env::test_seed();
    println!("EPSMOE_TEST_SEED={seed}");
    let mut mix = Mix::new(seed);
    let (rows, columns) = (300, 416);
    let weights = gaussian(&mut mix, rows * columns, 0.02);
    // What the formats lose of normal numbers: 2.6 %, 11.4 % with the first power of two, 9.5 %, 0.54 %.
    for (target, bound) in
        [(0.028, Target::Fp8PerBlock), (0.112, Target::Mxfp4), (0.093, Target::Int4), (0.0059, Target::Q8_0)]
            .map(|(b, t)| (t, b))
    {
        let stored = stored(target, &weights, columns);
        let mut error = CodingError::default();
        error.add(&weights, &decoded(target, &stored, rows, columns));
        println!("{target}: {:.4}", error.relative());
        assert!(error.relative() < bound && error.relative() > bound / 1.5, "{target}: {}", error.relative());
    }
}

/// What has been coded once loses nothing the next time.
#[test]
fn coded_weights_are_coded_without_loss() {
    let seed = env::test_seed();
    println!("EPSMOE_TEST_SEED={seed}");
    let mut mix = Mix::new(seed);
    let (rows, columns) = (130, 160);
    let weights = gaussian(&mut mix, rows * columns, 3.0);
    for target in [Target::Fp8PerBlock, Target::Mxfp4] {
        let once = decoded(target, &stored(target, &weights, columns), rows, columns);
        let twice = decoded(target, &stored(target, &once, columns), rows, columns);
        assert_eq!(once, twice, "{target}");
    }
}

#[test]
fn codes_that_are_held_are_those_of_the_tensors() {
    let mut mix = Mix::new(8);
    for target in Target::ALL {
        let (rows, columns) = (150, 192);
        let weights = gaussian(&mut mix, rows * columns, 0.02);
        let codes = target.codes("x.weight", &weights, columns).unwrap().unwrap();
        assert_eq!(codes.format, target.format(columns), "{target}");
        let mut held = vec![f32::NAN; rows * columns];
        held.chunks_exact_mut(columns).enumerate().for_each(|(row, out)| codes.decode(row, out));
        assert_eq!(held, decoded(target, &stored(target, &weights, columns), rows, columns), "{target}");
    }
}

#[test]
fn extreme_weights_have_codes() {
    for target in Target::ALL {
        let columns = 64;
        for weights in [
            vec![0.0; 2 * columns],
            vec![-0.0; 2 * columns],
            vec![1e-44; 2 * columns],
            vec![3e38; 2 * columns],
            (0..2 * columns).map(|i| if i == 5 { -60_000.0 } else { 0.0 }).collect(),
        ] {
            let back = decoded(target, &stored(target, &weights, columns), 2, columns);
            let close = |(got, want): (&f32, &f32)| (got - want).abs() <= 0.3 * want.abs().max(1e-40);
            assert!(
                back.iter().zip(&weights).all(close),
                "{target}: {:?} of {:?}",
                &back[..8],
                &weights[..8]
            );
        }
    }
}

#[test]
fn numbers_that_are_none_and_parts_of_groups_are_refused() {
    let mut weights = vec![1.0; 66];
    let message = Target::Int4.encode("x.weight", &weights, 33).unwrap_err().to_string();
    assert_eq!(message, "tensor `x.weight`: int4 needs whole groups of 32 columns, of which it has 33");
    weights[40] = f32::NAN;
    let message = Target::Fp8PerBlock.encode("x.weight", &weights, 33).unwrap_err().to_string();
    assert_eq!(message, "tensor `x.weight`: row 1, column 7 is NaN, which no coding has");
}

/// The largest weight of a group is ±127 of its scale, and bytes are stored plus 128.
#[test]
fn q8_0_is_bytes_of_a_scale() {
    let mut weights = vec![0.0; 32];
    weights[..5].copy_from_slice(&[127.0, 0.6, -0.6, 2.4, -126.4]);
    let [codes, scales, shape] = &Target::Q8_0.encode("x.weight", &weights, 32).unwrap()[..] else {
        panic!("three tensors")
    };
    assert_eq!((codes.name.as_str(), codes.tensor.dtype), ("x.weight_packed", StoredType::I32));
    assert_eq!(codes.bytes[..6], [255, 129, 127, 130, 2, 128]);
    assert_eq!((scales.bytes.as_slice(), shape.tensor.shape.as_slice()), (&[0x80, 0x3f][..], &[2][..]));
}

#[test]
fn codings_have_names_and_configs() {
    for target in Target::ALL {
        assert_eq!(Target::named(&target.to_string()), Some(target));
        assert!(QuantConfig::parse(&target.config(&["lm_head".to_owned()])).is_ok(), "{target}");
    }
}
