//! Numbers that users may give: a plan is told, or one sentence says which number is too large. Nothing wraps.

use epsmoe_advise::{Advice, Load, advise};
use epsmoe_base::{Mix, env::test_seed};
use epsmoe_model::{PRESETS, config, preset};
use epsmoe_plan::Machine;

fn load(batch: usize, sequence: usize) -> Load {
    Load { batch, sequence, zipf_permille: 0, seed: 1, stages: 4 }
}

fn ask(model: &str, machine: &Machine, load: &Load) -> Result<Advice, String> {
    let model = preset(model).expect("is built in");
    advise("model", &model, machine, load).map_err(|error| error.to_string())
}

/// A machine of four GPUs with a figure of its own.
fn machine(figure: &str) -> Result<Machine, String> {
    let link = if figure.contains("start_ns") || figure.contains("bytes_per_second") {
        format!("[link.own]\n{figure}\n")
    } else {
        String::new()
    };
    let near = if link.is_empty() { "nvlink-400" } else { "own" };
    let ranks = if figure.starts_with("ranks") { figure } else { "ranks = 4" };
    let text = format!(
        "{link}[machine.own]\nabout = \"\"\n{ranks}\ngpu = \"h800\"\nkernels = \"hopper-2026\"\nhost = \"server\"\n\
         near = \"{near}\"\n"
    );
    Machine::parse(&text).map_err(|error| error.to_string())
}

#[test]
fn what_no_plan_can_be_told_for_is_named() {
    let eight = Machine::built_in("8xH800").expect("is built in");
    let refused = |load: Load, machine: &Machine, words: &str| {
        let message = ask("mixtral-8x7b", machine, &load).expect_err("too much");
        assert!(message.contains(words), "{words} in: {message}");
    };
    refused(load(1 << 20, 1 << 24), &eight, "for 1 to 268435456 tokens in all");
    refused(load(usize::MAX, 2), &eight, "ask for fewer");
    refused(load(0, 1024), &eight, "a batch of 0 sequences");
    refused(load(1, 1), &machine("ranks = 4097").expect("a machine"), "4097 ranks");
    let link = |rate: u64, start: u64| {
        let figure = |name, value| format!("{name} = {{ value = {value}, source = \"assumed\" }}\n");
        machine(&(figure("bytes_per_second", rate) + &figure("start_ns", start))).expect("a machine")
    };
    refused(load(1, 1024), &link(1, 1), "bytes_per_second of the near link is 1,");
    refused(load(1, 1024), &link(1_000_000, 1 << 60), "start_ns of the near link is");
    assert!(ask("mixtral-8x7b", &link(1_000_000, 0), &load(1 << 14, 1 << 14)).is_ok());
    let dense = r#"{"model_type": "mixtral", "num_hidden_layers": 1}"#;
    let wide = format!(
        "{}, \"hidden_size\": 1048576, \"num_attention_heads\": 4096, \"head_dim\": 16384, \
         \"intermediate_size\": 1048576, \"num_local_experts\": 65535}}",
        dense.trim_end_matches('}')
    );
    let wide = config::parse(wide.as_bytes(), "config.json").expect("within bounds");
    let message = advise("wide", &wide, &eight, &load(1 << 14, 1 << 14)).expect_err("too slow").to_string();
    assert!(message.starts_with("one product of this model could take"), "{message}");
}

/// All that is allowed gives rows whose parts add up.
#[test]
fn whatever_is_allowed_adds_up() {
    let seed = test_seed();
    eprintln!("EPSMOE_TEST_SEED={seed}");
    let mut mix = Mix::new(seed);
    for _ in 0..12 {
        let (name, _) = PRESETS[mix.below(PRESETS.len())];
        let machines = Machine::names();
        let machine = Machine::built_in(&machines[mix.below(machines.len())]).expect("is built in");
        let load = load(1 << mix.below(15), 1 << mix.below(14));
        let advice = ask(name, &machine, &load).unwrap_or_else(|error| panic!("{name}: {error}"));
        for row in &advice.rows {
            assert_eq!(row.layer_ns, row.attention_ns + row.collective_ns + row.experts_ns, "{name}");
            assert!(row.prefill_ns >= row.layer_ns && row.bytes.total() > 0, "{name} {row:?}");
        }
    }
}
