//! What nobody should type, and files that nobody should trust: one clear message, and nothing is taken first.

use crate::common::{Folder, command, fixture, printed, refused};
use serde_json::{Value, json};
use std::time::{Duration, Instant};

#[track_caller]
fn contains(message: &str, words: &str) {
    assert!(message.contains(words), "`{words}` is not in `{message}`");
}

/// A fixture whose config.json has other keys.
fn with_config(name: &str, keys: &Value) -> Folder {
    let folder = Folder::copy_of(name);
    let text = std::fs::read(folder.path("config.json")).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    config.as_object_mut().unwrap().extend(keys.as_object().unwrap().clone());
    std::fs::write(folder.path("config.json"), config.to_string()).unwrap();
    folder
}

/// Standard output and standard error of a success.
#[track_caller]
fn said(typed: &str) -> (String, String) {
    let output = command(typed).output().unwrap();
    let (out, err) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
    assert!(output.status.success(), "{typed}: {err}");
    (out, err)
}

#[test]
fn sizes_are_looked_at_before_memory_is_taken() {
    let begun = Instant::now();
    let model = fixture("mixtral");
    let small = "bench --model preset:mixtral-mini --num-iters 1";
    for (typed, words) in [
        (
            format!("{small} --batch-size 65536 --input-len 1048576"),
            "maximum context length is 32768 tokens".to_owned(),
        ),
        (
            format!("{small} --batch-size 65536 --input-len 32000"),
            "use a smaller model, shorter contexts or fewer sequences".into(),
        ),
        (
            format!("generate --model {model} --ids 5 -dp 1024 -tp 1024"),
            "are 1048576 ranks: at most 1024".into(),
        ),
        (format!("generate --model {model} --ids 5 -dp 8 -tp 128"), "more than the 8 attention heads".into()),
        (format!("bench --model {model} --ablation -tp 16 -dp 1"), "more than the 8 attention heads".into()),
    ] {
        let message = refused(&mut command(&typed));
        contains(&message, &words);
    }
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
}

#[test]
fn minus_one_is_what_the_ecosystem_means() {
    let model = fixture("mixtral");
    let generate = |flags: &str| {
        let typed = format!("generate --model {model} --ids 5,6,7 --ignore-eos --json {flags}");
        serde_json::from_str::<Value>(&printed(&mut command(&typed))).unwrap()["ids"]
            .as_array()
            .unwrap()
            .len()
    };
    assert_eq!(generate("--top-k -1 --max-tokens 3"), 3);
    assert_eq!(generate("--top_k=-1 --max_tokens 3 --seed 1"), 3);
    assert_eq!(generate("--max-tokens -1 --max-model-len 40"), 37);
    let refusal = |flags: &str| refused(&mut command(&format!("generate --model {model} --ids 5 {flags}")));
    contains(&refusal("--top-k -2"), "'--top-k <NUMBER>': must be a whole number of tokens, or 0 or -1");
    contains(&refusal("--max-tokens -2"), "'--max-tokens <NUMBER>': must be a whole number of tokens, or -1");
    contains(&refusal("--max-tokens x"), "--max-tokens");
}

