//! Aligns a model to transcripts, with a text file for the alignment tax, without a cluster: `cargo run -p strata-align
//! --example from_transcripts -- MODEL TRANSCRIPTS TEXT OUT [KEY=VALUE]…`, where a key is a field of the training, the
//! method, the adapter or the evaluation (`learningRate=1e-4`, `beta=0.1`, `rank=16`, `capabilityTokens=4096`).
//!
//! Both data sets are curated into OUT once and used again. It shows what hyper-parameters reach, in minutes.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use strata_contract::{AlignConfig, CurateConfig, Run, Uri};
use strata_stage::StageContext;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> Result<()> {
    tracing_subscriber::fmt().with_target(false).with_ansi(false).init();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, transcripts, text, out, overrides @ ..] = arguments.as_slice() else {
        return Err("usage: from_transcripts MODEL TRANSCRIPTS TEXT OUT [KEY=VALUE]…".into());
    };
    fs::create_dir_all(out)?;
    let out = fs::canonicalize(out)?;
    let preferences = curate(
        &out,
        "preferences",
        "Preference",
        transcripts,
        &json!("preferenceTranscripts"),
    )?;
    let plays = curate(
        &out,
        "plays",
        "Pretraining",
        text,
        &json!({ "text": { "splitBytes": 4096 } }),
    )?;
    let mut config = json!({
        "base": { "name": "base", "uri": Uri::File(fs::canonicalize(model)?) },
        "datasets": [preferences],
        "method": { "dpo": { "beta": 0.1 } },
        "adapter": { "rank": 16, "alpha": 32.0 },
        "training": {
            "pairs": 192, "maxPairTokens": 192, "batchPairs": 8, "learningRate": 1e-4, "warmupPercent": 10,
            "schedule": "Cosine", "seed": 17
        },
        "evaluation": { "heldOutPairs": 128, "capability": plays, "capabilityTokens": 4096 },
        "checkpoint": { "everySeconds": 60, "keep": 1 }
    });
    for argument in overrides {
        let (key, value) = argument.split_once('=').ok_or("an override is KEY=VALUE")?;
        let value: Value = serde_json::from_str(value).unwrap_or_else(|_| Value::from(value));
        let places = ["/training", "/evaluation", "/adapter", "/method/dpo"];
        let place = places
            .into_iter()
            .find(|place| config.pointer(place).is_some_and(|at| at.get(key).is_some()));
        let place = place.ok_or_else(|| format!("there is no field {key}"))?;
        config.pointer_mut(place).ok_or("the place was just found")?[key] = value;
    }
    let config: AlignConfig = serde_json::from_value(config)?;
    let context = context(
        &out,
        &format!("run-{}", overrides.join("-").replace('=', "-")),
        "AlignmentJob",
    )?;
    let report = strata_align::run(&config, &context)?;
    tracing::info!(metrics = ?report.metrics, "{}", report.message);
    Ok(())
}

fn context(out: &Path, run: &str, kind: &str) -> Result<StageContext> {
    let run: Run = serde_json::from_value(json!({
        "id": run, "attempt": 1, "resource": { "kind": kind, "name": run }, "output": Uri::File(out.join(run))
    }))?;
    Ok(StageContext {
        run,
        volumes: out.to_owned(),
        attempt_id: "local".into(),
        progress: Default::default(),
        interrupt: Default::default(),
    })
}

/// Curates `source` into `out/NAME`, unless it is there; returns it as an input.
fn curate(out: &Path, name: &str, task: &str, source: &str, format: &Value) -> Result<Value> {
    let run = context(out, name, "Dataset")?;
    let input = json!({ "name": name, "uri": run.run.output });
    if PathBuf::from(out).join(name).join("manifest.json").exists() {
        return Ok(input);
    }
    let config: CurateConfig = serde_json::from_value(json!({
        "task": task,
        "sources": [{ "name": name, "uri": Uri::File(fs::canonicalize(source)?), "format": format }],
        "deduplicateExact": true, "pii": "Redact", "heldOutPercent": 10, "seed": 17, "card": {}
    }))?;
    strata_curate::run(&config, &run)?;
    Ok(input)
}
