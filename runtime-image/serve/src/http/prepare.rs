//! From a request's fields to what the engine takes, every field checked.

use std::collections::BTreeMap;
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hash, Hasher};
use std::sync::{Arc, LazyLock};

use serde_json::{Map, Value, json};

use super::Served;
use super::api::{OneOrMany, Options};
use super::error::ApiError;
use super::tools::{self, Reader, Tools};
use crate::engine::{Adapter, Sampling, Submission};
use crate::schedule::ClientId;

/// The most stop strings, and the longest, in bytes.
const MAX_STOPS: usize = 16;
const MAX_STOP_BYTES: usize = 1024;
/// The most alternatives with log-probabilities.
const MAX_TOP_LOGPROBS: i64 = 20;
/// The most tokens whose logits are biased, and that end an answer besides the model's own.
const MAX_BIASES: usize = 4096;
const MAX_STOP_TOKENS: usize = 256;
/// The longest salt, in bytes.
const MAX_SALT_BYTES: usize = 256;
/// Roles that a chat template may write unquoted.
const ROLES: [&str; 6] = ["system", "developer", "user", "assistant", "tool", "function"];

/// What both kinds of completion need besides the prompt.
pub(super) struct Prepared {
    pub(super) submission: Submission,
    /// Those of further prompts of the same request.
    pub(super) others: Vec<Submission>,
    pub(super) shown: Shown,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    /// Finds the calls in an answer that may have some.
    pub(super) reader: Option<Reader>,
}

/// What an answer shows besides its text, and what it leaves out.
#[derive(Default)]
pub(super) struct Shown {
    /// What stands before each prompt's answers, if anything does.
    pub(super) echo: Vec<String>,
    /// Only the prompt was asked about: the one token that is generated is left out.
    pub(super) prompt_only: bool,
    /// That many of each prompt's answers, the likeliest first; absent: all of them, in their order.
    pub(super) best: Option<usize>,
    /// The log-probabilities are for choosing the best answers alone.
    pub(super) hide_log_probs: bool,
}

/// Checks that the request is for a model that is served; the adapter, if the name is that of one.
pub(super) fn model(served: &Served, name: Option<&str>) -> Result<Option<Arc<Adapter>>, ApiError> {
    let Some(name) = name.filter(|name| !served.names.iter().any(|known| known == name)) else {
        return Ok(None);
    };
    match served.adapters.get(name) {
        Some(loaded) => Ok(Some(loaded.adapter)),
        None => {
            let known = [served.names.clone(), served.adapters.names()].concat();
            Err(ApiError::unknown_model(name, &known))
        }
    }
}

