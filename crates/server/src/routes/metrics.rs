//! `/metrics`.

use crate::app::Shared;
use crate::openai::ApiError;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const PROMETHEUS: &str = "text/plain; version=0.0.4; charset=utf-8";

pub(crate) fn router() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(metrics))
}

/// Counts and times, for Prometheus; as OpenMetrics where that is accepted
#[utoipa::path(
    get,
    path = "/metrics",
    tag = "server",
    responses((status = 200, description = "all metrics", content_type = "text/plain", body = String))
)]
async fn metrics(State(app): State<Shared>, headers: HeaderMap) -> Result<Response, ApiError> {
    let accepts = headers.get(ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    let open_metrics = accepts.contains("application/openmetrics-text");
    let text = app.metrics.encode(open_metrics).map_err(|error| ApiError::internal(error.to_string()))?;
    let content_type = if open_metrics { OPEN_METRICS } else { PROMETHEUS };
    Ok(([(CONTENT_TYPE, content_type)], text).into_response())
}
