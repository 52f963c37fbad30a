//! The status that the four kinds share: counts and scalars only, at most 16 KiB.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Status of a Dataset, PretrainJob or AlignmentJob, and the part of an InferenceService's that is about its run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RunStatus {
    /// Generation of the spec that this status is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Conditions; `Ready` is the conjunction of the others.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
    /// The last published artifact; replaced only by a new publication.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact: Option<ArtifactStatus>,
    /// What was published before, the newest first, at most 10: a digest in a reference pins any of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub previous_artifacts: Vec<ArtifactStatus>,
    /// Where the pods go and what is expected of that, where `spec.hardware` is set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placement: Option<PlacementStatus>,
    /// The run that is under way or that was the last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<RunInfo>,
    /// What the artifact was made from, as it was read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<InputStatus>,
    /// How far the running attempt is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<ProgressStatus>,
    /// Figures of the artifact by name, as decimal strings.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, String>,
    /// Verdicts of the gates of the last run.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gates: Vec<GateStatus>,
}

/// A published artifact.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ArtifactStatus {
    /// Folder that holds its manifest.
    pub uri: String,
    /// Digest of its content.
    pub digest: String,
    /// Size of its files in bytes.
    pub bytes: i64,
    /// Run that published it.
    pub run_id: String,
}

/// Where pods go, and what is expected of that before they start. Estimates; docs/placement.md has the formulas.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PlacementStatus {
    /// Name of the accelerator.
    pub accelerator: String,
    /// The pool that has, or may grow to, such nodes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<String>,
    /// Nodes taken together.
    pub nodes: i32,
    /// Accelerators on each of them; absent on processors.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accelerators_per_node: Option<i32>,
    /// How the work is spread over several accelerators.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parallelism: Option<String>,
    /// Memory that one accelerator needs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub needed_bytes: Option<i64>,
    /// Memory that one has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available_bytes: Option<i64>,
    /// Length of the run in hours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimated_hours: Option<String>,
    /// What the run costs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub estimated_cost: Option<String>,
    /// Price of all nodes together; of an InferenceService: of those of one replica.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub price_per_hour: Option<String>,
    /// Currency of price and cost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub currency: Option<String>,
    /// What the length was worked out from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub assumption: Option<String>,
}

/// A run and its attempts.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RunInfo {
    /// Hash of what determines the result.
    pub id: String,
    /// Number of the current attempt, from 1.
    pub attempt: i32,
    /// Attempts that failed and count against `spec.retries`, since the spec last changed.
    pub failures: i32,
    /// Interruptions in a row of attempts that had hardly begun.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interruptions: Option<i32>,
    /// Image that the run is pinned to.
    pub image: String,
    /// Accelerator that the image is for, where `spec.hardware` names one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accelerator: Option<String>,
    /// Job of the current attempt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<String>,
    /// Training step of the checkpoint that the attempt went on from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resumed_from_step: Option<i64>,
    /// How the last attempt that gave no result ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<AttemptFailure>,
}

/// How an attempt ended that gave no result.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AttemptFailure {
    /// Number of the attempt.
    pub attempt: i32,
    /// Why, in a word that is also a condition's reason.
    pub reason: String,
    /// Why, in a sentence.
    pub message: String,
    /// What follows from it.
    pub outcome: AttemptOutcome,
    /// When it ended.
    pub time: Time,
    /// Generation of the spec that the attempt was made from; a newer one gets a new budget of retries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<i64>,
}

/// What follows from the end of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AttemptOutcome {
    /// Interrupted from outside: the next attempt goes on, and this one does not count.
    Interrupted,
    /// Failed: it counts against `spec.retries`.
    Failed,
    /// Failed in a way that another attempt would repeat: there is none.
    Fatal,
}

/// Something that an artifact was made from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InputStatus {
    /// What it is to the stage.
    pub name: String,
    /// Where it is.
    pub uri: String,
    /// Its digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// The resource that published it, `Kind/name`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resource: Option<String>,
}

/// How far an attempt is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProgressStatus {
    /// What is being done.
    pub activity: String,
    /// What is done, in `unit`.
    pub done: i64,
    /// What there is to do, in `unit`.
    pub total: i64,
    /// What is counted.
    pub unit: String,
    /// `done` in percent of `total`.
    pub percent: i32,
}

/// Verdict of one gate.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GateStatus {
    /// The metric.
    pub metric: String,
    /// Its value; absent if it was not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// Whether it passed.
    pub passed: bool,
}
