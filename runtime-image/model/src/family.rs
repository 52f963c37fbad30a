//! The table of model families: which tensors a family has, what they are called, what shapes they have, and what is computed
//! with them. Everything that differs between families stands here and nowhere else.

use crate::config::ModelConfig;

/// A family of models that this engine can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama and the models built like it (SmolLM2 among them).
    Llama,
    /// Mistral: Llama, in some versions with a sliding window.
    Mistral,
    /// Qwen2 and 2.5: biases on queries, keys and values.
    Qwen2,
    /// Qwen3: queries and keys are normalized a head at a time.
    Qwen3,
    /// Gemma, the first version.
    Gemma,
    /// Gemma 2: every second layer is local; scores and logits have a soft cap.
    Gemma2,
    /// Gemma 3, text only: five of six layers are local and have rotary frequencies of their own.
    Gemma3,
    /// Phi-3: fused matrices.
    Phi3,
}

/// The gate's activation in the feed-forward part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// `x / (1 + e^-x)`.
    Silu,
    /// GELU in its tanh form.
    GeluTanh,
}

/// Which layers look back on a window only, in a model that has one and says no more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Locality {
    /// None: the family has no window unless its configuration names the layers.
    Named,
    /// Every layer.
    All,
    /// All but every `n`-th.
    AllButEvery(usize),
}

/// One row of the family table.
#[derive(Debug)]
pub struct FamilySpec {
    /// `architectures[0]` in HF's `config.json`.
    pub hf_architecture: &'static str,
    /// `model_type` in HF's `config.json`.
    pub hf_model_type: &'static str,
    /// `general.architecture` in GGUF, and the prefix of its keys.
    pub gguf_architecture: &'static str,
    /// GGUF stores the rows of the query and key matrices with the two halves of each head interleaved.
    pub gguf_interleaves_qk: bool,
    /// The gate's activation.
    pub activation: Activation,
    /// Queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Queries and keys are normalized a head at a time, before they are turned.
    pub qk_norm: bool,
    /// What attention and the feed-forward part give is normalized before it is added.
    pub post_norms: bool,
    /// The files hold queries, keys and values as one matrix, and gate and up as another.
    pub fused: bool,
    /// Added to every stored gain of a norm. GGUF's gains have it already.
    pub norm_offset: f32,
    /// Embeddings are multiplied by the square root of their width.
    pub scales_embedding: bool,
    /// What transformers takes where `config.json` is silent.
    pub defaults: Defaults,
    /// Which layers are local.
    pub locality: Locality,
}

/// See [`FamilySpec::defaults`].
#[derive(Clone, Copy, Debug)]
pub struct Defaults {
    /// Width of a head; `None`: the hidden size over the heads.
    pub head_dim: Option<usize>,
    /// The output matrix is the embedding matrix.
    pub tied: bool,
    /// The window of local layers in tokens.
    pub window: Option<usize>,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Base of the rotary frequencies of local layers, where it is another one.
    pub local_rope_theta: Option<f32>,
    /// Soft caps of attention scores and of logits.
    pub soft_caps: (Option<f32>, Option<f32>),
}

const LLAMA: FamilySpec = FamilySpec {
    hf_architecture: "LlamaForCausalLM",
    hf_model_type: "llama",
    gguf_architecture: "llama",
    gguf_interleaves_qk: true,
    activation: Activation::Silu,
    qkv_bias: false,
    qk_norm: false,
    post_norms: false,
    fused: false,
    norm_offset: 0.0,
    scales_embedding: false,
    defaults: Defaults {
        head_dim: None,
        tied: false,
        window: None,
        rope_theta: 10_000.0,
        local_rope_theta: None,
        soft_caps: (None, None),
    },
    locality: Locality::Named,
};

