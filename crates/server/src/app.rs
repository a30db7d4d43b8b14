//! What every route sees.

use crate::guide::GuideFactory;
use crate::metrics::Metrics;
use crate::openai::{ApiError, now};
use crate::options::{ServedModel, ServerOptions};
use epsmoe_text::Tokenizer;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::sync::watch;

/// The server's one state, shared by all requests.
pub(crate) struct App {
    pub(crate) model: ServedModel,
    pub(crate) options: ServerOptions,
    pub(crate) metrics: Metrics,
    /// When the server started, in seconds since 1970.
    pub(crate) started: u64,
    guides: OnceLock<Result<GuideFactory, String>>,
    draining: watch::Sender<bool>,
}

/// The state as routes are given it.
pub(crate) type Shared = Arc<App>;

impl App {
    pub(crate) fn new(model: ServedModel, options: ServerOptions) -> Self {
        let metrics = Metrics::new(&model.engine, options.metric_names, &options.served_names[0]);
        let (guides, draining) = (OnceLock::new(), watch::Sender::new(false));
        App { model, options, metrics, started: now(), guides, draining }
    }

    /// The name that the answer repeats; 404 for a model that is not here.
    pub(crate) fn check_model(&self, asked: Option<&str>) -> Result<String, ApiError> {
        let served = &self.options.served_names;
        match asked {
            None => Ok(served[0].clone()),
            Some(name) if served.iter().any(|served| served == name) => Ok(name.to_owned()),
            Some(name) => Err(ApiError::unknown_model(name, served)),
        }
    }

    /// The tokenizer, for requests that cannot do without.
    pub(crate) fn tokenizer(&self, param: &str) -> Result<&Tokenizer, ApiError> {
        let none = || ApiError::field(param, "this model has no tokenizer: give the prompt as token ids");
        self.model.tokenizer.as_ref().ok_or_else(none)
    }

    /// What makes constraints out of grammars; made when it is first wanted.
    pub(crate) fn guides(&self) -> Result<&GuideFactory, ApiError> {
        let made = self.guides.get_or_init(|| GuideFactory::new(&self.model));
        made.as_ref().map_err(|problem| ApiError::internal(problem.clone()))
    }

    /// From now on the server is not ready for more.
    pub(crate) fn start_draining(&self) {
        self.draining.send_replace(true);
    }

    /// Ends a while after the server has begun to shut down: what clients had sent by then has arrived.
    pub(crate) async fn last_bodies(&self) -> ApiError {
        /// As long as networks take to deliver what was sent.
        const WHILE: Duration = Duration::from_secs(1);
        // The sender is this app's, so the wait ends by its word alone.
        let _ = self.draining.subscribe().wait_for(|draining| *draining).await;
        tokio::time::sleep(WHILE).await;
        shutting_down()
    }

    /// Whether a request can be served; 503 if not.
    pub(crate) fn ready(&self) -> Result<(), ApiError> {
        if let Some(fault) = self.model.engine.fault() {
            return Err(ApiError::unavailable(format!("the model has stopped: {fault}")));
        }
        if *self.draining.borrow() {
            return Err(shutting_down());
        }
        Ok(())
    }
}

fn shutting_down() -> ApiError {
    ApiError::busy("the server is shutting down")
}
