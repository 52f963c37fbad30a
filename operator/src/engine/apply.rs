//! From what is wanted to what the server answered: deletions first, then new objects, then what is kept in shape.
//!
//! Jobs, their ConfigMaps and claim templates are created once and never changed, but for `suspend`. Deployment, Service and
//! PodDisruptionBudget are applied whole, by one field manager, and only if they differ.

use std::fmt::Debug;

use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Service};
use k8s_openapi::api::resource::v1::ResourceClaimTemplate;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams, Preconditions, PropagationPolicy};
use kube::{Api, Client, Resource, ResourceExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use strata_api::Reason;
use strata_contract::hash_canonical;

use super::cache::{Cached, Caches};
use super::gather::is_owned_by;
use super::kind::{Applied, JobRef, Key, Observed, Planned, Wanted};
use super::reconcile::Error;
use super::{jobsets, same};
use crate::workload::{jobset, labels};

/// Who we are to the server, in every write.
pub const FIELD_MANAGER: &str = "strata-operator";

/// Whose objects are written.
pub struct Owner<'a> {
    /// The resource that owns them.
    pub key: &'a Key,
    /// Its UID.
    pub uid: &'a str,
    /// Where what was written is to show before anything else is decided on it.
    pub caches: &'a Caches,
}

/// Brings the server to what is wanted.
///
/// What the server refuses for good is in the answer, so that the status can say it; and a run that is refused leaves
/// what serves in shape.
///
/// # Errors
/// Any other write that fails ends it; what is done stays, and the next reconcile goes on.
pub async fn apply(
    client: &Client,
    owner: &Owner<'_>,
    planned: Planned,
    observed: &Observed,
) -> Result<Applied, Error> {
    let mut applied = Applied::default();
    let run = apply_run(client, owner, &planned, &mut applied).await;
    applied.refused.run = refusal(run)?;
    let serving = apply_serving(client, owner, planned, observed, &mut applied).await;
    applied.refused.serving = refusal(serving)?;
    Ok(applied)
}

async fn apply_run(client: &Client, owner: &Owner<'_>, planned: &Planned, applied: &mut Applied) -> Result<(), Error> {
    for job in &planned.delete {
        delete_attempt(client, owner, job).await?;
        applied.deleted.push(job.clone());
    }
    for (job, suspend) in &planned.suspend {
        applied.jobs.push(set_suspend(client, owner, job, *suspend).await?);
    }
    if let Some(attempt) = &planned.start {
        if let Some(names) = &attempt.names {
            let there = api::<Service>(client, owner).get_opt(&names.name_any()).await?;
            apply_whole(client, owner, names.clone(), there.as_ref()).await?;
        }
        create_fixed(client, owner, &attempt.config_map).await?;
        if let Some(claims) = &attempt.claims {
            create_claims(client, owner, claims).await?;
        }
        applied.jobs.push(create_job(client, owner, &attempt.job).await?);
    }
    Ok(())
}

async fn apply_serving(
    client: &Client,
    owner: &Owner<'_>,
    planned: Planned,
    observed: &Observed,
    applied: &mut Applied,
) -> Result<(), Error> {
    // Before the Deployment that no longer says that they are there.
    for name in &planned.old_claims {
        delete_fixed::<ResourceClaimTemplate>(client, owner, name).await?;
    }
    if let Some(claims) = &planned.claims {
        // One that is there is as it is wanted: its name is its content's.
        let there = api::<ResourceClaimTemplate>(client, owner)
            .get_opt(&claims.name_any())
            .await?;
        if there.is_none_or(|there| !is_kept(&there, owner)) {
            create_claims(client, owner, claims).await?;
        }
    }
    if let Some(deployment) = planned.deployment {
        applied.deployment = Some(apply_whole(client, owner, deployment, observed.deployment.as_ref()).await?);
    }
    if let Some(service) = planned.service {
        applied.service = Some(apply_whole(client, owner, service, observed.service.as_ref()).await?);
    }
    match planned.budget {
        Wanted::AsItIs => {}
        Wanted::There(budget) => {
            applied.budget = Some(apply_whole(client, owner, budget, observed.budget.as_ref()).await?);
        }
        Wanted::Gone => prune(client, owner, observed.budget.as_ref()).await?,
    }
    Ok(())
}

/// Tells what a person (or a collector) has to put right, or may have to, from what the next try will.
fn refusal(result: Result<(), Error>) -> Result<Option<(Reason, String)>, Error> {
    match result {
        Ok(()) => Ok(None),
        Err(Error::Refused(reason, message)) => Ok(Some((reason, message))),
        Err(Error::Kube(kube::Error::Api(status))) => {
            let (reason, does) = match status.code {
                400 | 403 | 422 => (Reason::Refused, "refuses"),
                // Its own, or a webhook's: it may last.
                500 => (Reason::ApplyFailed, "fails at"),
                _ => return Err(Error::Kube(kube::Error::Api(status))),
            };
            let message = format!("the API server {does} what is to be made: {}", status.message);
            Ok(Some((reason, message)))
        }
        Err(error) => Err(error),
    }
}

