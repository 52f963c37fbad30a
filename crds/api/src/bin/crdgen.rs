//! Writes what is made from the types: `crdgen ROOT` writes the CRDs (for kustomize and for the chart) and the
//! reference under the repository's root. CI writes them beside the committed ones and fails on a difference.

use std::fmt::Write as _;
use std::path::Path;
use std::{fs, io};

use schemars::{JsonSchema, SchemaGenerator};
use serde_json::{Map, Value, json};
use strata_api::{Common, QualityRule, Reason, RunStatus, Verdict};
use strata_contract::{FailureReason, Manifest, Report, StageConfig};

fn main() -> io::Result<()> {
    let Some(root) = std::env::args().nth(1) else {
        return Err(io::Error::other("usage: crdgen ROOT"));
    };
    let root = Path::new(&root);
    let write = |path: String, text: String| {
        let path = root.join(path);
        fs::create_dir_all(path.parent().unwrap_or(root))?;
        fs::write(path, text)
    };
    let crds = strata_api::crds();
    for crd in &crds {
        let plural = text(&crd["spec"]["names"]["plural"]);
        write(format!("config/crd/{plural}.yaml"), strata_api::to_yaml(crd))?;
        // An uninstall of the chart leaves the CRDs, and with them everything that users made.
        let mut crd = crd.clone();
        crd["metadata"]["annotations"] = json!({"helm.sh/resource-policy": "keep"});
        write(
            format!("charts/strata/files/crds/{plural}.yaml"),
            strata_api::to_yaml(&crd),
        )?;
    }
    write("docs/reference/api.md".into(), api(&crds))?;
    write("docs/reference/conditions.md".into(), conditions())?;
    write("docs/reference/contract.schema.json".into(), contract())
}

const GENERATED: &str = "<!-- Written by crdgen from crds/. Change the types, then run `make generate`. -->\n";

/// Fields of the four kinds.
fn api(crds: &[Value]) -> String {
    let mut out = format!(
        "{GENERATED}# API reference: {}/{}\n\nBounds are checked by the API server, and offline by `strata lint`. \
         Unknown fields are refused by kubectl and by lint.\n",
        strata_api::GROUP,
        strata_api::VERSION
    );
    let (common, run_status) = (fields_of::<Common>(), fields_of::<RunStatus>());
    let mut shared = Map::new();
    let mut shared_status = Map::new();
    for crd in crds {
        let kind = text(&crd["spec"]["names"]["kind"]);
        let version = &crd["spec"]["versions"][0];
        let schema = &version["schema"]["openAPIV3Schema"];
        let _ = write!(
            out,
            "\n## {kind}\n\n{} Short name `{}`; `kubectl get strata` lists all four kinds.\n\n",
            text(&schema["description"]),
            text(&crd["spec"]["names"]["shortNames"][0])
        );
        let (own, common) = divide(&schema["properties"]["spec"], &common);
        table(&mut out, "spec", &own);
        rules(&mut out, schema, "");
        let (own_status, common_status) = divide(&schema["properties"]["status"], &run_status);
        if own_status["properties"]
            .as_object()
            .is_some_and(|fields| !fields.is_empty())
        {
            out.push_str("\nBeside the status of every kind:\n\n");
            table(&mut out, "status", &own_status);
        }
        if version["subresources"].get("scale").is_some() {
            out.push_str("\n`kubectl scale`, HPA and KEDA act on `spec.replicas` through `/scale`.\n");
        }
        shared.entry("spec").or_insert(common);
        shared_status.entry("status").or_insert(common_status);
    }
    out.push_str("\n## Spec of every kind\n\n");
    table(&mut out, "spec", &shared["spec"]);
    out.push_str("\n## Status of every kind\n\n");
    table(&mut out, "status", &shared_status["status"]);
    out.push_str(
        "\n## Quality rules\n\nNames for `spec.curate.quality.overrides[].rule`, with the preset's threshold.\n\n",
    );
    out.push_str("| rule | what it bounds |\n|---|---|\n");
    let rules = SchemaGenerator::default()
        .into_root_schema_for::<QualityRule>()
        .to_value();
    for rule in rules["oneOf"].as_array().into_iter().flatten() {
        let _ = writeln!(
            out,
            "| `{}` | {} |",
            text(&rule["const"]),
            cell(text(&rule["description"]))
        );
    }
    out
}

