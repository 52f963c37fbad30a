//! A structural schema applied to a value, each violation in the API server's words (k8s.io/kube-openapi and
//! k8s.io/apimachinery's field errors, Kubernetes 1.36).

use regex::Regex;
use serde_json::{Map, Value};

/// One violation.
#[derive(Debug, PartialEq, Eq)]
pub struct Violation {
    /// Field, such as `spec.sources[0]`; empty for the whole object.
    pub path: String,
    /// What the server says.
    pub message: String,
    /// Whether the server then leaves the CEL rules out.
    pub blocks_rules: bool,
}

/// Takes out nulls as the server does: a field that is null counts as absent.
pub fn prune_nulls(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(prune_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(prune_nulls),
        _ => {}
    }
}

/// Puts in what `schema` says about fields that are absent, as the server does before it judges.
pub fn apply_defaults(schema: &Value, value: &mut Value) {
    match value {
        Value::Object(map) => {
            for (name, field) in schema["properties"].as_object().into_iter().flatten() {
                if let Some(default) = field.get("default") {
                    map.entry(name).or_insert_with(|| default.clone());
                }
            }
            for (key, value) in map {
                if let Some(schema) = field_of(schema, key) {
                    apply_defaults(schema, value);
                }
            }
        }
        Value::Array(items) => items.iter_mut().for_each(|item| apply_defaults(&schema["items"], item)),
        _ => {}
    }
}

/// Schema of an object's field.
fn field_of<'a>(schema: &'a Value, key: &str) -> Option<&'a Value> {
    schema["properties"]
        .get(key)
        .or_else(|| schema.get("additionalProperties"))
}

/// Paths of the fields of `value` that `schema` does not know, as a strict decoder names them.
pub fn unknown_fields(schema: &Value, value: &Value, path: &str, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                let path = child(path, key);
                match field_of(schema, key) {
                    Some(schema) => unknown_fields(schema, value, &path, found),
                    None if schema["x-kubernetes-preserve-unknown-fields"] == true => {}
                    None => found.push(path),
                }
            }
        }
        Value::Array(items) => {
            for (index, value) in items.iter().enumerate() {
                unknown_fields(&schema["items"], value, &format!("{path}[{index}]"), found);
            }
        }
        _ => {}
    }
}

/// Everything about `value` that breaks `schema`: types, required fields, enums, bounds, patterns, list keys.
pub fn violations(schema: &Value, value: &Value, path: &str, found: &mut Vec<Violation>) {
    found.extend(wrong_type(schema, value, path));
    if let Some(allowed) = schema["enum"].as_array().filter(|allowed| !allowed.contains(value)) {
        let allowed: Vec<_> = allowed
            .iter()
            .map(|value| format!("{:?}", value.as_str().map_or_else(|| value.to_string(), str::to_owned)))
            .collect();
        found.push(Violation {
            path: path.into(),
            message: format!("Unsupported value: {value}: supported values: {}", allowed.join(", ")),
            blocks_rules: true,
        });
    }
    match value {
        Value::String(text) => string(schema, text, path, found),
        Value::Number(number) => bounds(schema, number, path, found),
        Value::Array(items) => list(schema, items, path, found),
        Value::Object(map) => object(schema, map, path, found),
        Value::Null | Value::Bool(_) => {}
    }
}

fn child(path: &str, key: &str) -> String {
    match path {
        "" => key.to_owned(),
        path => format!("{path}.{key}"),
    }
}

/// A violation that the server words as `Invalid value: VALUE: PATH in body DETAIL`.
fn invalid(path: &str, value: impl std::fmt::Display, detail: impl std::fmt::Display) -> Violation {
    Violation {
        path: path.into(),
        message: format!("Invalid value: {value}: {path} in body {detail}"),
        blocks_rules: false,
    }
}

fn wrong_type(schema: &Value, value: &Value, path: &str) -> Option<Violation> {
    let found = match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
    };
    let integral = value.as_f64().is_some_and(|number| number.fract() == 0.0);
    let int_or_string = schema["x-kubernetes-int-or-string"] == true;
    let expected = match schema["type"].as_str() {
        _ if int_or_string => "integer,string",
        Some(expected) => expected,
        None => return None,
    };
    let fits = expected.split(',').any(|expected| match expected {
        "number" => matches!(found, "number" | "integer"),
        "integer" => found == "integer" || (found == "number" && integral),
        expected => expected == found,
    });
    if fits {
        return None;
    }
    // Where a format is given, the server's message holds formats for all but strings and lists.
    let (expected, found) = match (schema["format"].as_str(), found) {
        (Some(format), "number") if !int_or_string => (format, "float64"),
        (Some(format), "boolean" | "object") if !int_or_string => (format, ""),
        _ => (expected, found),
    };
    let mut violation = invalid(
        path,
        format_args!("{found:?}"),
        format_args!("must be of type {expected}: {found:?}"),
    );
    violation.blocks_rules = true;
    Some(violation)
}

