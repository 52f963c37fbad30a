//! `spec.autoscale` of an InferenceService, and what its status says about it.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{Duration, Latency};

/// The number of pods follows what they say of themselves.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("!has(self.minReplicas) || self.minReplicas >= 1").message(
    "minReplicas must be at least 1: nothing holds requests yet while there is no pod; to stop a service, set suspend: true"))]
#[x_kube(validation = Rule::new("(has(self.minReplicas) ? self.minReplicas : 1) <= self.maxReplicas")
    .message("maxReplicas must not be below minReplicas: raise it"))]
pub struct Autoscale {
    /// Fewest pods (default 1).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub min_replicas: Option<i32>,
    /// Most pods.
    #[schemars(range(min = 1, max = 1000))]
    pub max_replicas: i32,
    /// What is aimed at: as many pods as keep all of them.
    pub targets: ScalingTargets,
    /// Most accelerators that all pods together may hold; counted by `spec.hardware`, or the limits of `spec.pod.resources`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub max_accelerators: Option<i32>,
    /// How long fewer pods must have been enough before there are fewer (default: 2.5 times the measured time that a pod takes to
    /// start, between 2m and 10m).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale_down_window: Option<Duration>,
    /// Time from a pod's making to its first answer, until it has been measured (default 2m): the load is foreseen for that long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cold_start: Option<Duration>,
}

/// What is aimed at.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new(
    "has(self.kvCacheUtilizationPercent) || has(self.waitingRequests) || has(self.timeToFirstTokenP95) || has(self.interTokenLatencyP95)")
    .message("at least one of kvCacheUtilizationPercent, waitingRequests, timeToFirstTokenP95, interTokenLatencyP95 must be set"))]
pub struct ScalingTargets {
    /// Share of the cache of keys and values that requests hold, in percent, as the mean of the pods.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100))]
    pub kv_cache_utilization_percent: Option<i32>,
    /// Requests that wait for a place, per pod.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 100_000))]
    pub waiting_requests: Option<i32>,
    /// Time within which 95 of 100 requests get their first token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time_to_first_token_p95: Option<Latency>,
    /// Time within which 95 of 100 further tokens follow the one before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub inter_token_latency_p95: Option<Latency>,
}

/// Where scaling by itself stands.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AutoscaleStatus {
    /// Wanted number of pods.
    pub desired_replicas: i32,
    /// Why, in a word.
    pub reason: String,
    /// Why, with the figures of `time`.
    pub message: String,
    /// When the figures were written: at most every 30 s, and only if they changed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<Time>,
    /// When the wanted number changed last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed: Option<Time>,
    /// What the pods said, by name, as decimal numbers.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub observed: BTreeMap<String, String>,
    /// What was learned of a pod, by name, as decimal numbers: another operator goes on with it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub learned: BTreeMap<String, String>,
}

/// One change of the number of pods.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ScalingEvent {
    /// When.
    pub time: Time,
    /// Wanted number of pods before.
    pub from: i32,
    /// Wanted number of pods after.
    pub to: i32,
    /// Why, in a word.
    pub reason: String,
    /// Why, with the figures that led to it.
    pub message: String,
}
