//! From the engine's events to responses: one object, or a stream of server-sent events that always ends with `[DONE]`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::response::sse::{self, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use futures::stream;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use strata_model::Vocabulary;

use super::admit::Admitted;
use super::error::ApiError;
use super::gather::{Choice, Counting, Events, parts, reason_name};
use super::prepare::{Prepared, random};
use super::tools::{Part, Reader};
use super::{Served, State, unix_seconds};
use crate::engine::{Event, Submission, TokenProb, Usage};

/// How often a silent stream sends a comment, so that proxies keep it open.
pub(super) const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Which of the two APIs answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    Chat,
    Completion,
}

/// Whose objects the answer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    OpenAi,
    /// With the fields of Azure's content filter, empty as Azure has them where no filter judged: nothing is judged here.
    Azure,
}

/// What every object of one response repeats.
pub(super) struct Frame {
    pub(super) shape: Shape,
    id: String,
    created: u64,
    model: String,
    vocabulary: Arc<Vocabulary>,
    dialect: Dialect,
    /// Bytes of text given out so far, of each choice: completions count offsets.
    offsets: Vec<usize>,
}

pub(super) type LogProbs = (TokenProb, Vec<TokenProb>);

/// Prepares a request and answers.
pub(super) async fn answer<R: DeserializeOwned + 'static>(
    state: Arc<State>,
    request: Admitted,
    (shape, dialect): (Shape, Dialect),
    prepared: fn(&Served, R) -> Result<Prepared, ApiError>,
) -> Result<Response, ApiError> {
    // Known without the work of preparing.
    state.accepting()?.engine.has_room()?;
    let key = request.client;
    let mut prepared = request.prepare(&state, prepared).await?;
    prepared.sent_by(key);
    respond(state.accepting()?, prepared, shape, dialect).await
}

/// The name of what answers, as responses give it.
pub(super) fn model_name(served: &Served, submission: &Submission) -> String {
    match &submission.adapter {
        Some(adapter) => adapter.name().to_owned(),
        None => served.names[0].clone(),
    }
}

/// Submits the request and answers.
async fn respond(served: &Served, prepared: Prepared, shape: Shape, dialect: Dialect) -> Result<Response, ApiError> {
    let frame = Frame {
        shape,
        dialect,
        id: format!(
            "{}-{:016x}{:016x}",
            if shape == Shape::Chat { "chatcmpl" } else { "cmpl" },
            random(),
            random()
        ),
        created: unix_seconds(),
        model: model_name(served, &prepared.submission),
        vocabulary: served.vocabulary.clone(),
        offsets: vec![0; prepared.submission.choices * (1 + prepared.others.len())],
    };
    let Prepared {
        submission,
        others,
        echo,
        stream,
        include_usage,
        reader,
    } = prepared;
    let choices = submission.choices;
    let readers = vec![reader; choices * (1 + others.len())];
    // Those that were taken are cancelled if a later one is not: their receivers go.
    let receivers = std::iter::once(submission)
        .chain(others)
        .map(|one| served.engine.submit(one));
    let receivers = receivers.collect::<Result<Vec<_>, _>>()?;
    let events = Events { receivers, choices };
    if stream {
        Ok(streamed(frame, events, include_usage, readers, &echo))
    } else {
        whole(frame, events, readers, &echo).await
    }
}

async fn whole(
    frame: Frame,
    mut events: Events,
    readers: Vec<Option<Reader>>,
    echo: &[String],
) -> Result<Response, ApiError> {
    let mut counting = Counting::new(readers.len(), events.choices);
    let mut choices: Vec<Choice> = readers.into_iter().map(Choice::new).collect();
    for (prompt, choices) in echo.iter().zip(choices.chunks_mut(events.choices)) {
        choices.iter_mut().for_each(|choice| choice.content.clone_from(prompt));
    }
    while counting.running > 0 {
        match events.recv().await {
            Some(Event::Token {
                choice,
                text,
                log_probs,
            }) => {
                choices[choice].take(&text, false);
                choices[choice].log_probs.extend(log_probs);
            }
            Some(Event::Finished {
                choice,
                text,
                reason,
                usage,
            }) => {
                choices[choice].take(&text, true);
                choices[choice].reason = Some(reason);
                counting.ended(choice, &usage);
            }
            None => return Err(ApiError::internal("the engine ended before the answer did")),
        }
    }
    let choices = choices
        .into_iter()
        .enumerate()
        .map(|(index, choice)| choice.object(&frame, index));
    let mut body = frame.object(false, choices.collect());
    if frame.dialect == Dialect::Azure {
        body["prompt_filter_results"] = unfiltered();
    }
    body["usage"] = self::usage(&counting.usage);
    Ok(Json(body).into_response())
}

