//! The forward pass in candle's operations, on candle's CPU device, against the kernels: what a GPU would be asked to compute.

#![allow(
    clippy::unwrap_used,
    reason = "in a test an unwrap is an assertion, also in its helpers"
)]

use std::path::Path;

use candle_core::Device;
use serde_json::{Map, Value};
use strata_kernels::infer::KvDtype;
use strata_model::synthetic::{byte_tokenizer, tiny_config, weights};
use strata_model::{Dtype, GenerationConfig, LoadedModel, ModelConfig, Weights, gguf};
use strata_serve::Precision;
use strata_serve::engine::candle::CandleExecutor;
use strata_serve::engine::executor::{Batch, Executor, Row};

const BLOCK_TOKENS: usize = 4;
const BLOCKS: usize = 40;
const POSITIONS: usize = 60;

fn row(position: usize, table: usize, config: &ModelConfig) -> Row {
    Row {
        token: ((position * 37 + table * 5 + 11) % config.vocab_size) as u32,
        position: position as u32,
        table,
        logits: position % 3 == 2,
    }
}

/// Two sequences in blocks anywhere: their prompts in two chunks, then both one token at a time; in the middle the first one
/// moves a block that is full.
fn batches(config: &ModelConfig) -> Vec<(Option<(u32, u32)>, Batch)> {
    let mut tables = vec![
        (0..15).map(|i| i * 2 + 1).collect::<Vec<u32>>(),
        (0..15).map(|i| i * 2).rev().collect(),
    ];
    let mut out = Vec::new();
    for chunk in [0..25usize, 25..31] {
        let rows = [0, 1]
            .iter()
            .flat_map(|table| chunk.clone().map(move |at| (at, *table)));
        let rows = rows.map(|(at, table)| row(at, table, config)).collect();
        out.push((
            None,
            Batch {
                rows,
                tables: tables.clone(),
                ..Batch::default()
            },
        ));
    }
    let moved = (tables[0][2], 35);
    tables[0][2] = moved.1;
    for at in 31..50 {
        let rows = vec![row(at, 0, config), row(at, 1, config)];
        out.push((
            (at == 31).then_some(moved),
            Batch {
                rows,
                tables: tables.clone(),
                ..Batch::default()
            },
        ));
    }
    out
}

/// The largest difference between the two executors' logits, as a share of the largest logit.
fn difference(config: &ModelConfig, weights: &dyn Weights, precision: Precision, dtype: KvDtype) -> f32 {
    let mut kernels = Executor::new(config, weights, precision, dtype, BLOCK_TOKENS, BLOCKS, POSITIONS).unwrap();
    let mut candle =
        CandleExecutor::new(&Device::Cpu, config, weights, dtype, BLOCK_TOKENS, BLOCKS, POSITIONS).unwrap();
    let (mut worst, mut largest) = (0f32, 0f32);
    for (copy, batch) in batches(config) {
        if let Some((from, to)) = copy {
            kernels.copy_block(from, to);
            candle.copy_block(from, to).unwrap();
        }
        let (mut expected, mut got) = (Vec::new(), Vec::new());
        kernels.forward(&batch, |row, logits| expected.push((row, logits.to_vec())));
        candle
            .forward(&batch, |row, logits| got.push((row, logits.to_vec())))
            .unwrap();
        assert_eq!(expected.len(), got.len());
        for ((row, expected), (same_row, got)) in expected.iter().zip(&got) {
            assert_eq!((row, expected.len()), (same_row, got.len()));
            for (a, b) in expected.iter().zip(got) {
                (worst, largest) = (worst.max((a - b).abs()), largest.max(a.abs()));
            }
        }
    }
    worst / largest
}

#[test]
fn every_family_is_computed_as_by_the_kernels() {
    let cases: Map<String, Value> = serde_json::from_str(include_str!("families.json")).unwrap();
    for (name, case) in cases {
        let config = ModelConfig::from_hf(&case["config"], Path::new(&name)).unwrap();
        let off = difference(&config, &weights(&config, 5), Precision::Float, KvDtype::F32);
        assert!(off < 1e-4, "{name}: {off}");
    }
}

#[test]
fn quantized_weights_and_a_half_precision_cache_are_computed_as_by_the_kernels() {
    let (folder, config) = (tempfile::tempdir().unwrap(), tiny_config());
    let texts = gguf::Texts {
        tokenizer_json: &byte_tokenizer(),
        chat_template: None,
        generation: &GenerationConfig::default(),
    };
    for dtype in [Dtype::Q8_0, Dtype::Q4_0] {
        let file = folder.path().join(dtype.name());
        gguf::write(&file, "tiny", &config, &weights(&config, 5), texts, dtype).unwrap();
        let model = LoadedModel::open(&file).unwrap();
        let off = difference(&config, &*model.weights, Precision::Stored, KvDtype::F16);
        assert!(off < 0.02, "{}: {off}", dtype.name());
    }
}
