//! The stage from token files to a published model, on a corpus so small that it takes a second.

#![allow(
    clippy::unwrap_used,
    reason = "in a test an unwrap is an assertion, also in its helpers"
)]

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde_json::json;
use strata_artifact::RunFolder;
use strata_contract::{FailureReason, PretrainConfig, Report, Run, Uri};
use strata_encode::{Packer, TextTokenizer, TokenWriter};
use strata_evaluate::{EVALUATION_FILE, EvaluationSet};
use strata_model::LoadedModel;
use strata_stage::{StageContext, StageError};
use strata_train::{Body, Executor, Scorer, load};

fn write_dataset(folder: &Path) {
    fs::create_dir_all(folder.join("tokens")).unwrap();
    let document = |i: usize| {
        format!(
            "The {} {} sees the {} {}.\n",
            ["old", "new"][i % 2],
            ["king", "fool", "queen"][i % 3],
            ["red", "blue"][i / 2 % 2],
            ["rose", "crown"][i / 3 % 2]
        )
        .repeat(3)
    };
    let tokenizer = TextTokenizer::train((0..60).map(document), 280).unwrap();
    fs::write(folder.join("tokenizer.json"), tokenizer.to_json().unwrap()).unwrap();
    for (name, range) in [("train", 0..50), ("test", 50..60)] {
        let mut writer = TokenWriter::new(Vec::new(), 280);
        let mut packer = Packer::new(strata_contract::Packing::BestFit, 32);
        let mut tokens = Vec::new();
        for i in range {
            tokenizer.encode_document(&document(i), &mut tokens).unwrap();
            packer.push(&tokens, &mut |sequence| writer.push(sequence)).unwrap();
        }
        packer.finish(&mut |sequence| writer.push(sequence)).unwrap();
        let mut idx = Vec::new();
        fs::write(
            folder.join(format!("tokens/{name}.bin")),
            writer.finish(&mut idx).unwrap(),
        )
        .unwrap();
        fs::write(folder.join(format!("tokens/{name}.idx")), idx).unwrap();
    }
}

fn config(dataset: &Path, most_bits: f64) -> PretrainConfig {
    serde_json::from_value(json!({
        "datasets": [{ "name": "text", "uri": Uri::File(dataset.to_owned()) }],
        "model": {
            "hiddenSize": 32, "intermediateSize": 64, "layers": 2, "heads": 4, "kvHeads": 2, "contextTokens": 32,
            "tieEmbeddings": true
        },
        "training": {
            "tokens": 8_000, "batchTokens": 400, "learningRate": 1e-2, "warmupPercent": 10, "schedule": "Cosine",
            "weightDecay": 0.1, "seed": 17
        },
        "checkpoint": { "everySeconds": 3600, "keep": 2 },
        "gates": [{ "metric": "bitsPerByte", "max": most_bits }]
    }))
    .unwrap()
}

fn context(folder: &Path, run: &str, attempt: u32) -> StageContext {
    let run: Run = serde_json::from_value(json!({
        "id": run, "attempt": attempt, "resource": { "kind": "PretrainJob", "name": "tiny" },
        "output": Uri::File(folder.join(run))
    }))
    .unwrap();
    StageContext {
        run,
        volumes: folder.to_owned(),
        attempt_id: format!("attempt-{attempt}"),
        progress: Default::default(),
        interrupt: Default::default(),
    }
}

/// Each file of what `report` says was published, by path.
fn files(folder: &Path, run: &str, report: &Report) -> BTreeMap<String, String> {
    let run = RunFolder::new(&Uri::File(folder.join(run)), Path::new("/"));
    let manifest = run.published().unwrap().expect("a manifest");
    assert_eq!(manifest.digest, report.artifact.as_ref().expect("an artifact").digest);
    manifest
        .content
        .files
        .into_iter()
        .map(|file| (file.path, file.sha256))
        .collect()
}