const GEMMA: FamilySpec = FamilySpec {
    hf_architecture: "GemmaForCausalLM",
    hf_model_type: "gemma",
    gguf_architecture: "gemma",
    gguf_interleaves_qk: false,
    activation: Activation::GeluTanh,
    norm_offset: 1.0,
    scales_embedding: true,
    defaults: Defaults {
        head_dim: Some(256),
        tied: true,
        ..LLAMA.defaults
    },
    ..LLAMA
};

impl Family {
    /// All families. Of two with one GGUF architecture the first one is what a file is read as.
    pub const ALL: &'static [Family] = &[
        Family::Llama,
        Family::Mistral,
        Family::Qwen2,
        Family::Qwen3,
        Family::Gemma,
        Family::Gemma2,
        Family::Gemma3,
        Family::Phi3,
    ];

    /// The family's row in the table.
    pub fn spec(self) -> &'static FamilySpec {
        match self {
            Family::Llama => &LLAMA,
            Family::Mistral => &FamilySpec {
                hf_architecture: "MistralForCausalLM",
                hf_model_type: "mistral",
                defaults: Defaults {
                    window: Some(4096),
                    ..LLAMA.defaults
                },
                locality: Locality::All,
                ..LLAMA
            },
            Family::Qwen2 => &FamilySpec {
                hf_architecture: "Qwen2ForCausalLM",
                hf_model_type: "qwen2",
                gguf_architecture: "qwen2",
                gguf_interleaves_qk: false,
                qkv_bias: true,
                ..LLAMA
            },
            Family::Qwen3 => &FamilySpec {
                hf_architecture: "Qwen3ForCausalLM",
                hf_model_type: "qwen3",
                gguf_architecture: "qwen3",
                gguf_interleaves_qk: false,
                qk_norm: true,
                defaults: Defaults {
                    head_dim: Some(128),
                    ..LLAMA.defaults
                },
                ..LLAMA
            },
            Family::Gemma => &GEMMA,
            Family::Gemma2 => &FamilySpec {
                hf_architecture: "Gemma2ForCausalLM",
                hf_model_type: "gemma2",
                gguf_architecture: "gemma2",
                post_norms: true,
                defaults: Defaults {
                    window: Some(4096),
                    soft_caps: (Some(50.0), Some(30.0)),
                    ..GEMMA.defaults
                },
                locality: Locality::AllButEvery(2),
                ..GEMMA
            },
            Family::Gemma3 => &FamilySpec {
                hf_architecture: "Gemma3ForCausalLM",
                hf_model_type: "gemma3_text",
                gguf_architecture: "gemma3",
                post_norms: true,
                qk_norm: true,
                defaults: Defaults {
                    window: Some(4096),
                    rope_theta: 1_000_000.0,
                    local_rope_theta: Some(10_000.0),
                    ..GEMMA.defaults
                },
                locality: Locality::AllButEvery(6),
                ..GEMMA
            },
            Family::Phi3 => &FamilySpec {
                hf_architecture: "Phi3ForCausalLM",
                hf_model_type: "phi3",
                gguf_architecture: "phi3",
                gguf_interleaves_qk: false,
                fused: true,
                locality: Locality::All,
                ..LLAMA
            },
        }
    }

    /// The family's name in messages.
    pub fn name(self) -> &'static str {
        self.spec().hf_model_type
    }

    /// The local ones of `layers` layers where no configuration names them.
    pub fn local_layers(self, layers: usize) -> Vec<bool> {
        match self.spec().locality {
            Locality::Named => vec![false; layers],
            Locality::All => vec![true; layers],
            Locality::AllButEvery(n) => (1..=layers).map(|layer| !layer.is_multiple_of(n)).collect(),
        }
    }
}

/// What a tensor is for; decides how it is stored and whether it is decayed, quantized or adapted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Token embeddings, one row per token.
    Embedding,
    /// A gain vector of a norm.
    Norm,
    /// A vector that is added.
    Bias,
    /// A matrix `[outputs, inputs]`.
    Linear,
    /// The output matrix, one row per token.
    Head,
}

