//! What is wanted where the number of pods follows what they say, and what is said about it.

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};
use strata_api::{InferenceService, InferenceServiceStatus, Reason, RunStatus};

use super::check::Serving;
use super::scale::questions;
use crate::autoscale::Load;
use crate::autoscale::metrics::Unread;
use crate::autoscale::scrape::{Round, Scaling, Silence};
use crate::engine::kind::{Kind, Observed, Refusal, ResourceKind};
use crate::engine::status::all_transitions;
use crate::fixtures::{NOW, at, digest, env, inference, merge, published, to};

/// A service with these targets, and with `change` merged into its `autoscale`.
fn service(change: Value) -> InferenceService {
    let mut autoscale =
        json!({"maxReplicas": 4, "targets": {"kvCacheUtilizationPercent": 50}, "scaleDownWindow": "60s"});
    merge(&mut autoscale, change);
    inference("s", json!({"replicas": 1, "autoscale": autoscale}))
}

fn pod(name: &str, ready: bool) -> Pod {
    serde_json::from_value(json!({
        "metadata": {"name": name, "uid": format!("uid-{name}"), "labels": {"app.kubernetes.io/component": "serve"},
            "annotations": {"strata.dev/digest": digest('a')}},
        "spec": {"containers": [{"name": "strata", "ports": [{"name": "http", "containerPort": 8000}],
            "readinessProbe": {"httpGet": {"port": "http", "scheme": "HTTPS"}}}]},
        "status": {"phase": "Running", "podIP": "10.0.0.7",
            "conditions": [{"type": "Ready", "status": if ready { "True" } else { "False" }}]},
    }))
    .expect("a valid pod")
}

/// A Deployment with so many replicas, which `writer` set `seconds` ago.
fn deployment(replicas: i32, writer: &str, seconds: i64) -> Deployment {
    serde_json::from_value(json!({
        "metadata": {"name": "s", "generation": 1, "managedFields": [
            {"manager": "strata-operator", "operation": "Apply", "time": at(NOW).to_string(),
                "fieldsV1": {"f:spec": {"f:template": {}}}},
            {"manager": writer, "operation": "Update", "subresource": "scale", "time": at(NOW - seconds).to_string(),
                "fieldsV1": {"f:spec": {"f:replicas": {}}}}]},
        "spec": {"replicas": replicas, "selector": {}, "template": {}},
        "status": {"observedGeneration": 1, "replicas": replicas, "updatedReplicas": replicas, "availableReplicas": 1},
    }))
    .expect("a valid Deployment")
}

fn ours(replicas: i32) -> Deployment {
    deployment(replicas, "strata-operator", 0)
}

/// What a pod says whose cache is that full.
fn load(cache: f64) -> Result<Load, Silence> {
    Ok(Load {
        window_seconds: 10.0,
        running: Some(4.0),
        waiting: Some(0.0),
        kv_cache_utilization: Some(cache),
        ..Load::default()
    })
}

fn refused() -> Result<Load, Silence> {
    Err(Silence::Status("/metrics", 503))
}

/// A round in which these pods, which are ready, said this; with that Deployment.
fn observed(said: &[Result<Load, Silence>], deployment: Deployment, second: i64) -> Observed {
    let names: Vec<String> = (0..said.len()).map(|number| format!("p{number}")).collect();
    Observed {
        upstream: [(to(ResourceKind::PretrainJob, "bard"), published('a'))].into(),
        pods: names.iter().map(|name| pod(name, true)).collect(),
        deployment: Some(deployment),
        scaling: Some(Scaling {
            round: Round {
                number: 2,
                pods: names.into_iter().zip(said.iter().cloned()).collect(),
            },
            decided: None,
            now: at(second),
        }),
        ..Observed::default()
    }
}

fn serving(service: &InferenceService, observed: &Observed) -> Serving {
    service.check(observed, &env()).expect("a good spec").serving
}

/// The status after this, written into the service; and the reasons of the two conditions.
fn reported(
    service: &mut InferenceService,
    observed: &Observed,
    second: i64,
) -> (InferenceServiceStatus, String, String) {
    let checked = service.check(observed, &env());
    let status = service.report(&checked, observed, at(second)).status;
    service.status = Some(status.clone());
    let reason = |kind: &str| {
        let condition = status
            .run_status
            .conditions
            .iter()
            .find(|condition| condition.type_ == kind);
        condition.map(|condition| condition.reason.clone()).unwrap_or_default()
    };
    let (metrics, effective) = (reason("MetricsAvailable"), reason("ScalingEffective"));
    (status, metrics, effective)
}

