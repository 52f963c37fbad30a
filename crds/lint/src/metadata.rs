//! What the API server asks of `metadata`, as far as a manifest that a person writes can break it.

use regex::Regex;
use serde_json::{Value, json};

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

/// The rule of names: a DNS subdomain of at most 253 characters.
pub fn name(metadata: &Value, found: &mut Vec<Violation>) {
    const PATTERN: &str = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*";
    let mut violation = |path: &str, message: String| {
        found.push(Violation {
            path: path.into(),
            message,
            blocks_rules: false,
        });
    };
    match (metadata["name"].as_str(), metadata["generateName"].as_str()) {
        (None | Some(""), None | Some("")) => {
            violation(
                "metadata.name",
                "Required value: name or generateName is required".into(),
            );
        }
        (Some(name), _) if name.len() > 253 => violation(
            "metadata.name",
            format!("Invalid value: {name:?}: must be no more than 253 bytes"),
        ),
        (Some(name), _) if !Regex::new(&format!("^{PATTERN}$")).is_ok_and(|regex| regex.is_match(name)) => violation(
            "metadata.name",
            format!(
                "Invalid value: {name:?}: a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '{PATTERN}')"
            ),
        ),
        _ => {}
    }
}