/// A tensor that a model of a given configuration has, under the name by which [`crate::Weights`] gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name: HF's, or what HF would call it if the family did not fuse it with others.
    pub name: String,
    /// Sizes, the slowest first: `[rows, columns]` or `[size]`.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
}

impl TensorSpec {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A tensor as it stands in files: one [`TensorSpec`], or several whose rows follow one another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    /// HF's name.
    pub hf_name: String,
    /// GGUF's name.
    pub gguf_name: String,
    /// Sizes, the slowest first.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: Role,
    /// What it consists of.
    pub parts: Vec<TensorSpec>,
}

/// Name of the token embeddings.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// Name of the last norm.
pub const FINAL_NORM: &str = "model.norm.weight";
/// Name of the output matrix, absent where embeddings are tied.
pub const HEAD: &str = "lm_head.weight";

/// Name of a weight inside block `layer`, for example `layer_name(3, "self_attn.q_proj")`.
pub fn layer_name(layer: usize, part: &str) -> String {
    format!("model.layers.{layer}.{part}.weight")
}

/// All tensors of a model, in the order in which they are used.
pub fn tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    stored_tensors(config)
        .into_iter()
        .flat_map(|tensor| tensor.parts)
        .collect()
}

/// All tensors of a model as they stand in files, in the order in which they are used.
pub fn stored_tensors(config: &ModelConfig) -> Vec<StoredTensor> {
    let hidden = config.hidden_size;
    let one = |hf: &str, gguf: &str, shape: Vec<usize>, role: Role| StoredTensor {
        hf_name: hf.to_owned(),
        gguf_name: gguf.to_owned(),
        shape: shape.clone(),
        role,
        parts: vec![TensorSpec {
            name: hf.to_owned(),
            shape,
            role,
        }],
    };
    let table = vec![config.vocab_size, hidden];
    let mut all = vec![one(EMBEDDING, "token_embd.weight", table.clone(), Role::Embedding)];
    let block = block(config);
    for layer in 0..config.layers {
        all.extend(block.iter().map(|tensor| {
            StoredTensor {
                hf_name: format!("model.layers.{layer}.{}", tensor.hf_name),
                gguf_name: format!("blk.{layer}.{}", tensor.gguf_name),
                parts: tensor
                    .parts
                    .iter()
                    .map(|part| TensorSpec {
                        name: format!("model.layers.{layer}.{}", part.name),
                        ..part.clone()
                    })
                    .collect(),
                ..tensor.clone()
            }
        }));
    }
    all.push(one(FINAL_NORM, "output_norm.weight", vec![hidden], Role::Norm));
    if !config.tie_embeddings {
        all.push(one(HEAD, "output.weight", table, Role::Head));
    }
    all
}

