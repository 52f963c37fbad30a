//! The labels and annotations that Strata puts on what it makes, and by which it finds it again.

use std::collections::BTreeMap;

use crate::engine::kind::ResourceKind;

/// Label: kind of the resource that something belongs to.
pub const KIND: &str = "strata.dev/kind";
/// Label: name of the resource that something belongs to.
pub const NAME: &str = "strata.dev/name";
/// Label: id of the run that something belongs to.
pub const RUN: &str = "strata.dev/run";
/// Label: number of the attempt that something belongs to.
pub const ATTEMPT: &str = "strata.dev/attempt";
/// Label: what the pod does; the stage's command, or [`SERVE`].
pub const COMPONENT: &str = "app.kubernetes.io/component";
/// Value of [`COMPONENT`] on serving pods.
pub const SERVE: &str = "serve";
/// Annotation on a serving pod: digest of the weights that it serves.
pub const DIGEST: &str = "strata.dev/digest";
/// Annotation on what is applied: hash of what was applied last.
pub const APPLIED: &str = "strata.dev/applied";
/// Annotation on a Job: generation of the spec that it was made from.
pub const GENERATION: &str = "strata.dev/generation";
/// Annotation on an attempt: what it is on the server, where that is no plain Job.
pub const WORKLOAD: &str = "strata.dev/workload";
/// Label on an attempt: the queue in which it waits for Kueue.
pub const QUEUE: &str = "kueue.x-k8s.io/queue-name";
/// Annotation on a Job that Strata suspended: others, such as Kueue, suspend Jobs too, and only they may resume those.
pub const SUSPENDED: &str = "strata.dev/suspended";
/// Annotation on a pod: name of the accelerator that it was made for; absent: none was asked for.
pub const ACCELERATOR: &str = "strata.dev/accelerator";
/// Annotation on a Deployment: names of the claim templates that its pods may need, those of a rollout's both sides.
pub const CLAIMS: &str = "strata.dev/claims";
/// Prefix of the keys that are Strata's.
pub const GROUP_PREFIX: &str = "strata.dev/";

/// The labels of everything that belongs to a resource.
pub fn common(kind: ResourceKind, name: &str, component: &str) -> BTreeMap<String, String> {
    [
        ("app.kubernetes.io/name", "strata"),
        ("app.kubernetes.io/instance", name),
        (COMPONENT, component),
        ("app.kubernetes.io/managed-by", "strata-operator"),
        ("app.kubernetes.io/part-of", "strata"),
        (KIND, kind.name()),
        (NAME, name),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .collect()
}

/// The selector of everything that belongs to a resource.
pub fn selector(kind: ResourceKind, name: &str) -> String {
    format!("{KIND}={},{NAME}={name}", kind.name())
}

/// Whether a label is one of those that [`common`] and the builders set.
pub fn is_ours(key: &str) -> bool {
    const OURS: [&str; 5] = [
        "app.kubernetes.io/name",
        "app.kubernetes.io/instance",
        COMPONENT,
        "app.kubernetes.io/managed-by",
        "app.kubernetes.io/part-of",
    ];
    key.starts_with(GROUP_PREFIX) || OURS.contains(&key)
}

/// The labels by which serving pods are selected; a Deployment can never change them.
pub fn serving_selector(name: &str) -> BTreeMap<String, String> {
    [
        (COMPONENT, SERVE),
        (KIND, ResourceKind::InferenceService.name()),
        (NAME, name),
    ]
    .into_iter()
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .collect()
}
