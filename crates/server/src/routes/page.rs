//! A page for people who would rather look, and what it asks every second.

use crate::app::{App, Shared};
use crate::metrics::predicted_over_measured;
use crate::openai::{ApiError, ErrorBody, now};
use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::http::header::{CACHE_CONTROL, CONTENT_SECURITY_POLICY};
use axum::response::{Html, IntoResponse};
use epsmoe_base::{Lane, Layer};
use epsmoe_engine::{EngineStats, LayerFigures, LayerTimes, MoeLayerFigures};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// The whole page: one file, which asks nobody but this server.
const PAGE: &str = include_str!("../page/index.html");

/// What the page may do: run its own script, and ask where it came from.
const POLICY: &str = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; \
                      img-src data:; base-uri 'none'; form-action 'none'";

/// Most spans of a layer that are told.
const MOST_SPANS: usize = 4096;

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct StatusQuery {
    /// Whether the spans of an MoE layer are wanted too
    #[serde(default)]
    layer: bool,
    /// Whether the tokens of every expert are wanted too
    #[serde(default)]
    experts: bool,
}

/// How the server is now.
#[derive(Debug, Serialize, ToSchema)]
struct Status {
    model: String,
    version: &'static str,
    max_model_len: usize,
    uptime_seconds: u64,
    /// Whether a request can be served
    ready: bool,
    /// Why not, where the ranks have stopped: it names rank, layer and stage
    fault: Option<String>,
    running: u64,
    waiting: u64,
    kv_blocks_used: u64,
    kv_blocks_total: u64,
    prefix_queries: u64,
    prefix_hits: u64,
    preemptions: u64,
    steps: u64,
    prompt_tokens: u64,
    generation_tokens: u64,
    ranks: Vec<RankStatus>,
    /// How the time that was predicted of the MoE layers compared last compares with what they took
    predicted_over_measured: Option<f64>,
    /// The last MoE layer of a recent step
    layer: Option<LayerStatus>,
    /// Tokens of every expert in the steps that were watched, by layer
    experts: Option<Vec<ExpertsStatus>>,
}

/// How a rank is.
#[derive(Debug, Serialize, ToSchema)]
struct RankStatus {
    rank: usize,
    /// `ready`, `stopped` where something went wrong, or `waiting` where it went wrong elsewhere
    state: &'static str,
    /// What it computes on
    device: String,
    /// Microseconds that it was in MoE layers, in the step that was watched last
    wall_us: f64,
    /// Of these, those in which rows travelled and nothing computed
    exposed_transfer_us: f64,
    /// Of these, those in which nothing travelled or computed
    idle_us: f64,
}

#[derive(Debug, Serialize, ToSchema)]
struct ExpertsStatus {
    layer: usize,
    tokens: Vec<u64>,
}

/// When each operation of an MoE layer ran, on every rank.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(crate) struct LayerStatus {
    layer: usize,
    spans: Vec<SpanStatus>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
struct SpanStatus {
    rank: usize,
    /// `compute` or `transfer`
    lane: String,
    stage: Option<usize>,
    /// What for: `dispatch`, `gate/up`, …
    phase: String,
    /// Microseconds from the layer's first start
    start: f64,
    end: f64,
}

pub(crate) fn router() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().route("/", axum::routing::get(page)).routes(routes!(status))
}

async fn page() -> impl IntoResponse {
    ([(CONTENT_SECURITY_POLICY, POLICY), (CACHE_CONTROL, "no-cache")], Html(PAGE))
}

/// How the server is now
#[utoipa::path(
    get,
    path = "/status",
    tag = "server",
    params(StatusQuery),
    responses((status = 200, description = "how it is", body = Status), (status = 400, body = ErrorBody, description = "what is wrong with the request"))
)]
async fn status(
    State(app): State<Shared>,
    query: Result<Query<StatusQuery>, QueryRejection>,
) -> Result<Json<Status>, ApiError> {
    let Query(query) = query.map_err(|error| ApiError::bad_request(error.body_text()))?;
    let EngineStats {
        running,
        waiting,
        kv_blocks_used,
        kv_blocks_total,
        prefix_queries,
        prefix_hits,
        preemptions,
        steps,
        prompt_tokens,
        generation_tokens,
    } = app.model.engine.stats();
    let figures = if query.layer || query.experts { app.model.engine.layer_figures() } else { None };
    let schedule = figures.as_ref().and_then(|figures| figures.schedule.as_ref());
    Ok(Json(Status {
        model: app.options.served_names[0].clone(),
        version: env!("CARGO_PKG_VERSION"),
        max_model_len: app.model.max_model_len,
        uptime_seconds: now().saturating_sub(app.started),
        ready: app.ready().is_ok(),
        fault: app.model.engine.fault().map(|fault| fault.to_string()),
        running,
        waiting,
        kv_blocks_used,
        kv_blocks_total,
        prefix_queries,
        prefix_hits,
        preemptions,
        steps,
        prompt_tokens,
        generation_tokens,
        ranks: ranks(&app, figures.as_deref()),
        predicted_over_measured: schedule.and_then(predicted_over_measured),
        layer: figures.as_deref().filter(|_| query.layer).and_then(last_layer),
        experts: figures.as_deref().filter(|_| query.experts).map(experts),
    }))
}

fn ranks(app: &App, figures: Option<&LayerFigures>) -> Vec<RankStatus> {
    let fault = app.model.engine.fault();
    let ranks = app.model.ranks.iter().enumerate().map(|(rank, device)| {
        let layers = figures.iter().flat_map(|figures| &figures.layers);
        let times: Vec<&LayerTimes> = layers.filter_map(|layer| layer.ranks.get(rank)).collect();
        let micros =
            |time: fn(&LayerTimes) -> u64| times.iter().map(|times| time(times)).sum::<u64>() as f64 / 1e3;
        RankStatus {
            rank,
            state: match &fault {
                None => "ready",
                Some(fault) if fault.rank.0 == rank => "stopped",
                Some(_) => "waiting",
            },
            device: device.clone(),
            wall_us: micros(|times| times.wall_ns),
            exposed_transfer_us: micros(|times| times.exposed_transfer_ns),
            idle_us: micros(|times| times.idle_ns),
        }
    });
    ranks.collect()
}

fn experts(figures: &LayerFigures) -> Vec<ExpertsStatus> {
    let of_layer =
        |layer: &MoeLayerFigures| ExpertsStatus { layer: layer.layer, tokens: layer.expert_tokens.clone() };
    figures.layers.iter().map(of_layer).collect()
}

/// What the last MoE layer of the step did that was watched last.
fn last_layer(figures: &LayerFigures) -> Option<LayerStatus> {
    let first = figures.last_layer.iter().map(|span| span.start_ns).min()?;
    let Layer(layer) = figures.last_layer.first()?.layer?;
    let micros = |at: u64| at.saturating_sub(first) as f64 / 1e3;
    let spans = figures.last_layer.iter().take(MOST_SPANS).map(|span| SpanStatus {
        rank: span.rank.0,
        lane: lane(span.lane).to_owned(),
        stage: span.stage.map(|stage| stage.0),
        phase: span.phase.to_string(),
        start: micros(span.start_ns),
        end: micros(span.end_ns),
    });
    Some(LayerStatus { layer, spans: spans.collect() })
}

fn lane(lane: Lane) -> &'static str {
    match lane {
        Lane::Compute => "compute",
        Lane::Transfer => "transfer",
    }
}
