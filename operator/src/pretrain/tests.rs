//! A PretrainJob's inputs: waiting, pinning, and what a new publication does.

use serde_json::json;
use strata_api::Reason;
use strata_contract::{Stage, Task};

use crate::engine::kind::{Kind, Observed, Refusal, ResourceKind, Upstream};
use crate::fixtures::{digest, env, pretrain, published, to};

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
