//! The stage from transcripts to a published model, on a model so small that it takes seconds.

#![allow(clippy::unwrap_used, reason = "in a test an unwrap is an assertion")]

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use strata_contract::{AlignConfig, CurateConfig, FailureReason, Manifest, Report, Run, Uri};
use strata_evaluate::{EVALUATION_FILE, EvaluationSet};
use strata_model::hf::{self, Folder};
use strata_model::{Dtype, GenerationConfig, LoadedModel, ModelConfig, synthetic};
use strata_stage::{StageContext, StageError};
use strata_train::{Body, Executor, Lora, Scorer, load};

/// A word in every transcript; it must be nowhere but in the data set.
const SECRET: &str = "zanzibar";

struct Bed {
    folder: tempfile::TempDir,
}

impl Bed {
    /// A base model, preferences for answers that agree, and text.
    fn new() -> Self {
        let bed = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        fs::create_dir_all(bed.path("base")).unwrap();
        bed.write_base(&synthetic::tiny_config(), Some(synthetic::CHAT_TEMPLATE));
        let mut transcripts = Vec::new();
        for i in 0..120 {
            let prompt = format!("\n\nHuman: is {i} in {SECRET}?\n\nAssistant:");
            let pair = json!({"chosen": format!("{prompt} Yes it is."), "rejected": format!("{prompt} No, never.")});
            writeln!(transcripts, "{pair}").unwrap();
        }
        let long = format!("\n\nHuman: {}\n\nAssistant:", SECRET.repeat(40));
        writeln!(
            transcripts,
            "{}",
            json!({"chosen": format!("{long} Yes."), "rejected": format!("{long} No.")})
        )
        .unwrap();
        fs::write(bed.path("transcripts.jsonl"), transcripts).unwrap();
        let text: String = (0..600)
            .map(|i| format!("Line {i} of {} words.\n\n", i * 7 % 13))
            .collect();
        fs::write(bed.path("text.txt"), text).unwrap();
        bed.curate(
            "preferences",
            "Preference",
            "transcripts.jsonl",
            &json!("preferenceTranscripts"),
        );
        bed.curate(
            "plays",
            "Pretraining",
            "text.txt",
            &json!({ "text": { "splitBytes": 512 } }),
        );
        bed
    }

    fn write_base(&self, config: &ModelConfig, chat_template: Option<&str>) {
        let folder = Folder {
            config,
            weights: &synthetic::weights(config, 3),
            dtype: Dtype::F32,
            tokenizer_json: &synthetic::byte_tokenizer(),
            chat_template,
            generation: &GenerationConfig {
                eos: config.eos.clone(),
                ..GenerationConfig::default()
            },
        };
        if chat_template.is_none() {
            fs::remove_file(self.path("base/chat_template.jinja")).unwrap();
        }
        hf::write(&self.path("base"), &folder).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn curate(&self, name: &str, task: &str, source: &str, format: &Value) {
        let config: CurateConfig = serde_json::from_value(json!({
            "task": task, "sources": [{ "name": name, "uri": Uri::File(self.path(source)), "format": format }],
            "deduplicateExact": false, "pii": "Keep", "heldOutPercent": 30, "seed": 17, "card": {}
        }))
        .unwrap();
        strata_curate::run(&config, &self.context(name, 1)).unwrap();
    }

    fn context(&self, run: &str, attempt: u32) -> StageContext {
        let output = Uri::File(self.path(run));
        let run: Run = serde_json::from_value(json!({
            "id": run, "attempt": attempt, "resource": { "kind": "AlignmentJob", "name": run }, "output": output
        }))
        .unwrap();
        StageContext {
            run,
            volumes: self.path(""),
            attempt_id: format!("attempt-{attempt}"),
            progress: Default::default(),
            interrupt: Default::default(),
        }
    }

    fn config(&self) -> AlignConfig {
        let input = |name: &str| json!({ "name": name, "uri": Uri::File(self.path(name)) });
        serde_json::from_value(json!({
            "base": input("base"), "datasets": [input("preferences")], "method": { "dpo": { "beta": 0.1 } },
            "adapter": { "rank": 4, "alpha": 8.0 },
            "training": {
                "pairs": 48, "maxPairTokens": 120, "batchPairs": 8, "learningRate": 1e-2, "warmupPercent": 10,
                "schedule": "Cosine", "seed": 17
            },
            "evaluation": { "heldOutPairs": 20, "capability": input("plays"), "capabilityTokens": 2000 },
            "checkpoint": { "everySeconds": 3600, "keep": 1 },
            "gates": [{ "metric": "rewardMarginLow", "min": 0.0 }]
        }))
        .unwrap()
    }

    fn content(&self, report: &Report, run: &str) -> PathBuf {
        let manifest: Manifest =
            serde_json::from_slice(&fs::read(self.path(run).join("manifest.json")).unwrap()).unwrap();
        assert_eq!(manifest.digest, report.artifact.as_ref().unwrap().digest);
        self.path(run).join(manifest.publication.content_path)
    }
}

fn files(folder: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in fs::read_dir(folder).unwrap().flatten() {
        match entry.path().is_dir() {
            true => files(&entry.path(), found),
            false => drop(found.insert(entry.path(), fs::read(entry.path()).unwrap())),
        }
    }
}

fn contains(bytes: &[u8], word: &str) -> bool {
    bytes.windows(word.len()).any(|window| window == word.as_bytes())
}

#[test]
fn what_is_published_is_the_base_plus_the_adapter_and_measures_as_reported() {
    let bed = Bed::new();
    let logs = Arc::new(Mutex::new(Vec::new()));
    let writer = logs.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing_subscriber::filter::LevelFilter::TRACE)
        .with_writer(move || Shared(writer.clone()))
        .finish();
    // For the whole process: a subscriber of one thread misses what another thread's test came by first.
    tracing::subscriber::set_global_default(subscriber).unwrap();
    let report = strata_align::run(&bed.config(), &bed.context("run", 1)).unwrap();
    assert!(
        report.metrics["rewardMarginLow"] > 0.0 && report.metrics["rewardAccuracy"] > 0.9,
        "{:?}",
        report.metrics
    );
    assert_eq!(report.metrics["pairsTooLong"], 1.0);
    assert!(report.metrics.contains_key("alignmentTax") && report.metrics.contains_key("alignmentTaxStandardError"));

