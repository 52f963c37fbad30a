//! The form that a request wants its answer to have: OpenAI's `response_format`, vLLM's `structured_outputs` and its older
//! `guided_*` fields, each to a grammar.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Served;
use super::error::ApiError;
use crate::engine::{Constraint, Form, FormError, lark_regex};

/// The most texts to choose from.
const MAX_CHOICES: usize = 4096;
/// Between two parts of JSON at most a space or a line break with its indentation: enough to write it readably, and no model
/// can lose itself in blanks.
const WHITESPACE: &str = r"( |\n[ \t]{0,32})";
/// Where one of these stands, parts of a schema hold at once, and an object that one part closes has no room for another's
/// properties.
const COMBINING: [&str; 5] = ["allOf", "oneOf", "not", "if", "unevaluatedProperties"];

/// The fields of a request that ask for a form.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct FormFields {
    response_format: Option<ResponseFormat>,
    structured_outputs: Option<StructuredOutputs>,
    guided_json: Option<Value>,
    guided_regex: Option<String>,
    guided_choice: Option<Vec<String>>,
    guided_grammar: Option<String>,
}

#[derive(Clone, Debug, Deserialize)]
struct ResponseFormat {
    #[serde(rename = "type")]
    kind: String,
    json_schema: Option<NamedSchema>,
}

#[derive(Clone, Debug, Deserialize)]
struct NamedSchema {
    schema: Option<Value>,
    strict: Option<bool>,
}

/// vLLM's. `_backend` and other fields that choose how it is done are not looked at.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct StructuredOutputs {
    json: Option<Value>,
    regex: Option<String>,
    choice: Option<Vec<String>>,
    grammar: Option<String>,
    json_object: Option<bool>,
    structural_tag: Option<Value>,
    disable_any_whitespace: Option<bool>,
    whitespace_pattern: Option<String>,
}

/// A form and the field that asked for it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Asked {
    pub(super) form: Form,
    pub(super) field: &'static str,
}

impl FormFields {
    /// The form, if one is asked for.
    pub(super) fn asked(self) -> Result<Option<Asked>, ApiError> {
        let structured = self.structured_outputs.unwrap_or_default();
        if structured.structural_tag.is_some() {
            let message = "structural_tag is not supported; json, json_object, regex, choice and grammar are";
            return Err(ApiError::invalid("structured_outputs", message));
        }
        let space = match (structured.disable_any_whitespace, structured.whitespace_pattern) {
            (Some(true), _) => None,
            (_, pattern) => Some(pattern.unwrap_or_else(|| WHITESPACE.to_owned())),
        };
        let space = space.as_deref();
        const STRUCTURED: &str = "structured_outputs";
        let mut all = [
            (
                "response_format",
                self.response_format.map(response_format).transpose()?.flatten(),
            ),
            (
                STRUCTURED,
                structured
                    .json
                    .map(|json| schema(json, STRUCTURED, false, space))
                    .transpose()?,
            ),
            (
                STRUCTURED,
                structured
                    .json_object
                    .filter(|wanted| *wanted)
                    .map(|_| any_object(space)),
            ),
            (STRUCTURED, structured.regex.map(Form::Regex)),
            (
                STRUCTURED,
                structured.choice.map(|texts| choice(&texts, STRUCTURED)).transpose()?,
            ),
            (STRUCTURED, structured.grammar.map(Form::Lark)),
            (
                "guided_json",
                self.guided_json
                    .map(|json| schema(json, "guided_json", false, Some(WHITESPACE)))
                    .transpose()?,
            ),
            ("guided_regex", self.guided_regex.map(Form::Regex)),
            (
                "guided_choice",
                self.guided_choice
                    .map(|texts| choice(&texts, "guided_choice"))
                    .transpose()?,
            ),
            ("guided_grammar", self.guided_grammar.map(Form::Lark)),
        ]
        .into_iter()
        .filter_map(|(field, form)| Some(Asked { form: form?, field }));
        let first = all.next();
        match (&first, all.next()) {
            (Some(first), Some(second)) => Err(ApiError::invalid(
                second.field,
                format!("an answer has one form; {} asks for one already", first.field),
            )),
            _ => Ok(first),
        }
    }
}

/// What keeps an answer in the form.
pub(super) fn compile(served: &Served, asked: Asked) -> Result<Constraint, ApiError> {
    served.forms.compile(asked.form).map_err(|error| {
        let what = match &error {
            FormError::TooLong(_) => "is too long",
            FormError::Invalid(_) => "cannot be followed",
            FormError::Tokenizer(_) => "is not possible",
        };
        ApiError::invalid(asked.field, format!("{} {what}: {error}", asked.field))
    })
}

