//! The tokenizer in the header of a GGUF file, brought into the form of a tokenizer.json and a tokenizer_config.json, as
//! which it is read and bounded like everybody's.

use crate::TextError;
use epsmoe_base::files::open_plain;
use epsmoe_quant::QuantError;
use epsmoe_quant::gguf::{Gguf, TokenKind, Tokenizer};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::path::Path;

/// What the header of a file says about text.
pub(crate) struct GgufText {
    /// The text of a tokenizer.json, if there is a vocabulary.
    pub(crate) tokenizer: Option<Vec<u8>>,
    /// The keys of a tokenizer_config.json.
    pub(crate) config: Map<String, Value>,
}

impl GgufText {
    /// Whether a path is not a checkpoint's folder, but a GGUF file.
    pub(crate) fn is_at(path: &Path) -> bool {
        path.extension().is_some_and(|ending| ending == "gguf") && path.is_file()
    }

    /// The header of the file at a path.
    pub(crate) fn header(path: &Path) -> Result<Gguf, TextError> {
        let (file, length) = open_plain(path).map_err(|error| TextError::file(path, error.to_string()))?;
        Gguf::of_file(&file, length).map_err(|error| TextError::file(path, error.to_string()))
    }

    pub(crate) fn open(path: &Path) -> Result<GgufText, TextError> {
        GgufText::of(&GgufText::header(path)?).map_err(|error| TextError::file(path, error.to_string()))
    }

    pub(crate) fn of(header: &Gguf) -> Result<GgufText, QuantError> {
        let Some(tokenizer) = header.tokenizer()? else {
            return Ok(GgufText { tokenizer: None, config: Map::new() });
        };
        let config = config(&tokenizer);
        let text = match &tokenizer.json {
            Some(json) => json.clone().into_bytes(),
            None => described(&tokenizer)?.to_string().into_bytes(),
        };
        Ok(GgufText { tokenizer: Some(text), config })
    }
}

/// Names of special tokens, and the chat template.
fn config(tokenizer: &Tokenizer) -> Map<String, Value> {
    let mut config = Map::new();
    let named = [
        ("bos_token", tokenizer.bos),
        ("eos_token", tokenizer.eos),
        ("unk_token", tokenizer.unknown),
        ("pad_token", tokenizer.padding),
    ];
    for (name, id) in named {
        if let Some(id) = id {
            config.insert(name.into(), tokenizer.tokens[id as usize].clone().into());
        }
    }
    if let Some(template) = &tokenizer.chat_template {
        let named = tokenizer.more_templates.iter().map(|(name, text)| (name.as_str(), text.as_str()));
        let all = [("default", template.as_str())].into_iter().chain(named);
        let all = all.map(|(name, text)| json!({ "name": name, "template": text }));
        config.insert("chat_template".into(), all.collect());
    }
    config
}

/// The tokenizer.json that the file was made of, as far as it matters.
fn described(tokenizer: &Tokenizer) -> Result<Value, QuantError> {
    let parts = match tokenizer.model.as_str() {
        "gpt2" => byte_level(tokenizer)?,
        "llama" => sentence_pieces(tokenizer)?,
        "t5" => unigrams(tokenizer),
        other => {
            return Err(QuantError::new(format!(
                "its tokenizer is of the kind `{other}`, which is not read (gpt2, llama and t5 are); use the folder of the \
                 unconverted model for texts"
            )));
        }
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(tokenizer),
        "normalizer": parts.normalizer,
        "pre_tokenizer": parts.pre_tokenizer,
        "post_processor": post_processor(tokenizer, parts.adds_bos),
        "decoder": parts.decoder,
        "model": parts.model,
    }))
}

/// Parts of a tokenizer.json that differ between kinds.
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    model: Value,
    /// Whether texts begin with a special token where the file does not say.
    adds_bos: bool,
}

/// Tokens that are found in a text before anything else.
fn added_tokens(tokenizer: &Tokenizer) -> Vec<Value> {
    let kinds = tokenizer.kinds.iter().zip(&tokenizer.tokens).enumerate();
    let added = kinds.filter_map(|(id, (kind, token))| {
        let special = match kind {
            TokenKind::Control | TokenKind::Unknown => true,
            TokenKind::UserDefined => false,
            _ => return None,
        };
        let token = json!({
            "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
            "special": special,
        });
        Some(token)
    });
    added.filter(|token| token["content"] != "").collect()
}

