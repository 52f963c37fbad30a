//! How the pods of a new version come in the place of those before.
//!
//! One more than are wanted comes first, so that none is missed. Where there is no room for it, as all accelerators are taken, that
//! would never end: after a while a pod of before makes place. But only where the new one fits into its place for certain: else a
//! version that fits nowhere would take away what serves.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};
use k8s_openapi::jiff::{SignedDuration, Timestamp};

use super::phase::{is_seen, rolled_out};
use crate::placement::schedule::{avoided, chosen};
use crate::run::attempt::unplaced_since;
use crate::workload::deployment::Rollout;
use crate::workload::quantity;

/// Label of Kubernetes on a pod: its version.
const VERSION: &str = "pod-template-hash";

/// How they come now. Once a pod has made place it goes on like this to the end, and no pod waits that long again.
pub fn rollout(deployment: &Deployment, pods: &[&Pod], patience: SignedDuration, now: Timestamp) -> Rollout {
    let goes_on = Rollout::of(deployment) == Rollout::Replace && !rolled_out(deployment);
    let is_due = makes_place_at(deployment, pods, patience).is_some_and(|at| at <= now);
    match goes_on || is_due {
        true => Rollout::Replace,
        false => Rollout::Surge,
    }
}

/// When the first pod of before is to make place: `patience` after a new one found none. `None`: none waits, or none would fit into
/// the place of one before, or they do make place.
pub fn makes_place_at(deployment: &Deployment, pods: &[&Pod], patience: SignedDuration) -> Option<Timestamp> {
    if !is_seen(deployment) || rolled_out(deployment) || Rollout::of(deployment) == Rollout::Replace {
        return None;
    }
    let there = || pods.iter().filter(|pod| pod.metadata.deletion_timestamp.is_none());
    let (since, waits) = there()
        .filter_map(|pod| Some((unplaced_since(pod)?, pod)))
        .min_by_key(|(since, _)| *since)?;
    let mut before = there()
        .filter(|pod| node(pod).is_some() && version(pod) != version(waits))
        .peekable();
    before.peek()?;
    // Which of them goes is the Deployment controller's to say.
    let fits = before.all(|pod| fits_in_place_of(waits, pod));
    fits.then(|| since.checked_add(patience).ok())?
}

fn version(pod: &Pod) -> Option<&String> {
    pod.metadata.labels.as_ref()?.get(VERSION)
}

fn node(pod: &Pod) -> Option<&String> {
    pod.spec.as_ref()?.node_name.as_ref()
}

/// Whether `new`, which found no place, has one when `old` is gone: what the scheduler says is missing `old` has as much of, and
/// nothing else keeps it from that node.
fn fits_in_place_of(new: &Pod, old: &Pod) -> bool {
    let (Some(wants), Some(has), Some(node)) = (&new.spec, &old.spec, node(old)) else {
        return false;
    };
    let selects = wants.node_selector.clone().unwrap_or_default();
    let selected = has.node_selector.clone().unwrap_or_default();
    let tolerates = wants.tolerations.as_deref().unwrap_or_default();
    let tolerated = has.tolerations.as_deref().unwrap_or_default();
    let may_go_there = selects.iter().all(|(key, value)| selected.get(key) == Some(value))
        && chosen(wants.affinity.as_ref()) == chosen(has.affinity.as_ref())
        && !avoided(wants.affinity.as_ref()).contains(node)
        && tolerated.iter().all(|toleration| tolerates.contains(toleration));
    // A claim's name tells what it asks for.
    let claims = wants.resource_claims.as_deref().unwrap_or_default();
    let claims_the_same = claims == has.resource_claims.as_deref().unwrap_or_default();
    let missing = missing(new);
    let leaves_enough = missing
        .iter()
        .all(|name| requested(wants, name) <= requested(has, name));
    may_go_there && claims_the_same && leaves_enough && !(missing.is_empty() && claims.is_empty())
}

/// The resources that the scheduler names: `0/5 nodes are available: 4 Insufficient nvidia.com/gpu.` What stands before that is
/// said by others about nodes that are not there ([`crate::engine::provision`]).
fn missing(pod: &Pod) -> Vec<String> {
    let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_deref());
    let messages = conditions
        .unwrap_or_default()
        .iter()
        .filter_map(|condition| condition.message.as_deref());
    let words = messages.filter_map(|message| Some(message.split_once("nodes are available:")?.1));
    let words = words.flat_map(|words| words.split("Insufficient ").skip(1));
    let names = words.filter_map(|rest| rest.split([',', ' ']).next());
    names.map(|name| name.trim_end_matches(['.', ';']).to_owned()).collect()
}

/// How much of a resource a pod's containers ask for: those that run together in all, and each that runs before them.
fn requested(pod: &PodSpec, resource: &str) -> f64 {
    let of = |container: &Container| {
        let requests = container
            .resources
            .as_ref()
            .and_then(|resources| resources.requests.as_ref());
        let quantity = requests.and_then(|requests| requests.get(resource));
        quantity
            .and_then(|quantity| quantity::parse(&quantity.0))
            .unwrap_or(0.0)
    };
    let together: f64 = pod.containers.iter().map(of).sum();
    let before = pod.init_containers.iter().flatten().map(of);
    before.fold(together, f64::max)
}
