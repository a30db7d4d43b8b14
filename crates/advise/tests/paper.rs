//! The planner against the tables of EPS-MoE (arXiv 2410.12247): signs, not sizes; see `docs/paper-check.md`.

use epsmoe_advise::*;
use epsmoe_base::{CacheDType, WireDType};
use epsmoe_model::{ModelSpec, preset};
use epsmoe_plan::Machine;

fn deepseek_v2() -> ModelSpec {
    preset("deepseek-v2").expect("is built in")
}

fn mixtral() -> ModelSpec {
    preset("mixtral-8x7b").expect("is built in")
}

fn dbrx() -> ModelSpec {
    preset("dbrx").expect("is built in")
}

fn ask(model: &ModelSpec, machine: &Machine, load: &Load) -> Advice {
    advise(&model.architecture.to_string(), model, machine, load).expect("a legal model")
}

fn load(batch: usize, sequence: usize, stages: usize) -> Load {
    Load {
        batch,
        sequence,
        zipf_permille: 0,
        seed: 1,
        stages,
        wire: WireDType::Auto,
        cache: CacheDType::Auto,
        weights: HeldAs::default(),
    }
}

/// A machine with the kernels of the paper's time.
fn then(name: &str) -> Machine {
    Machine::built_in(name).and_then(|machine| machine.with_kernels("hopper-2024")).expect("is built in")
}

fn prefill_ms(advice: &Advice, strategy: Strategy, running: Running) -> f64 {
    let row = advice.rows.iter().find(|row| (row.strategy, row.running) == (strategy, running));
    row.expect("is there").prefill_ns as f64 / 1e6
}

/// Percent of time that `after` saves.
fn change(before: f64, after: f64) -> f64 {
    (after / before - 1.0) * 100.0
}

/// One comparison of the paper: percent of time, and what the model says.
struct Compared {
    what: String,
    paper: f64,
    model: f64,
}

/// Prints all, returns those whose sign differs although the paper's difference is at least 3 %.
fn deviations(all: &[Compared]) -> Vec<&Compared> {
    for compared in all {
        let clear = if compared.paper.abs() < 3.0 { "(under 3 %)" } else { "" };
        eprintln!(
            "{:<52} paper {:>6.1} %  model {:>6.1} %  {clear}",
            compared.what, compared.paper, compared.model
        );
    }
    all.iter()
        .filter(|compared| compared.paper.abs() >= 3.0 && compared.paper * compared.model <= 0.0)
        .collect()
}

/// (batch, sequence, base s, EP only, PN=1, PN=2): percent against the base.
type Cell = (usize, usize, f64, Option<f64>, f64, f64);

const MIXTRAL: [Cell; 10] = [
    (16, 2048, 0.46, Some(-13.7), -17.7, -21.7),
    (16, 4096, 0.94, Some(-9.5), -18.9, -22.7),
    (16, 8192, 1.94, Some(-8.9), -18.5, -21.8),
    (16, 16384, 4.22, Some(-8.3), -15.7, -17.7),
    (32, 2048, 0.92, Some(-10.3), -19.6, -23.6),
    (32, 4096, 1.86, Some(-9.4), -19.2, -23.0),
    (32, 8192, 3.88, Some(-9.0), -18.1, -22.6),
    (64, 2048, 1.83, Some(-9.5), -19.7, -23.4),
    (64, 4096, 3.71, Some(-9.3), -18.9, -23.5),
    (128, 2048, 3.65, Some(-9.6), -19.5, -24.3),
];

const DBRX: [Cell; 11] = [
    (16, 512, 0.22, None, -19.8, -22.7),
    (16, 1024, 0.42, None, -21.8, -25.7),
    (16, 2048, 0.84, None, -24.4, -28.6),
    (16, 4096, 1.68, None, -25.1, -29.5),
    (32, 512, 0.42, None, -22.0, -25.3),
    (32, 1024, 0.83, None, -24.2, -28.7),
    (32, 2048, 1.66, None, -25.3, -30.0),
    (32, 4096, 3.35, None, -25.7, -30.3),
    (64, 512, 0.84, None, -24.1, -28.7),
    (64, 1024, 1.67, None, -25.7, -30.3),
    (64, 2048, 3.32, None, -26.1, -30.5),
];

