//! Numbers that users may give: a plan is told, or one sentence says which number is too large. Nothing wraps.

use epsmoe_advise::{Advice, HeldAs, Load, advise};
use epsmoe_base::{CacheDType, Mix, WireDType, env::test_seed};
use epsmoe_model::{PRESETS, config, preset};
use epsmoe_plan::Machine;

fn load(batch: usize, sequence: usize) -> Load {
    Load {
        batch,
        sequence,
        zipf_permille: 0,
        seed: 1,
        stages: 4,
        wire: WireDType::Auto,
        cache: CacheDType::Auto,
        weights: HeldAs::default(),
    }
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
    let late = machine(
        "start_ns = { value = 1152921504606846976, source = \"assumed\" }\n\
                        bytes_per_second = { value = 1000000, source = \"assumed\" }\n",
    );
    assert!(
        late.expect_err("too long")
            .contains("link.near of the cost model has a time of 1152921504606846976 ns")
    );
    ask("mixtral-8x7b", &link(1_000_000, 0), &load(1 << 4, 1 << 10)).expect("slow, but no limit");
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
        // What the slowest machine computes in the time that a product may take.
        let load = load(1 << mix.below(12), 1 << mix.below(13));
        let advice = ask(name, &machine, &load).unwrap_or_else(|error| panic!("{name}: {error}"));
        for row in &advice.rows {
            assert_eq!(row.layer_ns, row.attention_ns + row.collective_ns + row.experts_ns, "{name}");
            assert!(row.prefill_ns >= row.layer_ns && row.bytes.total() > 0, "{name} {row:?}");
        }
    }
}

/// Figures at the ends of what is allowed, and beyond: rows that add up, or a sentence.
#[test]
fn figures_at_their_ends_are_told_or_refused() {
    let seed = test_seed();
    eprintln!("EPSMOE_TEST_SEED={seed}");
    let mut mix = Mix::new(seed);
    let (mut told, mut refused) = (0, 0);
    for _ in 0..200 {
        let mut figure = |least: u64, most: u64| match mix.below(30) {
            0 => least,
            1 => most,
            2 => most.saturating_add(1),
            3 => least.saturating_sub(1),
            4 => 1 << mix.below(64),
            _ => least + mix.next_u64() % (most - least),
        };
        let rate = |it: u64| it.min(i64::MAX as u64);
        let (flops, memory) = (rate(figure(1_000_000, 1 << 60)), rate(figure(1_000_000, 1 << 60)));
        let (start, link) = (rate(figure(0, 1 << 40)), rate(figure(1_000_000, 1 << 60)));
        let (op, permille, node) = (rate(figure(0, 1 << 40)), rate(figure(1, 1000)), figure(1, 4));
        let (batch, sequence) = (1 << mix.below(14), 1 << mix.below(15));
        let name = ["mixtral-8x7b", "deepseek-v2", "deepseek-v3"][mix.below(3)];
        let kernel =
            format!("{{ rows = [[1, {permille}], [4096, 1000]], depth = [[1, 1000]], op_ns = {op} }}");
        let sourced = |value: u64| format!("{{ value = {value}, source = \"assumed\" }}");
        let text = format!(
            "[gpu.own]\nmemory_bytes = {}\nflops_per_second = {}\nmemory_bytes_per_second = {}\n\
             [link.own]\nstart_ns = {}\nbytes_per_second = {}\n\
             [kernels.own]\nsource = \"assumed\"\ngrouped = {kernel}\ndense = {kernel}\n\
             attention = {{ value = [[1, {permille}]], source = \"assumed\" }}\n\
             shares = {{ value = [{{ reserved = 0, compute = {}, compute_beside = 1000, transfer_beside = 1000 }}], \
             source = \"assumed\" }}\n\
             [machine.own]\nabout = \"\"\nranks = 8\nnode_ranks = {node}\ngpu = \"own\"\nkernels = \"own\"\n\
             host = \"server\"\nnear = \"own\"\nfar = \"own\"\n",
            sourced(1 << 40),
            sourced(flops),
            sourced(memory),
            sourced(start),
            sourced(link),
            1000 + permille,
        );
        let advice = Machine::parse(&text)
            .map_err(|error| error.to_string())
            .and_then(|machine| ask(name, &machine, &load(batch, sequence)));
        match advice {
            Err(message) => {
                refused += 1;
                assert!(message.len() < 300 && !message.contains("corrupt"), "{message}\n{text}");
            }
            Ok(advice) => {
                told += 1;
                for row in &advice.rows {
                    assert_eq!(row.layer_ns, row.attention_ns + row.collective_ns + row.experts_ns, "{text}");
                    assert!(row.prefill_ns >= row.layer_ns, "{row:?}\n{text}");
                }
            }
        }
    }
    assert!(told > 0 && refused > 0, "{told} told, {refused} refused");
}
