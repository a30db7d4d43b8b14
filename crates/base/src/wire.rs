use crate::DType;
use serde::{Deserialize, Serialize};
use std::fmt;

/// The format that rows and partial sums travel between ranks in. Not that of activations, nor that of weights,
/// although it is the activations' unless somebody decides otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum WireFormat {
    /// Four bytes an element.
    F32,
    /// Two bytes an element.
    Bf16,
}

impl WireFormat {
    /// What activations of `dtype` travel in, unless somebody decides otherwise; nothing if nobody computes in `dtype`.
    pub const fn of_activations(dtype: DType) -> Option<Self> {
        match dtype {
            DType::F32 => Some(WireFormat::F32),
            DType::BF16 => Some(WireFormat::Bf16),
            DType::F16 | DType::U32 => None,
        }
    }

    /// The format of the elements of a buffer that rows wait in.
    pub const fn dtype(self) -> DType {
        match self {
            WireFormat::F32 => DType::F32,
            WireFormat::Bf16 => DType::BF16,
        }
    }

    /// Bytes of a row of `width` elements.
    pub const fn row_bytes(self, width: usize) -> usize {
        width * self.dtype().bytes()
    }
}

impl fmt::Display for WireFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.dtype().fmt(f)
    }
}