/// Names of a type's fields.
fn fields_of<T: JsonSchema>() -> Vec<String> {
    let schema = SchemaGenerator::default().into_root_schema_for::<T>().to_value();
    let fields = schema["properties"].as_object();
    fields.into_iter().flatten().map(|(name, _)| name.clone()).collect()
}

/// An object schema as two: without the fields that `shared` names, and with these only.
fn divide(schema: &Value, shared: &[String]) -> (Value, Value) {
    let (mut own, mut common) = (schema.clone(), schema.clone());
    for (schema, is_shared) in [(&mut own, false), (&mut common, true)] {
        if let Some(fields) = schema["properties"].as_object_mut() {
            fields.retain(|name, _| shared.contains(name) == is_shared);
        }
    }
    (own, common)
}

fn table(out: &mut String, path: &str, schema: &Value) {
    out.push_str("| field | type | default | bounds | meaning |\n|---|---|---|---|---|\n");
    rows(out, path, schema);
}

/// A row for each field below `path`, a field before what it holds.
fn rows(out: &mut String, path: &str, schema: &Value) {
    let required: Vec<&str> = schema["required"].as_array().into_iter().flatten().map(text).collect();
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = format!("{path}.{name}");
        let (meaning, default) = default(text(&field["description"]));
        let default = if required.contains(&name.as_str()) {
            "**required**".to_owned()
        } else {
            cell(&default)
        };
        let _ = writeln!(
            out,
            "| `{path}` | {} | {default} | {} | {} |",
            kind_of(field),
            cell(&bounds(field)),
            cell(&meaning)
        );
        // What Kubernetes defines is explained by Kubernetes.
        if path.starts_with("spec.pod.") || path == "status.conditions" {
            continue;
        }
        rows(out, &path, field);
        rows(out, &format!("{path}[]"), &field["items"]);
    }
}

fn kind_of(schema: &Value) -> String {
    if schema["x-kubernetes-int-or-string"] == true {
        return "quantity".into();
    }
    match text(&schema["type"]) {
        "array" => format!("list of {}s", kind_of(&schema["items"]).replace("list of ", "")),
        "object" if schema.get("additionalProperties").is_some() => {
            format!("map to {}", kind_of(&schema["additionalProperties"]))
        }
        kind => kind.to_owned(),
    }
}

/// A description without its `(default …)`, and that default.
fn default(description: &str) -> (String, String) {
    let Some((before, rest)) = description.split_once("(default") else {
        return (description.to_owned(), String::new());
    };
    let Some((inside, after)) = rest.split_once(')') else {
        return (description.to_owned(), String::new());
    };
    let (default, more) = inside.split_once(';').unwrap_or((inside, ""));
    let more = if more.is_empty() {
        String::new()
    } else {
        format!(" ({})", more.trim())
    };
    (
        format!("{}{more}{after}", before.trim_end()),
        default.trim_start_matches(':').trim().to_owned(),
    )
}

fn bounds(schema: &Value) -> String {
    let mut parts = Vec::new();
    let number = |field: &str| schema[field].as_f64();
    match (number("minimum"), number("maximum")) {
        (Some(min), Some(max)) => parts.push(format!("{min} to {max}")),
        (Some(min), None) => parts.push(format!("at least {min}")),
        (None, Some(max)) => parts.push(format!("at most {max}")),
        (None, None) => {}
    }
    if let Some(values) = schema["enum"].as_array() {
        let values: Vec<_> = values
            .iter()
            .map(|value| format!("`{}`", value.as_str().map_or_else(|| value.to_string(), str::to_owned)))
            .collect();
        match values.len() > 8 {
            true => parts.push("see [Quality rules](#quality-rules)".into()),
            false => parts.push(values.join(", ")),
        }
    }
    for (field, words) in [
        ("minLength", "at least # characters"),
        ("maxLength", "at most # characters"),
        ("minItems", "at least # items"),
        ("maxItems", "at most # items"),
        ("maxProperties", "at most # entries"),
    ] {
        if let Some(bound) = schema[field].as_u64() {
            parts.push(words.replace('#', &bound.to_string()));
        }
    }
    if let Some(pattern) = schema["pattern"].as_str() {
        parts.push(format!("`{pattern}`"));
    }
    if schema["x-kubernetes-list-type"] == "map" {
        let keys: Vec<&str> = schema["x-kubernetes-list-map-keys"]
            .as_array()
            .into_iter()
            .flatten()
            .map(text)
            .collect();
        parts.push(format!("no two with the same {}", keys.join(", ")));
    }
    parts.join("; ")
}

