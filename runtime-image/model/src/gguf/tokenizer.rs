//! The tokenizer inside a GGUF file, as the object of an HF `tokenizer.json`; and back.
//!
//! GGUF stores byte-level BPE as tokens, types and merges, and *names* the pre-tokenizer. One table says what each name
//! stands for; the reader looks a name up, the writer looks a definition up.

use serde_json::{Value, json};

use super::parse::Gguf;
use super::spm;
use crate::error::{ModelError, Result};

/// GGUF's key for a whole `tokenizer.json`; it says everything, so it wins over the separate lists.
pub(super) const HF_JSON: &str = "tokenizer.huggingface.json";

/// Token types in GGUF.
pub(super) const NORMAL: i32 = 1;
const UNKNOWN: i64 = 2;
pub(super) const CONTROL: i32 = 3;
pub(super) const USER_DEFINED: i32 = 4;

/// GGUF's name of a pre-tokenizer, and what it means: `(normalizer, pre_tokenizer, ignore_merges)`.
fn definition(name: &str) -> Option<(Value, Value, bool)> {
    let byte_level = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let split = |regex: &str| {
        json!({"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false},
            byte_level(false),
        ]})
    };
    Some(match name {
        "gpt-2" => (Value::Null, byte_level(true), false),
        "smollm" => (
            Value::Null,
            json!({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": true}, byte_level(true)]}),
            false,
        ),
        "llama-bpe" | "llama3" | "llama-v3" | "falcon3" => (
            Value::Null,
            split(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ),
            true,
        ),
        "qwen2" | "deepseek-r1-qwen" => (
            json!({"type": "NFC"}),
            split(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ),
            false,
        ),
        "tekken" => (
            Value::Null,
            split(
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ),
            true,
        ),
        "gpt-4o" => (
            Value::Null,
            split(
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ),
            false,
        ),
        _ => return None,
    })
}

/// The names that [`pre_tokenizer_name`] tries, in order.
const NAMES: [&str; 6] = ["gpt-2", "smollm", "llama-bpe", "qwen2", "tekken", "gpt-4o"];

/// GGUF's name for how a `tokenizer.json` splits text; `None` if GGUF has no name for it that this engine knows. All that a
/// name stands for must be the same: a reader of the file has nothing else.
pub(super) fn pre_tokenizer_name(tokenizer: &Value) -> Option<&'static str> {
    let found = canonical(&tokenizer["pre_tokenizer"]);
    let found_ignores = tokenizer["model"]["ignore_merges"] == true;
    NAMES.into_iter().find(|name| {
        definition(name).is_some_and(|(normalizer, pre, ignores)| {
            canonical(&pre) == found && normalizer == tokenizer["normalizer"] && ignores == found_ignores
        })
    })
}

/// Drops what does not change the tokens: byte-level offsets trimming, and sequences of one.
fn canonical(pre: &Value) -> Value {
    let mut pre = pre.clone();
    if let Some(object) = pre.as_object_mut() {
        object.remove("trim_offsets");
        if object.get("type").and_then(Value::as_str) == Some("ByteLevel") {
            object.entry("use_regex").or_insert(Value::Bool(true));
        }
    }
    if let Some(parts) = pre.get_mut("pretokenizers").and_then(Value::as_array_mut) {
        parts.iter_mut().for_each(|part| *part = canonical(part));
        if let [one] = parts.as_slice() {
            return one.clone();
        }
    }
    pre
}

