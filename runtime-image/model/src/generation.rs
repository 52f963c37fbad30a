//! How the model's makers want it sampled: HF's `generation_config.json`.

use std::path::Path;

use serde_json::{Value, json};

use crate::config::{decimal, ids};
use crate::error::Result;

/// Defaults for generation that come with a model.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    /// Tokens that end an answer.
    pub eos: Vec<u32>,
    /// Sampling temperature; 0 is greedy.
    pub temperature: Option<f32>,
    /// Nucleus: sample among the most likely tokens that together have this probability.
    pub top_p: Option<f32>,
    /// Sample among this many most likely tokens.
    pub top_k: Option<usize>,
}

impl GenerationConfig {
    /// Reads the object of `generation_config.json`; `path` is named in errors.
    pub fn from_hf(value: &Value, path: &Path) -> Result<Self> {
        // Without `do_sample` HF ignores the sampling numbers.
        let sampled = value["do_sample"].as_bool() == Some(true);
        let float = |key: &str| value[key].as_f64().filter(|_| sampled).map(|number| number as f32);
        Ok(GenerationConfig {
            eos: ids(value.get("eos_token_id"), path)?,
            temperature: float("temperature"),
            top_p: float("top_p"),
            top_k: value["top_k"]
                .as_u64()
                .filter(|_| sampled)
                .and_then(|k| usize::try_from(k).ok()),
        })
    }

    /// The object of `generation_config.json`.
    pub fn to_hf(&self, bos: Option<u32>) -> Value {
        let mut object = json!({ "bos_token_id": bos, "eos_token_id": self.eos });
        if self.temperature.is_some() || self.top_p.is_some() || self.top_k.is_some() {
            object["do_sample"] = json!(true);
        }
        for (key, value) in [("temperature", self.temperature), ("top_p", self.top_p)] {
            if let Some(value) = value {
                object[key] = json!(decimal(value));
            }
        }
        if let Some(k) = self.top_k {
            object["top_k"] = json!(k);
        }
        object
    }
}
