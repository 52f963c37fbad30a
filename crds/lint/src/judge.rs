//! The verdict on one document: which kind it is, then everything that the server checks of it, in the server's order.

use std::sync::OnceLock;

use kube::core::cel::{CompiledSchema, Validator, compile_schema};
use serde_json::{Value, json};

use crate::schema::{Violation, apply_defaults, prune_nulls, unknown_fields, violations};
use crate::yaml::{Document, Tree};
use crate::{Finding, Severity, metadata};

/// What the server says when it leaves the CEL rules out.
const RULES_UNCHECKED: &str = "some validation rules were not checked because the object was invalid; correct the existing errors to complete validation";

/// A kind with what it is judged by.
struct Kind {
    name: String,
    /// Schema of the whole object, `metadata` included.
    schema: Value,
    rules: CompiledSchema,
}

fn kinds() -> &'static [Kind] {
    static KINDS: OnceLock<Vec<Kind>> = OnceLock::new();
    KINDS.get_or_init(|| {
        strata_api::crds()
            .iter()
            .map(|crd| {
                let mut schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone();
                let rules = compile_schema(&schema);
                schema["properties"]["apiVersion"] = json!({"type": "string"});
                schema["properties"]["kind"] = json!({"type": "string"});
                schema["properties"]["metadata"] = metadata::schema();
                Kind {
                    name: crd["spec"]["names"]["kind"].as_str().unwrap_or_default().to_owned(),
                    schema,
                    rules,
                }
            })
            .collect()
    })
}

/// Everything to say about one document.
pub fn document(document: Document) -> Vec<Finding> {
    let finding = |line: usize, severity: Severity, object: &str, path: String, message: String| Finding {
        document: document.number,
        line,
        severity,
        object: object.to_owned(),
        path,
        message,
    };
    let tree = match document.content {
        Ok(tree) => tree,
        Err(fault) => return vec![finding(fault.line, Severity::Error, "", String::new(), fault.message)],
    };
    let text = |field: &str| tree.value[field].as_str().filter(|text| !text.is_empty());
    let whole = |severity, object: &str, message: String| {
        vec![finding(document.line, severity, object, String::new(), message)]
    };
    let (Some(api_version), Some(kind_name)) = (text("apiVersion"), text("kind")) else {
        let missing = if text("apiVersion").is_none() {
            "apiVersion"
        } else {
            "kind"
        };
        return whole(
            Severity::Error,
            "",
            format!("{missing} not set: an object needs apiVersion and kind"),
        );
    };
    let object = match tree.value["metadata"]["name"].as_str() {
        Some(name) => format!("{kind_name}/{name}"),
        None => kind_name.to_owned(),
    };
    let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
    if group != strata_api::GROUP {
        let message = format!("passed over: only the kinds of {} are judged", strata_api::GROUP);
        return whole(Severity::Note, &object, message);
    }
    let kind = kinds()
        .iter()
        .find(|kind| version == strata_api::VERSION && kind.name == kind_name);
    let Some(kind) = kind else {
        let message = format!("no matches for kind {kind_name:?} in version {api_version:?}");
        return whole(Severity::Error, &object, message);
    };
    let (found, rules_unchecked) = judge(kind, &tree);
    let note = rules_unchecked.then(|| {
        finding(
            document.line,
            Severity::Note,
            &object,
            String::new(),
            RULES_UNCHECKED.into(),
        )
    });
    found
        .into_iter()
        .map(|violation| {
            let line = tree.line(&violation.path);
            finding(line, Severity::Error, &object, violation.path, violation.message)
        })
        .chain(note)
        .collect()
}

/// The value at a path as the server shows it before a rule's message: scalars only.
fn shown(object: &Value, path: &str) -> String {
    let pointer = format!("/{}", path.replace('[', "/").replace(']', "").replace('.', "/"));
    match object.pointer(&pointer) {
        None | Some(Value::Object(_) | Value::Array(_) | Value::Null) => String::new(),
        Some(scalar) => format!("{scalar}: "),
    }
}

/// What is wrong with an object, and whether its CEL rules were left out for that.
fn judge(kind: &Kind, tree: &Tree) -> (Vec<Violation>, bool) {
    let mut unknown = Vec::new();
    unknown_fields(&kind.schema, &tree.value, "", &mut unknown);
    let mut value = tree.value.clone();
    prune_nulls(&mut value);
    apply_defaults(&kind.schema, &mut value);
    let mut found = Vec::new();
    metadata::name(&value["metadata"], &mut found);
    metadata::labels(&value["metadata"]["labels"], &mut found);
    metadata::annotations(&value["metadata"]["annotations"], &mut found);
    violations(&kind.schema, &value, "", &mut found);
    let blocked = found.iter().any(|violation| violation.blocks_rules);
    if !blocked && let Err(broken) = Validator::new().validate_compiled(&kind.rules, &value, None) {
        found.extend(broken.into_iter().map(|error| Violation {
            message: format!("Invalid value: {}{}", shown(&value, &error.field_path), error.message),
            path: error.field_path,
            blocks_rules: false,
        }));
    }
    found.extend(unknown.into_iter().map(|path| Violation {
        message: format!("unknown field {path:?}"),
        path: String::new(),
        blocks_rules: false,
    }));
    (found, blocked)
}
