//! The engine against an API server in memory: a crash after every write leads to the same end.

mod server;

use std::sync::Arc;

use kube::client::ClientBuilder;
use kube::runtime::events::{Recorder, Reporter};
use serde_json::json;
use strata_api::{Dataset, InferenceService, PretrainJob};

use super::guard::{GuardLayer, Leadership};
use super::kind::ResourceKind;
use super::reconcile::{Context, reconcile};
use super::{index::Index, progress::Poller};
use crate::fixtures::{dataset, env, inference, key, pretrain};
use crate::metrics::Metrics;
use server::Server;

/// Rounds of reconciles and controllers in which every run of these tests comes to its end.
const ROUNDS: usize = 30;

/// An operator that has just started: nothing in memory.
fn operator(server: &Arc<Server>, leads: bool) -> Context {
    let leadership = Leadership::default();
    leadership.set(leads);
    let client = ClientBuilder::new(server.service(), "ns")
        .with_layer(&GuardLayer(leadership))
        .build();
    let reporter = Reporter {
        controller: "strata-operator".into(),
        instance: None,
    };
    Context {
        client: client.clone(),
        env: env(),
        index: Arc::default(),
        poller: Poller::default(),
        recorder: Recorder::new(client, reporter),
        metrics: Arc::new(Metrics::new().expect("metrics register")),
    }
}

/// A server with a Dataset, a PretrainJob on it whose first attempt fails, and a service of its model.
fn world() -> Arc<Server> {
    let server = Server::new();
    server.add("datasets", json!(dataset("plays", json!({}))));
    server.add("pretrainjobs", json!(pretrain("bard", json!({}))));
    server.add("inferenceservices", json!(inference("chat", json!({}))));
    server.fail_first("bard");
    Arc::new(server)
}

/// One reconcile of each resource; whether all went well.
async fn round(context: &Context) -> bool {
    let results = [
        reconcile::<Dataset>(&key(ResourceKind::Dataset, "plays"), context)
            .await
            .is_ok(),
        reconcile::<PretrainJob>(&key(ResourceKind::PretrainJob, "bard"), context)
            .await
            .is_ok(),
        reconcile::<InferenceService>(&key(ResourceKind::InferenceService, "chat"), context)
            .await
            .is_ok(),
    ];
    results.iter().all(|ok| *ok)
}

/// Reconciles until the end; an operator that meets an error is replaced by a new one.
async fn live(server: &Arc<Server>) {
    let mut context = operator(server, true);
    for _ in 0..ROUNDS {
        if !round(&context).await {
            context = operator(server, true);
        }
        server.controllers();
    }
}

#[tokio::test]
async fn a_crash_after_any_write_ends_as_a_life_without_one() {
    let good = world();
    live(&good).await;
    let end = good.picture();
    for (name, reason) in [
        ("datasets/plays", "Published"),
        ("pretrainjobs/bard", "Published"),
        ("inferenceservices/chat", "Serving"),
    ] {
        assert_eq!(
            end[name]["status"]["conditions"]
                .as_array()
                .and_then(|all| all.last())
                .expect("Ready")["reason"],
            reason,
            "{name}"
        );
    }
    assert_eq!(end["pretrainjobs/bard"]["status"]["run"]["attempt"], 2);
    assert_eq!(end["pretrainjobs/bard"]["status"]["run"]["failures"], 1);
    let writes = good.writes();
    assert!(writes > 10, "{writes}");

    for crash in 1..=writes {
        // The write is done, but its answer never comes.
        let server = world();
        server.crash_after(crash);
        live(&server).await;
        assert_eq!(server.picture(), end, "crash after write {crash} of {writes}");
    }
}

#[tokio::test]
async fn when_all_is_done_nothing_is_written() {
    let server = world();
    live(&server).await;
    let before = server.writes();
    for _ in 0..10 {
        // Each time a new operator: nothing may hang on what one has in memory.
        assert!(round(&operator(&server, true)).await);
    }
    assert_eq!(server.writes(), before);
}

#[tokio::test]
async fn who_does_not_lead_writes_nothing() {
    let server = world();
    assert!(!round(&operator(&server, false)).await);
    assert_eq!(server.writes(), 0);
}

#[tokio::test]
async fn an_object_of_that_name_that_is_not_ours_is_left_alone() {
    let server = world();
    let theirs = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "chat", "namespace": "ns"},
        "spec": {"selector": {}, "template": {}}});
    server.add("deployments", theirs);
    let before = server.picture()["deployments/chat"].clone();
    live(&server).await;
    assert_eq!(server.picture()["deployments/chat"], before);
}

#[tokio::test]
async fn a_resource_that_does_not_parse_is_an_error_of_its_own_and_wakes_go_by_references() {
    let server = world();
    let mut odd = json!(dataset("odd", json!({})));
    odd["spec"] = json!({"task": "FromTheFuture"});
    server.add("datasets", odd);
    let context = operator(&server, true);
    let error = reconcile::<Dataset>(&key(ResourceKind::Dataset, "odd"), &context)
        .await
        .expect_err("unparseable");
    assert_eq!(error.reason(), "Unparseable");
    assert!(round(&context).await, "the others go on");
    let index: &Index = &context.index;
    assert_eq!(
        index.dependents(&key(ResourceKind::Dataset, "plays")),
        [key(ResourceKind::PretrainJob, "bard")]
    );
}
