//! `POST /v1/chat/completions`

use std::sync::Arc;

use axum::extract::State as Extract;
use axum::response::Response;

use super::admit::Admitted;
use super::api::ChatRequest;
use super::error::ApiError;
use super::form;
use super::prepare::{Prepared, chat_tokens, model, prepare};
use super::respond::{Dialect, Shape, answer};
use super::{Served, State, tools, unsupported};

pub(super) async fn create(Extract(state): Extract<Arc<State>>, request: Admitted) -> Result<Response, ApiError> {
    answer(state, request, (Shape::Chat, Dialect::OpenAi), prepared).await
}

/// The same in Azure's words.
pub(super) async fn create_for_azure(state: Arc<State>, request: Admitted) -> Result<Response, ApiError> {
    answer(state, request, (Shape::Chat, Dialect::Azure), prepared).await
}

pub(super) fn prepared(served: &Served, mut request: ChatRequest) -> Result<Prepared, ApiError> {
    model(served, request.options.model.as_deref())?;
    unsupported::check(&request.rest)?;
    let log_probs = match (request.logprobs == Some(true), request.top_logprobs) {
        (true, top) => Some(top.unwrap_or(0)),
        (false, None | Some(0)) => None,
        (false, Some(_)) => return Err(ApiError::invalid("top_logprobs", "top_logprobs needs logprobs: true")),
    };
    let asked = std::mem::take(&mut request.options.form).asked()?;
    let tools = request.tools.checked()?;
    let tokens = chat_tokens(
        served,
        request.messages,
        tools.as_ref(),
        true,
        &request.chat_template_kwargs.unwrap_or_default(),
    )?;
    let max_tokens = request.max_completion_tokens.or(request.options.max_tokens);
    let mut prepared = prepare(
        served,
        request.options,
        tokens,
        "messages",
        max_tokens,
        usize::MAX,
        log_probs,
    )?;
    match tools {
        Some(tools) => tools::apply(served, &mut prepared, &tools, asked)?,
        None => prepared.submission.constraint = asked.map(|asked| form::compile(served, asked)).transpose()?,
    }
    Ok(prepared)
}
