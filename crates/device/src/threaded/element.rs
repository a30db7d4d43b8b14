//! Numbers as a CPU holds them.

use epsmoe_base::DType;
use epsmoe_base::float8::e4m3_bits;
use half::bf16;

/// A plain number with a [`DType`].
pub trait Plain: bytemuck::Pod + Send + Sync {
    /// The format it is stored in.
    const DTYPE: DType;
}

impl Plain for f32 {
    const DTYPE: DType = DType::F32;
}

impl Plain for bf16 {
    const DTYPE: DType = DType::BF16;
}

impl Plain for u32 {
    const DTYPE: DType = DType::U32;
}

/// A code of FP8 e4m3.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub struct E4m3(pub u8);

// SAFETY: a byte, all of whose bits may be zero.
unsafe impl bytemuck::Zeroable for E4m3 {}
// SAFETY: a byte, which may have any bits.
unsafe impl bytemuck::Pod for E4m3 {}

impl Plain for E4m3 {
    const DTYPE: DType = DType::E4M3;
}

/// A format that keys and values are cached in, beside activations in `T`.
pub trait Cached<T: Element>: Plain {
    /// The number that it stands for, exactly.
    fn number(self) -> T;
}

impl<T: Element> Cached<T> for T {
    #[inline(always)]
    fn number(self) -> T {
        self
    }
}

impl<T: Element> Cached<T> for E4m3 {
    #[inline(always)]
    fn number(self) -> T {
        T::from_f32(f32::from_bits(e4m3_bits(self.0)))
    }
}

/// A format that activations are held in; arithmetic is done in float32.
pub trait Element: Plain {
    /// The number, exactly.
    fn to_f32(self) -> f32;

    /// The nearest number of this format.
    fn from_f32(value: f32) -> Self;
}

impl Element for f32 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        self
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        value
    }
}

// Without branches, so that loops over rows become vector instructions.
impl Element for bf16 {
    #[inline(always)]
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    #[inline(always)]
    fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
        let kept = if value.is_nan() { bits | 0x0040_0000 } else { rounded };
        bf16::from_bits((kept >> 16) as u16)
    }
}
