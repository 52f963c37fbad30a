//! What the API server asks of `metadata`, as far as a manifest that a person writes can break it.

use regex::Regex;
use serde_json::{Map, Value, json};

use crate::schema::Violation;

/// Schema of the fields that a manifest may hold under `metadata`; the server knows no others.
pub fn schema() -> Value {
    let strings = json!({"type": "object", "additionalProperties": {"type": "string"}});
    let mut properties = json!({
        "annotations": strings,
        "labels": strings,
        "finalizers": {"type": "array", "items": {"type": "string"}},
        "managedFields": {"type": "array", "items": {"x-kubernetes-preserve-unknown-fields": true}},
        "ownerReferences": {"type": "array", "items": {"type": "object", "properties": {
            "apiVersion": {"type": "string"}, "kind": {"type": "string"}, "name": {"type": "string"},
            "uid": {"type": "string"}, "controller": {"type": "boolean"}, "blockOwnerDeletion": {"type": "boolean"},
        }, "required": ["apiVersion", "kind", "name", "uid"]}},
        "generation": {"type": "integer"},
        "deletionGracePeriodSeconds": {"type": "integer"},
    });
    for name in [
        "name",
        "generateName",
        "namespace",
        "uid",
        "resourceVersion",
        "selfLink",
        "creationTimestamp",
        "deletionTimestamp",
    ] {
        properties[name] = json!({"type": "string"});
    }
    json!({"type": "object", "properties": properties})
}

const SUBDOMAIN: &str = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*";
const LABEL_KEY: &str = "([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]";
const LABEL_VALUE: &str = "(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?";
/// Longest name of a label, and longest value, in bytes.
const LABEL_BYTES: usize = 63;
/// What all annotations of an object may have together, keys and values, in bytes.
const ANNOTATIONS_BYTES: usize = 256 * 1024;

fn is_all(pattern: &str, text: &str) -> bool {
    Regex::new(&format!("^{pattern}$")).is_ok_and(|regex| regex.is_match(text))
}

fn add(found: &mut Vec<Violation>, path: &str, message: String) {
    found.push(Violation {
        path: path.into(),
        message,
        blocks_rules: false,
    });
}

/// The rule of names: a DNS subdomain of at most 253 characters.
pub fn name(metadata: &Value, found: &mut Vec<Violation>) {
    match (metadata["name"].as_str(), metadata["generateName"].as_str()) {
        (None | Some(""), None | Some("")) => {
            let message = "Required value: name or generateName is required".into();
            add(found, "metadata.name", message);
        }
        (Some(name), _) => {
            for broken in subdomain(name) {
                add(found, "metadata.name", format!("Invalid value: {name:?}: {broken}"));
            }
        }
        _ => {}
    }
}

/// The rule of labels: keys are qualified names, values much alike.
pub fn labels(labels: &Value, found: &mut Vec<Violation>) {
    for (key, value) in texts(labels) {
        for broken in qualified_name(key) {
            add(found, "metadata.labels", format!("Invalid value: {key:?}: {broken}"));
        }
        if value.len() > LABEL_BYTES {
            let message = format!("Invalid value: {value:?}: must be no more than {LABEL_BYTES} bytes");
            add(found, "metadata.labels", message);
        }
        if !is_all(LABEL_VALUE, value) {
            let message = format!(
                "Invalid value: {value:?}: a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '{LABEL_VALUE}')"
            );
            add(found, "metadata.labels", message);
        }
    }
}

/// The rule of annotations: keys are qualified names, whatever their case, and all together are not too long.
pub fn annotations(annotations: &Value, found: &mut Vec<Violation>) {
    for (key, _) in texts(annotations) {
        for broken in qualified_name(&key.to_lowercase()) {
            add(
                found,
                "metadata.annotations",
                format!("Invalid value: {key:?}: {broken}"),
            );
        }
    }
    let total: usize = texts(annotations).map(|(key, value)| key.len() + value.len()).sum();
    if total > ANNOTATIONS_BYTES {
        found.push(Violation {
            path: "metadata.annotations".into(),
            message: format!("Too long: may not be more than {ANNOTATIONS_BYTES} bytes"),
            blocks_rules: true,
        });
    }
}

fn texts(map: &Value) -> impl Iterator<Item = (&String, &str)> {
    let map: Option<&Map<String, Value>> = map.as_object();
    map.into_iter()
        .flatten()
        .filter_map(|(key, value)| Some((key, value.as_str()?)))
}

fn subdomain(text: &str) -> Vec<String> {
    let mut broken = Vec::new();
    if text.len() > 253 {
        broken.push("must be no more than 253 bytes".to_owned());
    }
    if !is_all(SUBDOMAIN, text) {
        broken.push(format!(
            "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '{SUBDOMAIN}')"
        ));
    }
    broken
}

/// What is wrong with a key: a name, and before it perhaps a DNS subdomain and a slash.
fn qualified_name(key: &str) -> Vec<String> {
    let regex = format!(
        "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '{LABEL_KEY}')"
    );
    let mut broken = Vec::new();
    let name = match *key.split('/').collect::<Vec<_>>() {
        [name] => name,
        ["", name] => {
            broken.push("prefix part must be non-empty".to_owned());
            name
        }
        [prefix, name] => {
            broken.extend(subdomain(prefix).iter().map(|broken| format!("prefix part {broken}")));
            name
        }
        _ => {
            return vec![format!(
                "a valid label key {regex} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"
            )];
        }
    };
    if name.is_empty() {
        broken.push("name part must be non-empty".to_owned());
    } else if name.len() > LABEL_BYTES {
        broken.push(format!("name part must be no more than {LABEL_BYTES} bytes"));
    }
    if !is_all(LABEL_KEY, name) {
        broken.push(format!("name part {regex}"));
    }
    broken
}
