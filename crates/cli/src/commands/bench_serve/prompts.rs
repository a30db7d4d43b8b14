//! What is asked of the server, and when.

use crate::args::{BenchServeArgs, Dataset};
use crate::client::Client;
use anyhow::{Context, Result, bail};
use epsmoe_base::Mix;
use epsmoe_base::files::read_plain;
use serde::Deserialize;
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

/// The largest data set that is read, in bytes.
const LARGEST: u64 = 2 << 30;

/// One request.
pub(crate) struct Prompt {
    /// Text, or token ids.
    pub(crate) prompt: Value,
    /// Most new tokens.
    pub(crate) max_tokens: usize,
    /// When it is sent, from the start.
    pub(crate) arrival: Duration,
}

/// A conversation in ShareGPT's format.
#[derive(Deserialize)]
struct Conversation {
    #[serde(default)]
    conversations: Vec<Turn>,
}

#[derive(Deserialize)]
struct Turn {
    #[serde(default)]
    value: String,
}

/// All prompts, in the order in which they arrive.
pub(crate) fn prompts(args: &BenchServeArgs, client: &Client) -> Result<Vec<Prompt>> {
    let asked = match (args.dataset_name, &args.dataset_path) {
        (Dataset::Sharegpt, Some(file)) => conversations(file, args, client)?,
        _ => (0..args.num_prompts).map(|number| (random(args, number), args.random_output_len)).collect(),
    };
    let arrivals = arrivals(args.request_rate, args.seed);
    let timed = asked.into_iter().zip(arrivals);
    Ok(timed.map(|((prompt, max_tokens), arrival)| Prompt { prompt, max_tokens, arrival }).collect())
}

/// Random token ids; the lowest are left out, which are special in many vocabularies.
fn random(args: &BenchServeArgs, number: usize) -> Value {
    const SPECIAL: usize = 8;
    let mut mix = Mix::keyed(args.seed, &[number as u64]);
    let ids = (0..args.random_input_len).map(|_| SPECIAL + mix.below(args.random_vocab - SPECIAL));
    ids.collect()
}

/// First turns, and as many new tokens as the turn after has: counted by the server if it can.
fn conversations(file: &Path, args: &BenchServeArgs, client: &Client) -> Result<Vec<(Value, usize)>> {
    let text = read_plain(file, LARGEST).with_context(|| format!("cannot read {}", file.display()))?;
    let all: Vec<Conversation> = serde_json::from_slice(&text)
        .with_context(|| format!("{}: is no list of conversations in ShareGPT's format", file.display()))?;
    let pairs = all.iter().filter_map(|one| match one.conversations.as_slice() {
        [first, second, ..] if !first.value.is_empty() && !second.value.is_empty() => Some((first, second)),
        _ => None,
    });
    let mut pairs: Vec<_> = pairs.collect();
    if pairs.is_empty() {
        bail!("{}: no conversation in it has two turns", file.display());
    }
    let mut mix = Mix::keyed(args.seed, &[u64::MAX]);
    for last in (1..pairs.len()).rev() {
        pairs.swap(last, mix.below(last + 1));
    }
    let picked = pairs.into_iter().cycle().take(args.num_prompts);
    Ok(picked.map(|(first, second)| (json!(first.value), count(&second.value, args, client))).collect())
}

/// Tokens of a text; what was asked for where the server does not count.
fn count(text: &str, args: &BenchServeArgs, client: &Client) -> usize {
    let counted = client.post("/tokenize", &json!({"model": client.model, "prompt": text}));
    let counted = counted.ok().and_then(|answer| answer["count"].as_u64());
    counted.map_or(args.random_output_len, |count| (count as usize).clamp(1, args.random_output_len))
}

/// When requests arrive: at once, or with exponential times between them.
fn arrivals(rate: f64, seed: u64) -> impl Iterator<Item = Duration> {
    let mut mix = Mix::keyed(seed, &[u64::MAX - 1]);
    let mut at = 0.0;
    std::iter::repeat_with(move || {
        let arrival = Duration::from_secs_f64(at);
        at += -(1.0 - f64::from(mix.unit())).ln() / rate;
        arrival
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arrivals_keep_to_their_rate() {
        assert!(arrivals(f64::INFINITY, 1).take(10).all(|arrival| arrival.is_zero()));
        let last = arrivals(50.0, 7).nth(5000).unwrap().as_secs_f64();
        assert!((90.0..110.0).contains(&last), "5000 arrivals at 50 a second took {last} s (seed 7)");
    }
}
