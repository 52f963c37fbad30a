//! A PretrainJob's inputs: waiting, pinning, and what a new publication does.

use k8s_openapi::api::batch::v1::Job;
use serde_json::json;
use strata_api::{InputStatus, PretrainJob, Reason, RunStatus};
use strata_contract::{FailureReason, Input, Report, Resource, Stage, Task};

use crate::engine::kind::{Kind, Observed, Refusal, ResourceKind, Upstream};
use crate::fixtures::{
    Attempt, NOW, at, bad_report, digest, env, good_report, observe, pretrain, published, started, to,
};

fn with(upstream: Upstream) -> Observed {
    let plays = to(ResourceKind::Dataset, "plays");
    Observed {
        upstream: [(plays, upstream)].into(),
        ..Observed::default()
    }
}

#[test]
fn it_waits_for_its_data_set_and_says_for_what() {
    let not_ready = Some(("Running".to_owned(), "attempt 1 is running".to_owned()));
    let waits = Upstream {
        not_ready,
        ..Upstream::default()
    };
    let pinned = json!({"datasets": [{"name": "plays", "digest": digest('b')}]});
    for (change, observed, reason, says) in [
        (
            json!({}),
            Observed::default(),
            Reason::ReferenceNotFound,
            "Dataset/plays",
        ),
        (
            json!({}),
            with(waits),
            Reason::WaitingForInput,
            "Running: attempt 1 is running",
        ),
        (pinned, with(published('a')), Reason::DigestNotFound, "pinned"),
    ] {
        match pretrain("p", change).check(&observed, &env()) {
            Err(Refusal::Inputs(got, message)) => {
                assert_eq!(got, reason, "{message}");
                assert!(message.contains(says), "{message}");
            }
            other => panic!("{says}: {other:?}"),
        }
    }
}

#[test]
fn a_pinned_digest_is_found_in_what_was_read_or_published_before() {
    let pinned = |c| pretrain("p", json!({"datasets": [{"name": "plays", "digest": digest(c)}]}));
    let read = |c| {
        let mut job = pinned(c);
        job.status = Some(RunStatus {
            inputs: vec![InputStatus {
                name: "plays".into(),
                uri: format!("pvc://artifacts/ns/x/{c}"),
                digest: Some(digest(c)),
                resource: Some("Dataset/plays".into()),
            }],
            ..RunStatus::default()
        });
        job
    };
    let went_on = Upstream {
        previous: vec![
            published('b').artifact.expect("published"),
            published('a').artifact.expect("published"),
        ],
        ..published('c')
    };
    for (job, observed, found) in [
        (pinned('c'), with(went_on.clone()), Ok("pvc://artifacts/ns/x/c")),
        (pinned('a'), with(went_on.clone()), Ok("pvc://artifacts/ns/x/a")),
        (pinned('d'), with(went_on), Err(Reason::DigestNotFound)),
        (read('a'), with(published('c')), Ok("pvc://artifacts/ns/x/a")),
        (read('a'), Observed::default(), Ok("pvc://artifacts/ns/x/a")),
        (pinned('a'), Observed::default(), Err(Reason::ReferenceNotFound)),
    ] {
        let got = match job.check(&observed, &env()) {
            Ok(order) => Ok(order.inputs[0].uri.to_string()),
            Err(Refusal::Inputs(reason, _)) => Err(reason),
            Err(other) => panic!("{other:?}"),
        };
        assert_eq!(got, found.map(str::to_owned));
    }
}

/// A PretrainJob whose first attempt began with the data set `plays`.
fn begun() -> (PretrainJob, Job) {
    let mut job = pretrain("p", json!({"retries": 0}));
    let mut observed = with(published('a'));
    let checked = job.check(&observed, &env());
    let attempt = started(job.plan(&checked, &observed, at(NOW)));
    observe(&mut observed, &attempt, Attempt::Running, 0);
    job.status = Some(job.report(&checked, &observed, at(NOW)).status);
    (job, attempt)
}

/// The job after a reconcile that no longer finds the data set.
fn without_data(job: &PretrainJob, observed: &Observed) -> PretrainJob {
    let mut after = job.clone();
    let checked = job.check(observed, &env());
    let planned = job.plan(&checked, observed, at(NOW));
    assert!(planned.start.is_none() && planned.delete.is_empty(), "{planned:?}");
    after.status = Some(job.report(&checked, observed, at(NOW)).status);
    after
}

fn condition<'a>(job: &'a PretrainJob, kind: &str) -> &'a str {
    let conditions = &job.status.as_ref().expect("reported").conditions;
    let found = conditions.iter().find(|condition| condition.type_ == kind);
    found.map_or("", |condition| condition.reason.as_str())
}

