//! Every model family against transformers: families.json holds configurations as transformers writes them and the logits that
//! it computes. `e2e/interop/families.py expect` made the file, with transformers 5.24; its weights are those of
//! `strata_model::synthetic`, seed 5.

#![allow(
    clippy::unwrap_used,
    reason = "in a test an unwrap is an assertion, also in its helpers"
)]

use std::path::Path;

use serde_json::{Map, Value};
use strata_kernels::infer::KvDtype;
use strata_model::synthetic::{byte_tokenizer, weights};
use strata_model::{Dtype, Family, GenerationConfig, LoadedModel, ModelConfig, ModelError, Weights, gguf, hf};
use strata_serve::Precision;
use strata_serve::engine::executor::{Batch, Executor, Row};

/// As in families.py.
const TOKENS: usize = 40;
const SHOWN_LOGITS: usize = 6;

fn cases() -> Map<String, Value> {
    serde_json::from_str(include_str!("families.json")).unwrap()
}

fn config(case: &Value) -> ModelConfig {
    ModelConfig::from_hf(&case["config"], Path::new("families.json")).unwrap()
}

/// Logits of every position, computed in two chunks.
fn logits(config: &ModelConfig, weights: &dyn Weights) -> Vec<Vec<f32>> {
    let mut executor = Executor::new(config, weights, Precision::Float, KvDtype::F32, 4, 16, TOKENS).unwrap();
    let mut out = Vec::new();
    for chunk in [0..25, 25..TOKENS] {
        let rows = chunk
            .map(|at| Row {
                token: ((at * 37 + 11) % config.vocab_size) as u32,
                position: at as u32,
                table: 0,
                logits: true,
            })
            .collect();
        let batch = Batch {
            rows,
            tables: vec![(0..16).rev().collect()],
            ..Batch::default()
        };
        executor.forward(&batch, |_, logits| out.push(logits.to_vec()));
    }
    out
}

/// The largest difference, as a share of the largest logit.
fn difference<'a>(a: impl IntoIterator<Item = &'a f32>, b: impl IntoIterator<Item = &'a f32>) -> f32 {
    let (mut worst, mut largest) = (0f32, 0f32);
    for (a, b) in a.into_iter().zip(b) {
        (worst, largest) = (worst.max((a - b).abs()), largest.max(b.abs()));
    }
    worst / largest
}

#[test]
fn every_family_computes_what_transformers_does() {
    let mut seen = Vec::new();
    for (name, case) in cases() {
        let config = config(&case);
        seen.push(config.family);
        let got = logits(&config, &weights(&config, 5));
        for (position, expected) in case["logits"].as_object().unwrap() {
            let expected: Vec<f32> = serde_json::from_value(expected.clone()).unwrap();
            let got: Vec<f32> = got[position.parse::<usize>().unwrap()]
                .iter()
                .step_by(config.vocab_size / SHOWN_LOGITS)
                .copied()
                .collect();
            assert_eq!(got.len(), expected.len(), "{name}");
            let difference = difference(&got, &expected);
            assert!(
                difference < 5e-5,
                "{name}, position {position}: {got:?}, not {expected:?}"
            );
        }
    }
    let unseen: Vec<_> = Family::ALL.iter().filter(|family| !seen.contains(family)).collect();
    assert!(unseen.is_empty(), "no case for {unseen:?}");
}

#[test]
fn both_formats_keep_every_family_or_refuse_what_they_cannot_say() {
    let dir = tempfile::tempdir().unwrap();
    let mut refused = Vec::new();
    for (name, case) in cases() {
        let config = config(&case);
        let weights = weights(&config, 5);
        let expected = logits(&config, &weights);
        let tokenizer_json = &byte_tokenizer();
        let generation = &GenerationConfig {
            eos: config.eos.clone(),
            ..GenerationConfig::default()
        };

        let folder = dir.path().join(&name);
        std::fs::create_dir(&folder).unwrap();
        let parts = hf::Folder {
            config: &config,
            weights: &weights,
            dtype: Dtype::F32,
            tokenizer_json,
            chat_template: None,
            generation,
        };
        hf::write(&folder, &parts).unwrap();
        let read = LoadedModel::open(&folder).unwrap();
        assert_eq!(read.config, config, "{name}");
        assert_eq!(logits(&config, &*read.weights), expected, "{name}");

        let file = dir.path().join(format!("{name}.gguf"));
        let texts = gguf::Texts {
            tokenizer_json,
            chat_template: None,
            generation,
        };
        match gguf::write(&file, &name, &config, &weights, texts, Dtype::F32) {
            Ok(()) => {
                let read = LoadedModel::open(&file).unwrap();
                let got = logits(&read.config, &*read.weights);
                let difference = difference(got.iter().flatten(), expected.iter().flatten());
                assert!(difference < 1e-5, "{name}: {difference}");
            }
            Err(ModelError::Unsupported { what, .. }) => refused.push((name, what)),
            Err(error) => panic!("{name}: {error}"),
        }
    }
    let names: Vec<&str> = refused.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["qwen2-window", "gemma2-scale"], "{refused:?}");
    assert!(
        refused.iter().all(|(_, what)| what.contains("serve its HF folder")),
        "{refused:?}"
    );
}
