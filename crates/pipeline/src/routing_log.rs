//! Where routers sent tokens: kept to be looked at, or to be followed again by another run.
//!
//! A log knows a token by its sequence and its position, so it can be replayed by other batches, other ranks,
//! another strategy or another number format. As text it has a line of JSON for each token of each layer:
//!
//! ```text
//! {"layer":1,"sequence":0,"position":5,"token":17,"experts":[3,9],"weights":[0.25,0.75]}
//! ```

use epsmoe_base::Layer;
use epsmoe_plan::{PlanError, Routing};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::io::{self, BufRead, Write};

/// A token, whatever rank and step it is computed in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenId {
    /// Number of its sequence.
    pub sequence: u64,
    /// Its position there.
    pub position: u32,
    /// What it is: a replay of another text is refused.
    pub token: u32,
}

/// The experts and weights of tokens, by layer, sequence and position.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RoutingLog {
    choices: BTreeMap<(usize, u64, u32), Choice>,
}

/// Where one token was sent.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Choice {
    token: u32,
    experts: Vec<u32>,
    weights: Vec<f32>,
}

/// A [`Choice`] as text. Weights are written as float64, which says every float32 exactly.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    layer: usize,
    sequence: u64,
    position: u32,
    token: u32,
    experts: Vec<u32>,
    weights: Vec<f64>,
}

/// How the choices of two logs differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flips {
    /// Tokens of layers that both logs have.
    pub compared: usize,
    /// Those that were sent to other experts.
    pub flipped: usize,
}

/// Why a log cannot be read or followed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum RoutingLogError {
    /// A line that is none.
    #[error("line {line} of the routing log: {problem}; record it again")]
    Line {
        /// Counted from one.
        line: usize,
        /// What is wrong.
        problem: String,
    },
    /// A token that was not recorded.
    #[error(
        "the routing log has no {layer} of position {position} of sequence {sequence}: replay the prompts, \
         and at most as many new tokens, that were recorded"
    )]
    Missing {
        /// The layer.
        layer: Layer,
        /// Number of the sequence.
        sequence: u64,
        /// Position in it.
        position: u32,
    },
    /// Another token than was recorded.
    #[error(
        "position {position} of sequence {sequence} is token {token}, but the routing log was recorded with \
         token {recorded} there: replay the same prompts"
    )]
    Token {
        /// Number of the sequence.
        sequence: u64,
        /// Position in it.
        position: u32,
        /// The token at hand.
        token: u32,
        /// The token of the log.
        recorded: u32,
    },
    /// The model sends tokens to more or fewer experts.
    #[error(
        "the routing log sends {layer} of position {position} of sequence {sequence} to {recorded} experts, \
         but this model chooses {top_k}: replay a log of this model"
    )]
    TopK {
        /// The layer.
        layer: Layer,
        /// Number of the sequence.
        sequence: u64,
        /// Position in it.
        position: u32,
        /// Experts in the log.
        recorded: usize,
        /// Experts of the model's gate.
        top_k: usize,
    },
    /// The experts are not those of this model.
    #[error("the routing log does not fit this model: {0}")]
    Experts(PlanError),
}

impl RoutingLog {
    /// Takes in what a layer's router chose; `tokens` are those of the routing, in order.
    pub fn record(&mut self, layer: Layer, tokens: &[TokenId], routing: &Routing) {
        let top_k = routing.top_k();
        let pairs = routing.experts().chunks_exact(top_k).zip(routing.weights().chunks_exact(top_k));
        for (id, (experts, weights)) in tokens.iter().zip(pairs) {
            let choice = Choice { token: id.token, experts: experts.to_vec(), weights: weights.to_vec() };
            self.choices.insert((layer.0, id.sequence, id.position), choice);
        }
    }

    /// The recorded choices for a layer of `experts` (E) whose gate takes `top_k`.
    pub fn routing(
        &self,
        layer: Layer,
        tokens: &[TokenId],
        experts: usize,
        top_k: usize,
    ) -> Result<Routing, RoutingLogError> {
        let mut ids = Vec::with_capacity(tokens.len() * top_k);
        let mut weights = Vec::with_capacity(tokens.len() * top_k);
        for &TokenId { sequence, position, token } in tokens {
            let key = (layer.0, sequence, position);
            let missing = RoutingLogError::Missing { layer, sequence, position };
            let choice = self.choices.get(&key).ok_or(missing)?;
            let (recorded, width) = (choice.token, choice.experts.len());
            if recorded != token {
                return Err(RoutingLogError::Token { sequence, position, token, recorded });
            }
            if width != top_k {
                return Err(RoutingLogError::TopK { layer, sequence, position, recorded: width, top_k });
            }
            ids.extend_from_slice(&choice.experts);
            weights.extend_from_slice(&choice.weights);
        }
        Routing::new(experts, top_k, ids, weights).map_err(RoutingLogError::Experts)
    }

    /// Takes in another log. Where both know a token of a layer, the other's choice stays.
    pub fn merge(&mut self, other: RoutingLog) {
        self.choices.extend(other.choices);
    }

    /// Tokens of layers in the log.
    pub fn len(&self) -> usize {
        self.choices.len()
    }

    /// Whether nothing was recorded.
    pub fn is_empty(&self) -> bool {
        self.choices.is_empty()
    }