struct Streaming {
    frame: Frame,
    events: Events,
    include_usage: bool,
    readers: Vec<Option<Reader>>,
    counting: Counting,
    pending: VecDeque<String>,
    done: bool,
}

fn streamed(
    frame: Frame,
    events: Events,
    include_usage: bool,
    readers: Vec<Option<Reader>>,
    echo: &[String],
) -> Response {
    let choices = readers.len();
    let mut streaming = Streaming {
        counting: Counting::new(choices, events.choices),
        frame,
        events,
        include_usage,
        readers,
        pending: VecDeque::new(),
        done: false,
    };
    if streaming.frame.dialect == Dialect::Azure {
        // What is said of the prompt comes first, in a chunk without choices.
        let mut body = streaming.frame.object(true, Vec::new());
        body["prompt_filter_results"] = unfiltered();
        streaming.pending.push_back(body.to_string());
    }
    if streaming.frame.shape == Shape::Chat {
        // The role comes first and alone, as with OpenAI, so that clients open the message.
        for index in 0..choices {
            let delta = json!({ "role": "assistant", "content": "" });
            streaming.send(vec![
                json!({ "index": index, "delta": delta, "logprobs": null, "finish_reason": null }),
            ]);
        }
    }
    for (i, prompt) in echo.iter().enumerate() {
        let of_each = streaming.events.choices;
        for index in i * of_each..(i + 1) * of_each {
            streaming.frame.offsets[index] += prompt.len();
            streaming.choice(index, json!({ "content": prompt }), Value::Null, None);
        }
    }
    let stream = stream::unfold(streaming, |mut streaming| async move {
        while streaming.pending.is_empty() && !streaming.done {
            let event = streaming.events.recv().await;
            streaming.take(event);
        }
        let data = streaming.pending.pop_front()?;
        Some((Ok::<_, Infallible>(sse::Event::default().data(data)), streaming))
    });
    Sse::new(stream)
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
        .into_response()
}

impl Streaming {
    fn take(&mut self, event: Option<Event>) {
        match event {
            Some(Event::Token {
                choice,
                text,
                log_probs,
            }) => {
                self.piece(choice, &text, log_probs.as_slice(), false);
            }
            Some(Event::Finished {
                choice,
                text,
                reason,
                usage,
            }) => {
                self.piece(choice, &text, &[], true);
                let calls = self.readers[choice].as_ref().is_some_and(|reader| reader.calls() > 0);
                self.choice(choice, json!({}), Value::Null, Some(reason_name(reason, calls)));
                self.counting.ended(choice, &usage);
                if self.counting.running > 0 {
                    return;
                }
                if self.include_usage {
                    let mut body = self.frame.object(true, Vec::new());
                    body["usage"] = self::usage(&self.counting.usage);
                    self.pending.push_back(body.to_string());
                }
                self.end();
            }
            None => {
                self.pending.push_back(
                    ApiError::internal("the engine ended before the answer did")
                        .json()
                        .to_string(),
                );
                self.end();
            }
        }
    }