/// Why an object that stands in the place of `wanted` is not touched.
fn taken<K: Resource<DynamicType = ()>>(wanted: &K, there: &K) -> Error {
    let (kind, name) = (K::kind(&()), wanted.name_any());
    let is_of_an_earlier_one = there.owner_references().iter().any(|owner| {
        let same = |ours: &OwnerReference| ours.kind == owner.kind && ours.name == owner.name;
        wanted.owner_references().iter().any(same)
    });
    if there.meta().deletion_timestamp.is_some() || is_of_an_earlier_one {
        // The collector removes it: nobody has to do anything.
        let message = format!("the {kind} {name} of before is being removed; this one follows");
        return Error::Refused(Reason::Pending, message);
    }
    let message = format!("the {kind} {name} belongs to something else: delete it, or rename this resource");
    Error::Refused(Reason::NameTaken, message)
}

fn api<K: Resource<DynamicType = (), Scope = NamespaceResourceScope>>(client: &Client, owner: &Owner<'_>) -> Api<K> {
    Api::namespaced(client.clone(), &owner.key.namespace)
}

fn create_params() -> PostParams {
    PostParams {
        field_manager: Some(FIELD_MANAGER.into()),
        ..PostParams::default()
    }
}

/// The Job goes last: after a crash in between, it is still there to name the others.
async fn delete_attempt(client: &Client, owner: &Owner<'_>, job: &JobRef) -> Result<(), Error> {
    delete_fixed::<ConfigMap>(client, owner, &job.name).await?;
    if job.claims {
        delete_fixed::<ResourceClaimTemplate>(client, owner, &job.name).await?;
    }
    let propagation = match job.running {
        true => PropagationPolicy::Foreground,
        false => PropagationPolicy::Background,
    };
    let params = delete_params(Some(job.uid.clone()), propagation);
    let deleted = match job.is_jobset {
        true => jobsets::api(client, &owner.key.namespace)
            .delete(&job.name, &params)
            .await
            .map(drop),
        false => api::<Job>(client, owner).delete(&job.name, &params).await.map(drop),
    };
    gone(deleted)?;
    // JobSets are read from the server, always.
    if !job.is_jobset {
        owner.caches.deleted::<Job>(owner.key, &job.name, &job.uid);
    }
    tracing::info!(job = job.name, running = job.running, "deleted an attempt");
    Ok(())
}

fn delete_params(uid: Option<String>, propagation: PropagationPolicy) -> DeleteParams {
    DeleteParams {
        preconditions: Some(Preconditions {
            uid,
            resource_version: None,
        }),
        propagation_policy: Some(propagation),
        ..DeleteParams::default()
    }
}

/// What is not there any more is deleted.
fn gone(result: Result<(), kube::Error>) -> Result<(), Error> {
    match result {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        result => Ok(result?),
    }
}

async fn set_suspend(client: &Client, owner: &Owner<'_>, job: &JobRef, suspend: bool) -> Result<Job, Error> {
    // The UID in the patch is a precondition: another Job of the same name is not touched.
    let mark = suspend.then_some("true");
    let metadata = json!({"uid": job.uid, "annotations": {labels::SUSPENDED: mark}});
    let patch = json!({"metadata": metadata, "spec": {"suspend": suspend}});
    let params = PatchParams {
        field_manager: Some(FIELD_MANAGER.into()),
        ..PatchParams::default()
    };
    tracing::info!(job = job.name, suspend, "changing an attempt");
    let patch = Patch::Merge(patch);
    if job.is_jobset {
        let jobsets = jobsets::api(client, &owner.key.namespace);
        return Ok(jobset::view(&jobsets.patch(&job.name, &params, &patch).await?, &[]));
    }
    let job = api::<Job>(client, owner).patch(&job.name, &params, &patch).await?;
    owner.caches.wrote(owner.key, &job);
    Ok(job)
}

