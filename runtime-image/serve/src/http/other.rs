//! Models, tokens, probes and metrics.

use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State as Extract};
use axum::http::{Method, Uri, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::admit::Admitted;
use super::api::{DetokenizeRequest, TokenizeRequest};
use super::error::ApiError;
use super::{Loaded, Served, State, Task, check_name, prepare};

fn card(loaded: &Loaded, name: &str) -> Value {
    let base = || (loaded.created(), json!(loaded.name()), Value::Null);
    let (created, root, parent) = match loaded {
        Loaded::Generates(served) => served.adapters.get(name).map_or_else(base, |adapter| {
            (adapter.created, json!(adapter.path), json!(served.names[0]))
        }),
        Loaded::Embeds(_) => base(),
    };
    json!({
        "id": name, "object": "model", "created": created, "owned_by": "strata",
        "root": root, "parent": parent, "max_model_len": loaded.max_model_len(),
    })
}

/// `GET /v1/models`
pub(super) async fn models(Extract(state): Extract<Arc<State>>) -> Result<Json<Value>, ApiError> {
    let loaded = state.any()?;
    let cards: Vec<Value> = loaded.names().iter().map(|name| card(loaded, name)).collect();
    Ok(Json(json!({ "object": "list", "data": cards })))
}

/// `GET /v1/models/{id}`
pub(super) async fn model(
    Extract(state): Extract<Arc<State>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let loaded = state.any()?;
    check_name(&loaded.names(), Some(&id))?;
    Ok(Json(card(loaded, &id)))
}

/// `POST /tokenize`
pub(super) async fn tokenize(Extract(state): Extract<Arc<State>>, request: Admitted) -> Result<Json<Value>, ApiError> {
    request.prepare(&state, tokens).await
}

fn tokens(loaded: &Loaded, request: TokenizeRequest) -> Result<Json<Value>, ApiError> {
    check_name(&loaded.names(), request.model.as_deref())?;
    let tokens = match (request.prompt, request.messages) {
        (Some(prompt), None) => loaded
            .vocabulary()
            .encode(&prompt, request.add_special_tokens.unwrap_or(true))
            .map_err(|error| ApiError::invalid("prompt", error.to_string()))?,
        (None, Some(messages)) => prepare::chat_tokens(
            Served::of(loaded)?,
            messages,
            request.tools.checked()?.as_ref(),
            request.add_generation_prompt.unwrap_or(true),
            &serde_json::Map::new(),
        )?,
        _ => {
            return Err(ApiError::invalid(
                "prompt",
                "exactly one of prompt and messages is needed",
            ));
        }
    };
    let texts = (request.return_token_strs == Some(true)).then(|| {
        tokens
            .iter()
            .map(|id| loaded.vocabulary().token_text(*id))
            .collect::<Vec<_>>()
    });
    Ok(Json(
        json!({ "count": tokens.len(), "max_model_len": loaded.max_model_len(), "tokens": tokens, "token_strs": texts }),
    ))
}

/// `POST /detokenize`
pub(super) async fn detokenize(
    Extract(state): Extract<Arc<State>>,
    request: Admitted,
) -> Result<Json<Value>, ApiError> {
    request.prepare(&state, text).await
}

fn text(loaded: &Loaded, request: DetokenizeRequest) -> Result<Json<Value>, ApiError> {
    check_name(&loaded.names(), request.model.as_deref())?;
    let (count, most) = (request.tokens.len(), loaded.max_model_len());
    if count > most {
        let message = format!("{count} tokens were given; this model's maximum context length is {most} tokens");
        return Err(ApiError::context_length("tokens", message));
    }
    let text = loaded
        .vocabulary()
        .decode(&request.tokens, false)
        .map_err(|error| ApiError::invalid("tokens", error.to_string()))?;
    Ok(Json(json!({ "prompt": text })))
}

/// `GET /health`: the process works; also while it drains.
pub(super) async fn health(Extract(state): Extract<Arc<State>>) -> Result<(), ApiError> {
    state.any().map(|_| ())
}

/// `GET /ready`: new clients should come here.
pub(super) async fn ready(Extract(state): Extract<Arc<State>>) -> Result<(), ApiError> {
    state.ready().map(|_| ())
}

/// `GET /load`, as vLLM's: requests that are being answered.
pub(super) async fn load(Extract(state): Extract<Arc<State>>) -> Result<Json<Value>, ApiError> {
    Ok(Json(json!({ "server_load": state.any()?.in_flight() })))
}

/// `GET /version`
pub(super) async fn version() -> Json<Value> {
    Json(json!({ "version": env!("CARGO_PKG_VERSION") }))
}

/// `GET /metrics`
pub(super) async fn metrics(Extract(state): Extract<Arc<State>>) -> Result<Response, ApiError> {
    let text = state
        .any()?
        .metrics()
        .text()
        .map_err(|error| ApiError::internal(error.to_string()))?;
    Ok((
        [(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")],
        text,
    )
        .into_response())
}

pub(super) async fn not_found(method: Method, uri: Uri) -> ApiError {
    ApiError::not_found(format!("Unknown request URL: {method} {}", uri.path()))
}

pub(super) async fn method_not_allowed(method: Method, uri: Uri) -> ApiError {
    ApiError::method_not_allowed(format!("{method} is not possible on {}", uri.path()))
}
