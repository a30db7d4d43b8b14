//! `epsmoe bench`: the serial schedule against the staged one, on the same weights and the same prompts. The
//! schedules take turns in every round, so that what else the machine does falls on all of them.

use crate::args::{BenchArgs, ScheduleKind};
use crate::machine::{self, Machine};
use crate::output;
use crate::report::{self, Report as Page};
use crate::setup::{Demand, Setup};
use anyhow::Result;
use epsmoe_base::{Bytes, Lane, Layer, Mix, Rank, count};
use epsmoe_engine::{Engine, Parallel, Request, StepReport};
use epsmoe_plan::{Accounts, Correction, Policy, Schedule, ScheduleReport, Span, Stages, Timeline};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// Tokens of prompts come from a stream of their own under the seed.
const PROMPTS: u64 = 0x70726f6d707473;

/// What `--json` writes.
#[derive(Serialize)]
struct Report {
    rows: Vec<Row>,
    /// What was typed.
    command: String,
    version: &'static str,
    model: String,
    /// What computed.
    processor: String,
    ranks: usize,
    /// The link that transfers between ranks were paced to: their speed is emulated.
    emulated_link: Option<String>,
    batch_size: usize,
    input_len: usize,
    output_len: usize,
    seed: u64,
    /// Rounds that were measured.
    rounds: usize,
    load_seconds: f64,
    machine: Machine,
    /// Of the last 1, 5 and 15 minutes, before the run and after it.
    load_average: Option<[f64; 3]>,
    load_average_after: Option<[f64; 3]>,
}

/// One schedule's figures: medians over the rounds.
#[derive(Serialize)]
struct Row {
    strategy: String,
    schedule: String,
    stages: usize,
    /// Experts per stage, where they were given.
    stage_sizes: Option<Vec<usize>>,
    tokens_per_second: f64,
    /// Of the middle half of the rounds.
    tokens_per_second_range: [f64; 2],
    /// From routing to the layer's sum, on the rank that takes longest. Median over layers and rounds.
    moe_layer_ms: Option<f64>,
    /// Of that time, what the transfer lane was busy while nothing was computed.
    exposed_transfer_ms: Option<f64>,
    /// `max(C, D + M) / T`: T is this row's MoE layer, C, D and M the computation, dispatch and combine of the serial
    /// schedule's. 1 would hide all of the shorter behind the longer; null if the serial schedule did not run.
    efficiency: Option<f64>,
    /// Most bytes that a layer needed on a rank.
    peak_bytes: u64,
    /// Where the time of the slowest rank went in the last round, in nanoseconds.
    accounts: Accounts,
    /// Whether the accounts make up that time within 2 %.
    accounts_complete: bool,
    /// Tokens per second over those of the serial schedule in the same round; null if it did not run.
    ratio_to_serial: Option<f64>,
    /// Of the auto schedule: how often it decided, and how often its predictions missed.
    decisions: Option<Decisions>,
}

/// What the auto schedule counted.
#[derive(Serialize)]
struct Decisions {
    /// MoE layers planned.
    layers: u64,
    /// Searches for a plan.
    searches: u64,
    /// Layers whose prediction was compared with the clock …
    watched: u64,
    /// … and was far off.
    mispredicted: u64,
    /// What the cost model was corrected by, in permille.
    correction: Correction,
}

/// A schedule, its engine, and what was measured of it.
struct Contender {
    policy: Policy,
    engine: Engine,
    rates: Vec<f64>,
    layers: Vec<LayerTime>,
    peak_bytes: u64,
    /// Of the last round.
    timeline: Timeline,
}

/// One MoE layer of one step.
#[derive(Clone, Copy, Debug, PartialEq)]
struct LayerTime {
    ms: f64,
    exposed_ms: f64,
    compute_ms: f64,
    transfer_ms: f64,
}

