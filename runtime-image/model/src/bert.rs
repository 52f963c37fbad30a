//! Encoders of BERT's architecture, as sentence-transformers publishes them: a text to one vector. They share nothing with
//! the generating families but their files' formats.

pub mod synthetic;

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use crate::error::{ModelError, Result};
use crate::hf::{Safetensors, files, read_json};
use crate::tokenizer::Vocabulary;
use crate::weights::Weights;

/// Architectures that are read.
const ARCHITECTURES: [&str; 3] = ["BertModel", "BertForMaskedLM", "BertForPreTraining"];
/// What sentence-transformers does with the vectors of the tokens.
const MODULES: &str = "modules.json";
const POOLING: &str = "1_Pooling/config.json";
/// How long texts were in its training.
const SENTENCE: &str = "sentence_bert_config.json";
/// The largest of each size: a configuration that says more is damaged.
const MOST: usize = 1 << 20;

/// How the vectors of the tokens become the text's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pooling {
    /// Their mean.
    Mean,
    /// That of the first token.
    First,
}

/// An encoder's shape.
#[derive(Clone, Debug, PartialEq)]
pub struct BertConfig {
    /// Length of a token's vector, and of the text's.
    pub hidden_size: usize,
    /// Length of the vectors inside of the feed-forward layers.
    pub intermediate_size: usize,
    /// Layers.
    pub layers: usize,
    /// Attention heads; they divide `hidden_size`.
    pub heads: usize,
    /// Tokens that it knows.
    pub vocab_size: usize,
    /// Kinds of segments; texts here have one, the first.
    pub segments: usize,
    /// The most tokens of a text that the weights have positions for.
    pub max_positions: usize,
    /// The most tokens of a text that it was made for; at most `max_positions`.
    pub max_tokens: usize,
    /// What keeps layer normalization from a division by zero.
    pub norm_eps: f32,
    /// How a text's vector is made.
    pub pooling: Pooling,
    /// Whether it has length 1.
    pub normalize: bool,
}

/// An encoder with its files' content.
pub struct Bert {
    /// Its shape.
    pub config: BertConfig,
    /// Its tensors, mapped.
    pub weights: Arc<dyn Weights>,
    /// What stands before the names of its tensors.
    pub prefix: &'static str,
    /// Its tokenizer.
    pub vocabulary: Arc<Vocabulary>,
}

impl Bert {
    /// Whether `path` is a folder with such an encoder.
    pub fn is_at(path: &Path) -> bool {
        let config = path.join(files::CONFIG);
        config.exists() && read_json(&config).is_ok_and(|json| is_bert(&json))
    }

    /// Opens a folder.
    pub fn open(folder: &Path) -> Result<Self> {
        let config = BertConfig::open(folder)?;
        let weights = Safetensors::open_folder(folder)?;
        let prefix = match weights.shape("embeddings.word_embeddings.weight") {
            Some(_) => "",
            None => "bert.",
        };
        for (name, shape) in config.tensors() {
            let name = format!("{prefix}{name}");
            match weights.shape(&name) {
                Some(found) if found == shape => (),
                Some(found) => {
                    let what = format!("tensor {name} has shape {found:?}; the configuration needs {shape:?}");
                    return Err(ModelError::malformed(folder, what));
                }
                None => return Err(ModelError::malformed(folder, format!("tensor {name} is missing"))),
            }
        }
        let vocabulary = Vocabulary::from_json(&read_json(&folder.join(files::TOKENIZER))?)?;
        if vocabulary.size() > config.vocab_size {
            let (has, knows) = (vocabulary.size(), config.vocab_size);
            let what = format!("the tokenizer has {has} tokens, the model only {knows}");
            return Err(ModelError::malformed(folder, what));
        }
        Ok(Bert {
            config,
            weights: Arc::new(weights),
            prefix,
            vocabulary: Arc::new(vocabulary),
        })
    }
}

fn is_bert(json: &Value) -> bool {
    json["architectures"][0]
        .as_str()
        .is_some_and(|name| ARCHITECTURES.contains(&name))
}

impl BertConfig {
    fn open(folder: &Path) -> Result<Self> {
        let optional = |name: &str| {
            let path = folder.join(name);
            path.exists().then(|| read_json(&path)).transpose()
        };
        let path = folder.join(files::CONFIG);
        let mut config = Self::from_json(&read_json(&path)?, &path)?;
        if let Some(modules) = optional(MODULES)? {
            config.modules(&modules, &folder.join(MODULES))?;
        }
        if let Some(pooling) = optional(POOLING)? {
            config.pooling = pooling_of(&pooling, &folder.join(POOLING))?;
        }
        if let Some(length) = optional(SENTENCE)?.and_then(|json| json["max_seq_length"].as_u64()) {
            config.max_tokens = (length as usize).clamp(1, config.max_positions);
        }
        Ok(config)
    }

