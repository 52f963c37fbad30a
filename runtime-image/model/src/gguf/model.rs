//! A GGUF file as a model: its metadata as [`ModelConfig`], its tensors in HF's names and row order.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use super::GENERATION;
use super::parse::{Gguf, TensorInfo};
use super::tokenizer::tokenizer_json;
use crate::config::ModelConfig;
use crate::dtype::Dtype;
use crate::error::{ModelError, Result};
use crate::family::{Family, gguf_interleaved_head_dim, gguf_row_to_hf, tensors};
use crate::generation::GenerationConfig;
use crate::weights::{RawTensor, Weights, check_tensors};

/// The tensors of a GGUF file.
#[derive(Debug)]
pub struct GgufModel {
    file: Gguf,
    config: ModelConfig,
    /// HF's name to GGUF's.
    names: HashMap<String, String>,
}

/// What a GGUF file holds.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) config: ModelConfig,
    pub(crate) weights: Arc<GgufModel>,
    pub(crate) tokenizer_json: serde_json::Value,
    pub(crate) chat_template: Option<String>,
    pub(crate) generation: GenerationConfig,
    pub(crate) special: crate::tokenizer::SpecialTexts,
}

/// Opens the model in the GGUF file at `path`: configuration and weights, every tensor checked.
pub fn open(path: &Path) -> Result<GgufModel> {
    let file = Gguf::open(path)?;
    let config = config(&file)?;
    let names = tensors(&config)
        .into_iter()
        .map(|tensor| (tensor.name, tensor.gguf_name))
        .collect();
    let model = GgufModel { file, config, names };
    check_tensors(&model, &model.config, path)?;
    for tensor in tensors(&model.config) {
        model.dtype(&tensor.name)?;
    }
    Ok(model)
}

pub(crate) fn open_all(path: &Path) -> Result<Opened> {
    let model = open(path)?;
    let tokenizer_json = tokenizer_json(&model.file)?;
    let tokens = model.file.strings("tokenizer.ggml.tokens").unwrap_or_default();
    let text = |id: Option<u32>| id.and_then(|id| tokens.get(id as usize)).map(|text| (*text).to_owned());
    let special = crate::tokenizer::SpecialTexts {
        bos: text(model.config.bos),
        eos: text(model.config.eos.first().copied()),
    };
    let generation = generation(&model)?;
    Ok(Opened {
        config: model.config.clone(),
        tokenizer_json,
        chat_template: model.file.string("tokenizer.chat_template").map(str::to_owned),
        generation,
        special,
        weights: Arc::new(model),
    })
}

/// The defaults that [`super::write`] put there whole, or what GGUF's own keys say: at most two tokens that end a text.
fn generation(model: &GgufModel) -> Result<GenerationConfig> {
    let Some(text) = model.file.string(GENERATION) else {
        return Ok(GenerationConfig {
            eos: model.config.eos.clone(),
            ..GenerationConfig::default()
        });
    };
    let path = model.file.path();
    let json = serde_json::from_str(text)
        .map_err(|error| ModelError::malformed(path, format!("metadata {GENERATION}: {error}")))?;
    GenerationConfig::from_hf(&json, path)
}

impl GgufModel {
    /// The model's shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The file with its metadata.
    pub fn file(&self) -> &Gguf {
        &self.file
    }

    fn tensor(&self, name: &str) -> Result<&TensorInfo> {
        let info = self.names.get(name).and_then(|name| self.file.tensor(name));
        info.ok_or_else(|| ModelError::malformed(self.file.path(), format!("tensor {name} is missing")))
    }
}

impl Weights for GgufModel {
    fn release(&self) {
        self.file.release();
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        Some(self.file.tensor(self.names.get(name)?)?.shape.clone())
    }

    fn dtype(&self, name: &str) -> Result<Dtype> {
        let dtype = self.tensor(name)?.dtype();
        dtype.map_err(|what| ModelError::unsupported(self.file.path(), format!("tensor {name}: {what}")))
    }

    fn raw(&self, name: &str) -> Result<RawTensor<'_>> {
        let (info, dtype) = (self.tensor(name)?, self.dtype(name)?);
        let stored = self.file.tensor_bytes(info);
        let bytes = match gguf_interleaved_head_dim(&self.config, name) {
            None => Cow::Borrowed(stored),
            Some(head_dim) => Cow::Owned(undo_interleaving(stored, info.shape[0], head_dim)),
        };
        Ok(RawTensor {
            dtype,
            shape: info.shape.clone(),
            bytes,
        })
    }
}

