//! `POST /v1/completions`

use std::sync::Arc;

use axum::extract::State as Extract;
use axum::response::Response;

use super::admit::Admitted;
use super::api::{CompletionRequest, Prompt};
use super::error::ApiError;
use super::form;
use super::prepare::{Prepared, model, prepare};
use super::respond::{Dialect, Shape, answer};
use super::{Served, State, unsupported};

/// OpenAI's default for `max_tokens` here.
const DEFAULT_MAX_TOKENS: usize = 16;
/// The most prompts of a request; each counts as a request for the engine.
const MAX_PROMPTS: usize = 128;

pub(super) async fn create(Extract(state): Extract<Arc<State>>, request: Admitted) -> Result<Response, ApiError> {
    answer(state, request, (Shape::Completion, Dialect::OpenAi), prepared).await
}

/// The same in Azure's words.
pub(super) async fn create_for_azure(state: Arc<State>, request: Admitted) -> Result<Response, ApiError> {
    answer(state, request, (Shape::Completion, Dialect::Azure), prepared).await
}

fn prepared(served: &Served, mut request: CompletionRequest) -> Result<Prepared, ApiError> {
    model(served, request.options.model.as_deref())?;
    unsupported::check(&request.rest)?;
    let text = |text: &str| {
        served
            .vocabulary
            .encode(text, request.add_special_tokens.unwrap_or(true))
            .map_err(|error| ApiError::invalid("prompt", error.to_string()))
    };
    let prompts = match request.prompt {
        Prompt::Text(prompt) => vec![text(&prompt)?],
        Prompt::Tokens(tokens) => vec![tokens],
        Prompt::Texts(prompts) => prompts.iter().map(|prompt| text(prompt)).collect::<Result<_, _>>()?,
        Prompt::TokenLists(lists) => lists,
    };
    if prompts.is_empty() || prompts.len() > MAX_PROMPTS {
        let message = format!("{} prompts; 1 to {MAX_PROMPTS} are possible", prompts.len());
        return Err(ApiError::invalid("prompt", message));
    }
    let echo = request.echo == Some(true);
    if echo && request.logprobs.is_some() {
        let message = "echo with logprobs is not supported: log-probabilities of the prompt are not computed";
        return Err(ApiError::invalid("echo", message));
    }
    let max_tokens = request.options.max_tokens;
    let asked = std::mem::take(&mut request.options.form).asked()?;
    let constraint = asked.map(|asked| form::compile(served, asked)).transpose()?;
    let mut first: Option<Prepared> = None;
    for tokens in prompts {
        // A known prompt's tokens all have text; what has none is refused by `prepare`.
        let shown = if echo {
            served.vocabulary.decode(&tokens, true).unwrap_or_default()
        } else {
            String::new()
        };
        let mut prepared = prepare(
            served,
            request.options.clone(),
            tokens,
            "prompt",
            max_tokens,
            DEFAULT_MAX_TOKENS,
            request.logprobs,
        )?;
        prepared.submission.constraint.clone_from(&constraint);
        let first = match &mut first {
            Some(first) => {
                first.others.push(prepared.submission);
                first
            }
            None => first.insert(prepared),
        };
        first.echo.extend(echo.then_some(shown));
    }
    first.ok_or_else(|| ApiError::invalid("prompt", "the prompt has no tokens"))
}