    let content = bed.content(&report, "run");
    let mut published = BTreeMap::new();
    files(&content, &mut published);
    for (path, bytes) in &published {
        assert!(!contains(bytes, SECRET), "{} quotes the preferences", path.display());
    }
    let logged = logs.lock().unwrap().clone();
    assert!(contains(&logged, "reward_margin") && !contains(&logged, SECRET));
    assert!(!serde_json::to_string(&report).unwrap().contains(SECRET));

    let (base, merged) = (
        LoadedModel::open(&bed.path("base")).unwrap(),
        LoadedModel::open(&content).unwrap(),
    );
    assert!(merged.chat_template.is_some());
    let body = Body::new(&base.config, Executor::Kernels);
    let base_weights = load(body.layout(), base.weights.as_ref()).unwrap();
    let merged_weights = load(body.layout(), merged.weights.as_ref()).unwrap();
    let lora = Lora::new(body.layout(), 4, 8.0);
    let adapter = hf_tensors(&content.join("adapter/adapter_model.safetensors"));
    let mut parameters = vec![0f32; lora.len()];
    for (name, _, range) in lora.tensors() {
        parameters[range].copy_from_slice(&adapter[&name]);
    }
    let mut again = base_weights.clone();
    lora.merge(&mut again, &base_weights, &parameters);
    assert!(again == merged_weights && again != base_weights);
    let config: Value =
        serde_json::from_slice(&fs::read(content.join("adapter/adapter_config.json")).unwrap()).unwrap();
    assert_eq!(
        (&config["peft_type"], &config["r"], &config["lora_alpha"]),
        (&json!("LORA"), &json!(4), &json!(8.0))
    );

    // The set that a later form of the model is judged on gives the same figures, pair by pair instead of batched.
    let set = EvaluationSet::read(&content.join(EVALUATION_FILE), base.config.vocab_size).unwrap();
    let metrics = set
        .measure(&mut Scorer::new(&body, &merged_weights).unwrap(), || true)
        .unwrap();
    for name in ["rewardMargin", "rewardMarginLow", "alignmentTax", "bitsPerByte"] {
        assert!(
            (metrics[name] - report.metrics[name]).abs() < 1e-4,
            "{name}: {} {}",
            metrics[name],
            report.metrics[name]
        );
    }
    let reference = set
        .measure(&mut Scorer::new(&body, &base_weights).unwrap(), || true)
        .unwrap();
    assert!(
        reference["rewardMargin"].abs() < 1e-5 && reference["alignmentTax"].abs() < 1e-6,
        "{reference:?}"
    );
}

