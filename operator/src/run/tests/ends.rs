//! How attempts end and what is done about it: new budgets, evictions, lost nodes, pods of others, Jobs of a queue.

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use serde_json::json;
use strata_api::{AttemptOutcome, Dataset, Reason};
use strata_contract::FailureReason;

use super::{job_of, order};
use crate::engine::kind::{Kind, Observed};
use crate::fixtures::{Attempt, NOW, at, attempt_of, bad_report, dataset, env, good_report, observe, started};
use crate::run::attempt::{State, pod_of, state};
use crate::run::phase::Ledger;

/// When attempts end here, and when any pause after that is over.
const ENDED: i64 = NOW - 5;
const LATER: i64 = NOW + 9999;

/// Starts the next attempt, lets it end like this, and writes the status. Returns its Job.
fn attempt(resource: &mut Dataset, observed: &mut Observed, how: Attempt) -> Job {
    let checked = resource.check(observed, &env());
    let job = started(resource.plan(&checked, observed, at(LATER)));
    observe(observed, &job, how, 5);
    resource.status = Some(resource.report(&checked, observed, at(ENDED)).status);
    job
}

fn ready(resource: &Dataset) -> (&str, &str) {
    let status = resource.status.as_ref().expect("it was reported");
    let ready = status.conditions.last().expect("Ready is last");
    (&ready.reason, &ready.status)
}

#[test]
fn a_change_of_the_spec_gives_a_run_that_used_up_its_retries_new_attempts() {
    let report = |code, reason| Attempt::Ended(code, "Error", bad_report(reason));
    for (how, reason, change, forgiven) in [
        (
            Attempt::Ended(137, "OOMKilled", String::new()),
            "OutOfMemory",
            json!({"pod": {"resources": {"limits": {"memory": "8Gi"}}}}),
            true,
        ),
        (
            Attempt::Gone("DeadlineExceeded"),
            "DeadlineExceeded",
            json!({"deadline": "2h"}),
            true,
        ),
        (
            report(70, FailureReason::StorageFull),
            "StorageFull",
            json!({"retries": 1}),
            true,
        ),
        (
            report(70, FailureReason::InputNotFound),
            "InputNotFound",
            json!({"retries": 1}),
            true,
        ),
        (
            report(64, FailureReason::InputCorrupt),
            "InputCorrupt",
            json!({"retries": 1}),
            false,
        ),
    ] {
        let (mut resource, mut observed) = (dataset("d", json!({"retries": 0})), Observed::default());
        attempt(&mut resource, &mut observed, how);
        assert_eq!(ready(&resource), (reason, "False"));
        let still = resource.plan(&resource.check(&observed, &env()), &observed, at(LATER));
        assert!(still.start.is_none(), "{reason}: nobody changed anything");

        let mut changed = dataset("d", change);
        changed.metadata.generation = Some(2);
        changed.status = resource.status.clone();
        let checked = changed.check(&observed, &env());
        let planned = changed.plan(&checked, &observed, at(LATER));
        assert_eq!(planned.start.is_some(), forgiven, "{reason}");
        let order = checked.expect("a good spec");
        let run = resource.status.and_then(|status| status.run).expect("a run");
        assert_eq!(order.run_id, run.id, "what was saved is gone on from");
        if let Some(next) = planned.start {
            assert_eq!(
                (attempt_of(&next.job), super::label(&next.job, "strata.dev/run")),
                ("2", run.id.as_str())
            );
        }
    }
}

