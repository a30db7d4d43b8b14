//! Every command once, as a user types it.

use crate::common::{Folder, command, fixture, json, printed, refused};
use safetensors::SafeTensors;
use serde_json::{Value, json};

/// Reference prompts, logits and continuations of a fixture.
struct Expected(Vec<u8>);

impl Expected {
    fn of(name: &str) -> Self {
        Expected(std::fs::read(format!("{}/expected.safetensors", fixture(name))).unwrap())
    }

    fn ids(&self, name: &str) -> Vec<u32> {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let words = tensors.tensor(name).unwrap().data().chunks_exact(8);
        words.map(|word| i64::from_le_bytes(word.try_into().unwrap()) as u32).collect()
    }

    fn logits(&self, name: &str) -> Vec<f32> {
        floats(&self.0, name).1
    }
}

fn floats(file: &[u8], name: &str) -> (Vec<usize>, Vec<f32>) {
    let tensors = SafeTensors::deserialize(file).unwrap();
    let tensor = tensors.tensor(name).unwrap();
    let words = tensor.data().chunks_exact(4);
    (tensor.shape().to_vec(), words.map(|word| f32::from_le_bytes(word.try_into().unwrap())).collect())
}

fn words(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

#[test]
fn logits_are_the_reference_s() {
    let folder = Folder::new();
    for (name, flags, order) in [
        ("mixtral", "", None),
        ("mixtral", "--schedule serial --gemm dense --threads 1 -dp 2 -ep", None),
        ("deepseek_v2", "-dp 2 -ep --stages 2 --shared-expert beside-last-combine", None),
        ("deepseek_v2", "--device reference --stages 3", Some("d0 d1 d2 c0 c1 c2")),
    ] {
        let expected = Expected::of(name);
        let (ids, out) = (expected.ids("input_ids_1"), folder.text("logits.safetensors"));
        let typed = format!("logits --model {} --ids {} --out {out} {flags}", fixture(name), words(&ids));
        let order = order.into_iter().flat_map(|order| ["--transfer-order", order]);
        assert_eq!(printed(command(&typed).args(order)), "");
        let (shape, logits) = floats(&std::fs::read(&out).unwrap(), "logits");
        let reference = expected.logits("logits_1");
        assert_eq!((shape[0], shape.iter().product()), (ids.len(), reference.len()));
        let furthest =
            logits.iter().zip(&reference).map(|(got, want)| (got - want).abs()).fold(0.0, f32::max);
        assert!(furthest < 1e-3, "{name} {flags}: {furthest}");
    }
}

#[test]
fn generate_continues_ids() {
    let expected = Expected::of("mixtral");
    let (prompt, greedy) = (expected.ids("input_ids_0"), expected.ids("greedy_0"));
    let typed = format!(
        "generate --model {} --ids {} --max-tokens {} --temperature 0 --ignore-eos --json",
        fixture("mixtral"),
        words(&prompt),
        greedy.len()
    );
    let answer = json(&mut command(&typed));
    assert_eq!(answer["ids"], json!(greedy));
    assert!(answer["text"].is_string());
    assert_eq!(answer["finish_reason"], "length");
    let usage = json!({
        "prompt_tokens": prompt.len(),
        "completion_tokens": greedy.len(),
        "total_tokens": prompt.len() + greedy.len(),
    });
    assert_eq!(answer["usage"], usage);
    for time in ["load_seconds", "time_to_first_token_ms", "decode_tokens_per_second", "total_seconds"] {
        assert!(answer["times"][time].as_f64().unwrap() > 0.0, "{time}");
    }
    let spread =
        json(&mut command(&format!("{typed} --data-parallel-size 2 --enable-expert-parallel --stages 2")));
    assert_eq!(spread["ids"], answer["ids"]);
    let plain = printed(&mut command(&typed.replace(" --json", "")));
    assert_eq!(plain.trim_end_matches('\n'), answer["text"].as_str().unwrap().trim_end_matches('\n'));
}

#[test]
fn every_strategy_gives_the_reference_s_tokens() {
    let expected = Expected::of("mixtral");
    let (prompt, greedy) = (expected.ids("input_ids_1"), expected.ids("greedy_1"));
    for flags in ["-tp 2", "-tp 2 -ep", "-dp 2", "-dp 2 -ep", "-tp 2 -dp 2 -ep --stages 2"] {
        let typed = format!(
            "generate --model {} --ids {} --max-tokens 8 --temperature 0 --ignore-eos --json {flags}",
            fixture("mixtral"),
            words(&prompt)
        );
        assert_eq!(json(&mut command(&typed))["ids"], json!(greedy[..8]), "{flags}");
    }
}

#[test]
fn routing_is_recorded_and_replayed() {
    let folder = Folder::new();
    let (routing, out) = (folder.text("routing"), folder.text("logits.safetensors"));
    let ids = words(&Expected::of("qwen3_moe").ids("input_ids_1"));
    let logits = |flags: &str| {
        printed(&mut command(&format!(
            "logits --model {} --ids {ids} --out {out} {flags}",
            fixture("qwen3_moe")
        )));
        std::fs::read(&out).unwrap()
    };
    let recorded = logits(&format!("--routing-record {routing}"));
    assert_eq!(logits(&format!("--routing-replay {routing}")), recorded);
    // Other ranks add in another order, so that only the choice is the same.
    let spread = logits(&format!("-tp 2 -ep --routing-replay {routing}"));
    let (near, far) = (floats(&spread, "logits").1, floats(&recorded, "logits").1);
    assert!(near.iter().zip(&far).all(|(near, far)| (near - far).abs() < 1e-3));

    let replay = |file: &str, ids: &str| {
        let model = fixture("qwen3_moe");
        refused(&mut command(&format!(
            "logits --model {model} --ids {ids} --out {out} --routing-replay {file}"
        )))
    };
    let missing = replay("/nowhere/routing", "5,6");
    assert!(missing.starts_with("cannot replay /nowhere/routing: "), "{missing}");
    std::fs::write(folder.path("damaged"), "x").unwrap();
    let damaged = replay(&folder.text("damaged"), "5,6");
    assert!(damaged.starts_with("cannot replay "), "{damaged}");
    let both = refused(&mut command(&format!(
        "logits --model {} --ids 5 --out {out} --routing-record a --routing-replay b",
        fixture("qwen3_moe")
    )));
    assert!(both.contains("cannot be used with"), "{both}");
}

#[test]
fn generate_without_a_tokenizer_has_no_text() {
    let typed = "generate --model preset:mixtral-mini --seed 5 --ids 5,6,7 --max-tokens 3";
    let answer = json(&mut command(&format!("{typed} --json")));
    assert_eq!(answer["text"], Value::Null);
    let ids: Vec<u32> = serde_json::from_value(answer["ids"].clone()).unwrap();
    assert_eq!(printed(&mut command(typed)).trim(), words(&ids).replace(',', " "));
}

#[test]
fn generate_follows_prompts_chats_and_samplers() {
    let model = fixture("qwen2_moe");
    let generate = |flags: &str, prompt: &str| {
        let typed = format!("generate --model {model} --max-tokens 12 --ignore-eos --json {flags}");
        json(command(&typed).args(["--prompt", prompt]))
    };
    let plain = generate("", "Hello there");
    let chat = generate("--chat", "Hello there");
    assert_eq!(
        chat["usage"]["prompt_tokens"].as_u64().unwrap(),
        plain["usage"]["prompt_tokens"].as_u64().unwrap() + 3
    );
    let drawn = generate("--temperature 1.5 --seed 3", "Hello there");
    assert_eq!(drawn["ids"], generate("--temperature 1.5 --seed 3", "Hello there")["ids"]);
    assert_ne!(drawn["ids"], generate("--temperature 1.5 --seed 4", "Hello there")["ids"]);
    assert_eq!(plain["ids"], generate("--temperature 1.5 --top-k 1", "Hello there")["ids"]);
    assert_eq!(plain["ids"], generate("--temperature 1.5 --top-p 0.000001", "Hello there")["ids"]);
    assert_eq!(plain["ids"], generate("--min-p 1", "Hello there")["ids"]);
}

#[test]
fn generate_ends_before_a_stop_string() {
    let model = fixture("qwen2_moe");
    let typed = format!("generate --model {model} --prompt Hello --max-tokens 24 --ignore-eos --json");
    let whole = json(&mut command(&typed));
    let text = whole["text"].as_str().unwrap();
    let stop = text.chars().skip(4).take(2).collect::<String>();
    let stopped = json(command(&typed).args(["--stop", &stop]));
    assert_eq!(stopped["text"].as_str().unwrap(), &text[..text.find(&stop).unwrap()]);
    assert_eq!(stopped["finish_reason"], "stop");
    assert!(stopped["ids"].as_array().unwrap().len() < whole["ids"].as_array().unwrap().len());
}

#[test]
fn generation_config_is_followed() {
    let folder = Folder::copy_of("mixtral");
    let generate = |flags: &str| {
        let typed = format!("generate --model {} --ids 5,6,7 --json {flags}", folder.0.path().display());
        json(&mut command(&typed))["ids"].as_array().unwrap().clone()
    };
    let greedy = generate("--max-tokens 6 --ignore-eos");
    let config =
        json!({ "do_sample": true, "temperature": 2.0, "max_new_tokens": 3, "eos_token_id": [1, greedy[1]] });
    std::fs::write(folder.path("generation_config.json"), config.to_string()).unwrap();
    assert_eq!(generate("--temperature 0").len(), 2, "the second token ends the text");
    assert_eq!(generate("--temperature 0 --ignore-eos"), greedy[..3]);
    assert_ne!(generate("--ignore-eos --max-tokens 6"), greedy);
}

#[test]
fn tokenize_shows_tokens() {
    let model = fixture("mixtral");
    let chat = json(&mut command(&format!("tokenize --model {model} --prompt Hi --chat --system Be --json")));
    assert_eq!(chat["count"], chat["ids"].as_array().unwrap().len());
    let tokens = chat["tokens"].as_array().unwrap();
    assert_eq!((&tokens[0], tokens.last().unwrap()), (&json!("<s>"), &json!("<|assistant|>")));
    let lines = printed(&mut command(&format!("tokenize --model {model} --prompt <s>")));
    assert_eq!(lines, "      0  <s>\n");
}

#[test]
fn synth_writes_the_weights_of_the_preset() {
    let folder = Folder::new();
    let logits = |model: &str| {
        let out = folder.text("logits.safetensors");
        printed(&mut command(&format!("logits --model {model} --ids 5,6,7 --seed 9 --out {out}")));
        floats(&std::fs::read(out).unwrap(), "logits").1
    };
    let (one, many) = (folder.text("one"), folder.text("many"));
    printed(&mut command(&format!("synth --preset mixtral-mini --seed 9 --out {one}")));
    printed(&mut command(&format!(
        "synth --config {one}/config.json --seed 9 --out {many} --max-shard-size 20MB"
    )));
    assert!(!folder.path("many/model.safetensors").exists());
    assert!(folder.path("many/model.safetensors.index.json").exists());
    let in_memory = logits("preset:mixtral-mini");
    assert_eq!(logits(&one), in_memory);
    assert_eq!(logits(&many), in_memory);
}

#[test]
fn auto_explains_itself_and_gives_the_same_tokens() {
    let generate = |flags: &str| {
        let model = "--model preset:mixtral-mini --ids 5,6,7,8 --max-tokens 12 --json";
        let output = command(&format!("generate {model} {flags}")).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        (answer["ids"].clone(), String::from_utf8(output.stderr).unwrap())
    };
    let (auto, said) = generate("-dp 2 -ep --explain --link 100MB/s,50us");
    assert_eq!(auto, generate("-dp 2 -ep --schedule serial").0);
    for part in
        ["MoE layers planned by", "the machine against its cost model", "layers of ", "plans priced", "→"]
    {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    let (_, said) = generate("--explain");
    assert!(said.contains("every MoE layer ran in one stage: its rank is alone"), "{said}");
    let (_, said) = generate("-dp 2 -ep --explain --schedule staged");
    assert!(said.contains("there is nothing to explain"), "{said}");
}

#[test]
fn bench_compares_schedules() {
    let folder = Folder::new();
    let (figures, trace) = (folder.text("bench.json"), folder.text("trace.json"));
    let small = "--batch-size 2 --input-len 8 --output-len 2 --num-iters 2";
    let table = printed(&mut command(&format!("bench {small} --json {figures} --trace {trace}")));
    let headings = table.lines().find(|line| line.starts_with("strategy")).unwrap();
    for heading in ["schedule", "stages", "tokens/s", "MoE layer ms", "exposed ms", "peak bytes", "ratio"] {
        assert!(headings.contains(heading), "{heading} is not in {headings}");
    }
    let report: Value = serde_json::from_slice(&std::fs::read(&figures).unwrap()).unwrap();
    let rows = report["rows"].as_array().unwrap();
    let names: Vec<String> =
        rows.iter().map(|row| format!("{} {} {}", row["strategy"], row["schedule"], row["stages"])).collect();
    let staged = |stages: usize| format!("\"DP+EP\" \"staged\" {stages}");
    let whole = ["serial", "two-batch"].map(|schedule| format!("\"DP+EP\" \"{schedule}\" 1"));
    assert_eq!(names[..2], whole);
    assert_eq!(names[2..5], [staged(2), staged(4), staged(8)]);
    assert!(names.len() == 6 && names[5].starts_with("\"DP+EP\" \"auto\" "), "{names:?}");
    assert!(rows[5]["decisions"]["layers"].as_u64() > Some(0) && rows[0]["decisions"].is_null(), "{rows:?}");
    for figure in ["tokens_per_second", "moe_layer_ms", "peak_bytes", "ratio_to_serial"] {
        assert!(rows.iter().all(|row| row[figure].as_f64().unwrap() > 0.0), "{figure}");
    }
    assert!(rows.iter().all(|row| row["exposed_transfer_ms"].as_f64() <= row["moe_layer_ms"].as_f64()));
    assert!(report["command"].as_str().unwrap().contains("--batch-size 2"));
    assert!(report["machine"]["cores"].as_u64().unwrap() > 0);
    assert!(rows.iter().all(|row| row["pacing"]["transfers"].as_u64() > Some(0)), "{rows:?}");
    assert!(
        table.contains("pacing of the emulated link: ") && table.contains("too short to resolve"),
        "{table}"
    );
    let trace: Value = serde_json::from_slice(&std::fs::read(&trace).unwrap()).unwrap();
    assert!(trace["traceEvents"].as_array().unwrap().iter().any(|event| event["name"] == "dispatch"));

    let narrowed = format!(
        "bench {small} --schedule staged --stages 4,12 --model preset:mixtral-mini -dp 1 --json {figures}"
    );
    let message = refused(&mut command(&narrowed));
    assert!(message.contains("add up to 16"), "{message}");
}

#[test]
fn bench_takes_the_steps_of_the_ablation() {
    let folder = Folder::new();
    let (figures, page) = (folder.text("bench.json"), folder.text("bench.html"));
    let small = "--batch-size 2 --input-len 8 --num-iters 1 --link none --stages 2";
    printed(&mut command(&format!("bench --ablation {small} --json {figures} --report {page}")));
    let report: Value = serde_json::from_slice(&std::fs::read(&figures).unwrap()).unwrap();
    let row = |row: &Value| {
        let words = ["strategy", "schedule", "gemm"].map(|key| row[key].as_str().unwrap().to_owned());
        format!("{} {}", words.join(" "), row["stages"])
    };
    let rows = report["rows"].as_array().unwrap();
    let expected = ["TP", "DP"].into_iter().flat_map(|attention| {
        let ways = [
            "TP serial grouped 1",
            "TP serial dense 1",
            "EP serial grouped 1",
            "EP serial dense 1",
            "EP two-batch grouped 1",
            "EP staged grouped 2",
        ];
        ways.map(|way| format!("{attention}+{way}"))
    });
    assert_eq!(rows.iter().map(row).collect::<Vec<_>>(), expected.collect::<Vec<_>>());
    for figure in ["tokens_per_second", "ratio_to_serial", "ratio_to_base"] {
        assert!(rows.iter().all(|row| row[figure].as_f64().unwrap() > 0.0), "{figure}");
    }
    assert!(std::fs::read_to_string(page).unwrap().contains("TP+EP staged, 2 stages, grouped"));
    let message = refused(&mut command("bench --ablation --schedule serial"));
    assert!(message.contains("cannot be used with"), "{message}");
}

#[test]
fn bench_compares_what_is_named() {
    let folder = Folder::new();
    let (figures, page) = (folder.text("bench.json"), folder.text("bench.html"));
    let small = "--model preset:mixtral-mini --batch-size 2 --input-len 8 --num-iters 1";
    let mut bench = command(&format!("bench {small} --json {figures} --report {page}"));
    for contender in ["serial", "two-batch", "staged:2", "staged:1,3", "staged:2,2:d0 c0 d1 c1"] {
        bench.args(["--contender", contender]);
    }
    let table = printed(&mut bench);
    assert!(table.contains("1,3  d0 d1 c0 c1") && table.contains("2,2  d0 c0 d1 c1"), "{table}");
    assert!(table.contains("dA dB cA cB") && table.contains("times what its experts compute"), "{table}");
    let report: Value = serde_json::from_slice(&std::fs::read(&figures).unwrap()).unwrap();
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len(), 5);
    for figure in
        ["efficiency", "compute_ms", "experts_ms", "dispatch_and_combine_ms", "smallest_transfer_ms"]
    {
        assert!(rows.iter().all(|row| row[figure].as_f64().unwrap() > 0.0), "{figure}");
    }
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains("two-batch (measured only") && page.contains("micro-batch B: "));
    for (contender, problem) in [
        ("fast", "is not a schedule"),
        ("staged:0", "is not a number of stages"),
        ("two-batch:2", "one stage in each of its micro-batches"),
        ("staged:3,3", "add up to 6"),
    ] {
        let message = refused(command(&format!("bench {small}")).args(["--contender", contender]));
        assert!(message.contains(problem), "{message}");
    }
}

