//! A model's shape: the numbers that both executors, the readers and the writers agree on.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::{ModelError, Result};
use crate::family::Family;

/// The shape of a decoder-only transformer.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Which architecture the tensors belong to.
    pub family: Family,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Number of transformer blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Width inside the feed-forward part.
    pub intermediate_size: usize,
    /// Number of token ids.
    pub vocab_size: usize,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Added to the mean square in RMSNorm.
    pub norm_eps: f32,
    /// The output matrix is the embedding matrix.
    pub tie_embeddings: bool,
    /// The most positions the model was made for.
    pub max_positions: usize,
    /// Token that opens a text, where the model has one.
    pub bos: Option<u32>,
    /// Tokens that end a text; the first is the one the tokenizer names.
    pub eos: Vec<u32>,
}

/// The largest value each number may have; a file that says more is hostile or corrupt, and sizes computed from numbers
/// inside these bounds fit into 64 bits.
const BOUNDS: &[(&str, usize)] = &[
    ("hidden size", 1 << 16),
    ("layers", 1 << 10),
    ("heads", 1 << 10),
    ("kv heads", 1 << 10),
    ("head dimension", 1 << 12),
    ("intermediate size", 1 << 19),
    ("vocabulary size", 1 << 22),
    ("positions", 1 << 24),
];

impl ModelConfig {
    /// Checks that the numbers fit together. `path` is named in the error.
    pub fn check(&self, path: &Path) -> Result<()> {
        let values = [
            self.hidden_size,
            self.layers,
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.intermediate_size,
            self.vocab_size,
            self.max_positions,
        ];
        for ((name, most), value) in BOUNDS.iter().zip(values) {
            if value == 0 || value > *most {
                return Err(ModelError::malformed(
                    path,
                    format!("{name} is {value}; it must lie in 1..={most}"),
                ));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(ModelError::malformed(
                path,
                format!("{} heads cannot share {} kv heads evenly", self.heads, self.kv_heads),
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ModelError::malformed(
                path,
                format!("head dimension {} is odd; rotary embeddings need pairs", self.head_dim),
            ));
        }
        if !(self.rope_theta.is_finite() && self.rope_theta > 1.0) {
            return Err(ModelError::malformed(
                path,
                format!("rope theta is {}; it must be a number above 1", self.rope_theta),
            ));
        }
        if !(self.norm_eps.is_finite() && self.norm_eps > 0.0 && self.norm_eps < 1.0) {
            return Err(ModelError::malformed(
                path,
                format!("the norm's epsilon is {}; it must lie between 0 and 1", self.norm_eps),
            ));
        }
        self.check_ids(self.bos.iter().chain(&self.eos), path)
    }

    /// Checks that tokens which a file names are among the model's.
    pub(crate) fn check_ids<'a>(&self, ids: impl IntoIterator<Item = &'a u32>, path: &Path) -> Result<()> {
        match ids.into_iter().find(|id| **id as usize >= self.vocab_size) {
            None => Ok(()),
            Some(id) => Err(ModelError::malformed(
                path,
                format!(
                    "special token id {id} is outside of the vocabulary of {}",
                    self.vocab_size
                ),
            )),
        }
    }

    /// Number of parameters; tied embeddings count once.
    pub fn parameters(&self) -> u64 {
        crate::family::tensors(self)
            .iter()
            .map(|tensor| tensor.elements() as u64)
            .sum()
    }

    /// Reads the object of an HF `config.json`. `path` is named in errors.
    pub fn from_hf(value: &Value, path: &Path) -> Result<Self> {
        let object = value
            .as_object()
            .ok_or_else(|| ModelError::malformed(path, "the top level is not an object"))?;
        let family = family_of(object, path)?;
        for key in ["attention_bias", "mlp_bias"] {
            if object.get(key).and_then(Value::as_bool) == Some(true) {
                return Err(ModelError::unsupported(
                    path,
                    format!("{key} is true; this engine has no biases for {}", family.name()),
                ));
            }
        }
        if let Some(act) = object
            .get("hidden_act")
            .and_then(Value::as_str)
            .filter(|act| *act != "silu")
        {
            return Err(ModelError::unsupported(
                path,
                format!("hidden_act is {act:?}; this engine computes silu for {}", family.name()),
            ));
        }
        let hidden_size = number(object, "hidden_size", path)?;
        let heads = number(object, "num_attention_heads", path)?;
        let kv_heads = optional_number(object, "num_key_value_heads", path)?.unwrap_or(heads);
        let head_dim = match optional_number(object, "head_dim", path)? {
            Some(dim) => dim,
            None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                return Err(ModelError::malformed(
                    path,
                    format!("hidden_size {hidden_size} is no multiple of {heads} heads, and head_dim is absent"),
                ));
            }
        };
        let config = ModelConfig {
            family,
            hidden_size,
            layers: number(object, "num_hidden_layers", path)?,
            heads,
            kv_heads,
            head_dim,
            intermediate_size: number(object, "intermediate_size", path)?,
            vocab_size: number(object, "vocab_size", path)?,
            rope_theta: rope_theta(object, path)?,
            norm_eps: object.get("rms_norm_eps").and_then(Value::as_f64).unwrap_or(1e-6) as f32,
            tie_embeddings: object
                .get("tie_word_embeddings")
                .and_then(Value::as_bool)
                .unwrap_or(false),
            max_positions: optional_number(object, "max_position_embeddings", path)?.unwrap_or(2048),
            bos: ids(object.get("bos_token_id"), path)?.first().copied(),
            eos: ids(object.get("eos_token_id"), path)?,
        };
        config.check(path)?;
        Ok(config)
    }

