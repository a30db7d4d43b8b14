//! What Prometheus is told. Names and units are those of the field; `num_requests_running` and others that only the
//! engine knows are asked of it when somebody looks.

use crate::options::MetricNames;
use epsmoe_engine::{EngineHandle, LayerTimes, MoeLayerFigures};
use epsmoe_plan::ScheduleReport;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, prometheus_text, text};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use std::fmt;
use std::time::{Duration, Instant};

const TIME_TO_FIRST_TOKEN: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
const PER_TOKEN: [f64; 17] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 10.0];
const PER_REQUEST: [f64; 20] = [
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 60.0, 120.0, 480.0,
    1920.0, 7680.0,
];

/// Counts and times of all requests.
pub(crate) struct Metrics {
    registry: Registry,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    request_success: Family<FinishLabels, Counter>,
    time_to_first_token: Histogram,
    inter_token_latency: Histogram,
    time_per_output_token: Histogram,
    e2e_latency: Histogram,
    queue_time: Histogram,
    prefill_time: Histogram,
    decode_time: Histogram,
    inference_time: Histogram,
    request_prompt_tokens: Histogram,
    request_generation_tokens: Histogram,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FinishLabels {
    finished_reason: &'static str,
}

/// How one choice's time passed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    pub(crate) submitted: Instant,
    /// From submission to its first step.
    pub(crate) queued: Duration,
    pub(crate) first_token: Option<Instant>,
    pub(crate) last_token: Option<Instant>,
}

impl Metrics {
    pub(crate) fn new(engine: &EngineHandle, names: MetricNames, model: &str) -> Self {
        let labels = [("model_name".into(), model.to_owned().into())];
        let mut registry = Registry::with_labels(labels.into_iter());
        let prefix = names.prefix();
        registry.register_collector(Box::new(EngineCollector { engine: engine.clone(), prefix }));
        registry.register_collector(Box::new(LayerCollector { engine: engine.clone() }));
        let mut metrics = Registrar { registry: &mut registry, prefix };
        let prompt_tokens = metrics.counter("prompt_tokens", "Prompt tokens of requests");
        let generation_tokens = metrics.counter("generation_tokens", "New tokens of answers");
        let request_success = metrics.success();
        let time_to_first_token = metrics.histogram(
            "time_to_first_token_seconds",
            "From a request's submission to its first token",
            TIME_TO_FIRST_TOKEN,
        );
        let inter_token_latency =
            metrics.histogram("inter_token_latency_seconds", "Between two tokens of an answer", PER_TOKEN);
        let time_per_output_token = metrics.histogram(
            "request_time_per_output_token_seconds",
            "An answer's time after its first token, divided by the tokens after the first",
            PER_TOKEN,
        );
        let e2e_latency = metrics.histogram(
            "e2e_request_latency_seconds",
            "From submission to the last token",
            PER_REQUEST,
        );
        let queue_time =
            metrics.histogram("request_queue_time_seconds", "From submission to the first step", PER_REQUEST);
        let prefill_time = metrics.histogram(
            "request_prefill_time_seconds",
            "From the first step to the first token",
            PER_REQUEST,
        );
        let decode_time =
            metrics.histogram("request_decode_time_seconds", "From the first token to the last", PER_REQUEST);
        let inference_time = metrics.histogram(
            "request_inference_time_seconds",
            "From the first step to the last token",
            PER_REQUEST,
        );
        let tokens = || (0..20).map(|power| f64::from(1u32 << power));
        let request_prompt_tokens =
            metrics.histogram("request_prompt_tokens", "Tokens of a prompt", tokens());
        let request_generation_tokens =
            metrics.histogram("request_generation_tokens", "Tokens of an answer", tokens());
        Metrics {
            registry,
            prompt_tokens,
            generation_tokens,
            request_success,
            time_to_first_token,
            inter_token_latency,
            time_per_output_token,
            e2e_latency,
            queue_time,
            prefill_time,
            decode_time,
            inference_time,
            request_prompt_tokens,
            request_generation_tokens,
        }
    }

    /// A prompt has been taken in.
    pub(crate) fn prompt(&self, tokens: usize) {
        self.prompt_tokens.inc_by(tokens as u64);
        self.request_prompt_tokens.observe(tokens as f64);
    }

    /// A token has come.
    pub(crate) fn token(&self, times: &mut Times, at: Instant) {
        self.generation_tokens.inc();
        match times.last_token {
            Some(last) => self.inter_token_latency.observe(at.duration_since(last).as_secs_f64()),
            None => {
                times.first_token = Some(at);
                self.time_to_first_token.observe(at.duration_since(times.submitted).as_secs_f64());
            }
        }
        times.last_token = Some(at);
    }

