//! `InferenceService`: a model to an endpoint.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::core::cel::Rule;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
pub use strata_contract::QuantizationFormat;

use crate::common::name_rule;
use crate::{
    Autoscale, AutoscaleStatus, Common, Duration, ModelSource, RunStatus, ScalingEvent, ServedAdapter, Speculation,
};

/// A model, served with the OpenAI API.
#[derive(CustomResource, Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[kube(
    group = "strata.dev",
    version = "v1alpha1",
    kind = "InferenceService",
    doc = "A model, served with the OpenAI API.",
    namespaced,
    status = "InferenceServiceStatus",
    derive = "PartialEq",
    shortname = "isvc",
    category = "strata",
    validation = name_rule(),
    validation = Rule::new("!has(self.spec.adapters) || self.spec.adapters.all(adapter, adapter.name != self.metadata.name)")
        .message("the model itself is served under the resource's name: give the adapter in spec.adapters another one"),
    validation = Rule::new("!has(self.spec.adapters) || !has(self.spec.model.alignmentJob) || self.spec.adapters.all(adapter, !has(adapter.alignmentJob) || adapter.alignmentJob.name != self.spec.model.alignmentJob.name)")
        .message("the model of an AlignmentJob has its adapter merged already: serve the AlignmentJob's base in spec.model, or leave the adapter out"),
    scale(
        spec_replicas_path = ".spec.replicas",
        status_replicas_path = ".status.replicas",
        label_selector_path = ".status.selector"
    ),
    printcolumn(name = "Replicas", type_ = "integer", json_path = ".status.readyReplicas"),
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
    printcolumn(name = "URL", type_ = "string", json_path = ".status.url"),
    printcolumn(
        name = "Artifact",
        type_ = "string",
        json_path = ".status.artifact.digest",
        priority = "1"
    ),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = either(),
    validation = Rule::new("!has(self.engine) || !has(self.engine.container) || !has(self.quantization)")
        .message("quantization is for engine candle: a container serves the model as it was published"),
    validation = Rule::new("!has(self.engine) || !has(self.engine.container) || !has(self.evaluate)")
        .message("evaluate is for engine candle: what a container serves is judged where it is made, in the training job"),
    validation = Rule::new("!has(self.engine) || !has(self.engine.container) || !has(self.kvCache)")
        .message("kvCache is for engine candle: a container has its own cache: set it in engine.container.args"),
    validation = Rule::new("!has(self.engine) || !has(self.engine.container) || !has(self.maxSequenceTokens)")
        .message("maxSequenceTokens is for engine candle: set the length in engine.container.args"),
    validation = Rule::new("!has(self.engine) || !has(self.engine.container) || !has(self.auth)")
        .message("auth is for engine candle: hand the key to the container in pod.env"),
    validation = Rule::new("!has(self.engine) || !has(self.engine.container) || !has(self.tls)")
        .message("tls is for engine candle: a container has its own certificates: set them in engine.container.args"),
    validation = Rule::new("!has(self.engine) || !has(self.engine.container) || !has(self.adapters)")
        .message("adapters is for engine candle: a container loads its own: name them in engine.container.args"),
    validation = Rule::new("!has(self.engine) || !has(self.engine.container) || !has(self.speculation)")
        .message("speculation is for engine candle: set it in engine.container.args"),
    validation = Rule::new("!has(self.engine) || !has(self.engine.container) || !(has(self.maxConcurrentRequests) || has(self.maxWaitingRequests))")
        .message("maxConcurrentRequests and maxWaitingRequests are for engine candle: set them in engine.container.args")
)]
pub struct InferenceServiceSpec {
    /// The model. Without a digest, the service follows what is published: a promotion by itself.
    pub model: ModelSource,
    /// Format of the served weights (default Q8_0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "QuantizationFormat")]
    pub quantization: Option<QuantizationFormat>,
    /// What the quantized model must reach before it is served, on the evaluation set that came with the model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evaluate: Option<crate::Evaluate>,
    /// The cache of keys and values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kv_cache: Option<KvCache>,
    /// Longest sequence in tokens, prompt and answer (default: what the model can, but no more than the cache holds).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 16, max = 1_048_576))]
    pub max_sequence_tokens: Option<i32>,
    /// Requests computed at once (default 32).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub max_concurrent_requests: Option<i32>,
    /// Requests that may wait; more are refused with status 429 (default 256).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 65536))]
    pub max_waiting_requests: Option<i32>,
    /// LoRA adapters, served beside the model. Until one has published, the pods serve without it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub adapters: Vec<ServedAdapter>,
    /// How tokens are guessed ahead (default: not at all).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub speculation: Option<Speculation>,
    /// Who is answered (default: whoever reaches the endpoint).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub auth: Option<Auth>,
    /// HTTPS instead of HTTP: the Service answers on port 443 instead of 80.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// Number of pods (default 1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    // In the schema, as the server answers a read of /scale only where the field is there.
    #[schemars(range(min = 0, max = 1000), extend("default" = 1))]
    pub replicas: Option<i32>,
    /// The number of pods follows what they say of themselves, instead of `replicas`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscale: Option<Autoscale>,
    /// How long a pod that is to go may take to finish its requests (default 25s; with `autoscale`, 5m). Let it be longer than
    /// the longest answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<Duration>,
    /// By what it is served (default `candle`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub engine: Option<crate::ServingEngine>,
    /// What all kinds share.
    #[serde(flatten)]
    pub common: Common,
}

