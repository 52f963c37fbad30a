//! What a request says of its tools, checked.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::super::error::ApiError;

/// OpenAI's bounds on the number of tools and the length of a name; descriptions and schemas in bytes and levels.
const MAX_TOOLS: usize = 128;
const MAX_NAME_BYTES: usize = 64;
const MAX_TOOL_BYTES: usize = 64 << 10;
const MAX_SCHEMA_DEPTH: usize = 48;

/// The fields of a request that are about tools.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(in crate::http) struct ToolFields {
    tools: Option<Vec<Value>>,
    tool_choice: Option<Value>,
    parallel_tool_calls: Option<bool>,
}

/// A function that the model may call.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::http) struct Tool {
    pub(in crate::http) name: String,
    /// The JSON schema of its arguments, an object.
    pub(in crate::http) parameters: Map<String, Value>,
    /// OpenAI's object, without what nobody knows.
    pub(in crate::http) object: Value,
}

/// Whether the model calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::http) enum Choice {
    /// It decides.
    Auto,
    /// It must.
    Required,
}

/// The tools of a request.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::http) struct Tools {
    /// All that the model is told of, at least one.
    pub(in crate::http) told: Vec<Tool>,
    /// Indices into `told` of those that it may call, at least one.
    pub(in crate::http) callable: Vec<usize>,
    pub(in crate::http) choice: Choice,
    /// Whether it may call several times in one answer.
    pub(in crate::http) parallel: bool,
}

impl Tools {
    /// Those that may be called.
    pub(in crate::http) fn callable(&self) -> impl Iterator<Item = &Tool> {
        self.callable.iter().map(|at| &self.told[*at])
    }
}

fn wrong(field: &'static str, message: impl Into<String>) -> ApiError {
    ApiError::invalid(field, message)
}

impl ToolFields {
    /// The tools, if there are any that may be called.
    pub(in crate::http) fn checked(self) -> Result<Option<Tools>, ApiError> {
        let tools = self.tools.unwrap_or_default();
        if tools.len() > MAX_TOOLS {
            return Err(wrong(
                "tools",
                format!("{} tools; {MAX_TOOLS} are the most", tools.len()),
            ));
        }
        let told = tools
            .into_iter()
            .enumerate()
            .map(|(i, tool)| self::tool(i, tool))
            .collect::<Result<Vec<Tool>, _>>()?;
        for (i, tool) in told.iter().enumerate() {
            if told[..i].iter().any(|other| other.name == tool.name) {
                return Err(wrong("tools", format!("two tools have the name {:?}", tool.name)));
            }
        }
        let find = |name: &str| {
            let found = told.iter().position(|tool| tool.name == name);
            found.ok_or_else(|| {
                wrong(
                    "tool_choice",
                    format!("tool_choice names {name:?}, which is not among the tools"),
                )
            })
        };
        let mode = |mode: &str| match mode {
            "auto" => Ok(Some(Choice::Auto)),
            "required" => Ok(Some(Choice::Required)),
            "none" => Ok(None),
            other => Err(wrong(
                "tool_choice",
                format!(
                    "tool_choice is {other:?}; none, auto, required and an object that names a function are possible"
                ),
            )),
        };
        let all: Vec<usize> = (0..told.len()).collect();
        let (choice, callable) = match self.tool_choice.unwrap_or(Value::Null) {
            Value::Null => (Some(Choice::Auto), all),
            Value::String(word) => (mode(&word)?, all),
            Value::Object(object) => match object.get("type").and_then(Value::as_str) {
                Some("function") => (Some(Choice::Required), vec![find(function_name(&object)?)?]),
                Some("allowed_tools") => {
                    let allowed = object
                        .get("allowed_tools")
                        .and_then(Value::as_object)
                        .unwrap_or(&object);
                    let names = allowed.get("tools").and_then(Value::as_array);
                    let names = names.ok_or_else(|| wrong("tool_choice", "tool_choice.allowed_tools needs tools"))?;
                    let at = names.iter().map(|tool| {
                        let tool = tool
                            .as_object()
                            .ok_or_else(|| wrong("tool_choice", "an allowed tool is an object"))?;
                        find(function_name(tool)?)
                    });
                    let mut at = at.collect::<Result<Vec<usize>, _>>()?;
                    at.sort_unstable();
                    at.dedup();
                    (mode(allowed.get("mode").and_then(Value::as_str).unwrap_or("auto"))?, at)
                }
                _ => {
                    return Err(wrong(
                        "tool_choice",
                        "tool_choice.type must be function or allowed_tools",
                    ));
                }
            },
            other => {
                return Err(wrong(
                    "tool_choice",
                    format!("tool_choice is {other}; a word or an object is needed"),
                ));
            }
        };
        match (choice, callable.is_empty()) {
            (Some(Choice::Required), true) => Err(wrong(
                "tool_choice",
                "tool_choice asks for a call, but there are no tools",
            )),
            (None, _) | (_, true) => Ok(None),
            (Some(choice), false) => Ok(Some(Tools {
                told,
                callable,
                choice,
                parallel: self.parallel_tool_calls != Some(false),
            })),
        }
    }
}