fn undo_interleaving(stored: &[u8], rows: usize, head_dim: usize) -> Vec<u8> {
    let row_bytes = stored.len() / rows;
    let mut out = vec![0; stored.len()];
    for (row, bytes) in stored.chunks_exact(row_bytes).enumerate() {
        let at = gguf_row_to_hf(row, head_dim) * row_bytes;
        out[at..at + row_bytes].copy_from_slice(bytes);
    }
    out
}

fn config(file: &Gguf) -> Result<ModelConfig> {
    let path = file.path();
    let found = file
        .string("general.architecture")
        .ok_or_else(|| ModelError::malformed(path, "general.architecture is missing"))?;
    let family = Family::ALL
        .iter()
        .copied()
        .find(|family| family.spec().gguf_architecture == found);
    let family = family.ok_or_else(|| ModelError::UnknownArchitecture {
        path: path.to_owned(),
        found: found.to_owned(),
        known: Family::ALL
            .iter()
            .map(|family| family.spec().gguf_architecture)
            .collect::<Vec<_>>()
            .join(", "),
    })?;
    let optional = |key: &str| -> Result<Option<usize>> {
        let key = format!("{found}.{key}");
        match file.get(&key) {
            None => Ok(None),
            Some(value) => match file.unsigned(&key).and_then(|value| usize::try_from(value).ok()) {
                Some(value) => Ok(Some(value)),
                None => Err(ModelError::malformed(
                    path,
                    format!("metadata {key} is {value:?}; a whole number is needed"),
                )),
            },
        }
    };
    let required = |key: &str| -> Result<usize> {
        optional(key)?.ok_or_else(|| ModelError::malformed(path, format!("metadata {found}.{key} is missing")))
    };
    if let Some(kind) = file
        .string(&format!("{found}.rope.scaling.type"))
        .filter(|kind| *kind != "none")
    {
        return Err(ModelError::unsupported(
            path,
            format!("rotary scaling of type {kind:?} is not supported"),
        ));
    }
    for (tensor, what) in [
        ("rope_freqs.weight", "scaled rotary frequencies"),
        ("blk.0.attn_q.bias", "biases"),
        ("blk.0.ffn_gate_inp.weight", "experts"),
    ] {
        if file.tensor(tensor).is_some() {
            return Err(ModelError::unsupported(
                path,
                format!("the model has {what} (tensor {tensor}), which this engine does not compute"),
            ));
        }
    }
    let hidden_size = required("embedding_length")?;
    let heads = required("attention.head_count")?;
    let head_dim = match optional("attention.key_length")? {
        Some(dim) => dim,
        None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            return Err(ModelError::malformed(
                path,
                format!("embedding length {hidden_size} is no multiple of {heads} heads"),
            ));
        }
    };
    if let Some(rotated) = optional("rope.dimension_count")?.filter(|rotated| *rotated != head_dim) {
        return Err(ModelError::unsupported(
            path,
            format!("{rotated} of {head_dim} dimensions of a head are rotated; this engine rotates all"),
        ));
    }
    let embedding = file
        .tensor("token_embd.weight")
        .ok_or_else(|| ModelError::malformed(path, "tensor token_embd.weight is missing"))?;
    let id = |key: &str| file.unsigned(key).and_then(|id| u32::try_from(id).ok());
    let mut eos: Vec<u32> = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        eos.extend(id(key).filter(|id| !eos.contains(id)));
    }
    let config = ModelConfig {
        family,
        hidden_size,
        layers: required("block_count")?,
        heads,
        kv_heads: optional("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        intermediate_size: required("feed_forward_length")?,
        vocab_size: embedding.shape[0],
        rope_theta: file.float(&format!("{found}.rope.freq_base")).unwrap_or(10_000.0) as f32,
        norm_eps: file
            .float(&format!("{found}.attention.layer_norm_rms_epsilon"))
            .unwrap_or(1e-5) as f32,
        tie_embeddings: file.tensor("output.weight").is_none(),
        max_positions: required("context_length")?,
        bos: id("tokenizer.ggml.bos_token_id"),
        eos,
    };
    config.check(path)?;
    Ok(config)
}