fn response_format(format: ResponseFormat) -> Result<Option<Form>, ApiError> {
    let wrong = |message: String| ApiError::invalid("response_format", message);
    match format.kind.as_str() {
        "text" => Ok(None),
        "json_object" => Ok(Some(any_object(Some(WHITESPACE)))),
        "json_schema" => {
            let named = format
                .json_schema
                .ok_or_else(|| wrong("response_format of type json_schema needs json_schema".to_owned()))?;
            let json = named
                .schema
                .ok_or_else(|| wrong("response_format.json_schema needs schema".to_owned()))?;
            // Without `strict`, what cannot be enforced of a schema is left to the model, as with OpenAI.
            let lenient = named.strict != Some(true);
            schema(json, "response_format", lenient, Some(WHITESPACE)).map(Some)
        }
        kind => Err(wrong(format!(
            "response_format.type is {kind:?}; text, json_object and json_schema are possible"
        ))),
    }
}

fn any_object(space: Option<&str>) -> Form {
    Form::Schema(with_options(
        Map::from_iter([("type".to_owned(), json!("object"))]),
        false,
        space,
    ))
}

/// A schema, given as JSON or as its text, as a grammar is made from it.
pub(super) fn schema(json: Value, field: &'static str, lenient: bool, space: Option<&str>) -> Result<Form, ApiError> {
    let json = match json {
        Value::String(text) => serde_json::from_str(&text)
            .map_err(|error| ApiError::invalid(field, format!("{field} is not JSON: {error}")))?,
        json => json,
    };
    let object = match json {
        Value::Object(object) => object,
        Value::Bool(true) => Map::new(),
        other => {
            return Err(ApiError::invalid(
                field,
                format!("{field} has the schema {other}; an object is needed"),
            ));
        }
    };
    Ok(Form::Schema(with_options(object, lenient, space)))
}

/// The schema as [`schema`] makes it, for a grammar around it.
pub(super) fn inner(schema: Map<String, Value>) -> Value {
    with_options(schema, true, Some(WHITESPACE))
}

/// The schema with what llguidance is told beside it.
fn with_options(schema: Map<String, Value>, lenient: bool, space: Option<&str>) -> Value {
    let mut schema = Value::Object(schema);
    if !mentions(&schema, &COMBINING) {
        close(&mut schema);
    }
    schema["x-guidance"] = match space {
        Some(pattern) => json!({ "lenient": lenient, "whitespace_pattern": pattern }),
        None => json!({ "lenient": lenient, "whitespace_flexible": false }),
    };
    schema
}

fn mentions(value: &Value, names: &[&str]) -> bool {
    match value {
        Value::Array(list) => list.iter().any(|value| mentions(value, names)),
        Value::Object(object) => object
            .iter()
            .any(|(key, value)| names.contains(&key.as_str()) || mentions(value, names)),
        _ => false,
    }
}

/// Objects whose properties are listed get no others unless the schema says so: what is written is still valid, and a model
/// that is free to invent properties does.
fn close(schema: &mut Value) {
    let Value::Object(object) = schema else { return };
    let open = [
        "additionalProperties",
        "patternProperties",
        "$ref",
        "anyOf",
        "minProperties",
    ];
    if object.get("properties").is_some_and(Value::is_object) && !open.iter().any(|key| object.contains_key(*key)) {
        object.insert("additionalProperties".to_owned(), json!(false));
    }
    for (key, value) in object.iter_mut() {
        match (key.as_str(), value) {
            ("properties" | "$defs" | "definitions" | "patternProperties", Value::Object(map)) => {
                map.values_mut().for_each(close);
            }
            ("anyOf" | "prefixItems", Value::Array(list)) => list.iter_mut().for_each(close),
            ("items" | "additionalProperties", value) => close(value),
            _ => (),
        }
    }
}

fn choice(texts: &[String], field: &'static str) -> Result<Form, ApiError> {
    if texts.is_empty() || texts.len() > MAX_CHOICES || texts.iter().any(String::is_empty) {
        let message = format!("{field} takes 1 to {MAX_CHOICES} texts, none of them empty");
        return Err(ApiError::invalid(field, message));
    }
    let texts: Vec<String> = texts.iter().map(|text| literal(text)).collect();
    Ok(Form::Lark(format!("start: {}", texts.join(" | "))))
}

/// A text as Lark writes it.
pub(super) fn literal(text: &str) -> String {
    Value::String(text.to_owned()).to_string()
}

/// A form as a part of a rule of Lark.
pub(super) fn within(form: &Form) -> String {
    match form {
        Form::Schema(schema) => format!("%json {schema}"),
        Form::Regex(regex) => lark_regex(regex),
        Form::Lark(grammar) => format!("%lark {{\n{grammar}\n}}"),
    }
}