/// The tensors of one block; names without the block's prefix.
fn block(config: &ModelConfig) -> Vec<StoredTensor> {
    let spec = config.family.spec();
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let stored = |hf: &str, gguf: &str, suffix: &str, role: Role, shape: Vec<usize>, parts: &[(&str, usize)]| {
        let part = |(name, rows): &(&str, usize)| TensorSpec {
            name: format!("{name}.{suffix}"),
            shape: [&[*rows], &shape[1..]].concat(),
            role,
        };
        StoredTensor {
            hf_name: format!("{hf}.{suffix}"),
            gguf_name: format!("{gguf}.{suffix}"),
            parts: parts.iter().map(part).collect(),
            shape,
            role,
        }
    };
    let vector = |hf: &str, gguf: &str, suffix: &str, role, size: usize| {
        stored(hf, gguf, suffix, role, vec![size], &[(hf, size)])
    };
    let norm = |hf: &str, gguf: &str, size: usize| vector(hf, gguf, "weight", Role::Norm, size);
    let matrix = |hf: &str, gguf: &str, rows: usize, columns: usize| {
        stored(hf, gguf, "weight", Role::Linear, vec![rows, columns], &[(hf, rows)])
    };
    let fused = |hf: &str, gguf: &str, parts: &[(&str, usize)]| {
        let rows = parts.iter().map(|(_, rows)| rows).sum();
        stored(hf, gguf, "weight", Role::Linear, vec![rows, hidden], parts)
    };
    let qkv = [
        ("self_attn.q_proj", "attn_q", queries),
        ("self_attn.k_proj", "attn_k", keys),
        ("self_attn.v_proj", "attn_v", keys),
    ];
    let gate_up = [("mlp.gate_proj", "ffn_gate", inner), ("mlp.up_proj", "ffn_up", inner)];

    let mut all = vec![norm("input_layernorm", "attn_norm", hidden)];
    if spec.fused {
        all.push(fused(
            "self_attn.qkv_proj",
            "attn_qkv",
            &qkv.map(|(hf, _, rows)| (hf, rows)),
        ));
    } else {
        all.extend(qkv.map(|(hf, gguf, rows)| matrix(hf, gguf, rows, hidden)));
    }
    if spec.qkv_bias {
        all.extend(qkv.map(|(hf, gguf, rows)| vector(hf, gguf, "bias", Role::Bias, rows)));
    }
    if spec.qk_norm {
        all.push(norm("self_attn.q_norm", "attn_q_norm", config.head_dim));
        all.push(norm("self_attn.k_norm", "attn_k_norm", config.head_dim));
    }
    all.push(matrix("self_attn.o_proj", "attn_output", hidden, queries));
    if spec.post_norms {
        all.push(norm("post_attention_layernorm", "post_attention_norm", hidden));
    }
    all.push(norm(feed_forward_norm(config.family), "ffn_norm", hidden));
    if spec.fused {
        all.push(fused(
            "mlp.gate_up_proj",
            "ffn_up",
            &gate_up.map(|(hf, _, rows)| (hf, rows)),
        ));
    } else {
        all.extend(gate_up.map(|(hf, gguf, rows)| matrix(hf, gguf, rows, hidden)));
    }
    all.push(matrix("mlp.down_proj", "ffn_down", hidden, inner));
    if spec.post_norms {
        all.push(norm("post_feedforward_layernorm", "post_ffw_norm", hidden));
    }
    all
}

/// Name of the norm before the feed-forward part: where attention has a norm behind it, HF needed another one.
pub fn feed_forward_norm(family: Family) -> &'static str {
    match family.spec().post_norms {
        true => "pre_feedforward_layernorm",
        false => "post_attention_layernorm",
    }
}

/// Where GGUF's row `row` of an interleaved query or key matrix stands in HF's order (see [`FamilySpec::gguf_interleaves_qk`]).
///
/// Per head, GGUF has the pairs of rotary dimensions side by side (0, d/2, 1, d/2+1, …), HF has two halves.
pub fn gguf_row_to_hf(row: usize, head_dim: usize) -> usize {
    let (head, inside) = (row / head_dim, row % head_dim);
    head * head_dim + (inside % 2) * (head_dim / 2) + inside / 2
}

/// The head width by which a tensor's rows are interleaved in GGUF, for those that are.
pub fn gguf_interleaved_head_dim(config: &ModelConfig, name: &str) -> Option<usize> {
    let interleaved = config.family.spec().gguf_interleaves_qk
        && (name.ends_with("q_proj.weight") || name.ends_with("k_proj.weight"));
    interleaved.then_some(config.head_dim)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stored_tensors_are_exactly_their_parts() {
        for family in Family::ALL {
            let config = ModelConfig {
                family: *family,
                ..crate::synthetic::tiny_config()
            };
            for tensor in stored_tensors(&config) {
                let rows: usize = tensor.parts.iter().map(|part| part.shape[0]).sum();
                assert_eq!(rows, tensor.shape[0], "{}", tensor.hf_name);
                assert!(tensor.parts.iter().all(|part| part.shape[1..] == tensor.shape[1..]));
            }
        }
    }
}