#[test]
fn pods_that_are_ready_are_asked_at_their_own_port_and_scheme() {
    let pods = [pod("a", true), pod("b", false)];
    let asked = questions(&service(json!({})), &pods).expect("it scales by itself");
    assert_eq!(asked.model, "s");
    let bases: Vec<&str> = asked.targets.iter().map(|target| target.base.as_str()).collect();
    assert_eq!(bases, ["https://10.0.0.7:8000"]);
    assert_eq!(
        questions(&inference("s", json!({})), &pods),
        None,
        "its number is fixed"
    );
    let mut suspended = service(json!({}));
    suspended.spec.common.suspend = Some(true);
    assert_eq!(questions(&suspended, &pods), None);
}

#[test]
fn the_number_of_pods_follows_what_they_say_within_its_bounds() {
    for (said, there, wanted) in [
        (vec![load(0.4)], 1, 1),
        (vec![load(0.9)], 1, 2),
        (vec![load(0.95), load(0.95), load(0.95)], 3, 4),
        // Missing is not zero: what pods do not say changes nothing.
        (vec![refused()], 3, 3),
        // One silent pod does not blind it: what the others need, and the place of the silent one.
        (vec![load(0.9), refused()], 2, 3),
        // What was set before stays until there is a reason, but within the bounds.
        (vec![load(0.01)], 3, 3),
        (vec![load(0.01)], 9, 4),
    ] {
        let serving = serving(&service(json!({})), &observed(&said, ours(there), NOW));
        assert_eq!(serving.replicas, wanted, "{said:?} with {there}: {:?}", serving.scaled);
    }
    let few = service(json!({"minReplicas": 2}));
    assert_eq!(serving(&few, &observed(&[load(0.0)], ours(1), NOW)).replicas, 2);
    // Before anybody was asked, everything stays.
    let mut unasked = observed(&[load(0.9)], ours(3), NOW);
    unasked.scaling.as_mut().expect("just set").round = Round::default();
    let serving = serving(&service(json!({})), &unasked);
    assert_eq!(
        (
            serving.replicas,
            InferenceService::decided(&Err(Refusal::Spec(Reason::SpecInvalid, String::new())))
        ),
        (3, None)
    );
}

#[test]
fn a_round_is_judged_once_however_often_the_service_is_looked_at() {
    let service = service(json!({}));
    let mut observed = observed(&[load(0.9)], ours(1), NOW);
    let checked = service.check(&observed, &env());
    let (round, decision) = InferenceService::decided(&checked).expect("decided");
    assert_eq!((round, decision.replicas), (2, 2));
    let scaling = observed.scaling.as_mut().expect("just set");
    scaling.decided = Some((round, decision.clone()));
    scaling.now = at(NOW + 3);
    let again = service.check(&observed, &env());
    assert_eq!(
        InferenceService::decided(&again).map(|decided| decided.1),
        Some(decision)
    );
}

#[test]
fn how_pods_answer_is_said_and_a_number_that_nothing_moves_does_not_look_healthy() {
    let other = || Err(Silence::Unread(Unread::OtherModels(vec!["mistral".into()])));
    let empty = || {
        Ok(Load {
            window_seconds: 10.0,
            waiting: Some(1.0),
            ..Load::default()
        })
    };
    let both = json!({"targets": {"waitingRequests": 2}});
    for (change, said, metrics, effective, ready, words) in [
        (
            json!({}),
            vec![load(0.1)],
            "MetricsRead",
            "ScalingActive",
            None,
            "all ready pods",
        ),
        (
            json!({}),
            vec![],
            "MetricsPending",
            "ScalingActive",
            None,
            "no ready pod",
        ),
        (
            json!({}),
            vec![load(0.1), refused()],
            "MetricsPartial",
            "ScalingActive",
            None,
            "1 of 2 ready pods are silent: p1: /metrics answers 503",
        ),
        (
            json!({}),
            vec![refused()],
            "MetricsSilent",
            "Blocked",
            Some("MetricsSilent"),
            "p0: /metrics answers 503",
        ),
        (
            json!({}),
            vec![other(), other()],
            "ModelNameWrong",
            "Blocked",
            Some("ModelNameWrong"),
            "mistral",
        ),
        (
            json!({}),
            vec![empty()],
            "MetricMissing",
            "Blocked",
            Some("MetricMissing"),
            "vllm:kv_cache_usage_perc",
        ),
        (
            both,
            vec![empty()],
            "MetricMissing",
            "Blocked",
            Some("MetricMissing"),
            "kvCacheUtilizationPercent needs one of",
        ),
        (
            json!({}),
            vec![load(0.99), load(0.99), load(0.99), load(0.99)],
            "MetricsRead",
            "AtMaximum",
            None,
            "all ready",
        ),
    ] {
        let mut service = service(change);
        let there = i32::try_from(said.len().max(1)).expect("few");
        let (status, is_metrics, is_effective) = reported(&mut service, &observed(&said, ours(there), NOW), NOW);
        assert_eq!(
            (is_metrics.as_str(), is_effective.as_str()),
            (metrics, effective),
            "{said:?}"
        );
        let conditions = &status.run_status.conditions;
        assert!(
            conditions.iter().any(|condition| condition.message.contains(words)),
            "{words}: {conditions:?}"
        );
        let last = conditions.last().expect("Ready is last");
        assert_eq!(
            ready,
            (last.status == "False").then_some(last.reason.as_str()),
            "{last:?}"
        );
    }
}