    /// An answer has ended, for one of the reasons `stop`, `length`, `abort`.
    pub(crate) fn finished(&self, reason: &'static str, tokens: usize, times: &Times, at: Instant) {
        self.request_success.get_or_create(&FinishLabels { finished_reason: reason }).inc();
        self.request_generation_tokens.observe(tokens as f64);
        let seconds = |from: Instant, to: Instant| to.saturating_duration_since(from).as_secs_f64();
        let scheduled = times.submitted + times.queued;
        let (first, last) = (times.first_token.unwrap_or(at), times.last_token.unwrap_or(at));
        self.e2e_latency.observe(seconds(times.submitted, last));
        self.queue_time.observe(times.queued.as_secs_f64());
        self.prefill_time.observe(seconds(scheduled, first));
        self.inference_time.observe(seconds(scheduled, last));
        self.decode_time.observe(seconds(first, last));
        if tokens > 1 {
            self.time_per_output_token.observe(seconds(first, last) / (tokens - 1) as f64);
        }
    }

    /// All of it as OpenMetrics, or as Prometheus' older text.
    pub(crate) fn encode(&self, open_metrics: bool) -> Result<String, fmt::Error> {
        let mut out = String::new();
        if open_metrics {
            text::encode(&mut out, &self.registry)?;
        } else {
            prometheus_text::encode(&mut out, &self.registry)?;
        }
        Ok(out)
    }
}

/// Registers under a prefix.
struct Registrar<'a> {
    registry: &'a mut Registry,
    prefix: &'static str,
}

impl Registrar<'_> {
    fn counter(&mut self, stem: &str, help: &str) -> Counter {
        let counter = Counter::default();
        self.registry.register(format!("{}{stem}", self.prefix), help, counter.clone());
        counter
    }

    fn histogram(&mut self, stem: &str, help: &str, buckets: impl IntoIterator<Item = f64>) -> Histogram {
        let histogram = Histogram::new(buckets);
        self.registry.register(format!("{}{stem}", self.prefix), help, histogram.clone());
        histogram
    }

    fn success(&mut self) -> Family<FinishLabels, Counter> {
        let family = Family::<FinishLabels, Counter>::default();
        for finished_reason in ["stop", "length", "abort"] {
            let _ = family.get_or_create(&FinishLabels { finished_reason });
        }
        let help = "Answers that came to their end";
        self.registry.register(format!("{}request_success", self.prefix), help, family.clone());
        family
    }
}

/// What only the engine knows.
struct EngineCollector {
    engine: EngineHandle,
    prefix: &'static str,
}

impl fmt::Debug for EngineCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EngineCollector")
    }
}

impl Collector for EngineCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let stats = self.engine.stats();
        let usage = stats.kv_blocks_used as f64 / stats.kv_blocks_total.max(1) as f64;
        let mut gauge = |stem, help, value| self.put(&mut encoder, stem, help, ConstGauge::new(value));
        gauge("num_requests_running", "Requests that take part in steps", stats.running as f64)?;
        gauge("num_requests_waiting", "Requests that wait", stats.waiting as f64)?;
        gauge("kv_cache_usage_perc", "Share of the KV cache's blocks in use, 1 is all", usage)?;
        let mut counter = |stem, help, value| self.put(&mut encoder, stem, help, ConstCounter::new(value));
        counter("num_preemptions", "Requests that lost their blocks to an older one", stats.preemptions)?;
        counter("prefix_cache_queries", "Prompt tokens looked for in the cache", stats.prefix_queries)?;
        counter("prefix_cache_hits", "Prompt tokens found in the cache", stats.prefix_hits)?;
        own(&mut encoder, "engine_steps", "Steps of all ranks together", ConstCounter::new(stats.steps))
    }
}

impl EngineCollector {
    fn put(
        &self,
        encoder: &mut DescriptorEncoder,
        stem: &str,
        help: &str,
        metric: impl EncodeMetric,
    ) -> fmt::Result {
        put(encoder, &format!("{}{stem}", self.prefix), help, metric)
    }
}

fn put(encoder: &mut DescriptorEncoder, name: &str, help: &str, metric: impl EncodeMetric) -> fmt::Result {
    metric.encode(encoder.encode_descriptor(name, help, None, metric.metric_type())?)
}

/// A metric that nobody else has, so that it has our name whatever the others have.
fn own(encoder: &mut DescriptorEncoder, stem: &str, help: &str, metric: impl EncodeMetric) -> fmt::Result {
    put(encoder, &format!("{}{stem}", MetricNames::Own.prefix()), help, metric)
}