    /// Reads the object of a `config.json`. Without more files the pooling is the usual one: the mean, with length 1.
    fn from_json(json: &Value, path: &Path) -> Result<Self> {
        let size = |key: &str| match json[key].as_u64() {
            Some(size) if size > 0 && size <= MOST as u64 => Ok(size as usize),
            _ => Err(ModelError::malformed(
                path,
                format!("{key} must be a number of 1 to {MOST}; got {}", json[key]),
            )),
        };
        for (key, only) in [("hidden_act", "gelu"), ("position_embedding_type", "absolute")] {
            match json[key].as_str() {
                None => (),
                Some(found) if found == only => (),
                Some(found) => {
                    return Err(ModelError::unsupported(
                        path,
                        format!("{key} is {found:?}; only {only} is read"),
                    ));
                }
            }
        }
        let config = BertConfig {
            hidden_size: size("hidden_size")?,
            intermediate_size: size("intermediate_size")?,
            layers: size("num_hidden_layers")?,
            heads: size("num_attention_heads")?,
            vocab_size: size("vocab_size")?,
            segments: size("type_vocab_size")?,
            max_positions: size("max_position_embeddings")?,
            max_tokens: size("max_position_embeddings")?,
            norm_eps: json["layer_norm_eps"].as_f64().unwrap_or(1e-12) as f32,
            pooling: Pooling::Mean,
            normalize: true,
        };
        if !config.hidden_size.is_multiple_of(config.heads) {
            let (heads, size) = (config.heads, config.hidden_size);
            return Err(ModelError::malformed(
                path,
                format!("{heads} heads do not divide hidden_size {size}"),
            ));
        }
        Ok(config)
    }

    /// Takes over what `modules.json` says. A module that is not known would change the vector.
    fn modules(&mut self, modules: &Value, path: &Path) -> Result<()> {
        self.normalize = false;
        for module in modules.as_array().into_iter().flatten() {
            let kind = module["type"].as_str().unwrap_or_default();
            match kind.rsplit('.').next() {
                Some("Transformer" | "Pooling") => (),
                Some("Normalize") => self.normalize = true,
                _ => {
                    return Err(ModelError::unsupported(
                        path,
                        format!("module {kind:?}; Pooling and Normalize are done"),
                    ));
                }
            }
        }
        Ok(())
    }

    /// All tensors that are used, with their shapes; slowest size first.
    fn tensors(&self) -> Vec<(String, Vec<usize>)> {
        let (hidden, inner) = (self.hidden_size, self.intermediate_size);
        let mut all = vec![
            (
                "embeddings.word_embeddings.weight".to_owned(),
                vec![self.vocab_size, hidden],
            ),
            (
                "embeddings.position_embeddings.weight".to_owned(),
                vec![self.max_positions, hidden],
            ),
            (
                "embeddings.token_type_embeddings.weight".to_owned(),
                vec![self.segments, hidden],
            ),
        ];
        let mut both = |name: String, outputs: usize, inputs: Option<usize>| {
            let sizes = std::iter::once(outputs).chain(inputs).collect();
            all.push((format!("{name}.weight"), sizes));
            all.push((format!("{name}.bias"), vec![outputs]));
        };
        both("embeddings.LayerNorm".to_owned(), hidden, None);
        for layer in 0..self.layers {
            let name = |part: &str| format!("encoder.layer.{layer}.{part}");
            for part in ["query", "key", "value"] {
                both(name(&format!("attention.self.{part}")), hidden, Some(hidden));
            }
            both(name("attention.output.dense"), hidden, Some(hidden));
            both(name("attention.output.LayerNorm"), hidden, None);
            both(name("intermediate.dense"), inner, Some(hidden));
            both(name("output.dense"), hidden, Some(inner));
            both(name("output.LayerNorm"), hidden, None);
        }
        all
    }
}

fn pooling_of(json: &Value, path: &Path) -> Result<Pooling> {
    let on = |key: &str| json[format!("pooling_mode_{key}")] == true;
    let others = ["max_tokens", "mean_sqrt_len_tokens", "weightedmean_tokens", "lasttoken"];
    match (on("mean_tokens"), on("cls_token"), others.into_iter().any(on)) {
        (true, false, false) => Ok(Pooling::Mean),
        (false, true, false) => Ok(Pooling::First),
        _ => Err(ModelError::unsupported(
            path,
            "this pooling; mean_tokens or cls_token alone is done",
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_would_give_another_vector_is_refused_and_named() {
        let good = json!({
            "architectures": ["BertModel"], "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6,
            "num_attention_heads": 12, "vocab_size": 30522, "type_vocab_size": 2, "max_position_embeddings": 512,
        });
        let path = Path::new("config.json");
        let config = BertConfig::from_json(&good, path).expect("MiniLM's");
        assert_eq!(
            (config.pooling, config.normalize, config.norm_eps),
            (Pooling::Mean, true, 1e-12)
        );
        assert!(is_bert(&good) && !is_bert(&json!({ "architectures": ["LlamaForCausalLM"] })) && !is_bert(&json!([])));
        for (key, value) in [
            ("hidden_size", json!(0)),
            ("num_attention_heads", json!(7)),
            ("vocab_size", json!(1u64 << 40)),
            ("num_hidden_layers", json!("six")),
            ("hidden_act", json!("gelu_new")),
            ("position_embedding_type", json!("relative_key")),
        ] {
            let mut bad = good.clone();
            bad[key] = value;
            let error = BertConfig::from_json(&bad, path).expect_err(key).to_string();
            assert!(
                error.contains("config.json") && (error.contains(key) || key == "num_attention_heads"),
                "{error}"
            );
        }
        let mut modules = config.clone();
        let transformers = json!([{ "type": "sentence_transformers.models.Transformer" }]);
        modules.modules(&transformers, path).expect("known");
        assert!(!modules.normalize);
        let dense = json!([{ "type": "sentence_transformers.models.Dense" }]);
        assert!(
            modules
                .modules(&dense, path)
                .expect_err("Dense")
                .to_string()
                .contains("Dense")
        );
        assert_eq!(
            pooling_of(&json!({ "pooling_mode_cls_token": true }), path).expect("known"),
            Pooling::First
        );
        let both = json!({ "pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true });
        assert!(pooling_of(&both, path).is_err() && pooling_of(&json!({}), path).is_err());
    }
}
