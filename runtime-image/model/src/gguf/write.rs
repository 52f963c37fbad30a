//! Writing GGUF version 3, so that llama.cpp loads it: matrices in the asked type, norms in F32, query and key rows interleaved.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use serde_json::Value;

use super::tokenizer::{CONTROL, HF_JSON, NORMAL, USER_DEFINED, pre_tokenizer_name};
use super::{ALIGNMENT, DTYPES, GENERATION, MAGIC, model, rope, spm};
use crate::config::ModelConfig;
use crate::dtype::Dtype;
use crate::error::{ModelError, Result};
use crate::family::{Role, StoredTensor, gguf_interleaved_head_dim, gguf_row_to_hf, stored_tensors};
use crate::generation::GenerationConfig;
use crate::hf::join;
use crate::weights::Weights;

/// The texts that go into the file beside the weights.
#[derive(Clone, Copy, Debug)]
pub struct Texts<'a> {
    /// The object of `tokenizer.json`; a BPE.
    pub tokenizer_json: &'a Value,
    /// The chat template's source.
    pub chat_template: Option<&'a str>,
    /// Defaults for generation. GGUF's own keys take the first two of the end tokens.
    pub generation: &'a GenerationConfig,
}

/// Writes the model to `path` with its matrices in `dtype` (any but Q4_1).
///
/// With 4 bits, embeddings and output matrix keep more: every token passes through them. A matrix whose rows are no whole number
/// of blocks is stored in the next finer type. The file is complete when this returns.
pub fn write(
    path: &Path,
    name: &str,
    config: &ModelConfig,
    weights: &dyn Weights,
    texts: Texts<'_>,
    dtype: Dtype,
) -> Result<()> {
    let mut plan: Vec<Planned> = stored_tensors(config)
        .into_iter()
        .map(|tensor| Planned {
            dtype: stored_dtype(&tensor, dtype),
            tensor,
            values: None,
        })
        .collect();
    plan.extend(rope::tensors(config).into_iter().map(|(name, values)| Planned {
        tensor: StoredTensor {
            hf_name: name.to_owned(),
            gguf_name: name.to_owned(),
            shape: vec![values.len()],
            role: Role::Bias,
            parts: Vec::new(),
        },
        dtype: Dtype::F32,
        values: Some(values),
    }));

    let mut header = Vec::new();
    header.extend(MAGIC);
    header.extend(3u32.to_le_bytes());
    header.extend((plan.len() as u64).to_le_bytes());
    let metadata = metadata(path, name, config, texts, dtype)?;
    header.extend((metadata.count).to_le_bytes());
    header.extend(metadata.bytes);
    let mut offset = 0usize;
    for Planned { tensor, dtype, .. } in &plan {
        text(&mut header, &tensor.gguf_name);
        header.extend((tensor.shape.len() as u32).to_le_bytes());
        tensor
            .shape
            .iter()
            .rev()
            .for_each(|size| header.extend((*size as u64).to_le_bytes()));
        let number = DTYPES
            .iter()
            .find(|(_, known)| known == dtype)
            .map(|(number, _)| *number)
            .expect("the table has every type");
        header.extend(number.to_le_bytes());
        header.extend((offset as u64).to_le_bytes());
        let size = dtype
            .size_bytes(tensor.shape.iter().product())
            .ok_or_else(|| ModelError::malformed(path, format!("{} does not fit {}", tensor.hf_name, dtype.name())))?;
        offset += size.next_multiple_of(ALIGNMENT);
    }
    header.resize(header.len().next_multiple_of(ALIGNMENT), 0);

    let io = |error| ModelError::io(path, error);
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path).map_err(io)?);
    file.write_all(&header).map_err(io)?;
    let mut bytes = Vec::new();
    for Planned { tensor, dtype, values } in plan {
        bytes.clear();
        let mut values = match values {
            Some(values) => values,
            None => join(weights, &tensor.parts)?,
        };
        let elements: usize = tensor.shape.iter().product();
        if values.len() != elements {
            return Err(ModelError::malformed(
                path,
                format!(
                    "tensor {} has {} elements, not {elements}",
                    tensor.hf_name,
                    values.len()
                ),
            ));
        }
        if let Some(head_dim) = gguf_interleaved_head_dim(config, &tensor.hf_name) {
            values = interleave(&values, tensor.shape[0], head_dim);
        }
        let offset = config.family.spec().norm_offset;
        if tensor.role == Role::Norm && offset != 0.0 {
            values.iter_mut().for_each(|value| *value += offset);
        }
        check_range(path, &tensor.hf_name, &values, dtype)?;
        convert(dtype, &values, &mut bytes).ok_or_else(|| {
            ModelError::unsupported(
                path,
                format!("{} cannot be written: choose another format", dtype.name()),
            )
        })?;
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        file.write_all(&bytes).map_err(io)?;
    }
    file.into_inner()
        .map_err(|error| io(error.into_error()))?
        .sync_all()
        .map_err(io)
}

