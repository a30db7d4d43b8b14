//! Conversations, template variables, end tokens and special tokens, as flags.

use crate::common::{Folder, command, json, printed, refused};
use serde_json::{Value, json};

#[track_caller]
fn contains(message: &str, words: &str) {
    assert!(message.contains(words), "`{words}` is not in `{message}`");
}

const TEMPLATE: &str = "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}\
    {% for m in messages %}<|user|>{{ m.role }}:{{ m.content }}{% endfor %}\
    {% if enable_thinking is defined and not enable_thinking %}!{% endif %}{{ style }}";

/// What a model is given, as text.
fn tokenized(folder: &Folder, flags: &[&str]) -> String {
    let mut tokenize = command(&format!("tokenize --model {} --json", folder.0.path().display()));
    let tokens = json(tokenize.args(flags))["tokens"].clone();
    tokens.as_array().unwrap().iter().map(|token| token.as_str().unwrap().replace('Ġ', " ")).collect()
}

fn with_template() -> Folder {
    let folder = Folder::copy_of("mixtral");
    std::fs::write(folder.path("chat_template.jinja"), TEMPLATE).unwrap();
    folder
}

#[test]
fn conversations_come_from_a_file() {
    let folder = with_template();
    let (list, object) = (folder.text("list.json"), folder.text("object.json"));
    let messages = json!([{ "role": "user", "content": "a" }, { "role": "assistant", "content": "b" }]);
    std::fs::write(&list, messages.to_string()).unwrap();
    assert_eq!(tokenized(&folder, &["--messages", &list]), "<|user|>user:a<|user|>assistant:b");
    let request = json!({
        "messages": messages, "tools": [{ "name": "f" }], "chat_template_kwargs": { "style": "x", "enable_thinking": true },
    });
    std::fs::write(&object, request.to_string()).unwrap();
    let whole = "[f]<|user|>user:a<|user|>assistant:b";
    assert_eq!(tokenized(&folder, &["--messages", &object]), format!("{whole}x"));
    let off = r#"{"enable_thinking": false}"#;
    let flags = ["--messages", object.as_str(), "--chat-template-kwargs", off];
    assert_eq!(tokenized(&folder, &flags), format!("{whole}!x"));
    let chat = ["--prompt", "a", "--chat", "--chat-template-kwargs", off];
    assert_eq!(tokenized(&folder, &chat), "<|user|>user:a!");

    let model = folder.0.path().display().to_string();
    let mut generate = command(&format!("generate --model {model} --messages {list} --max-tokens 2 --json"));
    let prompt = json(&mut command(&format!("tokenize --model {model} --messages {list} --json")));
    assert_eq!(json(&mut generate)["usage"]["prompt_tokens"], prompt["count"]);
    let wrong = |text: &str| {
        std::fs::write(&list, text).unwrap();
        refused(&mut command(&format!("generate --model {model} --messages {list}")))
    };
    contains(&wrong("{"), "list.json is not valid JSON");
    contains(&wrong("3"), "must hold a list of messages");
    contains(&wrong("[]"), "holds no messages: give a list like");
    contains(&wrong("[3]"), "`messages` must be a list of objects");
    contains(&wrong("{\"messages\": [{}], \"tools\": 3}"), "`tools` must be a list of objects");
    let refusal = |flags: &[&str]| refused(command(&format!("generate --model {model}")).args(flags));
    contains(&refusal(&["--messages", "/dev/zero"]), "cannot read /dev/zero: this is not a plain file");
    contains(&refusal(&["--messages", &list, "--prompt", "a"]), "cannot be used with");
    contains(&refusal(&["--prompt", "a", "--chat-template-kwargs", off]), "give --chat or --messages too");
    contains(&refusal(&["--prompt", "a", "--chat", "--chat-template-kwargs", "3"]), "this is no JSON object");
}

/// The answer of a model, which always says the same.
fn answer(folder: &Folder, flags: &str) -> Value {
    let typed =
        format!("generate --model {} --ids 5,6,7 --temperature 0 --json {flags}", folder.0.path().display());
    json(&mut command(&typed))
}

#[test]
fn answers_end_where_they_should() {
    let folder = Folder::copy_of("qwen2_moe");
    let whole = answer(&folder, "--max-tokens 12 --ignore-eos");
    let (ids, text) = (whole["ids"].as_array().unwrap(), whole["text"].as_str().unwrap());
    assert_eq!(whole["finish_reason"], "length");

    // A token that ends the answer is no part of its text.
    let at = (1..ids.len()).find(|&at| !ids[..at].contains(&ids[at])).expect("a second token");
    let stopped = answer(&folder, &format!("--max-tokens 12 --ignore-eos --stop-token-ids {}", ids[at]));
    assert_eq!(stopped["ids"].as_array().unwrap(), &ids[..=at]);
    assert_eq!(stopped["finish_reason"], "stop");
    let before = answer(&folder, &format!("--max-tokens {at} --ignore-eos"));
    assert_eq!(stopped["text"], before["text"]);
    let typed = format!("generate --model {} --ids 5 --stop-token-ids 99999", folder.0.path().display());
    contains(&refused(&mut command(&typed)), "stop_token_ids names 99999");

    // A stop string that the last token allowed completes: the shortest end of the text that is nowhere else.
    let ends = text.char_indices().rev().map(|(from, _)| (from, &text[from..]));
    let (_, stop) = ends.into_iter().find(|&(from, end)| text.find(end) == Some(from)).unwrap();
    let typed = format!(
        "generate --model {} --ids 5,6,7 --temperature 0 --json --max-tokens 12 --ignore-eos",
        folder.0.path().display()
    );
    let stopped = json(command(&typed).args(["--stop", stop]));
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["text"].as_str().unwrap(), &text[..text.len() - stop.len()]);
}

