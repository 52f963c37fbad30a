//! From a Dataset's spec to its stage: defaults, refusals, and what makes another run.

use serde_json::json;
use strata_api::Reason;
use strata_contract::{Packing, PiiAction, SourceFormat, Stage};

use crate::engine::kind::{Env, Kind, Observed, Refusal};
use crate::fixtures::{dataset, env};
use crate::run::Order;

fn order(change: serde_json::Value) -> Order {
    dataset("d", change)
        .check(&Observed::default(), &env())
        .expect("a good spec")
}

#[test]
fn a_spec_becomes_a_stage_with_its_defaults() {
    let order = order(json!({
        "curate": {
            "languages": [{"code": "en"}],
            "quality": {"preset": "FineWeb", "overrides": [
                {"rule": "C4ShortLine", "disabled": true}, {"rule": "GopherAlphabeticWords", "threshold": "0.7"}]},
            "deduplicate": {"minHash": {"similarityPercent": 80}},
        },
        "gates": [{"metric": "documentsKept", "min": "400"}],
    }));
    assert_eq!(
        order.output.to_string(),
        format!("pvc://artifacts/ns/dataset/d/{}", order.run_id)
    );
    let Stage::Curate(config) = order.stage else {
        panic!("not curate")
    };
    assert_eq!(
        config.sources[0].format,
        SourceFormat::Text {
            split_bytes: Some(2000)
        }
    );
    assert_eq!(config.languages[0].min_confidence_percent, 65);
    let quality = config.quality.expect("quality is set");
    assert_eq!(
        quality
            .overrides
            .iter()
            .map(|change| change.threshold)
            .collect::<Vec<_>>(),
        [None, Some(0.7)]
    );
    assert_eq!(
        (config.deduplicate_exact, config.min_hash_similarity_percent),
        (false, Some(80))
    );
    assert_eq!(
        (config.pii, config.held_out_percent, config.seed),
        (PiiAction::Keep, 0, 0)
    );
    assert_eq!(config.encode.map(|encode| encode.packing), Some(Packing::BestFit));
    assert_eq!(config.card.title, "d");
    assert_eq!(config.gates[0].min, Some(400.0));
}

#[test]
fn only_what_determines_the_result_makes_another_run() {
    let id = order(json!({})).run_id;
    assert_eq!(id.len(), 16);
    for same in [
        json!({"retries": 9}),
        json!({"deadline": "1h"}),
        json!({"suspend": true}),
        json!({"pod": {"nodeSelector": {"a": "b"}}}),
        json!({"split": {"heldOutPercent": 0, "seed": 0}}),
        json!({"encode": {"sequence": {"packing": "BestFit"}}}),
    ] {
        assert_eq!(order(same.clone()).run_id, id, "{same}");
    }
    for other in [
        json!({"runGeneration": 1}),
        json!({"split": {"heldOutPercent": 0, "seed": 1}}),
        json!({"encode": {"sequence": {"lengthTokens": 512}}}),
        json!({"gates": [{"metric": "documentsKept", "min": "1"}]}),
        json!({"sources": [{"name": "a", "webCrawl": {"uri": "pvc://raw/a.txt"}}]}),
    ] {
        assert_ne!(order(other.clone()).run_id, id, "{other}");
    }
    let newer = Env {
        runtime_image: "strata-runtime:2".into(),
        ..env()
    };
    let upgraded = dataset("d", json!({}))
        .check(&Observed::default(), &newer)
        .expect("a good spec");
    assert_eq!(upgraded.run_id, id);
}

#[test]
fn what_the_schema_cannot_say_is_refused_with_what_to_write() {
    let no_storage = Env {
        default_storage: None,
        ..env()
    };
    for (name, change, env, reason, says) in [
        ("Dots.d", json!({}), env(), Reason::SpecInvalid, "metadata.name"),
        ("d", json!({}), no_storage, Reason::StorageMissing, "spec.storage.uri"),
        (
            "d",
            json!({"storage": {"uri": "s3://b"}}),
            env(),
            Reason::SpecInvalid,
            "pvc://CLAIM",
        ),
        (
            "d",
            json!({"deadline": "0s"}),
            env(),
            Reason::SpecInvalid,
            "spec.deadline",
        ),
        (
            "d",
            json!({"pod": {"labels": {"strata.dev/run": "x"}}}),
            env(),
            Reason::SpecInvalid,
            "strata.dev/run",
        ),
        (
            "d",
            json!({"sources": [{"name": "a"}]}),
            env(),
            Reason::SpecInvalid,
            "exactly one of",
        ),
        (
            "d",
            json!({"gates": [{"metric": "m", "min": "1e999"}]}),
            env(),
            Reason::SpecInvalid,
            "gates[m].min",
        ),
    ] {
        match dataset(name, change).check(&Observed::default(), &env) {
            Err(Refusal::Spec(got, message)) => {
                assert_eq!(got, reason, "{message}");
                assert!(message.contains(says), "{message}");
            }
            other => panic!("{says}: {other:?}"),
        }
    }
}
