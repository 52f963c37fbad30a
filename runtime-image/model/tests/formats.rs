//! What is written is read back; what is broken is refused with an error and never with a panic.

#![allow(
    clippy::unwrap_used,
    reason = "in a test an unwrap is an assertion, also in its helpers"
)]

use std::path::Path;

use proptest::prelude::*;
use serde_json::json;
use strata_model::synthetic::{CHAT_TEMPLATE, byte_tokenizer, tiny_config, weights};
use strata_model::{
    Dtype, GenerationConfig, LoadedModel, MemoryWeights, ModelConfig, ModelError, Weights, gguf, hf, tensors,
};

fn write_gguf(path: &Path, config: &ModelConfig, weights: &MemoryWeights, dtype: Dtype) {
    let tokenizer = gguf::Tokenizer {
        json: &byte_tokenizer(),
        chat_template: Some(CHAT_TEMPLATE),
    };
    gguf::write(path, "tiny", config, weights, tokenizer, dtype).unwrap();
}

fn write_folder(path: &Path, config: &ModelConfig, weights: &MemoryWeights, dtype: Dtype) {
    let generation = GenerationConfig {
        eos: config.eos.clone(),
        ..GenerationConfig::default()
    };
    let tokenizer_json = &byte_tokenizer();
    hf::write(
        path,
        &hf::Folder {
            config,
            weights,
            dtype,
            tokenizer_json,
            chat_template: Some(CHAT_TEMPLATE),
            generation: &generation,
        },
    )
    .unwrap();
}

/// The largest difference of an element, as a share of the largest element of its row.
fn worst_error(config: &ModelConfig, original: &MemoryWeights, read: &dyn Weights) -> f32 {
    let mut worst = 0f32;
    for tensor in tensors(config) {
        let (a, b) = (original.f32(&tensor.name).unwrap(), read.f32(&tensor.name).unwrap());
        let largest = a.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        worst = a
            .iter()
            .zip(&b)
            .fold(worst, |worst, (a, b)| worst.max((a - b).abs() / largest));
    }
    worst
}

#[test]
fn both_formats_give_back_what_was_written_within_the_precision_of_the_type() {
    let dir = tempfile::tempdir().unwrap();
    for tied in [false, true] {
        let config = ModelConfig {
            tie_embeddings: tied,
            ..tiny_config()
        };
        let weights = weights(&config, 7);
        for (dtype, most) in [
            (Dtype::F32, 0.0),
            (Dtype::F16, 1e-3),
            (Dtype::BF16, 5e-3),
            (Dtype::Q8_0, 5e-3),
        ] {
            let file = dir.path().join(format!("{tied}-{}.gguf", dtype.name()));
            write_gguf(&file, &config, &weights, dtype);
            let read = LoadedModel::open(&file).unwrap();
            assert_eq!(read.config, config);
            let error = worst_error(&config, &weights, &*read.weights);
            assert!(error <= most, "GGUF {}: {error}", dtype.name());
            assert_eq!(read.chat_template.unwrap().source(), CHAT_TEMPLATE);
            assert_eq!(
                read.vocabulary.encode("<|im_start|>héllo", true).unwrap(),
                [257, 104, 195, 169, 108, 108, 111]
            );

            if dtype != Dtype::Q8_0 {
                let folder = dir.path().join(format!("{tied}-{}", dtype.name()));
                std::fs::create_dir(&folder).unwrap();
                write_folder(&folder, &config, &weights, dtype);
                let read = LoadedModel::open(&folder).unwrap();
                assert_eq!(read.config, config);
                assert!(
                    worst_error(&config, &weights, &*read.weights) <= most,
                    "HF {}",
                    dtype.name()
                );
            }
        }
    }
}

#[test]
fn a_model_that_this_engine_cannot_compute_is_refused_by_name() {
    let path = Path::new("config.json");
    let good = tiny_config().to_hf("float32");
    assert_eq!(ModelConfig::from_hf(&good, path).unwrap(), tiny_config());
    let cases = [
        (
            "architectures",
            json!(["MambaForCausalLM"]),
            "unknown architecture \"MambaForCausalLM\"; this engine knows LlamaForCausalLM",
        ),
        (
            "rope_scaling",
            json!({"rope_type": "llama3", "factor": 8.0}),
            "rotary embeddings of type \"llama3\"",
        ),
        ("attention_bias", json!(true), "attention_bias is true"),
        ("hidden_act", json!("gelu"), "hidden_act is \"gelu\""),
        ("num_key_value_heads", json!(3), "4 heads cannot share 3 kv heads"),
        ("vocab_size", json!(1u64 << 60), "vocabulary size"),
        ("hidden_size", json!(-1), "hidden_size is -1"),
        ("num_hidden_layers", json!(0), "layers is 0"),
    ];
    for (key, value, message) in cases {
        let mut bad = good.clone();
        bad[key] = value;
        let error = ModelConfig::from_hf(&bad, path).unwrap_err().to_string();
        assert!(error.contains(message), "{key}: {error}");
    }
    // Newer transformers moved the base of the rotary embeddings.
    let mut new = good.clone();
    new.as_object_mut().unwrap().shift_remove("rope_theta");
    new["rope_parameters"] = json!({"rope_type": "default", "rope_theta": 10000.0});
    assert_eq!(ModelConfig::from_hf(&new, path).unwrap(), tiny_config());
}

