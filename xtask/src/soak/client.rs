//! What is asked, and whether the answer is what it was alone.

use anyhow::{Context, Result, bail, ensure};
use epsmoe_base::Mix;
use serde_json::{Value, json};
use std::io::{BufRead, BufReader};
use std::time::Duration;

/// Longer than any answer may take, however many wait before it.
const PATIENCE: Duration = Duration::from_secs(600);

/// Longest line of a stream.
const LONGEST: u64 = 1 << 20;

/// Ids of prompts are below this, which every fixture's vocabulary has.
const VOCAB: usize = 300;

/// A request, and what came of it when it was alone.
pub(super) struct Asked {
    body: Value,
    ids: Vec<u64>,
}

/// What became of requests.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Outcome {
    pub(super) answered: u64,
    pub(super) gone: u64,
    pub(super) tokens: u64,
    pub(super) tokens_of_gone: u64,
}

impl Outcome {
    pub(super) fn add(&mut self, other: &Outcome) {
        self.answered += other.answered;
        self.gone += other.gone;
        self.tokens += other.tokens;
        self.tokens_of_gone += other.tokens_of_gone;
    }
}

impl Asked {
    /// Prompts are of a few families, which begin alike; every other one is answered greedily.
    pub(super) fn new(seed: u64, number: usize) -> Self {
        let mut mix = Mix::keyed(seed, &[0, number as u64]);
        let (family, shared, own) = (mix.below(4) as u64, mix.below(150) as u64, 1 + mix.below(50) as u64);
        let token = |key: &[u64]| Mix::keyed(seed, key).below(VOCAB);
        let prompt: Vec<usize> = (0..shared)
            .map(|at| token(&[2, family, at]))
            .chain((0..own).map(|at| token(&[3, number as u64, at])))
            .collect();
        let body = json!({
            "prompt": prompt,
            "max_tokens": 16 + mix.below(112),
            "temperature": if number.is_multiple_of(2) { 0.0 } else { 1.0 },
            "seed": number,
            "ignore_eos": true,
            "stream": true,
            "stream_options": { "include_usage": true },
            "return_token_ids": true,
        });
        Asked { body, ids: Vec::new() }
    }

    /// Tokens of the answer.
    pub(super) fn tokens(&self) -> usize {
        self.ids.len()
    }
}

/// A way to the server.
pub(super) struct Client {
    agent: ureq::Agent,
    base: String,
}

impl Client {
    pub(super) fn new(base: &str) -> Self {
        let agent = ureq::Agent::config_builder().timeout_global(Some(PATIENCE)).build().into();
        Client { agent, base: base.to_owned() }
    }

    /// Asks, and keeps the answer.
    pub(super) fn alone(&self, asked: Asked) -> Result<Asked> {
        let ids = self.ask(&asked.body, None)?;
        let wanted = asked.body["max_tokens"].as_u64().unwrap_or_default();
        ensure!(ids.len() as u64 == wanted, "{wanted} tokens were asked for, but {} came", ids.len());
        Ok(Asked { ids, ..asked })
    }

    /// Asks again, and goes away after so many tokens if that is said. Every token must be as before.
    pub(super) fn check(&self, asked: &Asked, leave_after: Option<usize>) -> Result<Outcome> {
        let ids = self.ask(&asked.body, leave_after)?;
        let same = match leave_after {
            Some(_) => asked.ids.starts_with(&ids),
            None => asked.ids == ids,
        };
        ensure!(same, "{}: alone the answer was {:?}, and in company {ids:?}", asked.body, asked.ids);
        let (tokens, gone) = (ids.len() as u64, leave_after.is_some());
        Ok(Outcome {
            answered: u64::from(!gone),
            gone: u64::from(gone),
            tokens,
            tokens_of_gone: if gone { tokens } else { 0 },
        })
    }

    /// The token ids of a stream, of which a client that leaves reads only some.
    fn ask(&self, body: &Value, leave_after: Option<usize>) -> Result<Vec<u64>> {
        let response = self.agent.post(format!("{}/v1/completions", self.base)).send_json(body)?;
        let mut lines = BufReader::new(response.into_body().into_reader());
        let (mut ids, mut usage, mut line) = (Vec::new(), None, String::new());
        while leave_after.is_none_or(|most| ids.len() < most) {
            line.clear();
            let read =
                std::io::Read::take(&mut lines, LONGEST).read_line(&mut line).context("the stream broke")?;
            ensure!(read > 0, "the stream ended without [DONE] after {} tokens", ids.len());
            let Some(data) = line.strip_prefix("data: ").map(str::trim_end) else { continue };
            if data == "[DONE]" {
                ensure!(
                    usage == Some(ids.len() as u64),
                    "{} tokens came, but usage says {usage:?}",
                    ids.len()
                );
                return Ok(ids);
            }
            let event: Value = serde_json::from_str(data)?;
            if !event["error"].is_null() {
                bail!("the stream told an error: {data}");
            }
            usage = event["usage"]["completion_tokens"].as_u64().or(usage);
            ids.extend(
                event["choices"][0]["token_ids"].as_array().into_iter().flatten().filter_map(Value::as_u64),
            );
        }
        Ok(ids)
    }

    /// What the server counts.
    pub(super) fn metrics(&self) -> Result<Metrics> {
        Ok(Metrics(self.agent.get(format!("{}/metrics", self.base)).call()?.body_mut().read_to_string()?))
    }
}

/// Lines of Prometheus.
pub(super) struct Metrics(String);

impl Metrics {
    /// The value of a metric that has no labels but the model's name.
    pub(super) fn value(&self, name: &str) -> Result<f64> {
        let found = self
            .0
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix('{')?.split(' ').next_back());
        let value = found.and_then(|value| value.parse().ok());
        value.with_context(|| format!("/metrics does not tell {name}"))
    }
}
