//! What wakes a reconcile. The watches hold metadata only, stripped, and tell which resource to look at:
//!
//! ```text
//! the four kinds ──▶ the resource itself, and those that refer to it (index)
//! Jobs, Pods, Deployments, Services, PodDisruptionBudgets with label strata.dev/kind ──▶ the resource of their labels
//! ```

use std::collections::HashMap;
use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;

use futures::{Stream, StreamExt};
use k8s_openapi::NamespaceResourceScope;
use kube::core::PartialObjectMeta;
use kube::runtime::WatchStreamExt;
use kube::runtime::controller::{self, Action, applier};
use kube::runtime::reflector::{self, ObjectRef, Store};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Resource, ResourceExt};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use super::index::Index;
use super::kind::{Key, Kind, ResourceKind};
use super::reconcile::{Context, Error, forget, reconcile};
use crate::workload::labels;

/// A watch is renewed before load balancers cut it (AKS after 240 s without traffic).
const WATCH_TIMEOUT_SECONDS: u32 = 200;
/// Reconciles of one kind at a time.
const CONCURRENCY: u16 = 4;
/// Wake-ups that wait to be looked at, per kind; more make the watches wait.
const QUEUE: usize = 1024;

/// Where wake-ups go, by kind.
#[derive(Clone, Debug)]
pub struct Wake(Arc<HashMap<ResourceKind, Sender<Key>>>);

/// The ends of [`Wake`].
pub type Queues = HashMap<ResourceKind, Receiver<Key>>;

impl Wake {
    /// A queue for each kind.
    pub fn new() -> (Self, Queues) {
        let (mut senders, mut receivers) = (HashMap::new(), HashMap::new());
        for kind in ResourceKind::ALL {
            let (sender, receiver) = channel(QUEUE);
            senders.insert(kind, sender);
            receivers.insert(kind, receiver);
        }
        (Self(Arc::new(senders)), receivers)
    }