/// One of a rank's times in a layer, in nanoseconds.
type TimeOf = fn(&LayerTimes) -> u64;

/// What the MoE layers did in the steps that were watched. Looking at it has two more watched.
struct LayerCollector {
    engine: EngineHandle,
}

impl fmt::Debug for LayerCollector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LayerCollector")
    }
}

#[derive(Debug, EncodeLabelSet)]
struct LayerLabels {
    layer: u64,
}

#[derive(Debug, EncodeLabelSet)]
struct RankLabels {
    layer: u64,
    rank: u64,
}

#[derive(Debug, EncodeLabelSet)]
struct ExpertLabels {
    layer: u64,
    expert: u64,
}

impl Collector for LayerCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let Some(figures) = self.engine.layer_figures() else { return Ok(()) };
        let encoder = &mut encoder;
        let watched = ConstCounter::new(figures.watched);
        own(encoder, "moe_steps_watched", "Steps whose MoE layers were watched", watched)?;
        let layers = || figures.layers.iter().map(|figures| (figures.layer as u64, figures));
        let stages =
            layers().map(|(layer, figures)| (LayerLabels { layer }, ConstGauge::new(figures.stages as i64)));
        family(encoder, "moe_stages", "Stages of a layer's plan in the step watched last", stages)?;
        let times: [(&str, &str, TimeOf); 3] = [
            ("moe_layer_seconds", "A rank's time in a layer, in the step watched last", |times| {
                times.wall_ns
            }),
            (
                "moe_exposed_transfer_seconds",
                "Of that, time in which rows travelled and nothing computed",
                |times| times.exposed_transfer_ns,
            ),
            ("moe_idle_seconds", "Of that, time in which nothing travelled or computed", |times| {
                times.idle_ns
            }),
        ];
        for (stem, help, time) in times {
            let of_layer = |(layer, figures): (u64, &MoeLayerFigures)| {
                let ranks = figures.ranks.iter().enumerate();
                let of_rank =
                    ranks.map(|(rank, times)| (RankLabels { layer, rank: rank as u64 }, time(times)));
                of_rank.collect::<Vec<_>>()
            };
            let gauges = layers().flat_map(of_layer);
            let gauges = gauges.map(|(labels, time)| (labels, ConstGauge::new(time as f64 / 1e9)));
            family(encoder, stem, help, gauges)?;
        }
        let tokens = layers().flat_map(|(layer, figures)| {
            let experts = figures.expert_tokens.iter().enumerate();
            experts.map(move |(expert, &tokens)| {
                (ExpertLabels { layer, expert: expert as u64 }, ConstCounter::new(tokens))
            })
        });
        family(encoder, "moe_expert_tokens", "Tokens that went to an expert in the steps watched", tokens)?;
        let Some(schedule) = &figures.schedule else { return Ok(()) };
        let compared = ConstCounter::new(schedule.sampled);
        own(encoder, "moe_predictions", "Layers whose time was predicted and compared", compared)?;
        let missed = ConstCounter::new(schedule.mispredicted);
        own(encoder, "moe_mispredictions", "Of these, those that were more than a fifth off", missed)?;
        let help = "Predicted over measured time of the layers compared last";
        match predicted_over_measured(schedule) {
            Some(ratio) => own(encoder, "moe_predicted_over_measured", help, ConstGauge::new(ratio)),
            None => Ok(()),
        }
    }
}

/// A metric of ours for each of several things.
fn family<L: EncodeLabelSet, M: EncodeMetric>(
    encoder: &mut DescriptorEncoder,
    stem: &str,
    help: &str,
    metrics: impl Iterator<Item = (L, M)>,
) -> fmt::Result {
    let mut metrics = metrics.peekable();
    let Some((_, first)) = metrics.peek() else { return Ok(()) };
    let name = format!("{}{stem}", MetricNames::Own.prefix());
    let mut encoder = encoder.encode_descriptor(&name, help, None, first.metric_type())?;
    metrics.try_for_each(|(labels, metric)| metric.encode(encoder.encode_family(&labels)?))
}

/// How the time that was predicted of layers compares with what they took: of the last one compared of each plan.
pub(crate) fn predicted_over_measured(schedule: &ScheduleReport) -> Option<f64> {
    let samples = || schedule.plans.iter().filter_map(|plan| plan.last_sample.as_ref());
    let predicted: u64 = samples().map(|sample| sample.layer.predicted_ns).sum();
    let measured: u64 = samples().map(|sample| sample.layer.measured_ns).sum();
    (measured > 0).then(|| predicted as f64 / measured as f64)
}
