//! Bits per byte on held-out text: comparable between models whatever their tokenizers.

use std::f64::consts::LN_2;

use serde::{Deserialize, Serialize};

use crate::{Estimate, EvaluateError, LanguageModel, estimate};

/// A piece of text that fits into the model's context.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Window {
    /// Its tokens, context first.
    pub tokens: Vec<u32>,
    /// The first token that is scored, at least 1; those before are context.
    pub score_from: usize,
    /// UTF-8 bytes of the scored tokens' text.
    pub bytes: u64,
}

/// Held-out text as windows; each token is scored in exactly one of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TextSet {
    /// The windows.
    pub windows: Vec<Window>,
}

impl TextSet {
    /// Cuts a document into windows of at most `length` tokens (at least 2). Each window begins with the token before it,
    /// the first with `opening` (the model's end-of-text or begin-of-text token), which is not scored: so the whole text
    /// counts, and a token has from 1 to `length - 1` tokens of context.
    ///
    /// `bytes_of` says how many bytes of text a token stands for; special tokens stand for none.
    pub fn push(&mut self, document: &[u32], opening: u32, length: usize, bytes_of: impl Fn(u32) -> u64) {
        let mut before = opening;
        for piece in document.chunks(length.max(2) - 1) {
            let tokens: Vec<u32> = std::iter::once(before).chain(piece.iter().copied()).collect();
            self.windows.push(Window {
                tokens,
                score_from: 1,
                bytes: piece.iter().map(|&token| bytes_of(token)).sum(),
            });
            before = piece[piece.len() - 1];
        }
    }

    /// Bytes of text that are scored.
    pub fn bytes(&self) -> u64 {
        self.windows.iter().map(|window| window.bytes).sum()
    }

    /// Tokens that are scored.
    pub fn tokens(&self) -> u64 {
        self.windows
            .iter()
            .map(|window| (window.tokens.len() - window.score_from) as u64)
            .sum()
    }
}

/// What a model makes of a [`TextSet`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TextScore {
    /// Negative log-likelihood of each window in bits.
    pub window_bits: Vec<f64>,
    /// Bytes of text.
    pub bytes: u64,
}

impl TextScore {
    /// Bits per byte over the whole text.
    pub fn bits_per_byte(&self) -> f64 {
        self.window_bits.iter().sum::<f64>() / self.bytes as f64
    }

    /// Bits per byte of this score minus those of `before` on the same windows, paired by window.
    pub fn minus(&self, before: &TextScore) -> Option<Estimate> {
        if self.window_bits.len() != before.window_bits.len() || self.bytes != before.bytes || self.bytes == 0 {
            return None;
        }
        // A ratio estimator over windows: each window's difference is scaled so that their mean is the difference per byte.
        let scale = self.window_bits.len() as f64 / self.bytes as f64;
        let differences: Vec<f64> = self
            .window_bits
            .iter()
            .zip(&before.window_bits)
            .map(|(after, before)| (after - before) * scale)
            .collect();
        estimate(&differences)
    }
}

/// Scores all windows of `set`; `after_each` is called with the tokens of each, and stops the work by answering false.
pub fn score_text(
    model: &mut dyn LanguageModel,
    set: &TextSet,
    mut after_each: impl FnMut(usize) -> bool,
) -> Result<TextScore, EvaluateError> {
    if set.bytes() == 0 {
        return Err(EvaluateError::Empty("the held-out text has no bytes"));
    }
    let mut window_bits = Vec::with_capacity(set.windows.len());
    for window in &set.windows {
        let log_probs = model.token_log_probs(&window.tokens, window.score_from)?;
        window_bits.push(-log_probs.iter().map(|&p| f64::from(p)).sum::<f64>() / LN_2);
        if !after_each(window.tokens.len()) {
            return Err(EvaluateError::Interrupted);
        }
    }
    Ok(TextScore {
        window_bits,
        bytes: set.bytes(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Gives every token probability 1/4.
    struct Quarter;

    impl LanguageModel for Quarter {
        fn token_log_probs(&mut self, tokens: &[u32], score_from: usize) -> Result<Vec<f32>, EvaluateError> {
            Ok(vec![0.25f32.ln(); tokens.len() - score_from])
        }
    }

    #[test]
    fn every_token_is_scored_once_and_bits_are_per_byte_of_text() {
        let mut set = TextSet::default();
        set.push(&[1, 2, 3, 4, 5, 0], 0, 4, |token| if token == 0 { 0 } else { 2 });
        let tokens: Vec<&[u32]> = set.windows.iter().map(|window| window.tokens.as_slice()).collect();
        assert_eq!(tokens, [&[0, 1, 2, 3][..], &[3, 4, 5, 0]]);
        assert_eq!((set.tokens(), set.bytes()), (6, 10));
        let score = score_text(&mut Quarter, &set, |_| true).expect("it scores");
        // Six tokens of two bits over ten bytes; the end of text costs bits and has no bytes.
        assert!((score.bits_per_byte() - 1.2).abs() < 1e-6);
        assert!(matches!(
            score_text(&mut Quarter, &set, |_| false),
            Err(EvaluateError::Interrupted)
        ));
        assert!(matches!(
            score_text(&mut Quarter, &TextSet::default(), |_| true),
            Err(EvaluateError::Empty(_))
        ));
    }

    #[test]
    fn differences_are_paired_by_window() {
        let score = |bits: &[f64]| TextScore {
            window_bits: bits.to_vec(),
            bytes: 20,
        };
        let tax = score(&[11.0, 31.0, 21.0])
            .minus(&score(&[10.0, 30.0, 20.0]))
            .expect("same windows");
        assert!((tax.mean - 0.15).abs() < 1e-12 && tax.standard_error < 1e-12);
        assert!(score(&[1.0]).minus(&score(&[1.0, 2.0])).is_none());
    }
}
