//! Rotary embedding: plain, and stretched in the ways that published models are.

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

impl Draft<'_> {
    /// How many elements of a head are turned, the first ones: the part of it that a key says, or the `usual` part. Where
    /// there is none, the model knows heads that turn as a whole only.
    pub(super) fn rotated(&self, head_dim: usize, usual: Option<f64>) -> Checked<usize> {
        const KEY: &str = "partial_rotary_factor";
        let section = rope_section(self.keys)?;
        for keys in [&section, self.keys] {
            let Some(part) = keys.number(KEY, 0.0..=1.0)? else { continue };
            if usual.is_none() && part != 1.0 {
                return wrong(format!("`{}{KEY}` is {part}; only 1 is supported", keys.section));
            }
            return Ok((head_dim as f64 * part) as usize);
        }
        Ok((head_dim as f64 * usual.unwrap_or(1.0)) as usize)
    }

    /// Base of the frequencies.
    pub(super) fn theta(&self) -> Checked<f64> {
        let inside = rope_section(self.keys)?.number("rope_theta", THETA)?;
        Ok(inside.or(self.keys.number("rope_theta", THETA)?).unwrap_or(self.defaults.theta))
    }

    /// The embedding of `dim` elements of a head.
    pub(super) fn rope(&self, dim: usize, style: RopeStyle, theta: f64) -> Checked<Rope> {
        if dim % 2 == 1 || dim == 0 {
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
            growth: None,
        };
        match section.word("rope_type")?.or(section.word("type")?).unwrap_or("default") {
            // Text has one position a token, whatever images would have.
            "default" | "mrope" => {
                Ok(Rope { spec: spec(plain, 1.0), score_factor: 1.0, positions: self.positions })
            }
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
            "proportional" => {
                // A part of the pairs turns, as slowly as if all did; the rest stand still.
                let part = section.number("partial_rotary_factor", 0.0..=1.0)?.unwrap_or(1.0);
                let factor = section.number("factor", FACTOR)?.unwrap_or(1.0) as f32;
                let turning = (part * dim as f64 / 2.0).floor() as usize;
                let frequency =
                    |(index, plain): (usize, f32)| if index < turning { plain / factor } else { 0.0 };
                let frequencies = plain.into_iter().enumerate().map(frequency).collect();
                Ok(Rope { spec: spec(frequencies, 1.0), score_factor: 1.0, positions: self.positions })
            }
            "llama3" => {
                let spec = spec(llama3(&section, &plain)?, 1.0);
                Ok(Rope { spec, score_factor: 1.0, positions: self.positions })
            }
            "dynamic" => self.dynamic(&section, dim, theta, spec),
            "longrope" | "su" => self.long_rope(&section, plain, spec),
            other => wrong(format!(
                "`{}rope_type` is \"{}\", which is not supported; supported are default, linear, dynamic, yarn, \
                 longrope, llama3 and proportional",
                section.section,
                quoted(other)
            )),
        }
    }

    /// Frequencies that slow down with the length of a text beyond what the model was made for. Up to there, which is as
    /// far as contexts go here, they are the plain ones, of a base that `alpha` has made larger once and for all.
    fn dynamic(
        &self,
        section: &Keys,
        dim: usize,
        theta: f64,
        spec: impl Fn(Vec<f32>, f64) -> RopeSpec,
    ) -> Checked<Rope> {
        let frequencies = match section.number("alpha", FACTOR)? {
            Some(alpha) if dim > 2 => {
                inverse_frequencies(dim, theta * alpha.powf(dim as f64 / (dim as f64 - 2.0)))
            }
            _ => {
                self.unstretched(section, self.positions);
                inverse_frequencies(dim, theta)
            }
        };
        Ok(Rope { spec: spec(frequencies, 1.0), score_factor: 1.0, positions: self.positions })
    }

    /// LongRoPE (arXiv 2402.13753): each frequency divided by a factor of its own, other ones for texts longer than
    /// the original context. A text that grows beyond it would have to be computed again, so contexts end there.
    fn long_rope(
        &self,
        section: &Keys,
        plain: Vec<f32>,
        spec: impl Fn(Vec<f32>, f64) -> RopeSpec,
    ) -> Checked<Rope> {
        const ORIGINAL: &str = "original_max_position_embeddings";
        let Some(original) = section.whole(ORIGINAL, POSITIONS)?.or(self.keys.whole(ORIGINAL, POSITIONS)?)
        else {
            return wrong(format!("`{}{ORIGINAL}` is missing; fetch the file again", section.section));
        };
        let factors = section.list("short_factor")?;
        let numbers: Option<Vec<f64>> = factors.iter().map(serde_json::Value::as_f64).collect();
        let numbers = numbers.filter(|numbers| {
            numbers.len() == plain.len() && numbers.iter().all(|number| FACTOR.contains(number))
        });
        let Some(numbers) = numbers else {
            return wrong(format!(
                "`{}short_factor` must be a list of {} numbers; {MEND}",
                section.section,
                plain.len()
            ));
        };
        let factor = section.number("factor", FACTOR)?;
        let factor = factor.unwrap_or(self.positions as f64 / original as f64);
        let usual = if factor <= 1.0 { 1.0 } else { (1.0 + factor.ln() / (original as f64).ln()).sqrt() };
        let magnitude = section.number("attention_factor", FACTOR)?;
        let magnitude = section.number("short_mscale", FACTOR)?.or(magnitude).unwrap_or(usual);
        let slowed = plain.iter().zip(numbers).map(|(frequency, factor)| frequency / factor as f32).collect();
        let positions = original.min(self.positions);
        self.unstretched(section, positions);
        Ok(Rope { spec: spec(slowed, magnitude), score_factor: 1.0, positions })
    }

    /// Says that contexts end where frequencies would have to change.
    fn unstretched(&self, section: &Keys, positions: usize) {
        self.keys.remark(format!(
            "`{}` stretches longer contexts by frequencies that depend on their length, which is not supported: \
             contexts are at most {positions} tokens long",
            section.section.trim_end_matches('.')
        ));
    }
}

/// Frequencies of Llama 3.1: those of long waves are divided by a factor, those of short ones kept, those between blended.
fn llama3(section: &Keys, plain: &[f32]) -> Checked<Vec<f32>> {
    let needed = |key: &'static str| match section.number(key, FACTOR)? {
        Some(number) => Ok(number),
        None => wrong(format!("`{}{key}` is missing; fetch the file again", section.section)),
    };
    let (factor, low, high) = (needed("factor")?, needed("low_freq_factor")?, needed("high_freq_factor")?);
    let Some(original) = section.whole("original_max_position_embeddings", POSITIONS)? else {
        return wrong(format!(
            "`{}original_max_position_embeddings` is missing; fetch the file again",
            section.section
        ));
    };
    if high < low {
        return wrong(format!(
            "`high_freq_factor` ({high}) must not be below `low_freq_factor` ({low}); {MEND}"
        ));
    }
    let (original, factor, low, high) = (original as f32, factor as f32, low as f32, high as f32);
    let blend = |&frequency: &f32| {
        let turns = original / (2.0 * PI as f32 / frequency);
        // Where both are equal nothing lies between.
        let kept =
            if high > low { ((turns - low) / (high - low)).clamp(0.0, 1.0) } else { f32::from(turns > low) };
        (1.0 - kept) * frequency / factor + kept * frequency
    };
    Ok(plain.iter().map(blend).collect())
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
