//! From ServiceMonitors and PodMonitors to `scrape_configs`, as the Prometheus operator does it, for the few fields that the
//! chart writes. So a test scrapes what the chart selects, and nothing else.

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

/// The `scrape_configs` of a monitor; `kubeconfig` leads to the cluster.
///
/// # Errors
/// It has a field that is not known here.
pub fn scrape_configs(monitor: &Value, kubeconfig: &str) -> Result<Vec<Value>> {
    let (role, endpoints, port) = match monitor["kind"].as_str() {
        Some("ServiceMonitor") => ("endpointslice", "endpoints", "endpointslice_port_name"),
        Some("PodMonitor") => ("pod", "podMetricsEndpoints", "pod_container_port_name"),
        other => bail!("{other:?} is no monitor"),
    };
    let object = if role == "pod" { "pod" } else { "service" };
    let spec = &monitor["spec"];
    let known = ["selector", "namespaceSelector", "podTargetLabels", endpoints];
    let unknown = |object: &Value, known: &[&str]| {
        let keys = object.as_object().into_iter().flat_map(|object| object.keys());
        keys.filter(|key| !known.contains(&key.as_str()))
            .cloned()
            .collect::<Vec<_>>()
    };
    if let Some(field) = unknown(spec, &known).first() {
        bail!("spec.{field} of a monitor is not translated here: add it");
    }
    let mut namespaces = json!({});
    if spec["namespaceSelector"]["any"] != true {
        namespaces = json!({"names": spec["namespaceSelector"]["matchNames"]});
    }
    let mut all = Vec::new();
    for (index, endpoint) in spec[endpoints].as_array().context("endpoints")?.iter().enumerate() {
        if let Some(field) = unknown(endpoint, &["port", "interval", "scheme", "tlsConfig", "honorLabels"]).first() {
            bail!("{field} of an endpoint is not translated here: add it");
        }
        let mut relabel = selector(&spec["selector"], object)?;
        relabel.push(json!({"action": "keep", "source_labels": [format!("__meta_kubernetes_{port}")], "regex": endpoint["port"]}));
        if role == "pod" {
            let phase = "__meta_kubernetes_pod_phase";
            relabel.push(json!({"action": "drop", "source_labels": [phase], "regex": "(Failed|Succeeded)"}));
        }
        for (from, to) in [
            ("namespace", "namespace"),
            ("pod_name", "pod"),
            ("service_name", "service"),
        ] {
            relabel.push(json!({"source_labels": [format!("__meta_kubernetes_{from}")], "target_label": to}));
        }
        for label in spec["podTargetLabels"].as_array().into_iter().flatten() {
            let label = sanitized(label.as_str().unwrap_or_default());
            let from = format!("__meta_kubernetes_pod_label_{label}");
            relabel.push(json!({"source_labels": [from], "target_label": label, "regex": "(.+)"}));
        }
        relabel.push(json!({"target_label": "endpoint", "replacement": endpoint["port"]}));
        let name = monitor["metadata"]["name"].as_str().unwrap_or_default();
        let mut scrape = json!({
            "job_name": format!("{}/{name}/{index}", monitor["kind"].as_str().unwrap_or_default()),
            "scheme": endpoint["scheme"].as_str().unwrap_or("http"),
            "honor_labels": endpoint["honorLabels"] == true,
            "kubernetes_sd_configs": [{"role": role, "kubeconfig_file": kubeconfig, "namespaces": namespaces}],
            "relabel_configs": relabel,
        });
        if let Some(tls) = endpoint["tlsConfig"].as_object() {
            if let Some(field) = tls.keys().find(|key| *key != "insecureSkipVerify") {
                bail!("tlsConfig.{field} is not translated here: add it");
            }
            scrape["tls_config"] = json!({"insecure_skip_verify": tls["insecureSkipVerify"]});
        }
        all.push(scrape);
    }
    Ok(all)
}

/// A label selector on services or pods.
fn selector(selector: &Value, object: &str) -> Result<Vec<Value>> {
    let mut rules = Vec::new();
    for (key, value) in selector["matchLabels"].as_object().into_iter().flatten() {
        let label = format!("__meta_kubernetes_{object}_label_{}", sanitized(key));
        rules.push(json!({"action": "keep", "source_labels": [label], "regex": value}));
    }
    for expression in selector["matchExpressions"].as_array().into_iter().flatten() {
        let key = sanitized(expression["key"].as_str().unwrap_or_default());
        if expression["operator"] != "Exists" {
            bail!("{} is not translated here: add it", expression["operator"]);
        }
        let label = format!("__meta_kubernetes_{object}_labelpresent_{key}");
        rules.push(json!({"action": "keep", "source_labels": [label], "regex": "true"}));
    }
    Ok(rules)
}

fn sanitized(label: &str) -> String {
    label.replace(|c: char| !c.is_ascii_alphanumeric(), "_")
}
