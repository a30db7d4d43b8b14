//! A vocabulary and how text is cut into it, for whoever makes a tokenizer of it.

use super::{Gguf, Value, damaged};
use crate::QuantError;

/// What a file says about its tokenizer.
#[derive(Clone, Debug, PartialEq)]
pub struct Tokenizer {
    /// The kind: `gpt2` (byte-level BPE with merges), `llama` (BPE over scores), or another's name.
    pub model: String,
    /// How text is split before: the name of a rule, such as `qwen2` or `deepseek-llm`. None for `default`.
    pub split: Option<String>,
    /// The token of each id.
    pub tokens: Vec<String>,
    /// What each is; empty if the file does not say.
    pub kinds: Vec<TokenKind>,
    /// The score of each; empty if the file has none.
    pub scores: Vec<f32>,
    /// Pairs that become one, the first ones first, each with a space between.
    pub merges: Vec<String>,
    /// Begins a text.
    pub bos: Option<u32>,
    /// Ends a text.
    pub eos: Option<u32>,
    /// All that end what a model says: the end of a text, of a turn, of a message.
    pub ends: Vec<u32>,
    /// Stands for what has no token.
    pub unknown: Option<u32>,
    /// Fills up.
    pub padding: Option<u32>,
    /// Whether texts begin with `bos`. None if the file does not say.
    pub add_bos: Option<bool>,
    /// Whether they end with `eos`.
    pub add_eos: Option<bool>,
    /// Whether a space comes before the first word.
    pub add_space_prefix: Option<bool>,
    /// A Jinja template.
    pub chat_template: Option<String>,
    /// Others, by their names.
    pub more_templates: Vec<(String, String)>,
    /// The text of a tokenizer.json, which some files have as a whole.
    pub json: Option<String>,
}

/// What a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenKind {
    /// A piece of text.
    Normal,
    /// Stands for what has no token.
    Unknown,
    /// Steers, and is no text.
    Control,
    /// Text that is never cut.
    UserDefined,
    /// Never appears.
    Unused,
    /// One byte, written `<0x41>`.
    Byte,
}

impl Gguf {
    /// The file's tokenizer, if it has a vocabulary.
    pub fn tokenizer(&self) -> Result<Option<Tokenizer>, QuantError> {
        let metadata = &self.metadata;
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        let model = metadata.text(&key("model"))?.unwrap_or_default().to_owned();
        let tokens = metadata.texts(&key("tokens"))?.unwrap_or_default().to_vec();
        if tokens.is_empty() {
            return Ok(None);
        }
        // What files of this kind leave out.
        let sentence_piece =
            |id: u32| Some(id).filter(|&id| model == "llama" && (id as usize) < tokens.len());
        let id = |name: &str| -> Result<Option<u32>, QuantError> {
            let key = key(&format!("{name}_token_id"));
            // Files say 2^32 − 1, or −1, where there is no such token.
            if metadata.get(&key) == Some(&Value::Signed(-1)) {
                return Ok(None);
            }
            let id = metadata.whole(&key)?.filter(|&id| id != u64::from(u32::MAX));
            match id {
                Some(id) if id >= tokens.len() as u64 => {
                    Err(damaged(format!("`{key}` is {id}, but there are {} tokens", tokens.len())))
                }
                id => Ok(id.map(|id| id as u32)),
            }
        };
        let each = |name: &str| -> Result<Vec<f64>, QuantError> {
            let values = metadata.numbers(&key(name))?.unwrap_or_default();
            if values.is_empty() || values.len() == tokens.len() {
                return Ok(values);
            }
            let problem = format!("`{}` has {} items for {} tokens", key(name), values.len(), tokens.len());
            Err(damaged(problem))
        };
        let (bos, eos) = (id("bos")?.or(sentence_piece(1)), id("eos")?.or(sentence_piece(2)));
        let mut ends = Vec::new();
        for end in [eos, id("eot")?, id("eom")?].into_iter().flatten() {
            if !ends.contains(&end) {
                ends.push(end);
            }
        }
        let mut more_templates = Vec::new();
        for name in metadata.texts("tokenizer.chat_templates")?.unwrap_or_default() {
            if let Some(text) = metadata.text(&format!("tokenizer.chat_template.{name}"))? {
                more_templates.push((name.clone(), text.to_owned()));
            }
        }
        Ok(Some(Tokenizer {
            split: metadata.text(&key("pre"))?.filter(|name| *name != "default").map(str::to_owned),
            kinds: each("token_type")?.into_iter().map(kind).collect::<Result<_, _>>()?,
            scores: each("scores")?.into_iter().map(|score| score as f32).collect(),
            merges: metadata.texts(&key("merges"))?.unwrap_or_default().to_vec(),
            bos,
            eos,
            ends,
            unknown: id("unknown")?.or(sentence_piece(0)),
            padding: id("padding")?,
            add_bos: metadata.flag(&key("add_bos_token"))?,
            add_eos: metadata.flag(&key("add_eos_token"))?,
            add_space_prefix: metadata.flag(&key("add_space_prefix"))?,
            chat_template: metadata.text("tokenizer.chat_template")?.map(str::to_owned),
            more_templates,
            json: metadata.text("tokenizer.huggingface.json")?.map(str::to_owned),
            tokens,
            model,
        }))
    }
}

fn kind(number: f64) -> Result<TokenKind, QuantError> {
    Ok(match number {
        0.0 | 1.0 => TokenKind::Normal,
        2.0 => TokenKind::Unknown,
        3.0 => TokenKind::Control,
        4.0 => TokenKind::UserDefined,
        5.0 => TokenKind::Unused,
        6.0 => TokenKind::Byte,
        _ => return Err(damaged(format!("a token is of type {number}, which is none"))),
    })
}
