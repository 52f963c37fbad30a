//! `POST /v1/embeddings`: a vector for each text.

use std::sync::Arc;

use axum::Json;
use axum::extract::State as Extract;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use super::admit::Admitted;
use super::api::Prompt;
use super::error::ApiError;
use super::{Embeds, State, Task, check_name};

/// OpenAI's bound on the number of texts.
const MAX_TEXTS: usize = 2048;

/// The body. Fields that are not here change no vector.
#[derive(Debug, Deserialize)]
pub(super) struct EmbeddingRequest {
    input: Prompt,
    #[serde(default)]
    model: Option<String>,
    #[serde(default)]
    encoding_format: Option<Encoding>,
    #[serde(default)]
    dimensions: Option<u64>,
    #[serde(default)]
    truncate_prompt_tokens: Option<i64>,
}

/// How vectors are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Encoding {
    /// Numbers.
    #[default]
    Float,
    /// The bytes of little-endian 32-bit floats: a third of the size, and no rounding.
    Base64,
}

#[derive(Serialize)]
struct List {
    object: &'static str,
    data: Vec<Embedding>,
    model: String,
    usage: Tokens,
}

#[derive(Serialize)]
struct Embedding {
    object: &'static str,
    index: usize,
    embedding: Vector,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Vector {
    Float(Vec<f32>),
    Base64(String),
}

#[derive(Serialize)]
struct Tokens {
    prompt_tokens: usize,
    total_tokens: usize,
}

struct Ready {
    texts: Vec<Vec<u32>>,
    encoding: Encoding,
}

pub(super) async fn create(Extract(state): Extract<Arc<State>>, request: Admitted) -> Result<Response, ApiError> {
    // Known without the work of preparing.
    Embeds::of(state.open()?)?.embedder.has_room()?;
    let Ready { texts, encoding } = request.prepare(&state, ready).await?;
    let embeds = Embeds::of(state.open()?)?;
    let tokens = texts.iter().map(Vec::len).sum();
    let vectors = embeds.embedder.submit(texts)?.await;
    let vectors = vectors.map_err(|_| ApiError::internal("the encoder ended before the answer did"))?;
    let written = |vector: Vec<f32>| match encoding {
        Encoding::Float => Vector::Float(vector),
        Encoding::Base64 => {
            let bytes: Vec<u8> = vector.iter().flat_map(|x| x.to_le_bytes()).collect();
            Vector::Base64(STANDARD.encode(bytes))
        }
    };
    let data = vectors.into_iter().enumerate().map(|(index, vector)| Embedding {
        object: "embedding",
        index,
        embedding: written(vector),
    });
    let list = List {
        object: "list",
        data: data.collect(),
        model: embeds.names[0].clone(),
        usage: Tokens {
            prompt_tokens: tokens,
            total_tokens: tokens,
        },
    };
    Ok(Json(list).into_response())
}

fn ready(embeds: &Embeds, request: EmbeddingRequest) -> Result<Ready, ApiError> {
    check_name(&embeds.names, request.model.as_deref())?;
    let wrong = |message: String| ApiError::invalid("input", message);
    if let Some(dimensions) = request.dimensions.filter(|wanted| *wanted != embeds.dimensions as u64) {
        let has = embeds.dimensions;
        let message =
            format!("the model's vectors have {has} dimensions, and a part of one means nothing; got {dimensions}");
        return Err(ApiError::invalid("dimensions", message));
    }
    if request.truncate_prompt_tokens.is_some() {
        let message = "truncate_prompt_tokens is not supported: leave it out, and send texts that fit";
        return Err(ApiError::invalid("truncate_prompt_tokens", message));
    }
    let encode = |text: String| match text.is_empty() {
        true => Err(wrong("a text is empty".to_owned())),
        false => embeds
            .vocabulary
            .encode(&text, true)
            .map_err(|error| wrong(error.to_string())),
    };
    let texts = match request.input {
        Prompt::Text(text) => vec![encode(text)?],
        Prompt::Tokens(tokens) => vec![tokens],
        Prompt::Texts(texts) => {
            if texts.len() > MAX_TEXTS {
                return Err(wrong(format!("{} texts; {MAX_TEXTS} are the most", texts.len())));
            }
            texts.into_iter().map(encode).collect::<Result<_, _>>()?
        }
        Prompt::TokenLists(lists) => lists,
    };
    if texts.is_empty() || texts.len() > MAX_TEXTS {
        return Err(wrong(format!("{} texts; 1 to {MAX_TEXTS} are possible", texts.len())));
    }
    let (most, size) = (embeds.max_model_len, embeds.vocab_size);
    for tokens in &texts {
        if tokens.is_empty() {
            return Err(wrong("a text has no tokens".to_owned()));
        }
        if tokens.len() > most {
            let message = format!(
                "This model's maximum context length is {most} tokens. However, a text of the input has {}. Please reduce its length.",
                tokens.len()
            );
            return Err(ApiError::context_length("input", message));
        }
        if let Some(id) = tokens.iter().find(|id| **id as usize >= size) {
            return Err(wrong(format!("token id {id} is outside of the vocabulary of {size}")));
        }
    }
    Ok(Ready {
        texts,
        encoding: request.encoding_format.unwrap_or_default(),
    })
}
