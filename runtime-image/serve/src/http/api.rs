//! Request bodies: the fields that this server acts on. What it makes of all others: [`super::unsupported`].

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::form::FormFields;
use super::tools::ToolFields;

/// Fields that chat and plain completions share.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Options {
    pub(super) model: Option<String>,
    pub(super) n: Option<i64>,
    pub(super) cache_salt: Option<String>,
    pub(super) priority: Option<i64>,
    pub(super) user: Option<String>,
    /// OpenAI's newer word for `user`.
    pub(super) safety_identifier: Option<String>,
    pub(super) max_tokens: Option<i64>,
    pub(super) temperature: Option<f64>,
    pub(super) top_p: Option<f64>,
    pub(super) top_k: Option<i64>,
    pub(super) seed: Option<i64>,
    pub(super) stop: Option<OneOrMany>,
    pub(super) stream: Option<bool>,
    pub(super) stream_options: Option<StreamOptions>,
    pub(super) presence_penalty: Option<f64>,
    pub(super) frequency_penalty: Option<f64>,
    pub(super) ignore_eos: Option<bool>,
    pub(super) min_p: Option<f64>,
    pub(super) repetition_penalty: Option<f64>,
    pub(super) logit_bias: Option<BTreeMap<String, f64>>,
    pub(super) stop_token_ids: Option<Vec<u32>>,
    pub(super) min_tokens: Option<u64>,
    pub(super) include_stop_str_in_output: Option<bool>,
    pub(super) skip_special_tokens: Option<bool>,
    #[serde(flatten)]
    pub(super) form: FormFields,
}

/// How a stream is sent.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct StreamOptions {
    pub(super) include_usage: Option<bool>,
}

/// A text or a list of texts.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

/// Body of `/v1/chat/completions`.
#[derive(Debug, Deserialize)]
pub(super) struct ChatRequest {
    pub(super) messages: Vec<Value>,
    #[serde(flatten)]
    pub(super) options: Options,
    #[serde(default)]
    pub(super) max_completion_tokens: Option<i64>,
    #[serde(default)]
    pub(super) logprobs: Option<bool>,
    #[serde(default)]
    pub(super) top_logprobs: Option<i64>,
    #[serde(default)]
    pub(super) chat_template_kwargs: Option<Map<String, Value>>,
    #[serde(flatten)]
    pub(super) tools: ToolFields,
    #[serde(flatten)]
    pub(super) rest: Map<String, Value>,
}

/// Body of `/v1/completions`.
#[derive(Debug, Deserialize)]
pub(super) struct CompletionRequest {
    pub(super) prompt: Prompt,
    #[serde(default)]
    pub(super) echo: Option<bool>,
    #[serde(default)]
    pub(super) best_of: Option<i64>,
    #[serde(flatten)]
    pub(super) options: Options,
    #[serde(default)]
    pub(super) logprobs: Option<i64>,
    #[serde(default)]
    pub(super) add_special_tokens: Option<bool>,
    #[serde(flatten)]
    pub(super) rest: Map<String, Value>,
}

/// A prompt as text or as token ids, or several of one kind.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

/// Body of `/tokenize`: a text, or messages as a chat would send them.
#[derive(Debug, Deserialize)]
pub(super) struct TokenizeRequest {
    #[serde(default)]
    pub(super) model: Option<String>,
    #[serde(default)]
    pub(super) prompt: Option<String>,
    #[serde(default)]
    pub(super) messages: Option<Vec<Value>>,
    #[serde(flatten)]
    pub(super) tools: ToolFields,
    #[serde(default)]
    pub(super) add_special_tokens: Option<bool>,
    #[serde(default)]
    pub(super) add_generation_prompt: Option<bool>,
    #[serde(default)]
    pub(super) return_token_strs: Option<bool>,
}

/// Body of `/detokenize`.
#[derive(Debug, Deserialize)]
pub(super) struct DetokenizeRequest {
    #[serde(default)]
    pub(super) model: Option<String>,
    pub(super) tokens: Vec<u32>,
}
