//! The one loop. It reads as its own table of contents: `CR → gather → check → plan → apply → report → status`.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::jiff::Timestamp;
use kube::runtime::controller::Action;
use kube::runtime::events::Recorder;
use kube::{Client, ResourceExt};
use strata_api::Reason;

use super::apply::{Owner, apply};
use super::backoff::Failures;
use super::gather::{gather, get};
use super::guard::NotLeading;
use super::index::Index;
use super::kind::{Env, Key, Kind, Status};
use super::progress::Poller;
use super::status;
use crate::metrics::Metrics;

/// Longest time for one reconcile: a server that accepts connections and never answers must not hold a place for ever.
const STEP_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause after which a resource is looked at even if nothing woke it: a lost event costs this long, not for ever.
const RESYNC: Duration = Duration::from_secs(600);

/// What every reconcile needs.
pub struct Context {
    /// The guarded client.
    pub client: Client,
    /// The operator's settings.
    pub env: Env,
    /// Who refers to whom.
    pub index: Arc<Index>,
    /// Who failed how often.
    pub failures: Failures,
    /// Asks pods for their progress.
    pub poller: Poller,
    /// Publishes Events.
    pub recorder: Recorder,
    /// What is counted.
    pub metrics: Arc<Metrics>,
}

/// Why a reconcile ended early. It is tried again, after a growing pause.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server's, or the way to it.
    #[error(transparent)]
    Kube(#[from] kube::Error),
    /// The server does not take an object. The resource's status says so too.
    #[error("{1}")]
    Refused(Reason, String),
    /// It took longer than [`STEP_TIMEOUT`].
    #[error("no end after {} seconds", STEP_TIMEOUT.as_secs())]
    Timeout,
}

impl Error {
    /// The reason, as a metric's label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Refused(reason, _) => reason.name(),
            Self::Timeout => "Timeout",
            Self::Kube(kube::Error::Api(status)) if status.code == 409 => "Conflict",
            Self::Kube(kube::Error::Api(status)) if status.code == 403 => "Forbidden",
            Self::Kube(kube::Error::Api(status)) if status.code == 422 => "Refused",
            Self::Kube(kube::Error::Api(_)) => "Api",
            Self::Kube(kube::Error::SerdeError(_)) => "Unparseable",
            Self::Kube(kube::Error::Service(error)) if error.is::<NotLeading>() => "NotLeading",
            Self::Kube(_) => "Connection",
        }
    }
}

/// Brings one resource closer to what its spec wants.
///
/// # Errors
/// What ended it early.
pub async fn reconcile<K: Kind>(key: &Key, context: &Context) -> Result<Action, Error> {
    let started = Instant::now();
    let result = tokio::time::timeout(STEP_TIMEOUT, step::<K>(key, context))
        .await
        .unwrap_or(Err(Error::Timeout));
    let label = result.as_ref().map_or_else(Error::reason, |_| "ok");
    context.metrics.reconciled(key.kind, label, started.elapsed());
    result
}

async fn step<K: Kind>(key: &Key, context: &Context) -> Result<Action, Error> {
    let client = &context.client;
    let Some(resource) = get::<K>(client, &key.namespace, &key.name).await? else {
        forget(key, context);
        return Ok(Action::await_change());
    };
    // Before anything else is read: what is published from now on wakes this resource.
    context.index.set(key, &resource.refs());
    if resource.meta().deletion_timestamp.is_some() {
        return Ok(Action::await_change());
    }

    let observed = gather(client, &resource, &context.poller).await?;
    let checked = resource.check(&observed, &context.env);
    let planned = resource.plan(&checked, &observed, Timestamp::now());
    let uid = resource.uid().unwrap_or_default();
    let owner = Owner {
        namespace: &key.namespace,
        uid: &uid,
    };
    let applied = apply(client, &owner, planned, &observed).await?;
    let observed = observed.with(applied);
    let outcome = resource.report(&checked, &observed, Timestamp::now());

    let transitions = status::transitions(resource.status().map(Status::run_status), outcome.status.run_status());
    context.metrics.ready(key, status::ready(&outcome.status));
    if status::write(client, &resource, outcome.status).await? {
        context.metrics.status_written(key.kind);
        status::publish(&context.recorder, &resource, &transitions).await;
    }
    if let Some((reason, message)) = observed.refused.run.or(observed.refused.serving) {
        return Err(Error::Refused(reason, message));
    }
    Ok(Action::requeue(outcome.requeue.unwrap_or_else(|| resync(key))))
}

/// [`RESYNC`] and up to a fifth more, by the key, so that not all come at once.
fn resync(key: &Key) -> Duration {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    RESYNC + RESYNC / 5 * u32::from(hasher.finish() as u8) / u32::from(u8::MAX)
}

/// Drops what is kept in memory about a resource that is gone.
pub fn forget(key: &Key, context: &Context) {
    context.index.remove(key);
    context.metrics.forget(key);
    context.failures.clear(key);
}