/// Special tokens around every text.
fn post_processor(tokenizer: &Tokenizer, adds_bos: bool) -> Value {
    let before = tokenizer.bos.filter(|_| tokenizer.add_bos.unwrap_or(adds_bos));
    let after = tokenizer.eos.filter(|_| tokenizer.add_eos.unwrap_or(false));
    let token = |id: u32| tokenizer.tokens[id as usize].as_str();
    let special = |id: Option<u32>, kind: u32| {
        id.map(|id| json!({ "SpecialToken": { "id": token(id), "type_id": kind } }))
    };
    let around = |name: &str, kind: u32| {
        let text = json!({ "Sequence": { "id": name, "type_id": kind } });
        special(before, kind).into_iter().chain([text]).chain(special(after, kind)).collect::<Vec<_>>()
    };
    let described = |id: u32| {
        let text = token(id);
        (text.to_owned(), json!({ "id": text, "ids": [id], "tokens": [text] }))
    };
    let tokens: Map<String, Value> = before.into_iter().chain(after).map(described).collect();
    if tokens.is_empty() {
        return Value::Null;
    }
    let pair = [around("A", 0), around("B", 1)].concat();
    json!({ "type": "TemplateProcessing", "single": around("A", 0), "pair": pair, "special_tokens": tokens })
}

/// Ids of tokens. Of equal tokens the last one counts.
fn vocabulary(tokenizer: &Tokenizer) -> Map<String, Value> {
    tokenizer.tokens.iter().enumerate().map(|(id, token)| (token.clone(), id.into())).collect()
}

/// Byte-level BPE, whose merges the file has.
fn byte_level(tokenizer: &Tokenizer) -> Result<Parts, QuantError> {
    let split = Split::named(tokenizer.split.as_deref())?;
    let vocabulary = vocabulary(tokenizer);
    let merges = tokenizer.merges.iter().filter_map(|merge| {
        // The first part may be a space.
        let first = merge.chars().next().map_or(0, char::len_utf8);
        let at = first + merge.get(first..)?.find(' ')?;
        let (left, right) = (&merge[..at], &merge[at + 1..]);
        let known = |token: &str| vocabulary.contains_key(token);
        let fits = known(left) && known(right) && known(&[left, right].concat());
        fits.then(|| json!([left, right]))
    });
    let merges: Vec<Value> = merges.collect();
    let words = split.patterns.iter().map(|pattern| {
        json!({ "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false })
    });
    let bytes = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": split.as_gpt2 });
    let steps: Vec<Value> = words.chain([bytes.clone()]).collect();
    Ok(Parts {
        normalizer: if split.composed { json!({ "type": "NFC" }) } else { Value::Null },
        pre_tokenizer: json!({ "type": "Sequence", "pretokenizers": steps }),
        decoder: bytes,
        model: json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": split.ignores_merges, "vocab": vocabulary, "merges": merges,
        }),
        adds_bos: split.adds_bos,
    })
}

/// What takes the place of a space in SentencePiece.
const SPACE: &str = "▁";

/// BPE over scores: of two neighbours whose union is a token, those with the best one become one first.
fn sentence_pieces(tokenizer: &Tokenizer) -> Result<Parts, QuantError> {
    let prefix = tokenizer.add_space_prefix.unwrap_or(true);
    let spaces = json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE });
    let prepend = json!({ "type": "Prepend", "prepend": SPACE });
    let normalizers = if prefix { vec![prepend, spaces] } else { vec![spaces] };
    let mut decoders = vec![
        json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
        json!({ "type": "ByteFallback" }),
        json!({ "type": "Fuse" }),
    ];
    if prefix {
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    Ok(Parts {
        normalizer: json!({ "type": "Sequence", "normalizers": normalizers }),
        pre_tokenizer: Value::Null,
        decoder: json!({ "type": "Sequence", "decoders": decoders }),
        model: json!({
            "type": "BPE", "dropout": null, "unk_token": unknown(tokenizer), "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocabulary(tokenizer), "merges": merges(tokenizer)?,
        }),
        adds_bos: true,
    })
}

/// The token for what has none.
fn unknown(tokenizer: &Tokenizer) -> Option<&str> {
    let of_its_kind =
        || tokenizer.kinds.iter().position(|kind| *kind == TokenKind::Unknown).map(|id| id as u32);
    let id = tokenizer.unknown.or_else(of_its_kind)?;
    Some(&tokenizer.tokens[id as usize])
}

/// Bytes of the longest token that is made of others. SentencePiece's own limit is sixteen characters.
const LONGEST_MERGED: usize = 256;
/// Ways to make tokens of two others. The largest vocabularies have half a million.
const MOST_MERGES: usize = 1 << 22;

