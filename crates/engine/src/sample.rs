//! A token from logits.

use crate::EngineError;
use epsmoe_base::Mix;
use std::borrow::Cow;
use std::collections::BTreeSet;

/// How the next token is chosen: repetitions are damped, then the temperature applies, then `top_k`, `top_p` and
/// `min_p` each leave out what is too unlikely, then one of the rest is drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Divides the logits before the softmax; 0 takes the most likely token.
    pub temperature: f32,
    /// Only this many of the most likely tokens; 0 for all.
    pub top_k: usize,
    /// Only the most likely tokens that together have this probability; 1 for all.
    pub top_p: f32,
    /// Only tokens at least this likely, as a share of the most likely one's probability; 0 for all.
    pub min_p: f32,
    /// Logits of tokens that are there already are divided by this if positive, multiplied if negative; 1 leaves
    /// them.
    pub repetition_penalty: f32,
    /// Taken off the logits of tokens that the answer has already; 0 leaves them.
    pub presence_penalty: f32,
    /// Taken off the logit of a token for each time that the answer has it; 0 leaves it.
    pub frequency_penalty: f32,
    /// Added to the logits of some tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Of the randomness. A token depends on seed and position, not on what runs beside it.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Sampling {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

/// A token that may be drawn, and its weight: 1 for the most likely.
type Candidate = (u32, f64);

impl Sampling {
    pub(crate) fn check(&self, vocab: usize) -> Result<(), EngineError> {
        let number = |field, value: f32, fits: bool, range| {
            let problem = format!("is {value}, but must be {range}");
            if fits { Ok(()) } else { Err(EngineError::Parameter { field, problem }) }
        };
        let (temperature, top_p, min_p) = (self.temperature, self.top_p, self.min_p);
        let not_negative = temperature.is_finite() && temperature >= 0.0;
        number("temperature", temperature, not_negative, "a number of at least 0")?;
        number("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0 and at most 1")?;
        number("min_p", min_p, (0.0..=1.0).contains(&min_p), "from 0 to 1")?;
        let penalty = self.repetition_penalty;
        number("repetition_penalty", penalty, penalty.is_finite() && penalty > 0.0, "a number above 0")?;
        let penalties =
            [("presence_penalty", self.presence_penalty), ("frequency_penalty", self.frequency_penalty)];
        for (field, penalty) in penalties {
            number(field, penalty, (-2.0..=2.0).contains(&penalty), "from -2 to 2")?;
        }
        let refuse = |problem| Err(EngineError::Parameter { field: "logit_bias", problem });
        for &(id, bias) in &self.logit_bias {
            if id as usize >= vocab {
                return refuse(format!("names token {id}, but the vocabulary ends at {}", vocab - 1));
            }
            if bias.is_nan() {
                return refuse(format!("gives token {id} no number"));
            }
        }
        Ok(())
    }

    /// Whether the most likely token is taken, by the logits as they are.
    pub(crate) fn is_greedy(&self) -> bool {
        self.temperature == 0.0 && self.repetition_penalty == 1.0
    }

    /// The token after `context`.
    pub(crate) fn choose(&self, logits: &[f32], context: &[u32]) -> u32 {
        let logits = self.penalised(logits, context);
        if self.temperature == 0.0 {
            return most_likely(&logits);
        }
        let candidates = self.candidates(&logits);
        let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        let position = context.len().saturating_sub(1) as u64;
        let mut left = f64::from(Mix::keyed(self.seed, &[position]).unit()) * total;
        for (id, weight) in candidates {
            left -= weight;
            if left < 0.0 {
                return id;
            }
        }
        most_likely(&logits)
    }

