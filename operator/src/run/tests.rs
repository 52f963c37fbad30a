//! What a run decides, as tables: how an attempt ended and what follows, what is started, kept and deleted.

mod ends;
mod gang;
mod ids;

use serde_json::json;
use strata_api::{AttemptOutcome, Reason, RunStatus};
use strata_contract::FailureReason;

use super::attempt::{State, state};
use super::phase::{Ledger, Phase, phase};
use super::{Order, check, label, plan, report};
use crate::engine::kind::{Kind, Observed, ResourceKind};
use crate::fixtures::{
    Attempt, IMAGE, NOW, at, at_attempt, attempt_of, bad_report, dataset, env, good_report, observe, published, started,
};

fn order(change: serde_json::Value) -> Order {
    check::check(&dataset("d", change), &Observed::default(), &env()).expect("a good spec")
}

/// The Job of an attempt of the run of `dataset("d", {})`.
fn job_of(attempt: i32) -> k8s_openapi::api::batch::v1::Job {
    let mut resource = dataset("d", json!({}));
    let id = order(json!({})).run_id;
    let mut status = at_attempt(&id, attempt - 1, 0);
    if attempt > 1 {
        let run = status.run.as_mut().expect("set above");
        run.failure = Some(super::attempt::vanished(attempt - 1, 1, at(NOW - 10_000)));
        resource.status = Some(status);
    }
    let checked = Ok(order(json!({})));
    let job = started(resource.plan(&checked, &Observed::default(), at(NOW)));
    assert_eq!(attempt_of(&job), attempt.to_string());
    job
}

#[test]
fn how_an_attempt_ended_decides_what_follows() {
    use AttemptOutcome::{Failed, Fatal, Interrupted};
    let text = |text: &str| text.to_owned();
    for (attempt, reason, outcome) in [
        (
            Attempt::Ended(64, "Error", bad_report(FailureReason::InputCorrupt)),
            Reason::InputCorrupt,
            Fatal,
        ),
        (
            Attempt::Ended(64, "Error", bad_report(FailureReason::GateFailed)),
            Reason::GateFailed,
            Fatal,
        ),
        (
            Attempt::Ended(64, "Error", text("not a report")),
            Reason::Internal,
            Fatal,
        ),
        (
            Attempt::Ended(70, "Error", bad_report(FailureReason::StorageFull)),
            Reason::StorageFull,
            Failed,
        ),
        (Attempt::Ended(101, "Error", text("a panic")), Reason::Internal, Failed),
        (Attempt::Ended(0, "Completed", text("")), Reason::Internal, Failed),
        (Attempt::Ended(137, "OOMKilled", text("")), Reason::OutOfMemory, Failed),
        (
            Attempt::Ended(75, "Error", bad_report(FailureReason::Interrupted)),
            Reason::Interrupted,
            Interrupted,
        ),
        (Attempt::Ended(75, "Error", text("")), Reason::Interrupted, Interrupted),
        (
            Attempt::Disrupted("PreemptionByScheduler", "preempted"),
            Reason::PodLost,
            Interrupted,
        ),
        (
            Attempt::Disrupted("TerminationByKubelet", "node is low on memory"),
            Reason::PodLost,
            Interrupted,
        ),
        (
            Attempt::Disrupted("TerminationByKubelet", "Usage of EmptyDir exceeds the limit"),
            Reason::PodLost,
            Failed,
        ),
        (Attempt::Gone("DeadlineExceeded"), Reason::DeadlineExceeded, Failed),
        (Attempt::Gone("BackoffLimitExceeded"), Reason::PodLost, Interrupted),
    ] {
        let mut observed = Observed::default();
        observe(&mut observed, &job_of(1), attempt, 5);
        match state(&observed.jobs[0], &observed.pods, at(NOW)) {
            State::Failed(failure, _) => {
                assert_eq!((failure.reason.as_str(), failure.outcome), (reason.name(), outcome));
                assert_eq!(failure.time.0, at(NOW - 5), "{failure:?}");
            }
            other => panic!("{reason:?}: {other:?}"),
        }
    }
}

