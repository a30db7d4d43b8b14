//! What the weights of a model take up on a processor, before any of them is read.

use super::{Kept, WeightSource, Window};
use crate::{ModelError, ModelSpec, Part};
use epsmoe_base::DType;
use epsmoe_device::{WeightFormat, WeightShape};
use epsmoe_quant::Format;
use std::fmt;

/// Bits of a weight that is multiplied as FP8 blocks: a code, and its share of a block's scale.
pub(crate) const FP8_BITS: f64 = 8.0 + 32.0 / (128.0 * 128.0);

/// How the weights of a model are held.
#[derive(Clone, Debug, PartialEq)]
pub struct HeldWeights {
    /// Bytes of all of them.
    pub bytes: u64,
    /// Bytes that are read for them.
    pub stored: u64,
    /// Numbers of each format, most first.
    pub formats: Vec<(WeightFormat, u64)>,
}

impl HeldWeights {
    /// On a processor that computes in `dtype` and holds some formats as they are, in so many bits a weight; with `fp8_rows` what may
    /// become FP8 blocks is held as such.
    pub fn of(
        spec: &ModelSpec,
        source: &dyn WeightSource,
        (dtype, fp8_rows): (DType, bool),
        bits: impl Fn(&Format) -> Option<f64>,
    ) -> Result<Self, ModelError> {
        Self::of_parts(spec, source, (dtype, fp8_rows), bits, spec.parts())
    }

    /// The same of some parts.
    pub fn of_parts(
        spec: &ModelSpec,
        source: &dyn WeightSource,
        (dtype, fp8_rows): (DType, bool),
        bits: impl Fn(&Format) -> Option<f64>,
        parts: impl Iterator<Item = Part>,
    ) -> Result<Self, ModelError> {
        let plain = WeightFormat::plain(dtype).unwrap_or(WeightFormat::F32);
        let mut held = HeldWeights { bytes: 0, stored: 0, formats: Vec::new() };
        for part in parts {
            let numbers = spec.shape(part).parameters() as u64;
            let coded = held_format(spec, source, part, &Window::whole())?;
            let coded = coded.and_then(|format| {
                if fp8_rows && may_take_fp8_rows(spec, part, &format) {
                    return Some((WeightFormat::Fp8, FP8_BITS));
                }
                Some((WeightFormat::Coded(format), bits(&format)?))
            });
            let (format, bits) = coded.unwrap_or((plain, 8.0 * dtype.bytes() as f64));
            held.stored += stored_bytes(spec, source, part)?;
            held.bytes += (numbers as f64 * bits / 8.0).ceil() as u64;
            match held.formats.iter_mut().find(|(of, _)| *of == format) {
                Some((_, count)) => *count += numbers,
                None => held.formats.push((format, numbers)),
            }
        }
        held.formats.sort_by_key(|&(_, numbers)| std::cmp::Reverse(numbers));
        Ok(held)
    }

    /// Whether some weights can be held as FP8 blocks that are multiplied with rows in FP8.
    pub fn may_take_fp8_rows(spec: &ModelSpec, source: &dyn WeightSource) -> Result<bool, ModelError> {
        for part in spec.parts() {
            let format = held_format(spec, source, part, &Window::whole())?;
            if format.is_some_and(|format| may_take_fp8_rows(spec, part, &format)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Thousandths of a bit that a number takes up on average; nothing without any.
    pub fn millibits(&self) -> Option<u64> {
        let all: u64 = self.formats.iter().map(|&(_, numbers)| numbers).sum();
        (all > 0).then(|| (u128::from(self.bytes) * 8000 / u128::from(all)) as u64)
    }

    /// Bytes of some of the numbers, if formats are spread over them as over all.
    pub fn bytes_of(&self, numbers: u64) -> u64 {
        self.share(self.bytes, numbers)
    }

    /// Bytes that are read for some of the numbers, likewise.
    pub fn stored_of(&self, numbers: u64) -> u64 {
        self.share(self.stored, numbers)
    }

    fn share(&self, bytes: u64, numbers: u64) -> u64 {
        let all: u64 = self.formats.iter().map(|&(_, numbers)| numbers).sum();
        (u128::from(bytes) * u128::from(numbers) / u128::from(all.max(1))) as u64
    }
}

/// Whether a map in codes of this format can be held as FP8 blocks that are multiplied with rows in FP8.
pub(crate) fn may_take_fp8_rows(spec: &ModelSpec, part: Part, format: &Format) -> bool {
    format.may_become_fp8_blocks() && spec.takes_fp8_rows(part)
}

/// Bytes that a part takes up in the checkpoint, scales included; none if it is not there.
fn stored_bytes(spec: &ModelSpec, source: &dyn WeightSource, part: Part) -> Result<u64, ModelError> {
    let located = spec.locate(part);
    let bytes = |name: &str| -> Result<u64, ModelError> {
        let stored = source.find(name)?;
        Ok(stored.map_or(0, |stored| stored.dtype.bytes(stored.shape.iter().product()) as u64))
    };
    let numbers = spec.shape(part).parameters() as u64;
    Ok(match source.kept(&located)? {
        None => 0,
        Some((_, Kept::Plain(dtype))) => numbers * dtype.bytes() as u64,
        // One tensor may hold several parts.
        Some((place, Kept::Coded(coded))) => {
            let all = coded.tensors().map(bytes).sum::<Result<u64, _>>()?;
            let whole = place.shape.iter().map(|&length| length as u128).product::<u128>();
            (u128::from(all) * u128::from(numbers) / whole.max(1)) as u64
        }
    })
}

/// The format that a window of a map has in the codes that it is kept in, or brought into when it is loaded; nothing if it is
/// plain, or must be decoded.
pub(crate) fn held_format(
    spec: &ModelSpec,
    source: &dyn WeightSource,
    part: Part,
    window: &Window,
) -> Result<Option<Format>, ModelError> {
    let located = spec.locate(part);
    let WeightShape::Matrix { k, .. } = located.shape else { return Ok(None) };
    if let Some(format) = source.format(&located, window)? {
        return Ok(Some(format));
    }
    let columns = window.columns.as_ref().map_or(k, |columns| columns.len());
    let target = source.quantises().filter(|target| part.is_quantised() && target.fits(columns));
    Ok(target.map(|target| target.format(columns)))
}

/// Formats with their shares.
impl fmt::Display for HeldWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: u64 = self.formats.iter().map(|&(_, numbers)| numbers).sum();
        for (index, (format, numbers)) in self.formats.iter().enumerate() {
            let comma = if index > 0 { ", " } else { "" };
            let percent = 100.0 * *numbers as f64 / all.max(1) as f64;
            match self.formats.len() {
                1 => write!(f, "{format}")?,
                _ => write!(f, "{comma}{percent:.0} % {format}")?,
            }
        }
        Ok(())
    }
}