/// Measures, prints a table, and writes the files that were asked for.
pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    args.json.iter().chain(&args.trace).chain(&args.report).try_for_each(|file| output::check_place(file))?;
    let load_average = machine::load_average();
    let setup = Setup::new(&args.run)?;
    let prompts = prompts(args, &setup);
    let policies = policies(&setup, args.run.schedule)?;
    let options = policies.iter().map(|policy| setup.engine_options(demand(args, setup.ranks), policy));
    let options = options.collect::<Result<Vec<_>>>()?;
    let most = options.iter().map(|options| options.max_model_len).min().unwrap_or(0);
    prompts.iter().try_for_each(|prompt| prompt.check(setup.model.spec.vocab, most))?;

    let begun = Instant::now();
    let engines = setup.start_all(&options)?;
    let load_seconds = begun.elapsed().as_secs_f64();
    let contender = |(policy, engine)| Contender {
        policy,
        engine,
        rates: Vec::new(),
        layers: Vec::new(),
        peak_bytes: 0,
        timeline: Timeline::default(),
    };
    let mut contenders: Vec<Contender> = policies.into_iter().zip(engines).map(contender).collect();
    measure(args, &prompts, &mut contenders)?;

    let report = Report {
        rows: rows(&contenders, setup.parallel),
        command: std::env::args().collect::<Vec<_>>().join(" "),
        version: env!("CARGO_PKG_VERSION"),
        model: setup.model.name.clone(),
        processor: setup.processor(),
        ranks: setup.ranks,
        emulated_link: setup.link.map(|link| link.to_string()),
        batch_size: args.batch_size,
        input_len: args.input_len,
        output_len: args.output_len,
        seed: setup.seed,
        rounds: contenders.first().map_or(0, |contender| contender.rates.len()),
        load_seconds,
        machine: Machine::look(),
        load_average,
        load_average_after: machine::load_average(),
    };
    output::show(&report.table())?;
    contenders
        .iter()
        .filter(|it| it.policy.schedule == Schedule::Auto)
        .for_each(|it| setup.explain(&it.engine));
    if let Some(file) = &args.json {
        output::write_file(file, |out| {
            serde_json::to_writer_pretty(&mut *out, &report)?;
            out.write_all(b"\n")
        })?;
    }
    if let Some(file) = &args.trace {
        let timeline = side_by_side(&contenders);
        output::write_file(file, |out| timeline.to_chrome_json(out))?;
    }
    if let Some(file) = &args.report {
        let page = page(&report, &contenders).html();
        output::write_file(file, |out| out.write_all(page.as_bytes()))?;
    }
    Ok(())
}

/// The figures as a picture: a bar for each schedule, and the lanes of one MoE layer in each.
fn page(report: &Report, contenders: &[Contender]) -> Page {
    let label = |row: &Row| format!("{} {}, {}", row.strategy, row.schedule, count(row.stages, "stage"));
    let bar = |row: &Row| report::Row {
        label: label(row),
        tokens_per_second: row.tokens_per_second,
        accounts: row.accounts,
    };
    let mut notes = vec![
        report.heading(),
        report.command.clone(),
        format!("{}, {} cores", report.machine.cpu, report.machine.cores),
    ];
    notes.extend(report.load_average.map(|load| format!("load average before the run: {load:?}")));
    let lanes = report
        .rows
        .iter()
        .zip(contenders)
        .filter_map(|(row, contender)| Some((label(row), median_layer(&contender.timeline)?)));
    Page {
        title: format!("epsmoe bench: {}", report.model),
        notes,
        rows: report.rows.iter().map(bar).collect(),
        lanes: lanes.collect(),
    }
}

/// The MoE layer of a timeline whose time is the median, on all ranks.
fn median_layer(timeline: &Timeline) -> Option<Timeline> {
    let mut windows: BTreeMap<Layer, (u64, u64)> = BTreeMap::new();
    for ((layer, _), spans) in by_layer_and_rank(timeline) {
        if let Some((start, end)) = moe_window(&spans) {
            let window = windows.entry(layer).or_insert((start, end));
            *window = (window.0.min(start), window.1.max(end));
        }
    }
    let mut layers: Vec<_> = windows.into_iter().collect();
    layers.sort_by_key(|(_, (start, end))| end - start);
    let (layer, (start, end)) = *layers.get(layers.len() / 2)?;
    let spans: Vec<&Span> =
        timeline.spans.iter().filter(|span| span.layer == Some(layer) && span.end_ns > start).collect();
    Some(inside(&spans, start, end))
}

fn demand(args: &BenchArgs, ranks: usize) -> Demand {
    let sequences = args.batch_size.div_ceil(ranks);
    Demand {
        sequences,
        tokens: args.input_len + args.output_len,
        step: sequences.saturating_mul(args.input_len),
    }
}

/// The same random prompts in every round.
fn prompts(args: &BenchArgs, setup: &Setup) -> Vec<Request> {
    let vocabulary = setup.model.spec.vocab;
    let prompt = |index: usize| {
        let mut mix = Mix::keyed(setup.seed, &[PROMPTS, index as u64]);
        let prompt = (0..args.input_len).map(|_| mix.below(vocabulary) as u32).collect();
        Request { prompt, max_tokens: args.output_len, ignore_eos: true, ..Request::default() }
    };
    (0..args.batch_size).map(prompt).collect()
}

