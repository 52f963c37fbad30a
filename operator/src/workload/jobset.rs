//! An attempt on several nodes as a JobSet, where that is installed: made from the Job that it would be without, and read as
//! that Job again. So all that is decided about attempts knows only Jobs.
//!
//! The JobSet holds one Job with all nodes and is never restarted by itself: an attempt goes or ends as a whole.

use k8s_openapi::api::batch::v1::{Job, JobCondition, JobSpec};
use kube::core::{ApiResource, DynamicObject, GroupVersionKind, TypeMeta};
use kube::{Resource, ResourceExt};
use serde_json::{Value, json};

use super::labels;

/// Name of the one Job in a JobSet; short, as names of pods are made with it.
const MEMBER: &str = "n";

/// The API of JobSets.
pub fn api_resource() -> ApiResource {
    ApiResource::from_gvk_with_plural(
        &GroupVersionKind::gvk("jobset.x-k8s.io", "v1alpha2", "JobSet"),
        "jobsets",
    )
}

/// Whether a Job stands for a JobSet.
pub fn is_jobset(job: &Job) -> bool {
    job.annotations().get(labels::WORKLOAD).map(String::as_str) == Some("JobSet")
}

/// Says of a Job that is to be made that it is to be a JobSet.
pub fn mark(job: &mut Job) {
    let annotations = job.metadata.annotations.get_or_insert_default();
    annotations.insert(labels::WORKLOAD.into(), "JobSet".into());
}

/// Name by which the other nodes reach node 0 of the JobSet `name`.
pub fn coordinator(name: &str) -> String {
    format!("{name}-{MEMBER}-0-0.{name}")
}

/// The JobSet of `job`.
pub fn wrap(job: &Job) -> DynamicObject {
    let spec = job.spec.clone().unwrap_or_default();
    let suspend = spec.suspend;
    let spec = JobSpec { suspend: None, ..spec };
    let data = json!({"spec": {
        "suspend": suspend.unwrap_or(false),
        "network": {"enableDNSHostnames": true, "publishNotReadyAddresses": true},
        "failurePolicy": {"maxRestarts": 0},
        "replicatedJobs": [{
            "name": MEMBER,
            "replicas": 1,
            "template": {"metadata": {"labels": job.metadata.labels}, "spec": spec},
        }],
    }});
    let api = api_resource();
    DynamicObject {
        types: Some(TypeMeta {
            api_version: api.api_version,
            kind: api.kind,
        }),
        metadata: job.metadata.clone(),
        data,
    }
}

/// The Job that a JobSet stands for, given the Jobs that there are. How it goes is what its one Job says; before that is there,
/// what it says itself.
pub fn view(jobset: &DynamicObject, jobs: &[Job]) -> Job {
    let of_jobset = |job: &&Job| {
        job.owner_references()
            .iter()
            .any(|owner| Some(&owner.uid) == jobset.meta().uid.as_ref())
    };
    let member = jobs.iter().find(of_jobset);
    let template = jobset.data.pointer("/spec/replicatedJobs/0/template/spec");
    let spec: JobSpec = template
        .and_then(|spec| serde_json::from_value(spec.clone()).ok())
        .unwrap_or_default();
    let suspend = jobset.data.pointer("/spec/suspend").and_then(Value::as_bool);
    let mut status = member.and_then(|job| job.status.clone()).unwrap_or_default();
    let conditions = status.conditions.get_or_insert_default();
    let has_ended = |all: &[JobCondition]| {
        let is_end = |condition: &JobCondition| matches!(condition.type_.as_str(), "Complete" | "Failed");
        all.iter()
            .any(|condition| is_end(condition) && condition.status == "True")
    };
    if !has_ended(conditions) {
        conditions.extend(ends(jobset));
    }
    Job {
        metadata: jobset.metadata.clone(),
        spec: Some(JobSpec { suspend, ..spec }),
        status: Some(status),
    }
}

/// The end that a JobSet itself says, in the words of a Job.
fn ends(jobset: &DynamicObject) -> Option<JobCondition> {
    let conditions = jobset.data.pointer("/status/conditions")?.as_array()?;
    conditions.iter().find_map(|condition| {
        let word = match condition["type"].as_str()? {
            "Completed" => "Complete",
            "Failed" => "Failed",
            _ => return None,
        };
        let mut condition = condition.clone();
        condition["type"] = json!(word);
        let condition: JobCondition = serde_json::from_value(condition).ok()?;
        (condition.status == "True").then_some(condition)
    })
}