fn table_3(model: &ModelSpec, machine: &Machine, cells: &[Cell]) -> Vec<Compared> {
    let mut all = Vec::new();
    for &(batch, sequence, base_s, ep, one, two) in cells {
        let advice = ask(model, machine, &load(batch, sequence, 2));
        let ms = |strategy, running| prefill_ms(&advice, strategy, running);
        let base = ms(Strategy::TpTp, Running::Serial);
        let (serial, kernel, staged) = (
            ms(Strategy::TpEp, Running::Serial),
            ms(Strategy::TpEp, Running::Kernel),
            ms(Strategy::TpEp, Running::Staged),
        );
        let cell = format!("{} B{batch} S{sequence}", model.architecture);
        eprintln!("{cell}: base {:.0} ms in the paper, {base:.0} ms here", base_s * 1000.0);
        let mut compare = |step: &str, paper, model| {
            all.push(Compared { what: format!("{cell}: {step}"), paper, model });
        };
        if let Some(ep) = ep {
            compare("EP only against TP+TP", ep, change(base, serial));
            compare("PN=1 against EP only", change(100.0 + ep, 100.0 + one), change(serial, kernel));
        }
        compare("PN=1 against TP+TP", one, change(base, kernel));
        compare("PN=2 against PN=1", change(100.0 + one, 100.0 + two), change(kernel, staged));
        compare("PN=2 against TP+TP", two, change(base, staged));
    }
    all
}

#[test]
fn signs_of_table_3() {
    for (model, machine, cells) in
        [(mixtral(), then("4xH800"), MIXTRAL.as_slice()), (dbrx(), then("8xH800"), DBRX.as_slice())]
    {
        let all = table_3(&model, &machine, cells);
        let wrong: Vec<&str> = deviations(&all).iter().map(|compared| compared.what.as_str()).collect();
        assert!(wrong.is_empty(), "signs that differ: {wrong:#?}");
    }
}

/// Throughput gain in percent over the base, DP+EP: (sequence, PN=1, PN=5, PN=20).
const TABLE_2: [(usize, f64, f64, f64); 4] = [
    (1024, 11.83, 21.81, 21.27),
    (2048, 11.02, 20.53, 18.05),
    (4096, 6.77, 16.89, 10.00),
    (8192, 5.13, 12.75, 11.60),
];

#[test]
fn signs_of_table_2() {
    let (model, machine) = (deepseek_v2(), then("8xH800"));
    let mut all = Vec::new();
    for (sequence, one, five, twenty) in TABLE_2 {
        // The batch is not given: 8192 tokens a GPU.
        let batch = 65_536 / sequence;
        let of = |stages| ask(&model, &machine, &load(batch, sequence, stages));
        let (five_stages, twenty_stages) = (of(5), of(20));
        let ms = |advice, running| prefill_ms(advice, Strategy::DpEp, running);
        let serial = ms(&five_stages, Running::Serial);
        let (kernel, staged_5, staged_20) = (
            ms(&five_stages, Running::Kernel),
            ms(&five_stages, Running::Staged),
            ms(&twenty_stages, Running::Staged),
        );
        eprintln!("S{sequence}: {:.1} K tokens/s at PN=1", 65_536.0 / kernel);
        // Gains in throughput as changes of time.
        let time = |gain: f64| 100.0 / (1.0 + gain / 100.0);
        let mut compare = |step: &str, paper, model| {
            all.push(Compared { what: format!("DeepSeek-V2 S{sequence}: {step}"), paper, model });
        };
        compare("PN=1 against the base", change(100.0, time(one)), change(serial, kernel));
        compare("PN=5 against PN=1", change(time(one), time(five)), change(kernel, staged_5));
        compare("PN=20 against PN=1", change(time(one), time(twenty)), change(kernel, staged_20));
        compare("PN=20 against PN=5", change(time(five), time(twenty)), change(staged_5, staged_20));
    }
    let wrong: Vec<&str> = deviations(&all).iter().map(|compared| compared.what.as_str()).collect();
    assert!(wrong.is_empty(), "signs that differ: {wrong:#?}");
}

