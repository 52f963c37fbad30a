//! The one error that a stage ends with: a reason that a machine reads and a sentence for a person.

use strata_artifact::ArtifactError;
use strata_contract::{FailureReason, GateResult, Report};

/// Why a stage ended without a result.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct StageError {
    /// The word for condition, Event and metric; decides the exit status.
    pub reason: FailureReason,
    /// What happened, where, and what to do about it. Never holds text of the data.
    pub message: String,
    /// The gates' verdicts, where a gate is the reason.
    pub gates: Vec<GateResult>,
}

impl StageError {
    /// An error of `reason` with its sentence.
    pub fn new(reason: FailureReason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            gates: Vec::new(),
        }
    }

    /// The stage was asked to stop and saved its work.
    pub fn interrupted(message: impl Into<String>) -> Self {
        Self::new(FailureReason::Interrupted, message)
    }

    /// The error of gates that say no; `None` if all passed.
    pub fn from_gates(gates: &[GateResult]) -> Option<Self> {
        let words: Vec<String> = gates.iter().filter(|gate| !gate.passed).map(describe).collect();
        let message = format!("gate failed: {}", words.join("; "));
        (!words.is_empty()).then(|| Self {
            reason: FailureReason::GateFailed,
            message,
            gates: gates.to_vec(),
        })
    }

    /// The report of this error.
    pub fn report(&self) -> Report {
        Report {
            gates: self.gates.clone(),
            ..Report::failed(self.reason, self.message.clone())
        }
    }
}

impl From<ArtifactError> for StageError {
    fn from(error: ArtifactError) -> Self {
        Self::new(error.reason(), error.to_string())
    }
}

fn describe(gate: &GateResult) -> String {
    let metric = &gate.metric;
    match (gate.value, gate.min, gate.max) {
        (None, ..) => format!("{metric} was not measured"),
        (Some(value), Some(min), _) if value < min => format!("{metric} is {value:.4}, at least {min} is asked for"),
        (Some(value), _, max) => format!("{metric} is {value:.4}, at most {} is asked for", max.unwrap_or(value)),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use strata_contract::Gate;

    use super::*;

    #[test]
    fn a_failed_gate_says_the_figure_and_the_bound() {
        let metrics = BTreeMap::from([("bitsPerByte".to_owned(), 2.91), ("documents".to_owned(), 40.0)]);
        let judge = |metric: &str, min, max| {
            Gate {
                metric: metric.into(),
                min,
                max,
            }
            .judge(&metrics)
        };
        let gates = [
            judge("bitsPerByte", None, Some(2.8)),
            judge("documents", Some(100.0), None),
            judge("x", None, None),
        ];
        let error = StageError::from_gates(&gates).expect("three gates fail");
        assert_eq!(
            error.message,
            "gate failed: bitsPerByte is 2.9100, at most 2.8 is asked for; documents is 40.0000, at least 100 is asked \
             for; x was not measured"
        );
        assert!(StageError::from_gates(&[judge("documents", Some(40.0), None)]).is_none());
    }
}