#[test]
fn what_holds_a_pod_is_quoted() {
    for (attempt, reason, quote) in [
        (Attempt::NoPod, Reason::Pending, "quota"),
        (
            Attempt::Unscheduled("0/1 nodes are available: 1 Insufficient cpu."),
            Reason::Pending,
            "Insufficient cpu",
        ),
        (
            Attempt::Unscheduled("persistentvolumeclaim \"raw\" not found"),
            Reason::ClaimNotFound,
            "\"raw\"",
        ),
        (Attempt::Waiting("ErrImagePull"), Reason::ImagePullFailed, IMAGE),
        (Attempt::Waiting("ImagePullBackOff"), Reason::ImagePullFailed, IMAGE),
        (
            Attempt::Waiting("CreateContainerConfigError"),
            Reason::Pending,
            "CreateContainerConfigError",
        ),
    ] {
        let mut observed = Observed::default();
        observe(&mut observed, &job_of(1), attempt, 0);
        match state(&observed.jobs[0], &observed.pods, at(NOW)) {
            State::Waiting(got, message) => {
                assert_eq!(got, reason);
                assert!(message.contains(quote), "{message}");
            }
            other => panic!("{quote}: {other:?}"),
        }
    }
}

/// Phase of the run after one attempt, with what the status knew before.
fn phase_after(change: serde_json::Value, status: &RunStatus, attempt: i32, how: Attempt, ended: i64) -> Phase {
    let mut observed = Observed::default();
    observe(&mut observed, &job_of(attempt), how, ended);
    let order = order(change);
    let ledger = Ledger::read(&order.run_id, 1, status, &observed, at(NOW));
    phase(&order, &ledger, status, &observed, at(NOW))
}

#[test]
fn failures_are_retried_with_growing_pauses_until_the_budget_is_used_up() {
    let id = order(json!({})).run_id;
    let fails = || Attempt::Ended(70, "Error", bad_report(FailureReason::Internal));
    for (failures, pause_seconds) in [(0, 10), (1, 20), (2, 40)] {
        let before = at_attempt(&id, failures + 1, failures);
        match phase_after(json!({}), &before, failures + 1, fails(), 5) {
            Phase::Backoff { until, .. } => assert_eq!(until, at(NOW - 5 + pause_seconds)),
            other => panic!("{other:?}"),
        }
        let expected = Phase::Start {
            attempt: failures + 2,
            image: IMAGE.into(),
        };
        assert_eq!(
            phase_after(json!({}), &before, failures + 1, fails(), pause_seconds),
            expected
        );
    }
    let used_up = phase_after(json!({}), &at_attempt(&id, 4, 3), 4, fails(), 5);
    assert!(matches!(used_up, Phase::Failed(failure) if failure.reason == "Internal"));
    let none = phase_after(json!({"retries": 0}), &RunStatus::default(), 1, fails(), 5);
    assert!(matches!(none, Phase::Failed(_)));
}

#[test]
fn an_interruption_costs_no_retry_and_a_refused_input_has_none() {
    let id = order(json!({})).run_id;
    let before = at_attempt(&id, 9, 3);
    let interrupted = phase_after(json!({}), &before, 9, Attempt::Gone("BackoffLimitExceeded"), 100);
    assert!(
        matches!(interrupted, Phase::Start { attempt: 10, .. }),
        "{interrupted:?}"
    );
    let refused = Attempt::Ended(64, "Error", bad_report(FailureReason::InputNotFound));
    assert!(matches!(
        phase_after(json!({}), &RunStatus::default(), 1, refused, 10_000),
        Phase::Failed(_)
    ));
}

#[test]
fn what_was_judged_is_not_judged_again_when_job_or_pod_are_collected() {
    let resource = dataset("d", json!({"retries": 0}));
    let checked = resource.check(&Observed::default(), &env());
    let mut observed = Observed::default();
    observe(
        &mut observed,
        &job_of(1),
        Attempt::Ended(70, "Error", bad_report(FailureReason::StorageFull)),
        5,
    );
    let mut after = resource.clone();
    after.status = Some(resource.report(&checked, &observed, at(NOW)).status);
    for gone in [
        Observed {
            pods: Vec::new(),
            ..observed.clone()
        },
        Observed::default(),
    ] {
        assert_eq!(
            after.plan(&checked, &gone, at(NOW + 9999)),
            Default::default(),
            "nothing is started again"
        );
        assert_eq!(Some(after.report(&checked, &gone, at(NOW + 9999)).status), after.status);
    }
}