/// The schedules to compare: what was typed, or serial, 2, 4, 8, … stages, and auto.
fn policies(setup: &Setup, typed: Option<ScheduleKind>) -> Result<Vec<Policy>> {
    let base = &setup.policy;
    let open = Policy { stages: None, order: None, cost: None, ..base.clone() };
    let serial = Policy { schedule: Schedule::Serial, shared: None, ..open.clone() };
    let staged = |stages| Policy { schedule: Schedule::Staged, stages: Some(stages), ..open.clone() };
    match (typed, &base.stages) {
        (Some(ScheduleKind::Serial | ScheduleKind::Auto), _) => return Ok(vec![base.clone()]),
        (_, Some(_)) if typed.is_some() => return Ok(vec![base.clone()]),
        (_, Some(_)) => return Ok(vec![serial, base.clone()]),
        (_, None) if base.order.is_some() => return Ok(vec![serial, base.clone()]),
        _ => {}
    }
    let most = setup.most_local_experts()?.unwrap_or(0);
    let counts = std::iter::successors(Some(2), |stages| Some(stages * 2));
    let counts = counts.take_while(|&stages| stages <= most.min(8));
    let staged = counts.map(|stages| staged(Stages::Count(stages)));
    Ok(match typed {
        Some(_) => staged.collect(),
        None => std::iter::once(serial).chain(staged).chain([base.clone()]).collect(),
    })
}

/// Rounds in which every schedule takes its turn, the first of them to warm up; who begins moves on.
fn measure(args: &BenchArgs, prompts: &[Request], contenders: &mut [Contender]) -> Result<()> {
    let progress = output::step_bar("measuring", args.num_iters * contenders.len());
    for contender in &mut *contenders {
        contender.round(prompts)?;
        contender.forget();
    }
    let begun = Instant::now();
    for round in 0..args.num_iters {
        if round > 0 && begun.elapsed() > Duration::from_secs_f64(args.max_seconds) {
            break;
        }
        let count = contenders.len();
        for turn in 0..count {
            contenders[(round + turn) % count].round(prompts)?;
            progress.inc(1);
        }
    }
    progress.finish_and_clear();
    Ok(())
}

impl Contender {
    /// Runs all prompts to their ends.
    fn round(&mut self, prompts: &[Request]) -> Result<()> {
        let tokens: usize = prompts.iter().map(|prompt| prompt.prompt.len() + prompt.max_tokens).sum();
        self.timeline = Timeline::default();
        let (mut steps, begun) = (Vec::new(), Instant::now());
        self.engine.run(prompts.to_vec(), |step| steps.push(step.clone()))?;
        self.rates.push(tokens as f64 / begun.elapsed().as_secs_f64());
        for step in steps {
            self.layers.extend(layer_times(&step.timeline));
            self.peak_bytes = self.peak_bytes.max(peak_bytes(&step));
            self.timeline.spans.extend(step.timeline.spans);
        }
        Ok(())
    }

    fn forget(&mut self) {
        self.rates.clear();
        self.layers.clear();
    }

    fn is_serial(&self) -> bool {
        self.policy.schedule == Schedule::Serial
    }

    fn row(&self, strategy: String, serial: Option<&Contender>) -> Row {
        let stage_sizes = match &self.policy.stages {
            Some(Stages::Sizes(sizes)) => Some(sizes.clone()),
            _ => None,
        };
        let median =
            |of: &Contender, figure: fn(&LayerTime) -> f64| quantile(of.layers.iter().map(figure), 0.5);
        let layers = |figure: fn(&LayerTime) -> f64| median(self, figure);
        let bound = serial.and_then(|serial| {
            Some(median(serial, |layer| layer.compute_ms)?.max(median(serial, |layer| layer.transfer_ms)?))
        });
        let accounts = busiest(&self.timeline);
        let ratios =
            serial.map(|serial| self.rates.iter().zip(&serial.rates).map(|(own, serial)| own / serial));
        let rate = |share| quantile(self.rates.iter().copied(), share).unwrap_or(0.0);
        Row {
            strategy,
            schedule: self.policy.schedule.to_string(),
            stages: match (&self.policy.stages, self.policy.schedule) {
                (_, Schedule::Serial) => 1,
                (_, Schedule::Auto) => self.engine.schedule().map_or(1, ScheduleReport::usual_stages),
                (Some(Stages::Count(count)), _) => *count,
                (Some(Stages::Sizes(sizes)), _) => sizes.len(),
                (None, _) => Policy::DEFAULT_STAGES,
            },
            stage_sizes,
            tokens_per_second: rate(0.5),
            tokens_per_second_range: [rate(0.25), rate(0.75)],
            moe_layer_ms: layers(|layer| layer.ms),
            exposed_transfer_ms: layers(|layer| layer.exposed_ms),
            efficiency: bound.zip(layers(|layer| layer.ms)).map(|(bound, time)| bound / time),
            accounts,
            accounts_complete: accounts.unexplained() * 50 <= accounts.wall,
            peak_bytes: self.peak_bytes,
            ratio_to_serial: ratios.and_then(|ratios| quantile(ratios, 0.5)),
            decisions: self.engine.schedule().map(|report| Decisions {
                layers: report.layers,
                searches: report.searches,
                watched: report.watched,
                mispredicted: report.mispredicted,
                correction: report.correction,
            }),
        }
    }
}