pub(super) fn tokenizer_json(file: &Gguf) -> Result<Value> {
    let path = file.path();
    if let Some(text) = file.string(HF_JSON) {
        return serde_json::from_str(text)
            .map_err(|error| ModelError::malformed(path, format!("metadata {HF_JSON}: {error}")));
    }
    let model = file.string("tokenizer.ggml.model").unwrap_or("none");
    let sentence_piece = match model {
        "gpt2" => false,
        "llama" => true,
        other => {
            return Err(ModelError::unsupported(
                path,
                format!(
                    "tokenizer model {other:?} is not supported; \"gpt2\" (byte-level BPE) and \"llama\" (SentencePiece's BPE) are"
                ),
            ));
        }
    };
    let missing = |key: &str| ModelError::malformed(path, format!("metadata {key} is missing or of the wrong type"));
    let tokens = file
        .strings("tokenizer.ggml.tokens")
        .ok_or_else(|| missing("tokenizer.ggml.tokens"))?;
    let types = file
        .integers("tokenizer.ggml.token_type")
        .ok_or_else(|| missing("tokenizer.ggml.token_type"))?;
    if types.len() != tokens.len() {
        return Err(ModelError::malformed(
            path,
            format!("{} tokens have {} types", tokens.len(), types.len()),
        ));
    }
    let tokens = match sentence_piece {
        true => spm::texts(&tokens, &types),
        false => tokens.into_iter().map(str::to_owned).collect(),
    };
    let architecture = file.string("general.architecture").unwrap_or_default();
    let phi3 = sentence_piece && architecture == "phi3";
    let added: Vec<Value> = tokens
        .iter()
        .zip(&types)
        .enumerate()
        .filter(|(_, (_, kind))| [UNKNOWN, CONTROL.into(), USER_DEFINED.into()].contains(kind))
        .map(|(id, (text, kind))| {
            // Phi-3's own files say so; GGUF has no place for it, and llama.cpp knows it by the model's name.
            let rstrip = phi3 && (text == "</s>" || text.starts_with("<|") && text != "<|endoftext|>");
            json!({
                "id": id, "content": text, "single_word": false, "lstrip": false, "rstrip": rstrip, "normalized": false,
                "special": *kind != i64::from(USER_DEFINED),
            })
        })
        .collect();
    let bos = file
        .unsigned("tokenizer.ggml.bos_token_id")
        .and_then(|id| Some((id, tokens.get(usize::try_from(id).ok()?)?)));
    let post_processor = match bos.filter(|_| file.bool("tokenizer.ggml.add_bos_token").unwrap_or(sentence_piece)) {
        Some((id, text)) => json!({
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": text, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {text: {"id": text, "ids": [id], "tokens": [text]}},
        }),
        None => Value::Null,
    };
    let vocab: serde_json::Map<String, Value> = tokens
        .iter()
        .enumerate()
        .map(|(id, text)| (text.clone(), json!(id)))
        .collect();
    if vocab.len() != tokens.len() {
        return Err(ModelError::malformed(path, "two token ids have the same text"));
    }
    let (normalizer, pre_tokenizer, decoder, model) = match sentence_piece {
        true => {
            let scores = file
                .floats("tokenizer.ggml.scores")
                .filter(|scores| scores.len() == tokens.len())
                .ok_or_else(|| missing("tokenizer.ggml.scores"))?;
            let (normalizer, decoder) = spm::pipeline(file.bool("tokenizer.ggml.add_space_prefix").unwrap_or(true));
            let model = spm::model(
                &tokens,
                &types,
                &scores,
                vocab.into(),
                architecture.starts_with("gemma"),
            );
            (normalizer, Value::Null, decoder, model)
        }
        false => {
            let merges = file
                .strings("tokenizer.ggml.merges")
                .ok_or_else(|| missing("tokenizer.ggml.merges"))?;
            // "default" and nothing at all say that whoever wrote the file did not know: a guess would be other tokens.
            let name = file.string("tokenizer.ggml.pre").unwrap_or("default");
            let (normalizer, pre_tokenizer, ignore_merges) = definition(name).ok_or_else(|| {
                ModelError::unsupported(
                    path,
                    format!(
                        "pre-tokenizer {name:?} is not known; known are {}: use the model's Hugging Face folder, or a file \
                         that names one of them",
                        NAMES.join(", ")
                    ),
                )
            })?;
            let decoder =
                json!({"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true});
            let model = json!({
                "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": ignore_merges,
                "vocab": vocab, "merges": merges,
            });
            (normalizer, pre_tokenizer, decoder, model)
        }
    };
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": post_processor,
        "decoder": decoder,
        "model": model,
    }))
}
