//! `POST /v1/completions`

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State as Extract;
use axum::extract::rejection::BytesRejection;
use axum::response::Response;

use super::State;
use super::api::{CompletionRequest, Prompt};
use super::error::ApiError;
use super::prepare::{Prepared, model, prepare};
use super::respond::{Shape, answer};

/// OpenAI's default for `max_tokens` here.
const DEFAULT_MAX_TOKENS: usize = 16;

pub(super) async fn create(
    Extract(state): Extract<Arc<State>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    answer(state, body, Shape::Completion, prepared).await
}

fn prepared(state: &State, request: CompletionRequest) -> Result<Prepared, ApiError> {
    let served = state.model()?;
    model(served, request.options.model.as_deref())?;
    if request.echo == Some(true) {
        return Err(ApiError::invalid(
            "echo",
            "echo is not supported by this server: leave it out",
        ));
    }
    if request.suffix.as_ref().is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::invalid(
            "suffix",
            "suffix is not supported by this server: leave it out",
        ));
    }
    if request.best_of.is_some_and(|best| best != 1) {
        return Err(ApiError::invalid(
            "best_of",
            "this server makes one choice a request: leave best_of out or set it to 1",
        ));
    }
    let one = |count: usize| match count {
        1 => Ok(()),
        count => Err(ApiError::invalid(
            "prompt",
            format!("{count} prompts in one request; this server takes one: send a request for each"),
        )),
    };
    let text = |text: &str| {
        served
            .vocabulary
            .encode(text, true)
            .map_err(|error| ApiError::invalid("prompt", error.to_string()))
    };
    let tokens = match request.prompt {
        Prompt::Text(prompt) => text(&prompt)?,
        Prompt::Tokens(tokens) => tokens,
        Prompt::Texts(prompts) => {
            one(prompts.len())?;
            text(&prompts[0])?
        }
        Prompt::TokenLists(mut lists) => {
            one(lists.len())?;
            lists.remove(0)
        }
    };
    let max_tokens = request.options.max_tokens;
    prepare(
        served,
        request.options,
        tokens,
        "prompt",
        max_tokens,
        DEFAULT_MAX_TOKENS,
        request.logprobs,
    )
}
