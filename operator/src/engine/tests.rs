//! The engine against an API server in memory: a crash after every write leads to the same end.

mod caches;
mod claims;
pub mod server;
mod watches;

use std::sync::Arc;

use kube::client::ClientBuilder;
use serde_json::json;
use strata_api::{Dataset, InferenceService, PretrainJob};

use super::backoff::Failures;
use super::cache::Caches;
use super::events::Recorder;
use super::guard::{GuardLayer, Leadership};
use super::kind::ResourceKind;
use super::progress::Poller;
use super::reconcile::{Context, reconcile};
use super::watch::Wake;
use crate::autoscale::scrape::Scraper;
use crate::fixtures::{dataset, env, inference, key, pretrain};
use crate::metrics::Metrics;
use caches::Follower;
use server::Server;

/// Rounds of reconciles and controllers in which every run of these tests comes to its end.
const ROUNDS: usize = 30;

/// What an operator has in memory that has just started: nothing.
fn context(server: &Arc<Server>, leads: bool) -> Context {
    let leadership = Leadership::default();
    leadership.set(leads);
    let client = ClientBuilder::new(server.service(), "ns")
        .with_layer(&GuardLayer(leadership))
        .build();
    Context {
        client: client.clone(),
        env: env(),
        caches: Caches::default(),
        index: Arc::default(),
        fleet: super::nodes::Nodes::default(),
        failures: Failures::default(),
        provisioners: super::provision::Provisioners::default(),
        poller: Poller::new(Wake::default()),
        scraper: Scraper::new(Wake::default()).expect("a client"),
        recorder: Recorder::new(client, "strata-operator", "one"),
        metrics: Arc::new(Metrics::new().expect("metrics register")),
    }
}

