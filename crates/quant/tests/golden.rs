//! Every coding against weights that a plain script computed one by one (oracle.py): whole, in bfloat16, and in random
//! parts.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

mod support;

use epsmoe_base::Mix;
use epsmoe_quant::{CodedTensor, Hints, QuantError, Rows, StoredTensor, StoredTensors, StoredType};
use half::bf16;
use safetensors::{Dtype, SafeTensors};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use support::Memory;

struct Golden {
    name: String,
    /// Name under which a plain checkpoint would keep the tensor.
    tensor: String,
    hints: Hints,
    stored: Memory,
    shape: Vec<usize>,
    expected: Vec<f32>,
}

impl Golden {
    fn read(path: &Path) -> Golden {
        let bytes = fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let metadata = header.metadata().clone().unwrap();
        let hints: serde_json::Value = serde_json::from_str(&metadata["hints"]).unwrap();
        let number = |value: &serde_json::Value| value.as_u64().map(|number| number as usize);
        let mut stored = Memory::default();
        for (name, view) in SafeTensors::deserialize(&bytes).unwrap().tensors() {
            let tensor = StoredTensor { dtype: stored_type(view.dtype()), shape: view.shape().to_vec() };
            stored.0.insert(name, (tensor, view.data().to_vec()));
        }
        let (expected, bytes) = stored.0.remove("expected").unwrap();
        Golden {
            name: path.file_stem().unwrap().to_string_lossy().into_owned(),
            tensor: metadata["tensor"].clone(),
            hints: Hints {
                block: number(&hints["block"][0]).zip(number(&hints["block"][1])).map(<[usize; 2]>::from),
                group: number(&hints["group"]),
                gptq_v2: hints["gptq_v2"] == true,
                act_order: hints["act_order"] == true,
            },
            stored,
            shape: expected.shape,
            expected: bytes.as_chunks().0.iter().map(|&bytes| f32::from_le_bytes(bytes)).collect(),
        }
    }

    fn all() -> Vec<Golden> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
        let mut paths: Vec<_> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
        paths.sort();
        assert!(paths.len() > 20, "{} golden files", paths.len());
        paths.iter().map(|path| Golden::read(path)).collect()
    }

    fn detect(&self) -> Result<Option<CodedTensor>, QuantError> {
        CodedTensor::detect(&self.tensor, &self.shape, &self.hints, |name| self.stored.find(name))
    }

    fn coded(&self) -> CodedTensor {
        self.detect().unwrap().unwrap_or_else(|| panic!("{} is coded", self.name))
    }

    /// Rows over all matrices, and columns.
    fn size(&self) -> (usize, usize) {
        let columns = *self.shape.last().unwrap();
        (self.expected.len() / columns, columns)
    }
}