    /// A chunk for each part of the text; log-probabilities come with the first one.
    fn piece(&mut self, index: usize, text: &str, log_probs: &[LogProbs], last: bool) {
        let mut probs = self.frame.log_probs(index, log_probs);
        self.frame.offsets[index] += text.len();
        let mut parts = parts(self.readers[index].as_mut(), text, last);
        if parts.is_empty() && !probs.is_null() {
            parts.push(Part::Content(String::new()));
        }
        for part in parts {
            let delta = match part {
                Part::Content(text) => json!({ "content": text }),
                Part::Call { index, id, name } => json!({ "tool_calls": [{
                    "index": index, "id": id, "type": "function", "function": { "name": name, "arguments": "" },
                }] }),
                Part::Arguments { index, json } => {
                    json!({ "tool_calls": [{ "index": index, "function": { "arguments": json } }] })
                }
            };
            self.choice(index, delta, probs.take(), None);
        }
    }

    fn choice(&mut self, index: usize, delta: Value, log_probs: Value, reason: Option<&str>) {
        self.send(vec![match self.frame.shape {
            Shape::Chat => {
                json!({ "index": index, "delta": delta, "logprobs": log_probs, "finish_reason": reason })
            }
            Shape::Completion => {
                let text = delta["content"].as_str().unwrap_or_default();
                json!({ "index": index, "text": text, "logprobs": log_probs, "finish_reason": reason })
            }
        }]);
    }

    fn send(&mut self, choices: Vec<Value>) {
        let mut body = self.frame.object(true, choices);
        if self.include_usage {
            body["usage"] = Value::Null; // present in every chunk, and filled in the last one
        }
        self.pending.push_back(body.to_string());
    }

    fn end(&mut self) {
        self.pending.push_back("[DONE]".to_owned());
        self.done = true;
    }
}

impl Frame {
    fn object(&self, chunk: bool, mut choices: Vec<Value>) -> Value {
        if self.dialect == Dialect::Azure {
            choices
                .iter_mut()
                .for_each(|choice| choice["content_filter_results"] = json!({}));
        }
        let object = match (self.shape, chunk) {
            (Shape::Chat, false) => "chat.completion",
            (Shape::Chat, true) => "chat.completion.chunk",
            (Shape::Completion, _) => "text_completion",
        };
        json!({ "id": self.id, "object": object, "created": self.created, "model": self.model, "choices": choices })
    }

    pub(super) fn log_probs(&self, index: usize, probs: &[LogProbs]) -> Value {
        if probs.is_empty() {
            return Value::Null;
        }
        let text = |prob: &TokenProb| self.vocabulary.token_text(prob.token);
        match self.shape {
            Shape::Chat => {
                let entry = |prob: &TokenProb| {
                    let text = text(prob);
                    // A part of a character has no text of its own.
                    let bytes = (!text.contains('\u{FFFD}')).then_some(text.as_bytes());
                    json!({ "token": text, "logprob": prob.log_prob, "bytes": bytes })
                };
                let content = probs.iter().map(|(chosen, top)| {
                    let mut all = entry(chosen);
                    all["top_logprobs"] = top.iter().map(entry).collect();
                    all
                });
                json!({ "content": content.collect::<Vec<_>>(), "refusal": null })
            }
            Shape::Completion => {
                let mut offset = self.offsets[index];
                let offsets: Vec<usize> = probs
                    .iter()
                    .map(|(chosen, _)| {
                        let at = offset;
                        offset += text(chosen).len();
                        at
                    })
                    .collect();
                let top = |top: &[TokenProb]| {
                    let mut map = Map::new();
                    for prob in top {
                        // Tokens that are parts of characters look alike; the most likely one, which comes first, stands.
                        map.entry(text(prob)).or_insert(json!(prob.log_prob));
                    }
                    map
                };
                json!({
                    "tokens": probs.iter().map(|(chosen, _)| text(chosen)).collect::<Vec<_>>(),
                    "token_logprobs": probs.iter().map(|(chosen, _)| chosen.log_prob).collect::<Vec<_>>(),
                    "top_logprobs": probs.iter().map(|(_, all)| top(all)).collect::<Vec<_>>(),
                    "text_offset": offsets,
                })
            }
        }
    }
}

/// What Azure says of a prompt that no filter judged.
fn unfiltered() -> Value {
    json!([{ "prompt_index": 0, "content_filter_results": {} }])
}

fn usage(usage: &Usage) -> Value {
    json!({
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": { "cached_tokens": usage.cached_tokens },
    })
}
