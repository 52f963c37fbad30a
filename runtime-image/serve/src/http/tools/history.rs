//! What a chat template is given when tools are involved: definitions, and calls and results of earlier turns. A template
//! that knows tools gets them as Hugging Face passes them; for one that does not, they become text.

use serde_json::{Map, Value, json};

use super::super::error::ApiError;
use super::define::Tools;
use super::format::Format;

/// How a template says that it takes no system message.
const NO_SYSTEM: &str = "System role not supported";

/// The messages and the tools for a template with this source.
pub(in crate::http) fn prepare(
    template: &str,
    mut messages: Vec<Value>,
    tools: Option<&Tools>,
) -> Result<(Vec<Value>, Option<Value>), ApiError> {
    for (i, message) in messages.iter_mut().enumerate() {
        parse_calls(i, message)?;
    }
    // Every template that writes tools reads the variable of that name.
    if template.contains("tools") {
        let tools = tools.map(|tools| tools.told.iter().map(|tool| tool.object.clone()).collect());
        return Ok((messages, tools));
    }
    let format = Format::of(template);
    let mut out: Vec<Value> = Vec::with_capacity(messages.len() + 1);
    for message in messages {
        as_text(format, message, &mut out);
    }
    if let Some(tools) = tools {
        instruct(template.contains(NO_SYSTEM), format.instruction(tools), &mut out);
    }
    Ok((out, None))
}

/// Arguments come as a text of JSON and go to templates as an object.
fn parse_calls(i: usize, message: &mut Value) -> Result<(), ApiError> {
    let wrong = |what: String| ApiError::invalid("messages", format!("messages[{i}]{what}"));
    let Some(message) = message.as_object_mut() else {
        return Ok(());
    };
    if message.get("function_call").is_some_and(|call| !call.is_null()) {
        return Err(wrong(
            ".function_call is OpenAI's older form of calls; use tool_calls".to_owned(),
        ));
    }
    let assistant = message.get("role").is_some_and(|role| role == "assistant");
    let calls = match message.get_mut("tool_calls") {
        Some(Value::Array(calls)) if !calls.is_empty() && assistant => calls,
        Some(Value::Null | Value::Array(_)) => {
            // Some templates only look whether it is there.
            message.remove("tool_calls");
            return Ok(());
        }
        None => return Ok(()),
        Some(_) => return Err(wrong(".tool_calls is not a list".to_owned())),
    };
    for (j, call) in calls.iter_mut().enumerate() {
        let wrong = |what: &str| wrong(format!(".tool_calls[{j}]{what}"));
        let function = call.get_mut("function").and_then(Value::as_object_mut);
        let function = function.ok_or_else(|| wrong(".function is missing"))?;
        if !function.get("name").is_some_and(Value::is_string) {
            return Err(wrong(".function.name is missing"));
        }
        let arguments = match function.get("arguments") {
            None | Some(Value::Null) => Value::Object(Map::new()),
            Some(Value::String(text)) if text.trim().is_empty() => Value::Object(Map::new()),
            Some(Value::String(text)) => serde_json::from_str(text)
                .map_err(|error| wrong(&format!(".function.arguments is not JSON: {error}")))?,
            Some(other) => other.clone(),
        };
        if !arguments.is_object() {
            return Err(wrong(".function.arguments is not a JSON object"));
        }
        function.insert("arguments".to_owned(), arguments);
    }
    Ok(())
}

/// The message in words of roles that every template knows. Results stand in a user's turn, those of one answer together.
fn as_text(format: &Format, mut message: Value, out: &mut Vec<Value>) {
    let content = message["content"].as_str().unwrap_or_default().to_owned();
    if message["role"] == "tool" {
        let result = format!("<tool_response>\n{content}\n</tool_response>");
        match out.last_mut().filter(|last| last["results"] == true) {
            Some(last) => {
                last["content"] = json!(format!("{}\n{result}", last["content"].as_str().unwrap_or_default()))
            }
            None => out.push(json!({ "role": "user", "content": result, "results": true })),
        }
        return;
    }
    if let Some(Value::Array(calls)) = message.get("tool_calls") {
        let each = calls.iter().map(|call| {
            let function = &call["function"];
            (
                function["name"].as_str().unwrap_or_default(),
                function["arguments"].to_string(),
            )
        });
        let calls = format.calls(each);
        let text = if content.is_empty() {
            calls
        } else {
            format!("{content}\n{calls}")
        };
        message = json!({ "role": "assistant", "content": text });
    }
    out.push(message);
}

/// Puts the text into the system message, or where there can be none before the user's.
fn instruct(no_system: bool, text: String, messages: &mut Vec<Value>) {
    let role = if no_system { "user" } else { "system" };
    match messages.first_mut().filter(|first| first["role"] == role) {
        Some(first) => {
            let content = first["content"].as_str().unwrap_or_default().to_owned();
            let both = if no_system { [text, content] } else { [content, text] };
            first["content"] = json!(both.join("\n\n"));
        }
        None => messages.insert(0, json!({ "role": role, "content": text })),
    }
}
