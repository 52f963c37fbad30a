//! What fills the caches and wakes reconciles:
//!
//! ```text
//! the four kinds ──▶ the resource itself, and those that refer to it (index)
//! Jobs, Pods, Deployments, Services, PodDisruptionBudgets with label strata.dev/kind ──▶ the resource of their labels
//! Nodes, ResourceSlices ──▶ whoever waits for nodes ([`super::nodes`])
//! ```
//!
//! A list is read from the server in pages and consistently, never "any version": a write that was answered before the
//! list began is in it. (kube's streaming lists begin at version 0, which may be older than our own last write.)

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::NamespaceResourceScope;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::cache::store::subject;
use super::cache::{Cached, Object};
use super::index::Index;
use super::kind::{Key, Kind, ResourceKind};
use super::queue::Queue;
use super::reconcile::{Context, Error, forget, reconcile};
use crate::metrics::Metrics;
use crate::workload::labels;

/// A watch is renewed before load balancers cut it (AKS after 240 s without traffic).
pub(super) const WATCH_TIMEOUT_SECONDS: u32 = 200;
/// Objects in a page of a list: with all types at once, what is read at a time stays within some MiB.
const PAGE_SIZE: u32 = 100;
/// Reconciles of one kind at a time. They wait for the server most of the time.
const CONCURRENCY: usize = 16;

/// Where wake-ups go, by kind.
#[derive(Clone, Debug, Default)]
pub struct Wake(Arc<[Queue; ResourceKind::ALL.len()]>);

impl Wake {
    /// `key` is to be looked at.
    pub fn wake(&self, key: Key) {
        self.queue(key.kind).wake(key);
    }

    /// Counts what waits, for whoever asks for the metrics.
    pub fn count(&self, metrics: &Metrics) {
        for kind in ResourceKind::ALL {
            metrics.queued(kind, self.queue(kind).busy());
        }
    }

    /// The queue of a kind.
    pub fn queue(&self, kind: ResourceKind) -> &Queue {
        &self.0[kind as usize]
    }
}

/// What the watches share.
#[derive(Clone)]
pub struct Watches {
    /// To the server.
    pub client: Client,
    /// The one namespace to watch; absent: all.
    pub namespace: Option<String>,
    /// Where wake-ups go.
    pub wake: Wake,
    /// Who refers to whom.
    pub index: Arc<Index>,
}

impl Watches {
    fn api<K>(&self) -> Api<Object<K>>
    where
        K: Cached + Resource<Scope = NamespaceResourceScope>,
    {
        match &self.namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        }
    }

    /// Watches a type for ever, and keeps its store. Each object that tells something new is handed to `told`; with
    /// `true` if it is gone.
    async fn follow<K>(&self, selector: Option<&str>, context: &Context, told: impl Fn(&Key, bool))
    where
        K: Cached + Resource<Scope = NamespaceResourceScope>,
    {
        let mut config = watcher::Config::default()
            .timeout(WATCH_TIMEOUT_SECONDS)
            .page_size(PAGE_SIZE);
        if let Some(selector) = selector {
            config = config.labels(selector);
        }
        let store = context.caches.store::<K>();
        let mut events = pin!(watcher(self.api::<K>(), config).default_backoff());
        let mut listed = Vec::new();
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Apply(object)) => {
                    store.apply(&object);
                    tell(&object, false, &told);
                }
                Ok(Event::Delete(object)) => {
                    store.delete(&object);
                    tell(&object, true, &told);
                }
                Ok(Event::Init) => {
                    listed.clear();
                    store.begin_list();
                }
                Ok(Event::InitApply(object)) => {
                    if store.list(&object) {
                        listed.extend(subject(&object));
                    }
                }
                // Woken only now: until the list is whole, nobody knows what is gone.
                Ok(Event::InitDone) => {
                    let gone = store.end_list();
                    context.caches.listed();
                    listed.drain(..).for_each(|key| told(&key, false));
                    gone.iter().for_each(|key| told(key, true));
                }
                Err(error) => tracing::warn!(kind = %K::kind(&()), %error, "a watch broke; it starts again"),
            }
        }
    }

    /// Watches one of the four kinds, for ever.
    pub async fn resources<K: Kind>(self, context: Arc<Context>) {
        let told = |key: &Key, is_gone: bool| {
            match is_gone {
                true => forget(key, &context),
                false => self.wake.wake(key.clone()),
            }
            for dependent in self.index.dependents(key) {
                self.wake.wake(dependent);
            }
        };
        self.follow::<K>(None, &context, told).await;
    }

    /// Watches objects that belong to the four kinds, for ever.
    pub async fn children<K>(self, context: Arc<Context>)
    where
        K: Cached + Resource<Scope = NamespaceResourceScope>,
    {
        let told = |key: &Key, _| self.wake.wake(key.clone());
        let selector = Some(labels::KIND).filter(|_| !K::OTHERS);
        self.follow::<K>(selector, &context, told).await;
    }
}

