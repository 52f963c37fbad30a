//! Waiting for an object to reach a state: by watching it, with a deadline, and with what was last seen in the error.

use std::fmt::Debug;
use std::future::{self, Future};
use std::pin::pin;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use futures::StreamExt;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Time between two looks of [`poll`].
const LOOK: Duration = Duration::from_millis(200);

/// Waits until the object `name` satisfies `condition` and returns it. `what` completes the sentence "waiting until
/// NAME …".
///
/// # Errors
/// The deadline is over; the message holds the object as last seen, and the last error of the watch.
pub async fn until<K>(
    api: &Api<K>,
    name: &str,
    what: &str,
    deadline: Duration,
    condition: impl Fn(Option<&K>) -> bool,
) -> Result<K>
where
    K: Resource + Clone + Debug + Serialize + DeserializeOwned + Send + 'static,
{
    match watch(api, name, what, deadline, |object| {
        object.is_some() && condition(object)
    })
    .await?
    {
        Some(object) => Ok(object),
        None => bail!("{name} was gone while waiting until it {what}"),
    }
}

/// Waits until there is no object `name`.
///
/// # Errors
/// The deadline is over.
pub async fn until_gone<K>(api: &Api<K>, name: &str, deadline: Duration) -> Result<()>
where
    K: Resource + Clone + Debug + Serialize + DeserializeOwned + Send + 'static,
{
    watch(api, name, "is gone", deadline, |object: Option<&K>| object.is_none())
        .await
        .map(drop)
}

async fn watch<K>(
    api: &Api<K>,
    name: &str,
    what: &str,
    deadline: Duration,
    condition: impl Fn(Option<&K>) -> bool,
) -> Result<Option<K>>
where
    K: Resource + Clone + Debug + Serialize + DeserializeOwned + Send + 'static,
{
    let mut last = None;
    let mut trouble = None;
    let watching = async {
        let mut seen = pin!(watcher::watch_object(api.clone(), name).default_backoff());
        while let Some(event) = seen.next().await {
            match event {
                Ok(object) if condition(object.as_ref()) => return object,
                Ok(object) => last = object,
                // The API server may be away for a moment; the watch tries again by itself.
                Err(error) => trouble = Some(error),
            }
        }
        future::pending().await
    };
    if let Ok(object) = tokio::time::timeout(deadline, watching).await {
        return Ok(object);
    }
    let seen = match last {
        Some(object) => serde_yaml::to_string(&object).unwrap_or_else(|error| error.to_string()),
        None => "there is no such object".to_owned(),
    };
    let trouble = trouble
        .map(|error| format!("\nlast error: {error}"))
        .unwrap_or_default();
    bail!(
        "waited {} s until {name} {what}; last seen:\n{seen}{trouble}",
        deadline.as_secs()
    )
}

/// Looks again and again until `look` finds what it looks for: for what comes without an event to watch.
///
/// # Errors
/// The deadline is over, or `look` failed.
pub async fn poll<T, F>(what: &str, deadline: Duration, mut look: impl FnMut() -> F) -> Result<T>
where
    F: Future<Output = Result<Option<T>>>,
{
    let end = Instant::now() + deadline;
    loop {
        if let Some(found) = look().await? {
            return Ok(found);
        }
        if Instant::now() > end {
            bail!("waited {} s until {what}", deadline.as_secs());
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// The node can take pods.
#[must_use]
pub fn node_is_ready(node: Option<&Node>) -> bool {
    let conditions = node.and_then(|n| n.status.as_ref()).and_then(|s| s.conditions.as_ref());
    conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

/// All replicas of the newest template are available, and no older one is left.
#[must_use]
pub fn deployment_is_available(deployment: Option<&Deployment>) -> bool {
    let Some(deployment) = deployment else { return false };
    let wanted = deployment.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1);
    let Some(status) = &deployment.status else { return false };
    status.observed_generation >= deployment.metadata.generation
        && status.updated_replicas.unwrap_or(0) == wanted
        && status.replicas.unwrap_or(0) == wanted
        && status.available_replicas.unwrap_or(0) == wanted
}

/// All containers of the pod are ready.
#[must_use]
pub fn pod_is_ready(pod: Option<&Pod>) -> bool {
    let conditions = pod.and_then(|p| p.status.as_ref()).and_then(|s| s.conditions.as_ref());
    conditions.is_some_and(|all| all.iter().any(|c| c.type_ == "Ready" && c.status == "True"))
}

/// The pod has ended, well or badly.
#[must_use]
pub fn pod_has_ended(pod: Option<&Pod>) -> bool {
    let phase = pod.and_then(|p| p.status.as_ref()).and_then(|s| s.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// The job has ended, well or badly.
#[must_use]
pub fn job_has_ended(job: Option<&Job>) -> bool {
    let conditions = job.and_then(|j| j.status.as_ref()).and_then(|s| s.conditions.as_ref());
    conditions.is_some_and(|all| {
        all.iter()
            .any(|c| matches!(c.type_.as_str(), "Complete" | "Failed") && c.status == "True")
    })
}
