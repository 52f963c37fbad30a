//! A request for a response as one for a chat completion: the same prompt, the same checks.

use serde_json::{Map, Value, json};

use super::super::api::ChatRequest;
use super::super::error::ApiError;

/// Fields that would change the answer and are not supported, with the value that changes nothing.
const UNSUPPORTED: &[(&str, Value)] = &[
    ("background", Value::Bool(false)),
    ("conversation", Value::Null),
    ("max_tool_calls", Value::Null),
    ("messages", Value::Null),
    ("n", Value::Null),
    ("prompt", Value::Null),
    ("response_format", Value::Null),
    ("stream_options", Value::Null),
];
/// What may be included in an answer and is not there.
const LOG_PROBS: &str = "message.output_text.logprobs";

/// A request, its own fields apart from those that it shares with chat completions.
pub(super) struct Request {
    /// The new items of the conversation.
    pub(super) items: Vec<Value>,
    pub(super) instructions: Option<String>,
    pub(super) previous: Option<String>,
    pub(super) store: bool,
    /// Fields that the response repeats as they came.
    pub(super) metadata: Value,
    pub(super) text: Value,
    pub(super) tools: Value,
    pub(super) tool_choice: Value,
    pub(super) parallel: Value,
    pub(super) max_output_tokens: Value,
    /// The fields of chat completions.
    shared: Map<String, Value>,
}

fn wrong(field: &'static str, message: impl Into<String>) -> ApiError {
    ApiError::invalid(field, message)
}

/// A field that must be an object.
fn object(value: Option<Value>, field: &'static str) -> Result<Value, ApiError> {
    match value {
        None => Ok(json!({})),
        Some(value) if value.is_object() => Ok(value),
        Some(_) => Err(wrong(field, format!("{field} must be an object"))),
    }
}

fn text(body: &mut Map<String, Value>, field: &'static str) -> Result<Option<String>, ApiError> {
    match body.remove(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(wrong(field, format!("{field} must be a text"))),
    }
}

impl Request {
    pub(super) fn read(mut body: Map<String, Value>) -> Result<Self, ApiError> {
        for (field, neutral) in UNSUPPORTED {
            match body.remove(*field) {
                Some(value) if !value.is_null() && value != *neutral => {
                    return Err(wrong(
                        field,
                        format!("{field} is not supported by this server: leave it out"),
                    ));
                }
                _ => (),
            }
        }
        let mut take = |field: &str| body.remove(field).filter(|value| !value.is_null());
        let items = match take("input") {
            Some(Value::String(text)) => vec![json!({ "type": "message", "role": "user", "content": text })],
            Some(Value::Array(items)) => items,
            _ => return Err(wrong("input", "input is needed: a text or a list of items")),
        };
        let include = take("include").unwrap_or_default();
        let included = |name: &str| include.as_array().is_some_and(|all| all.iter().any(|one| one == name));
        if included(LOG_PROBS) || take("top_logprobs").is_some_and(|count| count != 0) {
            let message = "log-probabilities are not supported here; chat completions have them";
            return Err(wrong("include", message));
        }
        if take("truncation").is_some_and(|truncation| truncation != "disabled") {
            return Err(wrong("truncation", "only truncation: disabled is supported"));
        }
        let store = match take("store") {
            None => true,
            Some(store) => store
                .as_bool()
                .ok_or_else(|| wrong("store", "store must be true or false"))?,
        };
        let format = object(take("text"), "text")?;
        let reasoning = take("reasoning").unwrap_or_default();
        let max_output_tokens = take("max_output_tokens").unwrap_or_default();
        let metadata = object(take("metadata"), "metadata")?;
        let tools = take("tools").unwrap_or_else(|| json!([]));
        let tool_choice = take("tool_choice").unwrap_or_else(|| json!("auto"));
        let parallel = body
            .get("parallel_tool_calls")
            .cloned()
            .filter(|value| !value.is_null());
        let instructions = text(&mut body, "instructions")?;
        let previous = text(&mut body, "previous_response_id")?;
        let mut shared = body;
        let mut set = |field: &str, value: Value| {
            if !value.is_null() {
                shared.insert(field.to_owned(), value);
            }
        };
        set("max_completion_tokens", max_output_tokens.clone());
        set("verbosity", format["verbosity"].clone());
        set("reasoning_effort", reasoning["effort"].clone());
        set("response_format", response_format(&format["format"]));
        if tools.as_array().is_none_or(|tools| !tools.is_empty()) {
            set("tools", self::tools(&tools)?);
        }
        set("tool_choice", self::tool_choice(&tool_choice)?);
        Ok(Request {
            items,
            instructions,
            previous,
            store,
            metadata,
            text: match format["format"].is_null() {
                true => json!({ "format": { "type": "text" } }),
                false => format,
            },
            tools,
            tool_choice,
            parallel: parallel.unwrap_or(Value::Bool(true)),
            max_output_tokens,
            shared,
        })
    }
}

