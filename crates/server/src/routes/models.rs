//! What is served.

use crate::app::{App, Shared};
use crate::openai::models::{ModelCard, ModelList};
use crate::openai::{ApiError, ErrorBody};
use axum::Json;
use axum::extract::{Path, State};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

pub(crate) fn router() -> OpenApiRouter<Shared> {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(one))
}

/// The model under each of its names
#[utoipa::path(
    get,
    path = "/v1/models",
    tag = "models",
    responses((status = 200, description = "all names", body = ModelList), (status = 401, body = ErrorBody, description = "no key"))
)]
async fn list(State(app): State<Shared>) -> Json<ModelList> {
    let data = app.options.served_names.iter().map(|name| card(&app, name)).collect();
    Json(ModelList { object: "list", data })
}

/// The model under one of its names
#[utoipa::path(
    get,
    path = "/v1/models/{*model}",
    tag = "models",
    params(("model" = String, Path, description = "a name, slashes included")),
    responses(
        (status = 200, description = "the model", body = ModelCard),
        (status = 401, body = ErrorBody, description = "no key"),
        (status = 404, body = ErrorBody, description = "no such model")
    )
)]
async fn one(State(app): State<Shared>, Path(model): Path<String>) -> Result<Json<ModelCard>, ApiError> {
    app.check_model(Some(&model)).map(|name| Json(card(&app, &name)))
}

fn card(app: &App, name: &str) -> ModelCard {
    ModelCard {
        id: name.to_owned(),
        object: "model",
        created: app.started,
        owned_by: "epsmoe",
        root: app.model.root.clone(),
        parent: None,
        max_model_len: app.model.max_model_len,
    }
}
