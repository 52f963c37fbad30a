//! What the engine's events add up to: numbered choices with text and calls, and their usage.

use std::future::poll_fn;
use std::task::Poll;

use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::respond::{Frame, LogProbs, PromptProbs, Shape};
use super::tools::{Part, Reader};
use crate::engine::{Event, FinishReason, Usage};

/// The events of all prompts of a request; their choices are numbered through.
pub(super) struct Events {
    pub(super) receivers: Vec<mpsc::Receiver<Event>>,
    /// Choices of each prompt.
    pub(super) choices: usize,
}

impl Events {
    /// The next event, of whichever prompt.
    pub(super) async fn recv(&mut self) -> Option<Event> {
        poll_fn(|context| {
            let mut open = false;
            for (i, receiver) in self.receivers.iter_mut().enumerate() {
                match receiver.poll_recv(context) {
                    Poll::Ready(Some(mut event)) => {
                        let (Event::Prompt { choice, .. }
                        | Event::Token { choice, .. }
                        | Event::Finished { choice, .. }) = &mut event;
                        *choice += i * self.choices;
                        return Poll::Ready(Some(event));
                    }
                    Poll::Ready(None) => (),
                    Poll::Pending => open = true,
                }
            }
            if open { Poll::Pending } else { Poll::Ready(None) }
        })
        .await
    }
}

/// What is known of the usage of a response whose choices end one by one.
pub(super) struct Counting {
    pub(super) usage: Usage,
    /// Choices that have not ended.
    pub(super) running: usize,
    /// Choices of each prompt.
    choices: usize,
}

impl Counting {
    pub(super) fn new(running: usize, choices: usize) -> Self {
        Counting {
            usage: Usage::default(),
            running,
            choices,
        }
    }

    /// Another choice has ended. A prompt counts once, and what it found in the cache is what its first choice found.
    pub(super) fn ended(&mut self, choice: usize, usage: &Usage) {
        self.running = self.running.saturating_sub(1);
        if choice.is_multiple_of(self.choices) {
            self.usage.prompt_tokens += usage.prompt_tokens;
            self.usage.cached_tokens += usage.cached_tokens;
        }
        self.usage.completion_tokens += usage.completion_tokens;
    }
}

/// One answer, as far as it has come.
pub(super) struct Choice {
    reader: Option<Reader>,
    pub(super) content: String,
    calls: Vec<Value>,
    /// Of the prompt, where they are shown.
    pub(super) prompt: Option<PromptProbs>,
    pub(super) log_probs: Vec<LogProbs>,
    pub(super) reason: Option<FinishReason>,
}

impl Choice {
    pub(super) fn new(reader: Option<Reader>) -> Self {
        Choice {
            reader,
            content: String::new(),
            calls: Vec::new(),
            prompt: None,
            log_probs: Vec::new(),
            reason: None,
        }
    }

    /// Takes more text; `last` if no more comes.
    pub(super) fn take(&mut self, text: &str, last: bool) {
        for part in parts(self.reader.as_mut(), text, last) {
            match part {
                Part::Content(text) => self.content += &text,
                Part::Call { id, name, .. } => self.calls.push(json!({
                    "id": id, "type": "function", "function": { "name": name, "arguments": "" },
                })),
                Part::Arguments { index, json } => {
                    if let Some(Value::String(arguments)) = self.calls[index].pointer_mut("/function/arguments") {
                        *arguments += &json;
                    }
                }
            }
        }
    }

    /// How likely a token of it is, on average: the logarithm of that. An answer without tokens is the least likely one.
    pub(super) fn likelihood(&self) -> f32 {
        match self.log_probs.len() {
            0 => f32::NEG_INFINITY,
            tokens => self.log_probs.iter().map(|(chosen, _)| chosen.log_prob).sum::<f32>() / tokens as f32,
        }
    }

    /// The choice as a whole response has it.
    pub(super) fn object(self, frame: &Frame, index: usize) -> Value {
        let log_probs = frame.log_probs(index, self.prompt.as_ref(), &self.log_probs);
        let reason = self.reason.map(|reason| reason_name(reason, !self.calls.is_empty()));
        if frame.shape == Shape::Completion {
            return json!({ "index": index, "text": self.content, "logprobs": log_probs, "finish_reason": reason });
        }
        let mut message = json!({ "role": "assistant", "content": self.content, "refusal": null });
        if !self.calls.is_empty() {
            if self.content.is_empty() {
                message["content"] = Value::Null;
            }
            message["tool_calls"] = Value::Array(self.calls);
        }
        json!({ "index": index, "message": message, "logprobs": log_probs, "finish_reason": reason })
    }
}

/// What a text turns out to be; all of it content, if no calls are looked for.
pub(super) fn parts(reader: Option<&mut Reader>, text: &str, last: bool) -> Vec<Part> {
    let Some(reader) = reader else {
        return if text.is_empty() {
            Vec::new()
        } else {
            vec![Part::Content(text.to_owned())]
        };
    };
    let mut parts = reader.push(text);
    if last {
        parts.extend(reader.finish());
    }
    parts
}

/// The word for why an answer ended; one that was completed with calls waits for their results.
pub(super) fn reason_name(reason: FinishReason, calls: bool) -> &'static str {
    match reason {
        FinishReason::Stop if calls => "tool_calls",
        reason => reason.name(),
    }
}
