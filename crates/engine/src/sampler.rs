//! A token from logits. Pure: the same logits, request and tokens so far give the same token, on every machine.
//!
//! In this order, as vLLM does it: what a constraint or `min_tokens` rules out is ruled out; biases are added; penalties
//! are taken off; without a temperature the largest logit wins; else logits are divided by it, `min_p`, `top_k` and
//! `top_p` each leave out what is too unlikely, and one of the rest is drawn, with a number that depends on the
//! request's seed and the token's position alone.

use crate::{Constraint, EngineError, Request, TokenLogprobs, TokenMask};
use epsmoe_base::Mix;
use std::collections::{HashMap, HashSet};

/// How the next token is chosen.
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
    /// Logits of tokens that prompt or answer have already are divided by this if positive, multiplied if negative; 1
    /// leaves them.
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
            if !bias.is_finite() {
                return refuse(format!("gives token {id} {bias}, which is no finite number"));
            }
        }
        Ok(())
    }

    fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// Chooses the tokens of one request, and knows those that it has.
pub(crate) struct Sampler {
    sampling: Sampling,
    /// Tokens that end the answer.
    ends: Vec<u32>,
    /// How many more tokens must come before one of `ends` may.
    held_back: usize,
    /// Of the prompt, if anything depends on them.
    prompt: HashSet<u32>,
    /// How often the answer has a token, if anything depends on it.
    answer: HashMap<u32, u32>,
    constraint: Option<Box<dyn Constraint>>,
    /// What the constraint allows next, once it has said so.
    mask: Option<TokenMask>,
}

/// Room for rows, used again and again.
#[derive(Default)]
pub(crate) struct Workspace {
    adjusted: Vec<f32>,
    weights: Vec<f32>,
}

impl Sampler {
    /// `ends` are the tokens that end the answer if they come. Takes the request's constraint.
    pub(crate) fn new(request: &mut Request, ends: Vec<u32>) -> Self {
        let sampling = request.sampling.clone();
        let repeats = sampling.repetition_penalty != 1.0;
        Sampler {
            prompt: if repeats { request.prompt.iter().copied().collect() } else { HashSet::new() },
            answer: HashMap::new(),
            held_back: request.min_tokens,
            constraint: request.constraint.take(),
            mask: None,
            sampling,
            ends,
        }
    }

    /// Whether the most likely token comes next, by the logits as they are.
    pub(crate) fn is_greedy(&self) -> bool {
        self.sampling.temperature == 0.0 && !self.adjusts()
    }

    /// Whether logits are not taken as they are.
    fn adjusts(&self) -> bool {
        let Sampling { logit_bias, .. } = &self.sampling;
        let asked = self.held_back > 0 || self.constraint.is_some() || !logit_bias.is_empty();
        asked || self.sampling.penalises()
    }

    /// Asks the constraint, if there is one, what may come next: work that can be done while logits are computed.
    pub(crate) fn prepare(&mut self) -> Result<(), String> {
        if let (Some(constraint), None) = (&mut self.constraint, &self.mask) {
            self.mask = Some(constraint.mask()?);
        }
        Ok(())
    }

    /// The token at `position` of the sequence, given the logits `[V]` of the one before it.
    pub(crate) fn choose(
        &mut self,
        logits: &[f32],
        position: usize,
        workspace: &mut Workspace,
    ) -> Result<u32, String> {
        self.prepare()?;
        let Workspace { adjusted, weights } = workspace;
        // Where the answer can only end, it ends early.
        for hold_back in [true, false] {
            let logits = if self.adjusts() { self.adjust(logits, hold_back, adjusted) } else { logits };
            let (best, most) = largest(logits)?;
            if most > f32::NEG_INFINITY {
                let greedy = self.sampling.temperature == 0.0;
                return Ok(if greedy { best } else { self.sampling.draw(logits, most, position, weights) });
            }
        }
        Err("no token may come next: the constraint and logit_bias rule all of them out".into())
    }

    /// Takes in the token that has come.
    pub(crate) fn accept(&mut self, id: u32) -> Result<(), String> {
        self.held_back = self.held_back.saturating_sub(1);
        if self.sampling.penalises() {
            *self.answer.entry(id).or_default() += 1;
        }
        self.mask = None;
        self.constraint.as_mut().map_or(Ok(()), |constraint| constraint.accept(id))
    }

