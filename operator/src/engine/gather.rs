//! From a resource to what surrounds it. Everything is read from the server at the moment of the decision, nothing
//! from a cache: no decision can be older than our own last write.
//!
//! The watches (see [`super::watch`]) hold metadata only and say *that* something changed. So an object that cannot be
//! parsed is an error of its own reconcile, never the end of a watch.

use std::collections::BTreeMap;
use std::fmt::Debug;

use k8s_openapi::NamespaceResourceScope;
use kube::api::ListParams;
use kube::{Api, Client, Resource, ResourceExt};
use serde::de::DeserializeOwned;
use strata_api::{AlignmentJob, Dataset, InferenceService, PretrainJob};

use super::kind::{Kind, Observed, Ref, Refused, ResourceKind, Upstream};
use super::progress::Poller;
use crate::run::attempt;
use crate::workload::labels;

/// Most resources that are followed from reference to reference.
const MAX_UPSTREAMS: usize = 256;

/// Reads what surrounds `resource`.
///
/// # Errors
/// The server's.
pub async fn gather<K: Kind>(client: &Client, resource: &K, poller: &Poller) -> Result<Observed, kube::Error> {
    let namespace = resource.namespace().unwrap_or_default();
    let name = resource.name_any();
    let uid = resource.uid().unwrap_or_default();
    let selector = format!("{}={},{}={name}", labels::KIND, K::KIND.name(), labels::NAME);
    let ours = ListParams::default().labels(&selector);

    let upstream = upstream(client, &namespace, resource.refs()).await?;
    let mut jobs = Api::namespaced(client.clone(), &namespace).list(&ours).await?.items;
    jobs.retain(|job| is_owned_by(job, &uid));
    let pods = Api::namespaced(client.clone(), &namespace).list(&ours).await?.items;
    let (mut deployment, mut service) = (None, None);
    let (mut budget, mut budgets) = (None, Vec::new());
    if K::SERVES {
        deployment = Api::namespaced(client.clone(), &namespace).get_opt(&name).await?;
        service = Api::namespaced(client.clone(), &namespace).get_opt(&name).await?;
    }
    if deployment.is_some() {
        let all = Api::namespaced(client.clone(), &namespace);
        budget = all.get_opt(&name).await?;
        budgets = all.list(&ListParams::default().labels(&not_ours())).await?.items;
    }
    let running = jobs
        .iter()
        .filter(|job| !attempt::finished(job))
        .filter_map(|job| attempt::pod_of(job, &pods))
        .filter(|pod| attempt::is_running(pod));
    let mut progress = BTreeMap::new();
    for pod in running {
        if let (Some(uid), Some(said)) = (pod.uid(), poller.ask(pod).await) {
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
        refused: Refused::default(),
    })
}

/// Selects the objects that belong to no InferenceService.
fn not_ours() -> String {
    format!("{}!={}", labels::KIND, ResourceKind::InferenceService.name())
}

/// Whether the resource with this UID owns `object`.
pub fn is_owned_by<O: Resource>(object: &O, uid: &str) -> bool {
    let owners = object.meta().owner_references.as_deref().unwrap_or_default();
    owners.iter().any(|owner| owner.uid == uid)
}

/// What `refs` name. What an AlignmentJob refers to in turn is followed, as it may lead back.
async fn upstream(client: &Client, namespace: &str, refs: Vec<Ref>) -> Result<BTreeMap<Ref, Upstream>, kube::Error> {
    let mut found = BTreeMap::new();
    let mut open = refs;
    while let Some(next) = open.pop() {
        if found.contains_key(&next) || found.len() >= MAX_UPSTREAMS {
            continue;
        }
        let Some(upstream) = read(client, namespace, &next).await? else {
            continue;
        };
        let chain = upstream.refs.iter().filter(|to| to.kind == ResourceKind::AlignmentJob);
        open.extend(chain.filter(|to| !found.contains_key(*to)).cloned());
        found.insert(next, upstream);
    }
    Ok(found)
}

async fn read(client: &Client, namespace: &str, to: &Ref) -> Result<Option<Upstream>, kube::Error> {
    match to.kind {
        ResourceKind::Dataset => read_as::<Dataset>(client, namespace, &to.name).await,
        ResourceKind::PretrainJob => read_as::<PretrainJob>(client, namespace, &to.name).await,
        ResourceKind::AlignmentJob => read_as::<AlignmentJob>(client, namespace, &to.name).await,
        ResourceKind::InferenceService => read_as::<InferenceService>(client, namespace, &to.name).await,
    }
}

async fn read_as<K: Kind>(client: &Client, namespace: &str, name: &str) -> Result<Option<Upstream>, kube::Error> {
    let found: Option<K> = get(client, namespace, name).await?;
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