/// The name in `{"function": {"name"}}`, or in `{"name"}` as the Responses API writes it.
fn function_name(object: &Map<String, Value>) -> Result<&str, ApiError> {
    let named = object.get("function").and_then(Value::as_object).unwrap_or(object);
    let name = named.get("name").and_then(Value::as_str);
    name.ok_or_else(|| wrong("tool_choice", "tool_choice.function.name is missing"))
}

fn tool(i: usize, tool: Value) -> Result<Tool, ApiError> {
    let wrong = |what: String| wrong("tools", format!("tools[{i}]{what}"));
    match tool.get("type").and_then(Value::as_str) {
        Some("function") => (),
        _ => {
            return Err(wrong(format!(
                ".type is {}; only \"function\" is possible",
                tool["type"]
            )));
        }
    }
    let function = tool.get("function").and_then(Value::as_object);
    let function = function.ok_or_else(|| wrong(".function is missing".to_owned()))?;
    let name = function.get("name").and_then(Value::as_str).unwrap_or_default();
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
    if name.is_empty() || name.len() > MAX_NAME_BYTES || !name.chars().all(allowed) {
        return Err(wrong(format!(
            ".function.name is {name:?}; it needs 1 to {MAX_NAME_BYTES} letters, digits, underscores and dashes"
        )));
    }
    let description = match function.get("description") {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) => Some(text.as_str()),
        Some(_) => return Err(wrong(".function.description is not a text".to_owned())),
    };
    let mut parameters = match function.get("parameters") {
        None | Some(Value::Null) => Map::new(),
        Some(Value::Object(schema)) => schema.clone(),
        Some(_) => return Err(wrong(".function.parameters is not a JSON schema object".to_owned())),
    };
    match parameters.get("type") {
        None | Some(Value::Null) => _ = parameters.insert("type".to_owned(), json!("object")),
        Some(kind) if kind == "object" => (),
        Some(kind) => {
            return Err(wrong(format!(
                ".function.parameters.type is {kind}; arguments are an \"object\""
            )));
        }
    }
    let composed = [
        "anyOf",
        "oneOf",
        "allOf",
        "$ref",
        "additionalProperties",
        "patternProperties",
    ];
    if !composed.iter().any(|key| parameters.contains_key(*key)) {
        parameters.entry("properties").or_insert_with(|| json!({}));
    }
    let schema = Value::Object(parameters);
    if depth(&schema) > MAX_SCHEMA_DEPTH {
        return Err(wrong(format!(
            ".function.parameters has more than {MAX_SCHEMA_DEPTH} levels"
        )));
    }
    let mut object = json!({ "type": "function", "function": { "name": name } });
    if let Some(description) = description {
        object["function"]["description"] = json!(description);
    }
    object["function"]["parameters"] = schema.clone();
    if object.to_string().len() > MAX_TOOL_BYTES {
        return Err(wrong(format!(" has more than {MAX_TOOL_BYTES} bytes")));
    }
    let Value::Object(parameters) = schema else {
        unreachable!("it was made from an object")
    };
    Ok(Tool {
        name: name.to_owned(),
        parameters,
        object,
    })
}