    /// Whether the constraint lets nothing follow.
    pub(crate) fn is_complete(&self) -> bool {
        self.constraint.as_ref().is_some_and(|constraint| constraint.is_finished())
    }

    /// Logits after everything but temperature.
    fn adjust<'a>(&self, logits: &[f32], hold_back: bool, room: &'a mut Vec<f32>) -> &'a [f32] {
        let Sampling { repetition_penalty, presence_penalty, frequency_penalty, logit_bias, .. } =
            &self.sampling;
        room.clear();
        room.extend_from_slice(logits);
        if let Some(mask) = &self.mask {
            mask.rule_out(room);
        }
        if hold_back && self.held_back > 0 {
            self.ends.iter().for_each(|&id| room[id as usize] = f32::NEG_INFINITY);
        }
        for &(id, bias) in logit_bias {
            room[id as usize] += bias;
        }
        if *repetition_penalty != 1.0 {
            let again = self.answer.keys().filter(|id| !self.prompt.contains(id));
            for &id in self.prompt.iter().chain(again) {
                let logit = &mut room[id as usize];
                *logit = if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
            }
        }
        for (&id, &count) in &self.answer {
            room[id as usize] -= presence_penalty + frequency_penalty * count as f32;
        }
        room
    }
}

impl TokenMask {
    /// Makes the tokens that are not in the set impossible.
    fn rule_out(&self, logits: &mut [f32]) {
        for (index, logits) in logits.chunks_mut(32).enumerate() {
            let word = self.0.get(index).copied().unwrap_or(0);
            for (bit, logit) in logits.iter_mut().enumerate() {
                *logit = if word >> bit & 1 == 1 { *logit } else { f32::NEG_INFINITY };
            }
        }
    }
}

/// A token and what it weighs, or its logit.
type Candidate = (u32, f32);

/// Of the nucleus, this many tokens are looked at first; most models are sure enough.
const NUCLEUS: usize = 64;

