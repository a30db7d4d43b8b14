//! Weights in codes, and GGUF files, from the command line.

use crate::common::{Folder, command, fixture, json, printed, refused};
use safetensors::SafeTensors;
use std::process::Command;

fn contains(message: &str, part: &str) {
    assert!(message.contains(part), "{message}\nlacks {part}");
}

/// Logits of a few tokens.
fn logits(model: &str, flags: &str) -> Vec<f32> {
    let folder = Folder::new();
    let out = folder.text("logits.safetensors");
    printed(&mut command(&format!("logits --model {model} --ids 5,6,7,300,42 --out {out} {flags}")));
    let bytes = std::fs::read(&out).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let words = file.tensor("logits").unwrap().data().to_vec();
    words.as_chunks().0.iter().map(|&word| f32::from_le_bytes(word)).collect()
}

/// The largest difference.
fn furthest(one: &[f32], other: &[f32]) -> f32 {
    assert_eq!(one.len(), other.len());
    one.iter().zip(other).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn a_gguf_file_is_a_model() {
    let file = fixture("gguf/olmoe.gguf");
    assert!(furthest(&logits(&file, ""), &logits(&fixture("olmoe"), "")) < 1e-3);
    let tokens = |model: &str| {
        printed(
            command(&format!("tokenize --model {model} --json"))
                .args(["--prompt", "Hello, wörld <|user|> 12"]),
        )
    };
    assert_eq!(tokens(&file), tokens(&fixture("olmoe")));
    let chat = |model: &str| {
        let typed =
            format!("generate --model {model} --max-tokens 5 --temperature 0 --json --chat --prompt Hi");
        json(&mut command(&typed))["ids"].clone()
    };
    assert_eq!(chat(&file), chat(&fixture("olmoe")));
    // In a folder of its own, and in parts that the name tells.
    let folder = Folder::new();
    std::fs::copy(&file, folder.path("model-00001-of-00001.gguf")).unwrap();
    assert_eq!(tokens(&folder.text("")), tokens(&file));
    assert_eq!(logits(&folder.text(""), ""), logits(&file, ""));
    std::fs::rename(folder.path("model-00001-of-00001.gguf"), folder.path("model-00001-of-00002.gguf"))
        .unwrap();
    let part = folder.text("model-00001-of-00002.gguf");
    let message = refused(&mut command(&format!("generate --model {part} --ids 5")));
    contains(&message, "model-00002-of-00002.gguf: the file is missing; fetch it");
    // A plan counts what is held: in bfloat16 they would be 53248 and 184320.
    for (model, bytes) in [(fixture("qwen3_moe_mxfp4"), 35584), (fixture("deepseek_v3_fp8"), 112_931)] {
        let plan = printed(&mut command(&format!("plan --model {model} --machine 8xH100 --json")));
        let plan: serde_json::Value = serde_json::from_str(&plan).unwrap();
        assert_eq!(plan["rows"][0]["bytes"]["weights"], bytes, "{model}");
    }
    printed(&mut command(&format!("plan --model {file} --machine 8xH100")));
    contains(&refused(&mut command("generate --model ./none.gguf --ids 5")), "there is no file ./none.gguf");
}

/// A plan takes a model to be held, and multiplied, as its checkpoint or the flags say and the machine can.
#[test]
fn plans_price_what_is_held() {
    let experts = |model: &str, typed: &str| {
        let typed = format!("plan --model {model} {typed} --json");
        let plan: serde_json::Value = serde_json::from_str(&printed(&mut command(&typed))).unwrap();
        let serial = &plan["rows"][0];
        (plan["experts"].as_str().unwrap().to_owned(), serial["layer_ns"].as_u64().unwrap())
    };
    let mini = |typed: &str| experts("preset:mixtral-mini", typed);
    let plain = mini("--machine 8xH200");
    let codes = mini("--machine 8xH200 -q fp8_per_block");
    let rows = mini("--machine 8xH200 -q fp8_per_block --activation-scheme none");
    assert_eq!([&plain.0, &codes.0, &rows.0], ["16 bits", "8.001 bits, multiplied as FP8 codes", "8.5 bits"]);
    assert!(codes.1 < rows.1 && rows.1 <= plain.1, "{codes:?} {rows:?} {plain:?}");
    assert_eq!(mini("--machine 8xA100 -q fp8_per_block").0, "8.5 bits", "a GPU that multiplies no FP8");
    assert_eq!(mini("--machine 8xH200 -q int4").0, "4.5 bits");
    // MXFP4 folds into FP8 blocks.
    assert_eq!(mini("--machine 8xH200 -q mxfp4").0, "4.5 bits");
    assert_eq!(mini("--machine 8xH200 -q mxfp4 --activation-scheme dynamic").0, codes.0);
    let checkpoint = fixture("deepseek_v3_fp8");
    let held = "8.668 bits, multiplied as FP8 codes";
    assert_eq!(experts(&checkpoint, "--machine 8xH200").0, held);
    assert_eq!(experts(&checkpoint, "--machine 8xH200 -q none").0, plain.0);
    // Of a model whose weights are not here the configuration says what they would be.
    let folder = Folder::new();
    std::fs::copy(format!("{checkpoint}/config.json"), folder.path("config.json")).unwrap();
    assert_eq!(experts(&folder.text(""), "--machine 8xH200").0, plain.0);
    assert_eq!(experts(&folder.text(""), "--machine 8xH200 -q fp8_per_block").0, held);
    for (typed, words) in [
        ("--machine 8xA100 --activation-scheme dynamic", "which the GPUs of 8xA100 cannot"),
        (
            "--machine 8xH200 --activation-scheme dynamic",
            "no weights of preset:mixtral-mini that take them are FP8",
        ),
        ("--machine 8xH200 -q fp8", "the weights of preset:mixtral-mini are not quantised"),
    ] {
        contains(&refused(&mut command(&format!("plan --model preset:mixtral-mini {typed}"))), words);
    }
}

#[test]
fn quantization_holds_against_the_checkpoint() {
    let of = |model: &str, method: &str| {
        command(&format!(
            "generate --model {model} --ids 5,6 --max-tokens 2 --temperature 0 --json -q {method}"
        ))
    };
    let fp8 = fixture("deepseek_v3_fp8");
    let ids = json(&mut of(&fp8, "fp8"))["ids"].clone();
    for method in ["auto", "none", "dequantise", "dequantize", "deepseek_v4_fp8"] {
        assert_eq!(json(&mut of(&fp8, method))["ids"], ids, "{method}");
    }
    json(&mut of(&fixture("mixtral_int4"), "compressed-tensors"));
    json(&mut of(&fixture("gguf/olmoe.gguf"), "gguf"));
    // A coding that plain weights are brought into, and what a checkpoint says that is in it.
    for model in [&fixture("mixtral"), "preset:mixtral-mini", &fixture("gpt_oss_mxfp4")] {
        json(&mut of(model, "mxfp4 --dtype bfloat16"));
    }
    contains(&refused(&mut of(&fp8, "mxfp4")), "--quantization says mxfp4, but");
    contains(&refused(&mut of(&fp8, "int4")), "--quantization int4 is for plain weights, but");
    contains(&refused(&mut of(&fp8, "awq")), "--quantization says awq, but");
    contains(&refused(&mut of(&fp8, "awq")), "is quantised with fp8: leave it out");
    contains(&refused(&mut of(&fixture("mixtral"), "gptq")), "are not quantised: leave it out");
    contains(&refused(&mut of("preset:mixtral-mini", "fp8")), "are not quantised: leave it out");
    contains(&refused(&mut of(&fp8, "int3")), "`int3` is not known: write auto, none, fp8");
}

/// Rows in int8 change numbers a little, for ranks in other processes as in this one, and only where there is something to multiply.
#[test]
fn rows_in_int8_are_asked_for() {
    let (model, int8) = (fixture("mixtral_int4"), "--activation-scheme int8");
    let (plain, got) = (logits(&model, ""), logits(&model, int8));
    let scale = plain.iter().fold(0.0f32, |most, logit| most.max(logit.abs()));
    let distance = furthest(&got, &plain) / scale;
    assert!((1e-4..0.1).contains(&distance), "{distance}");
    let ranks = format!("{int8} -dp 2 -ep");
    let processes = logits(&model, &format!("{ranks} --distributed-executor-backend process"));
    assert_eq!(processes, logits(&model, &ranks), "processes, and threads");
    let of = |model: &str, more: &str| command(&format!("generate --model {model} --ids 5 {int8} {more}"));
    contains(&refused(&mut of(&fixture("mixtral"), "")), "are held in four bits or as int8: leave it out");
    contains(
        &refused(&mut of(&fixture("deepseek_v3_fp8"), "")),
        "are held in four bits or as int8: leave it out",
    );
    contains(&refused(&mut of(&model, "--device reference")), "is for CPUs (--device cpu): leave it out");
    let plan = format!("plan --model {model} --machine 8xH100 {int8}");
    contains(&refused(&mut command(&plan)), "is for CPUs (--device cpu): leave it out");
    let bench = "bench --contender serial --batch-size 1 --input-len 1 --output-len 1 --num-iters 1 --data-parallel-size 1";
    let first = printed(&mut command(&format!("{bench} --model {model} {int8}")));
    contains(
        first.lines().next().unwrap(),
        ", activations in int8 where weights are four bits or int8, weights held as",
    );
}

fn convert(model: &str, coding: &str, out: &str) -> String {
    format!("convert --quantization {coding} {model} {out}")
}

/// Each coding is read again, is near to what it was made of, and says so.
#[test]
fn convert_writes_a_checkpoint_that_is_near() {
    let (folder, model) = (Folder::new(), fixture("mixtral"));
    std::fs::write(folder.path("text"), "A text of some words, 1234 of them.\n".repeat(20)).unwrap();
    let plain = logits(&model, "");
    let scale = plain.iter().fold(0.0f32, |most, logit| most.max(logit.abs()));
    let mut divergences = Vec::new();
    for (coding, bound, method) in [
        ("q8_0", 0.02, "compressed-tensors"),
        ("fp8_per_block", 0.4, "fp8"),
        ("int4", 0.4, "compressed-tensors"),
        ("mxfp4", 0.5, "compressed-tensors"),
    ] {
        let out = folder.text(coding);
        printed(&mut command(&convert(&model, coding, &out)));
        let distance = furthest(&logits(&out, &format!("-q {method}")), &plain) / scale;
        assert!(distance > 0.0 && distance < bound, "{coding}: {distance}");
        let eval = format!(
            "eval perplexity {} --model {out} --context 64 --reference {model} --json",
            folder.text("text")
        );
        let report = json(&mut command(&eval));
        let number = |value: &serde_json::Value| value.as_f64().unwrap();
        let reference = &report["reference"];
        divergences.push(number(&reference["kl_divergence"]));
        let ratio = number(&report["perplexity"]) / number(&reference["perplexity"]);
        assert!(
            (0.5..2.0).contains(&ratio) && number(&reference["top_1_agreement"]) > 0.3,
            "{coding}: {report}"
        );
        for file in ["tokenizer.json", "chat_template.jinja", "generation_config.json"] {
            assert!(folder.path(coding).join(file).exists(), "{coding}: {file}");
        }
    }
    assert!(divergences.is_sorted(), "more bits are nearer: {divergences:?}");
    let eval = format!("eval perplexity {} --model {model} --reference {model}", folder.text("text"));
    let same = printed(&mut command(&eval));
    contains(&same, "KL divergence 0.000000 nats");
    contains(&same, "same most likely token 100.00 %");
}

/// Experts that lie on top of each other in one tensor are coded each for itself, along what is summed over.
#[test]
fn convert_codes_experts_on_top_of_each_other() {
    let folder = Folder::new();
    for (name, stem) in [
        ("gpt_oss", "mlp.experts.gate_up_proj"),
        ("llama4_text", "feed_forward.experts.1.gate_proj"),
        ("granitemoeshared", "block_sparse_moe.input_linear"),
        ("qwen3_5_moe", "mlp.experts.gate_up_proj"),
    ] {
        let model = fixture(name);
        let plain = logits(&model, "");
        let scale = plain.iter().fold(0.0f32, |most, logit| most.max(logit.abs()));
        for (coding, bound, ending) in [
            ("q8_0", 0.05, ".weight_packed"),
            ("fp8_per_block", 0.5, "_scale_inv"),
            ("int4", 0.8, ".weight_packed"),
            ("mxfp4", 0.9, ".weight_packed"),
        ] {
            // Groups of 32 must be whole, of experts or of some other map.
            let fits =
                coding == "fp8_per_block" || !["gpt_oss", "granitemoeshared", "llama4_text"].contains(&name);
            let out = folder.text(&format!("{name}-{coding}"));
            if !fits && name != "gpt_oss" {
                contains(&refused(&mut command(&convert(&model, coding, &out))), "no matrix of");
                continue;
            }
            printed(&mut command(&convert(&model, coding, &out)));
            let bytes = std::fs::read(std::path::Path::new(&out).join("model.safetensors")).unwrap();
            let file = SafeTensors::deserialize(&bytes).unwrap();
            let coded =
                file.names().iter().filter(|name| name.contains(stem) && name.ends_with(ending)).count();
            assert_eq!(coded > 0, fits, "{name} as {coding}: {stem}");
            let distance = furthest(&logits(&out, ""), &plain) / scale;
            assert!(distance > 0.0 && distance < bound, "{name} as {coding}: {distance}");
            // What is held in codes means what is decoded.
            if coding == "int4" {
                let whole = logits(&out, "--dtype bfloat16 --quantization none");
                assert_eq!(logits(&out, "--dtype bfloat16"), whole, "{name}: held as it is, and decoded");
            }
        }
    }
}

#[test]
fn an_interrupted_convert_goes_on() {
    let (folder, model) = (Folder::new(), fixture("mixtral"));
    let typed = |out: &str| convert(&model, "int4", &folder.text(out)) + " --max-shard-size 200KB";
    printed(&mut command(&typed("whole")));
    contains(&refused(&mut command(&typed("whole"))), "is not empty: give a new folder");
    let mut limited = Command::new("sh");
    let program = env!("CARGO_BIN_EXE_epsmoe");
    // In blocks of 512 bytes; files above are cut.
    limited.args(["-c", &format!("ulimit -f 100; exec {program} {}", typed("begun"))]);
    assert!(!limited.output().unwrap().status.success());
    assert!(!folder.path("begun/config.json").exists());
    let other = typed("begun").replace("int4", "q8_0");
    contains(&refused(&mut command(&other)), "has the beginning of another checkpoint");
    printed(&mut command(&typed("begun")));
    for entry in folder.path("whole").read_dir().unwrap() {
        let name = entry.unwrap().file_name();
        let [begun, whole] =
            ["begun", "whole"].map(|out| std::fs::read(folder.path(out).join(&name)).unwrap());
        assert!(begun == whole, "{name:?}");
    }
    contains(
        &refused(&mut command(&convert("preset:mixtral-mini", "int4", &folder.text("x")))),
        "has no files",
    );
    let gguf = convert(&fixture("gguf/olmoe.gguf"), "int4", &folder.text("x"));
    contains(&refused(&mut command(&gguf)), "is a GGUF file: give the folder of the model");
    contains(
        &refused(&mut command(&convert(&model, "int5", "x"))),
        "`int5` is not known: write one of fp8_per_block",
    );
}

#[test]
fn texts_that_cannot_be_predicted_are_refused() {
    let folder = Folder::new();
    std::fs::write(folder.path("short"), "a").unwrap();
    let eval = |file: &str| format!("eval perplexity {} --model {}", folder.text(file), fixture("mixtral"));
    contains(&refused(&mut command(&eval("short"))), "of which none can be predicted: give a longer text");
    contains(&refused(&mut command(&eval("none"))), "cannot read");
    std::fs::write(folder.path("text"), "some words ".repeat(9)).unwrap();
    let other = eval("text") + " --reference preset:mixtral-mini";
    contains(&refused(&mut command(&other)), "give a reference with the same vocabulary");
}
