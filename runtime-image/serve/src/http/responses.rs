//! `/v1/responses`: OpenAI's newer API, on the same prompt and engine as chat completions.
//!
//! ```text
//! body ──request──▶ chat request ──chat──▶ engine ──▶ text ──output──▶ items and events ──▶ client, store
//! ```

pub(super) mod items;
mod output;
mod request;
mod store;

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;

use axum::Json;
use axum::extract::{Path, State as Extract};
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use super::admit::Admitted;
use super::error::ApiError;
use super::gather::parts;
use super::prepare::Prepared;
use super::respond::{KEEP_ALIVE, model_name};
use super::tools::{Part, Reader};
use super::{Loaded, Served, State, Task, chat};
use crate::engine::Event;
use output::Output;
use request::{Request, to_chat};
pub(crate) use store::Store;
use store::Stored;

/// Chat completions' names of fields, and what they are called here.
const FIELDS: &[(&str, &str)] = &[
    ("messages", "input"),
    ("max_tokens", "max_output_tokens"),
    ("response_format", "text.format"),
    ("verbosity", "text.verbosity"),
    ("reasoning_effort", "reasoning.effort"),
];

/// A request that the engine can take, and what its answer repeats of it.
struct Ready {
    prepared: Prepared,
    output: Output,
    keeping: Option<Keeping>,
}

/// What is stored beside the response, for requests that go on from it.
struct Keeping {
    items: Vec<Value>,
}

/// `POST /v1/responses`
pub(super) async fn create(Extract(state): Extract<Arc<State>>, request: Admitted) -> Result<Response, ApiError> {
    state.accepting()?.engine.has_room()?;
    let sender = request.sender;
    let Ready {
        mut prepared,
        output,
        keeping,
    } = request.prepare(&state, ready).await?;
    prepared.sent_by(sender);
    let events = state.accepting()?.engine.submit(prepared.submission)?;
    let answering = Answering {
        state,
        events,
        output,
        reader: prepared.reader,
        keeping,
        pending: VecDeque::new(),
        done: false,
    };
    match prepared.stream {
        true => Ok(streamed(answering)),
        false => whole(answering).await,
    }
}

fn ready(served: &Served, body: Map<String, Value>) -> Result<Ready, ApiError> {
    let request = Request::read(body)?;
    let earlier = match &request.previous {
        None => Vec::new(),
        Some(id) => served.responses.items(id).ok_or_else(|| {
            let message = format!(
                "Previous response with id '{id}' not found: it was not stored, has expired, or another pod has it."
            );
            ApiError::not_found_object("previous_response_id", message)
        })?,
    };
    let items: Vec<Value> = earlier.into_iter().chain(request.items.iter().cloned()).collect();
    let chat = to_chat(&request, &items)?;
    let prepared = chat::prepared(served, chat).map_err(|error| error.renamed(FIELDS))?;
    let output = Output::new(
        &model_name(served, &prepared.submission),
        &request,
        &prepared.submission,
    );
    let keeping = request.store.then_some(Keeping { items });
    Ok(Ready {
        prepared,
        output,
        keeping,
    })
}

/// An answer that is being generated.
struct Answering {
    state: Arc<State>,
    events: mpsc::Receiver<Event>,
    output: Output,
    /// Finds calls of functions in the text, if there may be any.
    reader: Option<Reader>,
    keeping: Option<Keeping>,
    pending: VecDeque<Value>,
    done: bool,
}

impl Answering {
    /// Takes the engine's next event.
    async fn step(&mut self) {
        match self.events.recv().await {
            Some(Event::Prompt { .. }) => (),
            Some(Event::Token { text, .. }) => self.text(&text, false),
            Some(Event::Finished {
                text, reason, usage, ..
            }) => {
                self.text(&text, true);
                self.output.finish(reason, &usage, &mut self.pending);
                self.done = true;
                self.keep();
            }
            None => {
                self.output
                    .fail("the engine ended before the answer did", &mut self.pending);
                self.done = true;
            }
        }
    }

    /// Takes text, and whether it is the last.
    fn text(&mut self, text: &str, last: bool) {
        for part in parts(self.reader.as_mut(), text, last) {
            match part {
                Part::Content(text) => self.output.text(&text, &mut self.pending),
                Part::Call { id, name, .. } => self.output.call(name, id, &mut self.pending),
                Part::Arguments { json, .. } => self.output.arguments(&json, &mut self.pending),
            }
        }
    }

    fn keep(&mut self) {
        let (Some(Keeping { mut items }), Some(Loaded::Generates(served))) = (self.keeping.take(), self.state.loaded())
        else {
            return;
        };
        let inputs = items.len();
        items.extend(self.output.items().iter().cloned());
        served.responses.insert(Stored {
            inputs,
            response: self.output.response().clone(),
            items,
        });
    }
}

async fn whole(mut answering: Answering) -> Result<Response, ApiError> {
    while !answering.done {
        answering.step().await;
        answering.pending.clear(); // nobody reads how it came about
    }
    Ok(Json(answering.output.response()).into_response())
}

fn streamed(mut answering: Answering) -> Response {
    answering.output.begin(&mut answering.pending);
    let stream = stream::unfold(answering, |mut answering| async move {
        while answering.pending.is_empty() && !answering.done {
            answering.step().await;
        }
        let event = answering.pending.pop_front()?;
        let name = event["type"].as_str().unwrap_or_default().to_owned();
        let event = sse::Event::default().event(name).data(event.to_string());
        Some((Ok::<_, Infallible>(event), answering))
    });
    Sse::new(stream)
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
        .into_response()
}

fn unknown(id: &str) -> ApiError {
    ApiError::not_found_object("response_id", format!("Response with id '{id}' not found."))
}

/// `GET /v1/responses/{id}`
pub(super) async fn get(Extract(state): Extract<Arc<State>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let response = Served::of(state.any()?)?.responses.response(&id);
    response.map(Json).ok_or_else(|| unknown(&id))
}

/// `DELETE /v1/responses/{id}`
pub(super) async fn delete(
    Extract(state): Extract<Arc<State>>,
    Path(id): Path<String>,
) -> Result<Json<Value>, ApiError> {
    match Served::of(state.any()?)?.responses.remove(&id) {
        true => Ok(Json(json!({ "id": id, "object": "response", "deleted": true }))),
        false => Err(unknown(&id)),
    }
}
