//! Whether an object on the server already is what is wanted, so that nothing is sent for nothing.
//!
//! The server adds defaults and rewrites quantities, so equality is too much to ask: everything that is wanted must be
//! there. What is no longer wanted is noticed by a hash of what was applied last, kept in an annotation.

use serde_json::Value;

use crate::workload::quantity;

/// Whether everything in `wanted` is in `is`.
pub fn holds(wanted: &Value, is: Option<&Value>) -> bool {
    holds_at(wanted, is, false)
}

fn holds_at(wanted: &Value, is: Option<&Value>, quantities: bool) -> bool {
    match (wanted, is) {
        (wanted, None) => is_empty(wanted),
        (Value::Object(wanted), Some(Value::Object(is))) => wanted.iter().all(|(key, value)| {
            let below = quantities || matches!(key.as_str(), "limits" | "requests" | "sizeLimit");
            holds_at(value, is.get(key), below)
        }),
        (Value::Array(wanted), Some(Value::Array(is))) => {
            wanted.len() == is.len()
                && wanted
                    .iter()
                    .zip(is)
                    .all(|(wanted, is)| holds_at(wanted, Some(is), quantities))
        }
        (Value::String(wanted), Some(Value::String(is))) if quantities => {
            wanted == is || quantity::parse(wanted).is_some_and(|value| quantity::parse(is) == Some(value))
        }
        (wanted, Some(is)) => wanted == is,
    }
}

/// Values that the server leaves out.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(value) => !value,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn defaults_of_the_server_are_no_difference_but_drift_is() {
        let wanted = json!({"spec": {"replicas": 2, "list": [{"name": "a", "value": ""}],
            "resources": {"requests": {"memory": "1024Mi", "cpu": "0.5"}}, "env": {"A": "1"}}});
        let mut is = json!({"spec": {"replicas": 2, "list": [{"name": "a", "more": true}], "added": 1,
            "resources": {"requests": {"memory": "1Gi", "cpu": "500m"}}, "env": {"A": "1"}}, "status": {}});
        assert!(holds(&wanted, Some(&is)));
        for (path, value) in [
            ("/spec/replicas", json!(3)),
            ("/spec/list", json!([])),
            ("/spec/resources/requests/memory", json!("2Gi")),
            ("/spec/env/A", json!("1000m")),
        ] {
            let before = std::mem::replace(is.pointer_mut(path).expect("the path exists"), value);
            assert!(!holds(&wanted, Some(&is)), "{path}");
            *is.pointer_mut(path).expect("the path exists") = before;
        }
    }
}
