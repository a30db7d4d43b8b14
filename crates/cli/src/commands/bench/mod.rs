//! `epsmoe bench`: schedules, and with `--ablation` strategies and kernels, on the same weights and the same prompts.
//! All of them take turns in every round, so that what else the machine does falls on all of them.

mod contenders;
mod emulated;
pub(crate) mod layer;
mod times;

use crate::args::{BenchArgs, DeviceKind};
use crate::machine::{self, Machine};
use crate::output;
use crate::report::{self, Lanes, Parts, Report as Page};
use crate::setup::{Demand, Setup};
use anyhow::Result;
use contenders::{Contender, measure, rows, side_by_side, ways};
use epsmoe_base::{Bytes, Mix, count};
use epsmoe_engine::{EngineOptions, Parallel, Request};
use epsmoe_fabric::Pacing;
use epsmoe_plan::{Correction, LayerSample, Schedule, TimeBreakdown};
use serde::Serialize;
use std::fmt;
use std::time::{Duration, Instant};
pub(crate) use times::quantile;
use times::{HostTime, median_layer};

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
    /// The one rank of how many that was here; tokens per second are those of all of them.
    emulated_rank: Option<String>,
    /// How well it kept its times, over all rows.
    pacing: Option<PacingFigures>,
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

/// One way's figures: medians over the rounds.
#[derive(Serialize)]
struct Row {
    strategy: String,
    schedule: String,
    stages: usize,
    /// How the experts of a stage are multiplied.
    gemm: String,
    /// Experts per stage, where they were given.
    stage_sizes: Option<Vec<usize>>,
    /// Experts per stage of the first rank in the last layer that ran; null for two micro-batches.
    last_cut: Option<Vec<usize>>,
    /// What the transfer lane did there.
    transfer_order: Option<String>,
    tokens_per_second: f64,
    /// Of the middle half of the rounds.
    tokens_per_second_range: [f64; 2],
    /// The first step of a round, of all prompts or as many as fit in one.
    first_step_ms: Option<f64>,
    /// A step in which every prompt gets one more token; null if each gets but one.
    decode_step_ms: Option<f64>,
    /// From routing to the layer's sum, on the rank that takes longest. Median over layers and rounds.
    moe_layer_ms: Option<f64>,
    /// Computation of the layer, on the rank that computes most.
    compute_ms: Option<f64>,
    /// Of that, the experts of all stages: expand, products, reduce.
    experts_ms: Option<f64>,
    /// Dispatches and combines of all stages, on the rank that waits least for the others in them.
    dispatch_and_combine_ms: Option<f64>,
    /// The shortest dispatch or combine of a stage in any round.
    smallest_transfer_ms: Option<f64>,
    /// Of the layer's time, what the transfer lane was busy while nothing was computed.
    exposed_transfer_ms: Option<f64>,
    /// `max(C, D + M) / T`: T is this row's MoE layer, C, D and M the computation, dispatch and combine of the serial
    /// schedule's, as above. 1 would hide all of the shorter behind the longer; null if the serial schedule did not run.
    efficiency: Option<f64>,
    /// What the hosts of its ranks took for an MoE layer; null where ranks do not meet.
    host: Option<HostTime>,
    /// Most bytes that a layer needed on a rank.
    peak_bytes: u64,
    /// Where the time of the slowest rank went in the last round, in nanoseconds.
    breakdown: TimeBreakdown,
    /// Whether the breakdown make up that time within 2 %.
    accounts_complete: bool,
    /// Tokens per second over those of the serial schedule in the same round, of the same strategy and kernel; null
    /// if it did not run.
    ratio_to_serial: Option<f64>,
    /// The same over those of the first row, in an ablation.
    ratio_to_base: Option<f64>,
    /// Of the auto schedule: how often it decided, and how often its predictions missed.
    decisions: Option<Decisions>,
    /// How well the emulated link kept its times.
    pacing: Option<PacingFigures>,
}

/// How late transfers were over, after the times that the emulated link gave them.
#[derive(Serialize)]
struct PacingFigures {
    transfers: u64,
    /// Transfers that the machine copied more slowly than the link would: too short to be shown.
    unresolved: u64,
    late_us_median: f64,
    late_us_95th: f64,
    late_us_worst: f64,
}

impl PacingFigures {
    /// Nothing where nothing was paced.
    fn of(pacing: &Pacing) -> Option<Self> {
        let us = |late: Duration| late.as_secs_f64() * 1e6;
        (pacing.exchanges > 0).then(|| PacingFigures {
            transfers: pacing.exchanges,
            unresolved: pacing.unresolved,
            late_us_median: us(pacing.late.quantile(0.5)),
            late_us_95th: us(pacing.late.quantile(0.95)),
            late_us_worst: us(pacing.late.worst()),
        })
    }
}

