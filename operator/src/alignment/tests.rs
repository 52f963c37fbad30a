//! An AlignmentJob's inputs and references: bases of three kinds, tasks that fit, circles.

use serde_json::json;
use strata_api::Reason;
use strata_contract::{Stage, Task};

use crate::engine::kind::{Kind, Observed, Refusal, ResourceKind, Upstream};
use crate::fixtures::{alignment, digest, env, published, to};

fn observed(all: &[(ResourceKind, &str, Upstream)]) -> Observed {
    Observed {
        upstream: all
            .iter()
            .map(|(kind, name, upstream)| (to(*kind, name), upstream.clone()))
            .collect(),
        ..Observed::default()
    }
}

#[test]
fn base_capability_and_preferences_arrive_where_they_belong() {
    let job = alignment(
        "a",
        json!({
            "base": {"uri": null, "pretrainJob": {"name": "bard"}},
            "evaluate": {"capability": {"dataset": {"name": "plays"}}},
        }),
    );
    let around = observed(&[
        (ResourceKind::PretrainJob, "bard", published('b')),
        (ResourceKind::Dataset, "plays", published('c')),
        (ResourceKind::Dataset, "preferences", published('d')),
    ]);
    let order = job.check(&around, &env()).expect("a good spec");
    let Stage::Align(config) = order.stage else {
        panic!("not align")
    };
    assert_eq!(config.base.digest, Some(digest('b')));
    assert_eq!(
        config.evaluation.capability.and_then(|input| input.digest),
        Some(digest('c'))
    );
    assert_eq!(config.datasets.len(), 1);
    assert_eq!(config.datasets[0].digest, Some(digest('d')));
    assert_eq!(
        (config.adapter.alpha, config.evaluation.capability_tokens),
        (32.0, 8192)
    );
}

#[test]
fn data_of_the_wrong_task_is_refused() {
    let plays = Upstream {
        dataset: Some((Task::Pretraining, true)),
        ..published('a')
    };
    let around = observed(&[(ResourceKind::Dataset, "preferences", plays)]);
    match alignment("a", json!({})).check(&around, &env()) {
        Err(Refusal::Spec(Reason::SpecInvalid, message)) => {
            assert!(message.contains("needs task Preference"), "{message}")
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_circle_is_named_though_every_part_of_it_has_published() {
    let on = |name: &str| json!({"base": {"uri": null, "alignmentJob": {"name": name}}});
    let seen = |name: &str| Upstream {
        refs: alignment("x", on(name)).refs(),
        ..published('a')
    };
    let around = observed(&[
        (ResourceKind::AlignmentJob, "b", seen("c")),
        (ResourceKind::AlignmentJob, "c", seen("a")),
        (ResourceKind::Dataset, "preferences", published('d')),
    ]);
    match alignment("a", on("b")).check(&around, &env()) {
        Err(Refusal::Spec(Reason::ReferenceCycle, message)) => {
            let way = "AlignmentJob/a → AlignmentJob/b → AlignmentJob/c → AlignmentJob/a";
            assert!(message.contains(way), "{message}");
        }
        other => panic!("{other:?}"),
    }
    assert!(
        alignment("d", on("c")).check(&around, &env()).is_ok(),
        "a chain beside a circle is not one"
    );
}
