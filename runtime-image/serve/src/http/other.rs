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
use super::{Served, State, prepare};

fn card(served: &Served, name: &str) -> Value {
    let (created, root, parent) = match served.adapters.get(name) {
        Some(loaded) => (loaded.created, json!(loaded.path), json!(served.names[0])),
        None => (served.created, json!(served.names[0]), Value::Null),
    };
    json!({
        "id": name, "object": "model", "created": created, "owned_by": "strata",
        "root": root, "parent": parent, "max_model_len": served.max_model_len,
    })
}

/// `GET /v1/models`
pub(super) async fn models(Extract(state): Extract<Arc<State>>) -> Result<Json<Value>, ApiError> {
    let served = state.model()?;
    let names = [served.names.clone(), served.adapters.names()].concat();
    let cards: Vec<Value> = names.iter().map(|name| card(served, name)).collect();
    Ok(Json(json!({ "object": "list", "data": cards })))
}

/// `GET /v1/models/{id}`
pub(super) async fn model(
    Extract(state): Extract<Arc<State>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let served = state.model()?;
    prepare::model(served, Some(&id))?;
    Ok(Json(card(served, &id)))
}

/// `POST /tokenize`
pub(super) async fn tokenize(Extract(state): Extract<Arc<State>>, request: Admitted) -> Result<Json<Value>, ApiError> {
    request.prepare(&state, tokens).await
}

fn tokens(served: &Served, request: TokenizeRequest) -> Result<Json<Value>, ApiError> {
    prepare::model(served, request.model.as_deref())?;
    let tokens = match (request.prompt, request.messages) {
        (Some(prompt), None) => served
            .vocabulary
            .encode(&prompt, request.add_special_tokens.unwrap_or(true))
            .map_err(|error| ApiError::invalid("prompt", error.to_string()))?,
        (None, Some(messages)) => prepare::chat_tokens(
            served,
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
            .map(|id| served.vocabulary.token_text(*id))
            .collect::<Vec<_>>()
    });
    Ok(Json(
        json!({ "count": tokens.len(), "max_model_len": served.max_model_len, "tokens": tokens, "token_strs": texts }),
    ))
}

/// `POST /detokenize`
pub(super) async fn detokenize(
    Extract(state): Extract<Arc<State>>,
    request: Admitted,
) -> Result<Json<Value>, ApiError> {
    request.prepare(&state, text).await
}

fn text(served: &Served, request: DetokenizeRequest) -> Result<Json<Value>, ApiError> {
    prepare::model(served, request.model.as_deref())?;
    let (count, most) = (request.tokens.len(), served.max_model_len);
    if count > most {
        let message = format!("{count} tokens were given; this model's maximum context length is {most} tokens");
        return Err(ApiError::context_length("tokens", message));
    }
    let text = served
        .vocabulary
        .decode(&request.tokens, false)
        .map_err(|error| ApiError::invalid("tokens", error.to_string()))?;
    Ok(Json(json!({ "prompt": text })))
}

/// `GET /health`: the process works; also while it drains.
pub(super) async fn health(Extract(state): Extract<Arc<State>>) -> Result<(), ApiError> {
    state.model().map(|_| ())
}

/// `GET /ready`: new clients should come here.
pub(super) async fn ready(Extract(state): Extract<Arc<State>>) -> Result<(), ApiError> {
    state.ready().map(|_| ())
}

/// `GET /metrics`
pub(super) async fn metrics(Extract(state): Extract<Arc<State>>) -> Result<Response, ApiError> {
    let text = state
        .model()?
        .metrics
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
