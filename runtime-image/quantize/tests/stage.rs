//! The stage from a published model to a published file.

#![allow(
    clippy::unwrap_used,
    reason = "in a test an unwrap is an assertion, also in its helpers"
)]

use std::collections::BTreeMap;
use std::path::Path;

use strata_artifact::{Draft, RunFolder};
use strata_contract::{
    ArtifactKind, FailureReason, Gate, Input, QuantizationFormat, QuantizeConfig, Report, Resource, Run, Uri,
};
use strata_evaluate::{EvaluationSet, Pair, Preferences, TextSet, score_text};
use strata_model::synthetic::{CHAT_TEMPLATE, byte_tokenizer, tiny_config, weights};
use strata_model::{Dtype, GenerationConfig, LoadedModel, MemoryWeights, Weights, gguf, hf};
use strata_stage::{StageContext, StageError};

fn uri(path: &Path) -> Uri {
    format!("file://{}", path.display()).parse().unwrap()
}

fn resource() -> Resource {
    Resource {
        kind: "InferenceService".into(),
        namespace: "default".into(),
        name: "tiny".into(),
    }
}

/// More than GGUF's own keys can say.
fn generation() -> GenerationConfig {
    GenerationConfig {
        eos: vec![258, 256, 257],
        temperature: Some(0.6),
        top_p: Some(0.9),
        top_k: Some(40),
    }
}

/// Publishes a model as the training stages do; returns its input.
fn publish_model(folder: &Path) -> Input {
    publish_weights(folder, &weights(&tiny_config(), 5))
}

fn publish_weights(folder: &Path, weights: &MemoryWeights) -> Input {
    let run = RunFolder::new(&uri(folder), folder);
    let attempt = run.attempt("a1").unwrap();
    let config = tiny_config();
    let generation = generation();
    let place = attempt.place(hf::files::CONFIG).unwrap();
    let files = hf::Folder {
        config: &config,
        weights,
        dtype: Dtype::F32,
        tokenizer_json: &byte_tokenizer(),
        chat_template: Some(CHAT_TEMPLATE),
        generation: &generation,
    };
    hf::write(place.parent().unwrap(), &files).unwrap();
    for name in [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
    ] {
        attempt.adopt(name).unwrap();
    }
    let mut text = TextSet::default();
    let tokens: Vec<u32> = "A few words of held-out text, to be scored."
        .bytes()
        .map(u32::from)
        .collect();
    text.push(&tokens, 256, 32, |_| 1);
    let pair = Pair {
        prompt: vec![257, 65],
        chosen: vec![66, 67],
        rejected: vec![68],
        reference_chosen: -11.0,
        reference_rejected: -5.0,
    };
    let other = Pair {
        prompt: vec![257],
        chosen: vec![70],
        rejected: vec![71, 72],
        ..pair.clone()
    };
    let set = EvaluationSet {
        text: Some(text),
        preferences: Some(Preferences {
            beta: 0.1,
            pairs: vec![pair, other],
        }),
        ..EvaluationSet::new(config.vocab_size)
    };
    attempt.write("evaluation/set.json", &set.to_json()).unwrap();
    let draft = Draft {
        kind: ArtifactKind::Model,
        run_id: "r".into(),
        inputs: Vec::new(),
        config: serde_json::Value::Null,
        metrics: BTreeMap::from([("bitsPerByte".into(), 8.0)]),
        gates: Vec::new(),
        facts: BTreeMap::from([("dequantizedFrom".into(), "Q4_1".into())]),
    };
    let manifest = attempt.publish(draft, resource(), 1).unwrap();
    Input {
        name: "model".into(),
        uri: uri(folder),
        digest: Some(manifest.digest),
        bytes: None,
        resource: None,
    }
}

fn input(path: &Path) -> Input {
    Input {
        name: "model".into(),
        uri: uri(path),
        digest: None,
        bytes: None,
        resource: None,
    }
}

fn context(output: &Path) -> StageContext {
    StageContext {
        run: Run {
            id: "q".into(),
            attempt: 1,
            resource: resource(),
            output: uri(output),
        },
        volumes: output.to_owned(),
        attempt_id: "a1".into(),
        progress: Default::default(),
        interrupt: Default::default(),
    }
}

fn quantize(model: Input, output: &Path, format: QuantizationFormat, gates: Vec<Gate>) -> Result<Report, StageError> {
    strata_quantize::run(&QuantizeConfig { model, format, gates }, &context(output))
}

fn gate(metric: &str, max: f64) -> Gate {
    Gate {
        metric: metric.into(),
        min: None,
        max: Some(max),
    }
}

