//! The one loop. It reads as its own table of contents: `CR → gather → check → plan → apply → report → status`.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::jiff::Timestamp;
use kube::{Client, ResourceExt};
use strata_api::{Reason, RunStatus};

use super::apply::{Owner, apply};
use super::backoff::Failures;
use super::cache::Caches;
use super::events::Recorder;
use super::gather::{Source, gather};
use super::guard::NotLeading;
use super::index::Index;
use super::kind::{Env, Key, Kind, Observed, Planned, Refusal, Status};
use super::nodes::Nodes;
use super::progress::Poller;
use super::provision::{self, Provisioners};
use super::{status, work};
use crate::autoscale::scrape::Scraper;
use crate::metrics::Metrics;

/// Longest time for one reconcile: a server that accepts connections and never answers must not hold a place for ever.
const STEP_TIMEOUT: Duration = Duration::from_secs(60);
/// Pause after which a resource is looked at even if nothing woke it: a lost event costs this long, not for ever.
const RESYNC: Duration = Duration::from_secs(600);

/// How long a cache may lag behind our own last write before the server is read instead.
const PATIENCE: Duration = Duration::from_secs(5);

/// What every reconcile needs.
pub struct Context {
    /// The guarded client.
    pub client: Client,
    /// The operator's settings.
    pub env: Env,
    /// What the watches told.
    pub caches: Caches,
    /// Who refers to whom.
    pub index: Arc<Index>,
    /// Who failed how often.
    pub failures: Failures,
    /// What nodes there are.
    pub fleet: Nodes,
    /// What those say who bring nodes.
    pub provisioners: Provisioners,
    /// Asks pods for their progress.
    pub poller: Poller,
    /// Asks serving pods for their metrics.
    pub scraper: Scraper,
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

/// Brings one resource closer to what its spec wants. Returns when to look again if nothing wakes it.
///
/// # Errors
/// What ended it early.
pub async fn reconcile<K: Kind>(key: &Key, context: &Context) -> Result<Option<Duration>, Error> {
    let started = Instant::now();
    let (result, own_work) = work::measure(Box::pin(step::<K>(key, context)), STEP_TIMEOUT).await;
    let result = result.unwrap_or(Err(Error::Timeout));
    let label = result.as_ref().map_or_else(Error::reason, |_| "ok");
    context.metrics.reconciled(key.kind, label, started.elapsed(), own_work);
    result
}

async fn step<K: Kind>(key: &Key, context: &Context) -> Result<Option<Duration>, Error> {
    let caches = Source::Caches(&context.caches);
    let server = Source::Server(&context.client);
    let source = match context.caches.unseen(key) {
        None => caches,
        // The event that shows it wakes this resource, long before.
        Some(unseen) if unseen < PATIENCE => return Ok(Some(PATIENCE)),
        // A watch that hangs costs requests, not progress.
        Some(_) => server,
    };
    let mut decision = Box::pin(decide::<K>(source, key, context)).await?;
    if let (Source::Caches(_), Some(cached)) = (source, &decision)
        && does_harm_if_old(cached)
    {
        decision = Box::pin(decide::<K>(server, key, context)).await?;
    }
    let Some(Decision {
        resource,
        observed,
        checked,
        planned,
    }) = decision
    else {
        return Ok(None);
    };

    let uid = resource.uid().unwrap_or_default();
    let owner = Owner {
        key,
        uid: &uid,
        caches: &context.caches,
    };
    let applied = apply(&context.client, &owner, planned, &observed).await?;
    let observed = observed.with(applied);
    let outcome = resource.report(&checked, &observed, Timestamp::now());

    let transitions = status::all_transitions(resource.status(), &outcome.status);
    context.metrics.ready(key, status::ready(&outcome.status));
    context.fleet.wait(key, status::waits_for_nodes(&outcome.status));
    if status::write(&context.client, &context.caches, &resource, outcome.status).await? {
        context.metrics.status_written(key.kind);
        status::publish(&context.recorder, &resource, &transitions).await;
    }
    match K::decided(&checked) {
        Some((round, decision)) => {
            context.scraper.remember(key, round, decision);
            context.metrics.scaled(key, decision);
        }
        None => context.metrics.not_scaled(key),
    }
    if let Some((reason, message)) = observed.refused.run.or(observed.refused.serving) {
        return Err(Error::Refused(reason, message));
    }
    let look = provision::next_look(&observed.pods, Timestamp::now());
    let again = [outcome.requeue, look].into_iter().flatten().min();
    Ok(Some(again.unwrap_or_else(|| resync(key))))
}

/// What is to be done about a resource, and on what that stands.
struct Decision<K: Kind> {
    resource: K,
    observed: Observed,
    checked: Result<K::Checked, Refusal>,
    planned: Planned,
}

/// `None`: the resource is gone, or going.
async fn decide<K: Kind>(source: Source<'_>, key: &Key, context: &Context) -> Result<Option<Decision<K>>, Error> {
    let Some(resource) = source.get::<K>(&key.namespace, &key.name).await? else {
        forget(key, context);
        return Ok(None);
    };
    // Before anything else is read: what is published from now on wakes this resource.
    context.index.set(key, &resource.refs());
    if resource.meta().deletion_timestamp.is_some() {
        return Ok(None);
    }
    let mut observed = gather(&context.client, source, key, &resource, &context.poller).await?;
    let provisioners = &context.provisioners;
    provisioners
        .add(&context.client, &key.namespace, &mut observed.pods, Timestamp::now())
        .await;
    observed.scaling = context.scraper.look(key, resource.questions(&observed.pods));
    observed.fleet = context.fleet.now();
    let checked = resource.check(&observed, &context.env);
    let planned = resource.plan(&checked, &observed, Timestamp::now());
    Ok(Some(Decision {
        resource,
        observed,
        checked,
        planned,
    }))
}

/// What must not be decided on a cache: another cache may be ahead of it, so that a Job or a pod that runs seems to be
/// gone. The rest does no harm: a first attempt has a name that exists once, what is applied is the same each time, and a
/// status is written onto the version that was read.
fn does_harm_if_old<K: Kind>(decision: &Decision<K>) -> bool {
    let Decision {
        resource,
        observed,
        checked,
        planned,
    } = decision;
    let none = RunStatus::default();
    let before = resource.status().map_or(&none, Status::run_status);
    let takes_away = !planned.delete.is_empty() || !planned.suspend.is_empty();
    let starts_again = planned.start.is_some() && before.run.is_some();
    // Who else writes their number is in no cache.
    let replicas = |deployment: &Option<Deployment>| deployment.as_ref().and_then(|one| one.spec.as_ref()?.replicas);
    let scales = observed.scaling.is_some()
        && planned.deployment.is_some()
        && replicas(&planned.deployment) != replicas(&observed.deployment);
    if takes_away || starts_again || scales {
        return true;
    }
    // What would be said if the plan were empty.
    let said = resource.report(checked, observed, Timestamp::now()).status;
    let failure = |status: &RunStatus| status.run.as_ref().and_then(|run| run.failure.clone());
    let judged = failure(said.run_status());
    let judges_an_end = judged.is_some() && judged != failure(before);
    let misses_an_input = resource.refs().iter().any(|to| !observed.upstream.contains_key(to));
    judges_an_end || (misses_an_input && resource.status() != Some(&said))
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
    context.fleet.wait(key, false);
    context.metrics.forget(key);
    context.failures.clear(key);
    context.caches.forget(key);
    context.scraper.forget(key);
}
