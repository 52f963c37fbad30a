//! What Kueue says about Jobs that wait in its queues: asked only about those, and only where Kueue is installed.

use std::collections::BTreeMap;

use axum::http::Request;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::APIGroup;
use kube::api::{ApiResource, DynamicObject, ListParams};
use kube::core::GroupVersionKind;
use kube::{Api, Client, ResourceExt};
use serde_json::Value;

use super::kind::QueueSays;
use crate::run::attempt;

const GROUP: &str = "kueue.x-k8s.io";
/// Label on a Workload: UID of the Job, or JobSet, that it stands for.
const JOB_UID: &str = "kueue.x-k8s.io/job-uid";

/// What Kueue says about those of `jobs` that it keeps suspended, by UID of the Job.
///
/// # Errors
/// The server's.
pub async fn gather(
    client: &Client,
    namespace: &str,
    jobs: &[Job],
) -> Result<BTreeMap<String, QueueSays>, kube::Error> {
    let waits = |job: &&Job| attempt::queue(job).is_some() && attempt::is_suspended(job) && !attempt::finished(job);
    let waiting: Vec<String> = jobs.iter().filter(waits).filter_map(ResourceExt::uid).collect();
    let mut said = BTreeMap::new();
    if waiting.is_empty() {
        return Ok(said);
    }
    let Some(version) = version(client).await? else {
        let message = "Kueue is not installed in this cluster: install it, or take spec.scheduler out";
        let nobody = QueueSays {
            is_evicted: false,
            message: message.into(),
        };
        return Ok(waiting.into_iter().map(|uid| (uid, nobody.clone())).collect());
    };
    let kind = GroupVersionKind::gvk(GROUP, &version, "Workload");
    let workloads: Api<DynamicObject> = Api::namespaced_with(
        client.clone(),
        namespace,
        &ApiResource::from_gvk_with_plural(&kind, "workloads"),
    );
    for uid in waiting {
        let of_job = ListParams::default().labels(&format!("{JOB_UID}={uid}"));
        let found = workloads.list(&of_job).await?;
        if let Some(says) = found.items.first().and_then(|workload| read(&workload.data)) {
            said.insert(uid, says);
        }
    }
    Ok(said)
}

/// The version of Kueue's API that the server prefers; `None` if it has none.
async fn version(client: &Client) -> Result<Option<String>, kube::Error> {
    let request = Request::get(format!("/apis/{GROUP}"))
        .body(Vec::new())
        .expect("a constant path makes a request");
    match client.request::<APIGroup>(request).await {
        Ok(group) => {
            let preferred = group.preferred_version.or_else(|| group.versions.into_iter().next());
            Ok(preferred.map(|version| version.version))
        }
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
        Err(error) => Err(error),
    }
}

/// What the conditions of a Workload say; `None` before there are any.
fn read(workload: &Value) -> Option<QueueSays> {
    let conditions = workload.pointer("/status/conditions")?.as_array()?;
    let find = |kind: &str, status: &str| {
        let is = |condition: &&Value| condition["type"] == kind && condition["status"] == status;
        let condition = conditions.iter().find(is)?;
        let text = |field: &str| condition[field].as_str().unwrap_or_default();
        Some(format!("{}: {}", text("reason"), text("message")))
    };
    let evicted = find("Evicted", "True");
    let waits = find("QuotaReserved", "False").or_else(|| find("Admitted", "False"));
    let is_evicted = evicted.is_some();
    let words: Vec<String> = evicted.into_iter().chain(waits).collect();
    (!words.is_empty()).then(|| QueueSays {
        is_evicted,
        message: words.join("; "),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn kueue_is_quoted_and_a_lost_place_is_told_from_a_first_wait() {
        let condition = |kind: &str, status: &str, reason: &str, message: &str| json!({"type": kind, "status": status, "reason": reason, "message": message});
        let no_room = condition("QuotaReserved", "False", "Pending", "insufficient unused quota for cpu");
        let lost = condition("Evicted", "True", "Preempted", "Preempted to accommodate a workload");
        for (conditions, expected) in [
            (json!([]), None),
            (
                json!([no_room]),
                Some((false, "Pending: insufficient unused quota for cpu")),
            ),
            (
                json!([no_room, lost]),
                Some((
                    true,
                    "Preempted: Preempted to accommodate a workload; Pending: insufficient unused quota for cpu",
                )),
            ),
        ] {
            let says = read(&json!({"status": {"conditions": conditions}}));
            let got = says.as_ref().map(|says| (says.is_evicted, says.message.as_str()));
            assert_eq!(got, expected);
        }
        assert_eq!(read(&json!({})), None);
    }
}
