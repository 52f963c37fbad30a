//! A model's shape: the numbers that both executors, the readers and the writers agree on.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::error::{ModelError, Result};
use crate::family::{Activation, Family, Locality};
use crate::rope::RopeScaling;

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
    /// What goes beyond this.
    pub variant: Variant,
}

/// What some models have beyond Llama's shape.
#[derive(Clone, Debug, PartialEq)]
pub struct Variant {
    /// Stretched rotary frequencies; those of local layers are plain where they have a base of their own.
    pub rope: RopeScaling,
    /// The first dimensions of a head that are turned; `None`: all.
    pub rotary_dim: Option<usize>,
    /// Scores are divided by the square root of this; `None`: of the head's width.
    pub query_scale: Option<f32>,
    /// Scores are `cap · tanh(score / cap)`.
    pub attention_soft_cap: Option<f32>,
    /// Logits are `cap · tanh(logit / cap)`.
    pub logit_soft_cap: Option<f32>,
    /// The last tokens, its own included, that a token of a local layer looks back on.
    pub window: Option<usize>,
    /// Which layers are local; empty without a window.
    pub local_layers: Vec<bool>,
    /// Base of the rotary frequencies in local layers; `None`: the same as elsewhere.
    pub local_rope_theta: Option<f32>,
}

impl Variant {
    /// Nothing beyond Llama's shape.
    pub const PLAIN: Variant = Variant {
        rope: RopeScaling::None,
        rotary_dim: None,
        query_scale: None,
        attention_soft_cap: None,
        logit_soft_cap: None,
        window: None,
        local_layers: Vec::new(),
        local_rope_theta: None,
    };
}

