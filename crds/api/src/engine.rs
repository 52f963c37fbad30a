//! `spec.engine`: by what the work is done; and `spec.scheduler`: who decides when it begins.
//!
//! A union for each kind, so that each offers only what can do its work. `container` is the same everywhere: any image, under
//! the stage contract (docs/stage-contract.md).

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::common::exactly_one;

/// By what a Dataset is made (default `embedded`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = exactly_one(&["embedded", "container"]))]
pub struct DatasetEngine {
    /// Strata's own curation, in one pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub embedded: Option<Embedded>,
    /// An image of yours, under the stage contract.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<StageContainer>,
}

/// By what a model is trained (default `candle`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = exactly_one(&["candle", "container"]))]
pub struct TrainingEngine {
    /// Strata's own trainer: on CPUs, and through candle on one GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub candle: Option<Candle>,
    /// An image of yours, under the stage contract.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<StageContainer>,
}

/// By what a model is served (default `candle`).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = exactly_one(&["candle", "container"]))]
pub struct ServingEngine {
    /// Strata's own server: on CPUs, and through candle on one GPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub candle: Option<Candle>,
    /// An image of yours that serves the model as it was published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<ServingContainer>,
}

/// Strata's own curation; it has no settings of its own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Embedded {}

/// Strata's own trainer and server; they have no settings of their own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Candle {}

/// An image that carries out a stage. It is told by environment variables where its configuration is, where to read and
/// where to write; what it leaves is hashed, judged by the gates and published for it. Image, command, arguments and
/// variables determine the result: with another one, it is another run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct StageContainer {
    /// The image. Name it by digest, or a tag that never moves: the run is named after this text.
    #[schemars(length(min = 1, max = 512), regex(pattern = r"^[a-zA-Z0-9][-a-zA-Z0-9._:/@]*$"))]
    pub image: String,
    /// The program and its first arguments; the image's own entry point is not used.
    #[schemars(length(min = 1, max = 64), inner(length(max = 4096)))]
    pub command: Vec<String>,
    /// More arguments. `$(NAME)` stands for a variable of the container, such as `$(STRATA_OUTPUT_DIR)`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 4096)))]
    pub args: Vec<String>,
    /// Variables that determine the result. Secrets, and what changes nothing in the result, belong into `spec.pod.env`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub env: Vec<Variable>,
    /// What the container needs of its pod.
    #[serde(flatten)]
    pub needs: ContainerNeeds,
}

/// An image that serves a model. It gets the model's folder and the port by environment variables.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServingContainer {
    /// The image.
    #[schemars(length(min = 1, max = 512), regex(pattern = r"^[a-zA-Z0-9][-a-zA-Z0-9._:/@]*$"))]
    pub image: String,
    /// The program and its first arguments (default: the image's entry point).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 4096)))]
    pub command: Vec<String>,
    /// Arguments. `$(NAME)` stands for a variable of the container, such as `$(STRATA_MODEL_PATH)`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 4096)))]
    pub args: Vec<String>,
    /// Variables. Secrets belong into `spec.pod.env`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub env: Vec<Variable>,
    /// Port that it answers on (default 8000).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1024, max = 65535))]
    pub port: Option<i32>,
    /// Path that answers 200 while the server lives (default `/health`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256), regex(pattern = r"^/[^\s]*$"))]
    pub health_path: Option<String>,
    /// Path that answers 200 while it takes requests (default: `healthPath`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256), regex(pattern = r"^/[^\s]*$"))]
    pub ready_path: Option<String>,
    /// Longest time until `healthPath` answers for the first time: loading and compiling (default 30m).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub startup: Option<crate::Duration>,
    /// What the container needs of its pod.
    #[serde(flatten)]
    pub needs: ContainerNeeds,
}

/// What a container of the user's needs of its pod beyond `spec.pod`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ContainerNeeds {
    /// Size of `/dev/shm`, which processes on several GPUs talk through (default: what the container runtime gives, 64Mi). It counts
    /// as memory of the container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shared_memory: Option<Quantity>,
    /// Size of `/tmp`, which is also the home folder (default 1Gi).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scratch: Option<Quantity>,
    /// User that it runs as (default 65532). With 0 it is root, which a namespace of the restricted Pod Security Standard refuses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 2_147_483_647))]
    pub run_as_user: Option<i64>,
    /// Whether it may write outside of its volumes (default false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writable_root_filesystem: Option<bool>,
}

/// An environment variable with a plain value.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!self.name.startsWith('STRATA_')")
    .message("names that begin with STRATA_ are Strata's: choose another"))]
pub struct Variable {
    /// Its name.
    #[schemars(length(min = 1, max = 128), regex(pattern = r"^[A-Za-z_][A-Za-z0-9_]*$"))]
    pub name: String,
    /// Its value.
    #[schemars(length(max = 4096))]
    pub value: String,
}

/// Who decides when work begins.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Scheduler {
    /// Kueue, in this cluster.
    pub kubernetes: KubernetesScheduler,
}

/// Kueue.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct KubernetesScheduler {
    /// Name of the LocalQueue in this namespace. Attempts are made suspended, and Kueue alone starts them.
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub queue: String,
}