/// Deletes what is of that name, if it is ours.
async fn delete_fixed<K>(client: &Client, owner: &Owner<'_>, name: &str) -> Result<(), Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Debug,
{
    let objects: Api<K> = api(client, owner);
    if let Some(there) = objects.get_opt(name).await?
        && is_owned_by(&there, owner.uid)
    {
        let params = delete_params(there.uid(), PropagationPolicy::Background);
        gone(objects.delete(name, &params).await.map(drop))?;
    }
    Ok(())
}

/// Whether an object is ours and stays.
fn is_kept<K: Resource>(there: &K, owner: &Owner<'_>) -> bool {
    is_owned_by(there, owner.uid) && there.meta().deletion_timestamp.is_none()
}

/// [`create_fixed`], where the cluster may not know such objects.
async fn create_claims(client: &Client, owner: &Owner<'_>, wanted: &ResourceClaimTemplate) -> Result<(), Error> {
    match create_fixed(client, owner, wanted).await {
        Err(Error::Kube(kube::Error::Api(status))) if status.code == 404 => {
            let message = "the cluster serves no resource.k8s.io/v1: write spec.hardware.allocation: DevicePlugin";
            Err(Error::Refused(Reason::Refused, message.into()))
        }
        result => result,
    }
}

/// Creates what can never change.
async fn create_fixed<K>(client: &Client, owner: &Owner<'_>, wanted: &K) -> Result<(), Error>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + DeserializeOwned + Serialize + Debug,
{
    let objects: Api<K> = api(client, owner);
    let Some(there) = create(&objects, wanted).await? else {
        return Ok(());
    };
    if !is_kept(&there, owner) {
        return Err(taken(wanted, &there));
    }
    let value = |object: &K| serde_json::to_value(object).unwrap_or(Value::Null);
    if same::holds(&value(wanted), Some(&value(&there))) {
        return Ok(());
    }
    // Left by a crash before what needs it came, and outdated since.
    delete_fixed::<K>(client, owner, &wanted.name_any()).await?;
    match create(&objects, wanted).await? {
        None => Ok(()),
        Some(there) => Err(taken(wanted, &there)),
    }
}

async fn create_job(client: &Client, owner: &Owner<'_>, wanted: &Job) -> Result<Job, Error> {
    let (there, is_new) = match jobset::is_jobset(wanted) {
        true => {
            let jobsets = jobsets::api(client, &owner.key.namespace);
            let (there, is_new) = make(&jobsets, &jobset::wrap(wanted)).await?;
            (jobset::view(&there, &[]), is_new)
        }
        false => make(&api::<Job>(client, owner), wanted).await?,
    };
    if !is_new && !is_kept(&there, owner) {
        return Err(taken(wanted, &there));
    }
    if is_new {
        tracing::info!(job = there.name_any(), "started an attempt");
    }
    // JobSets are read from the server, always.
    if !jobset::is_jobset(wanted) {
        owner.caches.wrote(owner.key, &there);
    }
    Ok(there)
}

/// Creates an object, and says whether that was so; else it is the one that is in its place.
async fn make<K>(api: &Api<K>, wanted: &K) -> Result<(K, bool), Error>
where
    K: Resource + Clone + DeserializeOwned + Serialize + Debug,
{
    match api.create(&create_params(), wanted).await {
        Ok(made) => Ok((made, true)),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok((api.get(&wanted.name_any()).await?, false)),
        Err(error) => Err(error.into()),
    }
}

/// Creates an object; answers with the one that is in its place, if there is one.
async fn create<K>(api: &Api<K>, wanted: &K) -> Result<Option<K>, Error>
where
    K: Resource + Clone + DeserializeOwned + Serialize + Debug,
{
    let (there, is_new) = make(api, wanted).await?;
    Ok((!is_new).then_some(there))
}

/// Deletes an object that is not wanted any more, if it is ours.
async fn prune<K>(client: &Client, owner: &Owner<'_>, there: Option<&K>) -> Result<(), Error>
where
    K: Cached + Resource<Scope = NamespaceResourceScope> + Clone + Debug,
{
    let Some(there) = there.filter(|there| is_kept(*there, owner)) else {
        return Ok(());
    };
    tracing::info!(kind = %K::kind(&()), name = there.name_any(), "pruning");
    let params = delete_params(there.uid(), PropagationPolicy::Background);
    let name = there.name_any();
    gone(api::<K>(client, owner).delete(&name, &params).await.map(drop))?;
    let uid = there.meta().uid.as_deref().unwrap_or_default();
    owner.caches.deleted::<K>(owner.key, &name, uid);
    Ok(())
}

/// Server-side apply of a whole object, if it is not yet as wanted.
async fn apply_whole<K>(client: &Client, owner: &Owner<'_>, mut wanted: K, there: Option<&K>) -> Result<K, Error>
where
    K: Cached + Resource<Scope = NamespaceResourceScope> + Clone + Serialize + Debug,
{
    let name = wanted.name_any();
    let hash = hash_canonical(&wanted);
    wanted.annotations_mut().insert(labels::APPLIED.into(), hash);
    let objects = api::<K>(client, owner);
    // The caches hold what has our labels: an object of others may be in the place all the same.
    let unlabelled = match there {
        Some(_) => None,
        None => objects.get_opt(&name).await?,
    };
    if let Some(there) = there.or(unlabelled.as_ref()) {
        if !is_kept(there, owner) {
            return Err(taken(&wanted, there));
        }
        let value = |object: &K| serde_json::to_value(object).unwrap_or(Value::Null);
        if same::holds(&value(&wanted), Some(&value(there))) {
            return Ok(there.clone());
        }
    }
    tracing::info!(kind = %K::kind(&()), name, "applying");
    let params = PatchParams::apply(FIELD_MANAGER).force();
    let applied = objects.patch(&name, &params, &Patch::Apply(&wanted)).await?;
    owner.caches.wrote(owner.key, &applied);
    Ok(applied)
}
