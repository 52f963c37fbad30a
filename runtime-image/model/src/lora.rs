//! LoRA adapters as PEFT stores them: `adapter_config.json` and `adapter_model.safetensors` in a folder.
//!
//! An adapter adds `scale · up · down · x` to what a matrix gives for `x`. The scale is multiplied into `up` here.

use std::path::Path;

use serde_json::Value;

use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::family::{Role, StoredTensor, stored_tensors};
use crate::hf::{Safetensors, read_json};
use crate::weights::Weights;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts before HF's name of a tensor.
const PREFIX: &str = "base_model.model.";

/// What an adapter adds to one matrix.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraPart {
    /// The matrix's name, as [`Weights`] knows it.
    pub name: String,
    /// `[rank, inputs]`.
    pub down: Vec<f32>,
    /// `[outputs, rank]`, multiplied by the adapter's scale.
    pub up: Vec<f32>,
}

/// An adapter for a model.
#[derive(Clone, Debug, PartialEq)]
pub struct LoraWeights {
    /// Rows of `down`.
    pub rank: usize,
    /// One for each adapted matrix.
    pub parts: Vec<LoraPart>,
}

impl LoraWeights {
    /// Reads the adapter in `folder` for a model of `config`. A rank above `max_rank` is refused.
    pub fn open(folder: &Path, config: &ModelConfig, max_rank: usize) -> Result<Self> {
        let path = folder.join(CONFIG);
        if !path.exists() {
            return Err(ModelError::missing(
                folder,
                CONFIG,
                "point to a folder that PEFT's save_pretrained wrote",
            ));
        }
        let json = read_json(&path)?;
        let (rank, scale) = shape(&json, max_rank, &path)?;
        let file = folder.join(WEIGHTS);
        if !file.exists() {
            return Err(ModelError::missing(
                folder,
                WEIGHTS,
                "save the adapter with safe_serialization=True",
            ));
        }
        let tensors = Safetensors::open_file(&file)?;
        let mut parts = Vec::new();
        let mut known = 0;
        for tensor in stored_tensors(config) {
            let names = ["lora_A", "lora_B"].map(|which| tensor_name(&tensor, which));
            let found = names.each_ref().map(|name| tensors.shape(name));
            let (Some(down), Some(up)) = (&found[0], &found[1]) else {
                if found.iter().any(Option::is_some) {
                    return Err(ModelError::malformed(
                        &file,
                        format!("{} has only one of lora_A and lora_B", tensor.hf_name),
                    ));
                }
                continue;
            };
            known += 2;
            if tensor.role != Role::Linear {
                return Err(ModelError::unsupported(
                    &file,
                    format!(
                        "{} is adapted; adapters of the matrices in the blocks are supported",
                        tensor.hf_name
                    ),
                ));
            }
            let expected = [vec![rank, tensor.shape[1]], vec![tensor.shape[0], rank]];
            if [down, up] != expected.each_ref() {
                return Err(ModelError::malformed(
                    &file,
                    format!(
                        "{} and {} have shapes {down:?} and {up:?}; this model needs {:?} and {:?}",
                        names[0], names[1], expected[0], expected[1]
                    ),
                ));
            }
            let (down, mut up) = (tensors.f32(&names[0])?, tensors.f32(&names[1])?);
            up.iter_mut().for_each(|x| *x *= scale);
            if let Some(value) = down.iter().chain(&up).find(|value| !value.is_finite()) {
                return Err(ModelError::malformed(
                    &file,
                    format!("the adapter of {} has the value {value}: it is damaged", tensor.hf_name),
                ));
            }
            // The parts of a fused matrix share `down`.
            let mut first = 0;
            for part in &tensor.parts {
                let end = first + part.shape[0] * rank;
                parts.push(LoraPart {
                    name: part.name.clone(),
                    down: down.clone(),
                    up: up[first..end].to_vec(),
                });
                first = end;
            }
        }
        let names = tensors.names();
        if known != names.len() || parts.is_empty() {
            let known = |name: &&&str| {
                stored_tensors(config).iter().any(|tensor| {
                    ["lora_A", "lora_B"]
                        .iter()
                        .any(|which| tensor_name(tensor, which) == **name)
                })
            };
            let other = names.iter().find(|name| !known(name)).map_or("nothing", |name| *name);
            return Err(ModelError::unsupported(
                &file,
                format!(
                    "it holds {other}, which is no part of an adapter of this {} model with {} layers",
                    config.family.name(),
                    config.layers
                ),
            ));
        }
        Ok(LoraWeights { rank, parts })
    }
}

fn tensor_name(tensor: &StoredTensor, which: &str) -> String {
    let stem = tensor.hf_name.strip_suffix(".weight").unwrap_or(&tensor.hf_name);
    format!("{PREFIX}{stem}.{which}.weight")
}

/// Rank and scale, once nothing is asked for that is not computed here.
fn shape(json: &Value, max_rank: usize, path: &Path) -> Result<(usize, f32)> {
    if json["peft_type"] != "LORA" {
        return Err(ModelError::unsupported(
            path,
            format!("peft_type is {}; \"LORA\" is supported", json["peft_type"]),
        ));
    }
    let off = |value: &Value| match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text == "none",
        _ => false,
    };
    for key in [
        "use_dora",
        "use_qalora",
        "lora_bias",
        "fan_in_fan_out",
        "modules_to_save",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "layer_replication",
        "trainable_token_indices",
        "target_parameters",
        "alora_invocation_tokens",
    ] {
        if !off(&json[key]) {
            return Err(ModelError::unsupported(
                path,
                format!("{key} is {}; adapters without it are supported", json[key]),
            ));
        }
    }
    let rank = json["r"]
        .as_u64()
        .and_then(|rank| usize::try_from(rank).ok())
        .unwrap_or(0);
    if rank == 0 || rank > max_rank {
        return Err(ModelError::InvalidRequest {
            path: path.to_owned(),
            what: format!("the adapter's rank is {rank}; 1 to {max_rank} are accepted: raise --max-lora-rank"),
        });
    }
    let alpha = json["lora_alpha"].as_f64().filter(|alpha| alpha.is_finite());
    let alpha = alpha.ok_or_else(|| ModelError::malformed(path, "lora_alpha is no number"))?;
    let root = json["use_rslora"] == true;
    let scale = alpha / if root { (rank as f64).sqrt() } else { rank as f64 };
    Ok((rank, scale as f32))
}
