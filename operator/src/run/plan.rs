//! From a run's phase to what is wanted of the server.

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use strata_api::RunStatus;
use strata_contract::{CONTRACT_VERSION, Run, StageConfig};

use super::phase::{Ledger, Phase, phase};
use super::{Order, Runs, attempt, label};
use crate::engine::kind::{JobRef, Observed, Planned, Refusal, Status};
use crate::workload::{claim, job, jobset, labels};

/// Finished Jobs that are kept of the current run, and of earlier runs while the current one has not published.
const KEPT_JOBS: usize = 3;

/// What is wanted of the server for the run of `resource`.
pub fn plan<T: Runs>(resource: &T, checked: Result<&Order, &Refusal>, observed: &Observed, now: Timestamp) -> Planned {
    let Ok(order) = checked else {
        // What runs goes on: its inputs were good when it started. Only `suspend` is obeyed.
        let stopped = resource.common().suspend.unwrap_or(false);
        return Planned {
            suspend: toggles(observed, stopped),
            delete: if stopped { queued(observed) } else { Vec::new() },
            ..Planned::default()
        };
    };
    let none = RunStatus::default();
    let status = resource.status().map_or(&none, Status::run_status);
    let ledger = Ledger::read(&order.run_id, order.generation, status, observed, now);
    let phase = phase(order, &ledger, status, observed, now);
    let mut planned = Planned {
        delete: prune(order, &phase, status, observed),
        ..Planned::default()
    };
    match phase {
        Phase::Publishing(_) | Phase::Backoff { .. } | Phase::Failed(_) => {}
        Phase::Published | Phase::Superseding => {
            let outdated = observed
                .jobs
                .iter()
                .filter(|job| !ledger.is_current(job) && !attempt::finished(job));
            planned
                .delete
                .extend(outdated.filter(|job| !is_deleting(job)).filter_map(job_ref));
        }
        Phase::Suspended | Phase::Active(_) => planned.suspend = toggles(observed, order.suspend),
        Phase::Repin | Phase::Withdraw => {
            let job = ledger.job.as_ref().filter(|job| !is_deleting(job));
            planned.delete.extend(job.and_then(job_ref));
        }
        Phase::Start { attempt, image } => {
            planned.start = Some(start(order, attempt, &image, observed.has_jobset));
        }
    }
    planned
}

/// The objects of an attempt.
fn start(order: &Order, attempt: i32, image: &str, has_jobset: bool) -> job::Attempt {
    let config = StageConfig {
        contract_version: CONTRACT_VERSION,
        run: Run {
            id: order.run_id.clone(),
            attempt: attempt.unsigned_abs(),
            resource: order.resource.clone(),
            output: order.output.clone(),
        },
        stage: order.stage.clone(),
        container: order.container.as_ref().map(|container| container.run.clone()),
    };
    job::build(&job::JobParts {
        kind: order.kind,
        owner: &order.owner,
        config: &config,
        generation: order.generation,
        image,
        container: order
            .container
            .as_ref()
            .map(|container| (container, order.shim_image.as_str())),
        nodes: job::Nodes {
            count: order.nodes,
            in_jobset: has_jobset,
        },
        queue: order.queue.as_deref(),
        deadline_seconds: order.deadline_seconds,
        claims: &order.claims,
        sizes: order.sizes,
        placement: order.placement.as_ref(),
        overrides: &order.pod,
    })
}

fn is_deleting(job: &Job) -> bool {
    job.metadata.deletion_timestamp.is_some()
}

/// Unfinished Jobs whose `spec.suspend` is not what is wanted. A Job that somebody else suspended waits for them, and one in
/// a queue is Kueue's to suspend and to resume.
fn toggles(observed: &Observed, wanted: bool) -> Vec<(JobRef, bool)> {
    let is_ours = |job: &Job| job.annotations().contains_key(labels::SUSPENDED);
    observed
        .jobs
        .iter()
        .filter(|job| !attempt::finished(job) && !is_deleting(job) && attempt::is_suspended(job) != wanted)
        .filter(|job| attempt::queue(job).is_none())
        .filter(|job| wanted || is_ours(job))
        .filter_map(|job| Some((job_ref(job)?, wanted)))
        .collect()
}

/// Unfinished Jobs in a queue. Kueue would resume one that is suspended, so they are taken back instead.
fn queued(observed: &Observed) -> Vec<JobRef> {
    let is_queued = |job: &&Job| attempt::queue(job).is_some() && !attempt::finished(job) && !is_deleting(job);
    observed.jobs.iter().filter(is_queued).filter_map(job_ref).collect()
}

/// All Jobs, for a resource that has no run any more.
pub fn all_of(observed: &Observed) -> Vec<JobRef> {
    observed
        .jobs
        .iter()
        .filter(|job| !is_deleting(job))
        .filter_map(job_ref)
        .collect()
}

/// Finished Jobs that nobody needs any more. A Job whose end is not yet in the status is needed.
fn prune(order: &Order, phase: &Phase, status: &RunStatus, observed: &Observed) -> Vec<JobRef> {
    let mut finished: Vec<&Job> = observed
        .jobs
        .iter()
        .filter(|job| attempt::finished(job) && !is_deleting(job))
        .collect();
    finished.sort_by_key(|job| std::cmp::Reverse((job.metadata.creation_timestamp.clone(), attempt::number(job))));
    let (current, others): (Vec<&Job>, Vec<&Job>) = finished
        .into_iter()
        .partition(|job| label(job, labels::RUN) == order.run_id);
    let recorded = status
        .run
        .as_ref()
        .filter(|run| run.id == order.run_id)
        .map_or(0, |run| run.attempt);
    let kept_others = if *phase == Phase::Published { 0 } else { KEPT_JOBS };
    let old = current
        .into_iter()
        .skip(KEPT_JOBS)
        .filter(|job| attempt::number(job) < recorded);
    old.chain(others.into_iter().skip(kept_others))
        .filter_map(job_ref)
        .collect()
}

fn job_ref(job: &Job) -> Option<JobRef> {
    Some(JobRef {
        name: job.metadata.name.clone()?,
        uid: job.metadata.uid.clone()?,
        running: !attempt::finished(job),
        claims: job
            .spec
            .as_ref()
            .is_some_and(|spec| claim::of(&spec.template).is_some()),
        is_jobset: jobset::is_jobset(job),
    })
}