impl Default for Variant {
    fn default() -> Self {
        Self::PLAIN
    }
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
        self.check_variant(path)?;
        self.check_ids(self.bos.iter().chain(&self.eos), path)
    }

    fn check_variant(&self, path: &Path) -> Result<()> {
        let Variant {
            rope,
            rotary_dim,
            query_scale,
            attention_soft_cap,
            logit_soft_cap,
            window,
            local_layers,
            local_rope_theta,
        } = &self.variant;
        let rotary = self.rotary_dim();
        if rotary == 0 || rotary > self.head_dim || !rotary.is_multiple_of(2) {
            return Err(ModelError::malformed(
                path,
                format!(
                    "{rotary_dim:?} of {} dimensions of a head cannot be turned in pairs",
                    self.head_dim
                ),
            ));
        }
        for (name, value) in [
            ("query scale", query_scale),
            ("soft cap of scores", attention_soft_cap),
            ("soft cap of logits", logit_soft_cap),
            ("local rope theta", local_rope_theta),
        ] {
            if let Some(value) = value.filter(|value| !(value.is_finite() && *value > 0.0)) {
                return Err(ModelError::malformed(
                    path,
                    format!("the {name} is {value}; it must be above 0"),
                ));
            }
        }
        let layers = if window.is_some() { self.layers } else { 0 };
        if *window == Some(0) || local_layers.len() != layers {
            return Err(ModelError::malformed(
                path,
                format!(
                    "a window of {window:?} tokens with {} layers marked as local or not",
                    local_layers.len()
                ),
            ));
        }
        rope.check(rotary, path)
    }

    /// How many dimensions of a head are turned.
    pub fn rotary_dim(&self) -> usize {
        self.variant.rotary_dim.unwrap_or(self.head_dim)
    }

    /// The window of layer `layer`, if it is local.
    pub fn window_of(&self, layer: usize) -> Option<usize> {
        let local = self.variant.local_layers.get(layer).copied().unwrap_or(false);
        self.variant.window.filter(|_| local)
    }

    /// Refuses what training does not compute: everything but the plain Llama. `path` is named in the error.
    pub fn check_trainable(&self, path: &Path) -> Result<()> {
        if self.family == Family::Llama && self.variant == Variant::PLAIN {
            return Ok(());
        }
        let beyond = match self.family {
            Family::Llama => "with scaled rotary embeddings or a window ",
            _ => "",
        };
        Err(ModelError::unsupported(
            path,
            format!(
                "a model of family {:?} {beyond}can be served and quantized, but not trained: train a plain Llama such as \
                 SmolLM2",
                self.family.name()
            ),
        ))
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
        let (spec, defaults) = (family.spec(), family.spec().defaults);
        for key in ["attention_bias", "mlp_bias", "use_bidirectional_attention"] {
            if object.get(key).and_then(Value::as_bool) == Some(true) {
                return Err(ModelError::unsupported(
                    path,
                    format!("{key} is true; this engine does not compute that for {}", family.name()),
                ));
            }
        }
        check_activation(object, family, path)?;
        let hidden_size = number(object, "hidden_size", path)?;
        let layers = number(object, "num_hidden_layers", path)?;
        let heads = number(object, "num_attention_heads", path)?;
        let kv_heads = optional_number(object, "num_key_value_heads", path)?.unwrap_or(heads);
        let head_dim = match optional_number(object, "head_dim", path)?.or(defaults.head_dim) {
            Some(dim) => dim,
            None if heads > 0 && hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                return Err(ModelError::malformed(
                    path,
                    format!("hidden_size {hidden_size} is no multiple of {heads} heads, and head_dim is absent"),
                ));
            }
        };
        let float = |key: &str, default: Option<f32>| match object.get(key) {
            None => default,
            Some(value) => value.as_f64().map(|value| value as f32),
        };
        let rope = Rope::from_hf(object, family, path)?;
        let local_layers = local_layers(object, family, layers, path)?;
        let window = match object.get("sliding_window") {
            None => defaults.window,
            Some(_) => optional_number(object, "sliding_window", path)?,
        };
        let window = window.filter(|_| local_layers.contains(&true));
        let config = ModelConfig {
            family,
            hidden_size,
            layers,
            heads,
            kv_heads,
            head_dim,
            intermediate_size: number(object, "intermediate_size", path)?,
            vocab_size: number(object, "vocab_size", path)?,
            rope_theta: rope.theta,
            norm_eps: object.get("rms_norm_eps").and_then(Value::as_f64).unwrap_or(1e-6) as f32,
            tie_embeddings: object
                .get("tie_word_embeddings")
                .and_then(Value::as_bool)
                .unwrap_or(defaults.tied),
            max_positions: optional_number(object, "max_position_embeddings", path)?.unwrap_or(2048),
            bos: ids(object.get("bos_token_id"), path)?.first().copied(),
            eos: ids(object.get("eos_token_id"), path)?,
            variant: Variant {
                rope: rope.scaling,
                rotary_dim: rope
                    .partial
                    .map(|share| (head_dim as f64 * share) as usize)
                    .filter(|dim| *dim != head_dim),
                query_scale: float("query_pre_attn_scalar", None)
                    .filter(|scale| spec.post_norms && *scale != head_dim as f32),
                attention_soft_cap: float("attn_logit_softcapping", defaults.soft_caps.0),
                logit_soft_cap: float("final_logit_softcapping", defaults.soft_caps.1),
                window,
                local_layers: window.map_or(Vec::new(), |_| local_layers),
                local_rope_theta: window.and(rope.local_theta),
            },
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
        let (spec, variant) = (self.family.spec(), &self.variant);
        let mut config = json!({
            "architectures": [spec.hf_architecture],
            "model_type": spec.hf_model_type,
            "attention_bias": false,
            "attention_dropout": 0.0,
            "bos_token_id": self.bos,
            "eos_token_id": eos,
            "head_dim": self.head_dim,
            "hidden_act": activation_names(spec.activation)[0],
            "hidden_size": self.hidden_size,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_positions,
            "mlp_bias": false,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": decimal(self.norm_eps),
            "rope_scaling": variant.rope.to_hf(),
            "rope_theta": decimal(self.rope_theta),
            "tie_word_embeddings": self.tie_embeddings,
            "torch_dtype": dtype,
            "use_cache": true,
            "vocab_size": self.vocab_size,
        });
        let mut set = |key: &str, value: Value| {
            config[key] = value;
        };
        if spec.activation == Activation::GeluTanh {
            set("hidden_activation", json!(activation_names(spec.activation)[0]));
        }
        if spec.post_norms {
            let scale = variant.query_scale.unwrap_or(self.head_dim as f32);
            set("query_pre_attn_scalar", json!(scale as u64));
            set("attn_logit_softcapping", json!(variant.attention_soft_cap.map(decimal)));
            set("final_logit_softcapping", json!(variant.logit_soft_cap.map(decimal)));
        }
        if let Some(theta) = variant.local_rope_theta {
            set("rope_local_base_freq", json!(decimal(theta)));
        }
        if let Some(dim) = variant.rotary_dim {
            set("partial_rotary_factor", json!(dim as f64 / self.head_dim as f64));
        }
        if let RopeScaling::LongRope { original_positions, .. } = &variant.rope {
            set("original_max_position_embeddings", json!(original_positions));
        }
        // Silence would mean the family's default.
        if variant.window.is_some() || spec.defaults.window.is_some() {
            set("sliding_window", json!(variant.window));
        }
        if variant.window.is_some() && spec.locality != Locality::All {
            let kind = |local: &bool| if *local { SLIDING } else { FULL };
            set("layer_types", variant.local_layers.iter().map(kind).collect());
            set("use_sliding_window", json!(true));
        }
        config
    }
}

