//! What is served.

use serde::Serialize;
use utoipa::ToSchema;

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelList {
    /// `list`
    pub(crate) object: &'static str,
    pub(crate) data: Vec<ModelCard>,
}

#[derive(Debug, Serialize, ToSchema)]
pub(crate) struct ModelCard {
    /// What requests call the model.
    pub(crate) id: String,
    /// `model`
    pub(crate) object: &'static str,
    /// When this server started, in seconds since 1970.
    pub(crate) created: u64,
    pub(crate) owned_by: &'static str,
    /// Where the model was loaded from.
    pub(crate) root: String,
    #[schema(required)]
    pub(crate) parent: Option<String>,
    /// Most tokens of prompt and answer together.
    pub(crate) max_model_len: usize,
}
