//! How many serving pods may be missing because somebody asked for it: a drain, an upgrade of nodes.

use std::collections::BTreeMap;

use k8s_openapi::api::policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::core::{Selector, SelectorExt};

/// One pod after the other. It never blocks a drain for good: a lone pod may go, and so may one that does not answer.
pub fn build(metadata: ObjectMeta, owner: &OwnerReference, selector: BTreeMap<String, String>) -> PodDisruptionBudget {
    PodDisruptionBudget {
        metadata: ObjectMeta {
            owner_references: Some(vec![owner.clone()]),
            ..metadata
        },
        spec: Some(PodDisruptionBudgetSpec {
            max_unavailable: Some(IntOrString::Int(1)),
            selector: Some(LabelSelector {
                match_labels: Some(selector),
                ..LabelSelector::default()
            }),
            // By default, pods that do not answer count as missing and can then not be evicted at all.
            unhealthy_pod_eviction_policy: Some("AlwaysAllow".into()),
            ..PodDisruptionBudgetSpec::default()
        }),
        ..PodDisruptionBudget::default()
    }
}

/// Whether a budget counts pods with these labels. One without a selector counts none.
pub fn selects(budget: &PodDisruptionBudget, labels: &BTreeMap<String, String>) -> bool {
    let selector = budget.spec.as_ref().and_then(|spec| spec.selector.clone());
    let parsed = selector.and_then(|selector| Selector::try_from(selector).ok());
    parsed.is_some_and(|selector| selector.matches(labels))
}
