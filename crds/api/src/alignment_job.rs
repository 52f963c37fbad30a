//! `AlignmentJob`: a model and preferences to an aligned model.

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::common::{above_zero, name_rule};
use crate::{Checkpoint, Common, Decimal, Gate, ModelSource, Reference, RunStatus, Schedule};

/// A model, aligned with preferences.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "strata.dev",
    version = "v1alpha1",
    kind = "AlignmentJob",
    doc = "A model, aligned with preferences.",
    namespaced,
    status = "RunStatus",
    derive = "PartialEq",
    shortname = "aj",
    category = "strata",
    validation = name_rule(),
    validation = Rule::new("!has(self.spec.base.alignmentJob) || self.spec.base.alignmentJob.name != self.metadata.name")
        .message("an AlignmentJob cannot be its own base: name another one in spec.base.alignmentJob"),
    printcolumn(name = "Pairs", type_ = "integer", json_path = ".spec.training.pairs"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Done", type_ = "integer", json_path = ".status.progress.percent", description = "Progress of the running attempt in percent"),
    printcolumn(name = "Artifact", type_ = "string", json_path = ".status.artifact.digest", priority = "1"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct AlignmentJobSpec {
    /// The model to start from.
    pub base: ModelSource,
    /// How it is aligned.
    pub method: Method,
    /// What is trained.
    pub adapter: Adapter,
    /// Preference data sets.
    #[schemars(length(min = 1, max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub datasets: Vec<Reference>,
    /// How it is trained.
    pub training: AlignmentTraining,
    /// What is saved on the way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<Checkpoint>,
    /// What is measured before and after.
    pub evaluate: AlignmentEvaluate,
    /// By what it is trained (default `candle`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<crate::TrainingEngine>,
    /// What all kinds share.
    #[serde(flatten)]
    pub common: Common,
}

/// How a model is aligned.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Method {
    /// Direct preference optimization.
    pub dpo: Dpo,
}

/// Direct preference optimization.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Dpo {
    /// Strength of the pull towards the base model; the larger, the closer the result stays to it.
    #[schemars(extend("x-kubernetes-validations" = above_zero("0.1")))]
    pub beta: Decimal,
}

/// What is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Adapter {
    /// A low-rank adapter on all linear layers of the blocks.
    pub lora: Lora,
}

/// A low-rank adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Lora {
    /// Rank of the update.
    #[schemars(range(min = 1, max = 1024))]
    pub rank: i32,
    /// The update is scaled by `alpha / rank` (default: twice the rank).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alpha: Option<Decimal>,
}

/// How an adapter is trained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AlignmentTraining {
    /// Pairs to train on, each once.
    #[schemars(range(min = 1, max = 100_000_000))]
    pub pairs: i32,
    /// Longest conversation of a pair in tokens; longer pairs are left out and counted.
    #[schemars(range(min = 16, max = 131072))]
    pub max_pair_tokens: i32,
    /// Pairs per optimizer step.
    #[schemars(range(min = 1, max = 65536))]
    pub batch_pairs: i32,
    /// Peak learning rate.
    #[schemars(extend("x-kubernetes-validations" = above_zero("1e-4")))]
    pub learning_rate: Decimal,
    /// Share of the steps that warm up linearly (default 10).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub warmup_percent: Option<i32>,
    /// Course of the learning rate after the warm-up (default Cosine).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Schedule")]
    pub schedule: Option<Schedule>,
    /// Seed of the initialization and of the order of the pairs (default 0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub seed: Option<i64>,
}

/// What is measured before and after an alignment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AlignmentEvaluate {
    /// Held-out pairs on which the reward margin is measured.
    #[schemars(range(min = 2, max = 1_000_000))]
    pub held_out_pairs: i32,
    /// Text on which the alignment tax is measured; without, it is not measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capability: Option<Capability>,
    /// What the result must reach to be published.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["metric"]))]
    pub gates: Vec<Gate>,
}

/// Text on which the alignment tax is measured.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Capability {
    /// Data set (task Pretraining) whose held-out text is used.
    pub dataset: Reference,
    /// Tokens of that text that are used (default 8192).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 256, max = 10_000_000))]
    pub tokens: Option<i32>,
}