#[test]
fn flags_have_variables() {
    let mut with_variables = command("generate --max-tokens 2 --json");
    with_variables.env("EPSMOE_MODEL", "preset:mixtral-mini").env("EPSMOE_GENERATE_IDS", "5,6");
    with_variables.env("EPSMOE_STAGES", "2").env("EPSMOE_IGNORE_EOS", "1");
    assert_eq!(json(&mut with_variables)["usage"]["completion_tokens"], 2);
}

/// What is typed wins over the variable of the same flag, and over those of flags that it contradicts.
#[test]
fn typed_flags_win_over_variables() {
    let model = fixture("mixtral");
    let tokens = |flags: &str, variables: &[(&str, &str)]| {
        let typed = format!("generate --model {model} --json {flags}");
        json(command(&typed).envs(variables.iter().copied()))["usage"]["completion_tokens"].as_u64().unwrap()
    };
    let ids = "--ids 5,6 --max-tokens 3 --ignore-eos";
    assert_eq!(tokens(ids, &[("EPSMOE_GENERATE_MAX_TOKENS", "9")]), 3);
    // Even a variable that means nothing.
    assert_eq!(tokens(&format!("{ids} --threads 1"), &[("EPSMOE_THREADS", "many")]), 3);
    assert_eq!(tokens(ids, &[("EPSMOE_GENERATE_PROMPT", "Hi"), ("EPSMOE_GENERATE_CHAT", "1")]), 3);
    let prompt = "--prompt Hi --max-tokens 3 --ignore-eos";
    assert_eq!(tokens(prompt, &[("EPSMOE_GENERATE_IDS", "1,2")]), 3);
    let folder = Folder::new();
    let record = format!("{ids} --routing-record {}", folder.text("record"));
    assert_eq!(tokens(&record, &[("EPSMOE_ROUTING_REPLAY", "/nowhere")]), 3);
    assert_eq!(tokens(&format!("{ids} --stages 2"), &[("EPSMOE_SCHEDULE", "serial")]), 3);
    assert_eq!(tokens(&format!("{ids} --schedule serial"), &[("EPSMOE_STAGES", "2")]), 3);
    // What is on or off can be off too.
    let off = "--ids 5,6 --max-tokens 1 -dp 1 --enable-expert-parallel=false --ignore-eos=false";
    assert_eq!(tokens(off, &[("EPSMOE_ENABLE_EXPERT_PARALLEL", "1"), ("EPSMOE_IGNORE_EOS", "1")]), 1);
    let mut both = command(&format!("generate --model {model} --json"));
    both.env("EPSMOE_GENERATE_IDS", "5").env("EPSMOE_GENERATE_PROMPT", "Hi");
    assert!(refused(&mut both).contains("cannot be used with"));
}

