//! Models as data: families, shapes, names; HF and GGUF readers; chat templates.
//!
//! [`LoadedModel::open`] reads a Hugging Face folder or a GGUF file into the same description: configuration, weights as
//! mapped views in HF's names and layout, tokenizer, chat template. No executor, no tensor library.

pub mod bert;
mod blocks;
mod chat;
mod config;
mod dtype;
mod error;
mod family;
mod generation;
pub mod gguf;
pub mod hf;
mod load;
mod lora;
mod places;
mod rope;
pub mod synthetic;
mod tokenizer;
mod weights;

pub use chat::{ChatTemplate, Rendered};
pub use config::{ModelConfig, Variant};
pub use dtype::{BLOCK, Dtype, SUPER_BLOCK};
pub use error::{ModelError, Result};
pub use family::{
    Activation, EMBEDDING, FINAL_NORM, Family, FamilySpec, HEAD, Role, StoredTensor, TensorSpec, feed_forward_norm,
    layer_name, stored_tensors, tensors,
};
pub use generation::GenerationConfig;
pub use load::LoadedModel;
pub use lora::{LoraPart, LoraWeights};
pub use rope::RopeScaling;
pub use synthetic::MemoryWeights;
pub use tokenizer::{TokenText, Vocabulary};
pub use weights::{RawTensor, Weights, check_tensors};