impl Sampling {
    /// A token drawn by logits, the largest of which is `most`.
    fn draw(&self, logits: &[f32], most: f32, position: usize, weights: &mut Vec<f32>) -> u32 {
        let draw = (Mix::keyed(self.seed, &[position as u64]).next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        weights.clear();
        weights.extend(logits.iter().map(|logit| exp((logit - most) / self.temperature)));
        if self.min_p > 0.0 {
            weights.iter_mut().for_each(|weight| *weight = if *weight < self.min_p { 0.0 } else { *weight });
        }
        let all = weights.len();
        let top_k = if self.top_k == 0 { all } else { self.top_k.min(all) };
        if top_k == all && self.top_p == 1.0 {
            return drawn(weights, draw);
        }
        let top_p = f64::from(self.top_p);
        let mut kept = if top_k < all {
            let mut kept = top(weights, top_k);
            let total: f64 = kept.iter().map(|(_, weight)| f64::from(*weight)).sum();
            kept.truncate(nucleus(&kept, top_p * total).unwrap_or(top_k));
            kept
        } else {
            let wanted = top_p * block_sums(weights).iter().sum::<f64>();
            let mut size = NUCLEUS.min(all);
            loop {
                let mut kept = top(weights, size);
                let enough = nucleus(&kept, wanted);
                if enough.is_some() || size == all {
                    kept.truncate(enough.unwrap_or(all));
                    break kept;
                }
                size = (size * 8).min(all);
            }
        };
        // In order of their ids: what was left out of a row before does not matter.
        kept.sort_unstable_by_key(|(id, _)| *id);
        let (ids, weights): (Vec<u32>, Vec<f32>) = kept.into_iter().unzip();
        ids[drawn(&weights, draw) as usize]
    }
}

/// How likely token `id` was after these logits `[V]`, and the `alternatives` most likely ones.
pub(crate) fn logprobs(
    logits: &[f32],
    id: u32,
    alternatives: usize,
    workspace: &mut Workspace,
) -> TokenLogprobs {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weights = &mut workspace.weights;
    weights.clear();
    weights.extend(logits.iter().map(|logit| exp(logit - most)));
    let total = block_sums(weights).iter().sum::<f64>().ln();
    let logprob = |logit: f32| (f64::from(logit - most) - total) as f32;
    let top = top(logits, alternatives).into_iter().map(|(id, logit)| (id, logprob(logit))).collect();
    TokenLogprobs { logprob: logprob(logits[id as usize]), top }
}

/// The largest number and where it is first; refused where one is NaN or infinitely large.
fn largest(row: &[f32]) -> Result<(u32, f32), String> {
    const LANES: usize = 16;
    let mut most = [f32::NEG_INFINITY; LANES];
    let mut spoiled = [false; LANES];
    let (pieces, rest) = row.as_chunks::<LANES>();
    let mut look = |lane: usize, value: f32| {
        most[lane] = if value > most[lane] { value } else { most[lane] };
        spoiled[lane] |= value.is_nan();
    };
    for piece in pieces {
        (0..LANES).for_each(|lane| look(lane, piece[lane]));
    }
    rest.iter().for_each(|&value| look(0, value));
    let most = most.into_iter().fold(f32::NEG_INFINITY, f32::max);
    if spoiled.contains(&true) || most == f32::INFINITY {
        return Err("its logits are NaN or infinite".into());
    }
    let first = row.iter().position(|&value| value == most).unwrap_or(0);
    Ok((first as u32, most))
}

/// The `count` largest numbers and where they are, in falling order; of equal ones the first.
fn top(row: &[f32], count: usize) -> Vec<Candidate> {
    if count == 0 {
        return Vec::new();
    }
    const PIECE: usize = 64;
    let ahead = |a: &Candidate, b: &Candidate| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0));
    let mut found: Vec<Candidate> = Vec::with_capacity(2 * count + PIECE);
    // What is not above it is not among them: later ones lose against equal earlier ones.
    let mut threshold = None;
    for (piece, values) in row.chunks(PIECE).enumerate() {
        let above = |value: f32| threshold.is_none_or(|threshold| value > threshold);
        if !values.iter().fold(false, |any, &value| any | above(value)) {
            continue;
        }
        let ids = (piece * PIECE) as u32..;
        found.extend(ids.zip(values.iter().copied()).filter(|&(_, value)| above(value)));
        if found.len() >= 2 * count {
            found.select_nth_unstable_by(count - 1, ahead);
            found.truncate(count);
            threshold = Some(found[count - 1].1);
        }
    }
    found.sort_unstable_by(ahead);
    found.truncate(count);
    found
}

/// How many of the first ones of `sorted` weigh `wanted` together, if they do.
fn nucleus(sorted: &[Candidate], wanted: f64) -> Option<usize> {
    let mut sum = 0.0;
    let last = sorted.iter().position(|(_, weight)| {
        sum += f64::from(*weight);
        sum >= wanted
    });
    last.map(|last| last + 1)
}

/// Weights are added in blocks of this many.
const BLOCK: usize = 256;

/// Sums of blocks of weights, always added up in the same order.
fn block_sums(weights: &[f32]) -> Vec<f64> {
    const LANES: usize = 16;
    let sum = |block: &[f32]| {
        let mut lanes = [0.0f32; LANES];
        let (pieces, rest) = block.as_chunks::<LANES>();
        for piece in pieces {
            (0..LANES).for_each(|lane| lanes[lane] += piece[lane]);
        }
        lanes.iter().chain(rest).map(|&weight| f64::from(weight)).sum()
    };
    weights.chunks(BLOCK).map(sum).collect()
}

/// Which one `draw` in [0, 1) falls on, each taking as much room as it weighs.
fn drawn(weights: &[f32], draw: f64) -> u32 {
    let sums = block_sums(weights);
    let mut left = draw * sums.iter().sum::<f64>();
    let mut chosen = 0;
    for (block, (weights, sum)) in weights.chunks(BLOCK).zip(sums).enumerate() {
        if sum > 0.0 && left < sum {
            // Rounding may leave it behind the last one.
            for (index, &weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
                chosen = block * BLOCK + index;
                left -= f64::from(weight);
                if left < 0.0 {
                    break;
                }
            }
            return chosen as u32;
        }
        left -= sum;
        if let Some(last) = weights.iter().rposition(|&weight| weight > 0.0) {
            chosen = block * BLOCK + last;
        }
    }
    chosen as u32
}