#[test]
fn models_come_from_the_hugging_face_cache() {
    let cache = Folder::new();
    let model = cache.path("hub/models--tiny--mixtral");
    let commit = "0123456789abcdef0123456789abcdef01234567";
    std::fs::create_dir_all(model.join("snapshots").join(commit)).unwrap();
    std::fs::create_dir_all(model.join("refs")).unwrap();
    std::fs::write(model.join("refs/main"), commit).unwrap();
    for file in std::fs::read_dir(fixture("mixtral")).unwrap() {
        let file = file.unwrap();
        let link = model.join("snapshots").join(commit).join(file.file_name());
        std::os::unix::fs::symlink(file.path().canonicalize().unwrap(), link).unwrap();
    }
    let mut generate = command("generate --model tiny/mixtral --prompt Hi --max-tokens 2 --json");
    generate.env("HF_HOME", cache.0.path()).env("HF_HUB_OFFLINE", "1");
    assert_eq!(json(&mut generate)["usage"]["completion_tokens"], 2);
    let mut absent = command("generate --model tiny/other --prompt Hi");
    absent.env("HF_HOME", cache.0.path());
    let message = refused(&mut absent);
    assert!(message.contains("models--tiny--other does not exist"), "{message}");
    assert!(message.contains("hf download tiny/other"), "{message}");
}

