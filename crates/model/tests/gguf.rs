//! GGUF files: a model in the names and the order of that format is the model that it was.
#![expect(clippy::unwrap_used, reason = "helpers of tests may panic")]

use epsmoe_base::DType;
use epsmoe_model::config::Config;
use epsmoe_model::{Checkpoint, ModelSpec, TensorNames, WeightSource, Window, config};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use tempfile::TempDir;

#[expect(dead_code, reason = "shared with other tests")]
#[path = "../../quant/tests/support/gguf.rs"]
mod gguf;
use gguf::{Builder, kv};

/// The tensors of a fixture under GGUF's names: format, dimensions fastest first, bytes.
fn tensors(spec: &ModelSpec, plain: &Checkpoint) -> BTreeMap<String, (u32, Vec<u64>, Vec<u8>)> {
    let renamed = ModelSpec { naming: TensorNames::Gguf, ..spec.clone() };
    let mut tensors = BTreeMap::new();
    for part in spec.parts() {
        let to = renamed.locate(part).sources[0].clone();
        let tensor = plain.read(&spec.locate(part), &Window::whole()).unwrap();
        let format = if tensor.dtype == DType::BF16 { 30 } else { 0 };
        let row = tensor.dtype.bytes() * tensor.shape.get(1).copied().unwrap_or(1);
        let size = tensor.dtype.bytes() * to.shape.iter().product::<usize>();
        let dimensions = to.shape.iter().rev().map(|&width| width as u64).collect();
        let (_, _, bytes) = tensors.entry(to.name).or_insert((format, dimensions, vec![0; size]));
        bytes[to.first_row * row..][..tensor.bytes.len()].copy_from_slice(&tensor.bytes);
    }
    tensors
}

fn whole(name: &str, value: usize) -> Vec<u8> {
    kv::whole(&format!("qwen3moe.{name}"), value as u32)
}

#[test]
fn a_file_is_the_model_that_it_was_made_of() {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/qwen3_moe_merged");
    let (spec, plain) = (config::read(&fixture).unwrap(), Checkpoint::open(&fixture).unwrap());
    let tokens: Vec<String> = (0..spec.vocab).map(|id| format!("t{id}")).collect();
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let mut file = Builder::new("qwen3moe")
        .key(whole("embedding_length", 32))
        .key(whole("block_count", 2))
        .key(whole("context_length", 40960))
        .key(whole("attention.head_count", 4))
        .key(whole("attention.head_count_kv", 2))
        .key(whole("attention.key_length", 16))
        .key(whole("expert_count", 12))
        .key(whole("expert_used_count", 4))
        .key(whole("feed_forward_length", 48))
        .key(whole("expert_feed_forward_length", 20))
        .key(kv::number("qwen3moe.attention.layer_norm_rms_epsilon", 1e-6))
        .key(kv::number("qwen3moe.rope.freq_base", 1e6))
        .key(kv::texts("tokenizer.ggml.tokens", &tokens))
        .key(kv::whole("tokenizer.ggml.bos_token_id", 0))
        .key(kv::whole("tokenizer.ggml.eos_token_id", 1));
    for (name, (format, dimensions, bytes)) in tensors(&spec, &plain) {
        file = file.tensor(&name, format, &dimensions, &bytes);
    }
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.gguf");
    fs::write(&path, file.bytes()).unwrap();
    for place in [path.as_path(), folder.path()] {
        let read = Config::read(place).unwrap().spec;
        assert_eq!(ModelSpec { naming: spec.naming, ..read.clone() }, spec);
        let checkpoint = Checkpoint::open(place).unwrap();
        assert_eq!(checkpoint.check(&read).unwrap(), None);
        for part in spec.parts() {
            let got = checkpoint.read(&read.locate(part), &Window::whole()).unwrap();
            assert_eq!(got, plain.read(&spec.locate(part), &Window::whole()).unwrap(), "{part:?}");
        }
    }
}
