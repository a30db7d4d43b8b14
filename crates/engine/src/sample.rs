//! A token from logits.

use crate::EngineError;
use epsmoe_base::Mix;

/// How the next token is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sampling {
    /// Divides the logits before the softmax; 0 takes the most likely token.
    pub temperature: f32,
    /// Of the randomness. A token depends on seed, request and position, not on what runs beside it.
    pub seed: u64,
}

impl Sampling {
    pub(crate) fn check(&self) -> Result<(), EngineError> {
        if self.temperature.is_finite() && self.temperature >= 0.0 {
            return Ok(());
        }
        let message = format!("temperature is {}, but must be a number of at least 0", self.temperature);
        Err(EngineError::Request(message))
    }

    /// The token after `position` of request number `request`.
    pub(crate) fn choose(&self, logits: &[f32], request: u64, position: usize) -> u32 {
        if self.temperature == 0.0 {
            return most_likely(logits);
        }
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: &f32| f64::from((logit - most) / self.temperature).exp();
        let total: f64 = logits.iter().map(weight).sum();
        let mut left = f64::from(Mix::keyed(self.seed, &[request, position as u64]).unit()) * total;
        for (id, logit) in logits.iter().enumerate() {
            left -= weight(logit);
            if left < 0.0 {
                return id as u32;
            }
        }
        most_likely(logits)
    }
}

/// The largest logit's token, ties to the lower id.
fn most_likely(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_temperature_takes_the_largest_and_ties_go_low() {
        let greedy = Sampling::default();
        assert_eq!(greedy.choose(&[0.0, 3.0, 3.0, -1.0], 0, 0), 1);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let sampling = Sampling { temperature: 1.0, seed: 5 };
        let logits = [0.0, 1.0f32.ln() + 2.0f32.ln(), f32::NEG_INFINITY];
        let ones = (0..3000).filter(|&position| sampling.choose(&logits, 0, position) == 1).count();
        assert!((1850..2150).contains(&ones), "probability 2/3, drawn {ones} of 3000 times");
        assert!((0..3000).all(|position| sampling.choose(&logits, 0, position) != 2));
    }

    #[test]
    fn impossible_temperatures_are_refused() {
        for temperature in [-1.0, f32::NAN, f32::INFINITY] {
            assert!(Sampling { temperature, seed: 0 }.check().is_err());
        }
    }
}
