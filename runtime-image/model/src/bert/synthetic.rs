//! A small encoder of random weights, for tests of whoever runs one.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::json;

use super::BertConfig;
use crate::dtype::Dtype;
use crate::error::{ModelError, Result};
use crate::hf::{files, write_safetensors};
use crate::synthetic::byte_tokenizer;

/// Writes it as a Hugging Face folder and gives its tensors: 2 layers, 3 heads of 8, 300 tokens of which the first 256 are
/// bytes, 32 positions.
pub fn write(folder: &Path) -> Result<BTreeMap<String, Vec<f32>>> {
    let json = json!({
        "architectures": ["BertModel"], "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 3, "vocab_size": 300, "type_vocab_size": 2, "max_position_embeddings": 32,
    });
    let save = |name: &str, text: String| {
        let path = folder.join(name);
        std::fs::write(&path, text).map_err(|error| ModelError::io(&path, error))
    };
    save(files::CONFIG, json.to_string())?;
    save(files::TOKENIZER, byte_tokenizer().to_string())?;
    let tensors = BertConfig::from_json(&json, folder)?.tensors();
    let mut state = 1u64;
    let mut number = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let values: BTreeMap<String, Vec<f32>> = tensors
        .iter()
        .map(|(name, shape)| (name.clone(), (0..shape.iter().product()).map(|_| number()).collect()))
        .collect();
    let path = folder.join(files::WEIGHTS);
    write_safetensors(&path, &tensors, Dtype::F32, &Default::default(), |name| {
        Ok(&values[name])
    })?;
    Ok(values)
}
