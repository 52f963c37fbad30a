//! The report: what a stage says when it ends, in at most 4 KiB, and what it says while it runs.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{ArtifactRef, CONTRACT_VERSION, FailureReason, Input, Manifest, Uri};

/// Largest report in bytes: what the kubelet keeps of a termination message.
pub const REPORT_LIMIT_BYTES: usize = 4096;
/// Longest message in a report in bytes.
const MESSAGE_LIMIT_BYTES: usize = 1024;

/// One gate's verdict.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GateResult {
    /// The metric that was judged.
    pub metric: String,
    /// Its value; absent if the run could not compute it, which fails the gate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<f64>,
    /// Smallest value that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<f64>,
    /// Largest value that passes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<f64>,
    /// Whether it passed.
    pub passed: bool,
}

/// What a stage says in its termination message when it ends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// [`CONTRACT_VERSION`] of the writer.
    pub contract_version: u32,
    /// Why it failed; absent when it succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<FailureReason>,
    /// One sentence for a person.
    pub message: String,
    /// What was published; present exactly when it succeeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact: Option<ArtifactRef>,
    /// The inputs as they were read.
    #[serde(default)]
    pub inputs: Vec<Input>,
    /// Figures of the result by name.
    #[serde(default)]
    pub metrics: BTreeMap<String, f64>,
    /// The gates' verdicts.
    #[serde(default)]
    pub gates: Vec<GateResult>,
    /// Step of the checkpoint that this attempt went on from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed_from_step: Option<u64>,
    /// True if the result of this run id was published before, and nothing was computed.
    #[serde(default)]
    pub reused: bool,
}

impl Report {
    /// The report of a published artifact, given its run's folder.
    pub fn published(manifest: &Manifest, uri: &Uri, message: String) -> Self {
        Self {
            contract_version: CONTRACT_VERSION,
            failure: None,
            message,
            artifact: Some(manifest.reference(uri)),
            inputs: manifest.content.inputs.clone(),
            metrics: manifest.content.metrics.clone(),
            gates: manifest.content.gates.clone(),
            resumed_from_step: None,
            reused: false,
        }
    }

    /// The report of a failure.
    pub fn failed(reason: FailureReason, message: String) -> Self {
        Self {
            contract_version: CONTRACT_VERSION,
            failure: Some(reason),
            message,
            artifact: None,
            inputs: Vec::new(),
            metrics: BTreeMap::new(),
            gates: Vec::new(),
            resumed_from_step: None,
            reused: false,
        }
    }

    /// This report as JSON of at most [`REPORT_LIMIT_BYTES`]: a long message is cut, then goes what the operator knows by
    /// itself (what it handed in), and last what only this report says.
    pub fn to_termination_message(&self) -> String {
        let mut report = self.clone();
        truncate(&mut report.message, MESSAGE_LIMIT_BYTES);
        let write = |report: &Self| serde_json::to_string(report).expect("a report serializes to JSON");
        for shrink in [
            |_: &mut Self| (),
            |report: &mut Self| {
                for input in &mut report.inputs {
                    (input.bytes, input.resource) = (None, None);
                }
            },
            |report: &mut Self| report.inputs.clear(),
            |report: &mut Self| report.metrics.clear(),
            |report: &mut Self| report.gates.clear(),
        ] {
            shrink(&mut report);
            let text = write(&report);
            if text.len() <= REPORT_LIMIT_BYTES {
                return text;
            }
        }
        truncate(&mut report.message, 64);
        write(&report)
    }
}

fn truncate(text: &mut String, limit_bytes: usize) {
    if text.len() > limit_bytes {
        let end = (0..=limit_bytes - '…'.len_utf8())
            .rev()
            .find(|&at| text.is_char_boundary(at))
            .unwrap_or(0);
        text.truncate(end);
        text.push('…');
    }
}

/// How far a running stage is; served at `/progress`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Progress {
    /// What is done, in `unit`.
    pub done: u64,
    /// What there is to do, in `unit`.
    pub total: u64,
    /// What is counted, such as `tokens`, `documents`, `pairs`.
    pub unit: String,
    /// What is being done, in a few words, such as `training` or `evaluating`.
    pub activity: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_always_fits_into_a_termination_message() {
        let mut report = Report::failed(FailureReason::InputCorrupt, "é\"\\".repeat(5000));
        report.metrics = (0..400).map(|i| (format!("metric{i}"), 1.0 / i as f64)).collect();
        report.inputs = (0..60)
            .map(|i| Input {
                name: format!("input-{i}"),
                uri: "pvc://raw/some/rather/long/path/to/a/file"
                    .parse()
                    .expect("a valid uri"),
                digest: Some("sha256:".to_owned() + &"0".repeat(64)),
                bytes: None,
                resource: None,
            })
            .collect();
        let text = report.to_termination_message();
        assert!(text.len() <= REPORT_LIMIT_BYTES, "{}", text.len());
        let back: Report = serde_json::from_str(&text).expect("the shortened report is still a report");
        assert_eq!(back.failure, Some(FailureReason::InputCorrupt));
        assert!(back.message.ends_with('…'));
    }

    #[test]
    fn figures_survive_as_many_inputs_as_a_spec_can_name() {
        let resource = crate::Resource {
            kind: "Dataset".into(),
            namespace: "research".into(),
            name: "corpus".into(),
        };
        let input = |i: usize| Input {
            name: format!("input-{i}"),
            uri: "pvc://raw/a/file".parse().expect("a valid uri"),
            digest: Some("sha256:".to_owned() + &"0".repeat(64)),
            bytes: Some(1),
            resource: Some(resource.clone()),
        };
        for (inputs, kept) in [(2, 2), (20, 20), (64, 0)] {
            let mut report = Report::failed(FailureReason::GateFailed, "m".into());
            report.metrics = [("bitsPerByte".to_owned(), 2.5)].into();
            report.inputs = (0..inputs).map(input).collect();
            let text = report.to_termination_message();
            let back: Report = serde_json::from_str(&text).expect("the shortened report is still a report");
            assert_eq!(back.metrics, report.metrics);
            assert_eq!(back.inputs.len(), kept);
            assert_eq!(
                back.inputs.iter().all(|input| input.resource.is_some()),
                kept != 20,
                "{inputs} inputs"
            );
        }
    }

    #[test]
    fn a_report_of_a_newer_pod_is_still_read() {
        let text = r#"{"contractVersion":9,"failure":"TeapotShort","message":"m","novel":{"x":1}}"#;
        let report: Report = serde_json::from_str(text).expect("unknown fields and reasons are tolerated");
        assert_eq!(report.failure, Some(FailureReason::Internal));
    }
}
