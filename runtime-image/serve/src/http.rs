//! The OpenAI API at the edge: JSON in, tokens to the engine, events out.

mod admit;
mod api;
mod auth;
mod azure;
mod chat;
mod completions;
mod embeddings;
mod error;
mod form;
mod gather;
mod lora;
mod openapi;
mod other;
mod prepare;
mod request_id;
mod respond;
mod responses;
mod routes;
mod tools;
mod unsupported;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State as Extract};
use axum::middleware::{Next, from_fn, from_fn_with_state, map_response_with_state};
use axum::response::Response;
use strata_model::{ChatTemplate, GenerationConfig, ModelConfig, Vocabulary};

use crate::adapters::Adapters;
use crate::engine::encoder::Embedder;
use crate::engine::{Engine, Forms};
use crate::metrics::Metrics;
pub(crate) use admit::Admission;
use admit::MAX_BODY_BYTES;
pub(crate) use auth::Keys;
use error::ApiError;
pub(crate) use responses::Store as ResponseStore;

/// What the handlers share.
pub(crate) struct State {
    loaded: OnceLock<Loaded>,
    leaving: AtomicBool,
    closed: AtomicBool,
    admission: Admission,
    keys: Option<Keys>,
}

/// The loaded model, by what it does.
pub(crate) enum Loaded {
    /// It generates text.
    Generates(Box<Served>),
    /// It makes vectors of texts.
    Embeds(Embeds),
}

/// A loaded model that makes vectors of texts.
pub(crate) struct Embeds {
    pub(crate) names: Vec<String>,
    /// The most tokens of a text.
    pub(crate) max_model_len: usize,
    pub(crate) vocab_size: usize,
    /// Length of a vector.
    pub(crate) dimensions: usize,
    pub(crate) vocabulary: Arc<Vocabulary>,
    pub(crate) embedder: Embedder,
    pub(crate) metrics: Arc<Metrics>,
    /// When it was loaded, in Unix seconds.
    pub(crate) created: u64,
}

/// A loaded model that generates text.
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
    pub(crate) responses: ResponseStore,
    /// When it was loaded, in Unix seconds.
    pub(crate) created: u64,
}

impl State {
    pub(crate) fn new(admission: Admission, keys: Option<Keys>) -> Self {
        State {
            loaded: OnceLock::new(),
            leaving: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            admission,
            keys,
        }
    }

    pub(crate) fn set_loaded(&self, loaded: Loaded) {
        assert!(self.loaded.set(loaded).is_ok(), "the model is loaded once");
    }

    pub(crate) fn loaded(&self) -> Option<&Loaded> {
        self.loaded.get()
    }

    /// From now on the server is not ready; whoever has not heard of it yet is still answered.
    pub(crate) fn leave(&self) {
        self.leaving.store(true, Ordering::SeqCst);
    }

    /// From now on new requests are refused.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// The model, whatever it does.
    fn any(&self) -> Result<&Loaded, ApiError> {
        self.loaded()
            .ok_or_else(|| ApiError::unavailable("the model is being loaded"))
    }

    /// The model, if requests that compute are taken.
    fn open(&self) -> Result<&Loaded, ApiError> {
        self.unless(&self.closed)
    }

    /// The model that generates, if requests are taken.
    fn accepting(&self) -> Result<&Served, ApiError> {
        Served::of(self.open()?)
    }

    /// The model, if new clients should come.
    fn ready(&self) -> Result<&Loaded, ApiError> {
        self.unless(&self.leaving)
    }

    fn unless(&self, flag: &AtomicBool) -> Result<&Loaded, ApiError> {
        if flag.load(Ordering::SeqCst) {
            return Err(ApiError::unavailable("the server is shutting down"));
        }
        self.any()
    }
}

/// What a request needs the model to do.
trait Task {
    /// The model, if it does that.
    fn of(loaded: &Loaded) -> Result<&Self, ApiError>;
}

impl Task for Loaded {
    fn of(loaded: &Loaded) -> Result<&Self, ApiError> {
        Ok(loaded)
    }
}