/// The CEL rules at and below `schema`, by their place.
fn rules(out: &mut String, schema: &Value, path: &str) {
    let mut found = Vec::new();
    collect_rules(schema, path, &mut found);
    if found.is_empty() {
        return;
    }
    out.push_str("\nRules:\n\n");
    for (path, message) in found {
        let place = if path.is_empty() {
            "the object".to_owned()
        } else {
            format!("`{path}`")
        };
        let _ = writeln!(out, "- {place}: {message}");
    }
}

fn collect_rules(schema: &Value, path: &str, found: &mut Vec<(String, String)>) {
    for rule in schema["x-kubernetes-validations"].as_array().into_iter().flatten() {
        // A message that is computed: its first text, up to what was got.
        let computed = || {
            text(&rule["messageExpression"])
                .split('\'')
                .nth(1)?
                .split(", got")
                .next()
        };
        let message = rule["message"].as_str().or_else(computed).unwrap_or_default();
        found.push((path.to_owned(), message.to_owned()));
    }
    for (name, field) in schema["properties"].as_object().into_iter().flatten() {
        let path = if path.is_empty() {
            name.clone()
        } else {
            format!("{path}.{name}")
        };
        collect_rules(field, &path, found);
        collect_rules(&field["items"], &format!("{path}[]"), found);
    }
}

/// Conditions, reasons and what to do.
fn conditions() -> String {
    let mut out = format!(
        "{GENERATED}# Conditions and reasons\n\n\
         Conditions are of positive polarity. True: it holds. Unknown: it goes on by itself, or waits. False: it needs a \
         person.\n\n\
         | condition | kinds | meaning |\n|---|---|---|\n\
         | `Accepted` | all | The spec can be carried out here. |\n\
         | `Placed` | all, where `spec.hardware` is set | There are nodes of the shape that it asks for; fullness is not judged ([placement](../placement.md)). |\n\
         | `InputsReady` | all | Everything that the run reads was published, or is a plain URI. |\n\
         | `Succeeded` | all | The current run published its artifact. |\n\
         | `MetricsAvailable` | InferenceService with `autoscale` | The pods say what scaling aims at. |\n\
         | `ScalingEffective` | InferenceService with `autoscale` | The number of pods is what scaling wants. |\n\
         | `Available` | InferenceService | The wanted number of pods answers with the current artifact. |\n\
         | `Ready` | all | All of the above. |\n\n\
         ## Reasons\n\nThe same words stand in conditions, Events and metrics.\n\n\
         | reason | status | meaning, and what to do |\n|---|---|---|\n"
    );
    for reason in Reason::ALL {
        let verdict = match reason.verdict() {
            Verdict::True => "True",
            Verdict::Unknown => "Unknown",
            Verdict::False => "False",
        };
        let _ = writeln!(out, "| `{}` | {verdict} | {} |", reason.name(), cell(reason.meaning()));
    }
    out.push_str(
        "\n## How a stage ends\n\nA stage that fails reports one of these words; its exit status says whether another \
         attempt can help: 64 is never retried, 70 counts against `spec.retries`, 75 does not.\n\n\
         | word | exit status | what to do |\n|---|---|---|\n",
    );
    for reason in FailureReason::ALL {
        let _ = writeln!(
            out,
            "| `{reason:?}` | {} | {} |",
            reason.exit_code(),
            cell(reason.remedy())
        );
    }
    out
}

/// JSON Schemas of what the operator hands a pod and what the pod hands back.
fn contract() -> String {
    let mut generator = SchemaGenerator::default();
    let roots = [
        generator.subschema_for::<StageConfig>(),
        generator.subschema_for::<Report>(),
        generator.subschema_for::<Manifest>(),
    ];
    let schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Strata's stage contract",
        "description": "StageConfig: the file that STRATA_CONFIG names. Report: the termination message. Manifest: manifest.json of a published artifact.",
        "anyOf": roots,
        "$defs": generator.take_definitions(true),
    });
    serde_json::to_string_pretty(&schema).expect("a JSON value is written as JSON") + "\n"
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Text for a cell of a Markdown table.
fn cell(text: &str) -> String {
    text.replace('\n', " ").replace('|', "\\|")
}
