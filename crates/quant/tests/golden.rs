//! Every coding against weights that a plain script computed one by one (oracle.py): whole, in bfloat16, and in random
//! parts.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

mod support;

use epsmoe_base::Mix;
use epsmoe_quant::{
    CodedTensor, Hints, QuantConfig, QuantError, Rows, StoredTensor, StoredTensors, StoredType,
};
use half::bf16;
use safetensors::{Dtype, SafeTensors};
use serde_json::json;
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

/// How much a thread has asked for at once since it last looked.
mod counted {
    use std::alloc::{GlobalAlloc, Layout, System};
    use std::cell::Cell;

    struct Counting;

    thread_local! {
        static LARGEST: Cell<usize> = const { Cell::new(0) };
    }

    // SAFETY: all is handed on to the system's, as it is.
    unsafe impl GlobalAlloc for Counting {
        unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
            LARGEST.with(|largest| largest.set(largest.get().max(layout.size())));
            // SAFETY: the caller's promise.
            unsafe { System.alloc(layout) }
        }

        unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
            // SAFETY: the caller's promise.
            unsafe { System.dealloc(at, layout) }
        }
    }

    #[global_allocator]
    static ALLOCATOR: Counting = Counting;

    /// The largest piece that this thread was given while it did that.
    pub(super) fn largest<T>(work: impl FnOnce() -> T) -> (T, usize) {
        LARGEST.set(0);
        let done = work();
        (done, LARGEST.get())
    }
}

/// A reader's buffer, and room for the weights of the largest golden file.
const MOST_BYTES: usize = 2 << 20;

impl Golden {
    /// The weights that it is read as, decoded and in codes, or a sentence about the tensor, which reserves nothing for what is
    /// not there.
    fn attempt(&self, what: &str) -> Result<Vec<f32>, String> {
        let (rows, columns) = self.size();
        let read = || -> Result<Vec<f32>, QuantError> {
            let plain = || QuantError::new(format!("tensor `{}` is plain", self.tensor));
            let coded = self.detect()?.ok_or_else(plain)?;
            let mut weights = vec![0.0f32; rows * columns];
            let decoded = coded.decode(&self.stored, Rows::range(0..rows), 0..columns, &mut weights);
            // Codes are looked at as closely as what is decoded.
            let codes = coded.codes(&self.stored, Rows::range(0..rows), 0..columns);
            let held = matches!(codes, Ok(Some(_)));
            assert!(!held || decoded.is_ok(), "{}, {what}: held, but {decoded:?}", self.name);
            decoded.map(|()| weights)
        };
        let (read, bytes) = counted::largest(read);
        assert!(bytes <= MOST_BYTES, "{}, {what}: {bytes} bytes reserved", self.name);
        read.map_err(|error| {
            let error = error.to_string();
            let names = error.contains(self.tensor.trim_end_matches(".weight"));
            assert!(names && !error.contains('\n') && error.len() < 1000, "{}, {what}: {error}", self.name);
            error
        })
    }

    fn with(&self, hints: Hints, stored: Memory) -> Golden {
        let Golden { name, tensor, shape, expected, .. } = self;
        let (name, tensor, shape, expected) = (name.clone(), tensor.clone(), shape.clone(), expected.clone());
        Golden { name, tensor, hints, stored, shape, expected }
    }
}

/// What config.json says of groups counts only where the tensors leave a choice, and must fit them then: none of it ends in a panic, in
/// memory for what is not there or in codes that mean something else than what is decoded.
#[test]
fn absurd_groups_are_refused_or_read() {
    const LENGTHS: [usize; 9] = [0, 1, 3, 7, 33, 1 << 20, 1 << 40, usize::MAX - 1, usize::MAX];
    for golden in Golden::all() {
        for length in LENGTHS {
            let Hints { block, group, gptq_v2, act_order } = golden.hints;
            for hints in [
                Hints { group: Some(length), block, gptq_v2, act_order },
                Hints { block: Some([length, length]), group, gptq_v2, act_order },
                Hints { block: Some([1, length]), group: Some(length), gptq_v2, act_order },
            ] {
                // A group of 33 columns may be what two scales of a row are for; what is not is refused.
                let _ = golden.with(hints, golden.stored.clone()).attempt(&format!("{hints:?}"));
            }
        }
    }
}

#[test]
fn absurd_groups_of_a_config_are_refused() {
    let absurd = [
        json!(0),
        json!(-2),
        json!(-128),
        json!(1u64 << 21),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(2.5),
        json!("128"),
        json!([128]),
        json!({"size": 128}),
        json!(true),
    ];
    for size in absurd {
        for section in [
            json!({"quant_method": "gptq", "bits": 4, "group_size": size}),
            json!({"quant_method": "awq", "bits": 4, "group_size": size}),
            json!({"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": {
                "num_bits": 4, "strategy": "group", "group_size": size,
            }}}}),
            json!({"quant_method": "fp8", "weight_block_size": [size, 128]}),
            json!({"quant_method": "fp8", "weight_block_size": [128, size, 1]}),
        ] {
            let message = QuantConfig::parse(&section).unwrap_err().to_string();
            let named = message.contains("`group_size`") || message.contains("`weight_block_size`");
            assert!(named && message.contains("must be") && !message.contains('\n'), "{section}: {message}");
        }
    }
}

