//! Fields of OpenAI and vLLM that would change the answer and that this server does not act on: one table.
//!
//! A value that changes nothing passes, because clients send their defaults. Anything else is refused: an answer that
//! silently is not what was asked for is worse than none. Fields that nobody knows, and those that change no answer (`user`,
//! `metadata`, …), are ignored.

use serde_json::{Map, Value};

use super::error::ApiError;

/// The value, besides null, that changes nothing.
#[derive(Clone, Copy)]
enum Neutral {
    None,
    False,
    True,
    Empty,
    Number(f64),
    Word(&'static [&'static str]),
}

use Neutral::{Empty, False, Number, True, Word};

const UNSUPPORTED: &[(&str, Neutral)] = &[
    // How many answers, and of what.
    ("best_of", Number(1.0)),
    ("suffix", Empty),
    ("audio", Neutral::None),
    ("reasoning_effort", Word(&["none"])),
    ("verbosity", Word(&["medium"])),
    ("web_search_options", Neutral::None),
    // How tokens are chosen.
    ("length_penalty", Number(1.0)),
    ("use_beam_search", False),
    ("allowed_token_ids", Neutral::None),
    ("bad_words", Empty),
    ("logits_processors", Empty),
    ("vllm_xargs", Empty),
    // Where the answer ends, and what of it is shown.
    ("return_tokens_as_token_ids", False),
    ("return_token_ids", False),
    ("prompt_logprobs", Neutral::None),
    // OpenAI's older form of tools.
    ("functions", Empty),
    ("function_call", Word(&["none", "auto"])),
    // How the prompt is made.
    ("continue_final_message", False),
    ("add_generation_prompt", True),
    ("add_special_tokens", False),
    ("chat_template", Neutral::None),
    ("documents", Empty),
    ("truncate_prompt_tokens", Neutral::None),
    ("prompt_embeds", Neutral::None),
];

impl Neutral {
    fn is(self, value: &Value) -> bool {
        match (self, value) {
            (_, Value::Null) => true,
            (False, Value::Bool(value)) => !value,
            (True, Value::Bool(value)) => *value,
            (Empty, Value::Array(list)) => list.is_empty(),
            (Empty, Value::Object(map)) => map.is_empty(),
            (Empty, Value::String(text)) => text.is_empty(),
            (Number(neutral), Value::Number(number)) => number.as_f64() == Some(neutral),
            (Word(words), Value::String(word)) => words.contains(&word.as_str()),
            _ => false,
        }
    }

    fn remedy(self) -> String {
        match self {
            Neutral::None => String::new(),
            False => " or set it to false".to_owned(),
            True => " or set it to true".to_owned(),
            Empty => " or empty".to_owned(),
            Number(number) => format!(" or set it to {number}"),
            Word(words) => format!(" or set it to {}", words.join(" or ")),
        }
    }
}

/// Refuses the first unsupported field among those that the request has besides the supported ones.
pub(super) fn check(rest: &Map<String, Value>) -> Result<(), ApiError> {
    for (name, neutral) in UNSUPPORTED {
        if rest.get(*name).is_some_and(|value| !neutral.is(value)) {
            let message = format!(
                "{name} as given is not supported by this server: leave it out{}",
                neutral.remedy()
            );
            return Err(ApiError::invalid(*name, message));
        }
    }
    Ok(())
}