/// Levels of nesting.
fn depth(value: &Value) -> usize {
    match value {
        Value::Array(list) => 1 + list.iter().map(depth).max().unwrap_or(0),
        Value::Object(object) => 1 + object.values().map(depth).max().unwrap_or(0),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(fields: Value) -> Result<Option<Tools>, String> {
        let fields: ToolFields = serde_json::from_value(fields).map_err(|error| error.to_string())?;
        fields
            .checked()
            .map_err(|error| error.json()["error"]["message"].as_str().unwrap().to_owned())
    }

    fn tool(name: &str) -> Value {
        json!({ "type": "function", "function": { "name": name, "parameters": { "type": "object" } } })
    }

    #[test]
    fn a_choice_says_which_tools_may_be_called_and_whether_one_must() {
        let two = || json!([tool("f"), tool("g")]);
        let named = json!({ "type": "function", "function": { "name": "g" } });
        let allowed = json!({ "type": "allowed_tools", "allowed_tools": { "mode": "required", "tools": [
            { "type": "function", "function": { "name": "g" } },
        ] } });
        for (choice, expected) in [
            (json!(null), Some((vec!["f", "g"], Choice::Auto))),
            (json!("auto"), Some((vec!["f", "g"], Choice::Auto))),
            (json!("required"), Some((vec!["f", "g"], Choice::Required))),
            (json!("none"), None),
            (named, Some((vec!["g"], Choice::Required))),
            (allowed, Some((vec!["g"], Choice::Required))),
        ] {
            let tools = checked(json!({ "tools": two(), "tool_choice": choice })).unwrap();
            let got = tools
                .as_ref()
                .map(|tools| (tools.callable().map(|tool| tool.name.as_str()).collect(), tools.choice));
            assert_eq!(got, expected, "{choice}");
        }
        assert_eq!(checked(json!({ "tools": [], "tool_choice": "auto" })), Ok(None));
    }

    #[test]
    fn wrong_definitions_are_refused_with_their_place() {
        let mut deep = json!({ "type": "object" });
        for _ in 0..50 {
            deep = json!({ "type": "object", "properties": { "x": deep } });
        }
        let with = |function: Value| json!({ "tools": [{ "type": "function", "function": function }] });
        for (fields, part) in [
            (
                json!({ "tools": [{ "type": "custom", "custom": {} }] }),
                "tools[0].type",
            ),
            (
                json!({ "tools": [{ "type": "function" }] }),
                "tools[0].function is missing",
            ),
            (with(json!({ "name": "get weather" })), "tools[0].function.name"),
            (with(json!({ "name": "f".repeat(65) })), "1 to 64"),
            (with(json!({ "name": "f", "parameters": [] })), "not a JSON schema"),
            (
                with(json!({ "name": "f", "parameters": { "type": "string" } })),
                "arguments are an \"object\"",
            ),
            (with(json!({ "name": "f", "parameters": deep })), "levels"),
            (with(json!({ "name": "f", "description": "x".repeat(70_000) })), "bytes"),
            (json!({ "tools": [tool("f"), tool("f")] }), "two tools"),
            (json!({ "tools": vec![tool("f"); 129] }), "128"),
            (json!({ "tool_choice": "required" }), "no tools"),
            (json!({ "tools": [tool("f")], "tool_choice": "always" }), "always"),
            (
                json!({ "tools": [tool("f")], "tool_choice": { "type": "function", "function": { "name": "g" } } }),
                "\"g\"",
            ),
        ] {
            let error = checked(fields.clone()).unwrap_err();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn fields_that_nobody_knows_are_left_out() {
        let fields =
            json!({ "tools": [{ "type": "function", "x": 1, "function": { "name": "f", "strict": true, "y": [] } }] });
        let tools = checked(fields).unwrap().unwrap();
        let parameters = json!({ "type": "object", "properties": {} });
        assert_eq!(
            tools.told[0].object,
            json!({ "type": "function", "function": { "name": "f", "parameters": parameters } })
        );
    }
}
