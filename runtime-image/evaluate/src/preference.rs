//! Implicit rewards of preference pairs: how far a model has moved towards what was chosen.

use serde::{Deserialize, Serialize};

use crate::{Estimate, EvaluateError, LanguageModel, estimate};

/// A tokenized preference pair, with what the reference model says of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pair {
    /// The conversation up to the last assistant turn.
    pub prompt: Vec<u32>,
    /// The preferred last turn.
    pub chosen: Vec<u32>,
    /// The other last turn.
    pub rejected: Vec<u32>,
    /// Log-likelihood of `chosen` after `prompt` under the reference.
    pub reference_chosen: f64,
    /// Log-likelihood of `rejected` after `prompt` under the reference.
    pub reference_rejected: f64,
}

/// Held-out pairs and the strength at which rewards are read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Preferences {
    /// DPO's beta: `reward = beta · (log p - log p of the reference)`.
    pub beta: f64,
    /// The pairs.
    pub pairs: Vec<Pair>,
}

/// The reward margin over held-out pairs.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Margin {
    /// Mean of reward(chosen) - reward(rejected), paired, with its confidence interval.
    pub margin: Estimate,
    /// Share of pairs whose chosen turn has the higher reward.
    pub accuracy: f64,
}

/// Log-likelihoods of the chosen and the rejected turn of `pair`.
pub fn log_likelihoods(model: &mut dyn LanguageModel, pair: &Pair) -> Result<(f64, f64), EvaluateError> {
    let mut of = |turn: &[u32]| -> Result<f64, EvaluateError> {
        let tokens = [&pair.prompt, turn].concat();
        let log_probs = model.token_log_probs(&tokens, pair.prompt.len())?;
        Ok(log_probs.iter().map(|&p| f64::from(p)).sum())
    };
    Ok((of(&pair.chosen)?, of(&pair.rejected)?))
}

/// The margin of `likelihoods` (chosen, rejected; one entry for each pair) over the reference.
pub fn reward_margin(preferences: &Preferences, likelihoods: &[(f64, f64)]) -> Result<Margin, EvaluateError> {
    let margins: Vec<f64> = preferences
        .pairs
        .iter()
        .zip(likelihoods)
        .map(|(pair, (chosen, rejected))| {
            preferences.beta * ((chosen - pair.reference_chosen) - (rejected - pair.reference_rejected))
        })
        .collect();
    let margin = estimate(&margins).ok_or(EvaluateError::Empty("fewer than two held-out pairs"))?;
    let accuracy = margins.iter().filter(|&&margin| margin > 0.0).count() as f64 / margins.len() as f64;
    Ok(Margin { margin, accuracy })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct ByToken;

    impl LanguageModel for ByToken {
        fn token_log_probs(&mut self, tokens: &[u32], score_from: usize) -> Result<Vec<f32>, EvaluateError> {
            Ok(tokens[score_from..].iter().map(|&token| -(token as f32)).collect())
        }
    }

    #[test]
    fn rewards_are_relative_to_the_reference_and_only_of_the_last_turn() {
        let pair = |chosen: u32, rejected: u32| Pair {
            prompt: vec![100, 100],
            chosen: vec![chosen],
            rejected: vec![rejected, rejected],
            reference_chosen: -2.0,
            reference_rejected: -4.0,
        };
        let preferences = Preferences {
            beta: 0.5,
            pairs: vec![pair(1, 3), pair(2, 2), pair(3, 2)],
        };
        let likelihoods: Vec<_> = preferences
            .pairs
            .iter()
            .map(|pair| log_likelihoods(&mut ByToken, pair).expect("it scores"))
            .collect();
        assert_eq!(likelihoods[0], (-1.0, -6.0));
        // Margins 0.5 · ((−1+2) − (−6+4)) = 1.5, 0, −0.5.
        let result = reward_margin(&preferences, &likelihoods).expect("three pairs");
        assert!((result.margin.mean - 1.0 / 3.0).abs() < 1e-12);
        assert!((result.accuracy - 1.0 / 3.0).abs() < 1e-12);
        assert!(result.margin.low < 0.0);
    }
}
