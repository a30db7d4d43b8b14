//! One request, and when its tokens came.

use super::prompts::Prompt;
use crate::client::Client;
use anyhow::Result;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// How a request went.
#[derive(Debug)]
pub(crate) struct Outcome {
    pub(crate) prompt_tokens: usize,
    pub(crate) new_tokens: usize,
    /// From sending to the first token.
    pub(crate) first: Duration,
    /// From sending to the last.
    pub(crate) whole: Duration,
    /// Between the pieces of the stream that brought tokens.
    pub(crate) gaps: Vec<Duration>,
}

impl Outcome {
    /// The time of each token after the first; nothing with fewer than two.
    pub(crate) fn per_token(&self) -> Option<Duration> {
        let after_first = u32::try_from(self.new_tokens.checked_sub(1)?).ok().filter(|&tokens| tokens > 0)?;
        Some((self.whole - self.first) / after_first)
    }
}

/// Asks, and reads the answer to its end.
pub(crate) fn send(client: &Client, prompt: &Prompt, ignore_eos: bool) -> Result<Outcome> {
    let body = json!({
        "model": client.model,
        "prompt": prompt.prompt,
        "max_tokens": prompt.max_tokens,
        "temperature": 0,
        "ignore_eos": ignore_eos,
        "stream": true,
        "stream_options": {"include_usage": true},
    });
    let (start, mut pieces) = (Instant::now(), Vec::new());
    let mut usage = Value::Null;
    client.stream("/v1/completions", &body, |mut event| {
        if !event["usage"].is_null() {
            usage = event["usage"].take();
        }
        if event["choices"].as_array().is_some_and(|choices| !choices.is_empty()) {
            pieces.push(start.elapsed());
        }
        Ok(())
    })?;
    let whole = pieces.last().copied().unwrap_or_else(|| start.elapsed());
    let number = |name: &str| usage[name].as_u64().map(|number| number as usize);
    Ok(Outcome {
        prompt_tokens: number("prompt_tokens").unwrap_or(0),
        new_tokens: number("completion_tokens").unwrap_or(pieces.len()),
        first: pieces.first().copied().unwrap_or(whole),
        whole,
        gaps: pieces.windows(2).map(|pair| pair[1] - pair[0]).collect(),
    })
}
