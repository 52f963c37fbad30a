//! Where the serving pods stand.
//!
//! ```text
//!   nothing published ──▶ Absent
//!   published ──▶ Deployment wanted ──▶ RollingOut ──▶ Serving
//!                      │                    │             │ fewer pods answer
//!                      └─ replicas: 0       ▼             ▼
//!                         or suspend   CrashLooping   Unavailable
//!                           ▼
//!                      ScaledToZero, Suspended
//! ```
//!
//! What is wanted is always the artifact that was published *last*: while a new one is prepared, or when that fails,
//! the pods of the last good one stay.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use strata_api::Reason;

use super::check::Serving;
use super::rollout::makes_place_at;
use crate::run::attempt::{container, quote, waiting};
use crate::run::conditions::whole_seconds;
use crate::workload::deployment::Rollout;
use crate::workload::labels;

/// A container that has run for longer than the kubelet's longest pause between starts is not in a loop.
const LONGEST_BACK_OFF: SignedDuration = SignedDuration::from_mins(5);

/// Where the serving pods stand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// In a word.
    pub reason: Reason,
    /// In a sentence.
    pub message: String,
}

/// Where the serving pods stand, given what is wanted; `wanted_model` is the digest that they are to serve, or the URI of what
/// has none.
pub fn standing(
    wanted_model: Option<&str>,
    serving: &Serving,
    deployment: Option<&Deployment>,
    pods: &[&Pod],
    now: Timestamp,
) -> Standing {
    let wanted = serving.replicas;
    let standing = |reason, message: String| Standing { reason, message };
    let Some(model) = wanted_model else {
        return standing(
            Reason::Blocked,
            "nothing is published yet; see condition Succeeded".into(),
        );
    };
    let Some(deployment) = deployment else {
        return standing(Reason::RollingOut, "the Deployment is not there yet".into());
    };
    if serving.is_suspended {
        return standing(Reason::Suspended, "spec.suspend is true: nothing answers".into());
    }
    if wanted == 0 {
        return standing(Reason::ScaledToZero, "no pods are wanted: nothing answers".into());
    }
    if let Some(message) = pods.iter().find_map(|pod| crash(pod, now)) {
        return standing(Reason::CrashLooping, message);
    }
    let status = deployment.status.clone().unwrap_or_default();
    let is_seen = is_seen(deployment);
    let is_current = |pod: &&&Pod| is_ready(pod) && digest(pod).map(String::as_str) == Some(model);
    let current = pods.iter().filter(is_current).count();
    // While only their number changes, those that answer are enough.
    let is_scaling = serving.scaled.is_some()
        && is_seen
        && status.updated_replicas == status.replicas
        && status.available_replicas >= Some(serving.enough())
        && i32::try_from(current).is_ok_and(|current| current >= serving.enough());
    if is_scaling {
        return standing(
            Reason::Serving,
            format!("{current} of {wanted} pods answer with {model}"),
        );
    }
    let complete = is_seen && status.updated_replicas == Some(wanted) && status.replicas == Some(wanted);
    let enough = usize::try_from(wanted).is_ok_and(|wanted| current >= wanted);
    if complete && enough && status.available_replicas == Some(wanted) {
        return standing(
            Reason::Serving,
            format!("{wanted} of {wanted} pods answer with {model}"),
        );
    }
    let held = pods.iter().filter(|pod| !is_ready(pod)).find_map(|pod| waiting(pod));
    if let Some((reason @ (Reason::ImagePullFailed | Reason::ClaimNotFound), message)) = held {
        return standing(reason, message);
    }
    let mut why = held.map(|(_, message)| format!(": {message}")).unwrap_or_default();
    if let Some(at) = makes_place_at(deployment, pods, serving.rollout_patience) {
        why += &format!("; a pod of before makes place at {}", whole_seconds(at).0);
    } else if Rollout::of(deployment) == Rollout::Replace {
        why += "; there was no room for both versions: a pod of before goes, then its successor comes";
    }
    let reason = match complete && was_complete(deployment) {
        true => Reason::ReplicasUnavailable,
        false => Reason::RollingOut,
    };
    standing(reason, format!("{current} of {wanted} pods answer with {model}{why}"))
}

/// Whether what the Deployment's status says is about its present spec.
pub fn is_seen(deployment: &Deployment) -> bool {
    let status = deployment.status.as_ref();
    let observed = status.and_then(|status| status.observed_generation);
    deployment.metadata.generation.is_some() && observed >= deployment.metadata.generation
}

/// Whether no pod of a template of before is left.
pub fn rolled_out(deployment: &Deployment) -> bool {
    let status = deployment.status.clone().unwrap_or_default();
    is_seen(deployment) && status.updated_replicas.unwrap_or(0) == status.replicas.unwrap_or(0)
}

/// Whether the current version of the Deployment has been complete before.
fn was_complete(deployment: &Deployment) -> bool {
    let conditions = deployment
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_deref());
    conditions.unwrap_or_default().iter().any(|condition| {
        condition.type_ == "Progressing" && condition.reason.as_deref() == Some("NewReplicaSetAvailable")
    })
}

/// How a pod keeps failing, if it does: also while it runs once more and has not answered yet.
fn crash(pod: &Pod, now: Timestamp) -> Option<String> {
    let container = container(pod)?;
    let state = container.state.as_ref();
    let last = container
        .last_state
        .as_ref()
        .and_then(|state| state.terminated.as_ref());
    let waits_for = state.and_then(|state| state.waiting.as_ref()?.reason.as_deref());
    let has_held = state
        .and_then(|state| state.running.as_ref()?.started_at.as_ref())
        .is_some_and(|started| now.duration_since(started.0) > LONGEST_BACK_OFF);
    let failed_before = container.restart_count > 0 && last.is_some_and(|end| end.exit_code != 0);
    let in_a_loop = match waits_for {
        Some(word) => word == "CrashLoopBackOff",
        None => failed_before && !container.ready && !has_held,
    };
    if !in_a_loop {
        return None;
    }
    let how = last.map_or_else(String::new, |end| {
        let words = [end.reason.as_deref(), end.message.as_deref()].into_iter().flatten();
        format!(
            "exit status {} ({})",
            end.exit_code,
            quote(&words.collect::<Vec<_>>().join(": "))
        )
    });
    Some(format!("a serving pod keeps failing: {how}"))
}

/// Whether a pod answers.
pub fn is_ready(pod: &Pod) -> bool {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref());
    let ready = |conditions: &[k8s_openapi::api::core::v1::PodCondition]| {
        conditions
            .iter()
            .any(|condition| condition.type_ == "Ready" && condition.status == "True")
    };
    pod.metadata.deletion_timestamp.is_none() && conditions.is_some_and(ready)
}

/// What a pod serves.
pub fn digest(pod: &Pod) -> Option<&String> {
    pod.metadata.annotations.as_ref()?.get(labels::DIGEST)
}

/// The pods that serve, among all of a resource's.
pub fn serving_pods(pods: &[Pod]) -> Vec<&Pod> {
    let serves = |pod: &&Pod| {
        let labels = pod.metadata.labels.as_ref();
        labels
            .and_then(|labels| labels.get(labels::COMPONENT))
            .map(String::as_str)
            == Some(labels::SERVE)
    };
    pods.iter().filter(serves).collect()
}
