//! What is done with bytes that nobody has to trust: a file of a checkpoint is read, and what came of it is used.
//! Nothing may panic, overflow, or take forever, and an error names the file.
//!
//! The fuzz targets call these functions, and so does a test (`crates/cli/tests/untrusted`).

mod quant;

pub use quant::{gguf, quantisation_config, quantised};

use epsmoe_base::DType;
use epsmoe_model::checkpoint::{Header, Index};
use epsmoe_model::config;
use epsmoe_text::{ChatTemplate, GenerationConfig, RenderRequest, SpecialTokens, Tokenizer};
use serde_json::json;
use std::fmt::Display;
use std::io::{Error, ErrorKind};
use std::path::Path;

/// The name that the bytes go by.
const FILE: &str = "untrusted.file";

fn path() -> &'static Path {
    Path::new(FILE)
}

/// What was read, or nothing after an error that names the file.
fn read<T, E: Display>(result: Result<T, E>) -> Option<T> {
    result.inspect_err(|error| assert!(error.to_string().contains(FILE), "{error}")).ok()
}

/// `config.json`.
pub fn config(bytes: &[u8]) {
    let Some(spec) = read(config::parse(bytes, FILE)) else { return };
    assert!(spec.parameters().active <= spec.parameters().total);
    assert!(spec.cache_bytes_per_token(DType::F32, 1) > 0);
}

/// `model.safetensors.index.json`.
pub fn weights_index(bytes: &[u8]) {
    let Some(index) = read(Index::parse(bytes, path())) else { return };
    assert!(index.shards().all(|shard| !shard.contains('/') && shard != ".."));
}

/// A safetensors file.
pub fn safetensors_header(bytes: &[u8]) {
    let length = bytes.len() as u64;
    let fill = |into: &mut [u8], at: u64| {
        let from = bytes.get(at as usize..).and_then(|rest| rest.get(..into.len()));
        into.copy_from_slice(from.ok_or(Error::from(ErrorKind::UnexpectedEof))?);
        Ok(())
    };
    let Some(header) = read(Header::read(path(), length, fill)) else { return };
    assert!(header.ranges().all(|(_, range)| range.start <= range.end && range.end <= length));
}

/// `tokenizer.json`.
pub fn tokenizer(bytes: &[u8]) {
    let Some(tokenizer) = read(Tokenizer::parse(bytes, path(), &SpecialTokens::default())) else { return };
    let text = "Héllo <s> wörld\u{1f642}\n\t 1234";
    for ids in [tokenizer.encode(text), tokenizer.encode_special(text)].into_iter().flatten() {
        // Either may fail, but neither may panic.
        let _ = tokenizer.decode(&ids, true);
        ids.iter().for_each(|&id| drop(tokenizer.token(id)));
    }
}

/// `tokenizer_config.json`, with the chat template in it.
pub fn tokenizer_config(bytes: &[u8]) {
    if let Some(Some(template)) = read(ChatTemplate::parse((bytes, path()), None)) {
        converse(&template);
    }
}

/// `chat_template.jinja`.
pub fn chat_template(bytes: &[u8]) {
    let Ok(source) = std::str::from_utf8(bytes) else { return };
    let config = br#"{"bos_token": "<s>", "eos_token": {"content": "</s>"}}"#;
    let template = ChatTemplate::parse((config, path()), Some((source.to_owned(), path())));
    converse(&read(template).flatten().expect("a template, not yet understood"));
}

fn converse(template: &ChatTemplate) {
    let message = |role: &str, content: &str| json!({ "role": role, "content": content });
    let messages =
        [message("system", "Be."), message("user", "Hi\n"), message("assistant", ""), message("user", "é?")];
    for messages in [&messages[..0], &messages[1..2], &messages] {
        read(template.render(&RenderRequest {
            messages,
            add_generation_prompt: true,
            ..RenderRequest::default()
        }));
    }
}

/// `generation_config.json`.
pub fn generation_config(bytes: &[u8]) {
    let Some(config) = read(GenerationConfig::parse(bytes, path())) else { return };
    config.sampling();
    config.eos();
}