/// HF's words for a layer with a window and for one without.
const SLIDING: &str = "sliding_attention";
const FULL: &str = "full_attention";

/// HF's names of an activation, the first one is written.
fn activation_names(activation: Activation) -> &'static [&'static str] {
    match activation {
        Activation::Silu => &["silu"],
        // Gemma's first files say "gelu" and mean this: transformers and llama.cpp compute the tanh form for them.
        Activation::GeluTanh => &["gelu_pytorch_tanh", "gelu"],
    }
}

fn check_activation(object: &Map<String, Value>, family: Family, path: &Path) -> Result<()> {
    let key = ["hidden_activation", "hidden_act"]
        .into_iter()
        .find(|key| object.get(*key).is_some_and(Value::is_string));
    let Some((key, found)) = key.and_then(|key| Some((key, object[key].as_str()?))) else {
        return Ok(());
    };
    let names = activation_names(family.spec().activation);
    match names.contains(&found) {
        true => Ok(()),
        false => Err(ModelError::unsupported(
            path,
            format!(
                "{key} is {found:?}; this engine computes {} for {}",
                names[0],
                family.name()
            ),
        )),
    }
}

/// Which layers are local: `layer_types` in newer files; in older ones the family's pattern, or `max_window_layers`.
fn local_layers(object: &Map<String, Value>, family: Family, layers: usize, path: &Path) -> Result<Vec<bool>> {
    if layers > BOUNDS[1].1 {
        return Ok(Vec::new()); // refused by `check`
    }
    if let Some(types) = object.get("layer_types").and_then(Value::as_array) {
        let local = |kind: &Value| match kind.as_str() {
            Some(SLIDING) => Ok(true),
            Some(FULL) => Ok(false),
            _ => Err(ModelError::unsupported(
                path,
                format!("layer type {kind} is not supported; {SLIDING:?} and {FULL:?} are"),
            )),
        };
        let types = types.iter().map(local).collect::<Result<Vec<_>>>()?;
        return match types.len() == layers {
            true => Ok(types),
            false => Err(ModelError::malformed(
                path,
                format!("layer_types has {} entries for {layers} layers", types.len()),
            )),
        };
    }
    if object.get("use_sliding_window").and_then(Value::as_bool) == Some(true) {
        let first = optional_number(object, "max_window_layers", path)?.unwrap_or(layers);
        return Ok((0..layers).map(|layer| layer >= first).collect());
    }
    Ok(match optional_number(object, "sliding_window_pattern", path)? {
        Some(n) if matches!(family.spec().locality, Locality::AllButEvery(_)) && n > 0 => {
            (1..=layers).map(|layer| !layer.is_multiple_of(n)).collect()
        }
        _ => family.local_layers(layers),
    })
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

/// What a `config.json` says of rotary embeddings.
struct Rope {
    theta: f32,
    scaling: RopeScaling,
    partial: Option<f64>,
    local_theta: Option<f32>,
}

impl Rope {
    /// Older files have the base at the top and the rest in `rope_scaling`; newer ones all in `rope_parameters`, there by
    /// kind of layer where kinds differ.
    fn from_hf(object: &Map<String, Value>, family: Family, path: &Path) -> Result<Self> {
        let defaults = family.spec().defaults;
        let new = object.get("rope_parameters").and_then(Value::as_object);
        let of_kind = |kind: &str| new.and_then(|new| new.get(kind)?.as_object());
        let nested = [
            of_kind(FULL).or(new),
            object.get("rope_scaling").and_then(Value::as_object),
        ];
        let float = |key: &str| object.get(key).and_then(Value::as_f64);
        let (mut theta, mut partial) = (float("rope_theta"), float("partial_rotary_factor"));
        let mut scaling = RopeScaling::None;
        for rope in nested.into_iter().flatten() {
            if scaling == RopeScaling::None {
                scaling = RopeScaling::from_hf(rope, object, path)?;
            }
            theta = theta.or_else(|| rope.get("rope_theta").and_then(Value::as_f64));
            partial = partial.or_else(|| rope.get("partial_rotary_factor").and_then(Value::as_f64));
        }
        let local = of_kind(SLIDING);
        if let Some(local) = local
            && RopeScaling::from_hf(local, object, path)? != RopeScaling::None
        {
            return Err(ModelError::unsupported(
                path,
                "the rotary embeddings of local layers are scaled; this engine computes them plain",
            ));
        }
        let local_theta = local.and_then(|local| local.get("rope_theta")?.as_f64());
        Ok(Rope {
            theta: theta.map_or(defaults.rope_theta, |theta| theta as f32),
            scaling,
            partial,
            local_theta: defaults.local_rope_theta.map(|default| {
                let found = local_theta.or(float("rope_local_base_freq"));
                found.map_or(default, |theta| theta as f32)
            }),
        })
    }
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