/// A tensor to be written; `values` where they do not come from the model's weights.
struct Planned {
    tensor: StoredTensor,
    dtype: Dtype,
    values: Option<Vec<f32>>,
}

/// A value that the type cannot hold would become infinite, and the model would answer nonsense.
fn check_range(path: &Path, tensor: &str, values: &[f32], dtype: Dtype) -> Result<()> {
    let most = dtype.largest();
    match values.iter().find(|value| value.is_nan() || value.abs() > most) {
        None => Ok(()),
        Some(value) if value.is_finite() => Err(ModelError::InvalidRequest {
            path: path.to_owned(),
            what: format!(
                "tensor {tensor} has the value {value}, and {} ends at {most}: ask for another format",
                dtype.name()
            ),
        }),
        Some(value) => Err(ModelError::malformed(
            path,
            format!("tensor {tensor} has the value {value}: the model it comes from is damaged"),
        )),
    }
}

fn stored_dtype(tensor: &StoredTensor, dtype: Dtype) -> Dtype {
    let wanted: &[Dtype] = match (tensor.role, dtype) {
        (Role::Norm | Role::Bias, _) => return Dtype::F32,
        (Role::Linear, Dtype::Q4K) => &[Dtype::Q4K, Dtype::Q8_0],
        (_, Dtype::Q4K) => &[Dtype::Q6K, Dtype::Q8_0],
        (Role::Embedding | Role::Head, Dtype::Q4_0) => &[Dtype::Q8_0],
        _ => &[dtype],
    };
    let columns = tensor.shape.last().copied().unwrap_or(1);
    let fits = wanted.iter().find(|dtype| columns.is_multiple_of(dtype.block().0));
    fits.copied().unwrap_or(Dtype::F16)
}

