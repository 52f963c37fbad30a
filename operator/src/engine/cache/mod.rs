//! What the watches have told, for decisions that cost no request.
//!
//! ```text
//! watch ──▶ Object (compact JSON) ──▶ Store, by type (Packed) ──▶ gather ──▶ decision
//!                                        ▲
//! our own writes ──▶ Wrote ── seen? ─────┘
//! ```
//!
//! Two rules make what is cached safe to decide on. Nothing is decided for a resource as long as a cache has not shown our
//! own last write for it ([`Caches::unseen`]). And what would do harm if a cache were old (a further attempt, a deletion,
//! the end of an attempt, that an input does not exist) is decided anew on what the server says: see
//! [`super::reconcile`].

pub mod object;
pub mod packed;
pub mod store;
pub mod wrote;

use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::{Resource, ResourceExt};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use strata_api::{AlignmentJob, Dataset, InferenceService, PretrainJob};
use tokio::sync::watch;

use super::kind::{Key, ResourceKind};
pub use object::{Object, Parts};
use packed::Packed;
pub use store::Store;
use wrote::{Expected, Sight, Wrote};

/// A type that is watched and cached.
pub trait Cached: Resource<DynamicType = ()> + DeserializeOwned + Send + Sync + 'static {
    /// Its store's place: no two types have the same, and all are below [`STORES`].
    const STORE: usize;
    /// Of the four kinds: which one. Objects of other types belong to the resource that their labels name.
    const SUBJECT: Option<ResourceKind> = None;
    /// Whether objects that belong to no resource are watched too.
    const OTHERS: bool = false;

    /// Drops what no decision reads. Whoever reads a further field of a type whose `compact` drops it adds it there: the
    /// mock server's tests go through the caches, so they show what is missing.
    fn compact(parts: &mut Parts) {
        let _ = parts;
    }
}

/// Number of cached types.
pub const STORES: usize = 9;

macro_rules! whole {
    ($($kind:ty => $store:expr, $subject:expr;)*) => {
        $(impl Cached for $kind {
            const STORE: usize = $store;
            const SUBJECT: Option<ResourceKind> = $subject;
        })*
    };
}

// A Deployment and a Service are compared with what is wanted, so all of them is needed.
whole! {
    Dataset => 0, Some(ResourceKind::Dataset);
    PretrainJob => 1, Some(ResourceKind::PretrainJob);
    AlignmentJob => 2, Some(ResourceKind::AlignmentJob);
    InferenceService => 3, Some(ResourceKind::InferenceService);
    Deployment => 4, None;
    Service => 5, None;
}

impl Cached for PodDisruptionBudget {
    const STORE: usize = 8;
    /// A pod that a user's own budget selects must not be selected by another.
    const OTHERS: bool = true;

    fn compact(parts: &mut Parts) {
        parts.status = None;
    }
}

impl Cached for Job {
    const STORE: usize = 6;

    fn compact(parts: &mut Parts) {
        Parts::keep::<JobSpec>(&mut parts.spec);
    }
}

impl Cached for Pod {
    const STORE: usize = 7;

    fn compact(parts: &mut Parts) {
        Parts::keep::<PodSpec>(&mut parts.spec);
        Parts::keep::<PodStatus>(&mut parts.status);
    }
}

type Raw = Option<Box<RawValue>>;

#[derive(Deserialize, Serialize)]
struct JobSpec {
    #[serde(skip_serializing_if = "Option::is_none")]
    suspend: Raw,
    #[serde(skip_serializing_if = "Option::is_none")]
    completions: Raw,
    template: Template,
}

#[derive(Deserialize, Serialize)]
struct Template {
    #[serde(default)]
    metadata: TemplateMetadata,
    spec: PodSpec,
}

#[derive(Default, Deserialize, Serialize)]
struct TemplateMetadata {
    #[serde(default)]
    annotations: TemplateAnnotations,
}