/// Codes, scales, zeros and tables of every shape that they do not have: cut off, turned over, empty, enormous.
#[test]
fn shapes_that_lie_are_refused() {
    for golden in Golden::all() {
        for (name, (tensor, _)) in &golden.stored.0 {
            let shape = tensor.shape.clone();
            let mut shapes = vec![
                [vec![1], shape.clone()].concat(),
                [shape.clone(), vec![1]].concat(),
                shape.iter().rev().copied().collect(),
                vec![shape.iter().product()],
                vec![0],
                vec![usize::MAX, usize::MAX],
                vec![1 << 40, 1 << 40, 1 << 40],
                vec![2; 64],
            ];
            for dimension in 0..shape.len() {
                for length in [0, shape[dimension] - 1, shape[dimension] * 2, 1 << 40, usize::MAX] {
                    let mut changed = shape.clone();
                    changed[dimension] = length;
                    shapes.push(changed);
                }
            }
            for changed in shapes.into_iter().filter(|changed| *changed != shape) {
                let mut stored = golden.stored.clone();
                let (tensor, bytes) = stored.0.get_mut(name).unwrap();
                tensor.shape = changed.clone();
                // A file is as long as it says, or is refused before.
                let count = changed.iter().try_fold(1usize, |count, &length| count.checked_mul(length));
                if let Some(count) = count.filter(|&count| count <= 1 << 20) {
                    bytes.resize(tensor.dtype.bytes(count), 0x38);
                }
                let what = format!("`{name}` {shape:?} as {changed:?}");
                let told = golden.with(golden.hints, stored).attempt(&what);
                // Fewer scales may be those of larger blocks; nothing else is what fewer or more numbers may be.
                let impossible = changed.iter().any(|&length| length == 0 || length >= 1 << 40);
                let alike = |shape: &[usize]| shape.iter().copied().filter(|&n| n != 1).collect::<Vec<_>>();
                let other = name.contains("scale") && !impossible;
                let read = told.is_ok_and(|weights| other || bits(&weights) == bits(&golden.expected));
                assert!(
                    !read || other || alike(&changed) == alike(&shape),
                    "{}: {what} is read",
                    golden.name
                );
            }
        }
    }
}

/// A tensor in a format that its coding has not, or that is not there.
#[test]
fn formats_that_lie_are_refused() {
    let formats =
        [StoredType::F32, StoredType::I64, StoredType::I32, StoredType::U8, StoredType::Other("BOOL")];
    for golden in Golden::all() {
        for name in golden.stored.0.keys() {
            for format in formats {
                let mut stored = golden.stored.clone();
                let (tensor, bytes) = stored.0.get_mut(name).unwrap();
                // Bytes, and powers of two, go by either name.
                let bits = tensor.dtype.bytes(8) * 8;
                if format.bytes(8) * 8 == bits {
                    continue;
                }
                tensor.dtype = format;
                bytes.resize(format.bytes(tensor.shape.iter().product()), 0);
                let told = golden.with(golden.hints, stored).attempt(&format!("`{name}` as {format}"));
                // Scales may be powers of two, or float32.
                let scales = name.contains("scale") && [StoredType::U8, StoredType::F32].contains(&format);
                assert!(told.is_err() || scales, "{}: `{name}` as {format} is read", golden.name);
            }
            let mut stored = golden.stored.clone();
            stored.0.remove(name);
            let optional = ["weight_shape", "g_idx", "input_scale", "zero_point"];
            let told = golden.with(golden.hints, stored).detect();
            let gone = told.as_ref().map_or(true, Option::is_none);
            assert!(gone || optional.iter().any(|of| name.contains(of)), "{}: without `{name}`", golden.name);
        }
    }
}

/// Infinite and negative scales, and scales that no bfloat16 holds the weights of.
#[test]
fn scales_beyond_all_numbers_are_refused() {
    for golden in Golden::all() {
        for (name, (tensor, _)) in golden.stored.0.iter().filter(|(name, _)| name.contains("scale")) {
            let infinite: &[u8] = match tensor.dtype {
                StoredType::F32 => &f32::INFINITY.to_le_bytes(),
                StoredType::BF16 => &0x7f80u16.to_le_bytes(),
                StoredType::F16 => &0xfc00u16.to_le_bytes(),
                _ => continue,
            };
            let mut stored = golden.stored.clone();
            let (_, bytes) = stored.0.get_mut(name).unwrap();
            bytes.chunks_exact_mut(infinite.len()).for_each(|scale| scale.copy_from_slice(infinite));
            let told = golden.with(golden.hints, stored).attempt(&format!("infinite `{name}`"));
            let used = !name.contains("input_scale");
            assert_eq!(told.is_err(), used, "{}: infinite `{name}`", golden.name);
        }
    }
}
