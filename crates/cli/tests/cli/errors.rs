//! What can go wrong, and what the user reads then.

use crate::common::{Folder, command, fixture, printed, refused};

/// The message for flags after `generate --model FIXTURE`.
fn generate(flags: &str) -> String {
    refused(&mut command(&format!("generate --model {} {flags}", fixture("mixtral"))))
}

fn check(message: &str, want: &str) {
    assert!(message.contains(want), "`{want}` is not in `{message}`");
}

#[test]
fn models_that_are_not_there() {
    let model = |model: &str| refused(&mut command(&format!("generate --model {model} --ids 5")));
    assert_eq!(
        model("./nowhere"),
        "there is no folder ./nowhere: give a folder, a GGUF file, preset:NAME, or org/name of a model in the Hugging Face cache"
    );
    assert_eq!(
        model("mixtral-mini"),
        "there is no folder mixtral-mini: for the preset, write preset:mixtral-mini"
    );
    check(&model("preset:gpt"), "there is no preset `gpt`; there are: deepseek-v2-mini");
    check(&model(&format!("{}/config.json", fixture("mixtral"))), "is neither a folder nor a GGUF file");
    let empty = Folder::new();
    check(
        &model(empty.0.path().to_str().unwrap()),
        "there is no config.json; name the folder of a model, or fetch it again",
    );
    std::fs::write(empty.path("config.json"), r#"{"architectures": ["LlamaForCausalLM"]}"#).unwrap();
    check(
        &model(empty.0.path().to_str().unwrap()),
        "`LlamaForCausalLM` is not supported; supported are Mixtral",
    );
    check(&refused(&mut command("generate --ids 5")), "--model <MODEL>");
}

#[test]
fn models_that_are_damaged() {
    let spoiled = |file: &str, text: &[u8]| {
        let folder = Folder::copy_of("mixtral_f16");
        std::fs::write(folder.path(file), text).unwrap();
        refused(&mut command(&format!("generate --model {} --prompt Hi --chat", folder.0.path().display())))
    };
    check(&spoiled("config.json", b"{"), "config.json: this is not valid JSON");
    check(&spoiled("config.json", "[".repeat(1 << 20).as_bytes()), "config.json: this is not valid JSON");
    check(&spoiled("model.safetensors", b"12"), "damaged or incomplete");
    check(&spoiled("model.safetensors", &[255; 64]), "damaged or incomplete");
    check(&spoiled("tokenizer.json", b"{}"), "cannot be read as a tokenizer");
    check(&spoiled("tokenizer_config.json", b"{"), "tokenizer_config.json: cannot be read");
    check(&spoiled("generation_config.json", b"{"), "generation_config.json: cannot be read");
    let endless = b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}";
    check(&spoiled("chat_template.jinja", endless), "does more than a chat template needs");
    check(
        &spoiled("chat_template.jinja", b"{{ raise_exception('no') }}"),
        "the template refuses this conversation: no",
    );
    check(&spoiled("chat_template.jinja", b"\xff"), "chat_template.jinja: this is not UTF-8 text");
}

#[test]
fn prompts_that_cannot_be_run() {
    assert_eq!(generate("--ids 5,320"), "prompt token 1 is 320, but the vocabulary ends at 319");
    assert_eq!(
        refused(command(&format!("generate --model {}", fixture("mixtral"))).args(["--ids", ""])),
        "the prompt is empty: give at least one token"
    );
    check(&generate("--ids 5,x"), "`x` is not a token id: write ids like 5,6,7");
    check(&generate("--ids 5,-1"), "`-1` is not a token id");
    check(&generate("--max-tokens 3"), "--ids <IDS>");
    check(&generate("--ids 5 --chat"), "cannot be used with");
    assert_eq!(
        generate("--ids 5 --max-tokens 5000"),
        "This model's maximum context length is 4096 tokens. However, 5001 were asked for: 1 in the prompt and 5000 to \
         generate. Shorten either, or raise --max-model-len if the model allows it"
    );
    check(&generate("--ids 5 --max-tokens 18446744073709551615"), "maximum context length is 4096");
    check(
        &generate("--ids 5 --max-model-len 5000"),
        "--max-model-len is 5000, but this model was made for 4096",
    );
    check(&generate("--ids 5,6,7 --max-model-len 2"), "maximum context length is 2 tokens");
    let preset = refused(&mut command("generate --model preset:mixtral-mini --prompt Hi"));
    assert_eq!(preset, "preset:mixtral-mini has no tokenizer: give the prompt as --ids");
    check(&refused(&mut command("generate --model preset:mixtral-mini --ids 5 --stop x")), "no tokenizer");
    let bare = Folder::copy_of("mixtral_f16");
    std::fs::remove_file(bare.path("chat_template.jinja")).unwrap();
    let chat =
        refused(&mut command(&format!("generate --model {} --prompt Hi --chat", bare.0.path().display())));
    check(&chat, "has no chat template: leave out --chat");
}

