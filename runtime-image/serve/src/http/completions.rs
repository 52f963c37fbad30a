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
    let best = best_of(served, &mut request)?;
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
    // Who only asks about the prompt gets none of an answer; the engine computes one token of it.
    let prompt_only = echo && request.options.max_tokens == Some(0);
    let max_tokens = request
        .options
        .max_tokens
        .map(|tokens| tokens.max(i64::from(prompt_only)));
    let log_probs = request.logprobs.or(best.map(|_| 0));
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
            log_probs,
        )?;
        prepared.submission.constraint.clone_from(&constraint);
        if echo && request.logprobs.is_some() {
            prepared.submission.prompt_log_probs = prepared.submission.log_probs;
        }
        prepared.shown.prompt_only = prompt_only;
        prepared.shown.best = best;
        prepared.shown.hide_log_probs = request.logprobs.is_none();
        let first = match &mut first {
            Some(first) => {
                first.others.push(prepared.submission);
                first
            }
            None => first.insert(prepared),
        };
        first.shown.echo.extend(echo.then_some(shown));
    }
    first.ok_or_else(|| ApiError::invalid("prompt", "the prompt has no tokens"))
}

/// How many answers are shown, if more are to be generated to choose from; these then stand in `n`.
fn best_of(served: &Served, request: &mut CompletionRequest) -> Result<Option<usize>, ApiError> {
    let n = request.options.n.unwrap_or(1);
    let Some(best_of) = request.best_of.filter(|best_of| *best_of != n) else {
        return Ok(None);
    };
    let most = served.engine.most_choices();
    let wrong = |message: String| Err(ApiError::invalid("best_of", message));
    if request.options.stream == Some(true) {
        return wrong("best_of cannot be streamed: which answers are the best is known when all have ended".to_owned());
    }
    match usize::try_from(n) {
        Ok(shown) if shown > 0 && n < best_of && usize::try_from(best_of).is_ok_and(|best_of| best_of <= most) => {
            request.options.n = Some(best_of);
            Ok(Some(shown))
        }
        _ => wrong(format!(
            "best_of is {best_of}; it must lie between n, which is {n}, and {most}"
        )),
    }
}
