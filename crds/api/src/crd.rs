//! The CRDs, made from the types and brought into the shape that Strata's rules ask for.

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use serde_json::{Map, Value, json};

use crate::{AlignmentJob, Dataset, InferenceService, PretrainJob};

/// Largest CRD in bytes of YAML, so that client-side `kubectl apply` (whose annotation holds it all) still works.
pub const CRD_LIMIT_BYTES: usize = 200 * 1024;

/// Kubernetes' own pattern of quantities, where one is written as a text. The server knows it of built-in kinds only.
const QUANTITY_PATTERN: &str = r"^(\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))(([KMGTPE]i)|[numkMGTPE]|([eE](\+|-)?(([0-9]+(\.[0-9]*)?)|(\.[0-9]+))))?$";
/// Longest text of a quantity.
const QUANTITY_CHARS: u32 = 32;

/// The four CRDs in the order of a model's life, each as the JSON that is written and applied.
pub fn crds() -> Vec<Value> {
    [
        Dataset::crd(),
        PretrainJob::crd(),
        AlignmentJob::crd(),
        InferenceService::crd(),
    ]
    .into_iter()
    .map(finish)
    .collect()
}

/// A CRD as YAML.
pub fn to_yaml(crd: &Value) -> String {
    serde_yaml::to_string(crd).expect("a CRD is plain JSON")
}

fn finish(crd: CustomResourceDefinition) -> Value {
    let mut crd = serde_json::to_value(crd).expect("a CRD serializes to JSON");
    let versions = crd.pointer_mut("/spec/versions").and_then(Value::as_array_mut);
    for version in versions.into_iter().flatten() {
        if let Some(schema) = version.pointer_mut("/schema/openAPIV3Schema") {
            tidy(schema);
            conditions_by_type(schema);
        }
    }
    crd
}

/// Takes out what generated schemas say too much: `nullable` (a null would be kept where absence is meant), Rust's
/// integer formats, and schemas of whole JSON Schema's generality that the API server refuses.
fn tidy(schema: &mut Value) {
    match schema {
        Value::Object(map) => {
            if is_schema(map) {
                map.remove("nullable");
                if let Some(format) = map.get("format").and_then(Value::as_str)
                    && format.starts_with("uint")
                {
                    map.remove("format");
                }
                if map.contains_key("x-kubernetes-int-or-string") {
                    map.insert("pattern".into(), json!(QUANTITY_PATTERN));
                    map.insert("maxLength".into(), json!(QUANTITY_CHARS));
                }
                if let Some(values) = map.get_mut("enum").and_then(Value::as_array_mut) {
                    values.retain(|value| !value.is_null());
                }
                if map.get("type").is_some_and(|kind| kind == "array") {
                    map.entry("x-kubernetes-list-type").or_insert_with(|| json!("atomic"));
                }
            }
            map.values_mut().for_each(tidy);
        }
        Value::Array(items) => items.iter_mut().for_each(tidy),
        _ => {}
    }
}

fn is_schema(map: &Map<String, Value>) -> bool {
    map.get("type").is_some_and(Value::is_string) || map.contains_key("x-kubernetes-int-or-string")
}

/// Conditions are a map by type, as server-side apply and every client expect.
fn conditions_by_type(schema: &mut Value) {
    if let Some(conditions) = schema
        .pointer_mut("/properties/status/properties/conditions")
        .and_then(Value::as_object_mut)
    {
        conditions.insert("x-kubernetes-list-type".into(), json!("map"));
        conditions.insert("x-kubernetes-list-map-keys".into(), json!(["type"]));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(value: &Value, path: &str, visit: &mut impl FnMut(&str, &Map<String, Value>)) {
        match value {
            Value::Object(map) => {
                visit(path, map);
                map.iter()
                    .for_each(|(key, value)| walk(value, &format!("{path}.{key}"), visit));
            }
            Value::Array(items) => items.iter().for_each(|value| walk(value, path, visit)),
            _ => {}
        }
    }

    #[test]
    fn every_crd_keeps_the_rules_of_the_design() {
        for crd in crds() {
            let name = crd["metadata"]["name"].as_str().expect("a CRD has a name").to_owned();
            assert!(to_yaml(&crd).len() < CRD_LIMIT_BYTES, "{name} is too large");
            let schema = &crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"];
            walk(schema, &name, &mut |path, map| {
                assert!(!map.contains_key("nullable"), "{path} is nullable");
                assert!(
                    !map.contains_key("oneOf") && !map.contains_key("anyOf"),
                    "{path} is a schema union: {map:?}"
                );
                assert!(
                    !map.get("format")
                        .and_then(Value::as_str)
                        .is_some_and(|f| f.starts_with("uint")),
                    "{path}"
                );
            });
            walk(&schema["properties"]["spec"], &name, &mut |path, map| {
                let Some(properties) = map.get("properties").and_then(Value::as_object) else {
                    return;
                };
                for (field, schema) in properties {
                    if schema.get("type").is_some() && !path.contains("pod.properties") {
                        assert!(schema.get("description").is_some(), "{path}.{field} has no description");
                    }
                    if schema["type"] == "array" && !path.contains("pod.properties") {
                        assert!(schema.get("maxItems").is_some(), "{path}.{field} has no maxItems");
                    }
                }
            });
        }
    }
}
