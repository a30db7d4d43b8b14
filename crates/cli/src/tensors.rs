//! Writing safetensors files: a header, then every tensor, never more than a piece of one in memory.

use epsmoe_quant::StoredType;
use serde_json::json;
use std::io::{self, Write};

/// A tensor to be written.
pub(crate) struct TensorPlan {
    pub(crate) name: String,
    pub(crate) dtype: StoredType,
    pub(crate) shape: Vec<usize>,
}

impl TensorPlan {
    pub(crate) fn bytes(&self) -> u64 {
        self.shape.iter().map(|&width| width as u64).product::<u64>() * self.dtype.bytes(1) as u64
    }
}

/// Writes the header of a file with these tensors, one after the other.
pub(crate) fn write_header<'a>(
    out: &mut dyn Write,
    tensors: impl IntoIterator<Item = &'a TensorPlan>,
) -> io::Result<()> {
    let mut header = serde_json::Map::from_iter([("__metadata__".to_owned(), json!({ "format": "pt" }))]);
    let mut start = 0;
    for tensor in tensors {
        let end = start + tensor.bytes();
        let entry =
            json!({ "dtype": tensor.dtype.to_string(), "shape": tensor.shape, "data_offsets": [start, end] });
        header.insert(tensor.name.clone(), entry);
        start = end;
    }
    let mut text = serde_json::to_vec(&header)?;
    text.resize(text.len().next_multiple_of(8), b' ');
    out.write_all(&(text.len() as u64).to_le_bytes())?;
    out.write_all(&text)
}
