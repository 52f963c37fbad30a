//! The one loop. It reads as its own table of contents: `CR → gather → check → plan → apply → report → status`.

use std::sync::Arc;
use std::time::Instant;

use k8s_openapi::jiff::Timestamp;
use kube::runtime::controller::Action;
use kube::runtime::events::Recorder;
use kube::{Client, ResourceExt};

use super::apply::{Owner, apply};
use super::gather::{gather, get};
use super::guard::NotLeading;
use super::index::Index;
use super::kind::{Env, Key, Kind, Status};
use super::progress::Poller;
use super::status;
use crate::metrics::Metrics;

/// What every reconcile needs.
pub struct Context {
    /// The guarded client.
    pub client: Client,
    /// The operator's settings.
    pub env: Env,
    /// Who refers to whom.
    pub index: Arc<Index>,
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
    /// An object of ours cannot be made, because another's has its name.
    #[error("the {0} {1} belongs to something else: rename the resource, or delete that object")]
    NameTaken(&'static str, String),
}

impl Error {
    /// The reason, as a metric's label.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NameTaken(..) => "NameTaken",
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
    let result = step::<K>(key, context).await;
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
    let outcome = resource.report(&checked, &observed.with(applied), Timestamp::now());

    let transitions = status::transitions(resource.status().map(Status::run_status), outcome.status.run_status());
    context.metrics.ready(key, status::ready_reason(&outcome.status));
    if status::write(client, &resource, outcome.status).await? {
        context.metrics.status_written(key.kind);
        status::publish(&context.recorder, &resource, &transitions).await;
    }
    Ok(outcome.requeue.map_or_else(Action::await_change, Action::requeue))
}

/// Drops what is kept in memory about a resource that is gone.
pub fn forget(key: &Key, context: &Context) {
    context.index.remove(key);
    context.metrics.forget(key);
}
