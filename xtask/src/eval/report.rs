//! Figures as text for people, and as JSON.

use super::PAIRS;
use super::regret::{LAYERS, Recovery, Regret, Uneven};
use super::verify::{Outcome, Spread};
use epsmoe_device::cuda::{Figure, Probes};
use serde_json::{Value, json};

/// Outcomes that are printed: those with the largest errors.
const SHOWN: usize = 10;

/// What a GPU did, as tables of a page of documentation.
pub(super) fn probes(probes: &Probes) {
    for table in &probes.tables {
        println!("\n{} ({})\n", table.title, table.unit);
        println!("| | {} |", table.columns.join(" | "));
        println!("|---|{}", "---|".repeat(table.columns.len()));
        for (name, figures) in &table.rows {
            let mut cells: Vec<String> = figures.iter().map(Figure::to_string).collect();
            cells.resize(table.columns.len().max(cells.len()), String::new());
            println!("| {name} | {} |", cells.join(" | "));
        }
    }
}

fn percent(permille: u64) -> f64 {
    permille as f64 / 10.0
}

/// A line for every one.
fn lines<T>(all: &[T], line: impl Fn(&T) -> String) {
    all.iter().for_each(|one| println!("{}", line(one)));
}

/// Plans of the search against the best of many.
pub(super) fn regrets(found: &[Regret], asked: usize) -> Value {
    lines(found, |found| {
        let one = found.over_one_stage;
        format!(
            "regret {:4.1} %, {:5.1} % of one stage's speed ({:.1} to {:.1}), {}: {}",
            percent(found.regret()),
            percent(one.median),
            percent(one.interval.0),
            percent(one.interval.1),
            epsmoe_base::count(found.stages, "stage"),
            found.what
        )
    });
    let number = found.len().max(1) as u64;
    let mean = found.iter().map(Regret::regret).sum::<u64>() as f64 / number as f64;
    let worst = found.iter().map(Regret::regret).max().unwrap_or(0);
    let slower = found.iter().filter(|found| found.over_one_stage.interval.1 < 990).count();
    println!(
        "{} of {asked} cases: mean regret {:.1} %, worst {:.1} %; surely slower than 99 % of one stage: {slower}",
        found.len(),
        mean / 10.0,
        percent(worst)
    );
    json!({
        "regrets": found,
        "pairs": PAIRS,
        "mean_regret_permille": mean,
        "worst_regret_permille": worst,
        "surely_slower_than_one_stage": slower,
    })
}

/// Uneven against equal cuts.
pub(super) fn uneven(found: &[Uneven]) -> Value {
    lines(found, |found| {
        let gain = |ratio: u64| percent(ratio) - 100.0;
        let Uneven { what, predicted, measured, .. } = found;
        format!(
            "predicted {:+5.1} %, measured {:+5.1} % ({:+.1} to {:+.1}): {what}",
            gain(*predicted),
            gain(measured.median),
            gain(measured.interval.0),
            gain(measured.interval.1)
        )
    });
    let pays = |wanted: &dyn Fn(&Uneven) -> bool| found.iter().filter(|found| wanted(found)).count();
    let (faster, slower) =
        (pays(&|found| found.measured.interval.0 > 1000), pays(&|found| found.measured.interval.1 < 1000));
    println!(
        "of {} cases with a choice, uneven cuts are surely faster in {faster}, surely slower in {slower}",
        found.len()
    );
    json!({ "uneven": found, "pairs": PAIRS, "surely_faster": faster, "surely_slower": slower })
}

/// Schedules that began with a wrong profile.
pub(super) fn recoveries(found: &[Recovery]) -> Value {
    lines(found, |found| {
        let Recovery { what, settled, before, after, same_bits, .. } = found;
        format!(
            "time over the right plan's: {:.1} % at first, {:.1} % ({:.1} to {:.1}) after {LAYERS} layers, settled after \
             {settled}, {} bits: {what}",
            percent(before.median),
            percent(after.median),
            percent(after.interval.0),
            percent(after.interval.1),
            if *same_bits { "the same" } else { "OTHER" }
        )
    });
    let within = found.iter().filter(|found| found.after.median <= 1050).count();
    let same = found.iter().all(|found| found.same_bits);
    println!(
        "{within} of {} cases come within 5 % of the right plan; {} bits changed",
        found.len(),
        if same { "no" } else { "SOME" }
    );
    json!({ "recoveries": found, "pairs": PAIRS, "within_5_percent": within, "same_bits": same })
}

/// Predicted beside measured.
pub(super) fn outcomes(mut outcomes: Vec<Outcome>) -> Value {
    outcomes.sort_by_key(|outcome| std::cmp::Reverse(outcome.error()));
    lines(&outcomes[..outcomes.len().min(SHOWN)], |outcome| {
        let Outcome { what, predicted_ns, measured_ns, predicted, measured, .. } = outcome;
        format!(
            "predicted {:.2} ms, measured {:.2} ms: {what}\n  predicted {predicted:?}\n  measured  {measured:?}",
            *predicted_ns as f64 / 1e6,
            *measured_ns as f64 / 1e6
        )
    });
    let spread = |steady: bool| {
        Spread::of(outcomes.iter().filter(|outcome| outcome.is_steady() == steady).map(Outcome::error))
    };
    let (steady, varying) = (spread(true), spread(false));
    for (what, Spread { cases, median, p90, worst }) in [("steady", steady), ("varying over 4 %", varying)] {
        println!(
            "{cases} cases {what}: median {:.1} %, 90th percentile {:.1} %, worst {:.1} % off",
            percent(median),
            percent(p90),
            percent(worst)
        );
    }
    json!({ "cases": outcomes, "steady": steady, "varying": varying })
}