#[test]
fn doctor_says_what_works() {
    let told = printed(&mut command("doctor"));
    assert!(
        told.contains("[ok] A model on two ranks of cpu gives the same bits, serial and staged."),
        "{told}"
    );
    assert!(json(&mut command("doctor --json"))["findings"].is_array());
}

#[test]
fn help_and_completions_are_there() {
    let help = printed(&mut command("--help"));
    assert!(help.contains("epsmoe generate --model"), "{help}");
    let help = printed(&mut command("generate --help"));
    for expected in
        ["[env: EPSMOE_STAGES=]", "Expert pipeline:", "preset:NAME", "[env: EPSMOE_GENERATE_PROMPT=]"]
    {
        assert!(help.contains(expected), "{expected} is not in {help}");
    }
    for shell in ["bash", "zsh", "fish"] {
        assert!(printed(&mut command(&format!("completions {shell}"))).contains("epsmoe"));
    }
}

/// With NVRTC on this machine, kernels are compiled once; without, a sentence says what is missing.
#[test]
fn kernels_are_compiled_ahead_or_not_at_all() {
    let folder = Folder::new();
    let warm = || {
        let mut command = command("kernels warm --arch sm_80");
        command.env("EPSMOE_KERNEL_CACHE", folder.path("kernels"));
        command.output().unwrap()
    };
    let first = warm();
    if first.status.success() {
        let said = String::from_utf8(warm().stdout).unwrap();
        assert!(said.starts_with("0 files compiled for sm_80"), "{said}");
    } else {
        let said = String::from_utf8(first.stderr).unwrap();
        assert!(said.contains("NVRTC was not found; install CUDA 13.0"), "{said}");
    }
}