/// Of a template's annotations, what an attempt was made for: it goes into the status.
#[derive(Default, Deserialize, Serialize)]
struct TemplateAnnotations {
    #[serde(rename = "strata.dev/accelerator", skip_serializing_if = "Option::is_none")]
    accelerator: Raw,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct PodSpec {
    #[serde(skip_serializing_if = "Option::is_none")]
    node_name: Raw,
    /// These and what the containers ask for: whether a pod fits into the place of another.
    #[serde(skip_serializing_if = "Option::is_none")]
    node_selector: Raw,
    #[serde(skip_serializing_if = "Option::is_none")]
    affinity: Raw,
    #[serde(skip_serializing_if = "Option::is_none")]
    tolerations: Raw,
    /// Whether an attempt has a claim template.
    #[serde(skip_serializing_if = "Option::is_none")]
    resource_claims: Raw,
    #[serde(skip_serializing_if = "Option::is_none")]
    init_containers: Option<Vec<Container>>,
    containers: Vec<Container>,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct Container {
    name: Box<RawValue>,
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Raw,
    #[serde(skip_serializing_if = "Option::is_none")]
    resources: Raw,
    /// Where a serving pod is asked for its metrics, and in which scheme.
    #[serde(skip_serializing_if = "Option::is_none")]
    ports: Raw,
    #[serde(skip_serializing_if = "Option::is_none")]
    readiness_probe: Raw,
}

#[derive(Deserialize, Serialize)]
#[serde(rename_all = "camelCase")]
struct PodStatus {
    #[serde(skip_serializing_if = "Option::is_none")]
    phase: Raw,
    #[serde(skip_serializing_if = "Option::is_none")]
    message: Raw,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Raw,
    #[serde(rename = "podIP", skip_serializing_if = "Option::is_none")]
    pod_ip: Raw,
    #[serde(skip_serializing_if = "Option::is_none")]
    conditions: Raw,
    #[serde(skip_serializing_if = "Option::is_none")]
    init_container_statuses: Raw,
    #[serde(skip_serializing_if = "Option::is_none")]
    container_statuses: Raw,
}

/// The stores of all cached types, and what of our own writes they do not show yet.
#[derive(Debug)]
pub struct Caches {
    stores: [Store; STORES],
    wrote: Wrote,
    filled: watch::Sender<bool>,
}

impl Default for Caches {
    fn default() -> Self {
        Self {
            stores: Default::default(),
            wrote: Wrote::default(),
            filled: watch::Sender::new(false),
        }
    }
}

impl Caches {
    /// The store of a type.
    pub fn store<K: Cached>(&self) -> &Store {
        &self.stores[K::STORE]
    }

    /// The object of this name.
    ///
    /// # Errors
    /// It does not parse.
    pub fn get<K: Cached>(&self, namespace: &str, name: &str) -> Result<Option<K>, kube::Error> {
        let packed = self.store::<K>().get(namespace, name);
        packed.map(|packed| parse(&packed)).transpose()
    }

    /// The objects whose labels name `owner`.
    ///
    /// # Errors
    /// One does not parse.
    pub fn owned<K: Cached>(&self, owner: &Key) -> Result<Vec<K>, kube::Error> {
        self.store::<K>()
            .owned(owner)
            .iter()
            .map(|packed| parse(packed))
            .collect()
    }

    /// The objects of a namespace whose labels name no resource.
    ///
    /// # Errors
    /// One does not parse.
    pub fn others<K: Cached>(&self, namespace: &str) -> Result<Vec<K>, kube::Error> {
        self.store::<K>()
            .others(namespace)
            .iter()
            .map(|packed| parse(packed))
            .collect()
    }

    /// The server answered a write for `key` with `object`.
    pub fn wrote<K: Cached>(&self, key: &Key, object: &K) {
        let sight = Sight::Version(store::version(object));
        self.expect::<K>(key, sight);
    }

    /// The server took the deletion of an object for `key`.
    pub fn deleted<K: Cached>(&self, key: &Key, name: &str, uid: &str) {
        let sight = Sight::Gone(store::path(&key.namespace, name), uid.into());
        self.expect::<K>(key, sight);
    }

    fn expect<K: Cached>(&self, key: &Key, what: Sight) {
        let expected = Expected {
            store: K::STORE,
            what,
            lists_begun: self.store::<K>().lists_begun(),
            since: Instant::now(),
        };
        self.wrote.add(key, expected);
    }

    /// For how long a write of ours for `key` has not been seen; `None` if all have.
    pub fn unseen(&self, key: &Key) -> Option<Duration> {
        self.wrote.unseen(key, &self.stores)
    }

    /// Forgets what was written for a resource that is gone.
    pub fn forget(&self, key: &Key) {
        self.wrote.forget(key);
    }

    /// Forgets what was written for every resource of which `keep` says no.
    pub fn retain(&self, keep: impl Fn(&Key) -> bool) {
        self.wrote.retain(keep);
    }

    /// To be called after each list: whoever waits until all stores are filled goes on when they are.
    pub fn listed(&self) {
        if self.stores.iter().all(Store::is_filled) {
            self.filled.send_replace(true);
        }
    }

    /// Waits until every store has been filled once.
    pub async fn filled(&self) {
        // It fails only without a sender, and `self` has it.
        let _ = self.filled.subscribe().wait_for(|filled| *filled).await;
    }
}

fn parse<K: DeserializeOwned>(packed: &Packed) -> Result<K, kube::Error> {
    let json = packed.unpack().map_err(|error| kube::Error::Service(error.into()))?;
    serde_json::from_slice(&json).map_err(kube::Error::SerdeError)
}

/// Namespace and name of an object.
pub fn place<K: Resource>(object: &K) -> (String, String) {
    (object.namespace().unwrap_or_default(), object.name_any())
}
