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
use super::prepare::{Prepared, Shown, random};
use super::tools::{Part, Reader};
use super::{Served, State, unix_seconds};
use crate::engine::{Event, FinishReason, Submission, TokenProb, Usage};

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
/// A prompt's first token, of which nothing is said, and the others.
pub(super) type PromptProbs = (u32, Vec<LogProbs>);

/// Prepares a request and answers.
pub(super) async fn answer<R: DeserializeOwned + 'static>(
    state: Arc<State>,
    request: Admitted,
    (shape, dialect): (Shape, Dialect),
    prepared: fn(&Served, R) -> Result<Prepared, ApiError>,
) -> Result<Response, ApiError> {
    // Known without the work of preparing.
    state.accepting()?.engine.has_room()?;
    let sender = request.sender;
    let mut prepared = request.prepare(&state, prepared).await?;
    prepared.sent_by(sender);
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
        shown,
        stream,
        include_usage,
        reader,
    } = prepared;
    let choices = submission.choices;
    let of_prompts = submission.prompt_log_probs.is_some();
    let readers = vec![reader; choices * (1 + others.len())];
    // Those that were taken are cancelled if a later one is not: their receivers go.
    let receivers = std::iter::once(submission)
        .chain(others)
        .map(|one| served.engine.submit(one));
    let receivers = receivers.collect::<Result<Vec<_>, _>>()?;
    let events = Events { receivers, choices };
    if stream {
        Ok(streamed(frame, events, include_usage, readers, (shown, of_prompts)))
    } else {
        whole(frame, events, readers, &shown).await
    }
}

async fn whole(
    frame: Frame,
    mut events: Events,
    readers: Vec<Option<Reader>>,
    shown: &Shown,
) -> Result<Response, ApiError> {
    let mut counting = Counting::new(readers.len(), events.choices);
    let mut choices: Vec<Choice> = readers.into_iter().map(Choice::new).collect();
    for (prompt, choices) in shown.echo.iter().zip(choices.chunks_mut(events.choices)) {
        choices.iter_mut().for_each(|choice| choice.content.clone_from(prompt));
    }
    while counting.running > 0 {
        match events.recv().await {
            Some(Event::Prompt {
                choice,
                first,
                log_probs,
            }) => {
                let all = &mut choices[choice..choice + events.choices];
                all.iter_mut()
                    .for_each(|choice| choice.prompt = Some((first, log_probs.clone())));
            }
            Some(Event::Token {
                choice,
                text,
                log_probs,
            }) if !shown.prompt_only => {
                choices[choice].take(&text, false);
                choices[choice].log_probs.extend(log_probs);
            }
            Some(Event::Token { .. }) => (),
            Some(Event::Finished {
                choice,
                text,
                reason,
                mut usage,
            }) => {
                if shown.prompt_only {
                    usage.completion_tokens = 0;
                } else {
                    choices[choice].take(&text, true);
                }
                choices[choice].reason = Some(ended(shown, reason));
                counting.ended(choice, &usage);
            }
            None => return Err(ApiError::internal("the engine ended before the answer did")),
        }
    }
    let choices = best(choices, events.choices, shown)
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

/// The answers that are shown, of `of_each` to each prompt.
fn best(choices: Vec<Choice>, of_each: usize, shown: &Shown) -> Vec<Choice> {
    let Some(most) = shown.best else { return choices };
    let mut kept = Vec::new();
    let mut choices = choices.into_iter();
    while choices.len() > 0 {
        let mut group: Vec<Choice> = choices.by_ref().take(of_each).collect();
        group.sort_by(|a, b| b.likelihood().total_cmp(&a.likelihood()));
        group.truncate(most);
        if shown.hide_log_probs {
            group.iter_mut().for_each(|choice| choice.log_probs.clear());
        }
        kept.extend(group);
    }
    kept
}

/// Why an answer ended, as it is shown.
fn ended(shown: &Shown, reason: FinishReason) -> FinishReason {
    match reason {
        FinishReason::Stop if shown.prompt_only => FinishReason::Length,
        reason => reason,
    }
}

struct Streaming {
    frame: Frame,
    events: Events,
    include_usage: bool,
    readers: Vec<Option<Reader>>,
    shown: Shown,
    counting: Counting,
    pending: VecDeque<String>,
    done: bool,
}

fn streamed(
    frame: Frame,
    events: Events,
    include_usage: bool,
    readers: Vec<Option<Reader>>,
    (shown, of_prompts): (Shown, bool),
) -> Response {
    let choices = readers.len();
    let mut streaming = Streaming {
        counting: Counting::new(choices, events.choices),
        frame,
        events,
        include_usage,
        readers,
        shown,
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
    // With log-probabilities it comes when these are known.
    if !of_prompts {
        (0..streaming.shown.echo.len()).for_each(|i| streaming.echo(i, None));
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
            Some(Event::Prompt {
                choice,
                first,
                log_probs,
            }) => self.echo(choice / self.events.choices, Some((first, log_probs))),
            Some(Event::Token { .. }) if self.shown.prompt_only => (),
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
                mut usage,
            }) => {
                if self.shown.prompt_only {
                    usage.completion_tokens = 0;
                } else {
                    self.piece(choice, &text, &[], true);
                }
                let reason = ended(&self.shown, reason);
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

    /// A chunk with the `i`th prompt, for each of its answers.
    fn echo(&mut self, i: usize, log_probs: Option<PromptProbs>) {
        let prompt = std::mem::take(&mut self.shown.echo[i]);
        let of_each = self.events.choices;
        for index in i * of_each..(i + 1) * of_each {
            let probs = self.frame.log_probs(index, log_probs.as_ref(), &[]);
            self.frame.offsets[index] += prompt.len();
            self.choice(index, json!({ "content": prompt }), probs, None);
        }
    }

    /// A chunk for each part of the text; log-probabilities come with the first one.
    fn piece(&mut self, index: usize, text: &str, log_probs: &[LogProbs], last: bool) {
        let mut probs = self.frame.log_probs(index, None, log_probs);
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

    /// The log-probabilities of tokens of choice `index`; those of its prompt, which only completions show, before them.
    pub(super) fn log_probs(&self, index: usize, prompt: Option<&PromptProbs>, probs: &[LogProbs]) -> Value {
        if probs.is_empty() && prompt.is_none() {
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
                let top = |top: &[TokenProb]| {
                    let mut map = Map::new();
                    for prob in top {
                        // Tokens that are parts of characters look alike; the most likely one, which comes first, stands.
                        map.entry(text(prob)).or_insert(json!(prob.log_prob));
                    }
                    json!(map)
                };
                let first = prompt.map(|(first, _)| (self.vocabulary.token_text(*first), Value::Null, Value::Null));
                let others = prompt.iter().flat_map(|(_, others)| others).chain(probs);
                let others = others.map(|(chosen, all)| (text(chosen), json!(chosen.log_prob), top(all)));
                let mut offset = self.offsets[index];
                let (mut tokens, mut token_probs, mut tops, mut offsets) = (vec![], vec![], vec![], vec![]);
                for (text, prob, top) in first.into_iter().chain(others) {
                    offsets.push(offset);
                    offset += text.len();
                    tokens.push(text);
                    token_probs.push(prob);
                    tops.push(top);
                }
                json!({ "tokens": tokens, "token_logprobs": token_probs, "top_logprobs": tops, "text_offset": offsets })
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