/// [`Dtype::from_f32`] on all processors: rounding to 4 bits tries many scales.
fn convert(dtype: Dtype, values: &[f32], out: &mut Vec<u8>) -> Option<()> {
    let threads = std::thread::available_parallelism().map_or(1, |count| count.get());
    let chunk = values.len().div_ceil(threads).next_multiple_of(dtype.block().0);
    let parts: Vec<Option<Vec<u8>>> = std::thread::scope(|scope| {
        let one = |values| {
            let mut bytes = Vec::new();
            dtype.from_f32(values, &mut bytes).map(|()| bytes)
        };
        let threads: Vec<_> = values
            .chunks(chunk.max(1))
            .map(|values| scope.spawn(move || one(values)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    });
    parts
        .into_iter()
        .try_for_each(|part| part.map(|bytes| out.extend(bytes)))
}

fn interleave(values: &[f32], rows: usize, head_dim: usize) -> Vec<f32> {
    let columns = values.len() / rows;
    (0..rows)
        .flat_map(|row| {
            values[gguf_row_to_hf(row, head_dim) * columns..][..columns]
                .iter()
                .copied()
        })
        .collect()
}

struct Metadata {
    bytes: Vec<u8>,
    count: u64,
}

impl Metadata {
    fn key(&mut self, key: &str, kind: u32) {
        text(&mut self.bytes, key);
        self.bytes.extend(kind.to_le_bytes());
        self.count += 1;
    }

    fn u32(&mut self, key: &str, value: usize) {
        self.key(key, 4);
        self.bytes.extend((value as u32).to_le_bytes());
    }

    fn f32(&mut self, key: &str, value: f32) {
        self.key(key, 6);
        self.bytes.extend(value.to_le_bytes());
    }

    fn bool(&mut self, key: &str, value: bool) {
        self.key(key, 7);
        self.bytes.push(value.into());
    }

    fn string(&mut self, key: &str, value: &str) {
        self.key(key, 8);
        text(&mut self.bytes, value);
    }

    fn strings<'a>(&mut self, key: &str, values: impl ExactSizeIterator<Item = &'a str>) {
        self.key(key, 9);
        self.bytes.extend(8u32.to_le_bytes());
        self.bytes.extend((values.len() as u64).to_le_bytes());
        values.for_each(|value| text(&mut self.bytes, value));
    }

    fn f32s(&mut self, key: &str, values: &[f32]) {
        self.key(key, 9);
        self.bytes.extend(6u32.to_le_bytes());
        self.bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| self.bytes.extend(value.to_le_bytes()));
    }

    fn i32s(&mut self, key: &str, values: &[i32]) {
        self.key(key, 9);
        self.bytes.extend(5u32.to_le_bytes());
        self.bytes.extend((values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| self.bytes.extend(value.to_le_bytes()));
    }
}

fn text(out: &mut Vec<u8>, value: &str) {
    out.extend((value.len() as u64).to_le_bytes());
    out.extend(value.as_bytes());
}

fn metadata(path: &Path, name: &str, config: &ModelConfig, texts: Texts<'_>, dtype: Dtype) -> Result<Metadata> {
    let mut out = Metadata {
        bytes: Vec::new(),
        count: 0,
    };
    let arch = config.family.spec().gguf_architecture;
    let file_type = match dtype {
        Dtype::F32 => 0,
        Dtype::F16 => 1,
        Dtype::Q4_0 => 2,
        Dtype::Q4_1 => 3,
        Dtype::Q8_0 => 7,
        Dtype::Q4K => 14,
        Dtype::Q6K => 18,
        Dtype::BF16 => 32,
    };
    out.string("general.architecture", arch);
    out.string("general.type", "model");
    out.string("general.name", name);
    out.u32("general.file_type", file_type);
    out.u32("general.quantization_version", 2);
    let key = |key: &str| format!("{arch}.{key}");
    out.u32(&key("block_count"), config.layers);
    out.u32(&key("context_length"), config.max_positions);
    out.u32(&key("embedding_length"), config.hidden_size);
    out.u32(&key("feed_forward_length"), config.intermediate_size);
    out.u32(&key("attention.head_count"), config.heads);
    out.u32(&key("attention.head_count_kv"), config.kv_heads);
    out.u32(&key("attention.key_length"), config.head_dim);
    out.u32(&key("attention.value_length"), config.head_dim);
    out.f32(&key("attention.layer_norm_rms_epsilon"), config.norm_eps);
    out.f32(&key("rope.freq_base"), config.rope_theta);
    out.u32(&key("rope.dimension_count"), config.rotary_dim());
    let named = rope::named(config, path)?;
    if let Some(kind) = named.kind {
        out.string(&key("rope.scaling.type"), kind);
    }
    for (name, value) in named.numbers {
        out.f32(&key(&format!("rope.scaling.{name}")), value);
    }
    if let Some(positions) = named.original_positions {
        out.u32(&key("rope.scaling.original_context_length"), positions);
    }
    write_variant(&mut out, path, config)?;
    out.u32(&key("vocab_size"), config.vocab_size);
    write_tokenizer(&mut out, path, config, texts)?;
    out.string(GENERATION, &texts.generation.to_hf(config.bos).to_string());
    Ok(out)
}

/// Soft caps and windows. What GGUF has no key for must be what a reader assumes.
fn write_variant(out: &mut Metadata, path: &Path, config: &ModelConfig) -> Result<()> {
    let (spec, variant) = (config.family.spec(), &config.variant);
    let key = |key: &str| format!("{}.{key}", spec.gguf_architecture);
    let assumed = model::assumed_query_scale(config.family, config.layers, config.hidden_size, config.heads);
    let head = config.head_dim as f32;
    let mut silent = vec![(
        "query_pre_attn_scalar",
        variant.query_scale.unwrap_or(head) == assumed.unwrap_or(head),
    )];
    if let Some(window) = variant.window {
        out.u32(&key("attention.sliding_window"), window);
        silent.push((
            "layer_types",
            variant.local_layers == config.family.local_layers(config.layers),
        ));
    }
    for (name, value) in [
        ("attn_logit_softcapping", variant.attention_soft_cap),
        ("final_logit_softcapping", variant.logit_soft_cap),
        ("rope.freq_base_swa", variant.local_rope_theta),
    ] {
        if let Some(value) = value {
            out.f32(&key(name), value);
        }
    }
    match silent.into_iter().find(|(_, same)| !same) {
        None => Ok(()),
        Some((name, _)) => Err(ModelError::unsupported(
            path,
            format!(
                "GGUF cannot say the {name} of this {} model: serve its HF folder",
                config.family.name()
            ),
        )),
    }
}

fn write_tokenizer(out: &mut Metadata, path: &Path, config: &ModelConfig, texts: Texts<'_>) -> Result<()> {
    let json = texts.tokenizer_json;
    let model = &json["model"];
    let vocab = model["vocab"].as_object().filter(|_| model["type"] == "BPE");
    let vocab = vocab.ok_or_else(|| {
        ModelError::unsupported(path, "the tokenizer is no BPE; GGUF files are written with BPE only")
    })?;
    let id_of = |value: &Value| {
        value
            .as_u64()
            .and_then(|id| usize::try_from(id).ok())
            .filter(|id| *id < config.vocab_size)
    };
    let bad_id = |token: &str| {
        ModelError::malformed(
            path,
            format!(
                "token {token:?} has an id outside of the model's vocabulary of {}",
                config.vocab_size
            ),
        )
    };

    // Ids that no token has are filled as llama.cpp's converter does.
    let mut tokens: Vec<String> = (0..config.vocab_size).map(|id| format!("[PAD{id}]")).collect();
    let mut types = vec![5; config.vocab_size]; // 5: unused
    for (token, id) in vocab {
        let id = id_of(id).ok_or_else(|| bad_id(token))?;
        tokens[id] = token.clone();
        types[id] = NORMAL;
    }
    for added in json["added_tokens"].as_array().into_iter().flatten() {
        let token = added["content"].as_str().unwrap_or_default();
        let id = id_of(&added["id"]).ok_or_else(|| bad_id(token))?;
        tokens[id] = token.to_owned();
        types[id] = if added["special"] == true {
            CONTROL
        } else {
            USER_DEFINED
        };
    }
    // Newer files write a merge as a pair, older ones as one text.
    let merges: Vec<String> = model["merges"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|merge| match merge {
            Value::Array(pair) => pair.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(" "),
            other => other.as_str().unwrap_or_default().to_owned(),
        })
        .collect();

    // A tokenizer that GGUF cannot say is not passed off as another one: llama.cpp then computes tokens, but reads no text.
    let (pre, prefix) = (pre_tokenizer_name(json), spm::recognise(json));
    let name = match (pre, prefix) {
        (Some(_), _) => "gpt2",
        (None, Some(_)) => "llama",
        (None, None) => "none",
    };
    out.string("tokenizer.ggml.model", name);
    if let Some(pre) = pre {
        out.string("tokenizer.ggml.pre", pre);
        out.strings("tokenizer.ggml.merges", merges.iter().map(String::as_str));
    } else if prefix.is_some() {
        let scores = spm::scores_and_types(json, &tokens, &mut types);
        out.f32s("tokenizer.ggml.scores", &scores);
    }
    out.strings("tokenizer.ggml.tokens", tokens.iter().map(String::as_str));
    out.i32s("tokenizer.ggml.token_type", &types);
    if let Some(id) = config.bos {
        out.u32("tokenizer.ggml.bos_token_id", id as usize);
    }
    for (key, id) in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"]
        .into_iter()
        .zip(&texts.generation.eos)
    {
        out.u32(key, *id as usize);
    }
    let adds_bos = json["post_processor"].to_string().contains("SpecialToken");
    out.bool("tokenizer.ggml.add_bos_token", adds_bos && config.bos.is_some());
    out.bool("tokenizer.ggml.add_space_prefix", pre.is_none() && prefix == Some(true));
    if let Some(template) = texts.chat_template {
        out.string("tokenizer.chat_template", template);
    }
    out.string(HF_JSON, &json.to_string());
    Ok(())
}