/// Every way to make a token of two, those of the best score first; of equal ones the longer left part, and then the
/// longer right part, as the converters of `transformers` have them.
fn merges(tokenizer: &Tokenizer) -> Result<Vec<Value>, QuantError> {
    let merged = |id: usize| {
        !matches!(tokenizer.kinds.get(id), Some(TokenKind::Control | TokenKind::Unknown | TokenKind::Byte))
    };
    let ids: HashMap<&str, usize> = tokenizer
        .tokens
        .iter()
        .enumerate()
        .filter(|(id, _)| merged(*id))
        .map(|(id, token)| (token.as_str(), id))
        .collect();
    let mut found: Vec<(f32, usize, &str, &str)> = Vec::new();
    for (token, &id) in &ids {
        if token.len() > LONGEST_MERGED {
            continue;
        }
        let score = tokenizer.scores.get(id).copied().unwrap_or(0.0);
        for (at, _) in token.char_indices().skip(1) {
            let (left, right) = token.split_at(at);
            if ids.contains_key(left) && ids.contains_key(right) {
                found.push((score, id, left, right));
            }
        }
        if found.len() > MOST_MERGES {
            let problem = format!(
                "its tokens can be made of others in more than {MOST_MERGES} ways; do not trust this model"
            );
            return Err(QuantError::new(problem));
        }
    }
    let length = |text: &str| text.chars().count();
    found.sort_by(|a, b| {
        let best =
            b.0.total_cmp(&a.0).then(length(b.2).cmp(&length(a.2))).then(length(b.3).cmp(&length(a.3)));
        best.then(a.1.cmp(&b.1))
    });
    Ok(found.into_iter().map(|(_, _, left, right)| json!([left, right])).collect())
}

/// SentencePiece's other kind: the likeliest way to cut a text.
fn unigrams(tokenizer: &Tokenizer) -> Parts {
    let scores = tokenizer.scores.iter().map(|&score| f64::from(score)).chain(std::iter::repeat(0.0));
    let vocabulary: Vec<Value> =
        tokenizer.tokens.iter().zip(scores).map(|(token, score)| json!([token, score])).collect();
    let unknown =
        unknown(tokenizer).and_then(|token| tokenizer.tokens.iter().position(|other| other == token));
    let prefix = if tokenizer.add_space_prefix.unwrap_or(true) { "always" } else { "never" };
    let spaces =
        json!({ "type": "Metaspace", "replacement": SPACE, "prepend_scheme": prefix, "split": true });
    let bytes = tokenizer.kinds.contains(&TokenKind::Byte);
    Parts {
        normalizer: Value::Null,
        pre_tokenizer: spaces.clone(),
        decoder: spaces,
        model: json!({ "type": "Unigram", "unk_id": unknown, "vocab": vocabulary, "byte_fallback": bytes }),
        adds_bos: false,
    }
}

/// How a text is cut into words before its pairs become tokens.
struct Split {
    /// One after the other, each cuts what the ones before left.
    patterns: &'static [&'static str],
    /// Whether words are cut as GPT-2 did, last.
    as_gpt2: bool,
    /// Whether a word that is a token is that token, whatever its merges would make of it.
    ignores_merges: bool,
    /// Whether texts begin with a special token where the file does not say.
    adds_bos: bool,
    /// Whether letters and their accents are composed first.
    composed: bool,
}

impl Split {
    const PLAIN: Split =
        Split { patterns: &[], as_gpt2: false, ignores_merges: false, adds_bos: false, composed: false };

    /// The rule of this name in `tokenizer.ggml.pre`, as the tokenizers have it that it stands for.
    fn named(name: Option<&str>) -> Result<Split, QuantError> {
        Ok(match name.unwrap_or("default") {
            "gpt-2" | "olmo" | "mpt" | "phi-2" | "jais" | "trillion" => {
                Split { as_gpt2: true, ..Split::PLAIN }
            }
            "default" => Split { as_gpt2: true, ..Split::PLAIN },
            "starcoder" | "refact" | "command-r" | "smollm" | "codeshell" | "exaone" | "minerva-7b" => {
                Split { patterns: &[r"\p{N}"], as_gpt2: true, ..Split::PLAIN }
            }
            "llama3" | "llama-v3" | "llama-bpe" | "pixtral" | "falcon3" | "lfm2" => Split {
                patterns: &[UP_TO_THREE_DIGITS],
                ignores_merges: true,
                adds_bos: true,
                ..Split::PLAIN
            },
            "dbrx" | "smaug-bpe" | "chatglm-bpe" => Split { patterns: &[UP_TO_THREE_DIGITS], ..Split::PLAIN },
            "glm4" => Split { patterns: &[UP_TO_THREE_DIGITS], ignores_merges: true, ..Split::PLAIN },
            "qwen2" | "deepseek-r1-qwen" => Split { patterns: &[ONE_DIGIT], composed: true, ..Split::PLAIN },
            "stablelm2" | "hunyuan" => Split { patterns: &[ONE_DIGIT], ..Split::PLAIN },
            "deepseek-llm" => Split { patterns: DEEPSEEK_LLM, ..Split::PLAIN },
            "deepseek-coder" => Split { patterns: DEEPSEEK_CODER, ..Split::PLAIN },
            "deepseek-v3" => Split { patterns: DEEPSEEK_V3, ..Split::PLAIN },
            "gpt-4o" | "llama4" | "minimax-m2" => Split { patterns: &[GPT_4O], ..Split::PLAIN },
            "tekken" => Split { patterns: &[TEKKEN], ignores_merges: true, ..Split::PLAIN },
            other => {
                return Err(QuantError::new(format!(
                    "its tokenizer cuts words by the rule `{other}`, which is not known; use the folder of the unconverted \
                     model for texts"
                )));
            }
        })
    }
}

