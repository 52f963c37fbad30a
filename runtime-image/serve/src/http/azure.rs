//! Azure OpenAI's paths, on the same handlers: the model stands in the path, as a deployment. `api-version` is not looked
//! at, since what is answered is the same in all of them.

use std::sync::Arc;

use axum::extract::{Path, State as Extract};
use axum::response::Response;

use super::admit::Admitted;
use super::error::ApiError;
use super::{State, chat, completions};

/// `POST /openai/deployments/{name}/chat/completions`
pub(super) async fn chat(
    Extract(state): Extract<Arc<State>>,
    Path(name): Path<String>,
    request: Admitted,
) -> Result<Response, ApiError> {
    deployment(&state, &name)?;
    chat::create(Extract(state), request).await
}

/// `POST /openai/deployments/{name}/completions`
pub(super) async fn completions(
    Extract(state): Extract<Arc<State>>,
    Path(name): Path<String>,
    request: Admitted,
) -> Result<Response, ApiError> {
    deployment(&state, &name)?;
    completions::create(Extract(state), request).await
}

fn deployment(state: &State, name: &str) -> Result<(), ApiError> {
    let names = &state.model()?.names;
    match names.iter().any(|known| known == name) {
        true => Ok(()),
        false => Err(ApiError::unknown_deployment(name, names)),
    }
}
