//! Guided decoding: a grammar says which tokens may come next.
//!
//! [`Grammar`] is what a request asks for, [`GuideFactory`] compiles it for this model's tokens, and a [`Guide`] follows one
//! answer on the engine's thread. The grammar itself is llguidance's work.

use crate::openai::ApiError;
use crate::options::ServedModel;
use epsmoe_engine::{Constraint, TokenMask};
use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{JsonCompileOptions, Matcher, ParserFactory};
use serde_json::{Value, json};
use std::sync::Arc;

/// What an answer must look like.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Grammar {
    /// JSON that satisfies a schema.
    Json(Value),
    /// The whole answer matches this.
    Regex(String),
    /// One of these texts.
    Choice(Vec<String>),
    /// A grammar in Lark's syntax.
    Lark(String),
}

impl Grammar {
    /// Any object.
    pub(crate) fn object() -> Self {
        Grammar::Json(json!({ "type": "object" }))
    }

    /// In the words of llguidance.
    fn compiled(&self) -> TopLevelGrammar {
        match self {
            Grammar::Json(schema) => {
                let mut schema = schema.clone();
                if schema.is_object() {
                    json_options().apply_to(&mut schema);
                }
                TopLevelGrammar::from_json_schema(schema)
            }
            Grammar::Regex(regex) => TopLevelGrammar::from_regex(regex),
            Grammar::Choice(texts) => {
                let texts: Vec<String> =
                    texts.iter().map(|text| Value::from(text.as_str()).to_string()).collect();
                let lark = format!("start: {}", texts.join(" | "));
                TopLevelGrammar::from_grammar(GrammarWithLexer::from_lark(lark))
            }
            Grammar::Lark(text) => TopLevelGrammar::from_grammar(GrammarWithLexer::from_lark(text.clone())),
        }
    }
}

/// JSON without white space that nobody asked for: a model that likes it could go on for ever.
fn json_options() -> JsonCompileOptions {
    JsonCompileOptions { whitespace_flexible: false, coerce_one_of: true, ..JsonCompileOptions::default() }
}

/// Compiles grammars for a model's tokens.
pub(crate) struct GuideFactory {
    parsers: ParserFactory,
    tokens: TokEnv,
}

impl GuideFactory {
    pub(crate) fn new(model: &ServedModel) -> Result<Self, String> {
        let tokenizer = model.tokenizer.as_ref().ok_or("a model without a tokenizer cannot be guided")?;
        let special = |id: u32| tokenizer.is_special(id) || model.eos.contains(&id);
        let word = |id: u32| match tokenizer.token_bytes(id) {
            // Special tokens are no text: their names stand behind a byte that no text has.
            Some(bytes) if special(id) => [&[TokTrie::SPECIAL_TOKEN_MARKER], bytes.as_slice()].concat(),
            Some(bytes) => bytes,
            None => Vec::new(),
        };
        let mut words: Vec<Vec<u8>> = (0..model.vocab as u32).map(word).collect();
        // The library wants an end-of-text token; a model without one gets one that it cannot write.
        let mut eos = model.eos.clone();
        if eos.is_empty() {
            eos.push(words.len() as u32);
            words.push(b"\xff<|end|>".to_vec());
        }
        let info = TokRxInfo::new(words.len() as u32, eos[0]);
        let trie = TokTrie::from(&info, &words).with_eos_tokens(&eos);
        let tokens: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut parsers = ParserFactory::new_simple(&tokens).map_err(|error| error.to_string())?;
        parsers.quiet().limits_mut().verbose_errors = false;
        Ok(GuideFactory { parsers, tokens })
    }

    /// A guide at the beginning of an answer. `param` is the field that the grammar came from. With `after`, the answer
    /// may be anything until that text has come.
    pub(crate) fn compile(
        &self,
        grammar: &Grammar,
        param: &str,
        after: Option<&str>,
    ) -> Result<Guide, ApiError> {
        if let Grammar::Json(schema) = grammar
            && !schema.is_object()
            && !schema.is_boolean()
        {
            return Err(ApiError::field(param, "a JSON schema is an object"));
        }
        let parser = self.parsers.create_parser(grammar.compiled());
        let matcher = Matcher::new(parser);
        if let Some(problem) = matcher.get_error() {
            let syntax = match grammar {
                Grammar::Lark(_) => " (it is read as Lark: `start: …`)",
                _ => "",
            };
            return Err(ApiError::field(
                param,
                format!("this grammar cannot be followed{syntax}: {problem}"),
            ));
        }
        if matcher.deep_clone().compute_mask_or_eos().is_err() {
            return Err(ApiError::field(
                param,
                "no text satisfies this: nothing that this model can say begins it",
            ));
        }
        let waits_for = after.map(|text| Awaited { text: text.as_bytes().to_vec(), seen: Vec::new() });
        Ok(Guide { matcher, waits_for, tokens: Arc::clone(&self.tokens) })
    }
}

/// Follows one answer.
pub(crate) struct Guide {
    matcher: Matcher,
    /// Text that has to come before the grammar begins.
    waits_for: Option<Awaited>,
    tokens: TokEnv,
}

struct Awaited {
    text: Vec<u8>,
    /// The end of what came, not longer than the text.
    seen: Vec<u8>,
}

impl Guide {
    /// Another answer to the same request, which has nothing in common with this one but the grammar.
    pub(crate) fn another(&self) -> Guide {
        let waits_for = self.waits_for.as_ref().map(|it| Awaited { text: it.text.clone(), seen: Vec::new() });
        Guide { matcher: self.matcher.deep_clone(), waits_for, tokens: Arc::clone(&self.tokens) }
    }
}

impl Constraint for Guide {
    fn mask(&mut self) -> Result<TokenMask, String> {
        let trie = self.tokens.tok_trie();
        if self.waits_for.is_some() {
            let mut all = trie.alloc_token_set();
            all.set_all(true);
            trie.eos_tokens().iter().for_each(|&eos| all.disallow_token(eos));
            return Ok(TokenMask(all.as_slice().to_vec()));
        }
        let mask = self.matcher.compute_mask_or_eos().map_err(|error| {
            format!("the grammar asked for lets no token of this model follow what was said so far ({error})")
        })?;
        Ok(TokenMask(mask.as_slice().to_vec()))
    }

    fn accept(&mut self, id: u32) -> Result<(), String> {
        let Some(awaited) = &mut self.waits_for else {
            return self.matcher.consume_token(id).map_err(|error| error.to_string());
        };
        awaited.seen.extend(self.tokens.tok_trie().decode(&[id]));
        let came = awaited.seen.windows(awaited.text.len()).any(|part| part == awaited.text);
        let old = awaited.seen.len().saturating_sub(awaited.text.len());
        awaited.seen.drain(..old);
        if came {
            self.waits_for = None;
        }
        Ok(())
    }

    fn is_finished(&self) -> bool {
        self.waits_for.is_none() && self.matcher.is_stopped()
    }
}
