//! What a kind is to the engine: pure functions from what was read to what is wanted and what is said.
//!
//! Nothing here is async, nothing holds a client; the time and the operator's settings are arguments.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Pod, Service};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::resource::v1::ResourceClaimTemplate;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::Resource;
use kube::core::object::HasStatus;
use serde::Serialize;
use serde::de::DeserializeOwned;
use strata_api::{ArtifactStatus, InferenceServiceStatus, Reason, RunStatus, ScalingEvent};
use strata_contract::{Progress, Task, Uri};

use super::cache::Cached;
use crate::autoscale::policy::Decision;
use crate::autoscale::scrape::{Questions, Scaling};
use crate::placement::preflight::ModelShape;
use crate::placement::{Fleet, Misfit};
use crate::workload::job::Attempt;

/// The four kinds, in the order of a model's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ResourceKind {
    /// `Dataset`.
    Dataset,
    /// `PretrainJob`.
    PretrainJob,
    /// `AlignmentJob`.
    AlignmentJob,
    /// `InferenceService`.
    InferenceService,
}

impl ResourceKind {
    /// All of them.
    pub const ALL: [Self; 4] = [
        Self::Dataset,
        Self::PretrainJob,
        Self::AlignmentJob,
        Self::InferenceService,
    ];

    /// The word in `kind:`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Dataset => "Dataset",
            Self::PretrainJob => "PretrainJob",
            Self::AlignmentJob => "AlignmentJob",
            Self::InferenceService => "InferenceService",
        }
    }

    /// The kind with this name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }
}

/// A reference to a resource of the same namespace.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ref {
    /// Its kind.
    pub kind: ResourceKind,
    /// Its name.
    pub name: String,
}

impl fmt::Display for Ref {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind.name(), self.name)
    }
}

/// A resource of the cluster.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// Its kind.
    pub kind: ResourceKind,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// The operator's settings, as far as decisions depend on them.
#[derive(Clone, Debug)]
pub struct Env {
    /// Image of new runs.
    pub runtime_image: String,
    /// Image of new runs and replicas on NVIDIA's GPUs.
    pub runtime_image_cuda: Option<String>,
    /// Where results are published if the resource does not say.
    pub default_storage: Option<Uri>,
    /// How long a serving pod of a new version waits for room before one of the version before makes place.
    pub rollout_patience: SignedDuration,
}

/// What a resource shows to those that refer to it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Upstream {
    /// What it published last.
    pub artifact: Option<ArtifactStatus>,
    /// What it published before, the newest first.
    pub previous: Vec<ArtifactStatus>,
    /// Reason and message of its Ready condition, where that is not True.
    pub not_ready: Option<(String, String)>,
    /// What it refers to itself.
    pub refs: Vec<Ref>,
    /// Of a Dataset: what its records are and whether it makes token files.
    pub dataset: Option<(Task, bool)>,
    /// Of a Dataset: size of the vocabulary that it trains.
    pub vocab_size: Option<u32>,
    /// Of a PretrainJob: the shape of its model, but for the vocabulary.
    pub shape: Option<ModelShape>,
}

/// What the server said about the surroundings of a resource.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// What the resource refers to, and what that refers to; what is absent does not exist.
    pub upstream: BTreeMap<Ref, Upstream>,
    /// The resource's Jobs.
    pub jobs: Vec<Job>,
    /// The resource's Pods, of Jobs and of the Deployment.
    pub pods: Vec<Pod>,
    /// The resource's Deployment.
    pub deployment: Option<Deployment>,
    /// The resource's Service.
    pub service: Option<Service>,
    /// The object in the place of the resource's PodDisruptionBudget. It is looked for once there is a Deployment.
    pub budget: Option<PodDisruptionBudget>,
    /// The budgets of the namespace that are not Strata's. They too are looked for once there is a Deployment.
    pub budgets: Vec<PodDisruptionBudget>,
    /// What running pods said about their progress, by UID of the pod.
    pub progress: BTreeMap<String, Progress>,
    /// What the pods of a service say that scales by itself.
    pub scaling: Option<Scaling>,
    /// What Kueue says about suspended Jobs in its queues, by UID of the Job.
    pub queue: BTreeMap<String, QueueSays>,
    /// Whether JobSet is installed; only looked for where it matters.
    pub has_jobset: bool,
    /// What the server did not take of what was planned.
    pub refused: Refused,
    /// What is known of the cluster's hardware.
    pub fleet: Arc<Fleet>,
}

/// What Kueue says about a Job that it keeps in its queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct QueueSays {
    /// Whether it had begun, and lost its place.
    pub is_evicted: bool,
    /// In Kueue's words.
    pub message: String,
}

/// What the server did not take, by what it was for; each with its reason and a sentence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refused {
    /// For the run: the objects of its attempts.
    pub run: Option<(Reason, String)>,
    /// For serving: Deployment, claim templates, Service and PodDisruptionBudget.
    pub serving: Option<(Reason, String)>,
}

/// What is wanted of the server. Absent means: leave it as it is.
#[derive(Debug, Default, PartialEq)]
pub struct Planned {
    /// Jobs to delete with their ConfigMaps and claim templates.
    pub delete: Vec<JobRef>,
    /// Jobs to suspend or to resume.
    pub suspend: Vec<(JobRef, bool)>,
    /// The next attempt.
    pub start: Option<Attempt>,
    /// What the serving pods claim; made before them.
    pub claims: Option<ResourceClaimTemplate>,
    /// Names of claim templates that no serving pod needs any more.
    pub old_claims: Vec<String>,
    /// The serving pods.
    pub deployment: Option<Deployment>,
    /// The address of the serving pods.
    pub service: Option<Service>,
    /// How many of the serving pods a drain may take at once.
    pub budget: Wanted<PodDisruptionBudget>,
}

