//! Metrics on a language model: bits per byte, an n-gram model to compare with, preference margins, and the frozen
//! evaluation set that travels with a published model, so that what is served is judged on the very same tokens.
//!
//! Everything stands on [`LanguageModel`]; the training executor and the serving engine both implement it.

mod error;
mod ngram;
mod preference;
mod set;
mod statistics;
mod text;

pub use error::EvaluateError;
pub use ngram::Trigram;
pub use preference::{Margin, Pair, Preferences, log_likelihoods, reward_margin};
pub use set::{EVALUATION_FILE, EvaluationSet, MetricValue};
pub use statistics::{Estimate, estimate};
pub use text::{TextScore, TextSet, Window, score_text};

/// A model that says how probable each token of a text is.
pub trait LanguageModel {
    /// Natural log-probabilities of `tokens[i]` given `tokens[..i]`, for each `i` from `score_from` (at least 1) to the end.
    fn token_log_probs(&mut self, tokens: &[u32], score_from: usize) -> Result<Vec<f32>, EvaluateError>;
}
