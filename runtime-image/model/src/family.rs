//! The table of model families: which tensors a family has, what they are called, and what shapes they have.
//! Everything that differs between families stands here and nowhere else.

use crate::config::ModelConfig;

/// A family of models that this engine can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Llama and the models built like it (SmolLM2 among them).
    Llama,
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
}

impl Family {
    /// All families.
    pub const ALL: &'static [Family] = &[Family::Llama];

    /// The family's row in the table.
    pub fn spec(self) -> &'static FamilySpec {
        match self {
            Family::Llama => &FamilySpec {
                hf_architecture: "LlamaForCausalLM",
                hf_model_type: "llama",
                gguf_architecture: "llama",
                gguf_interleaves_qk: true,
            },
        }
    }

    /// The family's name in messages.
    pub fn name(self) -> &'static str {
        self.spec().hf_model_type
    }
}

/// What a tensor is for; decides how it is stored and whether it is decayed, quantized or adapted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Token embeddings, one row per token.
    Embedding,
    /// A gain vector of a norm.
    Norm,
    /// A matrix `[outputs, inputs]`.
    Linear,
    /// The output matrix, one row per token.
    Head,
}

/// A tensor that a model of a given configuration has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorSpec {
    /// HF's name.
    pub name: String,
    /// GGUF's name.
    pub gguf_name: String,
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

/// HF's name of the token embeddings.
pub const EMBEDDING: &str = "model.embed_tokens.weight";
/// HF's name of the last norm.
pub const FINAL_NORM: &str = "model.norm.weight";
/// HF's name of the output matrix, absent where embeddings are tied.
pub const HEAD: &str = "lm_head.weight";

/// HF's name of a tensor inside block `layer`, for example `layer_name(3, "self_attn.q_proj")`.
pub fn layer_name(layer: usize, part: &str) -> String {
    format!("model.layers.{layer}.{part}.weight")
}

/// All tensors of a model, in the order in which they are used.
pub fn tensors(config: &ModelConfig) -> Vec<TensorSpec> {
    let (hidden, inner) = (config.hidden_size, config.intermediate_size);
    let (queries, keys) = (config.heads * config.head_dim, config.kv_heads * config.head_dim);
    let blocks: [(&str, &str, Vec<usize>, Role); 9] = [
        ("input_layernorm", "attn_norm", vec![hidden], Role::Norm),
        ("self_attn.q_proj", "attn_q", vec![queries, hidden], Role::Linear),
        ("self_attn.k_proj", "attn_k", vec![keys, hidden], Role::Linear),
        ("self_attn.v_proj", "attn_v", vec![keys, hidden], Role::Linear),
        ("self_attn.o_proj", "attn_output", vec![hidden, queries], Role::Linear),
        ("post_attention_layernorm", "ffn_norm", vec![hidden], Role::Norm),
        ("mlp.gate_proj", "ffn_gate", vec![inner, hidden], Role::Linear),
        ("mlp.up_proj", "ffn_up", vec![inner, hidden], Role::Linear),
        ("mlp.down_proj", "ffn_down", vec![hidden, inner], Role::Linear),
    ];
    let plain = |name: &str, gguf: &str, shape: Vec<usize>, role| TensorSpec {
        name: name.to_owned(),
        gguf_name: gguf.to_owned(),
        shape,
        role,
    };
    let mut all = vec![plain(
        EMBEDDING,
        "token_embd.weight",
        vec![config.vocab_size, hidden],
        Role::Embedding,
    )];
    for layer in 0..config.layers {
        all.extend(blocks.iter().map(|(hf, gguf, shape, role)| TensorSpec {
            name: layer_name(layer, hf),
            gguf_name: format!("blk.{layer}.{gguf}.weight"),
            shape: shape.clone(),
            role: *role,
        }));
    }
    all.push(plain(FINAL_NORM, "output_norm.weight", vec![hidden], Role::Norm));
    if !config.tie_embeddings {
        all.push(plain(
            HEAD,
            "output.weight",
            vec![config.vocab_size, hidden],
            Role::Head,
        ));
    }
    all
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
