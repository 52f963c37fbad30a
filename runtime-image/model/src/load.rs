//! Opening a model, whatever its files.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::Value;

use crate::chat::ChatTemplate;
use crate::config::ModelConfig;
use crate::error::{ModelError, Result};
use crate::generation::GenerationConfig;
use crate::hf::files;
use crate::tokenizer::{SpecialTexts, Vocabulary};
use crate::weights::Weights;
use crate::{gguf, hf};

/// A model ready to be executed, trained or converted.
pub struct LoadedModel {
    /// The file or folder it came from.
    pub path: PathBuf,
    /// Its shape.
    pub config: ModelConfig,
    /// Its tensors, mapped.
    pub weights: Arc<dyn Weights>,
    /// Its tokenizer.
    pub vocabulary: Arc<Vocabulary>,
    /// The object of its `tokenizer.json`.
    pub tokenizer_json: Value,
    /// How messages become a prompt; absent for base models.
    pub chat_template: Option<ChatTemplate>,
    /// Defaults for generation.
    pub generation: GenerationConfig,
}

impl std::fmt::Debug for LoadedModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LoadedModel")
            .field("path", &self.path)
            .field("config", &self.config)
            .finish_non_exhaustive()
    }
}

impl LoadedModel {
    /// Opens a GGUF file, a Hugging Face folder, or a folder with exactly one GGUF file.
    pub fn open(path: &Path) -> Result<Self> {
        let parts = match find(path)? {
            Found::Gguf(file) => {
                let opened = gguf::open_all(&file)?;
                let weights: Arc<dyn Weights> = opened.weights;
                let texts = hf::Texts {
                    tokenizer_json: opened.tokenizer_json,
                    special: opened.special,
                    chat_template: opened.chat_template,
                    generation: opened.generation,
                };
                (opened.config, weights, texts)
            }
            Found::Folder(folder) => {
                let (config, weights) = hf::open_weights(&folder)?;
                let texts = hf::texts(&folder, &config)?;
                let weights: Arc<dyn Weights> = Arc::new(weights);
                (config, weights, texts)
            }
        };
        let (config, weights, texts) = parts;
        config.check_ids(&texts.generation.eos, path)?;
        let vocabulary = Vocabulary::from_json(&texts.tokenizer_json)?;
        if vocabulary.size() > config.vocab_size {
            let what = format!(
                "the tokenizer has {} tokens, the model only {}",
                vocabulary.size(),
                config.vocab_size
            );
            return Err(ModelError::malformed(path, what));
        }
        let chat_template = texts
            .chat_template
            .map(|source| ChatTemplate::new(&source, texts.special))
            .transpose()?;
        Ok(LoadedModel {
            path: path.to_owned(),
            config,
            weights,
            vocabulary: Arc::new(vocabulary),
            tokenizer_json: texts.tokenizer_json,
            chat_template,
            generation: texts.generation,
        })
    }
}

impl LoadedModel {
    /// A template in plain words for this model, if it can end a turn: what [`crate::hf::write`] calls its begin and end
    /// tokens is what the template writes, so that a published model renders as it was trained.
    pub fn plain_template(&self) -> Result<ChatTemplate> {
        let text = |id: Option<u32>| id.and_then(|id| self.vocabulary.tokenizer().id_to_token(id));
        let eos = self.generation.eos.first().or(self.config.eos.first()).copied();
        // Any other token would be written as text, which a user could write as well.
        let Some(eos) = text(eos.filter(|id| self.vocabulary.is_special(*id))) else {
            return Err(ModelError::InvalidRequest {
                path: self.path.clone(),
                what:
                    "it has no chat template, and names no special token that ends a text, so conversations cannot be \
                       rendered: use an instruction-tuned model, or name the token as eos_token_id in \
                       generation_config.json"
                        .to_owned(),
            });
        };
        ChatTemplate::plain(SpecialTexts {
            bos: text(self.config.bos),
            eos: Some(eos),
        })
    }
}

enum Found {
    Gguf(PathBuf),
    Folder(PathBuf),
}

fn find(path: &Path) -> Result<Found> {
    let metadata = std::fs::metadata(path).map_err(|error| ModelError::io(path, error))?;
    if metadata.is_file() {
        return Ok(Found::Gguf(path.to_owned()));
    }
    if path.join(files::CONFIG).exists() {
        return Ok(Found::Folder(path.to_owned()));
    }
    let entries = std::fs::read_dir(path).map_err(|error| ModelError::io(path, error))?;
    let mut ggufs: Vec<PathBuf> = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| ModelError::io(path, error))?.path();
        if entry.extension().is_some_and(|extension| extension == "gguf") {
            ggufs.push(entry);
        }
    }
    match ggufs.as_slice() {
        [one] => Ok(Found::Gguf(one.clone())),
        [] => Err(ModelError::missing(
            path,
            "config.json or a .gguf file",
            "point to a Hugging Face folder or a GGUF file",
        )),
        many => Err(ModelError::InvalidRequest {
            path: path.to_owned(),
            what: format!("the folder has {} .gguf files: name one of them", many.len()),
        }),
    }
}
