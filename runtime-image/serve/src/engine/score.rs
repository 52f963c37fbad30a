//! Scoring given texts: what an evaluation asks of the engine that will serve.

use strata_kernels::infer::{KvDtype, log_prob};
use strata_model::{LoadedModel, ModelError};

use super::executor::{Batch, Executor, Precision, Row};

/// Tokens in a forward pass.
const CHUNK: usize = 256;
const BLOCK_TOKENS: usize = 32;

/// Computes log-probabilities of given tokens with the serving engine's own forward pass.
pub struct Scorer {
    executor: Executor,
    positions: usize,
    table: Vec<u32>,
}

/// Why tokens could not be scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScoreError {
    /// More tokens than the scorer was made for.
    #[error("{tokens} tokens are more than the {positions} that the model has positions for")]
    TooLong {
        /// Tokens given.
        tokens: usize,
        /// Tokens possible.
        positions: usize,
    },
    /// A token that the model does not have.
    #[error("token id {id} is outside of the vocabulary of {vocabulary}")]
    UnknownToken {
        /// The id.
        id: u32,
        /// The size of the vocabulary.
        vocabulary: usize,
    },
}

impl Scorer {
    /// A scorer for texts of up to `positions` tokens (cut to what the model was made for).
    pub fn new(
        model: &LoadedModel,
        precision: Precision,
        kv_dtype: KvDtype,
        positions: usize,
    ) -> Result<Self, ModelError> {
        let positions = positions.clamp(1, model.config.max_positions);
        let blocks = positions.div_ceil(BLOCK_TOKENS);
        let executor = Executor::new(
            &model.config,
            &*model.weights,
            precision,
            kv_dtype,
            BLOCK_TOKENS,
            blocks,
            positions,
        )?;
        Ok(Scorer {
            executor,
            positions,
            table: (0..blocks as u32).collect(),
        })
    }

    /// Log-probability of `tokens[i]` given `tokens[..i]`, for `i` from `score_from` (at least 1) to the end.
    pub fn token_log_probs(&mut self, tokens: &[u32], score_from: usize) -> Result<Vec<f32>, ScoreError> {
        let score_from = score_from.max(1);
        let mut out = Vec::with_capacity(tokens.len().saturating_sub(score_from));
        // The last token is only predicted, never read.
        let read = tokens.len().saturating_sub(1);
        self.logits(
            &tokens[..read],
            score_from - 1,
            |position, logits| out.push(log_prob(logits, tokens[position + 1] as usize)),
            tokens,
        )?;
        Ok(out)
    }

    /// Calls `visit(position, logits)` for each position from `from` on.
    pub fn visit_logits(
        &mut self,
        tokens: &[u32],
        from: usize,
        visit: impl FnMut(usize, &[f32]),
    ) -> Result<(), ScoreError> {
        self.logits(tokens, from, visit, tokens)
    }

    fn logits(
        &mut self,
        read: &[u32],
        from: usize,
        mut visit: impl FnMut(usize, &[f32]),
        all: &[u32],
    ) -> Result<(), ScoreError> {
        let vocabulary = self.executor.config().vocab_size;
        if read.len() > self.positions {
            return Err(ScoreError::TooLong {
                tokens: read.len(),
                positions: self.positions,
            });
        }
        if let Some(id) = all.iter().find(|id| **id as usize >= vocabulary) {
            return Err(ScoreError::UnknownToken { id: *id, vocabulary });
        }
        for start in (0..read.len()).step_by(CHUNK) {
            let end = (start + CHUNK).min(read.len());
            let rows = (start..end)
                .map(|at| Row {
                    token: read[at],
                    position: at as u32,
                    table: 0,
                    logits: at >= from,
                })
                .collect();
            let batch = Batch {
                rows,
                tables: vec![self.table.clone()],
                ..Batch::default()
            };
            self.executor.forward(&batch, |row, logits| visit(start + row, logits));
        }
        Ok(())
    }
}
