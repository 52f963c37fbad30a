//! A request until the engine takes it, within bounds: the bytes held, the time to send them, the threads that read them.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Bytes, HttpBody};
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use axum::response::IntoResponse;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::error::ApiError;
use super::{State, Task};
use crate::schedule::ClientId;

/// The largest request body, in bytes.
pub(super) const MAX_BODY_BYTES: usize = 4 << 20;
/// Bytes of all bodies held at once: 16 of the largest, thousands of the usual ones.
const MAX_HELD_BYTES: usize = 64 << 20;
/// What a request counts for at least: its connection costs memory, too.
const MIN_HELD_BYTES: usize = 16 << 10;
/// Bodies that are parsed, rendered and tokenized at once: parsed JSON takes many times its bytes, and the engine needs the
/// processors.
const MAX_PREPARING: usize = 2;

/// What is left of the bounds.
pub(crate) struct Admission {
    held: Arc<Semaphore>,
    preparing: Arc<Semaphore>,
    body_timeout: Duration,
}

impl Admission {
    /// All of it; a client gets `body_timeout` to send a body.
    pub(crate) fn new(body_timeout: Duration) -> Self {
        Admission {
            held: Arc::new(Semaphore::new(MAX_HELD_BYTES)),
            preparing: Arc::new(Semaphore::new(MAX_PREPARING)),
            body_timeout,
        }
    }
}

/// A request that was let in, with its body.
pub(super) struct Admitted {
    body: Bytes,
    held: OwnedSemaphorePermit,
    /// Who sent it.
    pub(super) sender: ClientId,
    /// What counts instead of the model that the body names.
    model: Option<String>,
}

impl FromRequest<Arc<State>> for Admitted {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &Arc<State>) -> Result<Self, ApiError> {
        state.open()?;
        let admission = &state.admission;
        // Said where the key was checked.
        let sender = request.extensions().get::<ClientId>().copied().unwrap_or_default();
        // A body of unknown length may become the largest. A longer one is refused when it is read.
        let length = request.body().size_hint().upper().unwrap_or(u64::MAX);
        let count = length.clamp(MIN_HELD_BYTES as u64, MAX_BODY_BYTES as u64) as u32;
        let held =
            admission.held.clone().try_acquire_many_owned(count).map_err(|_| {
                ApiError::busy("the server is reading as many requests as it can hold; try again later")
            })?;
        let body = tokio::time::timeout(admission.body_timeout, Bytes::from_request(request, state))
            .await
            .map_err(|_| {
                let seconds = admission.body_timeout.as_secs();
                let message = format!("the body did not arrive within {seconds} seconds; send it faster");
                ApiError::body(StatusCode::REQUEST_TIMEOUT, message)
            })?
            .map_err(|rejection| {
                let message = format!("the body could not be read: {}", rejection.body_text());
                ApiError::body(rejection.into_response().status(), message)
            })?;
        Ok(Admitted {
            body,
            held,
            sender,
            model: None,
        })
    }
}

impl Admitted {
    /// The request is for `model`, whatever its body says.
    pub(super) fn of_model(mut self, model: String) -> Self {
        self.model = Some(model);
        self
    }

    /// Parses the body and does `work` with it. That may take a while; other connections go on meanwhile.
    pub(super) async fn prepare<S, R, T>(
        self,
        state: &Arc<State>,
        work: fn(&S, R) -> Result<T, ApiError>,
    ) -> Result<T, ApiError>
    where
        S: Task + 'static,
        R: DeserializeOwned + 'static,
        T: Send + 'static,
    {
        let failed = || ApiError::internal("the request could not be prepared");
        let turn = state.admission.preparing.clone().acquire_owned().await;
        let turn = turn.map_err(|_| failed())?;
        let state = state.clone();
        let task = tokio::task::spawn_blocking(move || {
            let Admitted { body, held, model, .. } = self;
            // Not given back before the work is done, even if the client has gone.
            let _bounds = (held, turn);
            let request = match model {
                None => serde_json::from_slice(&body),
                Some(model) => serde_json::from_slice(&body).and_then(|mut request: Map<String, Value>| {
                    request.insert("model".to_owned(), model.into());
                    serde_json::from_value(request.into())
                }),
            };
            let request = request.map_err(|error| {
                ApiError::invalid(None, format!("the body is not the JSON object that is needed: {error}"))
            })?;
            work(S::of(state.any()?)?, request)
        });
        task.await.map_err(|_| failed())?
    }
}
