//! Which tokens are special, and what they are called: `tokenizer_config.json` and `special_tokens_map.json`.

use crate::gguf::GgufText;
use crate::{TextError, files};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::Path;

pub(crate) const CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS_MAP: &str = "special_tokens_map.json";

/// The largest of these files that is read, in bytes; published ones have up to about a million.
pub(crate) const LIMIT: u64 = 16 << 20;

/// Names that every tokenizer may give to a token.
const NAMES: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Where the tokens are that have no names.
const UNNAMED: [&str; 2] = ["additional_special_tokens", "extra_special_tokens"];

/// The special tokens of a checkpoint, as transformers finds them.
#[derive(Clone, Debug, Default)]
pub struct SpecialTokens {
    named: BTreeMap<String, String>,
    /// What the tokenizer must know, in this order.
    added: Vec<AddedToken>,
}

/// A token that is found in a text before anything else.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct AddedToken {
    pub(crate) content: String,
    pub(crate) single_word: bool,
    pub(crate) lstrip: bool,
    pub(crate) rstrip: bool,
    pub(crate) normalized: bool,
    pub(crate) special: bool,
    /// Whether its properties were given, not only its text.
    pub(crate) described: bool,
}

impl SpecialTokens {
    /// Reads the files of a checkpoint folder, or the header of a GGUF file; without them there are none.
    pub fn open(folder: &Path) -> Result<Self, TextError> {
        if GgufText::is_at(folder) {
            return Ok(SpecialTokens::of(&GgufText::open(folder)?.config, &Map::new()));
        }
        let (config, map) = (folder.join(CONFIG), folder.join(SPECIAL_TOKENS_MAP));
        Ok(SpecialTokens::of(
            &files::read_json(&config, LIMIT)?.unwrap_or_default(),
            &files::read_json(&map, LIMIT)?.unwrap_or_default(),
        ))
    }

    /// The tokens that `tokenizer_config.json` describes, or else `special_tokens_map.json`, which transformers reads only
    /// where the other has no `added_tokens_decoder`.
    pub(crate) fn of(config: &Map<String, Value>, map: &Map<String, Value>) -> Self {
        let decoder = config.get("added_tokens_decoder").and_then(Value::as_object);
        let map = if decoder.is_some() { None } else { Some(map) };
        let get = |key: &str| {
            map.and_then(|map| map.get(key)).or_else(|| config.get(key)).filter(|it| !it.is_null())
        };

        let keys = map.into_iter().chain([config]).flat_map(Map::keys).filter(|key| key.ends_with("_token"));
        // Any key may name a token of its model, like `image_token`, but only as a plain text.
        let named = keys.filter_map(|key| {
            let value = get(key)?;
            let token = if NAMES.contains(&key.as_str()) { content(value)? } else { value.as_str()? };
            Some((key.clone(), token.to_owned()))
        });
        let mut named: BTreeMap<String, String> = named.collect();
        let extra = get("extra_special_tokens").and_then(Value::as_object).into_iter().flatten();
        named.extend(extra.filter_map(|(name, value)| Some((name.clone(), content(value)?.to_owned()))));

        let mut numbered: Vec<(u64, AddedToken)> = decoder
            .into_iter()
            .flatten()
            .filter_map(|(id, value)| Some((id.parse().ok()?, AddedToken::read(value, false)?)))
            .collect();
        numbered.sort_by_key(|(id, _)| *id);
        let unnamed = UNNAMED.into_iter().filter_map(get).filter_map(Value::as_array).flatten();
        let special = NAMES.into_iter().filter_map(get).chain(unnamed);
        let special = special.filter_map(|value| AddedToken::read(value, true));
        let of_the_model =
            named.values().filter_map(|token| AddedToken::read(&Value::from(token.as_str()), true));
        let mut added: Vec<AddedToken> = Vec::new();
        for token in numbered.into_iter().map(|(_, token)| token).chain(special).chain(of_the_model) {
            if !added.iter().any(|other| other.content == token.content) {
                added.push(token);
            }
        }
        SpecialTokens { named, added }
    }

    /// The text of a token by its name, like `bos_token`.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.named.get(name).map(String::as_str)
    }

    /// All names with their tokens' texts.
    pub fn named(&self) -> &BTreeMap<String, String> {
        &self.named
    }

    pub(crate) fn added(&self) -> &[AddedToken] {
        &self.added
    }
}

impl AddedToken {
    /// A token written plainly, or with its properties; `special` is what it is if they do not say.
    fn read(value: &Value, special: bool) -> Option<Self> {
        let content = content(value)?.to_owned();
        let flag = |name, default| value.get(name).and_then(Value::as_bool).unwrap_or(default);
        let special = special || flag("special", false);
        Some(AddedToken {
            single_word: flag("single_word", false),
            lstrip: flag("lstrip", false),
            rstrip: flag("rstrip", false),
            normalized: flag("normalized", !special),
            special,
            described: value.is_object(),
            content,
        })
        .filter(|token| !token.content.is_empty())
    }
}

/// The text of a token, written plainly or with its properties.
fn content(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value.get("content")?.as_str())
}