impl Task for Served {
    fn of(loaded: &Loaded) -> Result<&Self, ApiError> {
        match loaded {
            Loaded::Generates(served) => Ok(served),
            Loaded::Embeds(embeds) => Err(ApiError::wrong_task(
                &embeds.names[0],
                "makes embeddings and generates nothing",
                "/v1/embeddings",
            )),
        }
    }
}

impl Task for Embeds {
    fn of(loaded: &Loaded) -> Result<&Self, ApiError> {
        match loaded {
            Loaded::Embeds(embeds) => Ok(embeds),
            Loaded::Generates(served) => Err(ApiError::wrong_task(
                &served.names[0],
                "generates text and makes no embeddings",
                "/v1/chat/completions or /v1/completions, and for embeddings a model of the MiniLM family",
            )),
        }
    }
}

impl Loaded {
    /// The name that it is called by.
    fn name(&self) -> &str {
        match self {
            Loaded::Generates(served) => &served.names[0],
            Loaded::Embeds(embeds) => &embeds.names[0],
        }
    }

    /// The names that requests may give, those of adapters among them.
    fn names(&self) -> Vec<String> {
        match self {
            Loaded::Generates(served) => [served.names.clone(), served.adapters.names()].concat(),
            Loaded::Embeds(embeds) => embeds.names.clone(),
        }
    }

    fn max_model_len(&self) -> usize {
        match self {
            Loaded::Generates(served) => served.max_model_len,
            Loaded::Embeds(embeds) => embeds.max_model_len,
        }
    }

    fn vocabulary(&self) -> &Vocabulary {
        match self {
            Loaded::Generates(served) => &served.vocabulary,
            Loaded::Embeds(embeds) => &embeds.vocabulary,
        }
    }

    fn metrics(&self) -> &Metrics {
        match self {
            Loaded::Generates(served) => &served.metrics,
            Loaded::Embeds(embeds) => &embeds.metrics,
        }
    }

    fn created(&self) -> u64 {
        match self {
            Loaded::Generates(served) => served.created,
            Loaded::Embeds(embeds) => embeds.created,
        }
    }

    /// Requests that are being answered.
    pub(crate) fn in_flight(&self) -> usize {
        match self {
            Loaded::Generates(served) => served.engine.in_flight(),
            Loaded::Embeds(embeds) => embeds.embedder.in_flight(),
        }
    }

    /// Ends what can be ended before it is complete. Embeddings end by themselves, and soon.
    pub(crate) fn abort_all(&self) {
        if let Loaded::Generates(served) = self {
            served.engine.abort_all();
        }
    }
}

/// Checks that a request is for a model that is served.
fn check_name(names: &[String], name: Option<&str>) -> Result<(), ApiError> {
    match name {
        Some(name) if !names.iter().any(|known| known == name) => Err(ApiError::unknown_model(name, names)),
        _ => Ok(()),
    }
}

/// A client that keeps its connection would stay with a server that leaves: told to close it, it finds another one.
async fn close_when_leaving(Extract(state): Extract<Arc<State>>, mut response: Response) -> Response {
    if state.leaving.load(Ordering::SeqCst) {
        error::close(&mut response);
    }
    response
}

/// Counts what was answered, by route: paths are the clients' to choose.
async fn count(Extract(state): Extract<Arc<State>>, request: Request, next: Next) -> Response {
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().cloned();
    let response = next.run(request).await;
    if let Some(loaded) = state.loaded() {
        let handler = route.as_ref().map_or("none", MatchedPath::as_str);
        loaded
            .metrics()
            .http(handler, method.as_str(), response.status().as_u16());
    }
    response
}

pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

pub(crate) fn router(state: Arc<State>) -> Router {
    routes::router()
        .fallback(other::not_found)
        .method_not_allowed_fallback(other::method_not_allowed)
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .layer(from_fn_with_state(state.clone(), auth::check))
        .layer(map_response_with_state(state.clone(), close_when_leaving))
        .layer(from_fn_with_state(state.clone(), count))
        .layer(from_fn(request_id::name))
        .with_state(state)
}