fn tell<K: Cached>(object: &Object<K>, is_gone: bool, told: &impl Fn(&Key, bool)) {
    if let Some(key) = subject(object) {
        told(&key, is_gone);
    }
}

/// Reconciles one kind until `stop`; then finishes what is under way.
async fn run<K: Kind>(context: Arc<Context>, wake: Wake, mut stop: watch::Receiver<bool>) {
    let queue = wake.queue(K::KIND);
    let stopped = async {
        // An error means that the sender is gone, which is a stop too.
        let _ = stop.wait_for(|stop| *stop).await;
    };
    let mut stopped = pin!(stopped);
    tokio::select! {
        () = &mut stopped => return,
        () = async {
            context.caches.filled().await;
            context.fleet.filled().await;
        } => {}
    }
    loop {
        let key = tokio::select! {
            biased;
            () = &mut stopped => return,
            key = queue.next() => key,
        };
        let pause = match reconcile::<K>(&key, &context).await {
            Ok(pause) => {
                context.failures.clear(&key);
                pause
            }
            Err(error) => Some(failed(&key, &error, &context)),
        };
        queue.done(key, pause);
    }
}

/// Says what went wrong, and how long to wait before the next try.
fn failed(key: &Key, error: &Error, context: &Context) -> Duration {
    let pause = context.failures.pause(key);
    let (kind, namespace, name) = (key.kind.name(), &key.namespace, &key.name);
    match error.reason() {
        // Somebody else wrote in between, or the collector is at work: not worth a line.
        "Conflict" | "Pending" => tracing::debug!(kind, namespace, name, %error, "again"),
        reason => tracing::warn!(
            kind, namespace, name, reason, %error, pause_seconds = pause.as_secs_f64(),
            "a reconcile failed; it is tried again"
        ),
    }
    pause
}

/// The tasks of a running operator.
pub struct Started {
    /// The watches; they never end by themselves.
    pub watches: JoinSet<()>,
    /// The loops; they end after a stop.
    pub loops: JoinSet<()>,
}

/// Starts everything: watches and loops of the four kinds.
pub fn start(context: &Arc<Context>, watches: &Watches, stop: &watch::Receiver<bool>) -> Started {
    use k8s_openapi::api::{apps::v1 as apps, batch::v1 as batch, core::v1 as core, policy::v1 as policy};
    let mut started = Started {
        watches: JoinSet::new(),
        loops: JoinSet::new(),
    };
    started.kind::<strata_api::Dataset>(context, watches, stop);
    started.kind::<strata_api::PretrainJob>(context, watches, stop);
    started.kind::<strata_api::AlignmentJob>(context, watches, stop);
    started.kind::<strata_api::InferenceService>(context, watches, stop);
    started.children::<batch::Job>(context, watches);
    started.children::<core::Pod>(context, watches);
    started.children::<apps::Deployment>(context, watches);
    started.children::<core::Service>(context, watches);
    started.children::<policy::PodDisruptionBudget>(context, watches);
    let fleet = || (context.fleet.clone(), watches.client.clone(), watches.wake.clone());
    // Nodes and their devices belong to the cluster: an operator of one namespace may not read them.
    let may_read = watches.namespace.is_none();
    let (nodes, client, wake) = fleet();
    match may_read {
        true => drop(started.watches.spawn(nodes.watch(client, wake))),
        false => nodes.unknown(),
    }
    let (nodes, client, wake) = fleet();
    started.watches.spawn(nodes.watch_devices(client, wake, may_read));
    started
}

impl Started {
    fn kind<K: Kind>(&mut self, context: &Arc<Context>, watches: &Watches, stop: &watch::Receiver<bool>) {
        self.watches.spawn(watches.clone().resources::<K>(context.clone()));
        for _ in 0..CONCURRENCY {
            let run = run::<K>(context.clone(), watches.wake.clone(), stop.clone());
            self.loops.spawn(run);
        }
    }

    fn children<K>(&mut self, context: &Arc<Context>, watches: &Watches)
    where
        K: Cached + Resource<Scope = NamespaceResourceScope>,
    {
        self.watches.spawn(watches.clone().children::<K>(context.clone()));
    }
}