#[test]
fn a_lost_status_is_made_again_from_the_jobs_and_a_lost_job_is_an_interruption() {
    let mut observed = Observed::default();
    let fails = || Attempt::Ended(70, "Error", bad_report(FailureReason::Internal));
    observe(&mut observed, &job_of(1), fails(), 500);
    observe(&mut observed, &job_of(2), fails(), 400);
    observe(&mut observed, &job_of(3), Attempt::Running, 0);
    let order = order(json!({}));
    let ledger = Ledger::read(&order.run_id, 1, &RunStatus::default(), &observed, at(NOW));
    assert_eq!((ledger.attempt, ledger.failures, ledger.image.as_str()), (3, 2, IMAGE));
    let lost = Ledger::read(
        &order.run_id,
        1,
        &at_attempt(&order.run_id, 3, 2),
        &Observed::default(),
        at(NOW),
    );
    assert_eq!(lost.failures, 2);
    assert_eq!(
        lost.failure.map(|failure| failure.outcome),
        Some(AttemptOutcome::Interrupted)
    );
}

#[test]
fn a_published_run_starts_nothing_and_says_the_same_for_ever() {
    let resource = dataset("d", json!({}));
    let checked = resource.check(&Observed::default(), &env());
    let mut observed = Observed::default();
    observe(
        &mut observed,
        &job_of(1),
        Attempt::Ended(0, "Completed", good_report('a')),
        5,
    );
    let mut after = resource.clone();
    let first = resource.report(&checked, &observed, at(NOW)).status;
    let artifact = first.artifact.clone().expect("published");
    assert_eq!(artifact.digest, crate::fixtures::digest('a'));
    assert_eq!(first.metrics["loss"], "2.5");
    after.status = Some(first.clone());
    // Also by an operator with another image, and after the Job is gone.
    let newer = crate::engine::kind::Env {
        runtime_image: "strata-runtime:2".into(),
        ..env()
    };
    for observed in [observed, Observed::default()] {
        let checked = after.check(&observed, &newer);
        assert_eq!(after.plan(&checked, &observed, at(NOW + 60)), Default::default());
        assert_eq!(after.report(&checked, &observed, at(NOW + 60)).status, first);
    }
}

#[test]
fn a_run_keeps_its_image_unless_that_cannot_be_pulled() {
    let id = order(json!({})).run_id;
    let newer = |how: Attempt| {
        let mut observed = Observed::default();
        observe(&mut observed, &job_of(1), how, 100);
        let mut order = order(json!({}));
        order.image = "strata-runtime:2".into();
        let status = at_attempt(&id, 1, 0);
        let ledger = Ledger::read(&id, 1, &status, &observed, at(NOW));
        phase(&order, &ledger, &status, &observed, at(NOW))
    };
    assert!(matches!(newer(Attempt::Running), Phase::Active(State::Running(_))));
    let next = newer(Attempt::Ended(70, "Error", bad_report(FailureReason::Internal)));
    assert_eq!(
        next,
        Phase::Start {
            attempt: 2,
            image: IMAGE.into()
        }
    );
    assert_eq!(newer(Attempt::Waiting("ImagePullBackOff")), Phase::Repin);
}

#[test]
fn the_job_of_an_outdated_run_goes_before_the_new_one_starts() {
    let mut observed = Observed::default();
    observe(&mut observed, &job_of(1), Attempt::Running, 0);
    let mut resource = dataset("d", json!({"runGeneration": 1}));
    resource.status = Some(at_attempt(&order(json!({})).run_id, 1, 0));
    let checked = resource.check(&observed, &env());
    let planned = resource.plan(&checked, &observed, at(NOW));
    assert!(planned.start.is_none());
    assert_eq!(planned.delete.len(), 1);
    assert!(planned.delete[0].running, "its pods save their work first");
    observed.jobs[0].metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(at(NOW)));
    let waiting = resource.plan(&checked, &observed, at(NOW));
    assert!(waiting.start.is_none() && waiting.delete.is_empty(), "{waiting:?}");
    let gone = resource.plan(&checked, &Observed::default(), at(NOW));
    assert_eq!(attempt_of(&started(gone)), "1");
}

