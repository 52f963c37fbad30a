//! `POST /v1/completions`

use std::sync::Arc;

use axum::extract::State as Extract;
use axum::response::Response;

use super::admit::Admitted;
use super::api::{CompletionRequest, Prompt};
use super::error::ApiError;
use super::form;
use super::prepare::{Prepared, model, prepare};
use super::respond::{Shape, answer};
use super::{Served, State, unsupported};

/// OpenAI's default for `max_tokens` here.
const DEFAULT_MAX_TOKENS: usize = 16;

pub(super) async fn create(Extract(state): Extract<Arc<State>>, request: Admitted) -> Result<Response, ApiError> {
    answer(state, request, Shape::Completion, prepared).await
}

fn prepared(served: &Served, mut request: CompletionRequest) -> Result<Prepared, ApiError> {
    model(served, request.options.model.as_deref())?;
    unsupported::check(&request.rest)?;
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
            .encode(text, request.add_special_tokens.unwrap_or(true))
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
    let asked = std::mem::take(&mut request.options.form).asked()?;
    let mut prepared = prepare(
        served,
        request.options,
        tokens,
        "prompt",
        max_tokens,
        DEFAULT_MAX_TOKENS,
        request.logprobs,
    )?;
    prepared.submission.constraint = asked.map(|asked| form::compile(served, asked)).transpose()?;
    Ok(prepared)
}
