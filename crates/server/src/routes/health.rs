//! Whether the server lives, and what it is.

use crate::app::Shared;
use crate::openai::{ApiError, ErrorBody};
use axum::Json;
use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

#[derive(Debug, Serialize, ToSchema)]
struct Health {
    /// `ok`
    status: &'static str,
}

#[derive(Debug, Serialize, ToSchema)]
struct Version {
    version: &'static str,
}

pub(crate) fn router() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(health))
        .routes(routes!(ready))
        .routes(routes!(ping))
        .routes(routes!(version))
}

/// Whether a request can be served
#[utoipa::path(
    get,
    path = "/health",
    tag = "server",
    responses((status = 200, description = "it can", body = Health), (status = 503, body = ErrorBody, description = "it cannot"))
)]
async fn health(State(app): State<Shared>) -> Result<Json<Health>, ApiError> {
    app.ready().map(|()| Json(Health { status: "ok" }))
}

/// The same, for those that ask here
#[utoipa::path(
    get,
    path = "/ready",
    tag = "server",
    responses((status = 200, description = "it can", body = Health), (status = 503, body = ErrorBody, description = "it cannot"))
)]
async fn ready(State(app): State<Shared>) -> Result<Json<Health>, ApiError> {
    health(State(app)).await
}

/// The same, for those that ask here
#[utoipa::path(
    get,
    path = "/ping",
    tag = "server",
    responses((status = 200, description = "it can", body = Health), (status = 503, body = ErrorBody, description = "it cannot"))
)]
async fn ping(State(app): State<Shared>) -> Result<Json<Health>, ApiError> {
    health(State(app)).await
}

/// The program's version
#[utoipa::path(get, path = "/version", tag = "server", responses((status = 200, description = "the version", body = Version)))]
async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION") })
}