#[test]
fn a_spec_that_goes_back_to_what_is_published_stops_the_run_under_way() {
    let newer = dataset("d", json!({"runGeneration": 1}));
    let mut observed = Observed::default();
    let job = started(newer.plan(&newer.check(&observed, &env()), &observed, at(NOW)));
    observe(&mut observed, &job, Attempt::Running, 0);
    let mut back = dataset("d", json!({}));
    let mut status = at_attempt("the newer run", 1, 0);
    status.artifact = published('a').artifact.map(|artifact| strata_api::ArtifactStatus {
        run_id: order(json!({})).run_id,
        ..artifact
    });
    back.status = Some(status);
    let planned = back.plan(&back.check(&observed, &env()), &observed, at(NOW));
    assert!(planned.start.is_none());
    assert_eq!(planned.delete.iter().map(|job| job.running).collect::<Vec<_>>(), [true]);
}

#[test]
fn suspend_stops_the_job_and_false_lets_it_go_on() {
    let mut observed = Observed::default();
    observe(&mut observed, &job_of(1), Attempt::Running, 0);
    let suspended = dataset("d", json!({"suspend": true}));
    let checked = suspended.check(&observed, &env());
    assert_eq!(suspended.plan(&checked, &observed, at(NOW)).suspend.len(), 1);
    observed.jobs[0].spec.as_mut().expect("a Job has a spec").suspend = Some(true);
    assert!(suspended.plan(&checked, &observed, at(NOW)).suspend.is_empty());
    let ready = suspended
        .report(&checked, &observed, at(NOW))
        .status
        .conditions
        .pop()
        .expect("Ready is last");
    assert_eq!((ready.reason.as_str(), ready.status.as_str()), ("Suspended", "Unknown"));
    let mark = ("strata.dev/suspended".to_owned(), "true".to_owned());
    observed.jobs[0]
        .metadata
        .annotations
        .get_or_insert_default()
        .extend([mark]);
    let resumed = dataset("d", json!({}));
    let checked = resumed.check(&observed, &env());
    let planned = resumed.plan(&checked, &observed, at(NOW));
    assert_eq!(
        planned.suspend.iter().map(|(_, suspend)| *suspend).collect::<Vec<_>>(),
        [false]
    );
    // Nothing was started yet: nothing is.
    let checked = suspended.check(&Observed::default(), &env());
    assert_eq!(
        suspended.plan(&checked, &Observed::default(), at(NOW)),
        Default::default()
    );
}

#[test]
fn reports_are_kept_until_a_newer_run_published_and_then_the_old_jobs_go() {
    let mut observed = Observed::default();
    for attempt in 1..=5 {
        let fails = Attempt::Ended(70, "Error", bad_report(FailureReason::Internal));
        observe(&mut observed, &job_of(attempt), fails, 1000 - i64::from(attempt));
    }
    let id = order(json!({})).run_id;
    let names = |order: &Order, status: &RunStatus| {
        let mut resource = dataset("d", json!({}));
        resource.status = Some(status.clone());
        let planned = plan::plan(&resource, Ok(order), &observed, at(NOW));
        planned.delete.into_iter().map(|job| job.name).collect::<Vec<_>>()
    };
    let current = order(json!({"retries": 9}));
    let unrecorded = names(&current, &at_attempt(&id, 1, 0));
    assert!(
        unrecorded.is_empty(),
        "the status does not know their ends yet: {unrecorded:?}"
    );
    let recorded = names(&current, &at_attempt(&id, 5, 4));
    assert_eq!(recorded.len(), 2, "{recorded:?}");
    let newer = order(json!({"runGeneration": 7}));
    assert_eq!(
        names(&newer, &RunStatus::default()).len(),
        2,
        "the newer run has not published"
    );
    let mut done = at_attempt(&newer.run_id, 1, 0);
    done.artifact = published('a').artifact.map(|artifact| strata_api::ArtifactStatus {
        run_id: newer.run_id.clone(),
        ..artifact
    });
    assert_eq!(names(&newer, &done).len(), 5);
}

