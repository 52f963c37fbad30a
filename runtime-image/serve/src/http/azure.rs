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
    let request = deployment(&state, name, request)?;
    chat::create(Extract(state), request).await
}

/// `POST /openai/deployments/{name}/completions`
pub(super) async fn completions(
    Extract(state): Extract<Arc<State>>,
    Path(name): Path<String>,
    request: Admitted,
) -> Result<Response, ApiError> {
    let request = deployment(&state, name, request)?;
    completions::create(Extract(state), request).await
}

/// An adapter is a deployment as well. Then its name counts, and not what the body says besides.
fn deployment(state: &State, name: String, request: Admitted) -> Result<Admitted, ApiError> {
    let served = state.model()?;
    if served.names.contains(&name) {
        return Ok(request);
    }
    if served.adapters.get(&name).is_some() {
        return Ok(request.of_model(name));
    }
    let known = [served.names.clone(), served.adapters.names()].concat();
    Err(ApiError::unknown_deployment(&name, &known))
}