fn rows(contenders: &[Contender], parallel: Parallel) -> Vec<Row> {
    let serial = contenders.iter().find(|contender| contender.is_serial());
    contenders.iter().map(|contender| contender.row(parallel.to_string(), serial)).collect()
}

fn peak_bytes(step: &StepReport) -> u64 {
    let layers = step.outputs.iter().flat_map(|output| &output.layers);
    layers.map(|layer| layer.peak_bytes).max().unwrap_or(0)
}

/// Every MoE layer of a step, on the rank where it takes longest.
fn layer_times(timeline: &Timeline) -> Vec<LayerTime> {
    let mut slowest: BTreeMap<Layer, LayerTime> = BTreeMap::new();
    for ((layer, rank), spans) in by_layer_and_rank(timeline) {
        let Some((start, end)) = moe_window(&spans) else { continue };
        let inside = inside(&spans, start, end);
        let time = LayerTime {
            ms: ms(end - start),
            exposed_ms: ms(inside.exposed_transfer(rank)),
            compute_ms: ms(inside.busy(rank, Lane::Compute)),
            transfer_ms: ms(inside.busy(rank, Lane::Transfer)),
        };
        let most = slowest.entry(layer).or_insert(time);
        if time.ms > most.ms {
            *most = time;
        }
    }
    slowest.into_values().collect()
}

fn by_layer_and_rank(timeline: &Timeline) -> BTreeMap<(Layer, Rank), Vec<&Span>> {
    let mut groups: BTreeMap<_, Vec<&Span>> = BTreeMap::new();
    for span in &timeline.spans {
        if let Some(layer) = span.layer {
            groups.entry((layer, span.rank)).or_default().push(span);
        }
    }
    groups
}

/// From the start of routing to the end of the sum over ranks, the reduction that belongs to no stage.
fn moe_window(spans: &[&Span]) -> Option<(u64, u64)> {
    let start = spans.iter().filter(|span| span.name == "route").map(|span| span.start_ns).min()?;
    let sums = spans.iter().filter(|span| span.name == "reduce" && span.stage.is_none());
    Some((start, sums.map(|span| span.end_ns).max()?))
}

/// Spans cut to a window.
fn inside(spans: &[&Span], start: u64, end: u64) -> Timeline {
    let cut = spans.iter().map(|&span| Span {
        start_ns: span.start_ns.clamp(start, end),
        end_ns: span.end_ns.clamp(start, end),
        ..span.clone()
    });
    Timeline { spans: cut.collect() }
}

/// The accounts of the rank that had the least time to spare.
fn busiest(timeline: &Timeline) -> Accounts {
    let ranks: BTreeSet<Rank> = timeline.spans.iter().map(|span| span.rank).collect();
    let accounts = ranks.into_iter().map(|rank| Accounts::of(timeline, rank));
    accounts.min_by_key(|accounts| accounts.rendezvous + accounts.idle).unwrap_or_default()
}

fn ms(ns: u64) -> f64 {
    ns as f64 / 1e6
}

/// The value below which a share of the values lies, between the nearest two; nothing of nothing.
fn quantile(values: impl Iterator<Item = f64>, share: f64) -> Option<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_unstable_by(f64::total_cmp);
    let at = share * values.len().checked_sub(1)? as f64;
    let (below, above) = (values[at.floor() as usize], values[at.ceil() as usize]);
    Some(below + (above - below) * at.fract())
}