#[test]
fn the_published_file_is_the_model_and_was_measured_as_it_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let model = publish_model(&dir.path().join("model"));
    for (format, name, most) in [
        (QuantizationFormat::Q8_0, "Q8_0", 0.02),
        (QuantizationFormat::F16, "F16", 0.005),
        // Their output matrices keep 8 bits.
        (QuantizationFormat::Q4_K, "Q4_K", 0.02),
        (QuantizationFormat::Q4_0, "Q4_0", 0.02),
    ] {
        let output = dir.path().join(name);
        let report = quantize(model.clone(), &output, format, vec![gate("bitsPerByte", 30.0)]).unwrap();
        let manifest = RunFolder::new(&uri(&output), &output).published().unwrap().unwrap();
        assert_eq!(report.artifact.unwrap().digest, manifest.digest);
        assert_eq!(manifest.content.kind, ArtifactKind::QuantizedModel);
        assert_eq!(
            (
                manifest.content.facts["format"].as_str(),
                manifest.content.facts["dequantizedFrom"].as_str()
            ),
            (name, "Q4_1")
        );
        assert_eq!(manifest.content.inputs[0].digest, model.digest);
        assert!(manifest.content.gates[0].passed);
        for metric in ["bitsPerByte", "rewardMargin", "bitsPerByteQuantizationLoss"] {
            assert!(manifest.content.metrics[metric].is_finite(), "{metric}");
        }

        let content = output.join(&manifest.publication.content_path);
        let read = LoadedModel::open(&content).unwrap();
        assert_eq!(
            (read.generation, read.chat_template.unwrap().source()),
            (generation(), CHAT_TEMPLATE)
        );
        let (a, b) = (
            weights(&tiny_config(), 5).f32("lm_head.weight").unwrap(),
            read.weights.f32("lm_head.weight").unwrap(),
        );
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() <= most * 0.3), "{name}");

        // The figure in the manifest is the served engine's own.
        let served = LoadedModel::open(&content).unwrap();
        let scorer = strata_serve::Scorer::new(
            &served,
            strata_serve::Precision::Stored,
            strata_kernels::infer::KvDtype::F16,
            256,
        )
        .unwrap();
        struct Engine(strata_serve::Scorer);
        impl strata_evaluate::LanguageModel for Engine {
            fn token_log_probs(
                &mut self,
                tokens: &[u32],
                from: usize,
            ) -> Result<Vec<f32>, strata_evaluate::EvaluateError> {
                Ok(self.0.token_log_probs(tokens, from).unwrap())
            }
        }
        let set = EvaluationSet::read(&content.join("evaluation/set.json"), 259).unwrap();
        let score = score_text(&mut Engine(scorer), set.text.as_ref().unwrap(), |_| true).unwrap();
        let published = manifest.content.metrics["bitsPerByte"];
        assert!((score.bits_per_byte() - published).abs() < 1e-6, "{published}");
    }
}

#[test]
fn a_gate_that_says_no_or_was_not_measured_publishes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let model = publish_model(&dir.path().join("model"));
    let output = dir.path().join("out");
    let error = quantize(model, &output, QuantizationFormat::Q8_0, vec![gate("bitsPerByte", 0.1)]).unwrap_err();
    assert_eq!(error.reason, FailureReason::GateFailed);
    assert!(RunFolder::new(&uri(&output), &output).published().unwrap().is_none());

    // A plain GGUF file has no evaluation set: fine without gates, a failed gate with one.
    let file = dir.path().join("plain.gguf");
    let config = tiny_config();
    let texts = gguf::Texts {
        tokenizer_json: &byte_tokenizer(),
        chat_template: None,
        generation: &generation(),
    };
    gguf::write(&file, "plain", &config, &weights(&config, 1), texts, Dtype::F16).unwrap();
    let plain = input(&file);
    quantize(
        plain.clone(),
        &dir.path().join("plain"),
        QuantizationFormat::Q8_0,
        Vec::new(),
    )
    .unwrap();
    let error = quantize(
        plain,
        &dir.path().join("gated"),
        QuantizationFormat::Q8_0,
        vec![gate("bitsPerByte", 30.0)],
    )
    .unwrap_err();
    assert!(
        error.message.contains("bitsPerByte was not measured"),
        "{}",
        error.message
    );
}

#[test]
fn a_stop_and_a_damaged_model_end_with_their_reasons() {
    let dir = tempfile::tempdir().unwrap();
    let model = publish_model(&dir.path().join("model"));
    let config = QuantizeConfig {
        model,
        format: QuantizationFormat::Q8_0,
        gates: Vec::new(),
    };
    let stopped = context(&dir.path().join("out"));
    stopped.interrupt.set();
    assert_eq!(
        strata_quantize::run(&config, &stopped).unwrap_err().reason,
        FailureReason::Interrupted
    );

    let file = dir.path().join("broken.gguf");
    std::fs::write(&file, b"GGUF\x03\0\0\0").unwrap();
    let reason = |input: Input| {
        let error = quantize(input, &dir.path().join("b"), QuantizationFormat::F16, Vec::new()).unwrap_err();
        error.reason
    };
    assert_eq!(reason(input(&file)), FailureReason::InputCorrupt);
    std::fs::write(&file, [b"GGUF\x01\0\0\0".as_slice(), &[0; 64]].concat()).unwrap();
    assert_eq!(reason(input(&file)), FailureReason::ArchitectureUnsupported);

    // A folder from which nobody can know what to take.
    let folder = dir.path().join("folder");
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("README.md"), "no model").unwrap();
    assert_eq!(reason(input(&folder)), FailureReason::InputNotFound);
    for name in ["a.gguf", "b.gguf"] {
        std::fs::write(folder.join(name), b"GGUF").unwrap();
    }
    assert_eq!(reason(input(&folder)), FailureReason::ConfigInvalid);
}

#[test]
fn a_model_that_computes_no_numbers_fails_its_gate_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut huge = weights(&tiny_config(), 5);
    huge.0.get_mut("model.norm.weight").unwrap().1.fill(3e38);
    let model = publish_weights(&dir.path().join("model"), &huge);
    let output = dir.path().join("out");
    let error = quantize(model, &output, QuantizationFormat::Q8_0, Vec::new()).unwrap_err();
    assert_eq!(error.reason, FailureReason::GateFailed);
    assert!(error.message.contains("bitsPerByte is"), "{}", error.message);
    assert!(RunFolder::new(&uri(&output), &output).published().unwrap().is_none());
}
