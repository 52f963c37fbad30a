//! Writing a Hugging Face folder that transformers loads.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::{Map, Value, json};

use super::files;
use crate::config::ModelConfig;
use crate::dtype::Dtype;
use crate::error::{ModelError, Result};
use crate::family::{TensorSpec, stored_tensors};
use crate::generation::GenerationConfig;
use crate::rope::RopeScaling;
use crate::weights::Weights;

/// What goes into a folder.
pub struct Folder<'a> {
    /// The model's shape.
    pub config: &'a ModelConfig,
    /// Its weights.
    pub weights: &'a dyn Weights,
    /// F32, F16 or BF16. Norms are stored in the same type.
    pub dtype: Dtype,
    /// The object of `tokenizer.json`.
    pub tokenizer_json: &'a Value,
    /// The chat template's source.
    pub chat_template: Option<&'a str>,
    /// Defaults for generation.
    pub generation: &'a GenerationConfig,
}

/// Writes all files of the folder at `path`, which must exist.
pub fn write(path: &Path, folder: &Folder<'_>) -> Result<()> {
    let torch_dtype = match folder.dtype {
        Dtype::F32 => "float32",
        Dtype::F16 => "float16",
        Dtype::BF16 => "bfloat16",
        other => {
            return Err(ModelError::unsupported(
                path,
                format!("an HF folder cannot hold {}; F32, F16 and BF16 it can", other.name()),
            ));
        }
    };
    if matches!(folder.config.variant.rope, RopeScaling::Divisors(_)) {
        return Err(ModelError::unsupported(
            path,
            "the rotary frequencies came from a GGUF file, which does not say how they were made: an HF folder has no place \
             for them; start from the model's HF folder",
        ));
    }
    let tensors = stored_tensors(folder.config);
    let names: Vec<(String, Vec<usize>)> = tensors
        .iter()
        .map(|tensor| (tensor.hf_name.clone(), tensor.shape.clone()))
        .collect();
    let mut parts = tensors.iter().map(|tensor| &tensor.parts);
    write_safetensors(&path.join(files::WEIGHTS), &names, folder.dtype, &Map::new(), |_| {
        join(
            folder.weights,
            parts.next().expect("values are asked for in the order of the names"),
        )
    })?;
    write_json(&path.join(files::CONFIG), &folder.config.to_hf(torch_dtype))?;
    write_json(
        &path.join(files::GENERATION_CONFIG),
        &folder.generation.to_hf(folder.config.bos),
    )?;
    write_text(&path.join(files::TOKENIZER), &folder.tokenizer_json.to_string())?;
    write_json(&path.join(files::TOKENIZER_CONFIG), &tokenizer_config(folder))?;
    if let Some(template) = folder.chat_template {
        write_text(&path.join(files::CHAT_TEMPLATE), template)?;
    }
    Ok(())
}

/// The rows of `parts`, one after the other.
pub(crate) fn join(weights: &dyn Weights, parts: &[TensorSpec]) -> Result<Vec<f32>> {
    let [first, others @ ..] = parts else {
        return Ok(Vec::new());
    };
    let mut values = weights.f32(&first.name)?;
    for part in others {
        values.extend(weights.f32(&part.name)?);
    }
    Ok(values)
}

/// Writes tensors (name, shape) as a safetensors file, one at a time, so that no more than one is in memory.
///
/// `dtype` is F32, F16 or BF16; `metadata` goes into the header beside `format: pt`. `values` is called once for each tensor,
/// in order, and may give out a slice.
pub fn write_safetensors<V: AsRef<[f32]>>(
    path: &Path,
    tensors: &[(String, Vec<usize>)],
    dtype: Dtype,
    metadata: &Map<String, Value>,
    mut values: impl FnMut(&str) -> Result<V>,
) -> Result<()> {
    let mut header = Map::new();
    let mut texts = metadata.clone();
    texts.insert("format".to_owned(), json!("pt"));
    header.insert("__metadata__".to_owned(), Value::Object(texts));
    let mut end = 0usize;
    for (name, shape) in tensors {
        let start = end;
        let size = shape
            .iter()
            .try_fold(1usize, |product, size| product.checked_mul(*size))
            .and_then(|elements| dtype.size_bytes(elements));
        end += size
            .ok_or_else(|| ModelError::malformed(path, format!("tensor {name} with shape {shape:?} is too large")))?;
        header.insert(
            name.clone(),
            json!({ "dtype": dtype.name(), "shape": shape, "data_offsets": [start, end] }),
        );
    }
    let mut header = Value::Object(header).to_string();
    // The format wants the data aligned to 8 bytes; trailing spaces are allowed for that.
    header.extend(std::iter::repeat_n(
        ' ',
        header.len().next_multiple_of(8) - header.len(),
    ));

    let io = |error| ModelError::io(path, error);
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(io)?);
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
    file.write_all(header.as_bytes()).map_err(io)?;
    let mut bytes = Vec::new();
    for (name, shape) in tensors {
        let values = values(name)?;
        let values = values.as_ref();
        if values.len() != shape.iter().product::<usize>() {
            return Err(ModelError::malformed(
                path,
                format!("tensor {name} has {} elements, its shape is {shape:?}", values.len()),
            ));
        }
        bytes.clear();
        let written = dtype.from_f32(values, &mut bytes);
        written.ok_or_else(|| {
            ModelError::unsupported(
                path,
                format!("{} cannot be written; F32, F16 and BF16 can", dtype.name()),
            )
        })?;
        file.write_all(&bytes).map_err(io)?;
    }
    file.into_inner()
        .map_err(|error| io(error.into_error()))?
        .sync_all()
        .map_err(io)
}

/// `tokenizer_config.json`: which tokens are special, by name. The class reads everything else from `tokenizer.json`.
fn tokenizer_config(folder: &Folder<'_>) -> Value {
    let added = folder.tokenizer_json["added_tokens"].as_array();
    let text = |id: Option<u32>| -> Value {
        let id = id.map(u64::from);
        let added = added
            .into_iter()
            .flatten()
            .find(|token| id.is_some() && token["id"].as_u64() == id);
        let model = || {
            let vocab = folder.tokenizer_json["model"]["vocab"].as_object()?;
            vocab
                .iter()
                .find(|(_, value)| id.is_some() && value.as_u64() == id)
                .map(|(text, _)| json!(text))
        };
        added
            .map(|token| token["content"].clone())
            .or_else(model)
            .unwrap_or(Value::Null)
    };
    let decoder: Map<String, Value> = added
        .into_iter()
        .flatten()
        .map(|token| {
            let mut entry = token.clone();
            let id = entry
                .as_object_mut()
                .and_then(|object| object.shift_remove("id"))
                .unwrap_or(Value::Null);
            (id.to_string(), entry)
        })
        .collect();
    json!({
        "added_tokens_decoder": decoder,
        "bos_token": text(folder.config.bos),
        "eos_token": text(folder.generation.eos.first().or(folder.config.eos.first()).copied()),
        "pad_token": text(folder.config.eos.first().copied()),
        "clean_up_tokenization_spaces": false,
        "model_max_length": folder.config.max_positions,
        "tokenizer_class": "PreTrainedTokenizerFast",
    })
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    write_text(path, &format!("{value:#}\n"))
}

fn write_text(path: &Path, text: &str) -> Result<()> {
    let io = |error| ModelError::io(path, error);
    let mut file = File::create(path).map_err(io)?;
    file.write_all(text.as_bytes()).map_err(io)?;
    file.sync_all().map_err(io)
}
