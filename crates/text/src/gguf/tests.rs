use super::*;
use crate::{ChatTemplate, RenderRequest, SpecialTokens};
use std::path::PathBuf;
use tempfile::TempDir;

#[expect(dead_code, reason = "shared with other tests")]
#[path = "../../../quant/tests/support/gguf.rs"]
mod builder;
use builder::{Builder, kv};

fn key(name: &str) -> String {
    format!("tokenizer.ggml.{name}")
}

fn tokens(builder: Builder, tokens: &[(&str, f32, i32)]) -> Builder {
    let names: Vec<&str> = tokens.iter().map(|token| token.0).collect();
    let scores: Vec<u8> = tokens.iter().flat_map(|token| token.1.to_le_bytes()).collect();
    let kinds: Vec<u8> = tokens.iter().flat_map(|token| token.2.to_le_bytes()).collect();
    let count = tokens.len() as u64;
    builder
        .key(kv::texts(&key("tokens"), &names))
        .key(kv::list(&key("scores"), 6, count, &scores))
        .key(kv::list(&key("token_type"), 5, count, &kinds))
}

/// A file in a folder that is gone after the test.
fn file(builder: Builder) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::write(&path, builder.bytes()).unwrap();
    (folder, path)
}

fn opened(builder: Builder) -> Result<crate::Tokenizer, TextError> {
    let (_folder, path) = file(builder);
    crate::Tokenizer::open(&path).map(|tokenizer| tokenizer.expect("a vocabulary"))
}

/// The tokenizer of a fixture, as a converter writes it.
fn fixture() -> (crate::Tokenizer, Builder) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/mixtral");
    let published = crate::Tokenizer::open(&folder).unwrap().unwrap();
    let text: Value = serde_json::from_slice(&std::fs::read(folder.join("tokenizer.json")).unwrap()).unwrap();
    let names: Vec<String> =
        (0..published.vocab_size()).map(|id| published.token(id as u32).unwrap()).collect();
    let all: Vec<_> =
        names.iter().enumerate().map(|(id, name)| (name.as_str(), 0.0, if id < 4 { 3 } else { 1 })).collect();
    let merges = text["model"]["merges"].as_array().unwrap().iter();
    let merges: Vec<String> =
        merges.map(|pair| format!("{} {}", pair[0].as_str().unwrap(), pair[1].as_str().unwrap())).collect();
    let merges: Vec<&str> = merges.iter().map(String::as_str).collect();
    let builder = tokens(Builder::new("llama"), &all)
        .key(kv::text(&key("model"), "gpt2"))
        .key(kv::text(&key("pre"), "gpt-2"))
        .key(kv::texts(&key("merges"), &merges))
        .key(kv::whole(&key("bos_token_id"), 0))
        .key(kv::whole(&key("eos_token_id"), 1));
    (published, builder)
}

const TEXTS: [&str; 6] = [
    "Hello, world!",
    "It's 1234 o'clock\r\n\n  and\tso on   ",
    "naïve 日本語 🙂",
    "<s>x</s><|user|>",
    "",
    "    return [x for x in y]",
];

#[test]
fn byte_level_tokens_are_those_of_the_tokenizer_that_was_converted() {
    let (published, builder) = fixture();
    let read = opened(builder).unwrap();
    for text in TEXTS {
        let ids = published.encode_special(text).unwrap();
        assert_eq!(read.encode_special(text).unwrap(), ids, "{text}");
        for skip in [false, true] {
            assert_eq!(read.decode(&ids, skip).unwrap(), published.decode(&ids, skip).unwrap());
        }
    }
    assert_eq!(read.eos(), Some(1));
    assert!(read.is_special(3) && !read.is_special(4));
    let with_bos = opened(fixture().1.key(kv::flag(&key("add_bos_token"), true))).unwrap();
    assert_eq!(with_bos.encode_special("a").unwrap()[0], 0);
    assert_eq!(with_bos.encode("a").unwrap(), published.encode("a").unwrap());
}

/// Every rule that has a name is one that the library takes, and cuts digits as its models want them.
#[test]
fn words_are_cut_as_named() {
    let digits = [
        ("gpt-2", 1),
        ("llama-bpe", 2),
        ("qwen2", 4),
        ("deepseek-llm", 4),
        ("deepseek-v3", 2),
        ("deepseek-coder", 4),
        ("gpt-4o", 2),
        ("tekken", 4),
        ("command-r", 4),
        ("dbrx", 2),
    ];
    for (name, words) in digits {
        let all = [
            ("1", 0.0, 1),
            ("2", 0.0, 1),
            ("3", 0.0, 1),
            ("4", 0.0, 1),
            ("12", 0.0, 1),
            ("123", 0.0, 1),
            ("1234", 0.0, 1),
        ];
        let builder = tokens(Builder::new("llama"), &all)
            .key(kv::text(&key("model"), "gpt2"))
            .key(kv::text(&key("pre"), name))
            .key(kv::texts(&key("merges"), &["1 2", "12 3", "123 4"]));
        assert_eq!(opened(builder).unwrap().encode("1234").unwrap().len(), words, "{name}");
    }
}