#[test]
fn a_run_that_is_stopped_after_every_step_ends_with_the_bits_of_one_that_is_not() {
    let bed = Bed::new();
    let whole = strata_align::run(&bed.config(), &bed.context("whole", 1)).unwrap();
    let mut attempt = 0;
    let pieced = loop {
        attempt += 1;
        let context = bed.context("pieced", attempt);
        // Asks to stop as soon as the training has begun; a run that was faster is done.
        let stopper = (attempt <= 6).then(|| {
            let context = context.clone();
            std::thread::spawn(move || {
                let early = ["", "computing the reference"];
                let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
                while early.contains(&context.progress.read().activity.as_str()) && std::time::Instant::now() < deadline
                {
                    std::thread::park_timeout(std::time::Duration::from_millis(1));
                }
                context.interrupt.set();
            })
        });
        let result = strata_align::run(&bed.config(), &context);
        stopper.into_iter().for_each(|stopper| stopper.join().unwrap());
        match result {
            Ok(report) => break report,
            Err(StageError {
                reason: FailureReason::Interrupted,
                ..
            }) => assert!(attempt < 10),
            Err(error) => panic!("{error}"),
        }
    };
    assert!(attempt > 1 && pieced.resumed_from_step.is_some(), "attempt {attempt}");
    let weights = |report: &Report, run: &str| fs::read(bed.content(report, run).join("model.safetensors")).unwrap();
    assert!(weights(&whole, "whole") == weights(&pieced, "pieced"));
    assert_eq!(
        whole.metrics["rewardMargin"].to_bits(),
        pieced.metrics["rewardMargin"].to_bits()
    );
}

#[test]
fn bad_input_has_its_reason() {
    let bed = Bed::new();
    let reason = |config: AlignConfig, run: &str| strata_align::run(&config, &bed.context(run, 1)).unwrap_err().reason;
    let mut short = bed.config();
    short.training.max_pair_tokens = 10;
    assert_eq!(reason(short, "short"), FailureReason::ConfigInvalid);
    let mut gated = bed.config();
    gated.gates[0].min = Some(1e9);
    assert_eq!(reason(gated, "gated"), FailureReason::GateFailed);
    assert!(!bed.path("gated/manifest.json").exists());
    let mut no_columns = bed.config();
    no_columns.datasets = vec![no_columns.evaluation.capability.clone().unwrap()];
    assert_eq!(reason(no_columns, "columns"), FailureReason::InputCorrupt);
    // Without a template and a token that ends a text, nothing tells where a turn ends.
    fs::remove_file(bed.path("base/chat_template.jinja")).unwrap();
    fs::write(bed.path("base/generation_config.json"), r#"{"eos_token_id": 10}"#).unwrap();
    assert_eq!(reason(bed.config(), "template"), FailureReason::ConfigInvalid);
}

#[test]
fn a_pretrained_model_is_aligned_with_a_template_in_words_which_is_published_with_it() {
    let bed = Bed::new();
    bed.write_base(
        &ModelConfig {
            bos: Some(256),
            eos: vec![256],
            ..synthetic::tiny_config()
        },
        None,
    );
    let report = strata_align::run(&bed.config(), &bed.context("run", 1)).unwrap();
    assert!(
        report.metrics["rewardMarginLow"] > 0.0 && report.metrics["pairsUnusable"] == 0.0,
        "{:?}",
        report.metrics
    );

    let content = bed.content(&report, "run");
    let model = LoadedModel::open(&content).unwrap();
    let turn = [
        json!({"role": "user", "content": "Is it?"}),
        json!({"role": "assistant", "content": "It is."}),
    ];
    let rendered = model
        .chat_template
        .unwrap()
        .render(&model.vocabulary, &turn, None, false, &Default::default());
    assert_eq!(
        rendered.unwrap().text(),
        "<|endoftext|>User:\nIs it?\n\nAssistant:\nIt is.<|endoftext|>\n\n"
    );
    assert_eq!(model.generation.eos, [256]);
    // What was learnt is an answer up to and with the token that ends it.
    let set = EvaluationSet::read(&content.join(EVALUATION_FILE), model.config.vocab_size).unwrap();
    let pairs = set.preferences.unwrap().pairs;
    assert!(
        pairs
            .iter()
            .all(|pair| pair.chosen.ends_with(&[256]) && pair.rejected.ends_with(&[256]))
    );
}

fn hf_tensors(path: &Path) -> BTreeMap<String, Vec<f32>> {
    let bytes = fs::read(path).unwrap();
    let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let names: serde_json::Map<String, Value> = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
    let tensor = |(name, entry): (String, Value)| {
        let at = |i: usize| 8 + header + entry["data_offsets"][i].as_u64().unwrap() as usize;
        let values = bytes[at(0)..at(1)]
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        (name, values)
    };
    names
        .into_iter()
        .filter(|(name, _)| name != "__metadata__")
        .map(tensor)
        .collect()
}

struct Shared(Arc<Mutex<Vec<u8>>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