/// Words with what stands before them, at most three digits, signs, line ends, spaces.
const UP_TO_THREE_DIGITS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// The same, every digit alone.
const ONE_DIGIT: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const GPT_4O: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Letters with a case, as DeepSeek's first tokenizers list them.
const CASED: &str = concat!(
    r"\s?[",
    r"A-Za-z\u{B5}\u{C0}-\u{D6}\u{D8}-\u{F6}\u{F8}-\u{1BA}\u{1BC}-\u{1BF}\u{1C4}-\u{293}\u{295}-\u{2AF}",
    r"\u{370}-\u{373}\u{376}\u{377}\u{37B}-\u{37D}\u{37F}\u{386}\u{388}-\u{38A}\u{38C}\u{38E}-\u{3A1}",
    r"\u{3A3}-\u{3F5}\u{3F7}-\u{481}\u{48A}-\u{52F}\u{531}-\u{556}\u{10A0}-\u{10C5}\u{13A0}-\u{13F5}",
    r"\u{13F8}-\u{13FD}\u{1C90}-\u{1CBA}\u{1CBD}-\u{1CBF}\u{1D00}-\u{1D2B}\u{1D6B}-\u{1D77}",
    r"\u{1D79}-\u{1D9A}\u{1E00}-\u{1F15}\u{1F18}-\u{1F1D}\u{1F20}-\u{1F45}\u{1F48}-\u{1F4D}",
    r"\u{1F50}-\u{1F57}\u{1F59}\u{1F5B}\u{1F5D}\u{1F5F}-\u{1F7D}\u{1F80}-\u{1FB4}\u{1FB6}-\u{1FBC}\u{1FBE}",
    r"\u{1FC2}-\u{1FC4}\u{1FC6}-\u{1FCC}\u{1FD0}-\u{1FD3}\u{1FD6}-\u{1FDB}\u{1FE0}-\u{1FEC}",
    r"\u{1FF2}-\u{1FF4}\u{1FF6}-\u{1FFC}\u{2102}\u{2107}\u{210A}-\u{2113}\u{2115}\u{2119}-\u{211D}\u{2124}",
    r"\u{2126}\u{2128}\u{212A}-\u{212D}\u{212F}-\u{2134}\u{2139}\u{213C}-\u{213F}\u{2145}-\u{2149}\u{214E}",
    r"\u{2183}\u{2184}\u{2C00}-\u{2C7B}\u{2C7E}-\u{2CE4}\u{2CEB}-\u{2CEE}\u{2CF2}\u{2CF3}\u{A640}-\u{A66D}",
    r"\u{A680}-\u{A69B}\u{A722}-\u{A76F}\u{A771}-\u{A787}\u{A78B}-\u{A78E}\u{AB70}-\u{ABBF}",
    r"\u{FB00}-\u{FB06}\u{FB13}-\u{FB17}\u{FF21}-\u{FF3A}\u{FF41}-\u{FF5A}\u{10400}-\u{1044F}",
    r"\u{104B0}-\u{104D3}\u{104D8}-\u{104FB}\u{10C80}-\u{10CB2}\u{10CC0}-\u{10CF2}\u{118A0}-\u{118DF}",
    r"\u{1E900}-\u{1E943}",
    r"]+"
);

const DEEPSEEK_LLM: &[&str] = &[
    r"[\r\n]",
    CASED,
    r"\s?[!-/:-~\u{FF01}-\u{FF0F}\u{FF1A}-\u{FF5E}\u{2018}-\u{201F}\u{3000}-\u{3002}]+",
    r"\s+$",
    IDEOGRAPHS,
    r"\p{N}",
];

const IDEOGRAPHS: &str = r"[\u{4E00}-\u{9FA5}\u{800}-\u{4E00}\u{AC00}-\u{D7FF}]+";

const DEEPSEEK_CODER: &[&str] = &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", IDEOGRAPHS, r"\p{N}"];

const DEEPSEEK_V3: &[&str] = &[
    r"\p{N}{1,3}",
    r"[\u{4E00}-\u{9FA5}\u{3040}-\u{309F}\u{30A0}-\u{30FF}]+",
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
];

#[cfg(test)]
mod tests;
