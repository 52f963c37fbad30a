//! Gates: what a result must reach before it is published.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::GateResult;

/// A bound on one metric of a run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Gate {
    /// Name of the metric, as the stage reports it.
    pub metric: String,
    /// Smallest value that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// Largest value that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
}

impl Gate {
    /// Judges this gate. A metric that is missing or not a number fails.
    pub fn judge(&self, metrics: &BTreeMap<String, f64>) -> GateResult {
        let value = metrics.get(&self.metric).copied().filter(|value| value.is_finite());
        let passed = value
            .is_some_and(|value| self.min.is_none_or(|min| value >= min) && self.max.is_none_or(|max| value <= max));
        GateResult {
            metric: self.metric.clone(),
            value,
            min: self.min,
            max: self.max,
            passed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gate_passes_inside_its_bounds_and_fails_without_a_value() {
        let metrics = BTreeMap::from([("loss".to_owned(), 2.5), ("nan".to_owned(), f64::NAN)]);
        let gate = |metric: &str, min, max| {
            Gate {
                metric: metric.into(),
                min,
                max,
            }
            .judge(&metrics)
            .passed
        };
        assert!(gate("loss", None, Some(2.5)));
        assert!(gate("loss", Some(2.0), Some(3.0)));
        assert!(!gate("loss", Some(2.6), None));
        assert!(!gate("loss", None, Some(2.4)));
        assert!(!gate("absent", None, Some(1.0)));
        assert!(!gate("nan", None, Some(1.0)));
    }
}
