//! What dashboards and schedulers read is there, under the names and labels that they ask for.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::{Running, chat};

/// Who reads what: a metric, its kind, and the labels that it is filtered or grouped by.
const READ: &[(&str, &str, &[&str])] = &[
    // vLLM's Grafana dashboards, of today and of before.
    ("vllm:e2e_request_latency_seconds", "histogram", &["model_name"]),
    ("vllm:generation_tokens_total", "counter", &["model_name"]),
    ("vllm:inter_token_latency_seconds", "histogram", &["model_name"]),
    ("vllm:iteration_tokens_total", "histogram", &["model_name"]),
    ("vllm:kv_cache_usage_perc", "gauge", &["model_name", "engine"]),
    ("vllm:num_preemptions_total", "counter", &["model_name"]),
    ("vllm:num_requests_running", "gauge", &["model_name", "engine"]),
    ("vllm:num_requests_waiting", "gauge", &["model_name", "engine"]),
    ("vllm:prefix_cache_hits_total", "counter", &["model_name"]),
    ("vllm:external_prefix_cache_hits_total", "counter", &["model_name"]),
    ("vllm:external_prefix_cache_queries_total", "counter", &["model_name"]),
    ("strata_kv_spill_used_bytes", "gauge", &["model_name", "engine"]),
    ("strata_kv_spill_damaged_total", "counter", &["model_name", "engine"]),
    ("vllm:prefix_cache_queries_total", "counter", &["model_name"]),
    ("vllm:prompt_tokens_cached_total", "counter", &["model_name"]),
    ("vllm:prompt_tokens_total", "counter", &["model_name"]),
    ("vllm:request_decode_time_seconds", "histogram", &["model_name"]),
    ("vllm:request_generation_tokens", "histogram", &["model_name"]),
    ("vllm:request_inference_time_seconds", "histogram", &["model_name"]),
    ("vllm:request_max_num_generation_tokens", "histogram", &["model_name"]),
    ("vllm:request_params_max_tokens", "histogram", &["model_name"]),
    ("vllm:request_params_n", "histogram", &["model_name"]),
    ("vllm:request_prefill_kv_computed_tokens", "histogram", &["model_name"]),
    ("vllm:request_prefill_time_seconds", "histogram", &["model_name"]),
    ("vllm:request_prompt_tokens", "histogram", &["model_name"]),
    ("vllm:request_queue_time_seconds", "histogram", &["model_name"]),
    (
        "vllm:request_success_total",
        "counter",
        &["model_name", "finished_reason"],
    ),
    (
        "vllm:request_time_per_output_token_seconds",
        "histogram",
        &["model_name"],
    ),
    ("vllm:time_per_output_token_seconds", "histogram", &["model_name"]),
    ("vllm:time_to_first_token_seconds", "histogram", &["model_name"]),
    ("http_requests_total", "counter", &["handler", "method", "status"]),
    // The router of production-stack.
    ("vllm:gpu_cache_usage_perc", "gauge", &["model_name"]),
    ("vllm:gpu_prefix_cache_hits_total", "counter", &["model_name"]),
    ("vllm:gpu_prefix_cache_queries_total", "counter", &["model_name"]),
    // The endpoint picker of the gateway-api-inference-extension, which llm-d's scheduler stands on.
    ("vllm:cache_config_info", "gauge", &["block_size", "num_gpu_blocks"]),
];

type Labels = BTreeMap<String, String>;

/// A metric as the text format has it.
struct Family {
    kind: String,
    samples: Vec<(String, Labels, f64)>,
}

/// Reads the text format and accepts nothing that it does not define.
fn parse(text: &str) -> BTreeMap<String, Family> {
    assert!(text.ends_with('\n'), "the last line ends");
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut current = String::new();
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, help) = help.split_once(' ').unwrap();
            assert!(!help.is_empty() && !families.contains_key(name), "{line}");
            current = name.to_owned();
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert!(
                name == current && ["counter", "gauge", "histogram"].contains(&kind),
                "{line}"
            );
            let family = Family {
                kind: kind.to_owned(),
                samples: Vec::new(),
            };
            assert!(families.insert(current.clone(), family).is_none(), "{line}");
        } else {
            let family = families
                .get_mut(&current)
                .unwrap_or_else(|| panic!("no TYPE before {line}"));
            let (name, labels, value) = sample(line);
            let suffixes: &[&str] = match family.kind.as_str() {
                "histogram" => &["_bucket", "_sum", "_count"],
                _ => &[""],
            };
            let suffix = name.strip_prefix(current.as_str()).unwrap_or("no part of the name");
            assert!(suffixes.contains(&suffix), "{line} stands under {current}");
            assert!(family.kind != "counter" || value >= 0.0, "{line}");
            let known = family
                .samples
                .iter()
                .any(|(other, other_labels, _)| *other == name && *other_labels == labels);
            assert!(!known, "twice: {line}");
            family.samples.push((name, labels, value));
        }
    }
    families
}

