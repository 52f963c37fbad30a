//! The frozen evaluation set: a file of the published model with everything that its gates were judged on, so that a
//! later form of the model (quantized, say) is judged on exactly the same.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{
    EvaluateError, LanguageModel, Preferences, TextScore, TextSet, log_likelihoods, reward_margin, score_text,
};

/// Name of the evaluation set's file in a model artifact.
pub const EVALUATION_FILE: &str = "evaluation/set.json";

/// Version of the file format.
const VERSION: u32 = 1;

/// Largest file that is read, in bytes.
const LIMIT_BYTES: u64 = 256 * 1024 * 1024;

/// A figure by the name under which gates and reports know it.
pub type MetricValue = (String, f64);

/// What a model was measured on, and what the model before it reached there.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct EvaluationSet {
    /// Version of this format.
    pub version: u32,
    /// Size of the vocabulary that the tokens belong to.
    pub vocab_size: usize,
    /// Held-out text, for `bitsPerByte`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<TextSet>,
    /// What the model before the alignment made of `text`, for `alignmentTax`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_before: Option<TextScore>,
    /// What a trigram model made of `text`, for `bitsPerByteGainOverTrigram`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text_trigram: Option<TextScore>,
    /// Held-out preference pairs, for `rewardMargin`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preferences: Option<Preferences>,
}

impl EvaluationSet {
    /// An empty set for tokens below `vocab_size`.
    pub fn new(vocab_size: usize) -> Self {
        Self {
            version: VERSION,
            vocab_size,
            text: None,
            text_before: None,
            text_trigram: None,
            preferences: None,
        }
    }

    /// Reads and checks a set; `vocab_size` is the model's.
    pub fn read(path: &Path, vocab_size: usize) -> Result<Self, EvaluateError> {
        let error = |detail: String| EvaluateError::Set {
            path: path.to_owned(),
            detail,
        };
        let bytes = std::fs::metadata(path).map_err(|e| error(e.to_string()))?.len();
        if bytes > LIMIT_BYTES {
            return Err(error(format!("{bytes} bytes are more than the limit of {LIMIT_BYTES}")));
        }
        let text = std::fs::read(path).map_err(|e| error(e.to_string()))?;
        // The parser's message may quote the file, whose tokens are data: only the place is passed on.
        let set: Self = serde_json::from_slice(&text)
            .map_err(|e| error(format!("no valid set at line {} column {}", e.line(), e.column())))?;
        set.check(vocab_size).map_err(error)?;
        Ok(set)
    }

    fn check(&self, vocab_size: usize) -> Result<(), String> {
        if self.version != VERSION {
            return Err(format!("version {} is unknown, {VERSION} is read", self.version));
        }
        if self.vocab_size != vocab_size {
            return Err(format!(
                "it is for {} tokens, the model has {vocab_size}",
                self.vocab_size
            ));
        }
        let windows = self.text.iter().flat_map(|text| &text.windows);
        if windows
            .clone()
            .any(|window| window.score_from == 0 || window.score_from >= window.tokens.len())
        {
            return Err("a window scores nothing or has no context".into());
        }
        let pairs = self.preferences.iter().flat_map(|preferences| &preferences.pairs);
        if pairs
            .clone()
            .any(|pair| pair.prompt.is_empty() || pair.chosen.is_empty() || pair.rejected.is_empty())
        {
            return Err("a pair has an empty part".into());
        }
        let mut tokens = windows
            .map(|window| &window.tokens)
            .chain(pairs.flat_map(|pair| [&pair.prompt, &pair.chosen, &pair.rejected]))
            .flatten();
        match tokens.find(|&&token| token as usize >= vocab_size) {
            Some(token) => Err(format!("token {token} is outside of the vocabulary of {vocab_size}")),
            None => Ok(()),
        }
    }

    /// This set as the file's bytes.
    pub fn to_json(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("numbers and lists serialize to JSON")
    }

    /// Scorings that [`EvaluationSet::measure`] makes, as `after_each` counts them.
    pub fn scorings(&self) -> u64 {
        let windows = self.text.as_ref().map_or(0, |text| text.windows.len());
        let pairs = self
            .preferences
            .as_ref()
            .map_or(0, |preferences| preferences.pairs.len());
        (windows + pairs) as u64
    }

    /// Measures `model` on everything in the set; `after_each` is called after each window and pair, and stops the work by
    /// answering false.
    pub fn measure(
        &self,
        model: &mut dyn LanguageModel,
        mut after_each: impl FnMut() -> bool,
    ) -> Result<BTreeMap<String, f64>, EvaluateError> {
        let mut metrics = BTreeMap::new();
        if let Some(text) = &self.text {
            let score = score_text(model, text, |_| after_each())?;
            metrics.extend(self.text_metrics(&score));
        }
        if let Some(preferences) = &self.preferences {
            let mut likelihoods = Vec::with_capacity(preferences.pairs.len());
            for pair in &preferences.pairs {
                likelihoods.push(log_likelihoods(model, pair)?);
                if !after_each() {
                    return Err(EvaluateError::Interrupted);
                }
            }
            metrics.extend(self.preference_metrics(&likelihoods)?);
        }
        Ok(metrics)
    }

