use crate::DType;
use std::fmt;

/// How the numbers of one row are stored while it travels: in the buffer where it waits, on the link, and where it
/// arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RowFormat {
    /// Side by side, as activations of this format are.
    Plain(DType),
}

impl RowFormat {
    /// What a buffer for rows of `width` numbers is made of: the format of its elements, and how many a row has.
    pub const fn elements(self, width: usize) -> (DType, usize) {
        match self {
            RowFormat::Plain(dtype) => (dtype, width),
        }
    }

    /// Bytes of a row of `width` numbers, with whatever travels beside them.
    pub const fn bytes(self, width: usize) -> usize {
        let (dtype, elements) = self.elements(width);
        elements * dtype.bytes()
    }
}

impl fmt::Display for RowFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            RowFormat::Plain(dtype) => dtype.fmt(f),
        }
    }
}

/// The formats that rows travel between ranks in: of their own, not those of activations or of weights. Whoever
/// reserves a buffer for rows that travel, prices an exchange or counts its bytes asks here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct WireFormat {
    /// Of rows on their way to their experts.
    pub dispatch: RowFormat,
    /// Of partial sums on their way back.
    pub combine: RowFormat,
}

impl WireFormat {
    /// Rows and sums that travel as activations of `dtype` are.
    pub const fn plain(dtype: DType) -> Self {
        WireFormat { dispatch: RowFormat::Plain(dtype), combine: RowFormat::Plain(dtype) }
    }
}

impl fmt::Display for WireFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rows in {}, partial sums in {}", self.dispatch, self.combine)
    }
}