/// One number, one writer. The default of `replicas` stands beside `autoscale`.
fn either() -> Rule {
    Rule::new("!has(self.autoscale) || !has(self.replicas) || self.replicas == 1").message(
        "set either replicas or autoscale: with autoscale the operator alone sets the number of pods, so leave replicas out, and \
         take away what else scales this service, such as a HorizontalPodAutoscaler or a ScaledObject",
    )
}

/// Who is answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Auth {
    /// The keys, one a line: clients present one as `Authorization: Bearer KEY` or `api-key: KEY`. A change counts within about
    /// two minutes, without a restart.
    pub secret: SecretKey,
}

/// A value in a Secret of the same namespace. It is mounted into pods; the operator does not read it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretKey {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub name: String,
    /// Key in its data.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[-._a-zA-Z0-9]+$"))]
    pub key: String,
}

/// How the endpoint speaks TLS.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Tls {
    /// Name of a Secret of type kubernetes.io/tls in the same namespace, as cert-manager writes it: `tls.crt` and `tls.key`. A
    /// renewed certificate counts within about two minutes, without a restart.
    #[schemars(length(min = 1, max = 253), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$"))]
    pub secret_name: String,
}

/// The cache of keys and values, per pod.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.spill) || !has(self.prefixCaching) || self.prefixCaching").message(SPILL_RULE))]
pub struct KvCache {
    /// Tokens in a block (default 16).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 8, max = 256))]
    pub block_tokens: Option<i32>,
    /// Memory of the cache (default 256Mi).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Quantity>,
    /// Format of keys and values (default F16).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "KvCacheDtype")]
    pub dtype: Option<KvCacheDtype>,
    /// Whether the blocks of a shared prompt prefix are reused (default true).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefix_caching: Option<bool>,
    /// A part of the node's disk for prompt prefixes that `memory` has no more room for: they are read back instead of computed
    /// again (default: none).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spill: Option<KvSpill>,
}

/// What `spec.kvCache.spill` needs.
pub const SPILL_RULE: &str =
    "spill keeps prompt prefixes, which prefixCaching: false gives up: leave out one of the two";

/// A disk behind the cache of keys and values.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KvSpill {
    /// The most that it takes, such as 10Gi; between 1Mi and 16Ti.
    pub size: Quantity,
}

/// Format of keys and values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum KvCacheDtype {
    /// 16-bit floats.
    #[default]
    F16,
    /// 32-bit floats.
    F32,
    /// 8 bits with a scale for up to 32 numbers: room for nearly twice as many tokens as with F16.
    Q8,
}

/// Status of an InferenceService.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InferenceServiceStatus {
    /// What is about the run that prepares the served weights.
    #[serde(flatten)]
    pub run_status: RunStatus,
    /// Address of the endpoint inside of the cluster.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Digest of the weights that all ready pods serve; differs from `artifact` during a rollout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serving_digest: Option<String>,
    /// Pods of the current and of earlier versions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<i32>,
    /// Pods that answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_replicas: Option<i32>,
    /// Label selector of the pods, for `/scale`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// Where scaling by itself stands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub autoscale: Option<AutoscaleStatus>,
    /// The last changes of the number of pods that `spec.autoscale` led to, the newest first, at most 10.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub scaling_history: Vec<ScalingEvent>,
}
