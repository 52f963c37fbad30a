//! `PretrainJob`: token files to a model.

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::common::{above_zero, name_rule};
use crate::{Checkpoint, Common, Decimal, Gate, Reference, RunStatus, Schedule};

/// A model, trained from scratch on the token files of data sets.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "strata.dev",
    version = "v1alpha1",
    kind = "PretrainJob",
    doc = "A model, trained from scratch on the token files of data sets.",
    namespaced,
    status = "RunStatus",
    derive = "PartialEq",
    shortname = "pj",
    category = "strata",
    validation = name_rule(),
    printcolumn(name = "Tokens", type_ = "integer", json_path = ".spec.training.tokens"),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status"
    ),
    printcolumn(
        name = "Reason",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].reason"
    ),
    printcolumn(
        name = "Done",
        type_ = "integer",
        json_path = ".status.progress.percent",
        description = "Progress of the running attempt in percent"
    ),
    printcolumn(
        name = "Artifact",
        type_ = "string",
        json_path = ".status.artifact.digest",
        priority = "1"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.training.batchTokens >= self.model.llama.contextTokens")
    .message("training.batchTokens must hold at least one sequence of model.llama.contextTokens"))]
pub struct PretrainJobSpec {
    /// Data sets to train on; all with the same tokenizer.
    #[schemars(length(min = 1, max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub datasets: Vec<Reference>,
    /// The model.
    pub model: Model,
    /// How it is trained.
    pub training: Training,
    /// What is saved on the way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<Checkpoint>,
    /// What is measured on the held-out text before the model is published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluate: Option<Evaluate>,
    /// By what it is trained (default `candle`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<crate::TrainingEngine>,
    /// What all kinds share.
    #[serde(flatten)]
    pub common: Common,
}

/// The model to train.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Model {
    /// A Llama; the vocabulary is the data sets'.
    pub llama: Llama,
}

/// Shape of a Llama.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("self.hiddenSize % self.heads == 0").message("heads must divide hiddenSize"),
    validation = Rule::new("(self.hiddenSize / self.heads) % 2 == 0").message("hiddenSize / heads must be even: rotary embeddings turn pairs"),
    validation = Rule::new("!has(self.kvHeads) || self.heads % self.kvHeads == 0").message("kvHeads must divide heads")
)]
pub struct Llama {
    /// Width of the residual stream.
    #[schemars(range(min = 16, max = 16384))]
    pub hidden_size: i32,
    /// Number of layers.
    #[schemars(range(min = 1, max = 256))]
    pub layers: i32,
    /// Number of query heads.
    #[schemars(range(min = 1, max = 256))]
    pub heads: i32,
    /// Number of key and value heads (default: `heads`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 256))]
    pub kv_heads: Option<i32>,
    /// Width of the feed-forward layer (default: 8/3 of `hiddenSize`, rounded up to 32).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 16, max = 65536))]
    pub intermediate_size: Option<i32>,
    /// Longest sequence in tokens.
    #[schemars(range(min = 16, max = 131072))]
    pub context_tokens: i32,
    /// Whether input and output embeddings are one matrix (default true).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tie_embeddings: Option<bool>,
}

/// How a model is pretrained.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Training {
    /// Tokens to train on; the data is repeated, shuffled anew, if it has fewer.
    #[schemars(range(min = 1, max = 100_000_000_000_000_i64))]
    pub tokens: i64,
    /// Tokens per optimizer step.
    #[schemars(range(min = 16, max = 67_108_864))]
    pub batch_tokens: i64,
    /// Peak learning rate.
    #[schemars(extend("x-kubernetes-validations" = above_zero("3e-4")))]
    pub learning_rate: Decimal,
    /// Share of the steps that warm up linearly (default 2).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 100))]
    pub warmup_percent: Option<i32>,
    /// Course of the learning rate after the warm-up (default Cosine).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Schedule")]
    pub schedule: Option<Schedule>,
    /// Decoupled weight decay on matrices (default 0.1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay: Option<Decimal>,
    /// Seed of the initialization and of the order of the data (default 0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0))]
    pub seed: Option<i64>,
}

/// What is measured before a model is published.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Evaluate {
    /// What the result must reach to be published.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["metric"]))]
    pub gates: Vec<Gate>,
}