/// `e^x` for x ≤ 0, with the same bits everywhere: 2ⁿ·e^r with |r| at most half of ln 2. What would be smaller than the
/// smallest normal number is 0. Relative error below 3e-7.
fn exp(x: f32) -> f32 {
    /// Added to a number of at most 22 bits and taken off again, it rounds to a whole one; in between, the lowest bits
    /// of the sum count it.
    const ROUND: f32 = 12_582_912.0;
    const LN_2: [f32; 2] = [0.693_359_4, -2.121_944_4e-4];
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN_2[0]) - n * LN_2[1];
    let series = 1.0 / 720.0;
    let series = series * r + 1.0 / 120.0;
    let series = series * r + 1.0 / 24.0;
    let series = series * r + 1.0 / 6.0;
    let series = series * r + 0.5;
    let series = (series * r + 1.0) * r + 1.0;
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0f32.to_bits()));
    if x < -87.0 { 0.0 } else { series * power }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn sampler(sampling: Sampling, prompt: &[u32]) -> Sampler {
        let mut request = Request { prompt: prompt.to_vec(), sampling, ..Request::default() };
        Sampler::new(&mut request, Vec::new())
    }

    fn choose(sampling: &Sampling, logits: &[f32], position: usize) -> u32 {
        sampler(sampling.clone(), &[]).choose(logits, position, &mut Workspace::default()).unwrap()
    }

    /// Every token that 2000 draws give.
    fn seen(sampling: &Sampling, logits: &[f32]) -> Vec<u32> {
        let draws = (1..2001).map(|position| choose(sampling, logits, position));
        draws.collect::<BTreeSet<_>>().into_iter().collect()
    }

    #[test]
    fn zero_temperature_takes_the_largest_and_ties_go_low() {
        assert_eq!(choose(&Sampling::default(), &[0.0, 3.0, 3.0, -1.0], 1), 1);
        let mut row = vec![0.0; 1000];
        (row[777], row[901]) = (2.0, 2.0);
        assert_eq!(choose(&Sampling::default(), &row, 1), 777);
    }

    #[test]
    fn draws_follow_the_softmax() {
        let sampling = Sampling { temperature: 1.0, seed: 5, ..Sampling::default() };
        let logits = [0.0, 2.0f32.ln(), f32::NEG_INFINITY];
        let ones = (1..3001).filter(|&position| choose(&sampling, &logits, position) == 1).count();
        assert!((1850..2150).contains(&ones), "probability 2/3, drawn {ones} of 3000 times");
        assert_eq!(seen(&sampling, &logits), [0, 1]);
        // Over several blocks, of which one weighs nothing.
        let mut row = vec![f32::NEG_INFINITY; 3 * BLOCK];
        (row[1], row[2 * BLOCK + 7], row[3 * BLOCK - 1]) = (0.0, 0.0, 0.0);
        assert_eq!(seen(&sampling, &row), [1, 2 * BLOCK as u32 + 7, 3 * BLOCK as u32 - 1]);
    }

    #[test]
    fn the_unlikely_is_left_out() {
        // Probabilities 0.1, 0.4, 0.2, 0.3.
        let logits = [1.0f32, 4.0, 2.0, 3.0].map(f32::ln);
        let all = Sampling { temperature: 1.0, ..Sampling::default() };
        let with = |change: fn(&mut Sampling)| {
            let mut sampling = all.clone();
            change(&mut sampling);
            seen(&sampling, &logits)
        };
        assert_eq!(with(|_| {}), [0, 1, 2, 3]);
        assert_eq!(with(|sampling| sampling.top_k = 2), [1, 3]);
        assert_eq!(with(|sampling| sampling.top_k = 9), [0, 1, 2, 3]);
        assert_eq!(with(|sampling| sampling.top_p = 0.6), [1, 3]);
        assert_eq!(with(|sampling| sampling.top_p = 0.01), [1]);
        assert_eq!(with(|sampling| sampling.min_p = 0.45), [1, 2, 3]);
        // Of three tokens, 0.44, 0.33 and 0.22 likely.
        assert_eq!(with(|sampling| (sampling.top_k, sampling.top_p) = (3, 0.7)), [1, 3]);
    }

    #[test]
    fn a_wide_nucleus_is_found() {
        let row: Vec<f32> = (0..5000).map(|id| if id % 2 == 0 { 1.0 } else { -30.0 }).collect();
        let sampling = Sampling { temperature: 1.0, top_p: 0.999, ..Sampling::default() };
        let seen = seen(&sampling, &row);
        assert!(seen.len() > 1000 && seen.iter().all(|id| id % 2 == 0), "{} tokens", seen.len());
    }

    #[test]
    fn a_draw_depends_on_seed_and_position_only() {
        let row: Vec<f32> = (0..1000).map(|id| (id % 7) as f32 / 10.0).collect();
        let of = |seed, position| {
            choose(&Sampling { temperature: 1.0, seed, ..Sampling::default() }, &row, position)
        };
        assert_eq!(of(3, 9), of(3, 9));
        let different = (0..50).filter(|&at| of(3, at) != of(4, at) && of(3, at) != of(3, at + 1)).count();
        assert!(different > 40, "{different} of 50");
    }

    #[test]
    fn repetitions_are_damped() {
        let damped = |logits: &[f32], prompt: &[u32]| {
            let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
            sampler(sampling, prompt).choose(logits, 1, &mut Workspace::default()).unwrap()
        };
        assert_eq!(damped(&[3.0, 2.0, -1.0], &[0, 0]), 1);
        assert_eq!(damped(&[-1.0, -1.5, -3.0], &[0]), 1);
    }

    #[test]
    fn penalties_look_at_the_answer_alone() {
        let logits = [3.0, 2.5, 1.2];
        let answer = |sampling: Sampling| {
            let mut sampler = sampler(sampling, &[0, 1, 2]);
            let mut next = |_| {
                let id = sampler.choose(&logits, 1, &mut Workspace::default()).unwrap();
                sampler.accept(id).unwrap();
                id
            };
            (0..6).map(&mut next).collect::<Vec<_>>()
        };
        // 3.0 and 2.5 become 2.0 and 1.5, once.
        assert_eq!(answer(Sampling { presence_penalty: 1.0, ..Sampling::default() }), [0, 1, 0, 0, 0, 0]);
        // 3.0 2.5 | 2.0 2.5 | 2.0 1.5 | 1.0 1.5 | 1.0 0.5, and there is 1.2
        assert_eq!(answer(Sampling { frequency_penalty: 1.0, ..Sampling::default() }), [0, 1, 0, 1, 2, 0]);
    }

    #[test]
    fn biases_ban_and_force() {
        let logits = [3.0, 2.5, 1.0];
        let biased = |logit_bias| choose(&Sampling { logit_bias, ..Sampling::default() }, &logits, 1);
        assert_eq!(biased(vec![(0, -100.0)]), 1);
        assert_eq!(biased(vec![(2, 100.0)]), 2);
    }

    #[test]
    fn ends_are_held_back_until_enough_came() {
        let mut request = Request { prompt: vec![1], min_tokens: 2, ..Request::default() };
        let mut sampler = Sampler::new(&mut request, vec![0, 2]);
        let mut next = |logits: &[f32]| {
            let id = sampler.choose(logits, 1, &mut Workspace::default()).unwrap();
            sampler.accept(id).unwrap();
            (id, sampler.is_greedy())
        };
        let logits = [3.0, 1.0, 2.0];
        assert_eq!([next(&logits), next(&logits), next(&logits)], [(1, false), (1, true), (0, true)]);
    }

    /// Lets the tokens of a list come one after the other.
    struct Only(Vec<u32>);

    impl Constraint for Only {
        fn mask(&mut self) -> Result<TokenMask, String> {
            let mut words = vec![0; 2];
            let next = self.0.first().ok_or("nothing is left")?;
            words[*next as usize / 32] |= 1 << (next % 32);
            Ok(TokenMask(words))
        }

        fn accept(&mut self, id: u32) -> Result<(), String> {
            if self.0.remove(0) == id { Ok(()) } else { Err(format!("{id} was not allowed")) }
        }

        fn is_finished(&self) -> bool {
            self.0.is_empty()
        }
    }

    #[test]
    fn constraints_are_followed() {
        for temperature in [0.0, 1.0] {
            let sampling = Sampling { temperature, ..Sampling::default() };
            let constraint: Option<Box<dyn Constraint>> = Some(Box::new(Only(vec![40, 3, 39])));
            let mut request = Request { prompt: vec![1], sampling, constraint, ..Request::default() };
            let mut sampler = Sampler::new(&mut request, Vec::new());
            let logits: Vec<f32> = (0..50).map(|id| id as f32).collect();
            for want in [40, 3, 39] {
                assert!(!sampler.is_complete());
                assert_eq!(sampler.choose(&logits, 1, &mut Workspace::default()), Ok(want));
                sampler.accept(want).unwrap();
            }
            assert!(sampler.is_complete());
            assert_eq!(sampler.choose(&logits, 1, &mut Workspace::default()).unwrap_err(), "nothing is left");
        }
    }

    #[test]
    fn an_answer_that_can_only_end_ends_early() {
        let constraint: Option<Box<dyn Constraint>> = Some(Box::new(Only(vec![7])));
        let mut request = Request { prompt: vec![1], min_tokens: 5, constraint, ..Request::default() };
        let mut sampler = Sampler::new(&mut request, vec![7]);
        assert_eq!(sampler.choose(&[0.0; 50], 1, &mut Workspace::default()), Ok(7));
    }

    #[test]
    fn what_is_no_number_is_refused() {
        for spoiled in [f32::NAN, f32::INFINITY] {
            for at in [0, 20, 999] {
                let mut row = vec![0.0; 1000];
                row[at] = spoiled;
                for temperature in [0.0, 1.0] {
                    let mut sampler = sampler(Sampling { temperature, ..Sampling::default() }, &[]);
                    let refused = sampler.choose(&row, 1, &mut Workspace::default()).unwrap_err();
                    assert!(refused.contains("NaN or infinite"), "{refused}");
                }
            }
        }
        let mut sampler = sampler(Sampling::default(), &[]);
        let refused = sampler.choose(&[f32::NEG_INFINITY; 9], 1, &mut Workspace::default()).unwrap_err();
        assert!(refused.contains("no token may come next"), "{refused}");
    }

    #[test]
    fn logprobs_are_those_of_the_softmax() {
        let mut mix = Mix::new(3);
        let row: Vec<f32> = (0..1000).map(|_| mix.signed() * 20.0).collect();
        let total = row.iter().map(|&logit| f64::from(logit).exp()).sum::<f64>().ln();
        let want = |id: usize| (f64::from(row[id]) - total) as f32;
        let mut sorted: Vec<usize> = (0..1000).collect();
        sorted.sort_by(|&a, &b| row[b].total_cmp(&row[a]).then(a.cmp(&b)));
        for alternatives in [0, 1, 20, 999, 1000] {
            let got = logprobs(&row, 17, alternatives, &mut Workspace::default());
            assert!((got.logprob - want(17)).abs() < 1e-5);
            assert_eq!(got.top.len(), alternatives);
            for (&id, (top, logprob)) in sorted.iter().zip(got.top) {
                assert_eq!(top, id as u32);
                assert!((logprob - want(id)).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn the_largest_in_falling_order() {
        let mut mix = Mix::new(5);
        for count in [1, 3, 64, 500] {
            // Few different values, so that there are many ties.
            let row: Vec<f32> = (0..700).map(|_| mix.below(40) as f32).collect();
            let mut want: Vec<(u32, f32)> = (0..).zip(row.iter().copied()).collect();
            want.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
            want.truncate(count);
            assert_eq!(top(&row, count), want, "{count}");
        }
    }

    #[test]
    fn exponentials_are_near() {
        for step in 0..87_000 {
            let x = -step as f32 / 1000.0;
            let want = f64::from(x).exp();
            assert!((f64::from(exp(x)) - want).abs() <= 3e-7 * want, "e^{x}: {} for {want}", exp(x));
        }
        assert_eq!((exp(0.0), exp(-88.0), exp(f32::NEG_INFINITY)), (1.0, 0.0, 0.0));
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
        let penalty = Sampling { repetition_penalty: 0.0, ..Sampling::default() };
        assert!(refused(penalty).contains("repetition_penalty"));
        let penalty = Sampling { presence_penalty: -2.5, ..Sampling::default() };
        assert_eq!(refused(penalty), "presence_penalty is -2.5, but must be from -2 to 2");
        for bias in [(8, 1.0), (7, f32::NAN), (7, f32::INFINITY)] {
            assert!(
                refused(Sampling { logit_bias: vec![bias], ..Sampling::default() }).contains("logit_bias")
            );
        }
    }
}