#[test]
fn another_writer_is_named_and_followed_for_a_while_so_that_no_pods_start_and_stop_for_ever() {
    for (writer, seconds, there, wanted, effective) in [
        ("kube-controller-manager", 60, 3, 3, "AnotherWriter"),
        ("kube-controller-manager", 60, 9, 4, "AnotherWriter"),
        ("kube-controller-manager", 60, 2, 2, "ScalingActive"),
        ("kube-controller-manager", 600, 3, 2, "ScalingActive"),
        ("strata-operator", 60, 3, 3, "ScalingActive"),
    ] {
        let mut service = service(json!({}));
        // What was decided before is 1, and 2 are needed.
        let before = serving(&service, &observed(&[load(0.4)], ours(1), NOW - 10))
            .scaled
            .expect("scaled");
        let mut observed = observed(&[load(0.9)], deployment(there, writer, seconds), NOW);
        if writer != "strata-operator" {
            observed.scaling.as_mut().expect("just set").decided = Some((0, before.decision));
        }
        assert_eq!(
            serving(&service, &observed).replicas,
            wanted,
            "{writer} wrote {there} {seconds} s ago"
        );
        let (status, _, reason) = reported(&mut service, &observed, NOW);
        assert_eq!(reason, effective);
        let named = status
            .run_status
            .conditions
            .iter()
            .any(|condition| condition.message.contains(writer));
        assert_eq!(named, effective == "AnotherWriter");
    }
}

#[test]
fn what_is_written_through_scale_has_no_time_and_is_followed_from_when_it_was_first_seen() {
    let mut service = service(json!({}));
    reported(&mut service, &observed(&[load(0.3)], ours(1), NOW), NOW);
    let mut theirs = deployment(3, "kubectl", 0);
    for entry in theirs.metadata.managed_fields.iter_mut().flatten() {
        entry.time = None;
    }
    for (second, wanted, effective) in [
        (5, 3, "AnotherWriter"),
        (200, 3, "AnotherWriter"),
        (310, 1, "ScalingActive"),
    ] {
        let mut seen = observed(&[load(0.1)], theirs.clone(), NOW + second);
        let decided = serving(&service, &observed(&[load(0.3)], ours(1), NOW))
            .scaled
            .expect("scaled")
            .decision;
        seen.scaling.as_mut().expect("just set").decided = Some((0, decided));
        // A cache, which has no managed fields, leads to the same once the status tells.
        let mut cached = Observed {
            deployment: Some(ours(3)),
            ..seen.clone()
        };
        if second > 5 {
            cached.deployment.as_mut().expect("just set").metadata.managed_fields = None;
            assert_eq!(
                serving(&service, &cached).replicas,
                wanted,
                "after {second} s, from a cache"
            );
        }
        assert_eq!(serving(&service, &seen).replicas, wanted, "after {second} s");
        let (status, _, reason) = reported(&mut service, &seen, NOW + second);
        assert_eq!(reason, effective, "after {second} s");
        let named = status
            .run_status
            .conditions
            .iter()
            .any(|condition| condition.message.contains("kubectl"));
        assert_eq!(named, effective == "AnotherWriter");
    }
}

