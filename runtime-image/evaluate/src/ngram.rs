//! A token trigram model with interpolated Kneser-Ney smoothing: what a model must at least beat.

use std::collections::HashMap;
use std::f64::consts::LN_2;

use crate::{EvaluateError, TextScore, TextSet};

/// Absolute discount, the usual value for Kneser-Ney on counts of this size.
const DISCOUNT: f64 = 0.75;

/// Counts at one context: how often (or after how many words) something follows, and how many different tokens do.
#[derive(Clone, Copy, Debug, Default)]
struct Context {
    total: u32,
    different: u32,
}

/// An interpolated Kneser-Ney trigram over token ids.
#[derive(Clone, Debug)]
pub struct Trigram {
    vocabulary: f64,
    trigrams: HashMap<(u64, u32), u32>,
    trigram_contexts: HashMap<u64, Context>,
    /// Of a bigram: before how many different tokens it was seen.
    bigrams: HashMap<(u32, u32), u32>,
    bigram_contexts: HashMap<u32, Context>,
    /// Of a token: after how many different tokens it was seen.
    unigrams: HashMap<u32, u32>,
    unigram_total: u32,
}

fn pair(a: u32, b: u32) -> u64 {
    u64::from(a) << 32 | u64::from(b)
}

impl Trigram {
    /// An untrained model over `vocabulary` tokens: everything is equally likely.
    pub fn new(vocabulary: usize) -> Self {
        Self {
            vocabulary: vocabulary as f64,
            trigrams: HashMap::new(),
            trigram_contexts: HashMap::new(),
            bigrams: HashMap::new(),
            bigram_contexts: HashMap::new(),
            unigrams: HashMap::new(),
            unigram_total: 0,
        }
    }

    /// Counts one sequence; trigrams do not span sequences.
    pub fn count(&mut self, tokens: &[u32]) {
        for window in tokens.windows(3) {
            let &[a, b, c] = window else { continue };
            let seen = self.trigrams.entry((pair(a, b), c)).or_default();
            *seen += 1;
            let context = self.trigram_contexts.entry(pair(a, b)).or_default();
            context.total += 1;
            if *seen > 1 {
                continue;
            }
            context.different += 1;
            let seen = self.bigrams.entry((b, c)).or_default();
            *seen += 1;
            let context = self.bigram_contexts.entry(b).or_default();
            context.total += 1;
            if *seen > 1 {
                continue;
            }
            context.different += 1;
            *self.unigrams.entry(c).or_default() += 1;
            self.unigram_total += 1;
        }
    }

    /// Probability of `token` after `context` (only its last two tokens matter).
    pub fn probability(&self, context: &[u32], token: u32) -> f64 {
        let uniform = 1.0 / self.vocabulary;
        let unigram_context = Context {
            total: self.unigram_total,
            different: self.unigrams.len() as u32,
        };
        let mut p = interpolate(self.unigrams.get(&token), Some(&unigram_context), uniform);
        if let [.., b] = *context {
            p = interpolate(self.bigrams.get(&(b, token)), self.bigram_contexts.get(&b), p);
        }
        if let [.., a, b] = *context {
            p = interpolate(
                self.trigrams.get(&(pair(a, b), token)),
                self.trigram_contexts.get(&pair(a, b)),
                p,
            );
        }
        p
    }

    /// Bits of each window of `set`.
    pub fn score(&self, set: &TextSet) -> Result<TextScore, EvaluateError> {
        if set.bytes() == 0 {
            return Err(EvaluateError::Empty("the held-out text has no bytes"));
        }
        let bits = |tokens: &[u32], from: usize| -> f64 {
            (from..tokens.len())
                .map(|i| -self.probability(&tokens[..i], tokens[i]).ln())
                .sum::<f64>()
                / LN_2
        };
        let window_bits = set
            .windows
            .iter()
            .map(|window| bits(&window.tokens, window.score_from))
            .collect();
        Ok(TextScore {
            window_bits,
            bytes: set.bytes(),
        })
    }
}

fn interpolate(count: Option<&u32>, context: Option<&Context>, lower: f64) -> f64 {
    match context {
        Some(context) if context.total > 0 => {
            let own = (f64::from(count.copied().unwrap_or(0)) - DISCOUNT).max(0.0);
            (own + DISCOUNT * f64::from(context.different) * lower) / f64::from(context.total)
        }
        _ => lower,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_sum_to_one_and_prefer_what_was_seen() {
        let mut model = Trigram::new(6);
        assert!((model.probability(&[1, 2], 3) - 1.0 / 6.0).abs() < 1e-12);
        model.count(&[0, 1, 2, 3, 0, 1, 2, 4, 0, 1, 2, 3]);
        for context in [&[][..], &[5], &[1], &[1, 2], &[5, 2], &[5, 5]] {
            let sum: f64 = (0..6).map(|token| model.probability(context, token)).sum();
            assert!((sum - 1.0).abs() < 1e-12, "{context:?}: {sum}");
        }
        let p = |token| model.probability(&[1, 2], token);
        assert!(p(3) > p(4) && p(4) > p(0) && p(5) > 0.0);
    }

    #[test]
    fn kneser_ney_counts_contexts_not_occurrences() {
        // 9 occurs often but only after 8; 1 occurs after several tokens: in a new context 1 is likelier.
        let mut model = Trigram::new(10);
        for _ in 0..20 {
            model.count(&[7, 8, 9]);
        }
        for before in [2, 3, 4, 5] {
            model.count(&[7, before, 1]);
        }
        assert!(model.probability(&[6, 6], 1) > model.probability(&[6, 6], 9));
    }
}