/// Checks all options. `max_tokens` is what the request's own field for it says; `default_max` holds without it.
pub(super) fn prepare(
    served: &Served,
    options: Options,
    prompt: Vec<u32>,
    prompt_field: &'static str,
    max_tokens: Option<i64>,
    default_max: usize,
    log_probs: Option<i64>,
) -> Result<Prepared, ApiError> {
    if prompt.is_empty() {
        return Err(ApiError::invalid(prompt_field, "the prompt has no tokens"));
    }
    if let Some(id) = prompt.iter().find(|id| **id as usize >= served.config.vocab_size) {
        return Err(ApiError::invalid(
            prompt_field,
            format!(
                "token id {id} is outside of the vocabulary of {}",
                served.config.vocab_size
            ),
        ));
    }
    let max_tokens =
        match max_tokens {
            None => None,
            Some(max) => Some(usize::try_from(max).ok().filter(|max| *max > 0).ok_or_else(|| {
                ApiError::invalid("max_tokens", format!("max_tokens is {max}; it must be at least 1"))
            })?),
        };
    let (length, most) = (prompt.len(), served.max_model_len);
    let asked = max_tokens.unwrap_or(1);
    if length.saturating_add(asked) > most {
        let message = format!(
            "This model's maximum context length is {most} tokens. However, you requested {} tokens ({length} in the {prompt_field}, {asked} in the \
             completion). Please reduce the length of the {prompt_field} or completion.",
            length.saturating_add(asked)
        );
        return Err(ApiError::context_length(prompt_field, message));
    }
    let log_probs = match log_probs {
        None => None,
        Some(count) if (0..=MAX_TOP_LOGPROBS).contains(&count) => Some(count as usize),
        Some(count) => {
            return Err(ApiError::invalid(
                "top_logprobs",
                format!("{count} alternatives were asked for; 0 to {MAX_TOP_LOGPROBS} are possible"),
            ));
        }
    };
    let (choices, most_choices) = (options.n.unwrap_or(1), served.engine.most_choices());
    let choices = usize::try_from(choices)
        .ok()
        .filter(|n| (1..=most_choices).contains(n))
        .ok_or_else(|| ApiError::invalid("n", format!("n is {choices}; it must lie between 1 and {most_choices}")))?;
    let defaults = &served.generation;
    let vocabulary = served.config.vocab_size;
    let range =
        |name: &'static str, value: Option<f64>, default: f64, from: f64, to: f64| match value.unwrap_or(default) {
            value if value >= from && value <= to => Ok(value as f32),
            value => Err(ApiError::invalid(
                name,
                format!("{name} is {value}; it must lie between {from} and {to}"),
            )),
        };
    let sampling = Sampling {
        temperature: range(
            "temperature",
            options.temperature,
            f64::from(defaults.temperature.unwrap_or(1.0)),
            0.0,
            2.0,
        )?,
        top_p: range(
            "top_p",
            options.top_p,
            f64::from(defaults.top_p.unwrap_or(1.0)),
            0.0,
            1.0,
        )?,
        top_k: match options.top_k {
            None => defaults.top_k.unwrap_or(0),
            Some(k) if k >= -1 => usize::try_from(k).unwrap_or(0), // -1 is vLLM's word for all
            Some(k) => {
                return Err(ApiError::invalid(
                    "top_k",
                    format!("top_k is {k}; it must be -1, 0 (both: all) or more"),
                ));
            }
        },
        seed: options.seed.map_or_else(random, |seed| seed as u64),
        frequency_penalty: range("frequency_penalty", options.frequency_penalty, 0.0, -2.0, 2.0)?,
        presence_penalty: range("presence_penalty", options.presence_penalty, 0.0, -2.0, 2.0)?,
        min_p: range("min_p", options.min_p, 0.0, 0.0, 1.0)?,
        repetition_penalty: range("repetition_penalty", options.repetition_penalty, 1.0, 0.01, 100.0)?,
        bias: bias(options.logit_bias, vocabulary)?,
    };
    let mut stop_tokens = options.stop_token_ids.unwrap_or_default();
    if stop_tokens.len() > MAX_STOP_TOKENS || stop_tokens.iter().any(|id| *id as usize >= vocabulary) {
        let message = format!("stop_token_ids takes up to {MAX_STOP_TOKENS} token ids below {vocabulary}");
        return Err(ApiError::invalid("stop_token_ids", message));
    }
    if options.ignore_eos != Some(true) {
        stop_tokens.extend(&served.generation.eos);
    }
    let max_tokens = max_tokens.unwrap_or(default_max).min(most - length);
    let min_tokens = options.min_tokens.unwrap_or(0);
    let min_tokens = usize::try_from(min_tokens)
        .ok()
        .filter(|min| *min <= max_tokens)
        .ok_or_else(|| {
            let message = format!("min_tokens is {min_tokens}; at most {max_tokens} tokens can be generated");
            ApiError::invalid("min_tokens", message)
        })?;
    let adapter = model(served, options.model.as_deref())?;
    Ok(Prepared {
        submission: Submission {
            salt: cache_salt(options.cache_salt.as_deref(), adapter.as_deref())?,
            client: ClientId {
                tenant: 0,
                user: options
                    .safety_identifier
                    .or(options.user)
                    .map_or(0, |user| number(&user)),
            },
            priority: options.priority.unwrap_or(0),
            max_tokens,
            min_tokens,
            prompt,
            choices,
            sampling,
            stop: stops(options.stop)?,
            stop_tokens,
            show_stop: options.include_stop_str_in_output == Some(true),
            show_special: options.skip_special_tokens == Some(false),
            log_probs,
            prompt_log_probs: None,
            adapter,
            constraint: None,
        },
        stream: options.stream == Some(true),
        include_usage: options.stream_options.and_then(|options| options.include_usage) == Some(true),
        reader: None,
        others: Vec::new(),
        shown: Shown::default(),
    })
}

/// What keeps apart in the prefix cache: vLLM's field for tenants, and the adapter.
fn cache_salt(salt: Option<&str>, adapter: Option<&Adapter>) -> Result<Arc<[u8]>, ApiError> {
    match salt {
        Some(text) if text.is_empty() || text.len() > MAX_SALT_BYTES => {
            let message = format!("cache_salt takes a text of 1 to {MAX_SALT_BYTES} bytes");
            Err(ApiError::invalid("cache_salt", message))
        }
        salt => {
            let adapter = adapter.map(Adapter::salt);
            let adapter = adapter.as_ref().map_or(&[][..], |salt| salt.as_slice());
            Ok(crate::engine::salt(&[salt.unwrap_or_default().as_bytes(), adapter]))
        }
    }
}

impl Prepared {
    /// Says who sent it: whose key was accepted, and which user of it.
    pub(super) fn sent_by(&mut self, sender: ClientId) {
        for submission in std::iter::once(&mut self.submission).chain(&mut self.others) {
            submission.client = ClientId {
                tenant: sender.tenant,
                user: match sender.user {
                    0 => submission.client.user,
                    key => number((key, submission.client.user)),
                },
            };
        }
    }
}

/// What a name counts as. Nobody outside can find a name that counts as another's.
pub(super) fn number(name: impl Hash) -> u64 {
    static KEYS: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    KEYS.hash_one(name)
}