/// All schedules' last rounds in one timeline; each has ranks of its own there.
fn side_by_side(contenders: &[Contender]) -> Timeline {
    let ranks = contenders.iter().flat_map(|contender| &contender.timeline.spans).map(|span| span.rank.0 + 1);
    let ranks = ranks.max().unwrap_or(0);
    let spans = contenders.iter().enumerate().flat_map(|(index, contender)| {
        let start = contender.timeline.spans.iter().map(|span| span.start_ns).min().unwrap_or(0);
        contender.timeline.spans.iter().map(move |span| Span {
            rank: Rank(span.rank.0 + index * ranks),
            start_ns: span.start_ns - start,
            end_ns: span.end_ns - start,
            ..span.clone()
        })
    });
    Timeline { spans: spans.collect() }
}

impl Report {
    fn table(&self) -> String {
        let columns = [
            "strategy",
            "schedule",
            "stages",
            "tokens/s",
            "MoE layer ms",
            "exposed ms",
            "efficiency",
            "peak bytes",
            "ratio",
        ];
        let mut table = format!("{}\n\n{}\n", self.heading(), line(columns));
        for row in &self.rows {
            let number =
                |number: Option<f64>, decimals| number.map_or("-".into(), |it| format!("{it:.decimals$}"));
            let cells: [&str; 9] = [
                &row.strategy,
                &row.schedule,
                &row.stages.to_string(),
                &number(Some(row.tokens_per_second), 1),
                &number(row.moe_layer_ms, 2),
                &number(row.exposed_transfer_ms, 2),
                &number(row.efficiency, 3),
                &Bytes(row.peak_bytes).to_string(),
                &number(row.ratio_to_serial, 3),
            ];
            table.push_str(&line(cells));
            table.push('\n');
        }
        table.push_str(
            "\nratio: tokens/s over those of the serial schedule in the same round; all figures are medians\n\
             efficiency: the longer of the serial layer's computation and transfers, over this layer's time\n",
        );
        table
    }

    /// What was run, in a line.
    fn heading(&self) -> String {
        let link =
            self.emulated_link.as_ref().map(|link| format!("; emulated link {link}")).unwrap_or_default();
        format!(
            "{}, {} ranks, {} prompts of {} tokens and {} new, {} rounds; {}{link}",
            self.model,
            self.ranks,
            self.batch_size,
            self.input_len,
            self.output_len,
            self.rounds,
            self.processor
        )
    }
}

fn line(cells: [&str; 9]) -> String {
    let [strategy, schedule, stages, rate, layer, exposed, efficiency, peak, ratio] = cells;
    format!(
        "{strategy:<9}{schedule:<9}{stages:>7}{rate:>11}{layer:>14}{exposed:>12}{efficiency:>12}{peak:>12}{ratio:>8}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use epsmoe_base::Stage;

    fn span(rank: usize, lane: Lane, name: &'static str, stage: Option<usize>, start: u64, end: u64) -> Span {
        Span {
            rank: Rank(rank),
            layer: Some(Layer(1)),
            stage: stage.map(Stage),
            lane,
            name: name.into(),
            start_ns: start * 1_000_000,
            end_ns: end * 1_000_000,
        }
    }

    /// ```text
    /// ms               0 1 2 3 4 5 6 7 8 9 10
    /// rank 0 compute   a ███ route  ███     █ sum
    /// rank 0 transfer      ███████    ███
    /// ```
    #[test]
    fn a_layer_is_timed_from_its_route_to_its_sum() {
        let timeline = Timeline {
            spans: vec![
                span(0, Lane::Compute, "attention", None, 0, 1),
                span(0, Lane::Compute, "route", None, 1, 3),
                span(0, Lane::Transfer, "dispatch", Some(0), 2, 5),
                span(0, Lane::Compute, "reduce", Some(0), 5, 7),
                span(0, Lane::Transfer, "combine", Some(0), 6, 8),
                span(0, Lane::Compute, "reduce", None, 9, 10),
                span(1, Lane::Compute, "route", None, 2, 3),
                span(1, Lane::Compute, "reduce", None, 9, 10),
            ],
        };
        let expected = LayerTime { ms: 9.0, exposed_ms: 3.0, compute_ms: 5.0, transfer_ms: 5.0 };
        assert_eq!(layer_times(&timeline), [expected]);
        assert_eq!(layer_times(&Timeline::default()), []);
    }

    #[test]
    fn quantiles_lie_between_values() {
        let quantile = |share| quantile([4.0, 1.0, 2.0].into_iter(), share);
        assert_eq!((quantile(0.0), quantile(0.5), quantile(0.75)), (Some(1.0), Some(2.0), Some(3.0)));
        assert_eq!(super::quantile(std::iter::empty(), 0.5), None);
    }
}
