//! LoRA adapters in one batch: each row gets its own, computes what a merged model computes, and gives the bits that it would
//! give alone.

#![allow(
    clippy::unwrap_used,
    reason = "in a test an unwrap is an assertion, also in its helpers"
)]

mod peft;

use std::path::Path;
use std::sync::Arc;

use strata_kernels::infer::KvDtype;
use strata_model::synthetic::{tiny_config, weights};
use strata_model::{Family, ModelConfig, ModelError, Weights};
use strata_serve::Precision;
use strata_serve::engine::Adapter;
use strata_serve::engine::executor::{Batch, Executor, Row};

const TOKENS: usize = 20;

/// The logits of every row of several sequences, computed in steps of `chunk` tokens of each.
fn run(
    config: &ModelConfig,
    weights: &dyn Weights,
    adapters: &[Option<Arc<Adapter>>],
    precision: Precision,
    chunk: usize,
) -> Vec<Vec<Vec<f32>>> {
    let mut executor = Executor::new(config, weights, precision, KvDtype::F32, 4, 64, 64).unwrap();
    let mut out = vec![vec![Vec::new(); TOKENS]; adapters.len()];
    for start in (0..TOKENS).step_by(chunk) {
        let mut places = Vec::new();
        for at in start..(start + chunk).min(TOKENS) {
            places.extend((0..adapters.len()).map(|sequence| (sequence, at)));
        }
        places.sort_unstable();
        let rows = places.iter().map(|(sequence, at)| Row {
            token: (at * 37 + 5) as u32 % config.vocab_size as u32,
            position: *at as u32,
            table: *sequence,
            logits: true,
        });
        let batch = Batch {
            rows: rows.collect(),
            tables: (0..adapters.len() as u32)
                .map(|i| (i * 8..i * 8 + 8).collect())
                .collect(),
            adapters: adapters.to_vec(),
        };
        executor.forward(&batch, |row, logits| {
            let (sequence, at) = places[row];
            out[sequence][at] = logits.to_vec();
        });
    }
    out
}

fn load(folder: &Path, config: &ModelConfig, seed: u64, rank: usize) -> Arc<Adapter> {
    peft::write(folder, config, seed, rank, "all");
    Arc::new(Adapter::load("a", folder, config, 16).unwrap())
}

#[test]
fn every_row_gets_its_adapter_as_if_it_were_merged_and_its_bits_whatever_is_beside_it() {
    for family in [Family::Llama, Family::Phi3, Family::Qwen2] {
        let config = ModelConfig {
            family,
            ..tiny_config()
        };
        let base = weights(&config, 5);
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let (one, two) = (load(dirs[0].path(), &config, 1, 4), load(dirs[1].path(), &config, 2, 7));
        let mixed = [Some(one.clone()), None, Some(two.clone()), Some(one.clone())];
        let got = run(&config, &base, &mixed, Precision::Float, 3);

        for (sequence, folder) in [(0, Some(dirs[0].path())), (1, None), (2, Some(dirs[1].path()))] {
            let merged = folder.map_or_else(|| base.clone(), |folder| peft::merged(folder, &config, &base));
            let expected = run(&config, &merged, &[None], Precision::Float, TOKENS);
            let (mut worst, mut largest) = (0f32, 0f32);
            for (a, b) in got[sequence].iter().flatten().zip(expected[0].iter().flatten()) {
                (worst, largest) = (worst.max((a - b).abs()), largest.max(b.abs()));
            }
            assert!(worst < 1e-4 * largest, "{family:?} {sequence}: {worst} of {largest}");
        }
        assert_ne!(got[0], got[1], "the adapter changes nothing");
        assert_ne!(got[0], got[2]);
        for (sequence, adapter) in mixed.iter().enumerate() {
            for chunk in [1, TOKENS] {
                let alone = run(&config, &base, std::slice::from_ref(adapter), Precision::Float, chunk);
                assert_eq!(alone[0], got[sequence], "{family:?} {sequence} in steps of {chunk}");
            }
        }
    }
}

#[test]
fn what_is_no_adapter_of_this_model_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let config = tiny_config();
    let open = |config: &ModelConfig, rank: usize| Adapter::load("a", dir.path(), config, rank).unwrap_err();
    assert!(matches!(open(&config, 16), ModelError::Missing { .. }));
    peft::write(dir.path(), &config, 1, 4, "all");
    assert!(open(&config, 3).to_string().contains("raise --max-lora-rank"));
    let fewer = ModelConfig {
        layers: 1,
        ..config.clone()
    };
    assert!(
        open(&fewer, 16).to_string().contains("with 1 layers"),
        "{}",
        open(&fewer, 16)
    );
    let wider = ModelConfig {
        hidden_size: 128,
        ..config.clone()
    };
    assert!(
        open(&wider, 16).to_string().contains("have shapes"),
        "{}",
        open(&wider, 16)
    );
    let path = dir.path().join("adapter_config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"use_dora\":false", "\"use_dora\":true")).unwrap();
    assert!(open(&config, 16).to_string().contains("use_dora is true"));
}