#[test]
fn the_new_budget_is_used_up_in_its_turn_and_the_same_after_a_lost_status() {
    let ooms = || Attempt::Ended(137, "OOMKilled", String::new());
    let (mut resource, mut observed) = (dataset("d", json!({"retries": 1})), Observed::default());
    attempt(&mut resource, &mut observed, ooms());
    attempt(&mut resource, &mut observed, ooms());
    assert_eq!(ready(&resource), ("OutOfMemory", "False"));
    resource.metadata.generation = Some(2);
    attempt(&mut resource, &mut observed, ooms());
    assert_eq!(ready(&resource), ("Retrying", "Unknown"));
    attempt(&mut resource, &mut observed, ooms());
    assert_eq!(ready(&resource), ("OutOfMemory", "False"));
    let known = resource.status.and_then(|status| status.run).expect("a run");
    let lost = Ledger::read(&known.id, 2, &Default::default(), &observed, at(LATER));
    assert_eq!((lost.attempt, lost.failures), (4, 2));
    assert_eq!((known.attempt, known.failures), (4, 2));
}

#[test]
fn a_pod_that_outgrew_what_it_asked_for_is_not_evicted_for_ever() {
    use AttemptOutcome::{Failed, Interrupted};
    let low = "The node was low on resource: memory. Threshold quantity: 100Mi, available: 50Mi. ";
    for (message, reason, outcome) in [
        (
            format!("{low}Container strata was using 3Gi, request is 1Gi, has larger consumption of memory. "),
            Reason::OutOfMemory,
            Failed,
        ),
        (
            "The node was low on resource: ephemeral-storage. Container strata was using 9Gi, request is 0, has larger \
             consumption of ephemeral-storage. "
                .to_owned(),
            Reason::PodLost,
            Failed,
        ),
        (low.to_owned(), Reason::PodLost, Interrupted),
    ] {
        let mut observed = Observed::default();
        observe(
            &mut observed,
            &job_of(1),
            Attempt::Disrupted("TerminationByKubelet", message.leak()),
            5,
        );
        match state(&observed.jobs[0], &observed.pods, at(NOW)) {
            State::Failed(failure, _) => {
                assert_eq!((failure.reason.as_str(), failure.outcome), (reason.name(), outcome));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn interruptions_in_a_row_that_let_nothing_happen_count_in_the_end() {
    let preempted = || Attempt::Disrupted("PreemptionByScheduler", "preempted");
    let (mut resource, mut observed) = (dataset("d", json!({"retries": 0})), Observed::default());
    for number in 1..=20 {
        attempt(&mut resource, &mut observed, preempted());
        assert_eq!(ready(&resource), ("Interrupted", "Unknown"), "attempt {number}");
        observed = Observed::default();
    }
    let mut got_on = (resource.clone(), Observed::default());
    attempt(&mut resource, &mut observed, preempted());
    assert_eq!(ready(&resource), ("PodLost", "False"));

    // One that ran for an hour got on, however it ended.
    let (resource, observed) = (&mut got_on.0, &mut got_on.1);
    let checked = resource.check(observed, &env());
    let job = started(resource.plan(&checked, observed, at(LATER)));
    observe(observed, &job, preempted(), 5);
    observed.jobs[0].status.as_mut().expect("it ended").start_time = Some(Time(at(NOW - 3600)));
    resource.status = Some(resource.report(&checked, observed, at(ENDED)).status);
    assert_eq!(ready(resource), ("Interrupted", "Unknown"));
}

#[test]
fn a_pod_that_does_not_stop_is_said_with_what_to_do() {
    let mut observed = Observed::default();
    observe(&mut observed, &job_of(1), Attempt::Running, 0);
    for (stops_by, says) in [
        (None, "is running"),
        (Some(NOW - 30), "is running"),
        (Some(NOW - 90), "node n1 may be lost"),
    ] {
        observed.pods[0].metadata.deletion_timestamp = stops_by.map(|second| Time(at(second)));
        match state(&observed.jobs[0], &observed.pods, at(NOW)) {
            State::Running(message) => assert!(message.contains(says), "{message}"),
            State::Waiting(reason, message) => {
                assert_eq!(reason, Reason::PodLost);
                assert!(message.contains(says) && message.contains("--force"), "{message}");
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_report_is_believed_only_from_a_pod_that_the_job_owns() {
    let mut observed = Observed::default();
    observe(
        &mut observed,
        &job_of(1),
        Attempt::Ended(0, "Completed", good_report('a')),
        5,
    );
    let job = observed.jobs[0].clone();
    assert!(pod_of(&job, &observed.pods).is_some());
    let forged = &mut observed.pods[0].metadata;
    forged.owner_references = None;
    let uid = job.metadata.uid.clone().expect("a Job has a UID");
    forged.labels = Some([("batch.kubernetes.io/controller-uid".to_owned(), uid)].into());
    assert!(pod_of(&job, &observed.pods).is_none());
}

#[test]
fn a_job_that_somebody_else_suspended_is_left_to_them() {
    let mut observed = Observed::default();
    observe(&mut observed, &job_of(1), Attempt::NoPod, 0);
    observed.jobs[0].spec.as_mut().expect("a Job has a spec").suspend = Some(true);
    for (mark, resumed) in [(None, 0), (Some("strata.dev/suspended"), 1)] {
        let annotations = observed.jobs[0].metadata.annotations.get_or_insert_default();
        annotations.extend(mark.map(|mark| (mark.to_owned(), "true".to_owned())));
        // Also while an input is not there: what began goes on.
        for checked in [
            Ok(order(json!({}))),
            Err(crate::engine::kind::Refusal::Inputs(
                Reason::WaitingForInput,
                String::new(),
            )),
        ] {
            let planned = dataset("d", json!({})).plan(&checked, &observed, at(NOW));
            assert_eq!(planned.suspend.len(), resumed, "{mark:?}");
        }
    }
    match state(&observed.jobs[0], &[], at(NOW)) {
        State::Waiting(Reason::Pending, message) => assert!(message.contains("Kueue"), "{message}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn ready_is_decided_by_what_needs_a_person_before_what_goes_on_by_itself() {
    use crate::run::conditions::{Finding, merge};
    use strata_api::ConditionType::{Accepted, Available, InputsReady, Succeeded};
    for (reasons, decisive) in [
        (
            [
                Reason::SpecAccepted,
                Reason::WaitingForInput,
                Reason::Blocked,
                Reason::CrashLooping,
            ],
            "CrashLooping",
        ),
        (
            [
                Reason::SpecAccepted,
                Reason::InputsResolved,
                Reason::Running,
                Reason::Serving,
            ],
            "Running",
        ),
        (
            [
                Reason::SpecAccepted,
                Reason::InputsResolved,
                Reason::GateFailed,
                Reason::CrashLooping,
            ],
            "GateFailed",
        ),
        (
            [
                Reason::SpecAccepted,
                Reason::InputsResolved,
                Reason::Published,
                Reason::Serving,
            ],
            "Serving",
        ),
    ] {
        let kinds = [Accepted, InputsReady, Succeeded, Available];
        let findings = kinds
            .into_iter()
            .zip(reasons)
            .map(|(kind, reason)| Finding::new(kind, reason, ""));
        let merged = merge(&findings.collect::<Vec<_>>(), &[], None, Timestamp::UNIX_EPOCH);
        assert_eq!(merged.last().map(|ready| ready.reason.as_str()), Some(decisive));
    }
}

#[test]
fn what_was_published_before_is_remembered_so_that_it_can_be_pinned() {
    let mut resource = dataset("d", json!({}));
    for c in "abcdef0123456a".chars() {
        let generation = resource.spec.common.run_generation.unwrap_or(0) + 1;
        resource.spec.common.run_generation = Some(generation);
        let mut observed = Observed::default();
        attempt(
            &mut resource,
            &mut observed,
            Attempt::Ended(0, "Completed", good_report(c)),
        );
    }
    let status = resource.status.expect("published");
    let short = |artifact: &strata_api::ArtifactStatus| artifact.digest.chars().nth(7).expect("a digest");
    assert_eq!(status.artifact.as_ref().map(short), Some('a'));
    let previous: String = status.previous_artifacts.iter().map(short).collect();
    assert_eq!(previous, "6543210fed", "the newest first, ten of them, none twice");
}