/// What is wanted of an object that may come and go while its resource stays.
#[derive(Debug, Default, PartialEq)]
pub enum Wanted<T> {
    /// Nothing is known about it: leave it as it is.
    #[default]
    AsItIs,
    /// It is to be there, like this.
    There(T),
    /// It is to be gone, if it is ours.
    Gone,
}

/// One Job, named so that no other is hit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JobRef {
    /// Its name, which is also its ConfigMap's and its claim template's.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// Whether its pods may still run: then its deletion waits for them.
    pub running: bool,
    /// Whether it has a claim template of its name.
    pub claims: bool,
    /// Whether it is a JobSet.
    pub is_jobset: bool,
}

/// What the server answered to a [`Planned`]. Only the engine makes one, so no status can come from a mere plan.
#[derive(Debug, Default)]
pub struct Applied {
    pub(super) deleted: Vec<JobRef>,
    pub(super) jobs: Vec<Job>,
    pub(super) deployment: Option<Deployment>,
    pub(super) service: Option<Service>,
    pub(super) budget: Option<PodDisruptionBudget>,
    pub(super) refused: Refused,
}

impl Observed {
    /// What is known after the server's answers.
    pub fn with(mut self, applied: Applied) -> Self {
        let Applied {
            deleted,
            jobs,
            deployment,
            service,
            budget,
            refused,
        } = applied;
        let answer = |job: &Job| {
            deleted
                .iter()
                .find(|gone| job.metadata.uid.as_deref() == Some(&gone.uid))
        };
        self.jobs.retain(|job| answer(job).is_none_or(|gone| gone.running));
        for job in self.jobs.iter_mut().filter(|job| answer(job).is_some()) {
            // The time itself decides nothing; that there is one does.
            job.metadata
                .deletion_timestamp
                .get_or_insert(Time(Timestamp::UNIX_EPOCH));
        }
        for job in jobs {
            match self
                .jobs
                .iter_mut()
                .find(|known| known.metadata.uid == job.metadata.uid)
            {
                Some(known) => *known = job,
                None => self.jobs.push(job),
            }
        }
        self.deployment = deployment.or(self.deployment);
        self.service = service.or(self.service);
        self.budget = budget.or(self.budget);
        self.refused = refused;
        self
    }
}

/// Why a resource's spec leads to no run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The spec cannot be carried out: condition Accepted.
    Spec(Reason, String),
    /// An input is not there (yet): condition InputsReady.
    Inputs(Reason, String),
    /// No hardware of the cluster fits (now): condition Placed.
    Placement(Misfit),
}

/// The status to write, what to say about it, and when to look again without being told.
#[derive(Debug)]
pub struct Outcome<S> {
    /// The whole status.
    pub status: S,
    /// When to reconcile again if nothing happens.
    pub requeue: Option<Duration>,
}

/// What the engine needs to know of a kind's status.
pub trait Status: Clone + Default + PartialEq + fmt::Debug + Serialize + DeserializeOwned + Send + Sync {
    /// The part that all kinds share.
    fn run_status(&self) -> &RunStatus;

    /// The last change of the number of pods.
    fn scaling_event(&self) -> Option<&ScalingEvent> {
        None
    }
}

impl Status for RunStatus {
    fn run_status(&self) -> &RunStatus {
        self
    }
}

impl Status for InferenceServiceStatus {
    fn run_status(&self) -> &RunStatus {
        &self.run_status
    }

    fn scaling_event(&self) -> Option<&ScalingEvent> {
        self.scaling_history.first()
    }
}

/// A kind: pure decisions.
pub trait Kind:
    Cached
    + Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + HasStatus<Status: Status>
    + Clone
    + fmt::Debug
    + Serialize
    + DeserializeOwned
    + Send
    + Sync
    + 'static
{
    /// Which one.
    const KIND: ResourceKind;
    /// Whether it has a Deployment, a Service and a PodDisruptionBudget.
    const SERVES: bool;
    /// A spec that was found good, with everything resolved.
    type Checked: Send + Sync;

    /// What it refers to.
    fn refs(&self) -> Vec<Ref>;

    /// Nodes of its attempts, or more where only the nodes say it.
    fn nodes(&self) -> u32;

    /// What those that refer to it see of it.
    fn upstream(&self) -> Upstream;

    /// What its pods are asked, where their number follows what they say.
    fn questions(&self, _pods: &[Pod]) -> Option<Questions> {
        None
    }

    /// What was decided about the number of its pods, and in which round of questions.
    fn decided(_checked: &Result<Self::Checked, Refusal>) -> Option<(u64, &Decision)> {
        None
    }

    /// Judges the spec against what is there.
    ///
    /// # Errors
    /// Why there is no run, as a condition.
    fn check(&self, observed: &Observed, env: &Env) -> Result<Self::Checked, Refusal>;

    /// What is wanted of the server.
    fn plan(&self, checked: &Result<Self::Checked, Refusal>, observed: &Observed, now: Timestamp) -> Planned;

    /// What is said about it, after the server's answers.
    fn report(
        &self,
        checked: &Result<Self::Checked, Refusal>,
        observed: &Observed,
        now: Timestamp,
    ) -> Outcome<<Self as HasStatus>::Status>;
}
