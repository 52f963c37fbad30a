//! Models of any shape without training: pseudo-random weights and a byte tokenizer, the same on every machine.
//! Tests and speed measurements stand on them.

use serde_json::{Map, Value, json};

use std::collections::HashMap;
use std::path::Path;

use crate::config::{ModelConfig, Variant};
use crate::dtype::Dtype;
use crate::error::{ModelError, Result};
use crate::family::{Family, Role, tensors};
use crate::weights::{RawTensor, Weights};

/// Special tokens of [`byte_tokenizer`], whose ids follow the 256 bytes: end of text, turn begin, turn end.
pub const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// A small Llama with the vocabulary of [`byte_tokenizer`].
pub fn tiny_config() -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        hidden_size: 64,
        layers: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        intermediate_size: 96,
        vocab_size: 256 + SPECIAL.len(),
        rope_theta: 10_000.0,
        norm_eps: 1e-5,
        tie_embeddings: false,
        max_positions: 256,
        bos: Some(257),
        eos: vec![258],
        variant: Variant::PLAIN,
    }
}

/// Tensors held in memory.
#[derive(Clone, Debug, Default)]
pub struct MemoryWeights(pub HashMap<String, (Vec<usize>, Vec<f32>)>);

impl MemoryWeights {
    fn find(&self, name: &str) -> Result<&(Vec<usize>, Vec<f32>)> {
        let found = self.0.get(name);
        found.ok_or_else(|| ModelError::malformed(Path::new("memory"), format!("tensor {name} is missing")))
    }
}

impl Weights for MemoryWeights {
    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        self.0.get(name).map(|(shape, _)| shape.clone())
    }

    fn raw(&self, name: &str) -> Result<RawTensor<'_>> {
        let (shape, values) = self.find(name)?;
        Ok(RawTensor {
            dtype: Dtype::F32,
            shape: shape.clone(),
            bytes: values.iter().flat_map(|value| value.to_le_bytes()).collect(),
        })
    }

    fn dtype(&self, name: &str) -> Result<Dtype> {
        self.find(name).map(|_| Dtype::F32)
    }

    fn f32(&self, name: &str) -> Result<Vec<f32>> {
        self.find(name).map(|(_, values)| values.clone())
    }
}

/// Weights that keep the activations of a forward pass near 1: gains around 1, matrices scaled by their inputs.
pub fn weights(config: &ModelConfig, seed: u64) -> MemoryWeights {
    let mut state = seed;
    let all = tensors(config).into_iter().map(|tensor| {
        let inputs = *tensor.shape.last().expect("a tensor has a size") as f32;
        let values = (0..tensor.elements())
            .map(|_| {
                let x = uniform(&mut state);
                match tensor.role {
                    Role::Norm => 1.0 - config.family.spec().norm_offset + 0.1 * x,
                    Role::Bias => 0.5 * x,
                    Role::Embedding => x,
                    Role::Linear | Role::Head => 1.7 * x / inputs.sqrt(),
                }
            })
            .collect();
        (tensor.name, (tensor.shape, values))
    });
    MemoryWeights(all.collect())
}

/// A number in -1..1 from a splitmix64 sequence.
fn uniform(state: &mut u64) -> f32 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
}

/// A byte-level BPE without merges: ids 0..256 are bytes, then [`SPECIAL`]. The object of a `tokenizer.json`.
pub fn byte_tokenizer() -> Value {
    // Byte-level BPE writes bytes as printable characters: those that are printable stand for themselves, the others follow at 256.
    let printable =
        |byte: u32| (33..=126).contains(&byte) || (161..=172).contains(&byte) || (174..=255).contains(&byte);
    let mut next = 256;
    let mut vocab: Map<String, Value> = Map::new();
    for byte in 0..256u32 {
        let code = if printable(byte) {
            byte
        } else {
            next += 1;
            next - 1
        };
        let character = char::from_u32(code).expect("codes up to 323 are characters");
        vocab.insert(character.to_string(), json!(byte));
    }
    let added: Vec<Value> = SPECIAL
        .iter()
        .enumerate()
        .map(|(i, text)| {
            json!({"id": 256 + i, "content": text, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false, "ignore_merges": false, "vocab": vocab, "merges": [],
        },
    })
}

/// A ChatML template.
pub const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
