//! Codings by examples that can be followed by hand, and what is refused in which words.

mod support;

use epsmoe_quant::{CodedTensor, Hints, QuantError, Rows, StoredTensors, StoredType};
use half::{bf16, f16};
use support::Memory;

fn decode(stored: &Memory, name: &str, shape: &[usize]) -> Result<Vec<f32>, QuantError> {
    let coded = CodedTensor::detect(name, shape, &Hints::default(), |name| stored.find(name))?;
    let coded = coded.expect("a coded tensor");
    let (rows, columns) = (shape[..shape.len() - 1].iter().product(), shape[shape.len() - 1]);
    let mut weights = vec![0.0; rows * columns];
    coded.decode(stored, Rows::range(0..rows), 0..columns, &mut weights)?;
    Ok(weights)
}

fn rounded(weights: &[f32]) -> Vec<u16> {
    weights.iter().map(|&weight| bf16::from_f32(weight).to_bits()).collect()
}

fn le(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn halves(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect()
}

/// A scale narrowed to bfloat16 would change the third weight.
#[test]
fn fp8_multiplies_with_the_scale_as_it_is_stored() {
    let codes = Memory::default().with("x.weight", StoredType::E4M3, &[1, 4], &[0x38, 0xb4, 0x7e, 0x01]);
    let scale = 1.5e-4f32.to_le_bytes();
    let stored = codes.clone().with("x.weight_scale_inv", StoredType::F32, &[1, 1], &scale);
    let weights = decode(&stored, "x.weight", &[1, 4]).unwrap();
    assert_eq!(weights[..3], [1.5e-4, -0.75 * 1.5e-4, 448.0 * 1.5e-4]);
    assert_eq!(rounded(&weights), [0x391d, 0xb8ec, 0x3d8a, 0x349d]);
    let stored = codes.with("x.weight_scale_inv", StoredType::BF16, &[1, 1], &0x391du16.to_le_bytes());
    let weights = decode(&stored, "x.weight", &[1, 4]).unwrap();
    assert_eq!(bf16::from_f32(weights[2]).to_f32(), 0.066_894_53);
}

#[test]
fn low_nibbles_of_mxfp4_are_even_columns() {
    let mut bytes = vec![0x72, 0xf9, 0x1c];
    bytes.resize(16, 0);
    let stored = Memory::default().with("x_blocks", StoredType::U8, &[1, 1, 1, 16], &bytes).with(
        "x_scales",
        StoredType::U8,
        &[1, 1, 1],
        &[121],
    );
    let weights = decode(&stored, "x", &[1, 1, 32]).unwrap();
    assert_eq!(weights[..6], [0.015625, 0.09375, -0.0078125, -0.09375, -0.03125, 0.0078125]);
}

#[test]
fn int4_words_hold_eight_columns_plus_eight() {
    let stored = Memory::default()
        .with("x.weight_packed", StoredType::I32, &[1, 1], &le(&[0xfea9_8710]))
        .with("x.weight_scale", StoredType::BF16, &[1, 1], &0x3c4au16.to_le_bytes());
    let weights = decode(&stored, "x.weight", &[1, 8]).unwrap();
    let scale = 0.012_329_102;
    assert_eq!(weights, [-8.0, -7.0, -1.0, 0.0, 1.0, 2.0, 6.0, 7.0].map(|q: f32| q * scale));
    let rounded: Vec<f32> = weights.iter().map(|&weight| bf16::from_f32(weight).to_f32()).collect();
    assert_eq!((rounded[6], rounded[7]), (0.074_218_75, 0.086_425_78));
}

/// Rows 0 … 7 of one column: codes 3 … 10, zeros 7.
#[test]
fn awq_words_hold_even_rows_then_odd_ones() {
    let stored = Memory::default()
        .with("x.qweight", StoredType::I32, &[1, 1], &le(&[0xa864_9753]))
        .with("x.qzeros", StoredType::I32, &[1, 1], &le(&[0x7777_7777]))
        .with("x.scales", StoredType::F16, &[1, 8], &halves(&[0.25; 8]));
    let weights = decode(&stored, "x.weight", &[8, 1]).unwrap();
    assert_eq!(weights, [-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75]);
}

/// Eight columns of eight rows, all alike; a stored zero of 7 means 8.
fn gptq() -> Memory {
    Memory::default()
        .with("x.qweight", StoredType::I32, &[1, 8], &le(&[0xc810_f798; 8]))
        .with("x.qzeros", StoredType::I32, &[1, 1], &le(&[0x7777_7777]))
        .with("x.scales", StoredType::F16, &[1, 8], &halves(&[0.5; 8]))
}

#[test]
fn gptq_words_hold_eight_columns_and_zeros_less_one() {
    let weights = decode(&gptq(), "x.weight", &[8, 8]).unwrap();
    assert_eq!(weights[8..16], [0.0, 0.5, -0.5, 3.5, -4.0, -3.5, 0.0, 2.0]);
}

#[test]
fn a_table_of_groups_that_points_outside_is_refused() {
    let in_order = gptq().with("x.g_idx", StoredType::I32, &[8], &le(&[0; 8]));
    assert!(decode(&in_order, "x.weight", &[8, 8]).is_ok());
    let outside = gptq().with("x.g_idx", StoredType::I32, &[8], &le(&[0, 0, 0, 1, 0, 0, 0, 0]));
    let message = decode(&outside, "x.weight", &[8, 8]).unwrap_err().to_string();
    assert_eq!(
        message,
        "tensor `x.weight`: `x.g_idx` puts column 3 into group 1 of 1; the file is damaged or incomplete: fetch it again"
    );
}

#[test]
fn errors_name_the_tensor_the_shapes_and_the_mend() {
    let codes = Memory::default().with("x.weight", StoredType::E4M3, &[2, 2], &[0x38; 4]);
    let refused = |stored: &Memory| decode(stored, "x.weight", &[2, 2]).unwrap_err().to_string();
    assert_eq!(
        refused(&codes),
        "tensor `x.weight`: it is F8_E4M3, but there is no `x.weight_scale_inv` beside it; the file is damaged or \
         incomplete: fetch it again"
    );
    let wrong = codes.clone().with("x.weight_scale_inv", StoredType::F32, &[3, 1], &[0; 12]);
    assert_eq!(
        refused(&wrong),
        "tensor `x.weight`: `x.weight_scale_inv` is F32 of shape [3, 1], where weights [2, 2] need one scale for each \
         block, row or the whole tensor; config.json and weights are of different models, or the file is damaged or \
         incomplete: fetch it again"
    );
    let zero = codes.clone().with("x.weight_scale_inv", StoredType::F32, &[1, 1], &[0; 4]);
    assert_eq!(
        refused(&zero),
        "tensor `x.weight`: the scale at row 0, column 0 is zero where weights are not; the file is damaged or \
         incomplete: fetch it again"
    );
    let scale = 1f32.to_le_bytes();
    let nan = Memory::default().with("x.weight", StoredType::E4M3, &[2, 2], &[0x38, 0, 0, 0x7f]);
    assert_eq!(
        refused(&nan.with("x.weight_scale_inv", StoredType::F32, &[1, 1], &scale)),
        "tensor `x.weight`: row 1, column 1 is NaN: a code or a scale is not a number of any weight; the file is \
         damaged or incomplete: fetch it again"
    );
}

/// What is there but plain, or not there at all, is no matter of codings.
#[test]
fn plain_tensors_are_not_coded() {
    let stored = Memory::default().with("x.weight", StoredType::BF16, &[1, 2], &[0; 4]);
    for name in ["x.weight", "y.weight"] {
        let coded = CodedTensor::detect(name, &[1, 2], &Hints::default(), |name| stored.find(name));
        assert_eq!(coded, Ok(None));
    }
}