/// An operator that has just started and listed everything; its watches tell it all at once.
fn operator(server: &Arc<Server>, leads: bool) -> Follower {
    Follower::start(server, context(server, leads))
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
async fn round(operator: &mut Follower) -> bool {
    let mut all = true;
    for (kind, name) in [
        (ResourceKind::Dataset, "plays"),
        (ResourceKind::PretrainJob, "bard"),
        (ResourceKind::InferenceService, "chat"),
    ] {
        operator.follow();
        all &= reconcile_one(&operator.context, kind, name).await;
    }
    all
}

async fn reconcile_one(context: &Context, kind: ResourceKind, name: &str) -> bool {
    let key = key(kind, name);
    let result = match kind {
        ResourceKind::Dataset => reconcile::<Dataset>(&key, context).await,
        ResourceKind::PretrainJob => reconcile::<PretrainJob>(&key, context).await,
        _ => reconcile::<InferenceService>(&key, context).await,
    };
    result.is_ok()
}

/// Reconciles until the end; an operator that meets an error is replaced by a new one.
async fn live(server: &Arc<Server>) {
    let mut operator = self::operator(server, true);
    for _ in 0..ROUNDS {
        if !round(&mut operator).await {
            operator = self::operator(server, true);
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
        assert!(round(&mut operator(&server, true)).await);
    }
    assert_eq!(server.writes(), before);
}

#[tokio::test]
async fn the_metrics_say_what_needs_a_person_until_it_is_put_right() {
    let server = world();
    live(&server).await;
    let mut operator = operator(&server, true);
    let metrics = operator.context.metrics.clone();
    let series = || {
        let text = metrics.render().expect("metrics are written");
        let ours = text.lines().filter(|line| line.starts_with("strata_resources{"));
        ours.map(str::to_owned).collect::<Vec<_>>()
    };
    let line = |kind: &str, ready: &str, reason: &str| {
        format!("strata_resources{{kind=\"{kind}\",ready=\"{ready}\",reason=\"{reason}\"}} 1")
    };
    let others = [
        line("Dataset", "True", "Published"),
        line("PretrainJob", "True", "Published"),
    ];
    assert!(round(&mut operator).await);
    let good = line("InferenceService", "True", "Serving");
    assert_eq!(series(), [others[0].clone(), good.clone(), others[1].clone()]);
    server.remove("services/chat");
    server.refuse("services", Some((422, "no room")));
    assert!(!round(&mut operator).await);
    let bad = line("InferenceService", "False", "Refused");
    assert_eq!(series(), [others[0].clone(), bad, others[1].clone()]);
    server.refuse("services", None);
    assert!(round(&mut operator).await);
    assert_eq!(series(), [others[0].clone(), good, others[1].clone()]);
}

#[tokio::test]
async fn who_does_not_lead_writes_nothing() {
    let server = world();
    assert!(!round(&mut operator(&server, false)).await);
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
    let (reason, message) = condition(&server, "inferenceservices/chat", "Available");
    assert_eq!(reason, "NameTaken");
    assert!(
        message.starts_with("the Deployment chat belongs to something else: delete it"),
        "{message}"
    );
    let (reason, _) = condition(&server, "inferenceservices/chat", "Succeeded");
    assert_eq!(reason, "Published", "what was published is recorded in any case");
    assert!(server.object("inferenceservices/chat")["status"]["artifact"]["digest"].is_string());

    server.remove("deployments/chat");
    live(&server).await;
    assert_eq!(condition(&server, "inferenceservices/chat", "Ready").0, "Serving");
}

#[tokio::test]
async fn what_is_left_of_a_resource_of_the_same_name_is_waited_for() {
    let server = world();
    let owner =
        json!({"apiVersion": "strata.dev/v1alpha1", "kind": "InferenceService", "name": "chat", "uid": "before"});
    server.add("deployments", json!({"apiVersion": "apps/v1", "kind": "Deployment",
        "metadata": {"name": "chat", "namespace": "ns", "ownerReferences": [owner]}, "spec": {"selector": {}, "template": {}}}));
    live(&server).await;
    let (reason, message) = condition(&server, "inferenceservices/chat", "Available");
    assert_eq!(reason, "Pending", "{message}");
    server.remove("deployments/chat");
    live(&server).await;
    assert_eq!(condition(&server, "inferenceservices/chat", "Ready").0, "Serving");
}

#[tokio::test]
async fn the_budget_of_a_drain_goes_with_its_last_use_and_never_another_ones() {
    let server = world();
    live(&server).await;
    let budget = "poddisruptionbudgets/chat";
    assert_eq!(server.object(budget)["spec"]["maxUnavailable"], 1);
    server.remove(budget);
    live(&server).await;
    assert_eq!(server.object(budget)["spec"]["maxUnavailable"], 1, "it is made again");

    let scale = |replicas: i32| server.change("inferenceservices/chat", json!({"spec": {"replicas": replicas}}));
    scale(1);
    live(&server).await;
    assert!(server.object(budget).is_null(), "a lone pod needs none");

    let theirs = json!({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget",
        "metadata": {"name": "chat", "namespace": "ns"}, "spec": {"selector": {"matchLabels": {"strata.dev/name": "chat"}}}});
    server.add("poddisruptionbudgets", theirs);
    let before = server.object(budget);
    for replicas in [2, 1] {
        scale(replicas);
        live(&server).await;
        assert_eq!(server.object(budget), before, "replicas {replicas}");
        assert_eq!(condition(&server, "inferenceservices/chat", "Ready").0, "Serving");
    }
}

#[tokio::test]
async fn what_the_server_refuses_is_said_tried_again_and_disturbs_nothing_else() {
    for (code, words, expected) in [
        (
            422,
            "Job.batch \"x\" is invalid: spec.template.spec.priorityClassName",
            "Refused",
        ),
        (403, "jobs.batch \"x\" is forbidden: exceeded quota: jobs", "Refused"),
        (400, "Job in version \"v1\" cannot be handled as a Job", "Refused"),
        (
            500,
            "Internal error occurred: failed calling webhook \"x\"",
            "ApplyFailed",
        ),
    ] {
        let server = world();
        server.refuse("jobs", Some((code, words)));
        live(&server).await;
        let (reason, message) = condition(&server, "datasets/plays", "Succeeded");
        assert_eq!(reason, expected, "{code}");
        assert!(message.contains(words), "{message}");
        let events = server.events();
        assert_eq!(
            events.iter().filter(|event| event["reason"] == expected).count(),
            1,
            "{events:?}"
        );
        assert_eq!(condition(&server, "datasets/plays", "Ready").0, expected);
        let before = server.writes();
        let operator = operator(&server, true);
        let error = reconcile::<Dataset>(&key(ResourceKind::Dataset, "plays"), &operator.context).await;
        assert_eq!(error.expect_err("it is tried again").reason(), expected);
        // Its ConfigMap is there already.
        assert_eq!(server.writes(), before, "the same is not said twice");

        server.refuse("jobs", None);
        live(&server).await;
        assert_eq!(condition(&server, "datasets/plays", "Ready").0, "Published");

        // A new run that is refused takes nothing away from what serves.
        server.refuse("services", Some((code, words)));
        server.remove("services/chat");
        live(&server).await;
        assert_eq!(condition(&server, "inferenceservices/chat", "Available").0, expected);
        assert_eq!(condition(&server, "inferenceservices/chat", "Succeeded").0, "Published");
    }
}

/// Reason and message of a condition.
fn condition(server: &Server, key: &str, kind: &str) -> (String, String) {
    let object = server.object(key);
    let all = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let found = all.iter().find(|condition| condition["type"] == kind);
    let text = |field: &str| {
        found
            .and_then(|found| found[field].as_str())
            .unwrap_or_default()
            .to_owned()
    };
    (text("reason"), text("message"))
}

#[tokio::test]
async fn nothing_is_waited_for_without_an_end() {
    let server = world();
    live(&server).await;
    let key = key(ResourceKind::Dataset, "plays");
    let mut operator = operator(&server, true);
    let pause = reconcile::<Dataset>(&key, &operator.context)
        .await
        .expect("all is done");
    assert!(pause.is_some(), "a lost event costs some minutes");
    operator.context.failures.pause(&key);
    operator.context.failures.pause(&key);
    server.remove("datasets/plays");
    operator.follow();
    let context = &operator.context;
    reconcile::<Dataset>(&key, context).await.expect("it is gone");
    assert_eq!(
        context.failures.pause(&key),
        Failures::default().pause(&key),
        "nothing is kept of what is gone"
    );
}

#[tokio::test]
async fn a_resource_that_does_not_parse_is_an_error_of_its_own_and_wakes_go_by_references() {
    let server = world();
    let mut odd = json!(dataset("odd", json!({})));
    odd["spec"] = json!({"task": "FromTheFuture"});
    server.add("datasets", odd);
    let mut operator = operator(&server, true);
    let error = reconcile::<Dataset>(&key(ResourceKind::Dataset, "odd"), &operator.context)
        .await
        .expect_err("unparseable");
    assert_eq!(error.reason(), "Unparseable");
    assert!(round(&mut operator).await, "the others go on");
    assert_eq!(
        operator.context.index.dependents(&key(ResourceKind::Dataset, "plays")),
        [key(ResourceKind::PretrainJob, "bard")]
    );
}