    /// The object of an HF `config.json`. `dtype` is the stored tensors' type in torch's words.
    pub fn to_hf(&self, dtype: &str) -> Value {
        let eos = match self.eos.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            many => json!(many),
        };
        json!({
            "architectures": [self.family.spec().hf_architecture],
            "model_type": self.family.spec().hf_model_type,
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos,
            "eos_token_id": eos,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_positions,
            "mlp_bias": false,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": decimal(self.norm_eps),
            "rope_scaling": null,
            "rope_theta": decimal(self.rope_theta),
            "tie_word_embeddings": self.tie_embeddings,
            "torch_dtype": dtype,
            "use_cache": true,
            "vocab_size": self.vocab_size,
        })
    }
}

/// The shortest decimal of an `f32`: 1e-5 rather than 9.999999747378752e-6.
pub(crate) fn decimal(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(f64::from(value))
}

fn family_of(object: &Map<String, Value>, path: &Path) -> Result<Family> {
    let names = object.get("architectures").and_then(Value::as_array);
    let name = names.and_then(|names| names.first()).and_then(Value::as_str);
    let model_type = object.get("model_type").and_then(Value::as_str);
    Family::ALL
        .iter()
        .copied()
        .find(|family| match name {
            Some(name) => family.spec().hf_architecture == name,
            None => model_type == Some(family.spec().hf_model_type),
        })
        .ok_or_else(|| ModelError::UnknownArchitecture {
            path: path.to_owned(),
            found: name.or(model_type).unwrap_or("none named").to_owned(),
            known: Family::ALL
                .iter()
                .map(|family| family.spec().hf_architecture)
                .collect::<Vec<_>>()
                .join(", "),
        })
}

/// `rope_theta` stands at the top in older files and in `rope_parameters` in newer ones; scaled rotary embeddings are refused.
fn rope_theta(object: &Map<String, Value>, path: &Path) -> Result<f32> {
    let nested = ["rope_parameters", "rope_scaling"]
        .into_iter()
        .filter_map(|key| object.get(key)?.as_object());
    let mut theta = object.get("rope_theta").and_then(Value::as_f64);
    for rope in nested {
        let kind = rope
            .get("rope_type")
            .or_else(|| rope.get("type"))
            .and_then(Value::as_str)
            .unwrap_or("default");
        if kind != "default" {
            return Err(ModelError::unsupported(
                path,
                format!("rotary embeddings of type {kind:?} are not supported; only \"default\" is"),
            ));
        }
        theta = theta.or_else(|| rope.get("rope_theta").and_then(Value::as_f64));
    }
    Ok(theta.unwrap_or(10_000.0) as f32)
}

fn number(object: &Map<String, Value>, key: &str, path: &Path) -> Result<usize> {
    optional_number(object, key, path)?.ok_or_else(|| ModelError::malformed(path, format!("{key} is absent")))
}

fn optional_number(object: &Map<String, Value>, key: &str, path: &Path) -> Result<Option<usize>> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64().and_then(|value| usize::try_from(value).ok()) {
            Some(value) => Ok(Some(value)),
            None => Err(ModelError::malformed(
                path,
                format!("{key} is {value}; a whole number is needed"),
            )),
        },
    }
}

/// Token ids given as null, one number or a list.
pub(crate) fn ids(value: Option<&Value>, path: &Path) -> Result<Vec<u32>> {
    let list = match value {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Array(list)) => list.as_slice(),
        Some(one) => std::slice::from_ref(one),
    };
    list.iter()
        .map(|id| {
            id.as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .ok_or_else(|| ModelError::malformed(path, format!("{id} is no token id")))
        })
        .collect()
}