/// One rank of four: its layer alone, then its whole model, on a processor.
#[test]
fn one_rank_of_several_is_emulated() {
    let folder = Folder::new();
    let read =
        |name: &str| -> Value { serde_json::from_slice(&std::fs::read(folder.path(name)).unwrap()).unwrap() };
    let flags = "--model preset:deepseek-v2-mini --link 10GB/s --num-iters 1 --threads 1 --contender serial \
                 --contender staged:2";
    let typed = format!("bench layer {flags} --contender auto --emulate-rank 1/4 --tokens 48");
    let shown = printed(command(&typed).args(["--json", &folder.text("layer.json")]));
    assert!(shown.contains("rank 1/4 EMULATED over 10GB/s"), "{shown}");
    let cell = &read("layer.json")["cells"][0];
    let rows = ["rows_sent", "rows_received"].map(|key| cell[key].as_u64().unwrap());
    assert!(rows.iter().all(|rows| (48..48 * 4).contains(rows)), "{cell}");
    assert_eq!(cell["rows"].as_array().unwrap().len(), 3);
    assert_eq!(cell["rows"][1]["cut"].as_array().unwrap().len(), 2, "{cell}");
    assert!(cell["rows"][0]["pacing"]["transfers"].as_u64() > Some(0), "{cell}");
    let typed = format!("bench {flags} --emulate-rank 0/4 --batch-size 8 --input-len 16");
    let shown = printed(command(&typed).args(["--json", &folder.text("model.json")]));
    assert!(shown.contains("4 ranks (EMULATED by one: 0/4)"), "{shown}");
    let report = read("model.json");
    assert_eq!((report["emulated_rank"].as_str(), report["ranks"].as_u64()), (Some("0/4"), Some(4)));
    assert!(report["rows"][1]["dispatch_and_combine_ms"].as_f64() > Some(0.0), "{report}");
    let refused = refused(&mut command("bench --emulate-rank 0/4 -dp 2"));
    assert!(refused.contains("--emulate-rank"), "{refused}");
}

#[test]
fn the_readme_has_the_table_of_models() {
    let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../../README.md")).unwrap();
    let (_, rest) = readme.split_once("<!-- models: begin -->\n").unwrap();
    let (table, _) = rest.split_once("<!-- models: end -->").unwrap();
    assert_eq!(table, printed(&mut command("models")), "put what `epsmoe models` prints into README.md");
}
