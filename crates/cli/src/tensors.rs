//! Writing safetensors files: a header, then every tensor, never more than a piece of one in memory.

use epsmoe_base::DType;
use serde_json::json;
use std::io::{self, Write};

/// A tensor to be written.
pub(crate) struct TensorPlan {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
}

impl TensorPlan {
    pub(crate) fn bytes(&self) -> u64 {
        self.shape.iter().map(|&width| width as u64).product::<u64>() * self.dtype.bytes() as u64
    }
}

/// Writes the header of a file with these tensors, one after the other.
pub(crate) fn write_header(out: &mut dyn Write, tensors: &[TensorPlan]) -> io::Result<()> {
    let mut header = serde_json::Map::from_iter([("__metadata__".to_owned(), json!({ "format": "pt" }))]);
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.bytes();
        let entry =
            json!({ "dtype": dtype_name(tensor.dtype), "shape": tensor.shape, "data_offsets": [start, end] });
        header.insert(tensor.name.clone(), entry);
        start = end;
    }
    let mut text = serde_json::to_vec(&header)?;
    text.resize(text.len().next_multiple_of(8), b' ');
    out.write_all(&(text.len() as u64).to_le_bytes())?;
    out.write_all(&text)
}

fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "F32",
        DType::BF16 => "BF16",
        DType::F16 => "F16",
        DType::U32 => "U32",
    }
}
