//! How the pods of a new version come where there is no room for one more.

use std::time::Duration;

use super::*;

const PATIENCE_SECONDS: i64 = 600;

/// A pod of that version with one accelerator that serves on a node, or one that has found no place since then.
fn pod(version: char, unplaced_since: Option<i64>) -> Value {
    let condition = match unplaced_since {
        None => json!({"type": "Ready", "status": "True"}),
        Some(since) => json!({"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "message": "0/9 nodes are available: 1 node(s) had untolerated taints, 8 Insufficient nvidia.com/gpu. preemption: none.",
            "lastTransitionTime": at(since).to_string()}),
    };
    let labels = json!({"app.kubernetes.io/component": "serve", "pod-template-hash": version});
    let requests = json!({"nvidia.com/gpu": "1", "memory": "1Gi"});
    json!({
        "metadata": {"name": "p", "labels": labels, "annotations": {"strata.dev/digest": digest(version)}},
        "spec": {
            "nodeName": unplaced_since.is_none().then_some("gpu-1"),
            "nodeSelector": {"gpu": "h100"},
            "tolerations": [{"key": "sku"}],
            "containers": [{"name": "strata", "resources": {"requests": requests}}],
        },
        "status": {"conditions": [condition]},
    })
}

fn pods(pods: &[Value]) -> Vec<Pod> {
    let pods = pods.iter().cloned();
    pods.map(|pod| serde_json::from_value(pod).expect("a valid pod"))
        .collect()
}

/// A service of two pods, one of which is of the new version or waits to be, and what its Deployment says.
fn rolling(status: Value, unplaced_since: Option<i64>) -> (InferenceService, Observed) {
    let (service, mut observed) = serving(json!({"replicas": 2}));
    let mut deployment = json!(observed.deployment);
    deployment["metadata"]["generation"] = json!(2);
    deployment["status"] = status;
    observed.deployment = serde_json::from_value(deployment).expect("a Deployment");
    observed.pods = pods(&[pod('b', None), pod('b', None), pod('a', unplaced_since)]);
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
        says.contains("preemption: none.; a pod of before makes place at 2027-01-15T08:08:20Z"),
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

#[test]
fn a_pod_makes_place_only_for_one_that_fits_there_for_certain() {
    let more = json!({"nvidia.com/gpu": "2", "memory": "1Gi"});
    let larger = json!({"nvidia.com/gpu": "1", "memory": "8Gi"});
    let container = |requests: Value| json!([{"name": "strata", "resources": {"requests": requests}}]);
    let avoids = |node: &str| {
        let rules = json!([{"key": "kubernetes.io/hostname", "operator": "NotIn", "values": [node]}]);
        let terms = json!([{"matchExpressions": rules}]);
        json!({"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}})
    };
    let claims = |template: &str| json!([{"name": "gpu", "resourceClaimTemplateName": template}]);
    let says = |message: &str| json!({"message": message});
    let no_claims = says("0/9 nodes are available: 9 cannot allocate all claims");
    // What the new version's pod has else, what the scheduler says else, and whether a pod makes place.
    for (change, said, fits) in [
        (json!({}), json!({}), true),
        (json!({"containers": container(larger.clone())}), json!({}), true),
        (json!({"containers": container(more)}), json!({}), false),
        (
            json!({"containers": container(larger)}),
            says("0/9 nodes are available: 1 Insufficient memory, 8 Insufficient nvidia.com/gpu."),
            false,
        ),
        (json!({"nodeSelector": {"gpu": "b200"}}), json!({}), false),
        (json!({"tolerations": null}), json!({}), false),
        (json!({"affinity": avoids("gpu-1")}), json!({}), false),
        (json!({"affinity": avoids("gpu-2")}), json!({}), true),
        (json!({"resourceClaims": claims("two")}), no_claims, false),
        (
            json!({}),
            says(
                "cluster-autoscaler: no scale-up: 1 Insufficient cpu; 0/9 nodes are available: 9 node(s) didn't match the node selector",
            ),
            false,
        ),
    ] {
        let under_way = json!({"observedGeneration": 2, "updatedReplicas": 1, "replicas": 3, "availableReplicas": 2});
        let (service, mut observed) = rolling(under_way, None);
        let mut new = pod('a', Some(NOW - PATIENCE_SECONDS));
        crate::fixtures::merge(&mut new["spec"], change.clone());
        crate::fixtures::merge(&mut new["status"]["conditions"][0], said.clone());
        observed.pods = pods(&[pod('b', None), pod('b', None), new]);
        let (bounds, ..) = plan(&service, &mut observed, NOW);
        let makes_place = bounds == (json!(0), json!(1));
        assert_eq!(makes_place, fits, "{change} {said}");
    }
}