    /// Has the resource looked at.
    pub async fn wake(&self, key: Key) {
        if let Some(sender) = self.0.get(&key.kind) {
            // A closed queue is a kind that has stopped: nothing is to be woken.
            let _ = sender.send(key).await;
        }
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
    fn api<K>(&self) -> Api<PartialObjectMeta<K>>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    {
        match &self.namespace {
            Some(namespace) => Api::namespaced(self.client.clone(), namespace),
            None => Api::all(self.client.clone()),
        }
    }

    fn events<K>(
        &self,
        selector: Option<&str>,
    ) -> impl Stream<Item = watcher::Result<Event<PartialObjectMeta<K>>>> + use<K>
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Send + Sync + 'static,
    {
        let mut config = watcher::Config::default().timeout(WATCH_TIMEOUT_SECONDS);
        if let Some(selector) = selector {
            config = config.labels(selector);
        }
        watcher(self.api::<K>(), config).default_backoff().modify(|object| {
            object.managed_fields_mut().clear();
            object.annotations_mut().clear();
        })
    }

    /// Watches one of the four kinds for ever. Fills the store that says which resources there are, and says `filled` when
    /// it has been.
    pub async fn resources<K: Kind>(
        self,
        writer: reflector::store::Writer<PartialObjectMeta<K>>,
        context: Arc<Context>,
        filled: oneshot::Sender<()>,
    ) {
        let store = writer.as_reader();
        let mut filled = Some(filled);
        let mut events = pin!(reflector::reflector(writer, self.events::<K>(None)));
        while let Some(event) = events.next().await {
            let (object, is_deleted) = match event {
                Ok(Event::Apply(object)) => (object, false),
                Ok(Event::Delete(object)) => (object, true),
                // Until the list is whole, the store shows what was before.
                Ok(Event::Init | Event::InitApply(_)) => continue,
                Ok(Event::InitDone) => {
                    if let Some(filled) = filled.take() {
                        // Nobody may be waiting any more.
                        let _ = filled.send(());
                    }
                    self.listed(&store, &context).await;
                    continue;
                }
                Err(error) => {
                    tracing::warn!(kind = K::KIND.name(), %error, "a watch broke; it starts again");
                    continue;
                }
            };
            let key = key(K::KIND, &object);
            if is_deleted {
                forget(&key, &context);
            } else {
                self.wake.wake(key.clone()).await;
            }
            for dependent in self.index.dependents(&key) {
                self.wake.wake(dependent).await;
            }
        }
    }

    /// After a list nobody knows what happened before it: what is gone is forgotten, everything else is looked at, and
    /// so are those that refer to this kind.
    async fn listed<K: Kind>(&self, store: &Store<PartialObjectMeta<K>>, context: &Context) {
        forget_missing(K::KIND, store, context);
        for object in store.state() {
            self.wake.wake(key(K::KIND, &*object)).await;
        }
        for dependent in self.index.dependents_of_kind(K::KIND) {
            self.wake.wake(dependent).await;
        }
    }

    /// Watches objects that belong to the four kinds, for ever.
    pub async fn children<K>(self)
    where
        K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Send + Sync + 'static,
    {
        let mut events = pin!(self.events::<K>(Some(labels::KIND)));
        while let Some(event) = events.next().await {
            match event {
                Ok(Event::Apply(object) | Event::Delete(object)) => {
                    if let Some(key) = owner_key(&object) {
                        self.wake.wake(key).await;
                    }
                }
                Ok(Event::Init | Event::InitApply(_)) => {}
                // What vanished while nobody watched is in no list: everybody looks at theirs.
                Ok(Event::InitDone) => {
                    for key in self.index.all() {
                        self.wake.wake(key).await;
                    }
                }
                Err(error) => tracing::warn!(kind = %K::kind(&()), %error, "a watch broke; it starts again"),
            }
        }
    }
}

fn key<O: Resource>(kind: ResourceKind, object: &O) -> Key {
    Key {
        kind,
        namespace: object.namespace().unwrap_or_default(),
        name: object.name_any(),
    }
}

/// The resource that an object's labels name.
fn owner_key<O: Resource>(object: &O) -> Option<Key> {
    let labels = object.labels();
    Some(Key {
        kind: ResourceKind::from_name(labels.get(labels::KIND)?)?,
        namespace: object.namespace()?,
        name: labels.get(labels::NAME)?.clone(),
    })
}

/// After a list: what is not in it was deleted while nobody watched.
fn forget_missing<K: Kind>(kind: ResourceKind, store: &Store<PartialObjectMeta<K>>, context: &Context) {
    let is_there =
        |key: &Key| key.kind != kind || store.get(&ObjectRef::new(&key.name).within(&key.namespace)).is_some();
    context.index.retain(is_there);
    context.metrics.retain(is_there);
    context.failures.retain(is_there);
}

/// Reconciles one kind until `stop`; then finishes what is under way.
pub async fn run<K: Kind>(
    context: Arc<Context>,
    queue: Receiver<Key>,
    store: Store<PartialObjectMeta<K>>,
    mut stop: watch::Receiver<bool>,
) {
    let stopped = async move {
        // An error means that the sender is gone, which is a stop too.
        let _ = stop.wait_for(|stop| *stop).await;
    };
    let requests = futures::stream::unfold(queue, |mut queue| async move { Some((queue.recv().await?, queue)) })
        .map(|key| Ok::<_, std::convert::Infallible>(ObjectRef::new(&key.name).within(&key.namespace)))
        .take_until(Box::pin(stopped));
    let reconciler = move |object: Arc<PartialObjectMeta<K>>, context: Arc<Context>| {
        Box::pin(async move {
            let key = key(K::KIND, &*object);
            let action = reconcile::<K>(&key, &context).await?;
            context.failures.clear(&key);
            Ok::<Action, Error>(action)
        })
    };
    let on_error = move |object: Arc<PartialObjectMeta<K>>, error: &Error, context: Arc<Context>| {
        let key = key(K::KIND, &*object);
        let pause = context.failures.pause(&key);
        match error.reason() {
            // Somebody else wrote in between, or the collector is at work: not worth a line.
            "Conflict" | "Pending" => {
                tracing::debug!(kind = K::KIND.name(), namespace = key.namespace, name = key.name, %error, "again")
            }
            reason => tracing::warn!(
                kind = K::KIND.name(), namespace = key.namespace, name = key.name, reason, %error,
                pause_seconds = pause.as_secs_f64(), "a reconcile failed; it is tried again"
            ),
        }
        Action::requeue(pause)
    };
    let config = controller::Config::default().concurrency(CONCURRENCY);
    let results = applier(reconciler, on_error, context, store, Box::pin(requests), config);
    results.for_each(|_| std::future::ready(())).await;
}

/// Starts everything: watches and loops of the four kinds. Ready says when all stores are filled.
pub fn start(context: &Arc<Context>, watches: &Watches, mut queues: Queues, stop: &watch::Receiver<bool>) -> Started {
    let mut started = Started {
        watches: JoinSet::new(),
        loops: JoinSet::new(),
        filled: JoinSet::new(),
    };
    start_kind::<strata_api::Dataset>(&mut started, context, watches, &mut queues, stop);
    start_kind::<strata_api::PretrainJob>(&mut started, context, watches, &mut queues, stop);
    start_kind::<strata_api::AlignmentJob>(&mut started, context, watches, &mut queues, stop);
    start_kind::<strata_api::InferenceService>(&mut started, context, watches, &mut queues, stop);
    started
        .watches
        .spawn(watches.clone().children::<k8s_openapi::api::batch::v1::Job>());
    started
        .watches
        .spawn(watches.clone().children::<k8s_openapi::api::core::v1::Pod>());
    started
        .watches
        .spawn(watches.clone().children::<k8s_openapi::api::apps::v1::Deployment>());
    started
        .watches
        .spawn(watches.clone().children::<k8s_openapi::api::core::v1::Service>());
    started.watches.spawn(
        watches
            .clone()
            .children::<k8s_openapi::api::policy::v1::PodDisruptionBudget>(),
    );
    started
}

/// The tasks of a running operator.
pub struct Started {
    /// The watches; they never end by themselves.
    pub watches: JoinSet<()>,
    /// The loops; they end after a stop.
    pub loops: JoinSet<()>,
    /// Each ends when its kind's store is filled.
    pub filled: JoinSet<()>,
}

fn start_kind<K: Kind>(
    started: &mut Started,
    context: &Arc<Context>,
    watches: &Watches,
    queues: &mut Queues,
    stop: &watch::Receiver<bool>,
) {
    let Some(queue) = queues.remove(&K::KIND) else { return };
    let (store, writer) = reflector::store::<PartialObjectMeta<K>>();
    // The loop waits for the store by itself, and a store wakes only one who waits for it: hence a signal of our own.
    let (filled, is_filled) = oneshot::channel();
    started
        .watches
        .spawn(watches.clone().resources::<K>(writer, context.clone(), filled));
    started
        .loops
        .spawn(run::<K>(context.clone(), queue, store, stop.clone()));
    started.filled.spawn(async move {
        // It fails only if the watch is gone, and then the operator is stopping.
        let _ = is_filled.await;
    });
}
