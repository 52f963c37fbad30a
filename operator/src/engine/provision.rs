//! What those say who bring nodes (cluster autoscaler, Karpenter and so AKS' node auto-provisioning) about pods that find no place.
//!
//! The scheduler says that no node fits. That none will come either, as a quota is used up or a pool is at its largest, they say in
//! Events on the pod, and nowhere else. Events are in no cache: they are asked for about one pod of a resource, ever more seldom.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::{Event, Pod};
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt};

use crate::run::attempt::{unplaced, unplaced_since};

/// Most pods have their place before. No pod is asked about again within that time.
const FIRST_LOOK: SignedDuration = SignedDuration::from_secs(15);
/// Longest pause between two looks.
const LONGEST_PAUSE: SignedDuration = SignedDuration::from_mins(5);
/// Events of one pod that are read.
const LIMIT: u32 = 100;

/// What they say: the Event's reason, and who must have said it, where others give the same reason.
const SAYINGS: [(&str, Option<&str>); 5] = [
    ("NotTriggerScaleUp", None),
    ("TriggeredScaleUp", None),
    ("FailedScaleUp", None),
    ("Nominated", None),
    ("FailedScheduling", Some("karpenter")),
];

/// What was said about pods, by UID, and when that was asked: a service that scales is looked at every few seconds.
#[derive(Debug, Default)]
pub struct Provisioners(Mutex<HashMap<String, (Timestamp, Option<String>)>>);

impl Provisioners {
    /// Puts what was said last about pods without a place before what the scheduler says.
    pub async fn add(&self, client: &Client, namespace: &str, pods: &mut [Pod], now: Timestamp) {
        let waits = |pod: &&Pod| unplaced_since(pod).is_some_and(|since| now.duration_since(since) >= FIRST_LOOK);
        let first = pods.iter().filter(waits).min_by_key(|pod| unplaced_since(pod));
        let Some(uid) = first.and_then(ResourceExt::uid) else {
            return;
        };
        let Some(said) = self.said(client, namespace, uid, now).await else {
            return;
        };
        for condition in pods.iter_mut().filter_map(unplaced) {
            let scheduler = condition.message.take().unwrap_or_default();
            condition.message = Some(format!("{said}; {scheduler}"));
        }
    }

    async fn said(&self, client: &Client, namespace: &str, uid: String, now: Timestamp) -> Option<String> {
        let is_fresh = |asked: Timestamp| now.duration_since(asked) < FIRST_LOOK;
        if let Some((asked, said)) = self.known().get(&uid)
            && is_fresh(*asked)
        {
            return said.clone();
        }
        let about = ListParams::default()
            .fields(&format!("involvedObject.uid={uid}"))
            .limit(LIMIT);
        let said = match Api::<Event>::namespaced(client.clone(), namespace).list(&about).await {
            Ok(events) => words(&events.items),
            // Such as a role without this rule: then the scheduler's words are all there is.
            Err(error) => {
                tracing::debug!(namespace, %error, "the Events of a pod cannot be read");
                None
            }
        };
        let mut known = self.known();
        known.retain(|_, (asked, _)| is_fresh(*asked));
        known.insert(uid, (now, said.clone()));
        said
    }

    fn known(&self) -> MutexGuard<'_, HashMap<String, (Timestamp, Option<String>)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// When to look again: nothing wakes a resource when something is said about its pods. `None`: all have their place.
pub fn next_look(pods: &[Pod], now: Timestamp) -> Option<Duration> {
    let age = now.duration_since(pods.iter().filter_map(unplaced_since).min()?);
    let pause = (FIRST_LOOK - age)
        .max(age / 2)
        .clamp(SignedDuration::from_secs(1), LONGEST_PAUSE);
    Duration::try_from(pause).ok()
}

/// The newest of what they say, with who says it.
fn words(events: &[Event]) -> Option<String> {
    let time = |event: &Event| {
        let series = event
            .series
            .as_ref()
            .and_then(|series| series.last_observed_time.as_ref());
        let times = [series, event.event_time.as_ref()].into_iter().flatten();
        let times = times.map(|time| time.0);
        times.chain(event.last_timestamp.as_ref().map(|time| time.0)).max()
    };
    let reporter = |event: &Event| {
        let source = event.source.as_ref().and_then(|source| source.component.clone());
        source.or_else(|| event.reporting_component.clone()).unwrap_or_default()
    };
    let is_theirs = |event: &&Event| {
        SAYINGS
            .iter()
            .any(|(reason, by)| event.reason.as_deref() == Some(reason) && by.is_none_or(|by| reporter(event) == by))
    };
    let newest = events.iter().filter(is_theirs).max_by_key(|event| time(event))?;
    Some(format!("{}: {}", reporter(newest), newest.message.as_deref()?))
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::fixtures::{NOW, at};

    fn event(reason: &str, by: &str, message: &str, second: i64) -> Event {
        serde_json::from_value(
            json!({"involvedObject": {}, "metadata": {}, "reason": reason, "message": message,
            "source": {"component": by}, "lastTimestamp": at(second).to_string()}),
        )
        .expect("an Event")
    }

    #[test]
    fn the_newest_of_those_who_bring_nodes_is_quoted_and_nobody_else() {
        let scheduler = event("FailedScheduling", "default-scheduler", "0/3 nodes are available", 9);
        let quota = event("FailedScaleUp", "cluster-autoscaler", "quota exceeded", 5);
        let coming = event("TriggeredScaleUp", "cluster-autoscaler", "pool h100 1->2", 3);
        let karpenter = event(
            "FailedScheduling",
            "karpenter",
            "no instance type has nvidia.com/gpu: 16",
            7,
        );
        let said = |events: &[&Event]| words(&events.iter().map(|event| (*event).clone()).collect::<Vec<_>>());
        assert_eq!(said(&[&scheduler]), None);
        assert_eq!(
            said(&[&quota, &coming, &scheduler]).as_deref(),
            Some("cluster-autoscaler: quota exceeded")
        );
        assert_eq!(
            said(&[&karpenter, &quota, &scheduler]).as_deref(),
            Some("karpenter: no instance type has nvidia.com/gpu: 16")
        );
    }

    #[test]
    fn it_is_looked_again_ever_more_seldom_until_there_is_a_place() {
        let pod = |condition: Value| -> Pod {
            serde_json::from_value(json!({"metadata": {}, "status": {"conditions": [condition]}})).expect("a pod")
        };
        let unplaced = pod(
            json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "lastTransitionTime": at(NOW).to_string()}),
        );
        let pauses = [0, 10, 40, 3600].map(|age| next_look(std::slice::from_ref(&unplaced), at(NOW + age)));
        assert_eq!(
            pauses.map(|pause| pause.map(|pause| pause.as_secs())),
            [15, 5, 20, 300].map(Some)
        );
        assert_eq!(
            next_look(&[pod(json!({"type": "PodScheduled", "status": "True"}))], at(NOW)),
            None
        );
    }
}