impl fmt::Display for PacingFigures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "pacing of the emulated link: {} transfers ended {:.0} us late (median), {:.0} us (95th percentile), \
             {:.0} us (worst); {} too short to resolve",
            self.transfers, self.late_us_median, self.late_us_95th, self.late_us_worst, self.unresolved
        )
    }
}

/// What the auto schedule counted.
#[derive(Serialize)]
struct Decisions {
    /// MoE layers planned.
    layers: u64,
    /// Searches for a plan.
    searches: u64,
    /// Layers whose prediction was compared with the clock …
    sampled: u64,
    /// … and was far off.
    mispredicted: u64,
    /// What the cost model was corrected by, in permille.
    correction: Correction,
}

/// Measures, prints a table, and writes the files that were asked for.
pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    args.json.iter().chain(&args.trace).chain(&args.report).try_for_each(|file| output::check_place(file))?;
    let load_average = machine::load_average();
    let setup = Setup::of(&args.run, args.emulate_rank)?;
    let ways = ways(args, &setup)?;
    let options = ways
        .iter()
        .map(|way| setup.engine_options(demand(args, setup.ranks, &way.parallel), way.parallel, &way.policy));
    let recorded = |options| EngineOptions { record_spans: true, ..options };
    let options = options.map(|options| options.map(recorded)).collect::<Result<Vec<_>>>()?;
    check_room(args, &setup, &options)?;
    let prompts = prompts(args, &setup);

    let begun = Instant::now();
    let prompts = match setup.emulated {
        Some(one) => emulated::learn(&setup, one, &options, &prompts, args.output_len)?,
        None => prompts,
    };
    if setup.ranks == 1 && setup.emulated.is_none() {
        output::remark(match args.run.device {
            DeviceKind::Cuda => {
                "one rank: nothing travels, and schedules have nothing to hide. --data-parallel-size N takes N GPUs, --device cuda:0 \
                 lets two ranks share one"
            }
            _ => "one rank: nothing travels, and schedules have nothing to hide",
        });
    }
    let engines = setup.start_all(&options)?;
    let load_seconds = begun.elapsed().as_secs_f64();
    // A rank stands for all of its world.
    let ranks = setup.emulated.map_or(1, |one| one.size);
    let contender = |(way, engine)| Contender::new(way, engine, ranks);
    let mut contenders: Vec<Contender> = ways.into_iter().zip(engines).map(contender).collect();
    let apart = !matches!(args.run.device, DeviceKind::Cpu | DeviceKind::Reference);
    measure(args, &prompts, &mut contenders, apart)?;

    let report = Report {
        rows: rows(&contenders, args.ablation),
        command: std::env::args().collect::<Vec<_>>().join(" "),
        version: env!("CARGO_PKG_VERSION"),
        model: setup.model.name.clone(),
        processor: setup.processor(),
        ranks: setup.ranks,
        emulated_link: setup.link.map(|link| link.to_string()),
        emulated_rank: setup.emulated.map(|one| one.to_string()),
        pacing: pacing(&contenders),
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
    let auto = contenders.iter().filter(|contender| contender.way.policy.schedule == Schedule::Auto);
    auto.for_each(|contender| setup.explain(&contender.engine));
    if !args.contender.is_empty() || setup.emulated.is_some() {
        output::show(&report.layers())?;
    }
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

fn pacing(contenders: &[Contender]) -> Option<PacingFigures> {
    let mut all = Pacing::default();
    contenders.iter().for_each(|contender| all.add(&contender.pacing));
    PacingFigures::of(&all)
}

/// The figures as a picture: a bar for each schedule, and the lanes of one MoE layer in each.
fn page(report: &Report, contenders: &[Contender]) -> Page {
    let is_two_batch = |row: &Row| row.schedule == Schedule::TwoBatch.to_string();
    let label = |row: &Row| {
        let kernel = row.ratio_to_base.map(|_| format!(", {}", row.gemm)).unwrap_or_default();
        let stages =
            if is_two_batch(row) { String::new() } else { format!(", {}", count(row.stages, "stage")) };
        format!("{} {}{stages}{kernel}", row.strategy, row.schedule)
    };
    let bar = |row: &Row| report::Row {
        label: label(row),
        tokens_per_second: row.tokens_per_second,
        breakdown: row.breakdown,
    };
    let mut notes = vec![
        report.heading(),
        report.command.clone(),
        format!("{}, {} cores", report.machine.cpu, report.machine.cores),
    ];
    notes.extend(report.pacing.as_ref().map(PacingFigures::to_string));
    notes.extend(report.load_average.map(|load| format!("load average before the run: {load:?}")));
    let lanes = report.rows.iter().zip(contenders).flat_map(|(row, contender)| {
        let median = median_layer(&contender.timeline);
        let only = if is_two_batch(row) { " (measured only: no cost model predicts it)" } else { "" };
        let parts = if is_two_batch(row) { Parts::MicroBatches } else { Parts::Stages };
        let median = median.map(|timeline| (label(row) + only, vec![Lanes { what: "", parts, timeline }]));
        let plans = contender.engine.schedule().into_iter().flat_map(|report| report.plans);
        let held_against = plans.filter_map(|plan| {
            let LayerSample { predicted, measured, .. } = plan.last_sample.as_ref()?;
            let lanes = [(", predicted", predicted), (", measured", measured)];
            let lanes = lanes.map(|(what, timeline)| Lanes { what, parts, timeline: timeline.clone() });
            Some((format!("predicted over measured, {}", plan.bucket), lanes.into()))
        });
        median.into_iter().chain(held_against).collect::<Vec<_>>()
    });
    Page {
        title: format!("epsmoe bench: {}", report.model),
        notes,
        rows: report.rows.iter().map(bar).collect(),
        lanes: lanes.collect(),
    }
}

/// Every way has the same prompts, dealt out to its groups of ranks.
fn demand(args: &BenchArgs, ranks: usize, parallel: &Parallel) -> Demand {
    let sequences = args.batch_size.div_ceil(ranks / parallel.tensor);
    Demand {
        sequences,
        tokens: args.input_len + args.output_len,
        step: sequences.saturating_mul(args.input_len),
    }
}

/// Refuses prompts that the model or this process has no room for, before there are any.
fn check_room(args: &BenchArgs, setup: &Setup, options: &[EngineOptions]) -> Result<()> {
    let most = options.iter().map(|options| options.max_model_len).min().unwrap_or(0);
    request(&vec![0; args.input_len], args.output_len).check(setup.model.spec.vocab, most)?;
    setup.check_memory(options)?;
    // What is asked for, what is asked in a round, and what the engine has of it.
    let bytes = (args.batch_size * (args.input_len + args.output_len)) as u64 * 3 * size_of::<u32>() as u64;
    let what = format!("the prompts of --batch-size {} and --input-len {}", args.batch_size, args.input_len);
    setup.check_room(what, bytes)
}

/// The same random prompts in every round.
fn prompts(args: &BenchArgs, setup: &Setup) -> Vec<Vec<u32>> {
    let vocabulary = setup.model.spec.vocab;
    let prompt = |index: usize| {
        let mut mix = Mix::keyed(setup.seed, &[PROMPTS, index as u64]);
        (0..args.input_len).map(|_| mix.below(vocabulary) as u32).collect()
    };
    (0..args.batch_size).map(prompt).collect()
}

/// A prompt, continued by as many tokens as are measured.
fn request(prompt: &[u32], output_len: usize) -> Request {
    Request { prompt: prompt.to_vec(), max_tokens: output_len, ignore_eos: true, ..Request::default() }
}

impl Report {
    fn table(&self) -> String {
        let columns = [
            "strategy",
            "schedule",
            "stages",
            "gemm",
            "tokens/s",
            "MoE layer ms",
            "exposed ms",
            "efficiency",
            "peak bytes",
            "ratio",
        ];
        let mut table = format!("{}\n\n{}\n", self.heading(), line(columns));
        for row in &self.rows {
            let cells: [&str; 10] = [
                &row.strategy,
                &row.schedule,
                &row.stages.to_string(),
                &row.gemm,
                &number(Some(row.tokens_per_second), 1),
                &number(row.moe_layer_ms, 2),
                &number(row.exposed_transfer_ms, 2),
                &number(row.efficiency, 3),
                &Bytes(row.peak_bytes).to_string(),
                &number(row.ratio_to_base.or(row.ratio_to_serial), 3),
            ];
            table.push_str(&line(cells));
            table.push('\n');
        }
        let base = if self.rows.iter().any(|row| row.ratio_to_base.is_some()) {
            "the first row; the MoE layer of split experts is without its exchange of rows"
        } else {
            "the serial schedule"
        };
        table.push_str(&format!(
            "\nratio: tokens/s in the same round, over those of {base}; all figures are medians\n\
             efficiency: the longer of the serial layer's computation and transfers, over this layer's time\n",
        ));
        for remark in self
            .rows
            .iter()
            .find_map(Row::balance)
            .into_iter()
            .chain(
                self.rows
                    .iter()
                    .filter_map(Row::host)
                    .max_by(|one, other| one.0.total_cmp(&other.0))
                    .map(|it| it.1),
            )
            .chain(self.rows.iter().filter_map(Row::steps))
            .chain(self.pacing.as_ref().map(|it| it.to_string()))
        {
            table.push_str(&remark);
            table.push('\n');
        }
        table
    }

    /// A line for every schedule's MoE layer: how it was cut, and where its time went.
    fn layers(&self) -> String {
        let mut text = format!(
            "\n{}\n",
            layer_line([
                "schedule",
                "layer ms",
                "C ms",
                "experts",
                "D+M ms",
                "exposed",
                "smallest",
                "efficiency",
                "ratio",
                "cut and order of the last layer"
            ])
        );
        for row in &self.rows {
            let sizes = row.last_cut.iter().flatten().map(usize::to_string).collect::<Vec<_>>().join(",");
            let order = row.transfer_order.as_deref().unwrap_or_default();
            let cells: [&str; 10] = [
                &row.schedule,
                &number(row.moe_layer_ms, 2),
                &number(row.compute_ms, 2),
                &number(row.experts_ms, 2),
                &number(row.dispatch_and_combine_ms, 2),
                &number(row.exposed_transfer_ms, 2),
                &number(row.smallest_transfer_ms, 2),
                &number(row.efficiency, 3),
                &number(row.ratio_to_serial, 3),
                &[sizes.as_str(), order].join("  "),
            ];
            text.push_str(&layer_line(cells));
            text.push('\n');
        }
        text + "\nC: all computation of the layer, on the rank that computes most; D+M: dispatch and combine, on the rank that waits \
         least in them; smallest: the shortest of them in any round\n"
    }

    /// What was run, in a line.
    fn heading(&self) -> String {
        let link =
            self.emulated_link.as_ref().map(|link| format!("; emulated link {link}")).unwrap_or_default();
        let one = self.emulated_rank.as_ref();
        let one = one.map(|one| format!(" (EMULATED by one: {one})")).unwrap_or_default();
        format!(
            "{}, {} ranks{one}, {} prompts of {} tokens and {} new, {} rounds; {}{link}",
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

impl Row {
    /// What the hosts took for a layer between its counts and its plan, and a sentence about it.
    fn host(&self) -> Option<(f64, String)> {
        let HostTime { packing_us, rendezvous_us, planning_us, enqueueing_us } = self.host?;
        let blocking = packing_us + rendezvous_us + planning_us;
        let sentence = format!(
            "host of an MoE layer at most ({}, {}): {packing_us:.0} us to pack, {rendezvous_us:.0} us to meet, {planning_us:.0} us \
             to plan, {enqueueing_us:.0} us to enqueue",
            self.schedule,
            count(self.stages, "stage")
        );
        Some((blocking, sentence))
    }

    /// What steps take, where there are such that only continue prompts.
    fn steps(&self) -> Option<String> {
        let (first, decode) = (self.first_step_ms?, self.decode_step_ms?);
        let stages = count(self.stages, "stage");
        Some(format!(
            "steps ({}, {stages}): {first:.2} ms the first, {decode:.2} ms one that decodes",
            self.schedule
        ))
    }

    /// Of the serial schedule: what there is to hide, and behind what.
    fn balance(&self) -> Option<String> {
        let (transfers, experts) = (self.dispatch_and_combine_ms?, self.experts_ms?);
        (self.schedule == Schedule::Serial.to_string() && transfers > 0.0 && experts > 0.0).then(|| {
            format!(
                "dispatch and combine of the serial layer ({}) take {transfers:.2} ms, {:.2} times what its experts compute",
                self.strategy,
                transfers / experts
            )
        })
    }
}

fn number(number: Option<f64>, decimals: usize) -> String {
    number.map_or("-".into(), |it| format!("{it:.decimals$}"))
}

fn layer_line(cells: [&str; 10]) -> String {
    let [schedule, layer, compute, experts, transfers, exposed, smallest, efficiency, ratio, table] = cells;
    format!(
        "{schedule:<10}{layer:>9}{compute:>9}{experts:>9}{transfers:>9}{exposed:>9}{smallest:>9}{efficiency:>11}{ratio:>7}  {table}"
    )
}

fn line(cells: [&str; 10]) -> String {
    let [strategy, schedule, stages, gemm, rate, layer, exposed, efficiency, peak, ratio] = cells;
    format!(
        "{strategy:<9}{schedule:<10}{stages:>6}{gemm:>9}{rate:>11}{layer:>14}{exposed:>12}{efficiency:>12}{peak:>12}{ratio:>8}"
    )
}
