//! Words for tests: resources from short JSON, and what the server may say about Jobs and pods.

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use strata_api::{AlignmentJob, ArtifactStatus, Dataset, InferenceService, PretrainJob, RunInfo, RunStatus};
use strata_contract::{CONTRACT_VERSION, FailureReason, Report};

use crate::engine::kind::{Env, Key, Observed, Planned, Ref, ResourceKind, Upstream};
use crate::workload::labels;

/// When tests take place, in seconds of Unix time.
pub const NOW: i64 = 1_800_000_000;
pub const IMAGE: &str = "strata-runtime:1";

pub fn at(second: i64) -> Timestamp {
    Timestamp::from_second(second).expect("a valid time")
}

pub fn env() -> Env {
    Env {
        runtime_image: IMAGE.into(),
        runtime_image_cuda: None,
        default_storage: Some("pvc://artifacts".parse().expect("a valid uri")),
        rollout_patience: SignedDuration::from_mins(10),
    }
}

fn from<T: DeserializeOwned>(kind: ResourceKind, name: &str, spec: Value, change: Value) -> T {
    let mut spec = spec;
    merge(&mut spec, change);
    serde_json::from_value(json!({
        "apiVersion": "strata.dev/v1alpha1",
        "kind": kind.name(),
        "metadata": {"name": name, "namespace": "ns", "uid": format!("uid-{name}"), "generation": 1},
        "spec": spec,
    }))
    .expect("a valid resource")
}

/// JSON merge patch.
pub fn merge(target: &mut Value, change: Value) {
    match (target, change) {
        (Value::Object(target), Value::Object(change)) => {
            for (key, value) in change {
                match value {
                    Value::Null => drop(target.remove(&key)),
                    value => merge(target.entry(key).or_insert(Value::Null), value),
                }
            }
        }
        (target, change) => *target = change,
    }
}

/// A small good Dataset with `change` merged into its spec.
pub fn dataset(name: &str, change: Value) -> Dataset {
    let spec = json!({
        "task": "Pretraining",
        "sources": [{"name": "a", "documents": {"uri": "pvc://raw/a.txt", "format": "Text", "splitBytes": 2000}}],
        "encode": {"tokenizer": {"train": {"algorithm": "BPE", "vocabSize": 2048}}, "sequence": {"lengthTokens": 256}},
    });
    from(ResourceKind::Dataset, name, spec, change)
}

/// A small good PretrainJob on the Dataset `plays`.
pub fn pretrain(name: &str, change: Value) -> PretrainJob {
    let spec = json!({
        "datasets": [{"name": "plays"}],
        "model": {"llama": {"hiddenSize": 192, "layers": 4, "heads": 6, "kvHeads": 2, "contextTokens": 256}},
        "training": {"tokens": 1000, "batchTokens": 512, "learningRate": "3e-3"},
    });
    from(ResourceKind::PretrainJob, name, spec, change)
}

/// A small good AlignmentJob on the GGUF file `m.gguf` and the Dataset `preferences`.
pub fn alignment(name: &str, change: Value) -> AlignmentJob {
    let spec = json!({
        "base": {"uri": "pvc://raw/m.gguf"},
        "method": {"dpo": {"beta": "0.1"}},
        "adapter": {"lora": {"rank": 16}},
        "datasets": [{"name": "preferences"}],
        "training": {"pairs": 8, "maxPairTokens": 64, "batchPairs": 4, "learningRate": "1e-4"},
        "evaluate": {"heldOutPairs": 4},
    });
    from(ResourceKind::AlignmentJob, name, spec, change)
}

/// A small good InferenceService of the PretrainJob `bard`.
pub fn inference(name: &str, change: Value) -> InferenceService {
    let spec = json!({"model": {"pretrainJob": {"name": "bard"}}, "replicas": 2});
    from(ResourceKind::InferenceService, name, spec, change)
}

pub fn key(kind: ResourceKind, name: &str) -> Key {
    Key {
        kind,
        namespace: "ns".into(),
        name: name.into(),
    }
}

pub fn to(kind: ResourceKind, name: &str) -> Ref {
    Ref {
        kind,
        name: name.into(),
    }
}

pub fn digest(c: char) -> String {
    format!("sha256:{}", c.to_string().repeat(64))
}

/// A resource that published the digest of `c`.
pub fn published(c: char) -> Upstream {
    Upstream {
        artifact: Some(ArtifactStatus {
            uri: format!("pvc://artifacts/ns/x/{c}"),
            digest: digest(c),
            bytes: 10,
            run_id: c.to_string().repeat(16),
        }),
        ..Upstream::default()
    }
}

