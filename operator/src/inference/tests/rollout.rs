//! How the pods of a new version come where there is no room for one more.

use std::time::Duration;

use super::*;

const PATIENCE_SECONDS: i64 = 600;

/// A pod that serves, or one that has found no place since then.
fn pod(model: char, unplaced_since: Option<i64>) -> Pod {
    let condition = match unplaced_since {
        None => json!({"type": "Ready", "status": "True"}),
        Some(since) => json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "message": "1 Insufficient nvidia.com/gpu", "lastTransitionTime": at(since).to_string()}),
    };
    serde_json::from_value(json!({
        "metadata": {"name": "p", "labels": {"app.kubernetes.io/component": "serve"}, "annotations": {"strata.dev/digest": digest(model)}},
        "status": {"conditions": [condition]},
    }))
    .expect("a valid pod")
}

/// A service of two pods, one of which is of the new version or waits to be, and what its Deployment says.
fn rolling(status: Value, unplaced_since: Option<i64>) -> (InferenceService, Observed) {
    let (service, mut observed) = serving(json!({"replicas": 2}));
    let mut deployment = json!(observed.deployment);
    deployment["metadata"]["generation"] = json!(2);
    deployment["status"] = status;
    observed.deployment = serde_json::from_value(deployment).expect("a Deployment");
    observed.pods = vec![pod('b', None), pod('b', None), pod('a', unplaced_since)];
    (service, observed)
}

/// Pods more, and pods fewer, than are wanted; what is said, and when it is looked at again.
fn plan(service: &InferenceService, observed: &mut Observed, now: i64) -> ((Value, Value), String, Option<Duration>) {
    let checked = service.check(observed, &env());
    let planned = service.plan(&checked, observed, at(now)).deployment.expect("served");
    let strategy = part(&planned, "/spec/strategy/rollingUpdate");
    // As the server would answer, before the controller has seen it.
    let there = observed.deployment.as_mut().expect("there");
    if there.spec != planned.spec {
        there.spec = planned.spec;
        there.metadata.generation = there.metadata.generation.map(|generation| generation + 1);
    }
    let outcome = service.report(&checked, observed, at(now));
    let conditions = &outcome.status.run_status.conditions;
    let available = conditions.iter().find(|condition| condition.type_ == "Available");
    let bounds = (strategy["maxSurge"].clone(), strategy["maxUnavailable"].clone());
    (bounds, available.expect("said").message.clone(), outcome.requeue)
}

#[test]
fn a_pod_of_before_makes_place_for_one_that_found_none_for_a_while_and_the_others_follow() {
    let (surge, replace) = ((json!(1), json!(0)), (json!(0), json!(1)));
    let under_way = |generation: i64| json!({"observedGeneration": generation, "updatedReplicas": 1, "replicas": 3, "availableReplicas": 2});
    let (service, mut observed) = rolling(under_way(2), Some(NOW - 100));
    let (bounds, says, again) = plan(&service, &mut observed, NOW);
    assert_eq!(bounds, surge, "a node may come");
    assert!(
        says.contains("nvidia.com/gpu; a pod of before makes place at 2027-01-15T08:08:20Z"),
        "{says}"
    );
    assert_eq!(again, Some(Duration::from_secs(500)));

    let now = NOW + 500;
    let (bounds, says, _) = plan(&service, &mut observed, now);
    assert_eq!(bounds, replace);
    assert!(says.contains("no room for both versions"), "{says}");
    // The next one has only begun to wait: it does not wait that long again, also before the controller has seen the change.
    for generation in [2, 3] {
        let (_, mut next) = rolling(under_way(generation), Some(now));
        next.deployment.as_mut().expect("there").spec = observed.deployment.clone().expect("there").spec;
        assert_eq!(plan(&service, &mut next, now + 1).0, replace, "{generation}");
    }
    // When all are new, the next version comes with a pod more again.
    let done = json!({"observedGeneration": 3, "updatedReplicas": 2, "replicas": 2, "availableReplicas": 2});
    let (_, mut after) = rolling(done, None);
    after.deployment.as_mut().expect("there").spec = observed.deployment.clone().expect("there").spec;
    assert_eq!(plan(&service, &mut after, now + 60).0, surge);
}

#[test]
fn a_pod_that_finds_no_place_while_nothing_is_replaced_takes_nobodys() {
    let long = Some(NOW - PATIENCE_SECONDS * 2);
    let whole = json!({"observedGeneration": 2, "updatedReplicas": 3, "replicas": 3, "availableReplicas": 2});
    let unseen = json!({"observedGeneration": 1, "updatedReplicas": 1, "replicas": 3, "availableReplicas": 2});
    for (status, since) in [(whole, long), (unseen, long)] {
        let (service, mut observed) = rolling(status.clone(), since);
        let (bounds, says, again) = plan(&service, &mut observed, NOW);
        assert_eq!((bounds, again), ((json!(1), json!(0)), None), "{status}");
        assert!(!says.contains("makes place"), "{says}");
    }
}