fn stored_type(dtype: Dtype) -> StoredType {
    match dtype {
        Dtype::F32 => StoredType::F32,
        Dtype::F16 => StoredType::F16,
        Dtype::BF16 => StoredType::BF16,
        Dtype::F8_E4M3 => StoredType::E4M3,
        Dtype::F8_E5M2 => StoredType::E5M2,
        Dtype::F8_E8M0 => StoredType::E8M0,
        Dtype::I8 => StoredType::I8,
        Dtype::U8 => StoredType::U8,
        Dtype::I32 => StoredType::I32,
        Dtype::I64 => StoredType::I64,
        other => panic!("no golden file has {other:?}"),
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn weights_are_those_of_the_oracle() {
    for golden in Golden::all() {
        let (rows, columns) = golden.size();
        let coded = golden.coded();
        println!("{}: {}", golden.name, coded.coding());
        let mut weights = vec![f32::NAN; rows * columns];
        coded.decode(&golden.stored, Rows::range(0..rows), 0..columns, &mut weights).unwrap();
        assert_eq!(bits(&weights), bits(&golden.expected), "{}", golden.name);
        let mut rounded = vec![bf16::NAN; rows * columns];
        coded.decode(&golden.stored, Rows::range(0..rows), 0..columns, &mut rounded).unwrap();
        let expected: Vec<bf16> = golden.expected.iter().map(|&value| bf16::from_f32(value)).collect();
        assert_eq!(rounded, expected, "{}", golden.name);
    }
}

#[test]
fn any_part_is_what_the_whole_has_there() {
    let seed = 2024;
    println!("seed {seed}");
    let mut mix = Mix::new(seed);
    for golden in Golden::all() {
        let (rows, columns) = golden.size();
        let coded = golden.coded();
        for _ in 0..60 {
            let step = 1 + mix.below(3);
            let first = mix.below(rows);
            let part = Rows { first, count: mix.below((rows - first).div_ceil(step) + 1), step };
            let start = mix.below(columns);
            let across = start..start + mix.below(columns - start + 1);
            let mut weights = vec![f32::NAN; part.count * across.len()];
            coded.decode(&golden.stored, part, across.clone(), &mut weights).unwrap();
            let expected: Vec<f32> = (0..part.count)
                .flat_map(|i| golden.expected[part.at(i) * columns..][across.clone()].to_vec())
                .collect();
            assert_eq!(bits(&weights), bits(&expected), "{} {part:?} {across:?}", golden.name);
        }
    }
}

/// Codes in one order mean what the whole has there, bit by bit, whatever the file.
#[test]
fn codes_mean_what_is_decoded() {
    let seed = 2025;
    println!("seed {seed}");
    let mut mix = Mix::new(seed);
    let mut held = BTreeSet::new();
    for golden in Golden::all() {
        let (rows, columns) = golden.size();
        let coded = golden.coded();
        for turn in 0..60 {
            let step = 1 + mix.below(3);
            let first = mix.below(rows);
            let part = Rows { first, count: mix.below((rows - first).div_ceil(step) + 1), step };
            let start = if turn < 20 { 0 } else { mix.below(columns.div_ceil(8)) * 8 };
            let across = start..start + mix.below(columns - start + 1);
            let Some(codes) = coded.codes(&golden.stored, part, across.clone()).unwrap() else { continue };
            assert_eq!(Some(codes.format), coded.format(&across), "{}", golden.name);
            if part.count > 0 && across.len() > 8 {
                held.insert(golden.name.clone());
            }
            let mut weights = vec![f32::NAN; across.len()];
            for i in 0..part.count {
                codes.decode(i, &mut weights);
                let expected = &golden.expected[part.at(i) * columns..][across.clone()];
                assert_eq!(bits(&weights), bits(expected), "{} {part:?} {across:?}", golden.name);
            }
        }
    }
    for golden in Golden::all() {
        let without = ["nvfp4", "e5m2", "act_order"].iter().any(|coding| golden.name.contains(coding));
        assert_eq!(held.contains(&golden.name), !without, "{}", golden.name);
    }
}

#[test]
fn tensors_that_do_not_fit_each_other_are_refused_by_name() {
    for golden in Golden::all() {
        for (name, (tensor, _)) in &golden.stored.0 {
            // One row, column or number more than there should be.
            for dimension in 0..tensor.shape.len() {
                let mut stored = golden.stored.clone();
                stored.0.get_mut(name).unwrap().0.shape[dimension] += 1;
                let wrong = Golden {
                    stored,
                    name: golden.name.clone(),
                    tensor: golden.tensor.clone(),
                    shape: golden.shape.clone(),
                    expected: Vec::new(),
                    hints: golden.hints,
                };
                let error = wrong.detect().unwrap_err().to_string();
                assert!(error.contains(&format!("`{}", golden.tensor)), "{}: {error}", golden.name);
            }
        }
    }
}

#[test]
fn numbers_that_no_weight_has_are_refused() {
    for golden in Golden::all() {
        let (rows, columns) = golden.size();
        let coded = golden.coded();
        let decode = |name: &str, change: &dyn Fn(&mut Vec<u8>, StoredType)| {
            let mut stored = golden.stored.clone();
            let (tensor, bytes) = stored.0.get_mut(name).unwrap();
            change(bytes, tensor.dtype);
            let mut weights = vec![0.0f32; rows * columns];
            coded.decode(&stored, Rows::range(0..rows), 0..columns, &mut weights)
        };
        let scales = golden.stored.0.keys().filter(|name| name.contains("scale"));
        for name in scales {
            let nan = |bytes: &mut Vec<u8>, dtype| match dtype {
                StoredType::F32 => bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes()),
                StoredType::F16 | StoredType::BF16 => bytes[..2].copy_from_slice(&0x7fffu16.to_le_bytes()),
                StoredType::E4M3 => bytes[0] = 0x7f,
                _ => bytes[0] = 0xff,
            };
            let error = decode(name, &nan).unwrap_err().to_string();
            assert!(error.contains("NaN"), "{} {name}: {error}", golden.name);
            if golden.stored.0[name].0.dtype.is_plain() {
                let error = decode(name, &|bytes, _| bytes.fill(0)).unwrap_err().to_string();
                assert!(error.contains("zero") || error.contains("is 0"), "{} {name}: {error}", golden.name);
            }
        }
    }
}