/// How a Job's attempt goes, as the server shows it.
pub enum Attempt {
    /// The Job has no pod.
    NoPod,
    /// The pod is not scheduled; the scheduler's message.
    Unscheduled(&'static str),
    /// The container waits; the kubelet's word.
    Waiting(&'static str),
    /// The container runs.
    Running,
    /// The container ended: exit status, reason, termination message.
    Ended(i32, &'static str, String),
    /// The pod was disrupted; reason and message.
    Disrupted(&'static str, &'static str),
    /// The Job failed, the pod is gone; the Job's reason.
    Gone(&'static str),
}

/// A report of the artifact of `c`.
pub fn good_report(c: char) -> String {
    let mut report = Report::failed(FailureReason::Internal, "made it".into());
    report.failure = None;
    report.contract_version = CONTRACT_VERSION;
    report.artifact = Some(strata_contract::ArtifactRef {
        uri: "pvc://artifacts/out".parse().expect("a valid uri"),
        digest: digest(c),
        bytes: 7,
    });
    report.metrics.insert("loss".into(), 2.5);
    report.to_termination_message()
}

pub fn bad_report(reason: FailureReason) -> String {
    Report::failed(reason, "it broke".into()).to_termination_message()
}

/// Adds what became of a planned Job: `ended` seconds before now, where it has ended.
pub fn observe(observed: &mut Observed, job: &Job, attempt: Attempt, ended: i64) {
    let mut job = job.clone();
    let name = job.metadata.name.clone().expect("a planned Job has a name");
    let uid = format!("uid-{name}");
    job.metadata.uid = Some(uid.clone());
    let finish = |kind: &str, reason: &str| {
        serde_json::from_value(json!({"conditions": [{
            "type": kind, "status": "True", "reason": reason, "message": "the Job's words",
            "lastTransitionTime": at(NOW - ended).to_string(),
        }]}))
        .expect("a valid status")
    };
    let pod = |phase: &str, rest: Value| -> Pod {
        let mut status = json!({"phase": phase});
        merge(&mut status, rest);
        serde_json::from_value(json!({
            "metadata": {"name": name, "uid": format!("pod-{name}"), "ownerReferences": [
                {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": uid, "controller": true}]},
            "spec": {"nodeName": "n1", "containers": [{"name": "strata", "image": IMAGE}]},
            "status": status,
        }))
        .expect("a valid pod")
    };
    let container = |state: Value| {
        json!({"containerStatuses": [{
            "name": "strata", "image": "", "imageID": "", "ready": false, "restartCount": 0, "state": state,
        }]})
    };
    let mut pods = Vec::new();
    match attempt {
        Attempt::NoPod => {}
        Attempt::Unscheduled(message) => pods.push(pod(
            "Pending",
            json!({"conditions": [{"type": "PodScheduled", "status": "False", "message": message}]}),
        )),
        Attempt::Waiting(word) => pods.push(pod("Pending", container(json!({"waiting": {"reason": word}})))),
        Attempt::Running => pods.push(pod("Running", container(json!({"running": {}})))),
        Attempt::Ended(code, reason, message) => {
            let state = json!({"terminated": {"exitCode": code, "reason": reason, "message": message}});
            pods.push(pod(if code == 0 { "Succeeded" } else { "Failed" }, container(state)));
            job.status = Some(if code == 0 {
                finish("Complete", "")
            } else {
                finish("Failed", "BackoffLimitExceeded")
            });
        }
        Attempt::Disrupted(reason, message) => {
            let condition = json!({"type": "DisruptionTarget", "status": "True", "reason": reason, "message": message});
            pods.push(pod("Failed", json!({"conditions": [condition]})));
            job.status = Some(finish("Failed", "BackoffLimitExceeded"));
        }
        Attempt::Gone(reason) => job.status = Some(finish("Failed", reason)),
    }
    observed.jobs.push(job);
    observed.pods.extend(pods);
}

/// The Job that a plan starts.
pub fn started(planned: Planned) -> Job {
    planned.start.expect("an attempt is started").job
}

/// The status of a run at `attempt`, nothing else known.
pub fn at_attempt(run_id: &str, attempt: i32, failures: i32) -> RunStatus {
    RunStatus {
        run: Some(RunInfo {
            id: run_id.into(),
            attempt,
            failures,
            image: IMAGE.into(),
            ..RunInfo::default()
        }),
        ..RunStatus::default()
    }
}

/// The attempt's number in a planned Job.
pub fn attempt_of(job: &Job) -> &str {
    crate::run::label(job, labels::ATTEMPT)
}