/// OpenAI's map from token ids, as texts, to what is added to their logits.
fn bias(map: Option<BTreeMap<String, f64>>, vocabulary: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    let map = map.unwrap_or_default();
    let wrong = |message: String| ApiError::invalid("logit_bias", message);
    if map.len() > MAX_BIASES {
        return Err(wrong(format!(
            "{} tokens are biased; {MAX_BIASES} are the most",
            map.len()
        )));
    }
    map.into_iter()
        .map(|(id, bias)| match id.parse::<u32>() {
            Ok(token) if (token as usize) < vocabulary && (-100.0..=100.0).contains(&bias) => Ok((token, bias as f32)),
            _ => Err(wrong(format!(
                "{id:?}: {bias} is wrong: a token id below {vocabulary} and a number between -100 and 100 are needed"
            ))),
        })
        .collect()
}

fn stops(stop: Option<OneOrMany>) -> Result<Vec<String>, ApiError> {
    let stops = match stop {
        None => Vec::new(),
        Some(OneOrMany::One(one)) => vec![one],
        Some(OneOrMany::Many(many)) => many,
    };
    if stops.len() > MAX_STOPS || stops.iter().any(|stop| stop.is_empty() || stop.len() > MAX_STOP_BYTES) {
        let message = format!("stop takes up to {MAX_STOPS} texts of 1 to {MAX_STOP_BYTES} bytes");
        return Err(ApiError::invalid("stop", message));
    }
    Ok(stops)
}

/// The tokens of a chat whose model is told of `tools`.
pub(super) fn chat_tokens(
    served: &Served,
    messages: Vec<Value>,
    tools: Option<&Tools>,
    add_generation_prompt: bool,
    arguments: &Map<String, Value>,
) -> Result<Vec<u32>, ApiError> {
    let template = served.chat_template.as_ref().ok_or_else(|| {
        ApiError::invalid(
            "messages",
            "this model has no chat template (it is a base model): use /v1/completions",
        )
    })?;
    if messages.is_empty() {
        return Err(ApiError::invalid("messages", "messages is empty"));
    }
    // What the server itself passes to the template, a client may not replace.
    for name in ["messages", "tools", "add_generation_prompt", "bos_token", "eos_token"] {
        if arguments.contains_key(name) {
            return Err(ApiError::invalid(
                "chat_template_kwargs",
                format!("{name} cannot be set through chat_template_kwargs"),
            ));
        }
    }
    let messages = messages
        .into_iter()
        .enumerate()
        .map(|(i, message)| self::message(i, message))
        .collect::<Result<Vec<_>, _>>()?;
    let (messages, tools) = tools::messages(template.source(), messages, tools)?;
    let rendered = template
        .render(
            &served.vocabulary,
            &messages,
            tools.as_ref(),
            add_generation_prompt,
            arguments,
        )
        .map_err(|error| ApiError::invalid("messages", error.to_string()))?;
    served
        .vocabulary
        .encode_rendered(&rendered)
        .map_err(|error| ApiError::internal(error.to_string()))
}

/// A message as templates expect it: a known role, and its content as one text.
fn message(i: usize, mut message: Value) -> Result<Value, ApiError> {
    let wrong = |what: String| ApiError::invalid("messages", format!("messages[{i}]{what}"));
    let object = message
        .as_object_mut()
        .ok_or_else(|| wrong(" is not an object".to_owned()))?;
    let role = object
        .get("role")
        .and_then(Value::as_str)
        .ok_or_else(|| wrong(".role is missing".to_owned()))?;
    if !ROLES.contains(&role) {
        return Err(wrong(format!(".role is {role:?}; known are {}", ROLES.join(", "))));
    }
    // OpenAI's newer and older words for roles that templates know.
    match role {
        "developer" => _ = object.insert("role".to_owned(), json!("system")),
        "function" => _ = object.insert("role".to_owned(), json!("tool")),
        _ => (),
    }
    let content = match object.get("content") {
        None | Some(Value::Null) => String::new(),
        Some(Value::String(text)) => text.clone(),
        Some(Value::Array(parts)) => {
            let text = |part: &Value| match part["type"].as_str() {
                Some("text" | "input_text") => part["text"].as_str().map(str::to_owned),
                _ => None,
            };
            let texts = parts.iter().map(|part| {
                text(part).ok_or_else(|| {
                    wrong(format!(
                        ".content has a part of type {}; only text is possible",
                        part["type"]
                    ))
                })
            });
            texts.collect::<Result<Vec<_>, _>>()?.join("\n")
        }
        Some(other) => {
            return Err(wrong(format!(
                ".content is {other}; a text or a list of text parts is needed"
            )));
        }
    };
    object.insert("content".to_owned(), json!(content));
    Ok(message)
}

/// A number that nobody can guess from the outside: std's hash keys are random.
pub(super) fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}