#[test]
fn a_change_is_told_with_its_figures_and_nothing_is_written_while_nothing_changes() {
    let mut service = service(json!({}));
    let calm = || observed(&[load(0.3)], ours(1), NOW);
    let (first, ..) = reported(&mut service, &calm(), NOW);
    assert!(first.scaling_history.is_empty(), "there was none before");
    let (again, ..) = reported(&mut service, &calm(), NOW + 300);
    assert_eq!(again, first);
    // Other figures, but the last were just written.
    let (soon, ..) = reported(&mut service, &observed(&[load(0.35)], ours(1), NOW), NOW + 10);
    assert_eq!(soon, first);
    // Nor are those of the first round after a restart, which knows no rates.
    let mut restarted = observed(&[load(0.35)], ours(1), NOW);
    restarted.scaling.as_mut().expect("just set").round.number = 1;
    let (restarted, ..) = reported(&mut service, &restarted, NOW + 30);
    assert_eq!(restarted, first);
    let (later, ..) = reported(&mut service, &observed(&[load(0.35)], ours(1), NOW), NOW + 30);
    let scale = later.autoscale.as_ref().expect("it scales by itself");
    assert_eq!(scale.observed["kvCacheUtilizationPercent"], "35");
    // A change is told at once.
    let (up, ..) = reported(&mut service, &observed(&[load(0.9)], ours(1), NOW), NOW + 31);
    let event = up.scaling_history.first().expect("a change");
    assert_eq!((event.from, event.to, event.reason.as_str()), (1, 2, "LoadRose"));
    assert!(event.message.contains("KV-cache 90 %"), "{}", event.message);
    let told = all_transitions(Some(&later), &up);
    assert!(
        told.iter()
            .any(|one| one.reason == "ScaledUp" && one.note.contains("from 1 to 2")),
        "{told:?}"
    );
    assert!(all_transitions(Some(&up), &up).is_empty());
    // And another operator goes on where this one was.
    let learned = json!({"coldStartSeconds": "42.5"});
    service
        .status
        .as_mut()
        .and_then(|status| status.autoscale.as_mut())
        .expect("set")
        .learned = serde_json::from_value(learned).expect("texts");
    let scaled = serving(&service, &observed(&[load(0.01)], ours(2), NOW + 60))
        .scaled
        .expect("scaled");
    assert_eq!(scaled.decision.memory.learned.cold_start_seconds, Some(42.5));
    assert_eq!(
        scaled.replicas, 2,
        "fewer would do, but what was before is not known: one window is waited"
    );
}

#[test]
fn the_history_keeps_the_last_ten_changes() {
    let mut service = service(json!({"maxReplicas": 100}));
    for round in 0..12 {
        let cache = if round % 2 == 0 { 0.9 } else { 0.3 };
        let there = if round % 2 == 0 { 1 } else { 3 };
        reported(
            &mut service,
            &observed(&[load(cache)], ours(there), NOW + round),
            NOW + round,
        );
    }
    let history = service.status.expect("set").scaling_history;
    assert_eq!(history.len(), 10);
    assert!(
        history
            .windows(2)
            .all(|pair| pair[0].time.0 > pair[1].time.0 && pair[0].from == pair[1].to)
    );
}

#[test]
fn while_only_the_number_changes_the_service_is_ready() {
    let artifact = published('a').artifact;
    let mut service = service(json!({}));
    service.status = Some(InferenceServiceStatus {
        run_status: RunStatus {
            artifact,
            ..RunStatus::default()
        },
        ..InferenceServiceStatus::default()
    });
    let observed = observed(&[load(0.9)], ours(2), NOW);
    let artifact = service
        .status
        .as_ref()
        .and_then(|status| status.run_status.artifact.as_ref());
    let serving = serving(&service, &observed);
    let pods: Vec<&Pod> = observed.pods.iter().collect();
    let standing = super::phase::standing(
        artifact.map(|artifact| artifact.digest.as_str()),
        &serving,
        observed.deployment.as_ref(),
        &pods,
        at(NOW),
    );
    assert_eq!(
        (standing.reason, standing.message.starts_with("1 of 2 pods")),
        (Reason::Serving, true),
        "{standing:?}"
    );
}

#[test]
fn a_budget_that_counts_nothing_is_refused_and_one_that_counts_bounds_the_pods() {
    let budget = json!({"maxAccelerators": 5});
    let mut service = service(budget);
    match service.check(&observed(&[], ours(1), NOW), &env()) {
        Err(Refusal::Spec(Reason::SpecInvalid, message)) => assert!(message.contains("maxAccelerators"), "{message}"),
        other => panic!("{other:?}"),
    }
    let pod = json!({"resources": {"limits": {"nvidia.com/gpu": "2", "memory": "1Gi"}}});
    service.spec.common.pod = Some(serde_json::from_value(pod).expect("valid overrides"));
    let said = [load(0.99), load(0.99)];
    let (_, _, effective) = reported(&mut service, &observed(&said, ours(2), NOW), NOW);
    assert_eq!(effective, "OverBudget");
    assert_eq!(serving(&service, &observed(&said, ours(2), NOW)).replicas, 2);
}
