//! What the weights of a model take up on a processor, before any of them is read.

use super::{WeightSource, Window};
use crate::{ModelError, ModelSpec, Part};
use epsmoe_base::DType;
use epsmoe_device::{WeightFormat, WeightShape};
use epsmoe_quant::Format;
use std::fmt;

/// How the weights of a model are held.
#[derive(Clone, Debug, PartialEq)]
pub struct HeldWeights {
    /// Bytes of all of them.
    pub bytes: u64,
    /// Numbers of each format, most first.
    pub formats: Vec<(WeightFormat, u64)>,
}

impl HeldWeights {
    /// On a processor that computes in `dtype` and `holds` some formats as they are.
    pub fn of(
        spec: &ModelSpec,
        source: &dyn WeightSource,
        dtype: DType,
        holds: impl Fn(&Format) -> bool,
    ) -> Result<Self, ModelError> {
        let plain = WeightFormat::plain(dtype).unwrap_or(WeightFormat::F32);
        let mut held = HeldWeights { bytes: 0, formats: Vec::new() };
        for part in spec.parts() {
            let numbers = spec.shape(part).parameters() as u64;
            let coded = held_format(spec, source, part, &Window::whole())?.filter(&holds);
            let (format, bits) = match coded {
                Some(format) => (WeightFormat::Coded(format), format.bits()),
                None => (plain, 8.0 * dtype.bytes() as f64),
            };
            held.bytes += (numbers as f64 * bits / 8.0).ceil() as u64;
            match held.formats.iter_mut().find(|(of, _)| *of == format) {
                Some((_, count)) => *count += numbers,
                None => held.formats.push((format, numbers)),
            }
        }
        held.formats.sort_by_key(|&(_, numbers)| std::cmp::Reverse(numbers));
        Ok(held)
    }

    /// Bytes of some of the numbers, if formats are spread over them as over all.
    pub fn bytes_of(&self, numbers: u64) -> u64 {
        let all: u64 = self.formats.iter().map(|&(_, numbers)| numbers).sum();
        (u128::from(self.bytes) * u128::from(numbers) / u128::from(all.max(1))) as u64
    }
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
