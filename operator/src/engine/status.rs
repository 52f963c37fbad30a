//! The status: written only if it says something new, and an Event for each transition.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::PostParams;
use kube::core::object::HasStatus;
use kube::{Api, Client, Resource, ResourceExt};
use strata_api::{AttemptOutcome, ConditionType, RunStatus, Verdict};

use super::apply::FIELD_MANAGER;
use super::cache::{Caches, place};
use super::events::Recorder;
use super::kind::{Key, Kind, Status};
use super::reconcile::Error;
use crate::metrics::Ready;
use crate::run::conditions::reason;

/// Writes `status` unless it is what `resource` already has. Says whether it wrote.
///
/// Conditions keep their transition times while their status is the same, so plain equality is the guard. The write
/// carries the resourceVersion that was decided on: a status that changed meanwhile is not overwritten.
///
/// # Errors
/// The server's; a conflict means that the resource changed meanwhile.
pub async fn write<K: Kind>(
    client: &Client,
    caches: &Caches,
    resource: &K,
    status: <K as HasStatus>::Status,
) -> Result<bool, Error> {
    if resource.status() == Some(&status) {
        return Ok(false);
    }
    let mut next = resource.clone();
    *next.status_mut() = Some(status);
    next.managed_fields_mut().clear();
    let (namespace, name) = place(resource);
    let api: Api<K> = Api::namespaced(client.clone(), &namespace);
    let params = PostParams {
        field_manager: Some(FIELD_MANAGER.into()),
        ..PostParams::default()
    };
    let written = api.replace_status(&name, &params, &next).await?;
    let key = Key {
        kind: K::KIND,
        namespace,
        name,
    };
    caches.wrote(&key, &written);
    Ok(true)
}

/// Something that happened to a resource, for its Events.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Transition {
    /// Whether a person should look.
    pub is_warning: bool,
    /// In a word, the same as in the condition.
    pub reason: String,
    /// In a sentence.
    pub note: String,
}

/// What happened between two statuses, scaling included.
pub fn all_transitions<S: Status>(before: Option<&S>, after: &S) -> Vec<Transition> {
    let mut all = transitions(before.map(Status::run_status), after.run_status());
    let event = after.scaling_event();
    if let Some(event) = event.filter(|event| before.and_then(Status::scaling_event) != Some(event)) {
        let reason = if event.to > event.from {
            "ScaledUp"
        } else {
            "ScaledDown"
        };
        all.push(Transition {
            is_warning: false,
            reason: reason.into(),
            note: format!(
                "from {} to {}: {}: {}",
                event.from, event.to, event.reason, event.message
            ),
        });
    }
    all
}

/// What happened between two statuses: another reason of Ready, another failed attempt, another artifact.
pub fn transitions(before: Option<&RunStatus>, after: &RunStatus) -> Vec<Transition> {
    let mut all = Vec::new();
    let failure_of = |status: &RunStatus| {
        status
            .run
            .as_ref()
            .and_then(|run| Some((run.id.clone(), run.failure.clone()?)))
    };
    let failure = failure_of(after).filter(|failure| before.and_then(failure_of).as_ref() != Some(failure));
    if let Some((_, failure)) = failure {
        all.push(Transition {
            is_warning: failure.outcome != AttemptOutcome::Interrupted,
            reason: failure.reason.clone(),
            note: format!("attempt {}: {}", failure.attempt, failure.message),
        });
    }
    if let Some(artifact) = &after.artifact
        && before.and_then(|before| before.artifact.as_ref()) != Some(artifact)
    {
        all.push(Transition {
            is_warning: false,
            reason: "Published".into(),
            note: format!("published {} at {}", artifact.digest, artifact.uri),
        });
    }
    let ready_of = |status: &RunStatus| {
        status
            .conditions
            .iter()
            .find(|condition| condition.type_ == "Ready")
            .cloned()
    };
    let ready_before = before.and_then(ready_of).map(|ready| ready.reason);
    if let Some(ready) = ready_of(after).filter(|ready| Some(&ready.reason) != ready_before.as_ref()) {
        let transition = Transition {
            is_warning: reason(&ready.reason).is_some_and(|reason| reason.verdict() == Verdict::False),
            reason: ready.reason,
            note: ready.message,
        };
        if !all.iter().any(|known| known.reason == transition.reason) {
            all.push(transition);
        }
    }
    all
}

/// Publishes Events. One that is lost is only logged: an Event is news, not state.
pub async fn publish<K: Resource<DynamicType = ()>>(recorder: &Recorder, resource: &K, transitions: &[Transition]) {
    for transition in transitions {
        if let Err(error) = recorder.publish(transition, &resource.object_ref(&())).await {
            tracing::warn!(%error, reason = transition.reason, "an Event was lost");
        }
    }
}

/// Whether other nodes could change what is said.
pub fn waits_for_nodes<S: Status>(status: &S) -> bool {
    let conditions = &status.run_status().conditions;
    conditions
        .iter()
        .any(|condition| condition.type_ == ConditionType::Placed.name() && condition.status != "True")
}

/// What Ready says, for metrics.
pub fn ready<S: Status>(status: &S) -> Ready {
    let conditions = &status.run_status().conditions;
    let ready = conditions.iter().find(|condition| condition.type_ == "Ready");
    let text = |field: fn(&Condition) -> &String| ready.map(field).cloned().unwrap_or_default();
    Ready {
        status: text(|condition| &condition.status),
        reason: text(|condition| &condition.reason),
    }
}