    /// How many tokens went to other experts than in `other`.
    pub fn flips(&self, other: &RoutingLog) -> Flips {
        let mut flips = Flips::default();
        for (key, choice) in &self.choices {
            if let Some(theirs) = other.choices.get(key) {
                flips.compared += 1;
                flips.flipped += usize::from(choice.experts != theirs.experts);
            }
        }
        flips
    }

    /// Writes the log as text, a line for each token of each layer, in order.
    pub fn write(&self, mut out: impl Write) -> io::Result<()> {
        for (&(layer, sequence, position), choice) in &self.choices {
            let Choice { token, experts, weights } = choice.clone();
            let weights = weights.into_iter().map(f64::from).collect();
            serde_json::to_writer(&mut out, &Line { layer, sequence, position, token, experts, weights })?;
            out.write_all(b"\n")?;
        }
        out.flush()
    }

    /// Reads what [`write`](RoutingLog::write) wrote.
    pub fn read(text: impl BufRead) -> Result<Self, RoutingLogError> {
        let mut log = RoutingLog::default();
        for (number, line) in text.lines().enumerate() {
            let refuse = |problem: String| RoutingLogError::Line { line: number + 1, problem };
            let line = line.map_err(|error| refuse(error.to_string()))?;
            let line: Line = serde_json::from_str(&line).map_err(|error| refuse(error.to_string()))?;
            let Line { layer, sequence, position, token, experts, weights } = line;
            if experts.len() != weights.len() {
                let (experts, weights) = (experts.len(), weights.len());
                return Err(refuse(format!("it has {experts} experts and {weights} weights")));
            }
            let weights = weights.into_iter().map(|weight| weight as f32).collect();
            log.choices.insert((layer, sequence, position), Choice { token, experts, weights });
        }
        Ok(log)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYER: Layer = Layer(1);

    fn tokens() -> [TokenId; 2] {
        [TokenId { sequence: 0, position: 5, token: 17 }, TokenId { sequence: 3, position: 0, token: 2 }]
    }

    fn log() -> RoutingLog {
        let routing = Routing::new(10, 2, vec![9, 3, 0, 1], vec![0.75, 0.1, 0.5, f32::MIN_POSITIVE]).unwrap();
        let mut log = RoutingLog::default();
        log.record(LAYER, &tokens(), &routing);
        log
    }

    fn refused(token: TokenId, experts: usize, top_k: usize) -> String {
        log().routing(LAYER, &[token], experts, top_k).unwrap_err().to_string()
    }

    #[test]
    fn what_was_recorded_is_replayed_in_any_order() {
        let [first, second] = tokens();
        let routing = log().routing(LAYER, &[second, first], 10, 2).unwrap();
        assert_eq!(routing.experts(), [0, 1, 3, 9]);
        assert_eq!(routing.weights(), [0.5, f32::MIN_POSITIVE, 0.1, 0.75]);
    }

    #[test]
    fn text_keeps_every_bit() {
        let mut text = Vec::new();
        log().write(&mut text).unwrap();
        assert_eq!(RoutingLog::read(text.as_slice()).unwrap(), log());
        let first = r#"{"layer":1,"sequence":0,"position":5,"token":17,"experts":[3,9],"weights":[0.10000000149011612,0.75]}"#;
        assert_eq!(std::str::from_utf8(&text).unwrap().lines().next(), Some(first));
    }

    #[test]
    fn logs_of_something_else_are_refused() {
        let [first, _] = tokens();
        assert_eq!(
            refused(TokenId { position: 6, ..first }, 10, 2),
            "the routing log has no layer 1 of position 6 of sequence 0: replay the prompts, and at most as \
             many new tokens, that were recorded"
        );
        assert_eq!(
            refused(TokenId { token: 18, ..first }, 10, 2),
            "position 5 of sequence 0 is token 18, but the routing log was recorded with token 17 there: \
             replay the same prompts"
        );
        assert!(refused(first, 10, 4).contains("to 2 experts, but this model chooses 4"));
        assert!(refused(first, 8, 2).contains("routed to expert 9, but the layer has 8 experts"));
    }

    #[test]
    fn damaged_text_is_refused_by_line() {
        let refused = |text: &str| RoutingLog::read(text.as_bytes()).unwrap_err().to_string();
        let good = r#"{"layer":0,"sequence":0,"position":0,"token":0,"experts":[1],"weights":[1.0]}"#;
        assert!(refused("{").starts_with("line 1 of the routing log: "));
        assert!(refused(&format!("{good}\nnothing")).starts_with("line 2 of the routing log: "));
        let uneven = good.replace("[1.0]", "[]");
        assert!(refused(&uneven).contains("it has 1 experts and 0 weights; record it again"));
    }

    #[test]
    fn flips_are_counted() {
        let mut other = log();
        let routing = Routing::new(10, 2, vec![3, 8], vec![0.5, 0.5]).unwrap();
        other.record(LAYER, &tokens()[..1], &routing);
        other.record(Layer(2), &tokens()[..1], &routing);
        assert_eq!(log().flips(&other), Flips { compared: 2, flipped: 1 });
        other.merge(log());
        assert_eq!((log().flips(&other).flipped, other.len(), other.is_empty()), (0, 3, false));
    }
}
