//! The OpenAI API at the edge: JSON in, tokens to the engine, events out.

mod admit;
mod api;
mod auth;
mod azure;
mod chat;
mod completions;
mod error;
mod form;
mod gather;
mod lora;
mod other;
mod prepare;
mod respond;
mod tools;
mod unsupported;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{DefaultBodyLimit, State as Extract};
use axum::middleware::{from_fn_with_state, map_response_with_state};
use axum::response::Response;
use axum::routing::{get, post};
use strata_model::{ChatTemplate, GenerationConfig, ModelConfig, Vocabulary};

use crate::adapters::Adapters;
use crate::engine::{Engine, Forms};
use crate::metrics::Metrics;
pub(crate) use admit::Admission;
use admit::MAX_BODY_BYTES;
pub(crate) use auth::Keys;
use error::ApiError;

/// What the handlers share.
pub(crate) struct State {
    served: OnceLock<Served>,
    leaving: AtomicBool,
    closed: AtomicBool,
    admission: Admission,
    keys: Option<Keys>,
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
    pub(crate) forms: Forms,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) adapters: Adapters,
    /// Adapters are loaded and unloaded over HTTP.
    pub(crate) adapter_updates: bool,
    /// When it was loaded, in Unix seconds.
    pub(crate) created: u64,
}

impl State {
    pub(crate) fn new(admission: Admission, keys: Option<Keys>) -> Self {
        State {
            served: OnceLock::new(),
            leaving: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            admission,
            keys,
        }
    }

    pub(crate) fn loaded(&self, served: Served) {
        assert!(self.served.set(served).is_ok(), "the model is loaded once");
    }

    pub(crate) fn served(&self) -> Option<&Served> {
        self.served.get()
    }

    /// From now on the server is not ready; whoever has not heard of it yet is still answered.
    pub(crate) fn leave(&self) {
        self.leaving.store(true, Ordering::SeqCst);
    }

    /// From now on new requests are refused.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// The model, for requests that do not compute.
    fn model(&self) -> Result<&Served, ApiError> {
        self.served()
            .ok_or_else(|| ApiError::unavailable("the model is being loaded"))
    }

    /// The model, for requests that compute.
    fn accepting(&self) -> Result<&Served, ApiError> {
        self.unless(&self.closed)
    }

    /// The model, if new clients should come.
    fn ready(&self) -> Result<&Served, ApiError> {
        self.unless(&self.leaving)
    }

    fn unless(&self, flag: &AtomicBool) -> Result<&Served, ApiError> {
        if flag.load(Ordering::SeqCst) {
            return Err(ApiError::unavailable("the server is shutting down"));
        }
        self.model()
    }
}

/// A client that keeps its connection would stay with a server that leaves: told to close it, it finds another one.
async fn close_when_leaving(Extract(state): Extract<Arc<State>>, mut response: Response) -> Response {
    if state.leaving.load(Ordering::SeqCst) {
        error::close(&mut response);
    }
    response
}

pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

fn v1() -> Router<Arc<State>> {
    Router::new()
        .route("/chat/completions", post(chat::create))
        .route("/completions", post(completions::create))
        .route("/models", get(other::models))
        .route("/load_lora_adapter", post(lora::load))
        .route("/unload_lora_adapter", post(lora::unload))
        .route("/models/{*id}", get(other::model))
}

pub(crate) fn router(state: Arc<State>) -> Router {
    Router::new()
        .nest("/v1", v1())
        .nest("/openai/v1", v1())
        .route("/openai/deployments/{name}/chat/completions", post(azure::chat))
        .route("/openai/deployments/{name}/completions", post(azure::completions))
        .route("/tokenize", post(other::tokenize))
        .route("/detokenize", post(other::detokenize))
        .route("/health", get(other::health))
        .route("/ping", get(other::health).post(other::health))
        .route("/ready", get(other::ready))
        .route("/metrics", get(other::metrics))
        .fallback(other::not_found)
        .method_not_allowed_fallback(other::method_not_allowed)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(from_fn_with_state(state.clone(), auth::check))
        .layer(map_response_with_state(state.clone(), close_when_leaving))
        .with_state(state)
}
