//! Reading a Hugging Face folder.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Component, Path, PathBuf};

use safetensors::SafeTensors;
use serde_json::Value;

use super::files;
use crate::config::ModelConfig;
use crate::dtype::Dtype;
use crate::error::{ModelError, Result};
use crate::generation::GenerationConfig;
use crate::places::{Place, Places};
use crate::tokenizer::SpecialTexts;
use crate::weights::{Mapped, RawTensor, Weights, check_tensors};

/// The largest JSON or template file that is read. Tokenizers of 256,000 tokens take about 30 MB.
const MAX_TEXT_BYTES: u64 = 256 << 20;
/// The most files that weights may be split into.
const MAX_SHARDS: usize = 4096;

/// Tensors in one or several safetensors files.
#[derive(Debug)]
pub struct Safetensors {
    path: PathBuf,
    files: Vec<Mapped>,
    tensors: HashMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    file: usize,
    dtype: safetensors::Dtype,
    shape: Vec<usize>,
    bytes: Range<usize>,
}

impl Safetensors {
    /// Opens one file, whatever tensors it holds.
    pub fn open_file(path: &Path) -> Result<Self> {
        let mut all = Safetensors {
            path: path.to_owned(),
            files: Vec::new(),
            tensors: HashMap::new(),
        };
        all.add(path)?;
        Ok(all)
    }

    /// Opens the weights in a folder: `model.safetensors`, or the files that `model.safetensors.index.json` names.
    pub fn open_folder(folder: &Path) -> Result<Self> {
        let (single, index) = (folder.join(files::WEIGHTS), folder.join(files::INDEX));
        if single.exists() || !index.exists() {
            return match single.exists() {
                true => Self::open_file(&single),
                false => Err(ModelError::missing(
                    folder,
                    format!("{} (or {})", files::WEIGHTS, files::INDEX),
                    "point to a folder with safetensors weights",
                )),
            };
        }
        let json = read_json(&index)?;
        let map = json["weight_map"]
            .as_object()
            .ok_or_else(|| ModelError::malformed(&index, "weight_map is missing"))?;
        let mut names: Vec<&str> = map.values().filter_map(Value::as_str).collect();
        names.sort_unstable();
        names.dedup();
        if names.len() > MAX_SHARDS {
            return Err(ModelError::malformed(
                &index,
                format!("it names {} files; {MAX_SHARDS} are the most accepted", names.len()),
            ));
        }
        let mut all = Safetensors {
            path: folder.to_owned(),
            files: Vec::new(),
            tensors: HashMap::new(),
        };
        for name in names {
            // A shard is a file beside the index; anything else could read outside of the folder.
            let mut parts = Path::new(name).components();
            if !matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)) {
                return Err(ModelError::malformed(
                    &index,
                    format!("{name:?} is not the name of a file in this folder"),
                ));
            }
            all.add(&folder.join(name))?;
        }
        Ok(all)
    }

    fn add(&mut self, path: &Path) -> Result<()> {
        let file = Mapped::open(path)?;
        let (header, metadata) = SafeTensors::read_metadata(file.bytes())
            .map_err(|error| ModelError::malformed(path, format!("not a complete safetensors file: {error}")))?;
        let data = header + 8;
        for (name, info) in metadata.tensors() {
            let bytes = data + info.data_offsets.0..data + info.data_offsets.1;
            let entry = Entry {
                file: self.files.len(),
                dtype: info.dtype,
                shape: info.shape.clone(),
                bytes,
            };
            if self.tensors.insert(name.clone(), entry).is_some() {
                return Err(ModelError::malformed(path, format!("tensor {name} is in two files")));
            }
        }
        self.files.push(file);
        Ok(())
    }

    fn entry(&self, name: &str) -> Result<&Entry> {
        let entry = self.tensors.get(name);
        entry.ok_or_else(|| ModelError::malformed(&self.path, format!("tensor {name} is missing")))
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> Vec<&str> {
        let mut names: Vec<&str> = self.tensors.keys().map(String::as_str).collect();
        names.sort_unstable();
        names
    }
}

impl Weights for Safetensors {
    fn release(&self) {
        self.files.iter().for_each(Mapped::release);
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        Some(self.tensors.get(name)?.shape.clone())
    }

    fn dtype(&self, name: &str) -> Result<Dtype> {
        match self.entry(name)?.dtype {
            safetensors::Dtype::F32 => Ok(Dtype::F32),
            safetensors::Dtype::F16 => Ok(Dtype::F16),
            safetensors::Dtype::BF16 => Ok(Dtype::BF16),
            other => Err(ModelError::unsupported(
                &self.path,
                format!("tensor {name} has type {other:?}; F32, F16 and BF16 are read"),
            )),
        }
    }

