//! Coded weights and GGUF files.

use epsmoe_quant::gguf::Gguf;
use epsmoe_quant::{
    CodedTensor, Hints, QuantConfig, QuantError, Rows, StoredTensor, StoredTensors, StoredType,
};
use epsmoe_text::Tokenizer;
use half::bf16;
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::path::Path;

/// `quantization_config` of config.json.
pub fn quantisation_config(bytes: &[u8]) {
    if let Ok(section) = serde_json::from_slice(bytes) {
        says_one_line(QuantConfig::parse(&section));
    }
}

/// A GGUF file: its header, what becomes of it, and every tensor.
pub fn gguf(bytes: &[u8]) {
    let Some(header) = says_one_line(Gguf::read(bytes.len() as u64, |into, at| at_of(bytes, at, into)))
    else {
        return;
    };
    says_one_line(header.config());
    if let Ok(Some(tokenizer)) = Tokenizer::of_gguf(&header, Path::new("untrusted.gguf")) {
        let ids = tokenizer.encode_special("Héllo 1234 <s>\n").unwrap_or_default();
        // Either may fail, but neither may panic.
        let _ = tokenizer.decode(&ids, true);
    }
    let file = File {
        bytes,
        tensors: &|name| {
            let tensor = header.tensors.get(name)?;
            Some((tensor.tensor.clone(), tensor.start))
        },
    };
    for (name, tensor) in &header.tensors {
        assert!(tensor.start + tensor.bytes <= bytes.len() as u64);
        decode(&file, name, &tensor.tensor.shape, &Hints::default());
    }
}

/// A safetensors file whose tensors are parts of a coded one, named in its metadata; `expected` has the shape of its
/// weights.
pub fn quantised(bytes: &[u8]) {
    let Ok(file) = SafeTensors::deserialize(bytes) else { return };
    let Ok((_, header)) = SafeTensors::read_metadata(bytes) else { return };
    let Some(metadata) = header.metadata() else { return };
    let (Some(name), Ok(expected)) = (metadata.get("tensor"), file.tensor("expected")) else { return };
    let hints = metadata.get("hints").and_then(|hints| serde_json::from_str::<Value>(hints).ok());
    let number = |value: &Value| value.as_u64().map(|number| number as usize);
    let hints = hints.map_or_else(Hints::default, |hints| Hints {
        block: number(&hints["block"][0]).zip(number(&hints["block"][1])).map(<[usize; 2]>::from),
        group: number(&hints["group"]),
        gptq_v2: hints["gptq_v2"] == true,
        act_order: hints["act_order"] == true,
    });
    let base = bytes.as_ptr() as usize;
    let source = File {
        bytes,
        tensors: &|name| {
            let view = file.tensor(name).ok()?;
            let tensor = StoredTensor { dtype: stored_type(view.dtype())?, shape: view.shape().to_vec() };
            Some((tensor, (view.data().as_ptr() as usize - base) as u64))
        },
    };
    decode(&source, name, expected.shape(), &hints);
}

fn decode(source: &File<'_>, name: &str, shape: &[usize], hints: &Hints) {
    // No model has a tensor without weights.
    if shape.contains(&0) {
        return;
    }
    let found = says_one_line(CodedTensor::detect(name, shape, hints, |name| source.find(name)));
    let Some(Some(coded)) = found else { return };
    let columns = shape[shape.len() - 1];
    let rows: usize = shape[..shape.len() - 1].iter().product();
    let mut weights = vec![bf16::ZERO; rows * columns];
    says_one_line(coded.decode(source, Rows::range(0..rows), 0..columns, &mut weights));
    // A part, beginning where no block does.
    let part = Rows { first: rows / 3, count: (rows - rows / 3).div_ceil(2), step: 2 };
    let mut weights = vec![0f32; part.count * (columns - columns / 3)];
    says_one_line(coded.decode(source, part, columns / 3..columns, &mut weights));
}

/// What was read, or nothing after an error of one line.
fn says_one_line<T>(result: Result<T, QuantError>) -> Option<T> {
    let line = |error: &QuantError| {
        let error = error.to_string();
        assert!(!error.contains('\n') && error.len() < 4000, "{error}");
    };
    result.inspect_err(line).ok()
}

/// A tensor and its first byte in the file.
type Place = (StoredTensor, u64);

/// Tensors in bytes.
struct File<'a> {
    bytes: &'a [u8],
    tensors: &'a dyn Fn(&str) -> Option<Place>,
}

impl StoredTensors for File<'_> {
    type Error = QuantError;

    fn find(&self, name: &str) -> Option<StoredTensor> {
        (self.tensors)(name).map(|(tensor, _)| tensor)
    }

    fn fill(&self, name: &str, first: u64, into: &mut [u8]) -> Result<(), QuantError> {
        let (tensor, start) = (self.tensors)(name).expect("a tensor that was found");
        let bytes = tensor.dtype.bytes(tensor.shape.iter().product()) as u64;
        assert!(
            first + into.len() as u64 <= bytes,
            "{name}: bytes {first} and {} more of {bytes}",
            into.len()
        );
        at_of(self.bytes, start + first, into)
    }
}

fn at_of(bytes: &[u8], at: u64, into: &mut [u8]) -> Result<(), QuantError> {
    let from = bytes.get(at as usize..).and_then(|rest| rest.get(..into.len()));
    into.copy_from_slice(from.expect("bytes of the file"));
    Ok(())
}

fn stored_type(dtype: Dtype) -> Option<StoredType> {
    Some(match dtype {
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
        _ => return None,
    })
}
