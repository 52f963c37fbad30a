//! An answer's text as items of a response, and the events that tell a client how they come about.
//!
//! ```text
//! created, in_progress ─▶ (output_item.added ─▶ content_part.added ─▶ delta … done ─▶ part.done ─▶ item.done)* ─▶ completed
//!                                              └▶ function_call_arguments.delta … done ─────────────┘
//! ```

use std::collections::VecDeque;

use serde_json::{Value, json};

use super::super::prepare::random;
use super::super::unix_seconds;
use super::request::Request;
use crate::engine::{FinishReason, Submission, Usage};

/// A response while it grows.
pub(super) struct Output {
    response: Value,
    items: Vec<Value>,
    /// The item that is open, at the end of the items.
    open: Option<Open>,
    sequence: u64,
}

enum Open {
    Message(Message),
    Call(Call),
}

struct Message {
    id: String,
    text: String,
}

struct Call {
    id: String,
    /// What the client's result refers to.
    call_id: String,
    name: String,
    arguments: String,
}

impl Call {
    fn item(&self, status: &str) -> Value {
        json!({
            "id": self.id, "type": "function_call", "status": status, "call_id": self.call_id, "name": self.name,
            "arguments": self.arguments,
        })
    }
}

fn id(prefix: &str) -> String {
    format!("{prefix}_{:016x}{:016x}", random(), random())
}

impl Message {
    fn part(&self) -> Value {
        json!({ "type": "output_text", "text": self.text, "annotations": [], "logprobs": [] })
    }

    fn item(&self, status: &str, content: Vec<Value>) -> Value {
        json!({ "id": self.id, "type": "message", "role": "assistant", "status": status, "content": content })
    }
}

impl Output {
    /// Nothing yet of the answer to `request`.
    pub(super) fn new(model: &str, request: &Request, submission: &Submission) -> Self {
        let response = json!({
            "id": id("resp"), "object": "response", "created_at": unix_seconds(), "status": "in_progress",
            "background": false, "completed_at": null, "error": null, "incomplete_details": null,
            "instructions": request.instructions, "max_output_tokens": request.max_output_tokens,
            "max_tool_calls": null, "metadata": request.metadata, "model": model, "output": [],
            "parallel_tool_calls": request.parallel, "previous_response_id": request.previous,
            "reasoning": { "effort": null, "summary": null }, "service_tier": "default", "store": request.store,
            "temperature": submission.sampling.temperature, "text": request.text,
            "tool_choice": request.tool_choice, "tools": request.tools, "top_logprobs": 0,
            "top_p": submission.sampling.top_p, "truncation": "disabled", "usage": null, "user": null,
        });
        Output {
            response,
            items: Vec::new(),
            open: None,
            sequence: 0,
        }
    }

    /// The response as it stands.
    pub(super) fn response(&self) -> &Value {
        &self.response
    }

    /// Its items that are complete.
    pub(super) fn items(&self) -> &[Value] {
        &self.items
    }

    fn emit(&mut self, kind: &str, mut event: Value, events: &mut VecDeque<Value>) {
        event["type"] = json!(kind);
        event["sequence_number"] = json!(self.sequence);
        self.sequence += 1;
        events.push_back(event);
    }

    /// What comes before anything is generated.
    pub(super) fn begin(&mut self, events: &mut VecDeque<Value>) {
        for kind in ["response.created", "response.in_progress"] {
            self.emit(kind, json!({ "response": self.response }), events);
        }
    }

    /// More text of a message.
    pub(super) fn text(&mut self, text: &str, events: &mut VecDeque<Value>) {
        if text.is_empty() {
            return;
        }
        if !matches!(self.open, Some(Open::Message(_))) {
            self.close("completed", events);
            self.open_message(events);
        }
        let Some(Open::Message(message)) = &mut self.open else {
            return;
        };
        message.text.push_str(text);
        let delta = json!({
            "item_id": message.id, "output_index": self.items.len(), "content_index": 0, "delta": text, "logprobs": [],
        });
        self.emit("response.output_text.delta", delta, events);
    }

