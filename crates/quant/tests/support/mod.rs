//! Stored tensors in memory.

#[allow(dead_code, reason = "not every test makes such files")]
pub(crate) mod gguf;

use epsmoe_quant::{QuantError, StoredTensor, StoredTensors, StoredType};
use std::collections::BTreeMap;

/// Tensors by name, with their bytes.
#[derive(Clone, Default)]
pub(crate) struct Memory(pub(crate) BTreeMap<String, (StoredTensor, Vec<u8>)>);

impl Memory {
    /// With one tensor more.
    #[allow(dead_code, reason = "not every test makes its own")]
    pub(crate) fn with(mut self, name: &str, dtype: StoredType, shape: &[usize], bytes: &[u8]) -> Memory {
        assert_eq!(bytes.len(), dtype.bytes(shape.iter().product()), "{name}");
        let tensor = StoredTensor { dtype, shape: shape.to_vec() };
        self.0.insert(name.to_owned(), (tensor, bytes.to_vec()));
        self
    }
}

impl StoredTensors for Memory {
    type Error = QuantError;

    fn find(&self, name: &str) -> Option<StoredTensor> {
        self.0.get(name).map(|(tensor, _)| tensor.clone())
    }

    fn fill(&self, name: &str, first: u64, into: &mut [u8]) -> Result<(), QuantError> {
        into.copy_from_slice(&self.0[name].1[first as usize..][..into.len()]);
        Ok(())
    }
}