/// A SentencePiece vocabulary with all bytes.
fn pieces() -> Builder {
    let mut all = vec![("<unk>".to_owned(), 0.0, 2), ("<s>".to_owned(), 0.0, 3), ("</s>".to_owned(), 0.0, 3)];
    all.extend((0..256).map(|byte| (format!("<0x{byte:02X}>"), 0.0, 6)));
    let words = ["▁", "h", "e", "l", "o", "he", "ll", "hell", "lo", "hello", "▁hello", "el", "▁h", "ello"];
    let scores = [-20.0, -21.0, -22.0, -23.0, -24.0, -2.0, -3.0, -4.0, -1.0, -5.0, -6.0, -9.0, -8.0, -7.0];
    all.extend(words.iter().zip(scores).map(|(word, score)| ((*word).to_owned(), score, 1)));
    all.push(("<|turn|>".to_owned(), -30.0, 4));
    let all: Vec<_> = all.iter().map(|(word, score, kind)| (word.as_str(), *score, *kind)).collect();
    tokens(Builder::new("llama"), &all).key(kv::text(&key("model"), "llama"))
}

#[test]
fn sentence_pieces_become_one_by_their_scores() {
    let tokenizer = opened(pieces()).unwrap();
    let words = |text: &str| -> Vec<String> {
        tokenizer.encode_special(text).unwrap().into_iter().map(|id| tokenizer.token(id).unwrap()).collect()
    };
    // `lo` is best, then `he`; `hel` is no token, and so neither `hell` nor `hello` come about.
    assert_eq!(words("hello"), ["<s>", "▁", "he", "l", "lo"]);
    assert_eq!(words("é"), ["<s>", "▁", "<0xC3>", "<0xA9>"]);
    assert_eq!(words("<|turn|>")[1..], ["<|turn|>"]);
    for text in ["hello hello", "é 🙂  x", " o"] {
        let ids = tokenizer.encode_special(text).unwrap();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    }
    let bare = opened(
        pieces().key(kv::flag(&key("add_space_prefix"), false)).key(kv::flag(&key("add_bos_token"), false)),
    );
    let bare = bare.unwrap();
    let ids = bare.encode_special("lo").unwrap();
    assert_eq!(ids.iter().map(|&id| bare.token(id).unwrap()).collect::<Vec<_>>(), ["lo"]);
    assert_eq!(bare.decode(&ids, true).unwrap(), "lo");
}

#[test]
fn the_likeliest_cut_is_taken_of_unigrams() {
    let all = [("<unk>", 0.0, 2), ("▁a", -1.0, 1), ("b", -1.0, 1), ("▁ab", -1.5, 1), ("▁", -5.0, 1)];
    let builder = tokens(Builder::new("llama"), &all).key(kv::text(&key("model"), "t5"));
    let tokenizer = opened(builder).unwrap();
    assert_eq!(tokenizer.encode("ab a").unwrap(), [3, 1]);
    assert_eq!(tokenizer.decode(&[3, 1], true).unwrap(), "ab a");
}

#[test]
fn templates_and_names_come_from_the_header() {
    let builder = fixture()
        .1
        .key(kv::text("tokenizer.chat_template", "{{ bos_token }}{{ messages[0].content }}"))
        .key(kv::texts("tokenizer.chat_templates", &["tool_use"]))
        .key(kv::text("tokenizer.chat_template.tool_use", "{{ tools[0].name }}"));
    let (_folder, path) = file(builder);
    assert_eq!(SpecialTokens::open(&path).unwrap().get("eos_token"), Some("</s>"));
    let template = ChatTemplate::open(&path).unwrap().unwrap();
    let messages = [json!({ "role": "user", "content": "Hi" })];
    let request = RenderRequest { messages: &messages, ..RenderRequest::default() };
    assert_eq!(template.render(&request).unwrap(), "<s>Hi");
    let tools = [json!({ "name": "f" })];
    assert_eq!(template.render(&RenderRequest { tools: Some(&tools), ..request }).unwrap(), "f");
}

#[test]
fn what_is_not_known_is_refused_in_a_sentence() {
    let refused = |builder: Builder| match opened(builder) {
        Ok(_) => panic!("it was read"),
        Err(error) => error.to_string(),
    };
    let bert = tokens(Builder::new("llama"), &[("a", 0.0, 1)]).key(kv::text(&key("model"), "bert"));
    let message = refused(bert);
    assert!(
        message.contains("model.gguf: its tokenizer is of the kind `bert`, which is not read"),
        "{message}"
    );
    let strange = tokens(Builder::new("llama"), &[("a", 0.0, 1)])
        .key(kv::text(&key("model"), "gpt2"))
        .key(kv::text(&key("pre"), "strange"));
    let message = refused(strange);
    assert!(
        message.contains("its tokenizer cuts words by the rule `strange`, which is not known"),
        "{message}"
    );
    let (_folder, path) = file(Builder::new("llama"));
    assert!(crate::Tokenizer::open(&path).unwrap().is_none());
    assert!(ChatTemplate::open(&path).unwrap().is_none());
    std::fs::write(&path, "GGUF").unwrap();
    assert!(crate::Tokenizer::open(&path).is_err());
}
