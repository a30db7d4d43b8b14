use crate::DType;
use crate::float8::scaled_words;
use serde::{Deserialize, Serialize};
use std::fmt;

/// How the numbers of one row are stored while it travels: in the buffer where it waits, on the link, and where it
/// arrives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RowFormat {
    /// Side by side, as activations of this format are.
    Plain(DType),
    /// FP8 e4m3 with a float32 scale for every 128, as [`encode_row`](crate::float8::encode_row) writes them.
    Fp8,
}

impl RowFormat {
    /// What a buffer for rows of `width` numbers is made of: the format of its elements, and how many a row has.
    pub const fn elements(self, width: usize) -> (DType, usize) {
        match self {
            RowFormat::Plain(dtype) => (dtype, width),
            RowFormat::Fp8 => (DType::U32, scaled_words(width)),
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
            RowFormat::Fp8 => f.write_str("fp8"),
        }
    }
}

/// What somebody asks rows to travel in.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum WireDType {
    /// The format of activations.
    #[default]
    Auto,
    /// bfloat16, which activations must be in too.
    BFloat16,
    /// Rows on their way to their experts in FP8, partial sums in the format of activations.
    Fp8,
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

    /// What was asked for, of activations of `dtype`.
    pub const fn of(asked: WireDType, dtype: DType) -> Self {
        match asked {
            WireDType::Auto => WireFormat::plain(dtype),
            WireDType::BFloat16 => WireFormat::plain(DType::BF16),
            // Sums of a few significant bits would lose what the experts computed.
            WireDType::Fp8 => WireFormat { dispatch: RowFormat::Fp8, ..WireFormat::plain(dtype) },
        }
    }
}

impl fmt::Display for WireFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rows in {}, partial sums in {}", self.dispatch, self.combine)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fp8_rows_are_half_as_long_and_a_thirty_second() {
        assert_eq!(RowFormat::Fp8.bytes(7168), 7168 + 56 * 4);
        assert_eq!(RowFormat::Fp8.elements(5120), (DType::U32, 1280 + 40));
        assert_eq!(RowFormat::Fp8.bytes(130), 132 + 2 * 4, "a group that is not whole has a scale too");
        let wire = WireFormat::of(WireDType::Fp8, DType::BF16);
        assert_eq!(wire.to_string(), "rows in fp8, partial sums in bfloat16");
    }
}