#[test]
fn a_run_that_is_stopped_after_every_step_ends_with_the_bits_of_one_that_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = folder.path().join("dataset");
    write_dataset(&dataset);
    let config = config(&dataset, 8.0);
    let whole = strata_pretrain::run(&config, &context(folder.path(), "whole", 1)).unwrap();

    let mut last_step = None;
    let mut attempt = 0;
    let pieced = loop {
        attempt += 1;
        let context = context(folder.path(), "pieced", attempt);
        // Stopped before it starts, a stage still makes one step: it looks after each.
        if attempt <= 20 {
            context.interrupt.set();
        }
        match strata_pretrain::run(&config, &context) {
            Ok(report) => break report,
            Err(StageError {
                reason: FailureReason::Interrupted,
                ..
            }) => {}
            Err(error) => panic!("{error}"),
        }
        assert!(attempt < 30);
        last_step = Some(attempt);
    };
    assert!(
        last_step.unwrap() >= 19 && pieced.resumed_from_step == Some(20),
        "{:?}",
        pieced.resumed_from_step
    );
    let same = |run: &str, report: &Report| files(folder.path(), run, report)["model.safetensors"].clone();
    assert_eq!(same("whole", &whole), same("pieced", &pieced));
    assert_eq!(
        whole.metrics["bitsPerByte"].to_bits(),
        pieced.metrics["bitsPerByte"].to_bits()
    );
    assert!(
        !folder.path().join("pieced/attempts/attempt-3/checkpoints").exists(),
        "published: no checkpoint is needed"
    );
}

#[test]
fn what_is_published_loads_and_scores_as_it_was_measured() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = folder.path().join("dataset");
    write_dataset(&dataset);
    let context = context(folder.path(), "run", 1);
    let report = strata_pretrain::run(&config(&dataset, 2.0), &context).unwrap();
    assert_eq!(context.progress.read().activity, "publishing");
    assert!(report.gates[0].passed && report.metrics["bitsPerByteTrigram"] > 0.0);
    let names = files(folder.path(), "run", &report);
    for name in [
        "config.json",
        "tokenizer.json",
        "README.md",
        "evaluation/results.json",
        EVALUATION_FILE,
    ] {
        assert!(names.contains_key(name), "{name} is missing");
    }
    let content = folder.path().join("run/attempts/attempt-1/content");
    let model = LoadedModel::open(&content).unwrap();
    let body = Body::new(&model.config, Executor::Kernels);
    let weights = load(body.layout(), model.weights.as_ref()).unwrap();
    let set = EvaluationSet::read(&content.join(EVALUATION_FILE), model.config.vocab_size).unwrap();
    let metrics = set
        .measure(&mut Scorer::new(&body, &weights).unwrap(), || true)
        .unwrap();
    // A manifest rounds its figures.
    for name in ["bitsPerByte", "bitsPerByteGainOverTrigram"] {
        assert!((metrics[name] - report.metrics[name]).abs() < 1e-9, "{name}");
    }
}

#[test]
fn a_gate_that_says_no_publishes_nothing_and_bad_input_has_its_reason() {
    let folder = tempfile::tempdir().unwrap();
    let dataset = folder.path().join("dataset");
    write_dataset(&dataset);
    let error = strata_pretrain::run(&config(&dataset, 0.001), &context(folder.path(), "gated", 1)).unwrap_err();
    assert_eq!(error.reason, FailureReason::GateFailed);
    assert!(!folder.path().join("gated/manifest.json").exists());

    let mut diverging = config(&dataset, 8.0);
    diverging.training.learning_rate = 1e30;
    let error = strata_pretrain::run(&diverging, &context(folder.path(), "diverging", 1)).unwrap_err();
    assert_eq!(error.reason, FailureReason::Diverged, "{error}");

    let mut odd = config(&dataset, 8.0);
    odd.model.heads = 5;
    let error = strata_pretrain::run(&odd, &context(folder.path(), "odd", 1)).unwrap_err();
    assert_eq!(error.reason, FailureReason::ConfigInvalid, "{error}");

    fs::write(dataset.join("tokens/train.idx"), b"MMIDIDX").unwrap();
    let error = strata_pretrain::run(&config(&dataset, 8.0), &context(folder.path(), "damaged", 1)).unwrap_err();
    assert_eq!(error.reason, FailureReason::InputCorrupt, "{error}");
}
