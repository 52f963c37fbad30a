//! `POST /v1/chat/completions`

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State as Extract;
use axum::extract::rejection::BytesRejection;
use axum::response::Response;

use super::State;
use super::api::ChatRequest;
use super::error::ApiError;
use super::prepare::{Prepared, chat_tokens, model, prepare};
use super::respond::{Shape, answer};

pub(super) async fn create(
    Extract(state): Extract<Arc<State>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    answer(state, body, Shape::Chat, prepared).await
}

fn prepared(state: &State, request: ChatRequest) -> Result<Prepared, ApiError> {
    let served = state.model()?;
    model(served, request.options.model.as_deref())?;
    if request.tools.as_ref().is_some_and(|tools| !tools.is_empty()) {
        return Err(ApiError::invalid(
            "tools",
            "this server does not call tools: leave tools out",
        ));
    }
    if let Some(format) = request
        .response_format
        .as_ref()
        .filter(|format| format["type"] != "text" && !format.is_null())
    {
        let message = format!(
            "response_format {} is not supported; only {{\"type\": \"text\"}} is",
            format["type"]
        );
        return Err(ApiError::invalid("response_format", message));
    }
    let log_probs = match (request.logprobs == Some(true), request.top_logprobs) {
        (true, top) => Some(top.unwrap_or(0)),
        (false, None | Some(0)) => None,
        (false, Some(_)) => return Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs: true")),
    };
    let tokens = chat_tokens(
        served,
        request.messages,
        true,
        &request.chat_template_kwargs.unwrap_or_default(),
    )?;
    let max_tokens = request.max_completion_tokens.or(request.options.max_tokens);
    prepare(
        served,
        request.options,
        tokens,
        "messages",
        max_tokens,
        usize::MAX,
        log_probs,
    )
}
