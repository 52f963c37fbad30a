//! A GGUF file as a model: its metadata as [`ModelConfig`], its tensors in HF's names and row order.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;

use super::parse::{Gguf, TensorInfo};
use super::tokenizer::tokenizer_json;
use super::{GENERATION, rope};
use crate::config::{ModelConfig, Variant};
use crate::dtype::Dtype;
use crate::error::{ModelError, Result};
use crate::family::{Family, Locality, Role, gguf_interleaved_head_dim, gguf_row_to_hf, tensors};
use crate::generation::GenerationConfig;
use crate::places::{Place, Places};
use crate::weights::{RawTensor, Weights, check_tensors};

/// The tensors of a GGUF file.
#[derive(Debug)]
pub struct GgufModel {
    file: Gguf,
    config: ModelConfig,
    places: Places,
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
    let places = Places::new(&config);
    let model = GgufModel { file, config, places };
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

    fn tensor(&self, name: &str) -> Result<(&Place, &TensorInfo)> {
        let place = self.places.get(name);
        let found = place.and_then(|place| Some((place, self.file.tensor(&place.gguf)?)));
        found.ok_or_else(|| ModelError::malformed(self.file.path(), format!("tensor {name} is missing")))
    }
}

impl Weights for GgufModel {
    fn release(&self) {
        self.file.release();
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let place = self.places.get(name)?;
        Some(place.shape(self.file.tensor(&place.gguf)?.shape.clone()))
    }

    fn dtype(&self, name: &str) -> Result<Dtype> {
        let dtype = self.tensor(name)?.1.dtype();
        dtype.map_err(|what| ModelError::unsupported(self.file.path(), format!("tensor {name}: {what}")))
    }

    fn raw(&self, name: &str) -> Result<RawTensor<'_>> {
        let ((place, info), dtype) = (self.tensor(name)?, self.dtype(name)?);
        let shape = place.shape(info.shape.clone());
        let stored = place.bytes(self.file.tensor_bytes(info));
        let offset = self.config.family.spec().norm_offset;
        if place.role == Role::Norm && offset != 0.0 {
            let mut values = vec![0.0; shape.iter().product()];
            dtype.to_f32(stored, &mut values);
            return Ok(RawTensor {
                dtype: Dtype::F32,
                shape,
                bytes: values.iter().flat_map(|x| (x - offset).to_le_bytes()).collect(),
            });
        }
        let bytes = match gguf_interleaved_head_dim(&self.config, name) {
            None => Cow::Borrowed(stored),
            Some(head_dim) => Cow::Owned(undo_interleaving(stored, shape[0], head_dim)),
        };
        Ok(RawTensor { dtype, shape, bytes })
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
        known: architectures(),
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
    for (tensor, what) in [
        ("blk.0.attn_q.bias", "biases"),
        ("blk.0.attn_qkv.bias", "biases"),
        ("blk.0.attn_output.bias", "biases"),
        ("blk.0.ffn_gate_inp.weight", "experts"),
    ] {
        if file.tensor(tensor).is_some() && !(family.spec().qkv_bias && tensor == "blk.0.attn_q.bias") {
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
    let layers = required("block_count")?;
    let max_positions = required("context_length")?;
    let rotary_dim = optional("rope.dimension_count")?.filter(|rotated| *rotated != head_dim);
    let float = |key: &str| file.float(&format!("{found}.{key}")).map(|value| value as f32);
    let defaults = family.spec().defaults;
    let window = optional("attention.sliding_window")?.filter(|window| *window > 0);
    // A window is what tells Mistral from Llama, which share their architecture in GGUF.
    let family = match window {
        Some(_) if family == Family::Llama => Family::Mistral,
        _ => family,
    };
    let window = window.filter(|_| family.spec().locality != Locality::Named && layers <= 1 << 10);
    let query_scale = assumed_query_scale(family, layers, hidden_size, heads);
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
        layers,
        heads,
        kv_heads: optional("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        intermediate_size: required("feed_forward_length")?,
        vocab_size: embedding.shape[0],
        rope_theta: float("rope.freq_base").unwrap_or(defaults.rope_theta),
        norm_eps: float("attention.layer_norm_rms_epsilon").unwrap_or(1e-5),
        tie_embeddings: file.tensor("output.weight").is_none(),
        max_positions,
        bos: id("tokenizer.ggml.bos_token_id"),
        eos,
        variant: Variant {
            rope: rope::read(file, found, max_positions)?,
            rotary_dim,
            query_scale: query_scale.filter(|scale| *scale != head_dim as f32),
            attention_soft_cap: float("attn_logit_softcapping").or(defaults.soft_caps.0),
            logit_soft_cap: float("final_logit_softcapping").or(defaults.soft_caps.1),
            window,
            local_layers: window.map_or(Vec::new(), |_| family.local_layers(layers)),
            local_rope_theta: window.and(
                defaults
                    .local_rope_theta
                    .map(|theta| float("rope.freq_base_swa").unwrap_or(theta)),
            ),
        },
    };
    config.check(path)?;
    Ok(config)
}

/// What scores are scaled by, where it is not the head's width. GGUF has no key for it: the largest Gemmas divide by the width
/// of the model over its heads, and llama.cpp knows them by their number of layers.
pub(super) fn assumed_query_scale(family: Family, layers: usize, hidden_size: usize, heads: usize) -> Option<f32> {
    let large = matches!((family, layers), (Family::Gemma2, 46) | (Family::Gemma3, 62));
    (large && heads > 0).then(|| (hidden_size / heads) as f32)
}

fn architectures() -> String {
    let mut names: Vec<&str> = Family::ALL
        .iter()
        .map(|family| family.spec().gguf_architecture)
        .collect();
    names.dedup();
    names.join(", ")
}
