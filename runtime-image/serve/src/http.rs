//! The OpenAI API at the edge: JSON in, tokens to the engine, events out.

mod api;
mod chat;
mod completions;
mod error;
mod other;
mod prepare;
mod respond;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use strata_model::{ChatTemplate, GenerationConfig, ModelConfig, Vocabulary};

use crate::engine::Engine;
use crate::metrics::Metrics;
use error::ApiError;

/// The largest request body, in bytes.
const MAX_BODY_BYTES: usize = 4 << 20;

/// What the handlers share.
#[derive(Default)]
pub(crate) struct State {
    served: OnceLock<Served>,
    draining: AtomicBool,
}

/// The loaded model.
pub(crate) struct Served {
    pub(crate) names: Vec<String>,
    pub(crate) max_model_len: usize,
    pub(crate) config: ModelConfig,
    pub(crate) vocabulary: Arc<Vocabulary>,
    pub(crate) chat_template: Option<ChatTemplate>,
    pub(crate) generation: GenerationConfig,
    pub(crate) engine: Engine,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) created: u64,
}

impl Served {
    #[allow(
        clippy::too_many_arguments,
        reason = "the fields of the struct, which has no defaults"
    )]
    pub(crate) fn new(
        names: Vec<String>,
        max_model_len: usize,
        config: ModelConfig,
        vocabulary: Arc<Vocabulary>,
        chat_template: Option<ChatTemplate>,
        generation: GenerationConfig,
        engine: Engine,
        metrics: Arc<Metrics>,
    ) -> Self {
        Served {
            names,
            max_model_len,
            config,
            vocabulary,
            chat_template,
            generation,
            engine,
            metrics,
            created: unix_seconds(),
        }
    }
}

impl State {
    pub(crate) fn loaded(&self, served: Served) {
        assert!(self.served.set(served).is_ok(), "the model is loaded once");
    }

    pub(crate) fn served(&self) -> Option<&Served> {
        self.served.get()
    }

    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::SeqCst);
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }

    /// The model, for requests that do not compute.
    fn model(&self) -> Result<&Served, ApiError> {
        self.served()
            .ok_or_else(|| ApiError::unavailable("the model is being loaded"))
    }

    /// The model, for requests that compute.
    fn accepting(&self) -> Result<&Served, ApiError> {
        if self.is_draining() {
            return Err(ApiError::unavailable("the server is shutting down"));
        }
        self.model()
    }
}

fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

pub(crate) fn router(state: Arc<State>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::create))
        .route("/v1/completions", post(completions::create))
        .route("/v1/models", get(other::models))
        .route("/v1/models/{*id}", get(other::model))
        .route("/tokenize", post(other::tokenize))
        .route("/detokenize", post(other::detokenize))
        .route("/health", get(other::health))
        .route("/ready", get(other::ready))
        .route("/metrics", get(other::metrics))
        .fallback(other::not_found)
        .method_not_allowed_fallback(other::method_not_allowed)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(state)
}