#[test]
fn end_tokens_of_every_file_end_a_text() {
    let folder = Folder::copy_of("qwen2_moe");
    let ids = answer(&folder, "--max-tokens 6 --ignore-eos")["ids"].as_array().unwrap().clone();
    let second = ids[1].as_u64().unwrap();
    let until = ids.iter().position(|id| *id == ids[1]).unwrap() + 1;
    let tokenizer: Value =
        serde_json::from_slice(&std::fs::read(folder.path("tokenizer.json")).unwrap()).unwrap();
    let vocab = tokenizer["model"]["vocab"].as_object().unwrap();
    let added = tokenizer["added_tokens"].as_array().unwrap();
    let name = vocab.iter().find(|(_, id)| id.as_u64() == Some(second)).map(|(name, _)| name.clone());
    let of_added =
        || added.iter().find(|token| token["id"] == second)?["content"].as_str().map(str::to_owned);
    let name = name.or_else(of_added).unwrap();
    for file in ["config.json", "generation_config.json"] {
        let path = folder.path(file);
        let Ok(text) = std::fs::read(&path) else { continue };
        let mut config: Value = serde_json::from_slice(&text).unwrap();
        config.as_object_mut().unwrap().remove("eos_token_id");
        std::fs::write(&path, config.to_string()).unwrap();
    }
    let length = || answer(&folder, "--max-tokens 6")["ids"].as_array().unwrap().len();
    let _ = std::fs::remove_file(folder.path("tokenizer_config.json"));
    assert_eq!(length(), 6, "nothing ends it");
    for (file, text) in [
        ("tokenizer_config.json", json!({ "eos_token": name })),
        ("special_tokens_map.json", json!({ "eos_token": { "content": name } })),
        ("generation_config.json", json!({ "eos_token_id": [99_999, second] })),
        ("generation_config.json", json!({ "eos_token_id": second })),
    ] {
        std::fs::write(folder.path(file), text.to_string()).unwrap();
        assert_eq!(length(), until, "{file} ends it");
        std::fs::remove_file(folder.path(file)).unwrap();
    }
}

#[test]
fn special_tokens_are_shown_if_asked_for() {
    let folder = Folder::copy_of("mixtral");
    let ids = answer(&folder, "--max-tokens 4 --ignore-eos")["ids"].as_array().unwrap().clone();
    // The first token of the answer becomes a special one.
    let path = folder.path("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    let name = tokenizer["model"]["vocab"].as_object().unwrap().iter().find(|(_, id)| **id == ids[0]);
    let content = name.unwrap().0.clone();
    let special = json!({ "id": ids[0], "content": content, "special": true, "normalized": false,
        "single_word": false, "lstrip": false, "rstrip": false });
    tokenizer["added_tokens"].as_array_mut().unwrap().push(special);
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let text = |flags: &str| {
        let answer = answer(&folder, &format!("--max-tokens 4 --ignore-eos {flags}"));
        assert_eq!(answer["ids"].as_array().unwrap(), &ids);
        answer["text"].as_str().unwrap().to_owned()
    };
    let (hidden, shown) = (text(""), text("--skip-special-tokens false"));
    assert!(shown.len() > hidden.len(), "{shown:?} {hidden:?}");
    assert_eq!(text("--skip-special-tokens true"), hidden);
}

#[test]
fn odd_generation_settings_are_warned_of() {
    let folder = Folder::copy_of("mixtral");
    let odd =
        json!({ "top_k": -1, "top_p": "x", "temperature": null, "max_new_tokens": [3], "do_sample": true });
    std::fs::write(folder.path("generation_config.json"), odd.to_string()).unwrap();
    let typed =
        format!("generate --model {} --ids 5,6,7 --max-tokens 3 --ignore-eos", folder.0.path().display());
    let output = command(&typed).output().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{told}");
    let warnings: Vec<&str> = told.lines().filter(|line| line.starts_with("warning: ")).collect();
    assert_eq!(warnings.len(), 2, "{told}");
    for (warning, key) in warnings.iter().zip(["top_p", "max_new_tokens"]) {
        contains(warning, &format!("generation_config.json: `{key}` is "));
    }
    printed(&mut command(&typed));
}