/// The flat form of a schema, as chat completions nest it.
fn response_format(format: &Value) -> Value {
    match format["type"].as_str() {
        Some("json_schema") => json!({ "type": "json_schema", "json_schema": without_type(format) }),
        _ => format.clone(),
    }
}

fn without_type(value: &Value) -> Value {
    let mut object = value.as_object().cloned().unwrap_or_default();
    object.shift_remove("type");
    Value::Object(object)
}

fn tools(tools: &Value) -> Result<Value, ApiError> {
    let list = tools.as_array().ok_or_else(|| wrong("tools", "tools must be a list"))?;
    let nested = list.iter().enumerate().map(|(i, tool)| match tool["type"].as_str() {
        Some("function") => Ok(json!({ "type": "function", "function": without_type(tool) })),
        _ => Err(wrong(
            "tools",
            format!(
                "tools[{i}].type is {}; this server has no tools of its own: only function is possible",
                tool["type"]
            ),
        )),
    });
    nested.collect::<Result<Vec<_>, _>>().map(Value::Array)
}

fn tool_choice(choice: &Value) -> Result<Value, ApiError> {
    match choice["type"].as_str() {
        None => Ok(choice.clone()),
        Some("function") => Ok(json!({ "type": "function", "function": { "name": choice["name"] } })),
        Some("allowed_tools") => Ok(json!({
            "type": "allowed_tools",
            "allowed_tools": { "mode": choice["mode"], "tools": tools(&choice["tools"])? },
        })),
        Some(other) => Err(wrong(
            "tool_choice",
            format!("tool_choice.type is {other:?}; function and allowed_tools are possible"),
        )),
    }
}

/// The chat that a conversation of `items` is.
pub(super) fn to_chat(request: &Request, items: &[Value]) -> Result<ChatRequest, ApiError> {
    let mut messages: Vec<Value> = Vec::with_capacity(items.len() + 1);
    if let Some(instructions) = &request.instructions {
        messages.push(json!({ "role": "system", "content": instructions }));
    }
    for (i, item) in items.iter().enumerate() {
        add(i, item, &mut messages)?;
    }
    let mut fields = request.shared.clone();
    fields.insert("messages".to_owned(), Value::Array(messages));
    serde_json::from_value(Value::Object(fields))
        .map_err(|error| ApiError::invalid(None, format!("a field is wrong: {error}")))
}

/// Adds an item to the messages. Calls of one turn stand in one message, as chat templates want them.
fn add(i: usize, item: &Value, messages: &mut Vec<Value>) -> Result<(), ApiError> {
    let wrong = |what: String| ApiError::invalid("input", format!("input[{i}]{what}"));
    let needed = |field: &str| {
        item[field]
            .as_str()
            .ok_or_else(|| wrong(format!(".{field} is missing")))
    };
    match item["type"].as_str().unwrap_or("message") {
        "message" => messages.push(json!({ "role": needed("role")?, "content": content(&item["content"]) })),
        "function_call" => {
            let call = json!({
                "id": needed("call_id")?, "type": "function",
                "function": { "name": needed("name")?, "arguments": needed("arguments")? },
            });
            let open = messages.last_mut().filter(|last| last["role"] == "assistant");
            match open.map(|last| &mut last["tool_calls"]) {
                Some(Value::Array(calls)) => calls.push(call),
                Some(calls) => *calls = json!([call]),
                None => messages.push(json!({ "role": "assistant", "content": "", "tool_calls": [call] })),
            }
        }
        "function_call_output" => messages.push(json!({
            "role": "tool", "tool_call_id": needed("call_id")?, "content": content(&item["output"]),
        })),
        // What another model thought is nothing to this one.
        "reasoning" => (),
        "item_reference" => {
            let message = ".type is item_reference; items are not stored alone: send the item, or previous_response_id";
            return Err(wrong(message.to_owned()));
        }
        other => {
            return Err(wrong(format!(
                ".type is {other:?}; message, function_call, function_call_output and reasoning are possible"
            )));
        }
    }
    Ok(())
}

/// Parts of text in the words of chat completions; others as they are, to be refused there.
fn content(content: &Value) -> Value {
    let Value::Array(parts) = content else {
        return content.clone();
    };
    let part = |part: &Value| match part["type"].as_str() {
        Some("output_text" | "input_text") => json!({ "type": "text", "text": part["text"] }),
        Some("refusal") => json!({ "type": "text", "text": part["refusal"] }),
        _ => part.clone(),
    };
    parts.iter().map(part).collect()
}
