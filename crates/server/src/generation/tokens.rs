//! Tokens as log-probabilities show them.

use crate::app::App;
use crate::openai::logprobs::{AlternativeToken, ChatTokenLogprob, CompletionLogprobs};
use epsmoe_engine::TokenLogprobs;
use epsmoe_text::Tokenizer;
use serde_json::{Map, Value};

/// JSON has no infinity: what cannot come is told as this.
const LEAST_LOGPROB: f64 = -9999.0;

/// Writes tokens of one model as text.
#[derive(Clone)]
pub(crate) struct TokenTexts {
    tokenizer: Option<Tokenizer>,
    /// Whether tokens are named by their numbers.
    by_id: bool,
    /// Whether special tokens are left out of texts.
    skip_special: bool,
}

impl TokenTexts {
    pub(crate) fn new(app: &App, by_id: bool, skip_special: bool) -> Self {
        TokenTexts { tokenizer: app.model.tokenizer.clone(), by_id, skip_special }
    }

    /// A token for `/v1/chat/completions`.
    pub(crate) fn of_chat(&self, id: u32, logprobs: &TokenLogprobs) -> ChatTokenLogprob {
        let top = logprobs.top.iter().map(|&(id, logprob)| self.alternative(id, logprob));
        ChatTokenLogprob { token: self.alternative(id, logprobs.logprob), top_logprobs: top.collect() }
    }

    fn alternative(&self, id: u32, logprob: f32) -> AlternativeToken {
        let bytes = self.bytes(id);
        let token = if self.by_id { by_id(id) } else { String::from_utf8_lossy(&bytes).into_owned() };
        AlternativeToken { token, logprob: finite(logprob), bytes }
    }

    /// A token for `/v1/completions`, at `offset` characters of the text. The first one of a prompt has no
    /// log-probabilities.
    pub(crate) fn of_completion(
        &self,
        id: u32,
        logprobs: Option<&TokenLogprobs>,
        offset: usize,
    ) -> CompletionLogprobs {
        let top = logprobs.map(|logprobs| {
            let mut top = Map::new();
            let chosen = (id, logprobs.logprob);
            for (id, logprob) in logprobs.top.iter().copied().chain([chosen]) {
                let logprob = Value::from(finite(logprob));
                let name = self.name(id);
                match top.get(&name) {
                    None => drop(top.insert(name, logprob)),
                    Some(known) if *known != logprob => drop(top.insert(by_id(id), logprob)),
                    Some(_) => {}
                }
            }
            top
        });
        CompletionLogprobs {
            tokens: vec![self.name(id)],
            token_logprobs: vec![logprobs.map(|logprobs| finite(logprobs.logprob))],
            top_logprobs: vec![top],
            text_offset: vec![offset],
        }
    }

    /// Characters that a token adds to a text; one that several tokens share is its first token's.
    pub(crate) fn characters(&self, id: u32) -> usize {
        let silent = self.skip_special && self.tokenizer.as_ref().is_some_and(|it| it.is_special(id));
        let begins = |byte: &&u8| (**byte & 0xC0) != 0x80;
        if silent { 0 } else { self.bytes(id).iter().filter(begins).count() }
    }

    /// The token's text, or its bytes where they are none.
    fn name(&self, id: u32) -> String {
        if self.by_id {
            return by_id(id);
        }
        String::from_utf8(self.bytes(id)).unwrap_or_else(|error| {
            let bytes = error.into_bytes();
            let hex: String = bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
            format!("bytes:{hex}")
        })
    }

    fn bytes(&self, id: u32) -> Vec<u8> {
        let bytes = self.tokenizer.as_ref().and_then(|tokenizer| tokenizer.token_bytes(id));
        bytes.unwrap_or_default()
    }
}

fn finite(logprob: f32) -> f64 {
    f64::from(logprob).max(LEAST_LOGPROB)
}

fn by_id(id: u32) -> String {
    format!("token_id:{id}")
}
