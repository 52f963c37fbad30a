//! The body as a language model that can be evaluated.

use strata_evaluate::{EvaluateError, LanguageModel};

use crate::body::Placed;
use crate::{Batch, Body, ExecutorError, Keep, Tape};

/// A body with weights, for evaluation; its buffers are kept between texts.
pub struct Scorer<'a> {
    body: &'a Body,
    weights: Placed<'a>,
    tape: Tape,
}

impl<'a> Scorer<'a> {
    /// `weights` in the body's layout.
    ///
    /// # Errors
    /// The device has no room for the weights.
    pub fn new(body: &'a Body, weights: &'a [f32]) -> Result<Self, ExecutorError> {
        Ok(Self {
            body,
            weights: body.place(weights)?,
            tape: Tape::default(),
        })
    }

    /// Log-likelihoods (chosen, rejected) of each pair of `batch`, whose pairs were pushed with these completion lengths.
    ///
    /// # Errors
    /// The device failed.
    pub fn pair_likelihoods(
        &mut self,
        batch: &Batch,
        lengths: &[(usize, usize)],
    ) -> Result<Vec<(f64, f64)>, ExecutorError> {
        let log_probs = self.body.forward(&self.weights, batch, &mut self.tape, Keep::Nothing)?;
        let mut log_probs = log_probs.iter();
        let mut sum = |count: usize| log_probs.by_ref().take(count).map(|&p| f64::from(p)).sum::<f64>();
        Ok(lengths
            .iter()
            .map(|&(chosen, rejected)| (sum(chosen), sum(rejected)))
            .collect())
    }
}

impl LanguageModel for Scorer<'_> {
    fn token_log_probs(&mut self, tokens: &[u32], score_from: usize) -> Result<Vec<f32>, EvaluateError> {
        let config = self.body.config();
        let refuse = |detail: String| {
            Err(EvaluateError::Model {
                tokens: tokens.len(),
                detail,
            })
        };
        if score_from == 0 || score_from >= tokens.len() {
            return refuse(format!("there is nothing to score from token {score_from} on"));
        }
        if tokens.len() - 1 > config.max_positions {
            return refuse(format!("its context is {} tokens", config.max_positions));
        }
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= config.vocab_size) {
            return refuse(format!(
                "token {token} is outside of its vocabulary of {}",
                config.vocab_size
            ));
        }
        let mut batch = Batch::default();
        batch.push_text(tokens, score_from);
        match self.body.forward(&self.weights, &batch, &mut self.tape, Keep::Nothing) {
            Ok(log_probs) => Ok(log_probs.to_vec()),
            Err(error) => refuse(error.to_string()),
        }
    }
}
