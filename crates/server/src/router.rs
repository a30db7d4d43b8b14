//! All routes, and what every request passes on its way to one: first id, log and panics, then other origins, the declared
//! size, the key.

use crate::anthropic::MessageErrorBody;
use crate::app::{App, Shared};
use crate::openai::chat::ChatChunk;
use crate::openai::responses::{ItemCall, ItemCallOutput, ItemMessage, ItemReasoning};
use crate::openai::sampling::LogitBias;
use crate::openai::{ApiError, ErrorBody, TokenId};
use crate::{access_log, auth, body, routes};
use axum::Router;
use axum::body::{Body, HttpBody};
use axum::extract::{Request, State};
use axum::http::header::CONTENT_LENGTH;
use axum::http::{HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use http_body_util::BodyExt;
use std::any::Any;
use std::time::Duration;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::{AllowHeaders, AllowOrigin, Any as AnyOrigin, CorsLayer};
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{OpenApi, ToSchema};
use utoipa_axum::router::OpenApiRouter;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Bytes and time for which a body that is too large is still taken in, so that its sender can read why it is refused.
const LINGER: Duration = Duration::from_secs(5);

#[derive(OpenApi)]
#[openapi(
    info(title = "epsmoe", description = "An OpenAI-compatible server of Mixture-of-Experts models"),
    components(schemas(ErrorBody, MessageErrorBody, ChatChunk, ItemMessage, ItemReasoning, ItemCall, ItemCallOutput)),
    tags(
        (name = "generation", description = "Answers"),
        (name = "models", description = "What is served"),
        (name = "tokens", description = "Text to tokens and back"),
        (name = "server", description = "How the server is")
    )
)]
struct ApiDescription;

/// The whole service.
pub(crate) fn router(app: Shared) -> Router {
    let mut protected = OpenApiRouter::new()
        .merge(routes::models::router())
        .merge(routes::completions::router())
        .merge(routes::chat::router())
        .merge(routes::responses::router())
        .merge(routes::messages::router())
        .merge(routes::tokenize::router())
        .route_layer(middleware::from_fn_with_state(app.clone(), auth::require_key));
    if !app.options.api_keys.is_empty() {
        want_key(protected.get_openapi_mut());
    }
    let open = OpenApiRouter::with_openapi(ApiDescription::openapi())
        .merge(routes::health::router())
        .merge(routes::metrics::router())
        .merge(routes::page::router());
    let (routes, mut api) = open.merge(protected).split_for_parts();
    describe(&mut api, &app);
    let cors = cors(&app.options.allowed_origins);
    let router = routes
        .merge(utoipa_swagger_ui::SwaggerUi::new("/docs").url("/openapi.json", api))
        .fallback(unknown_route)
        .method_not_allowed_fallback(wrong_method)
        .layer(middleware::from_fn_with_state(app.clone(), check_declared_size))
        .with_state(app);
    let router = router.layer(middleware::from_fn(routes::messages::reword_errors));
    let router = match cors {
        Some(cors) => router.layer(cors),
        None => router,
    };
    router
        .layer(CatchPanicLayer::custom(panicked))
        .layer(middleware::from_fn(access_log::log))
        .layer(PropagateRequestIdLayer::new(REQUEST_ID))
        .layer(SetRequestIdLayer::new(REQUEST_ID, MakeRequestUuid))
}

/// What the description of the routes cannot know by itself.
fn describe(api: &mut utoipa::openapi::OpenApi, app: &App) {
    api.info.version = env!("CARGO_PKG_VERSION").to_owned();
    // Names of models may have slashes, which is said in the router's way, not in OpenAPI's.
    let paths = &mut api.paths.paths;
    if let Some(item) = paths.shift_remove("/v1/models/{*model}") {
        paths.insert("/v1/models/{model}".to_owned(), item);
    }
    let components = api.components.get_or_insert_default();
    if let Some(RefOr::T(Schema::Object(id))) = components.schemas.get_mut(TokenId::name().as_ref()) {
        id.maximum = Some((app.model.vocab - 1).into());
    }
    components.schemas.insert(LogitBias::name().into(), LogitBias::of(app.model.vocab).into());
}

/// Says of every route that it wants a key.
fn want_key(api: &mut utoipa::openapi::OpenApi) {
    let scheme = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
    api.components.get_or_insert_default().add_security_scheme("key", scheme);
    for item in api.paths.paths.values_mut() {
        for operation in [&mut item.get, &mut item.post].into_iter().flatten() {
            operation.security = Some(vec![SecurityRequirement::new("key", [""; 0])]);
        }
    }
}

/// Pages of other origins may ask only if theirs is named.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    if origins.is_empty() {
        return None;
    }
    let layer = CorsLayer::new()
        .allow_methods([Method::GET, Method::POST])
        // Clients have headers of their own (`x-stainless-…`, `anthropic-version`, `x-api-key`), and none does harm.
        .allow_headers(AllowHeaders::mirror_request())
        .expose_headers([REQUEST_ID]);
    if origins.iter().any(|origin| origin == "*") {
        return Some(layer.allow_origin(AnyOrigin));
    }
    let origins =
        origins.iter().filter_map(|origin| HeaderValue::from_str(origin.trim_end_matches('/')).ok());
    Some(layer.allow_origin(AllowOrigin::list(origins)))
}

/// Refuses a body that says it is too large, before it is read. What still comes of it is thrown away.
async fn check_declared_size(State(app): State<Shared>, request: Request, next: Next) -> Response {
    let limit = app.options.limits.body_bytes;
    let declared = request.headers().get(CONTENT_LENGTH);
    let declared = declared.and_then(|length| length.to_str().ok()?.parse::<u64>().ok());
    if declared.is_none_or(|length| length <= limit as u64) {
        return next.run(request).await;
    }
    tokio::spawn(tokio::time::timeout(LINGER, discard(request.into_body(), limit)));
    body::too_large(limit).into_response()
}

/// Reads at most so many bytes of a body, and keeps none.
async fn discard(mut body: Body, limit: usize) {
    let mut read = 0;
    while read <= limit && !body.is_end_stream() {
        match body.frame().await {
            Some(Ok(frame)) => read += frame.data_ref().map_or(0, |data| data.len()),
            Some(Err(_)) | None => return,
        }
    }
}

async fn unknown_route(request: Request) -> ApiError {
    let message = format!("there is nothing at {} {}", request.method(), request.uri().path());
    ApiError::new(StatusCode::NOT_FOUND, message)
}

async fn wrong_method(request: Request) -> ApiError {
    let message = format!("{} cannot be asked with {}", request.uri().path(), request.method());
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
}

/// A bug must not end the connection without a word.
fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let text = epsmoe_base::panic_text(panic.as_ref());
    tracing::error!(target: "epsmoe::server", panic = text, "a request panicked: this is a bug");
    ApiError::internal("this request met a bug of the server").into_response()
}