fn string(schema: &Value, text: &str, path: &str, found: &mut Vec<Violation>) {
    let length = text.chars().count() as u64;
    if let Some(max) = schema["maxLength"].as_u64().filter(|&max| length > max) {
        let bytes = if max == 1 { "byte" } else { "bytes" };
        found.push(Violation {
            path: path.into(),
            message: format!("Too long: may not be more than {max} {bytes}"),
            blocks_rules: true,
        });
    }
    if let Some(min) = schema["minLength"].as_u64().filter(|&min| length < min) {
        found.push(invalid(
            path,
            format_args!("{text:?}"),
            format_args!("should be at least {min} chars long"),
        ));
    }
    if let Some(pattern) = schema["pattern"].as_str() {
        let matches = Regex::new(pattern).is_ok_and(|regex| regex.is_match(text));
        if !matches {
            found.push(invalid(
                path,
                format_args!("{text:?}"),
                format_args!("should match '{pattern}'"),
            ));
        }
    }
}

fn bounds(schema: &Value, number: &serde_json::Number, path: &str, found: &mut Vec<Violation>) {
    let value = number.as_f64().unwrap_or(f64::NAN);
    let range = match schema["format"].as_str() {
        Some("int32") => Some((f64::from(i32::MIN), f64::from(i32::MAX))),
        // What does not fit is a floating-point number here; 2^63 is the first of them.
        Some("int64") => Some((i64::MIN as f64, (i64::MAX as f64).next_down())),
        _ => None,
    };
    if let (Some((least, most)), Some(format)) = (range, schema["format"].as_str())
        && (value < least || value > most || value.fract() != 0.0)
    {
        found.push(Violation {
            path: String::new(),
            message: format!(
                "Invalid value: \"\": Checked value must be of type integer with format {format} in {path}"
            ),
            blocks_rules: false,
        });
    }
    if let Some(min) = schema["minimum"].as_f64().filter(|&min| value < min) {
        found.push(invalid(
            path,
            number,
            format_args!("should be greater than or equal to {min}"),
        ));
    }
    if let Some(max) = schema["maximum"].as_f64().filter(|&max| value > max) {
        found.push(invalid(
            path,
            number,
            format_args!("should be less than or equal to {max}"),
        ));
    }
}

fn list(schema: &Value, items: &[Value], path: &str, found: &mut Vec<Violation>) {
    for (index, item) in items.iter().enumerate() {
        violations(&schema["items"], item, &format!("{path}[{index}]"), found);
    }
    let length = items.len() as u64;
    if let Some(min) = schema["minItems"].as_u64().filter(|&min| length < min) {
        found.push(invalid(path, length, format_args!("should have at least {min} items")));
    }
    if let Some(max) = schema["maxItems"].as_u64().filter(|&max| length > max) {
        found.push(too_many(path, length, max));
    }
    if schema["x-kubernetes-list-type"] == "map" {
        repeated_keys(schema, items, path, found);
    }
}

fn too_many(path: &str, length: u64, max: u64) -> Violation {
    let items = if max == 1 { "item" } else { "items" };
    Violation {
        path: path.into(),
        message: format!("Too many: {length}: must have at most {max} {items}"),
        blocks_rules: true,
    }
}

/// In a list of type map the key fields of the items differ; the server names each key's second item.
fn repeated_keys(schema: &Value, items: &[Value], path: &str, found: &mut Vec<Violation>) {
    let keys: Vec<&str> = schema["x-kubernetes-list-map-keys"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let key_of = |item: &Value| -> Map<String, Value> {
        keys.iter()
            .filter_map(|&key| Some((key.to_owned(), item.get(key)?.clone())))
            .collect()
    };
    for (index, item) in items.iter().enumerate().filter(|(_, item)| item.is_object()) {
        let key = key_of(item);
        if items[..index].iter().filter(|earlier| key_of(earlier) == key).count() == 1 {
            found.push(Violation {
                path: format!("{path}[{index}]"),
                message: format!("Duplicate value: {}", Value::Object(key)),
                blocks_rules: false,
            });
        }
    }
}

fn object(schema: &Value, map: &Map<String, Value>, path: &str, found: &mut Vec<Violation>) {
    if let Some(max) = schema["maxProperties"].as_u64().filter(|&max| map.len() as u64 > max) {
        found.push(too_many(path, map.len() as u64, max));
    }
    for (key, value) in map {
        // Unknown fields have no schema: they are judged apart, and pruned before the server validates.
        if let Some(schema) = field_of(schema, key) {
            violations(schema, value, &child(path, key), found);
        }
    }
    for key in schema["required"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
    {
        if !map.contains_key(key) {
            found.push(Violation {
                path: child(path, key),
                message: "Required value".into(),
                blocks_rules: true,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_is_absent_has_its_default_and_what_is_there_keeps_its_value() {
        let schema = json!({"properties": {
            "replicas": {"type": "integer", "default": 1},
            "items": {"type": "array", "items": {"properties": {"on": {"default": true}}}},
            "absent": {"properties": {"inner": {"default": 2}}},
        }});
        let mut value = json!({"items": [{}, {"on": false}]});
        apply_defaults(&schema, &mut value);
        assert_eq!(value, json!({"replicas": 1, "items": [{"on": true}, {"on": false}]}));
        value["replicas"] = json!(0);
        apply_defaults(&schema, &mut value);
        assert_eq!(value["replicas"], 0);
    }
}