fn row(advice: &Advice, strategy: Strategy, running: Running) -> &Row {
    advice.rows.iter().find(|row| (row.strategy, row.running) == (strategy, running)).expect("is there")
}

#[test]
fn where_staging_starts_and_stops_to_pay() {
    let (model, machine) = (deepseek_v2(), then("8xH800"));
    let mut stages = Vec::new();
    for tokens in [64, 256, 512, 1024, 1700, 2048, 4096, 8192, 16384] {
        let advice = ask(&model, &machine, &load(8, tokens, 2));
        let of = |running| row(&advice, Strategy::DpEp, running);
        let (auto, kernel) = (of(Running::Auto), of(Running::Kernel));
        eprintln!(
            "{tokens:>6} tokens a GPU: {} stages, experts {} µs, with one stage {} µs; {}",
            auto.stages,
            auto.experts_ns / 1000,
            kernel.experts_ns / 1000,
            auto.explanation.as_deref().unwrap_or("")
        );
        stages.push((tokens, auto.stages));
    }
    // The paper stages DeepSeek-V2 from about 1700 rows on, and found 20 stages worse than 5 (table 2).
    for (tokens, stages) in stages {
        match tokens {
            ..=512 => assert_eq!(stages, 1, "{tokens}"),
            2048.. => assert!((2..20).contains(&stages), "{tokens}"),
            _ => {}
        }
    }
}

#[test]
fn wide_experts_on_fast_links_take_one_stage() {
    let stages = |model: &ModelSpec, machine: &Machine, strategy, batch, sequence| {
        let advice = ask(model, machine, &load(batch, sequence, 2));
        row(&advice, strategy, Running::Auto).stages
    };
    for (batch, sequence) in [(16, 512), (16, 2048), (64, 2048)] {
        for strategy in [Strategy::TpEp, Strategy::DpEp] {
            for name in ["8xH100", "8xH200"] {
                let machine = Machine::built_in(name).unwrap();
                assert_eq!(stages(&mixtral(), &machine, strategy, batch, sequence), 1, "one expert a GPU");
                assert_eq!(
                    stages(&dbrx(), &machine, strategy, batch, sequence),
                    1,
                    "{name} {batch} {sequence}"
                );
            }
        }
        // On the paper's links two stages pay.
        assert_eq!(stages(&dbrx(), &then("8xH800"), Strategy::TpEp, batch, sequence), 2);
    }
}

#[test]
fn attention_decides_the_strategy() {
    // MLA repeats its latents under TP and pays collectives: DP+EP. With fewer sequences than GPUs, DP leaves GPUs
    // idle: TP+EP.
    let best = |model: &ModelSpec, machine: &str, batch, sequence| {
        let advice = ask(model, &Machine::built_in(machine).unwrap(), &load(batch, sequence, 4));
        eprintln!("{advice}");
        advice.rows[advice.best.expect("fits")].strategy
    };
    assert_eq!(best(&deepseek_v2(), "8xH200", 64, 1024), Strategy::DpEp);
    assert_eq!(best(&mixtral(), "4xH800", 1, 8192), Strategy::TpEp);
    let advice = ask(&deepseek_v2(), &Machine::built_in("4xH800").unwrap(), &load(8, 1024, 4));
    assert!(
        advice.best.is_none() && advice.why.starts_with("nothing fits: the smallest plan needs "),
        "{advice}"
    );
    assert!(serde_json::to_string(&advice).unwrap().contains(r#""strategy":"TP+TP","running":"serial""#));
}