#[test]
fn an_unknown_gguf_architecture_is_a_typed_error_with_the_known_ones() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.gguf");
    let config = tiny_config();
    write_gguf(&file, &config, &weights(&config, 1), Dtype::F32);
    let mut bytes = std::fs::read(&file).unwrap();
    let at = bytes.windows(5).position(|window| window == b"llama").unwrap();
    bytes[at..at + 5].copy_from_slice(b"mamba");
    std::fs::write(&file, bytes).unwrap();
    match LoadedModel::open(&file).unwrap_err() {
        ModelError::UnknownArchitecture { found, known, .. } => {
            assert_eq!((found.as_str(), known.as_str()), ("mamba", "llama"))
        }
        other => panic!("{other}"),
    }
}

#[test]
fn a_shard_name_cannot_lead_out_of_the_folder() {
    let dir = tempfile::tempdir().unwrap();
    let config = tiny_config();
    write_folder(dir.path(), &config, &weights(&config, 1), Dtype::F32);
    std::fs::rename(dir.path().join("model.safetensors"), dir.path().join("a.safetensors")).unwrap();
    let index = dir.path().join("model.safetensors.index.json");
    let map = |file: &str| json!({"weight_map": tensors(&config).into_iter().map(|tensor| (tensor.name, json!(file))).collect::<serde_json::Map<_, _>>()});
    std::fs::write(&index, map("a.safetensors").to_string()).unwrap();
    LoadedModel::open(dir.path()).unwrap();
    std::fs::write(&index, map("../a.safetensors").to_string()).unwrap();
    assert!(
        LoadedModel::open(dir.path())
            .unwrap_err()
            .to_string()
            .contains("not the name of a file in this folder")
    );
}

/// A GGUF and a safetensors file as small as they get.
fn small_files() -> (Vec<u8>, Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let config = ModelConfig {
        hidden_size: 32,
        layers: 1,
        heads: 2,
        kv_heads: 1,
        intermediate_size: 32,
        ..tiny_config()
    };
    let weights = weights(&config, 3);
    write_gguf(&dir.path().join("m.gguf"), &config, &weights, Dtype::Q8_0);
    write_folder(dir.path(), &config, &weights, Dtype::F16);
    (
        std::fs::read(dir.path().join("m.gguf")).unwrap(),
        std::fs::read(dir.path().join("model.safetensors")).unwrap(),
    )
}

#[test]
fn a_truncated_file_is_refused_at_every_length() {
    let (gguf_bytes, safetensors_bytes) = small_files();
    let dir = tempfile::tempdir().unwrap();
    let (gguf_path, safetensors_path) = (dir.path().join("t.gguf"), dir.path().join("t.safetensors"));
    for share in 0..60 {
        let length = gguf_bytes.len() * share / 60;
        std::fs::write(&gguf_path, &gguf_bytes[..length]).unwrap();
        assert!(gguf::open(&gguf_path).is_err(), "{length} bytes");
        let length = safetensors_bytes.len() * share / 60;
        std::fs::write(&safetensors_path, &safetensors_bytes[..length]).unwrap();
        assert!(hf::Safetensors::open_file(&safetensors_path).is_err(), "{length} bytes");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]
    #[test]
    fn a_corrupted_header_never_panics(places in prop::collection::vec((0usize..6000, any::<u8>()), 1..8), huge in prop::option::of(0usize..6000)) {
        static FILES: std::sync::OnceLock<(Vec<u8>, Vec<u8>)> = std::sync::OnceLock::new();
        let (gguf_bytes, safetensors_bytes) = FILES.get_or_init(small_files);
        let dir = tempfile::tempdir().unwrap();
        for (source, name) in [(gguf_bytes, "f.gguf"), (safetensors_bytes, "f.safetensors")] {
            let mut bytes = source.clone();
            for (at, byte) in &places {
                let at = at % bytes.len();
                bytes[at] = *byte;
            }
            if let Some(at) = huge {
                let at = at % (bytes.len() - 8);
                bytes[at..at + 8].fill(0xFF);
            }
            let path = dir.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            if name == "f.gguf" {
                if let Ok(model) = LoadedModel::open(&path) {
                    for tensor in tensors(&model.config) {
                        let _ = model.weights.f32(&tensor.name);
                    }
                }
            } else if let Ok(weights) = hf::Safetensors::open_file(&path) {
                for name in weights.names() {
                    let _ = weights.f32(name);
                }
            }
        }
    }
}