#[test]
fn how_an_attempt_ends_is_not_lost_when_its_data_sets_resource_is_deleted_meanwhile() {
    let after = |how: Attempt| {
        let (job, attempt) = begun();
        let mut gone = Observed::default();
        observe(&mut gone, &attempt, how, 5);
        without_data(&job, &gone)
    };
    let running = after(Attempt::Running);
    assert_eq!(condition(&running, "InputsReady"), "ReferenceNotFound");
    assert_eq!(condition(&running, "Succeeded"), "Running");

    let failed = after(Attempt::Ended(70, "Error", bad_report(FailureReason::StorageFull)));
    let run = failed
        .status
        .as_ref()
        .and_then(|status| status.run.clone())
        .expect("a run");
    assert_eq!(
        run.failure.map(|failure| failure.reason),
        Some("StorageFull".to_owned())
    );
    assert_eq!(run.failures, 1);

    let mut report: Report = serde_json::from_str(&good_report('f')).expect("a report");
    report.inputs = vec![Input {
        name: "plays".into(),
        uri: "pvc://artifacts/ns/x/a".parse().expect("a valid uri"),
        digest: Some(digest('a')),
        bytes: None,
        resource: Some(Resource {
            kind: "Dataset".into(),
            namespace: "ns".into(),
            name: "plays".into(),
        }),
    }];
    let finished = after(Attempt::Ended(0, "Completed", report.to_termination_message()));
    let status = finished.status.as_ref().expect("reported");
    assert_eq!(
        status.artifact.as_ref().map(|artifact| &artifact.digest),
        Some(&digest('f'))
    );
    // From then on it is known what it was made from: it stays Ready, but nothing new starts from what is gone.
    let stays = without_data(&finished, &Observed::default());
    assert_eq!(condition(&stays, "Ready"), "Published");
    let mut pins_another = stays.clone();
    pins_another.spec.datasets[0].digest = Some(digest('d'));
    let pins_another = without_data(&pins_another, &with(published('a')));
    assert_eq!(condition(&pins_another, "Ready"), "DigestNotFound");
    let mut changed = stays;
    changed.spec.training.seed = Some(5);
    assert_eq!(
        condition(&without_data(&changed, &Observed::default()), "Ready"),
        "ReferenceNotFound"
    );
}

#[test]
fn a_wrong_spec_is_named_before_its_inputs_are_there() {
    let preferences = Upstream {
        dataset: Some((Task::Preference, false)),
        ..Upstream::default()
    };
    let no_tokens = Upstream {
        dataset: Some((Task::Pretraining, false)),
        ..Upstream::default()
    };
    for (change, observed, says) in [
        (
            json!({"training": {"batchTokens": 128}}),
            Observed::default(),
            "spec.training.batchTokens",
        ),
        (
            json!({"training": {"learningRate": "-1"}}),
            Observed::default(),
            "spec.training.learningRate",
        ),
        (
            json!({"checkpoint": {"every": "0s"}}),
            Observed::default(),
            "spec.checkpoint.every",
        ),
        (json!({}), with(preferences), "task Preference"),
        (json!({}), with(no_tokens), "spec.encode"),
    ] {
        match pretrain("p", change).check(&observed, &env()) {
            Err(Refusal::Spec(Reason::SpecInvalid, message)) => assert!(message.contains(says), "{message}"),
            other => panic!("{says}: {other:?}"),
        }
    }
}

#[test]
fn a_new_publication_makes_a_new_run_and_how_often_to_save_does_not() {
    let id = |change, observed| {
        pretrain("p", change)
            .check(&observed, &env())
            .expect("a good spec")
            .run_id
    };
    let first = id(json!({}), with(published('a')));
    assert_ne!(id(json!({}), with(published('b'))), first);
    assert_eq!(id(json!({"checkpoint": {"every": "30s"}}), with(published('a'))), first);
    let mut moved = published('a');
    moved.artifact.as_mut().expect("published").uri = "pvc://elsewhere/x".into();
    assert_eq!(
        id(json!({}), with(moved)),
        first,
        "the digest says what it is, not the place"
    );
}

#[test]
fn the_stage_gets_the_artifact_with_its_digest_and_a_whole_shape() {
    let order = pretrain("p", json!({}))
        .check(&with(published('a')), &env())
        .expect("a good spec");
    let Stage::Pretrain(config) = order.stage else {
        panic!("not pretrain")
    };
    assert_eq!(config.datasets[0].digest, Some(digest('a')));
    assert_eq!(config.datasets[0].uri.to_string(), "pvc://artifacts/ns/x/a");
    assert_eq!(
        (config.model.intermediate_size, config.model.tie_embeddings),
        (512, true)
    );
    assert_eq!((config.training.warmup_percent, config.training.weight_decay), (2, 0.1));
    assert_eq!((config.checkpoint.every_seconds, config.checkpoint.keep), (600, 2));
}
