//! JobSets, where they are installed and may matter: read as the Jobs that they stand for. They are not watched: what happens
//! to one happens to its Job, which is.

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DynamicObject, ListParams};
use kube::{Api, Client, ResourceExt};

use super::gather::is_owned_by;
use super::kind::Key;
use crate::workload::jobset::{api_resource, view};
use crate::workload::labels;

/// The JobSets of this namespace.
pub fn api(client: &Client, namespace: &str) -> Api<DynamicObject> {
    Api::namespaced_with(client.clone(), namespace, &api_resource())
}

/// Whether one of `jobs` is part of a JobSet.
pub fn has_members(jobs: &[Job]) -> bool {
    let mut owners = jobs.iter().flat_map(ResourceExt::owner_references);
    owners.any(|owner| owner.kind == "JobSet")
}

/// The Jobs that the JobSets of the resource `uid` stand for; `None` if JobSet is not installed. In `pods`, those of their
/// Jobs become theirs.
///
/// # Errors
/// The server's.
pub async fn gather(
    client: &Client,
    key: &Key,
    uid: &str,
    jobs: &[Job],
    pods: &mut [Pod],
) -> Result<Option<Vec<Job>>, kube::Error> {
    let of_resource = ListParams::default().labels(&labels::selector(key.kind, &key.name));
    let jobsets = match api(client, &key.namespace).list(&of_resource).await {
        Ok(jobsets) => jobsets.items,
        // The API server knows no such objects.
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(None),
        Err(error) => return Err(error),
    };
    let ours = jobsets.iter().filter(|jobset| is_owned_by(*jobset, uid));
    let mut views = Vec::new();
    for jobset in ours {
        let Some(uid) = jobset.uid() else { continue };
        for member in jobs.iter().filter(|job| is_owned_by(*job, &uid)) {
            let Some(member_uid) = member.uid() else { continue };
            for pod in pods.iter_mut().filter(|pod| is_owned_by(*pod, &member_uid)) {
                let owners = pod.metadata.owner_references.get_or_insert_default();
                let mut owner = owners[0].clone();
                owner.uid.clone_from(&uid);
                owners.push(owner);
            }
        }
        views.push(view(jobset, jobs));
    }
    Ok(Some(views))
}