    fn raw(&self, name: &str) -> Result<RawTensor<'_>> {
        let entry = self.entry(name)?;
        Ok(RawTensor {
            dtype: self.dtype(name)?,
            shape: entry.shape.clone(),
            bytes: Cow::Borrowed(self.files[entry.file].range(&entry.bytes)),
        })
    }
}

/// The tensors of a model in safetensors files, fused ones in parts.
#[derive(Debug)]
pub struct HfModel {
    files: Safetensors,
    places: Places,
}

impl HfModel {
    fn place(&self, name: &str) -> Result<&Place> {
        let place = self.places.get(name);
        place.ok_or_else(|| ModelError::malformed(&self.files.path, format!("tensor {name} is missing")))
    }
}

impl Weights for HfModel {
    fn release(&self) {
        self.files.release();
    }

    fn shape(&self, name: &str) -> Option<Vec<usize>> {
        let place = self.places.get(name)?;
        Some(place.shape(self.files.shape(&place.hf)?))
    }

    fn dtype(&self, name: &str) -> Result<Dtype> {
        self.files.dtype(&self.place(name)?.hf)
    }

    fn raw(&self, name: &str) -> Result<RawTensor<'_>> {
        let place = self.place(name)?;
        let entry = self.files.entry(&place.hf)?;
        Ok(RawTensor {
            dtype: self.files.dtype(&place.hf)?,
            shape: place.shape(entry.shape.clone()),
            bytes: Cow::Borrowed(place.bytes(self.files.files[entry.file].range(&entry.bytes))),
        })
    }
}

/// The configuration and weights in a folder, every tensor checked against the configuration.
pub fn open_weights(folder: &Path) -> Result<(ModelConfig, HfModel)> {
    let path = folder.join(files::CONFIG);
    let mut config = ModelConfig::from_hf(&read_json(&path)?, &path)?;
    let files = Safetensors::open_folder(folder)?;
    // Some folders store the tied matrix once more; some forget to say that it is tied.
    if files.shape(crate::family::HEAD).is_none() {
        config.tie_embeddings = true;
    }
    let places = Places::new(&config);
    let weights = HfModel { files, places };
    check_tensors(&weights, &config, folder)?;
    Ok((config, weights))
}

/// The texts in a folder.
#[derive(Debug)]
pub(crate) struct Texts {
    pub(crate) tokenizer_json: Value,
    pub(crate) special: SpecialTexts,
    pub(crate) chat_template: Option<String>,
    pub(crate) generation: GenerationConfig,
}

pub(crate) fn texts(folder: &Path, config: &ModelConfig) -> Result<Texts> {
    let tokenizer_json = read_json(&folder.join(files::TOKENIZER))?;
    let tokenizer_config = optional(&folder.join(files::TOKENIZER_CONFIG))?.unwrap_or(Value::Null);
    let text = |key: &str| match &tokenizer_config[key] {
        Value::String(text) => Some(text.clone()),
        other => other["content"].as_str().map(str::to_owned),
    };
    let template_file = folder.join(files::CHAT_TEMPLATE);
    let chat_template = if template_file.exists() {
        Some(read_text(&template_file)?)
    } else {
        template_of(&tokenizer_config["chat_template"])
    };
    let generation_file = folder.join(files::GENERATION_CONFIG);
    let mut generation = match optional(&generation_file)? {
        Some(json) => GenerationConfig::from_hf(&json, &generation_file)?,
        None => GenerationConfig::default(),
    };
    if generation.eos.is_empty() {
        generation.eos.clone_from(&config.eos);
    }
    Ok(Texts {
        tokenizer_json,
        special: SpecialTexts {
            bos: text("bos_token"),
            eos: text("eos_token"),
        },
        chat_template,
        generation,
    })
}

/// One template, or the one called "default" among several.
fn template_of(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Array(list) => list.iter().find(|entry| entry["name"] == "default")?["template"]
            .as_str()
            .map(str::to_owned),
        _ => None,
    }
}

fn optional(path: &Path) -> Result<Option<Value>> {
    if path.exists() {
        read_json(path).map(Some)
    } else {
        Ok(None)
    }
}

pub(crate) fn read_json(path: &Path) -> Result<Value> {
    serde_json::from_str(&read_text(path)?).map_err(|error| ModelError::malformed(path, error.to_string()))
}

fn read_text(path: &Path) -> Result<String> {
    let file = File::open(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => ModelError::missing(
            path,
            "the file",
            "a model folder has config.json, safetensors and tokenizer.json",
        ),
        _ => ModelError::io(path, error),
    })?;
    let mut text = String::new();
    file.take(MAX_TEXT_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(|error| ModelError::io(path, error))?;
    if text.len() as u64 > MAX_TEXT_BYTES {
        return Err(ModelError::malformed(
            path,
            format!("it is larger than {MAX_TEXT_BYTES} bytes"),
        ));
    }
    Ok(text)
}