/// `name{label="value",…} number`
fn sample(line: &str) -> (String, Labels, f64) {
    let word = |text: &str| {
        let first = text
            .chars()
            .next()
            .is_some_and(|c| c.is_ascii_alphabetic() || "_:".contains(c));
        first && text.chars().all(|c| c.is_ascii_alphanumeric() || "_:".contains(c))
    };
    let (name, rest) = line.split_once('{').unwrap_or_else(|| panic!("no labels: {line}"));
    assert!(word(name), "{line}");
    let (labels, value) = rest.rsplit_once("} ").unwrap_or_else(|| panic!("no value: {line}"));
    let mut map = Labels::new();
    for label in labels.split("\",") {
        let (key, value) = label.split_once("=\"").unwrap_or_else(|| panic!("{line}"));
        assert!(word(key) && !key.contains(':'), "{line}");
        assert!(
            map.insert(key.to_owned(), value.trim_end_matches('"').to_owned())
                .is_none(),
            "{line}"
        );
    }
    (
        name.to_owned(),
        map,
        value.parse().unwrap_or_else(|_| panic!("no number: {line}")),
    )
}

/// The buckets of a histogram grow, and the last one counts everything.
fn check(name: &str, family: &Family) {
    let value = |suffix: &str| {
        let named = |(sample, _, _): &&(String, Labels, f64)| *sample == format!("{name}{suffix}");
        family
            .samples
            .iter()
            .find(named)
            .unwrap_or_else(|| panic!("no {name}{suffix}"))
            .2
    };
    let buckets: Vec<(f64, f64)> = family
        .samples
        .iter()
        .filter_map(|(_, labels, count)| Some((labels.get("le")?.parse().unwrap(), *count)))
        .collect();
    assert!(
        buckets
            .windows(2)
            .all(|pair| pair[0].0 < pair[1].0 && pair[0].1 <= pair[1].1),
        "{name}: {buckets:?}"
    );
    assert_eq!(buckets.last(), Some(&(f64::INFINITY, value("_count"))), "{name}");
    assert!(value("_sum") >= 0.0, "{name}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_one_request_every_series_that_dashboards_and_schedulers_read_is_there() {
    let server = Running::start("--enable-prefix-caching --max-model-len 300").await;
    let said = server
        .post(
            "/v1/chat/completions",
            chat("x", json!({ "max_tokens": 5 })).to_string(),
        )
        .await;
    assert_eq!(said.1["usage"]["completion_tokens"], 5, "{}", said.1);
    server
        .until("it has ended", async || {
            server.metric("vllm:request_decode_time_seconds_count").await == 1.0
        })
        .await;
    let families = parse(&server.get("/metrics").await.1);
    for (name, kind, labels) in READ {
        let family = families.get(*name).unwrap_or_else(|| panic!("no {name}"));
        assert_eq!(family.kind, *kind, "{name}");
        let (sample, has, _) = family
            .samples
            .first()
            .unwrap_or_else(|| panic!("{name} has no samples"));
        assert!(labels.iter().all(|label| has.contains_key(*label)), "{sample}: {has:?}");
        if *kind == "histogram" {
            check(name, family);
        }
    }
    let value = |name: &str, label: &str, is: &str| {
        let family = name.trim_end_matches("_sum").trim_end_matches("_count");
        let found = |(sample, labels, _): &&(String, Labels, f64)| {
            *sample == name && labels.get(label).is_some_and(|value| value == is)
        };
        families[family].samples.iter().find(found).map(|(_, _, value)| *value)
    };
    let of_model = |name: &str| value(name, "model_name", "tiny");
    assert_eq!(of_model("vllm:request_generation_tokens_sum"), Some(5.0));
    assert_eq!(of_model("vllm:inter_token_latency_seconds_count"), Some(4.0));
    assert_eq!(of_model("vllm:request_params_max_tokens_sum"), Some(5.0));
    assert_eq!(of_model("vllm:request_params_n_sum"), Some(1.0));
    assert_eq!(
        value("vllm:request_success_total", "finished_reason", "length"),
        Some(1.0)
    );
    assert_eq!(
        value("http_requests_total", "handler", "/v1/chat/completions"),
        Some(1.0)
    );
    assert_eq!(value("vllm:cache_config_info", "block_size", "16"), Some(1.0));
    let phases: f64 = ["queue", "prefill", "decode"]
        .map(|phase| of_model(&format!("vllm:request_{phase}_time_seconds_sum")).unwrap())
        .iter()
        .sum();
    let whole = of_model("vllm:e2e_request_latency_seconds_sum").unwrap();
    assert!(phases > 0.0 && phases <= whole, "{phases} s of {whole} s");
    // As vLLM's: up to the longest request that is possible.
    let bounds: BTreeSet<String> = families["vllm:request_prompt_tokens"]
        .samples
        .iter()
        .filter_map(|(_, labels, _)| labels.get("le").cloned())
        .collect();
    assert_eq!(bounds.len(), 9, "1, 2, 5 … 200 and all: {bounds:?}");

    // Whoever goes away before the end is counted, too.
    let running = server
        .stream(
            "/v1/chat/completions",
            chat("y", json!({ "stream": true, "max_tokens": 250 })),
        )
        .await;
    drop(running);
    server
        .until("both have ended", async || {
            server.metric("vllm:e2e_request_latency_seconds_count").await == 2.0
        })
        .await;
    server.stop().await;
}