#[test]
fn ready_is_the_first_condition_that_does_not_hold_and_times_stay_while_nothing_changes() {
    let resource = dataset("d", json!({"pod": {"env": [{"name": "STRATA_X", "value": "1"}]}}));
    let checked = resource.check(&Observed::default(), &env());
    let mut after = resource.clone();
    after.status = Some(resource.report(&checked, &Observed::default(), at(NOW)).status);
    let conditions = &after.status.as_ref().expect("just set").conditions;
    let words: Vec<_> = conditions
        .iter()
        .map(|c| (c.type_.as_str(), c.status.as_str(), c.reason.as_str()))
        .collect();
    assert_eq!(
        words,
        [
            ("Accepted", "False", "SpecInvalid"),
            ("InputsReady", "Unknown", "Blocked"),
            ("Succeeded", "Unknown", "Blocked"),
            ("Ready", "False", "SpecInvalid"),
        ]
    );
    assert!(conditions[3].message.contains("STRATA_X"));
    assert_eq!(
        Some(after.report(&checked, &Observed::default(), at(NOW + 5)).status),
        after.status
    );
}

#[test]
fn progress_is_of_the_running_pod_and_goes_with_it() {
    let mut observed = Observed::default();
    observe(&mut observed, &job_of(1), Attempt::Running, 0);
    let said = strata_contract::Progress {
        done: 250,
        total: 1000,
        unit: "tokens".into(),
        activity: "training".into(),
    };
    let pod = observed.pods[0].metadata.uid.clone().expect("a pod has a UID");
    observed.progress.insert(pod, said);
    let resource = dataset("d", json!({}));
    let checked = resource.check(&observed, &env());
    let judged = report::judge(&resource, checked.as_ref(), &observed, at(NOW));
    assert_eq!(
        judged.status.progress.as_ref().map(|progress| progress.percent),
        Some(25)
    );
    assert_eq!(judged.requeue, Some(report::PROGRESS_PERIOD));
    let mut ended = Observed::default();
    observe(&mut ended, &job_of(1), Attempt::Ended(75, "Error", String::new()), 0);
    let mut after = resource.clone();
    after.status = Some(judged.finish(&[], at(NOW)));
    let checked = after.check(&ended, &env());
    assert_eq!(after.report(&checked, &ended, at(NOW)).status.progress, None);
}

#[test]
fn an_attempt_is_one_restricted_pod_with_its_configuration_and_claims() {
    let job = serde_json::to_value(job_of(1)).expect("a Job serializes");
    assert_eq!(job["spec"]["backoffLimit"], 0);
    assert_eq!(job["spec"]["podReplacementPolicy"], "Failed");
    let pod = &job["spec"]["template"]["spec"];
    assert_eq!(pod["restartPolicy"], "Never");
    assert_eq!(pod["automountServiceAccountToken"], false);
    assert_eq!(pod["securityContext"]["runAsNonRoot"], true);
    let container = &pod["containers"][0];
    assert_eq!(container["command"], json!(["strata-runtime", "curate"]));
    assert_eq!(container["securityContext"]["readOnlyRootFilesystem"], true);
    let mounts: Vec<_> = container["volumeMounts"]
        .as_array()
        .expect("mounts")
        .iter()
        .map(|mount| (mount["mountPath"].as_str().expect("a path"), mount["readOnly"] == true))
        .collect();
    assert_eq!(
        mounts,
        [
            ("/strata/volumes/artifacts", false),
            ("/strata/volumes/raw", true),
            ("/strata/config", true),
            ("/tmp", false),
        ]
    );
    assert_eq!(
        job["metadata"]["labels"]["strata.dev/kind"],
        ResourceKind::Dataset.name()
    );
    assert_eq!(job["metadata"]["ownerReferences"][0]["uid"], "uid-d");
}
