//! Rotary embedding: plain, and stretched by linear scaling or yarn.

use super::draft::Draft;
use super::keys::*;
use crate::spec::RopeSpec;
use epsmoe_device::op::RopeStyle;
use std::f64::consts::PI;

/// Rotary embedding, and what its stretching means for the rest of the model.
pub(super) struct Rope {
    pub(super) spec: RopeSpec,
    /// What yarn puts on the scores of latent attention.
    pub(super) score_factor: f64,
    /// Longest context: as stretched.
    pub(super) positions: usize,
}

/// The section that describes scaling: the old key, when it is set, replaces the new one.
fn rope_section<'a>(keys: &Keys<'a>) -> Checked<Keys<'a>> {
    match keys.get("rope_scaling") {
        Some(_) => keys.section("rope_scaling", "rope_scaling."),
        None => keys.section("rope_parameters", "rope_parameters."),
    }
}

/// Refuses embeddings that turn only a part of a head.
pub(super) fn refuse_partial_rotation(keys: &Keys) -> Checked<()> {
    const KEY: &str = "partial_rotary_factor";
    let section = rope_section(keys)?;
    for keys in [keys, &section] {
        if let Some(part) = keys.number(KEY, 0.0..=1.0)?.filter(|&part| part != 1.0) {
            return wrong(format!("`{}{KEY}` is {part}; only 1 is supported", keys.section));
        }
    }
    Ok(())
}

impl Draft<'_> {
    /// Base of the frequencies.
    pub(super) fn theta(&self) -> Checked<f64> {
        let inside = rope_section(self.keys)?.number("rope_theta", THETA)?;
        Ok(inside.or(self.keys.number("rope_theta", THETA)?).unwrap_or(self.defaults.theta))
    }

    /// The embedding of `dim` elements of a head.
    pub(super) fn rope(&self, dim: usize, style: RopeStyle, theta: f64) -> Checked<Rope> {
        if dim % 2 == 1 {
            return wrong(format!("the rotated part of a head is {dim} wide, but must be even; {MEND}"));
        }
        let section = rope_section(self.keys)?;
        if let Some(inner) = section.map.and_then(|map| map.iter().find(|(_, value)| value.is_object())) {
            return wrong(format!(
                "`{}{}` is a section; one embedding for all layers is supported",
                section.section,
                quoted(inner.0)
            ));
        }
        let plain = inverse_frequencies(dim, theta);
        let spec = |inverse_frequencies, attention_factor: f64| RopeSpec {
            style,
            dim,
            inverse_frequencies,
            attention_factor: attention_factor as f32,
        };
        match section.word("rope_type")?.or(section.word("type")?).unwrap_or("default") {
            "default" => Ok(Rope { spec: spec(plain, 1.0), score_factor: 1.0, positions: self.positions }),
            "linear" => {
                let Some(factor) = section.number("factor", FACTOR)? else { return missing_factor(&section) };
                let slowed = plain.into_iter().map(|frequency| frequency / factor as f32).collect();
                let positions = stretched(self.positions, factor);
                Ok(Rope { spec: spec(slowed, 1.0), score_factor: 1.0, positions })
            }
            "yarn" => {
                let yarn = Yarn::read(&section, self.positions)?;
                let positions = stretched(yarn.original_positions, yarn.factor);
                let spec = spec(yarn.stretch(&plain, theta), yarn.attention_factor);
                Ok(Rope { spec, score_factor: yarn.score_factor, positions })
            }
            other => wrong(format!(
                "`{}rope_type` is \"{}\", which is not supported; supported are default, linear and yarn",
                section.section,
                quoted(other)
            )),
        }
    }
}

/// How far a context of so many positions reaches under a factor.
fn stretched(positions: usize, factor: f64) -> usize {
    // Floats become the nearest integers that there are, so nothing wraps.
    ((positions as f64 * factor) as usize).clamp(1, *POSITIONS.end())
}

fn missing_factor<T>(section: &Keys) -> Checked<T> {
    wrong(format!("`{}factor` is missing; fetch the file again", section.section))
}

/// `theta^(-2i/dim)`, rounded where the published models round: the power, then its inverse.
fn inverse_frequencies(dim: usize, theta: f64) -> Vec<f32> {
    let exponent = |i: usize| f64::from(2.0 * i as f32 / dim as f32);
    (0..dim / 2).map(|i| 1.0 / theta.powf(exponent(i)) as f32).collect()
}

/// Yarn (arXiv 2309.00071): slow dimensions are stretched by a factor, fast ones kept, those between blended.
struct Yarn {
    factor: f64,
    original_positions: usize,
    beta_fast: f64,
    beta_slow: f64,
    truncate: bool,
    attention_factor: f64,
    score_factor: f64,
}

impl Yarn {
    fn read(section: &Keys, positions: usize) -> Checked<Yarn> {
        let original = section.whole("original_max_position_embeddings", POSITIONS)?;
        let factor = match (section.number("factor", FACTOR)?, original) {
            (Some(factor), _) => factor,
            // Left out, it is how much longer the context is than it was.
            (None, Some(original)) => positions as f64 / original as f64,
            (None, None) => return missing_factor(section),
        };
        let nonzero = |key| section.number(key, 0.0..=1e6).map(|value| value.filter(|&value| value != 0.0));
        let (mscale, all_dim) = (nonzero("mscale")?, nonzero("mscale_all_dim")?);
        let default_attention_factor = match (mscale, all_dim) {
            (Some(mscale), Some(all_dim)) => magnitude(factor, mscale) / magnitude(factor, all_dim),
            _ => magnitude(factor, 1.0),
        };
        Ok(Yarn {
            factor,
            original_positions: original.unwrap_or(positions),
            beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
            beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
            truncate: section.flag("truncate")?.unwrap_or(true),
            attention_factor: section.number("attention_factor", FACTOR)?.unwrap_or(default_attention_factor),
            score_factor: all_dim.map_or(1.0, |all_dim| magnitude(factor, all_dim).powi(2)),
        })
    }

    fn stretch(&self, plain: &[f32], theta: f64) -> Vec<f32> {
        let dim = 2.0 * plain.len() as f64;
        // The dimension that turns so many times within the original context.
        let dimension = |turns: f64| {
            dim * (self.original_positions as f64 / (turns * 2.0 * PI)).ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (dimension(self.beta_fast), dimension(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        (low, high) = (low.max(0.0), high.min(dim - 1.0));
        if low == high {
            high += 0.001;
        }
        let (low, width, factor) = (low as f32, (high - low) as f32, self.factor as f32);
        let blend = |(i, &kept): (usize, &f32)| {
            let stretched = ((i as f32 - low) / width).clamp(0.0, 1.0);
            kept / factor * stretched + kept * (1.0 - stretched)
        };
        plain.iter().enumerate().map(blend).collect()
    }
}

/// How much larger scores must be when the context is `stretch` times as long.
fn magnitude(stretch: f64, scale: f64) -> f64 {
    if stretch <= 1.0 { 1.0 } else { 0.1 * scale * stretch.ln() + 1.0 }
}