#[test]
fn flags_that_are_impossible() {
    let with = |flags: &str| generate(&format!("--ids 5 {flags}"));
    assert_eq!(with("--stages 9 -ep"), "9 stages for 8 experts on a rank: use 1 to 8 stages");
    check(&with("--stages 0"), "`0` is not a number of stages: write how many stages, like 4");
    check(&with("--stages 3,4"), "add up to 7");
    check(
        &with("--schedule serial --stages 4"),
        "the serial schedule has one stage, but stages 4 was asked for",
    );
    check(
        &with("--schedule auto --stages 4"),
        "the auto schedule decides this itself, but stages 4 was asked for",
    );
    check(&with("--schedule fast"), "[possible values: serial, staged, auto, two-batch]");
    check(&with("--transfer-order d0"), "c0 0 times");
    check(&with("--transfer-order x"), "write d or c and a stage, like d0 d1 c0 c1");
    check(&with("-dp 9 -ep"), "9 expert-parallel ranks for 8 experts: use 1 to 8 ranks");
    check(&with("-tp 9"), "8");
    check(&with("-tp 1024 -dp 1024"), ":");
    check(&with("-dp 0"), "must be a whole number from 1 to 1024");
    check(&with("--threads 99999"), "must be a whole number from 1 to 1024");
    check(&with("--max-num-seqs x"), "must be a whole number from 1 to 65536");
    check(&with("--timeout 0"), "must be a number of seconds");
    check(&with("--temperature -1"), "temperature is -1, but must be a number of at least 0");
    check(&with("--top-p 1.5"), "top_p is 1.5, but must be above 0 and at most 1");
    check(&with("--isa sse"), "use scalar, avx2, avx512 or amx");
    check(&with("--speed 3"), "unexpected argument '--speed'");
    check(&with("--dtype int4"), "[possible values: auto, float32, bfloat16]");
    let huge = refused(&mut command("generate --model preset:deepseek-v3 --ids 5"));
    check(&huge, "use a smaller model, shorter contexts or fewer sequences");
}

#[test]
fn waits_end() {
    let late = generate("--ids 5,6,7 --max-tokens 2 -dp 2 -ep --timeout 0.000001");
    check(&late, "rank ");
    for flags in ["-tp 2", "-tp 2 -ep", "-dp 2"] {
        check(&generate(&format!("--ids 5,6,7 --max-tokens 2 {flags} --timeout 0.000001")), "rank ");
    }
}

#[test]
fn places_that_cannot_be_written() {
    let logits = |out: &str| {
        refused(&mut command(&format!("logits --model {} --ids 5 --out {out}", fixture("mixtral"))))
    };
    assert_eq!(logits("/nowhere/x"), "cannot write /nowhere/x: No such file or directory (os error 2)");
    let folder = Folder::new();
    let there = folder.text("");
    assert_eq!(logits(&there), format!("cannot write {there}: is a directory"));
    check(&logits("/proc/x"), "cannot write /proc/x: ");
    check(&logits("/dev/null/x"), "cannot write /dev/null/x: ");
    assert_eq!(logits("/dev/full"), "cannot write /dev/full: No space left on device (os error 28)");
    let synth = |out: &str| refused(&mut command(&format!("synth --preset mixtral-mini --out {out}")));
    check(&synth("/proc/x"), "cannot make the folder /proc/x: ");
    std::fs::write(folder.path("something"), "").unwrap();
    check(&synth(&folder.text("")), "is not empty: give a new folder");
    assert_eq!(std::fs::read_dir(folder.0.path()).unwrap().count(), 1, "nothing is left behind");
    let config = refused(&mut command(&format!("synth --config /dev/zero --out {}", folder.text("new"))));
    check(&config, "/dev/zero is not a config.json");
    check(
        &refused(&mut command("synth --preset mixtral-mini --out x --max-shard-size 0")),
        "write it like 5GB",
    );
}

#[test]
fn a_closed_pipe_is_no_error() {
    let mut child = command("completions bash");
    child.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped());
    let mut child = child.spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty());
    printed(&mut command("--version"));
}