    /// The metrics that follow from a score of the text.
    pub fn text_metrics(&self, score: &TextScore) -> Vec<MetricValue> {
        let mut metrics = vec![("bitsPerByte".to_owned(), score.bits_per_byte())];
        if let Some(trigram) = &self.text_trigram {
            metrics.push(("bitsPerByteTrigram".into(), trigram.bits_per_byte()));
            metrics.push((
                "bitsPerByteGainOverTrigram".into(),
                trigram.bits_per_byte() - score.bits_per_byte(),
            ));
        }
        if let Some(before) = &self.text_before {
            metrics.push(("bitsPerByteBefore".into(), before.bits_per_byte()));
            if let Some(tax) = score.minus(before) {
                metrics.push(("alignmentTax".into(), tax.mean));
                metrics.push(("alignmentTaxStandardError".into(), tax.standard_error));
            }
        }
        metrics
    }

    /// The metrics that follow from the likelihoods of the pairs.
    pub fn preference_metrics(&self, likelihoods: &[(f64, f64)]) -> Result<Vec<MetricValue>, EvaluateError> {
        let Some(preferences) = &self.preferences else {
            return Ok(Vec::new());
        };
        let margin = reward_margin(preferences, likelihoods)?;
        Ok(vec![
            ("rewardMargin".into(), margin.margin.mean),
            ("rewardMarginLow".into(), margin.margin.low),
            ("rewardMarginHigh".into(), margin.margin.high),
            ("rewardAccuracy".into(), margin.accuracy),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Pair, Window};

    struct Halves;

    impl LanguageModel for Halves {
        fn token_log_probs(&mut self, tokens: &[u32], score_from: usize) -> Result<Vec<f32>, EvaluateError> {
            Ok(vec![0.5f32.ln(); tokens.len() - score_from])
        }
    }

    fn set() -> EvaluationSet {
        let pair = |reference_chosen| Pair {
            prompt: vec![1],
            chosen: vec![2],
            rejected: vec![3],
            reference_chosen,
            reference_rejected: -1.0,
        };
        let window = || Window {
            tokens: vec![0, 1, 2],
            score_from: 1,
            bytes: 4,
        };
        EvaluationSet {
            text: Some(TextSet {
                windows: vec![window(), window()],
            }),
            text_before: Some(TextScore {
                window_bits: vec![1.0, 2.0],
                bytes: 8,
            }),
            text_trigram: Some(TextScore {
                window_bits: vec![4.0, 4.0],
                bytes: 8,
            }),
            preferences: Some(Preferences {
                beta: 0.1,
                pairs: vec![pair(-2.0), pair(-3.0)],
            }),
            ..EvaluationSet::new(4)
        }
    }

    #[test]
    fn a_set_that_was_written_and_read_measures_every_metric() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("set.json");
        std::fs::write(&path, set().to_json()).expect("written");
        let read = EvaluationSet::read(&path, 4).expect("read");
        assert_eq!(read, set());
        let mut steps = 0;
        let metrics = read
            .measure(&mut Halves, || {
                steps += 1;
                true
            })
            .expect("measured");
        assert_eq!(steps, read.scorings());
        for (name, expected) in [
            ("bitsPerByte", 0.5),
            ("bitsPerByteTrigram", 1.0),
            ("bitsPerByteGainOverTrigram", 0.5),
            ("alignmentTax", 0.125),
            ("rewardMargin", 0.15),
            ("rewardAccuracy", 1.0),
        ] {
            assert!((metrics[name] - expected).abs() < 1e-6, "{name}: {}", metrics[name]);
        }
    }

    #[test]
    fn a_set_that_does_not_fit_is_refused_with_the_reason() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("set.json");
        let mut bad_token = set();
        bad_token.vocab_size = 3;
        let mut bad_window = set();
        bad_window.text.as_mut().expect("text").windows[0].score_from = 3;
        for (bytes, vocab_size, word) in [
            (set().to_json(), 5, "the model has 5"),
            (bad_token.to_json(), 3, "token 3"),
            (bad_window.to_json(), 4, "scores nothing"),
            (b"{".to_vec(), 4, "line 1"),
        ] {
            std::fs::write(&path, bytes).expect("written");
            let error = EvaluationSet::read(&path, vocab_size).expect_err(word).to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