    fn penalised<'a>(&self, logits: &'a [f32], context: &[u32]) -> Cow<'a, [f32]> {
        if self.repetition_penalty == 1.0 {
            return Cow::Borrowed(logits);
        }
        let mut logits = logits.to_vec();
        for &id in context.iter().collect::<BTreeSet<_>>() {
            let logit = &mut logits[id as usize];
            *logit = if *logit > 0.0 {
                *logit / self.repetition_penalty
            } else {
                *logit * self.repetition_penalty
            };
        }
        Cow::Owned(logits)
    }

    fn candidates(&self, logits: &[f32]) -> Vec<Candidate> {
        let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let weight = |logit: &f32| f64::from((logit - most) / self.temperature).exp();
        let mut candidates: Vec<Candidate> = (0..).zip(logits.iter().map(weight)).collect();
        let ahead = |a: &Candidate, b: &Candidate| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
        if (1..candidates.len()).contains(&self.top_k) {
            candidates.select_nth_unstable_by(self.top_k, ahead);
            candidates.truncate(self.top_k);
        }
        if self.top_p < 1.0 {
            candidates.sort_unstable_by(ahead);
            let wanted = f64::from(self.top_p) * candidates.iter().map(|(_, weight)| weight).sum::<f64>();
            let mut sum = 0.0;
            let before = candidates.iter().take_while(|(_, weight)| {
                sum += weight;
                sum < wanted
            });
            let kept = before.count() + 1;
            candidates.truncate(kept);
        }
        candidates.retain(|(_, weight)| *weight >= f64::from(self.min_p));
        // In order of their ids, whatever was left out: a draw does not depend on how candidates were sorted.
        candidates.sort_unstable_by_key(|(id, _)| *id);
        candidates
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

    /// A context of `length` tokens.
    fn context(length: usize) -> Vec<u32> {
        vec![0; length]
    }

    /// Every token that 2000 draws give.
    fn drawn(sampling: &Sampling, logits: &[f32]) -> Vec<u32> {
        let draws = (1..2001).map(|length| sampling.choose(logits, &context(length)));
        draws.collect::<BTreeSet<_>>().into_iter().collect()
    }

    #[test]
    fn zero_temperature_takes_the_largest_and_ties_go_low() {
        assert_eq!(Sampling::default().choose(&[0.0, 3.0, 3.0, -1.0], &[0]), 1);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let sampling = Sampling { temperature: 1.0, seed: 5, ..Sampling::default() };
        let logits = [0.0, 2.0f32.ln(), f32::NEG_INFINITY];
        let ones = (1..3001).filter(|&length| sampling.choose(&logits, &context(length)) == 1).count();
        assert!((1850..2150).contains(&ones), "probability 2/3, drawn {ones} of 3000 times");
        assert_eq!(drawn(&sampling, &logits), [0, 1]);
    }

    #[test]
    fn the_unlikely_is_left_out() {
        // Probabilities 0.1, 0.4, 0.2, 0.3.
        let logits = [1.0f32, 4.0, 2.0, 3.0].map(f32::ln);
        let all = Sampling { temperature: 1.0, ..Sampling::default() };
        assert_eq!(drawn(&all, &logits), [0, 1, 2, 3]);
        assert_eq!(drawn(&Sampling { top_k: 2, ..all.clone() }, &logits), [1, 3]);
        assert_eq!(drawn(&Sampling { top_k: 9, ..all.clone() }, &logits), [0, 1, 2, 3]);
        assert_eq!(drawn(&Sampling { top_p: 0.6, ..all.clone() }, &logits), [1, 3]);
        assert_eq!(drawn(&Sampling { top_p: 0.01, ..all.clone() }, &logits), [1]);
        assert_eq!(drawn(&Sampling { min_p: 0.45, ..all.clone() }, &logits), [1, 2, 3]);
    }

    #[test]
    fn repetitions_are_damped() {
        let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
        assert_eq!(sampling.choose(&[3.0, 2.0, -1.0], &[0, 0]), 1);
        assert_eq!(sampling.choose(&[-1.0, -1.5, -3.0], &[0]), 1);
    }

    #[test]
    fn the_impossible_is_refused() {
        let refused = |sampling: Sampling| sampling.check(8).unwrap_err().to_string();
        for temperature in [-1.0, f32::NAN, f32::INFINITY] {
            assert!(refused(Sampling { temperature, ..Sampling::default() }).contains("temperature"));
        }
        assert_eq!(
            refused(Sampling { top_p: 0.0, ..Sampling::default() }),
            "top_p is 0, but must be above 0 and at most 1"
        );
        assert!(refused(Sampling { min_p: 1.5, ..Sampling::default() }).contains("min_p"));
        assert!(
            refused(Sampling { repetition_penalty: 0.0, ..Sampling::default() })
                .contains("repetition_penalty")
        );
    }
}
