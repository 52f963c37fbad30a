//! From a resource to what surrounds it, by the caches or by the server.
//!
//! Most decisions find that nothing is to be done, and cost no request: they read the caches. What would do harm on an
//! old cache is read from the server at the moment of the decision; [`super::reconcile`] says which that is.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use strata_api::{AlignmentJob, Dataset, InferenceService, PretrainJob};

use super::cache::{Cached, Caches};
use super::kind::{Key, Kind, Observed, Ref, Refused, ResourceKind, Upstream};
use super::progress::Poller;
use super::{jobsets, kueue};
use crate::run::attempt;
use crate::workload::labels;

/// Most resources that are followed from reference to reference.
const MAX_UPSTREAMS: usize = 256;

/// Where objects are read.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// What the watches told last.
    Caches(&'a Caches),
    /// What is now.
    Server(&'a Client),
}

impl Source<'_> {
    /// The object with this name.
    ///
    /// # Errors
    /// The server's, or that the object does not parse.
    pub async fn get<O>(self, namespace: &str, name: &str) -> Result<Option<O>, kube::Error>
    where
        O: Cached + Resource<Scope = NamespaceResourceScope> + Clone + Debug,
    {
        match self {
            Self::Caches(caches) => caches.get(namespace, name),
            Self::Server(client) => get(client, namespace, name).await,
        }
    }

    /// The objects whose labels name `key`.
    ///
    /// # Errors
    /// The server's, or that one does not parse.
    pub async fn owned<O>(self, key: &Key) -> Result<Vec<O>, kube::Error>
    where
        O: Cached + Resource<Scope = NamespaceResourceScope> + Clone + Debug,
    {
        match self {
            Self::Caches(caches) => caches.owned(key),
            Self::Server(client) => {
                let ours = ListParams::default().labels(&labels::selector(key.kind, &key.name));
                let api: Api<O> = Api::namespaced(client.clone(), &key.namespace);
                Ok(api.list(&ours).await?.items)
            }
        }
    }

    /// The objects of a namespace that belong to none of the four kinds.
    ///
    /// # Errors
    /// The server's, or that one does not parse.
    async fn others<O>(self, namespace: &str) -> Result<Vec<O>, kube::Error>
    where
        O: Cached + Resource<Scope = NamespaceResourceScope> + Clone + Debug,
    {
        match self {
            Self::Caches(caches) => caches.others(namespace),
            Self::Server(client) => {
                let selector = format!("{}!={}", labels::KIND, ResourceKind::InferenceService.name());
                let others = ListParams::default().labels(&selector);
                let api: Api<O> = Api::namespaced(client.clone(), namespace);
                Ok(api.list(&others).await?.items)
            }
        }
    }
}

/// Reads what surrounds `resource`, whose key is `key`.
///
/// # Errors
/// The server's, or that an object does not parse.
pub async fn gather<K: Kind>(
    client: &Client,
    source: Source<'_>,
    key: &Key,
    resource: &K,
    poller: &Poller,
) -> Result<Observed, kube::Error> {
    let (namespace, name) = (&key.namespace, &key.name);
    let uid = resource.uid().unwrap_or_default();
    let upstream = upstream(source, namespace, resource.refs()).await?;
    // Jobs before pods: a Job that has ended is then never seen with a pod of before.
    let mut jobs: Vec<Job> = source.owned(key).await?;
    let mut pods: Vec<Pod> = source.owned(key).await?;
    let mut gangs = None;
    if resource.nodes() > 1 || jobsets::has_members(&jobs) {
        gangs = jobsets::gather(client, key, &uid, &jobs, &mut pods).await?;
    }
    let has_jobset = gangs.is_some();
    jobs.retain(|job| is_owned_by(job, &uid));
    jobs.extend(gangs.unwrap_or_default());
    let queue = kueue::gather(client, namespace, &jobs).await?;
    let (mut deployment, mut service) = (None, None);
    let (mut budget, mut budgets) = (None, Vec::new());
    if K::SERVES {
        deployment = source.get(namespace, name).await?;
        service = source.get(namespace, name).await?;
    }
    if deployment.is_some() {
        budget = source.get(namespace, name).await?;
        budgets = source.others(namespace).await?;
    }
    let running = jobs
        .iter()
        .filter(|job| !attempt::finished(job))
        .filter_map(|job| attempt::pod_of(job, &pods))
        .filter(|pod| attempt::is_running(pod));
    let mut progress = BTreeMap::new();
    for pod in running {
        if let (Some(uid), Some(said)) = (pod.uid(), poller.ask(pod, key)) {
            progress.insert(uid, said);
        }
    }
    Ok(Observed {
        upstream,
        jobs,
        pods,
        deployment,
        service,
        budget,
        budgets,
        progress,
        scaling: None,
        queue,
        has_jobset,
        refused: Refused::default(),
        fleet: Arc::default(),
    })
}

/// Whether the resource with this UID owns `object`.
pub fn is_owned_by<O: Resource>(object: &O, uid: &str) -> bool {
    let owners = object.meta().owner_references.as_deref().unwrap_or_default();
    owners.iter().any(|owner| owner.uid == uid)
}

/// What `refs` name. What an AlignmentJob refers to in turn is followed, as it may lead back.
async fn upstream(source: Source<'_>, namespace: &str, refs: Vec<Ref>) -> Result<BTreeMap<Ref, Upstream>, kube::Error> {
    let mut found = BTreeMap::new();
    let mut open = refs;
    while let Some(next) = open.pop() {
        if found.contains_key(&next) || found.len() >= MAX_UPSTREAMS {
            continue;
        }
        let Some(upstream) = read(source, namespace, &next).await? else {
            continue;
        };
        let chain = upstream.refs.iter().filter(|to| to.kind == ResourceKind::AlignmentJob);
        open.extend(chain.filter(|to| !found.contains_key(*to)).cloned());
        found.insert(next, upstream);
    }
    Ok(found)
}

async fn read(source: Source<'_>, namespace: &str, to: &Ref) -> Result<Option<Upstream>, kube::Error> {
    match to.kind {
        ResourceKind::Dataset => read_as::<Dataset>(source, namespace, &to.name).await,
        ResourceKind::PretrainJob => read_as::<PretrainJob>(source, namespace, &to.name).await,
        ResourceKind::AlignmentJob => read_as::<AlignmentJob>(source, namespace, &to.name).await,
        ResourceKind::InferenceService => read_as::<InferenceService>(source, namespace, &to.name).await,
    }
}

async fn read_as<K: Kind>(source: Source<'_>, namespace: &str, name: &str) -> Result<Option<Upstream>, kube::Error> {
    let found: Option<K> = source.get(namespace, name).await?;
    Ok(found.map(|resource| resource.upstream()))
}

/// The object with this name, as it is on the server now.
///
/// # Errors
/// The server's, or that the object does not parse.
pub async fn get<O>(client: &Client, namespace: &str, name: &str) -> Result<Option<O>, kube::Error>
where
    O: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
{
    Api::<O>::namespaced(client.clone(), namespace).get_opt(name).await
}
