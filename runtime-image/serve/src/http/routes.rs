//! All routes in one table: the router is made from it, and the OpenAPI document, so that neither has what the other lacks.

use std::sync::Arc;

use axum::Router;
use axum::routing::{MethodRouter, get, post};

use super::openapi::{self, Body};
use super::{State, azure, chat, completions, embeddings, lora, other, responses};

/// Where the routes of OpenAI's API stand: as OpenAI has them, and as Azure's newer API has them.
const V1: &[&str] = &["/v1", "/openai/v1"];
/// Models and responses stood in Azure before its newer API did.
const WITH_OLDER: &[&str] = &["/v1", "/openai/v1", "/openai"];
const DEPLOYMENTS: &[&str] = &["/openai/deployments/{name}"];
const ROOT: &[&str] = &[""];

/// What a method of a route does.
pub(super) struct Operation {
    pub(super) method: &'static str,
    pub(super) summary: &'static str,
    pub(super) body: Option<&'static Body>,
}

/// A route below each of its prefixes.
pub(super) struct Route {
    pub(super) prefixes: &'static [&'static str],
    pub(super) path: &'static str,
    pub(super) operations: Vec<Operation>,
    handlers: MethodRouter<Arc<State>>,
}

fn on(prefixes: &'static [&'static str], path: &'static str, handlers: MethodRouter<Arc<State>>) -> Route {
    Route {
        prefixes,
        path,
        operations: Vec::new(),
        handlers,
    }
}

impl Route {
    fn does(mut self, method: &'static str, summary: &'static str, body: Option<&'static Body>) -> Self {
        self.operations.push(Operation { method, summary, body });
        self
    }

    fn gets(self, summary: &'static str) -> Self {
        self.does("get", summary, None)
    }

    fn takes(self, body: &'static Body, summary: &'static str) -> Self {
        self.does("post", summary, Some(body))
    }

    /// The whole paths.
    pub(super) fn paths(&self) -> impl Iterator<Item = String> {
        self.prefixes.iter().map(|prefix| format!("{prefix}{}", self.path))
    }
}

/// Every route of the server.
pub(super) fn table() -> Vec<Route> {
    vec![
        on(V1, "/chat/completions", post(chat::create)).takes(&openapi::CHAT, "Answer a conversation"),
        on(V1, "/completions", post(completions::create)).takes(&openapi::COMPLETION, "Continue a text"),
        on(V1, "/embeddings", post(embeddings::create)).takes(&openapi::EMBEDDING, "Make vectors of texts"),
        on(V1, "/load_lora_adapter", post(lora::load)).does("post", "Load a LoRA adapter, where that is allowed", None),
        on(V1, "/unload_lora_adapter", post(lora::unload)).does(
            "post",
            "Unload a LoRA adapter, where that is allowed",
            None,
        ),
        on(WITH_OLDER, "/models", get(other::models)).gets("The models that are served"),
        on(WITH_OLDER, "/models/{*id}", get(other::model)).gets("A model that is served"),
        on(WITH_OLDER, "/responses", post(responses::create)).takes(&openapi::RESPONSE, "Answer, in the newer form"),
        on(
            WITH_OLDER,
            "/responses/{id}",
            get(responses::get).delete(responses::delete),
        )
        .gets("A response that was stored")
        .does("delete", "Forget a response", None),
        on(WITH_OLDER, "/responses/{id}/input_items", get(responses::items::list))
            .gets("What a stored response answers"),
        on(DEPLOYMENTS, "/chat/completions", post(azure::chat)).takes(&openapi::CHAT, "Answer a conversation"),
        on(DEPLOYMENTS, "/completions", post(azure::completions)).takes(&openapi::COMPLETION, "Continue a text"),
        on(DEPLOYMENTS, "/embeddings", post(azure::embeddings)).takes(&openapi::EMBEDDING, "Make vectors of texts"),
        on(ROOT, "/tokenize", post(other::tokenize))
            .takes(&openapi::TOKENIZE, "The tokens of a text or a conversation"),
        on(ROOT, "/detokenize", post(other::detokenize)).takes(&openapi::DETOKENIZE, "The text of tokens"),
        on(ROOT, "/health", get(other::health)).gets("The model is loaded"),
        on(ROOT, "/ping", get(other::health).post(other::health))
            .gets("The model is loaded")
            .does("post", "The model is loaded", None),
        on(ROOT, "/ready", get(other::ready)).gets("New clients should come"),
        on(ROOT, "/load", get(other::load)).gets("Requests that are being answered"),
        on(ROOT, "/version", get(other::version)).gets("The server's version"),
        on(ROOT, "/metrics", get(other::metrics)).gets("Metrics in Prometheus' text format"),
        on(ROOT, "/openapi.json", get(openapi::serve)).gets("This document"),
    ]
}

/// The router of all of them.
pub(super) fn router() -> Router<Arc<State>> {
    let mut router = Router::new();
    for route in table() {
        for path in route.paths() {
            router = router.route(&path, route.handlers.clone());
        }
    }
    router
}