    fn open_message(&mut self, events: &mut VecDeque<Value>) {
        let message = Message {
            id: id("msg"),
            text: String::new(),
        };
        let at = self.items.len();
        let item = json!({ "output_index": at, "item": message.item("in_progress", Vec::new()) });
        self.emit("response.output_item.added", item, events);
        let part = json!({ "item_id": message.id, "output_index": at, "content_index": 0, "part": message.part() });
        self.emit("response.content_part.added", part, events);
        self.open = Some(Open::Message(message));
    }

    /// A call of a function begins.
    pub(super) fn call(&mut self, name: String, call_id: String, events: &mut VecDeque<Value>) {
        self.close("completed", events);
        let call = Call {
            id: id("fc"),
            call_id,
            name,
            arguments: String::new(),
        };
        let item = json!({ "output_index": self.items.len(), "item": call.item("in_progress") });
        self.emit("response.output_item.added", item, events);
        self.open = Some(Open::Call(call));
    }

    /// More of the JSON of its arguments.
    pub(super) fn arguments(&mut self, json: &str, events: &mut VecDeque<Value>) {
        let Some(Open::Call(call)) = &mut self.open else { return };
        call.arguments.push_str(json);
        let delta = json!({ "item_id": call.id, "output_index": self.items.len(), "delta": json });
        self.emit("response.function_call_arguments.delta", delta, events);
    }

    /// Closes the item that is open, if one is.
    fn close(&mut self, status: &str, events: &mut VecDeque<Value>) {
        let item = match self.open.take() {
            None => return,
            Some(Open::Message(message)) => self.close_message(message, status, events),
            Some(Open::Call(call)) => {
                let done = json!({
                    "item_id": call.id, "output_index": self.items.len(), "name": call.name, "arguments": call.arguments,
                });
                self.emit("response.function_call_arguments.done", done, events);
                call.item(status)
            }
        };
        let done = json!({ "output_index": self.items.len(), "item": item });
        self.emit("response.output_item.done", done, events);
        self.items.push(item);
    }

    fn close_message(&mut self, message: Message, status: &str, events: &mut VecDeque<Value>) -> Value {
        let at = self.items.len();
        let place = json!({ "item_id": message.id, "output_index": at, "content_index": 0 });
        let (mut text, mut part) = (place.clone(), place);
        text["text"] = json!(message.text);
        text["logprobs"] = json!([]);
        self.emit("response.output_text.done", text, events);
        part["part"] = message.part();
        self.emit("response.content_part.done", part, events);
        message.item(status, vec![message.part()])
    }

    /// The answer has ended.
    pub(super) fn finish(&mut self, reason: FinishReason, usage: &Usage, events: &mut VecDeque<Value>) {
        self.response["usage"] = json!({
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": { "cached_tokens": usage.cached_tokens, "cache_write_tokens": 0 },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": { "reasoning_tokens": 0 },
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        });
        match reason {
            FinishReason::Abort => self.fail("the server ended the answer before it was complete", events),
            FinishReason::Length => {
                self.response["incomplete_details"] = json!({ "reason": "max_output_tokens" });
                self.end("incomplete", events);
            }
            _ => {
                // Also an empty answer is a message.
                if self.items.is_empty() && self.open.is_none() {
                    self.open_message(events);
                }
                self.response["completed_at"] = json!(unix_seconds());
                self.end("completed", events);
            }
        }
    }

    /// The answer cannot be completed.
    pub(super) fn fail(&mut self, message: &str, events: &mut VecDeque<Value>) {
        self.response["error"] = json!({ "code": "server_error", "message": message });
        self.end("failed", events);
    }

    fn end(&mut self, status: &str, events: &mut VecDeque<Value>) {
        self.close(if status == "completed" { status } else { "incomplete" }, events);
        self.response["status"] = json!(status);
        self.response["output"] = json!(self.items);
        self.emit(
            &format!("response.{status}"),
            json!({ "response": self.response }),
            events,
        );
    }
}
