//! Azure OpenAI's paths, on the same handlers: the model stands in the path, as a deployment. `api-version` is not looked
//! at, since what is answered is the same in all of them.

use std::sync::Arc;

use axum::extract::{Path, State as Extract};
use axum::response::Response;

use super::admit::Admitted;
use super::error::ApiError;
use super::{State, chat, completions, embeddings};

/// `POST /openai/deployments/{name}/chat/completions`
pub(super) async fn chat(
    Extract(state): Extract<Arc<State>>,
    Path(name): Path<String>,
    request: Admitted,
) -> Result<Response, ApiError> {
    let request = deployment(&state, name, request)?;
    chat::create_for_azure(state, request).await
}

/// `POST /openai/deployments/{name}/completions`
pub(super) async fn completions(
    Extract(state): Extract<Arc<State>>,
    Path(name): Path<String>,
    request: Admitted,
) -> Result<Response, ApiError> {
    let request = deployment(&state, name, request)?;
    completions::create_for_azure(state, request).await
}

/// `POST /openai/deployments/{name}/embeddings`
pub(super) async fn embeddings(
    Extract(state): Extract<Arc<State>>,
    Path(name): Path<String>,
    request: Admitted,
) -> Result<Response, ApiError> {
    let request = deployment(&state, name, request)?;
    embeddings::create(Extract(state), request).await
}

/// A model or an adapter is a deployment. Its name counts, and not what the body says besides: Azure's clients that are given
/// a deployment write any model there, and Azure does not look at it.
fn deployment(state: &State, name: String, request: Admitted) -> Result<Admitted, ApiError> {
    let names = state.any()?.names();
    match names.contains(&name) {
        true => Ok(request.of_model(name)),
        false => Err(ApiError::unknown_deployment(&name, &names)),
    }
}