#[test]
fn configurations_are_read_as_the_ecosystem_reads_them() {
    let odd = json!({
        "quantization_config": { "quant_method": "fp8", "weight_block_size": [128, 128] },
        "torch_dtype": "float8_e4m3fn",
        "eos_token_id": [1, 999],
    });
    let folder = with_config("mixtral", &odd);
    let text = std::fs::read_to_string(folder.path("config.json")).unwrap();
    let text = text.replacen('{', "{\"unused\": Infinity, \"other\": NaN,", 1);
    std::fs::write(folder.path("config.json"), text).unwrap();
    let place = folder.0.path().display();
    let (plain, _) = said(&format!("generate --model {} --ids 5,6,7 --max-tokens 4", fixture("mixtral")));
    let (ids, warnings) = said(&format!("generate --model {place} --ids 5,6,7 --max-tokens 4"));
    assert_eq!(ids, plain);
    for words in
        ["warning: ", "`torch_dtype` is \"float8_e4m3fn\", which is ignored", "`eos_token_id` has 999"]
    {
        contains(&warnings, words);
    }
    // Nobody needs weights to plan with.
    std::fs::remove_file(folder.path("model.safetensors.index.json")).unwrap();
    let (plan, _) = said(&format!("plan --model {place} --machine 4xH800"));
    contains(&plan, "<- best");
    let yarn = json!({ "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768 } });
    let folder = with_config("qwen3_moe", &yarn);
    let typed =
        format!("generate --model {} --ids 5 --max-tokens 1 --max-model-len", folder.0.path().display());
    printed(&mut command(&format!("{typed} 131072")));
    contains(&refused(&mut command(&format!("{typed} 131073"))), "this model was made for 131072 positions");
}

#[test]
fn folders_are_loaded_or_say_what_they_have() {
    let folder = Folder::copy_of("qwen3_moe");
    let place = folder.0.path().display().to_string();
    let typed = format!("generate --model {place} --ids 5,6,7 --max-tokens 4");
    let plain = printed(&mut command(&typed));
    let (from, to) = (folder.path("model.safetensors"), folder.path("model-00001-of-00001.safetensors"));
    std::fs::rename(from, &to).unwrap();
    assert_eq!(printed(&mut command(&typed)), plain);
    std::fs::remove_file(to).unwrap();
    std::fs::remove_file(folder.path("expected.safetensors")).unwrap();
    std::fs::write(folder.path("pytorch_model.bin"), "PK").unwrap();
    contains(
        &refused(&mut command(&typed)),
        "`pytorch_model.bin` is not read: convert it to safetensors first",
    );
    std::fs::remove_file(folder.path("config.json")).unwrap();
    contains(&refused(&mut command(&typed)), "there is no config.json; `pytorch_model.bin` is not read");
    std::fs::write(folder.path("model.Q4.gguf"), "GGUF").unwrap();
    contains(&refused(&mut command(&typed)), "model.Q4.gguf: the version takes 4 bytes");
    let file = format!("generate --model {place}/model.Q4.gguf --ids 5");
    contains(&refused(&mut command(&file)), "model.Q4.gguf: the version takes 4 bytes");
}

#[test]
fn what_files_hold_does_not_reach_the_terminal() {
    let escape = "\u{1b}[31m";
    let architecture = json!({ "architectures": [format!("{escape}Evil")] });
    let folder = with_config("mixtral", &architecture);
    let message = refused(&mut command(&format!("generate --model {} --ids 5", folder.0.path().display())));
    contains(&message, "architecture `\\u{1b}[31mEvil` is not supported");
    let long = json!({ "architectures": ["x".repeat(1 << 20)] });
    let folder = with_config("mixtral", &long);
    let message = refused(&mut command(&format!("generate --model {} --ids 5", folder.0.path().display())));
    assert!(message.len() < 1000, "{} bytes", message.len());
    let index = json!({ "weight_map": { "a": format!("{escape}../x") } });
    let folder = Folder::copy_of("mixtral");
    std::fs::write(folder.path("model.safetensors.index.json"), index.to_string()).unwrap();
    let message = refused(&mut command(&format!("generate --model {} --ids 5", folder.0.path().display())));
    assert!(!message.contains('\u{1b}'), "{message}");
    let mut tokenize = command(&format!("tokenize --model {}", fixture("mixtral")));
    let tokens = printed(tokenize.args(["--prompt", "a\u{1b}[2Jb\n\u{9b}"]));
    assert!(!tokens.contains(['\u{1b}', '\u{9b}']), "{tokens:?}");
    let mut tokenize = command(&format!("tokenize --json --model {}", fixture("mixtral")));
    let json = printed(tokenize.args(["--prompt", "a\u{1b}[2Jb\n\u{9b}"]));
    assert!(!json.contains(['\u{1b}', '\u{9b}']), "{json:?}");
}
