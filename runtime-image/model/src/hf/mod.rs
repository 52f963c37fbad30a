//! Hugging Face folders: config.json, safetensors, tokenizer and template files; read and written.

mod read;
mod write;

pub use read::{HfModel, Safetensors, open_weights};
pub(crate) use read::{Texts, read_json, texts};
pub(crate) use write::join;
pub use write::{Folder, write, write_safetensors};

/// Names of the files in a folder.
pub mod files {
    /// The model's shape.
    pub const CONFIG: &str = "config.json";
    /// All weights in one file.
    pub const WEIGHTS: &str = "model.safetensors";
    /// Which file of several has which tensor.
    pub const INDEX: &str = "model.safetensors.index.json";
    /// The tokenizer.
    pub const TOKENIZER: &str = "tokenizer.json";
    /// Special tokens, and in older folders the chat template.
    pub const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
    /// Defaults for generation.
    pub const GENERATION_CONFIG: &str = "generation_config.json";
    /// The chat template.
    pub const CHAT_TEMPLATE: &str = "chat_template.jinja";
}
