//! What is served while things change, and what is said about it.

mod container;
mod rollout;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use serde_json::{Value, json};
use strata_api::{InferenceService, InferenceServiceStatus, Reason};
use strata_contract::FailureReason;

use super::phase::{serving_pods, standing};
use crate::engine::kind::{Env, Kind, Observed, Refusal, ResourceKind, Wanted};
use crate::fixtures::{
    Attempt, IMAGE, NOW, at, at_attempt, bad_report, digest, env, good_report, inference, observe, published, started,
    to,
};

fn around(c: char) -> Observed {
    Observed {
        upstream: [(to(ResourceKind::PretrainJob, "bard"), published(c))].into(),
        ..Observed::default()
    }
}

/// A service whose preparing run of the model `a` has published `a`.
fn serving(change: Value) -> (InferenceService, Observed) {
    let mut service = inference("s", change);
    let mut observed = around('a');
    let checked = service.check(&observed, &env());
    let job = started(service.plan(&checked, &observed, at(NOW)));
    observe(&mut observed, &job, Attempt::Ended(0, "Completed", good_report('a')), 5);
    service.status = Some(service.report(&checked, &observed, at(NOW)).status);
    observed.deployment = deployment(&service, &observed, &env());
    (service, observed)
}

fn deployment(service: &InferenceService, observed: &Observed, env: &Env) -> Option<Deployment> {
    service
        .plan(&service.check(observed, env), observed, at(NOW))
        .deployment
}

fn part(deployment: &Deployment, pointer: &str) -> Value {
    let value = serde_json::to_value(deployment).expect("a Deployment serializes");
    value.pointer(pointer).cloned().unwrap_or(Value::Null)
}

const DIGEST: &str = "/spec/template/metadata/annotations/strata.dev~1digest";
const POD_IMAGE: &str = "/spec/template/spec/containers/0/image";

#[test]
fn nothing_is_served_before_the_preparing_run_published() {
    let service = inference("s", json!({}));
    let observed = around('a');
    let planned = service.plan(&service.check(&observed, &env()), &observed, at(NOW));
    assert!(planned.start.is_some() && planned.deployment.is_none() && planned.service.is_none());
}

#[test]
fn pods_serve_the_artifact_by_uri_and_digest_read_only() {
    let (_, observed) = serving(
        json!({"kvCache": {"memory": "64Mi", "dtype": "F32", "prefixCaching": false}, "maxSequenceTokens": 512}),
    );
    let deployment = observed.deployment.expect("served");
    let command = part(&deployment, "/spec/template/spec/containers/0/command");
    let words: Vec<&str> = command
        .as_array()
        .expect("a command")
        .iter()
        .filter_map(Value::as_str)
        .collect();
    assert_eq!(words[..2], ["strata-runtime", "serve"]);
    for pair in [
        ["--model", "pvc://artifacts/out"],
        ["--digest", &digest('a')],
        ["--served-model-name", "s"],
        ["--kv-cache-memory-bytes", "67108864"],
        ["--kv-cache-dtype", "f32"],
        ["--max-model-len", "512"],
    ] {
        assert!(words.windows(2).any(|window| window == pair), "{pair:?} in {words:?}");
    }
    assert!(!words.contains(&"--enable-prefix-caching"));
    assert_eq!(
        part(
            &deployment,
            "/spec/template/spec/volumes/0/persistentVolumeClaim/readOnly"
        ),
        json!(true)
    );
    assert_eq!(
        part(&deployment, "/spec/strategy/rollingUpdate/maxUnavailable"),
        json!(0)
    );
    assert_eq!(part(&deployment, "/spec/replicas"), json!(2));
}

#[test]
fn keys_and_certificate_are_mounted_from_their_secrets_and_the_endpoint_is_https() {
    let change = json!({"auth": {"secret": {"name": "keys", "key": "current"}}, "tls": {"secretName": "cert"}});
    let (service, mut observed) = serving(change);
    let deployment = observed.deployment.clone().expect("served");
    let pod = part(&deployment, "/spec/template/spec");
    let container = &pod["containers"][0];
    for (name, secret, items, folder) in [
        (
            "api-keys",
            "keys",
            json!([{"key": "current", "path": "keys"}]),
            "/etc/strata/api-keys",
        ),
        (
            "tls",
            "cert",
            json!([{"key": "tls.crt", "path": "tls.crt"}, {"key": "tls.key", "path": "tls.key"}]),
            "/etc/strata/tls",
        ),
    ] {
        let named = |list: &Value| {
            list.as_array()
                .expect("a list")
                .iter()
                .find(|one| one["name"] == name)
                .cloned()
        };
        let volume = named(&pod["volumes"]).expect(name);
        assert_eq!(
            volume["secret"],
            json!({"secretName": secret, "items": items, "defaultMode": 0o440})
        );
        let mount = named(&container["volumeMounts"]).expect(name);
        assert_eq!(
            (&mount["mountPath"], &mount["readOnly"]),
            (&json!(folder), &json!(true))
        );
    }
    let words: Vec<&str> = container["command"]
        .as_array()
        .expect("a command")
        .iter()
        .filter_map(Value::as_str)
        .collect();
    for pair in [
        ["--api-key-file", "/etc/strata/api-keys/keys"],
        ["--ssl-certfile", "/etc/strata/tls/tls.crt"],
        ["--ssl-keyfile", "/etc/strata/tls/tls.key"],
    ] {
        assert!(words.windows(2).any(|window| window == pair), "{pair:?} in {words:?}");
    }
    for probe in ["startupProbe", "readinessProbe", "livenessProbe"] {
        assert_eq!(container[probe]["httpGet"]["scheme"], "HTTPS", "{probe}");
    }
    let checked = service.check(&observed, &env());
    observed.service = service.plan(&checked, &observed, at(NOW)).service;
    let port = &observed
        .service
        .as_ref()
        .and_then(|service| service.spec.as_ref()?.ports.as_ref()?.first());
    assert_eq!(port.expect("a port").port, 443);
    let url = service
        .report(&checked, &observed, at(NOW))
        .status
        .url
        .expect("an address");
    assert!(url.starts_with("https://s."), "{url}");
    // Without them, nothing of that is there: pods of before are not restarted.
    let (_, plain) = serving(json!({}));
    let text = serde_json::to_string(&plain.deployment).expect("it serializes");
    assert!(
        !text.contains("secret") && !text.contains("HTTPS") && !text.contains("--ssl"),
        "{text}"
    );
}

#[test]
fn the_last_good_artifact_stays_while_a_new_one_is_prepared_or_refused() {
    let (service, before) = serving(json!({}));
    for how in [
        Attempt::Running,
        Attempt::Ended(64, "Error", bad_report(FailureReason::GateFailed)),
    ] {
        let mut observed = Observed {
            deployment: before.deployment.clone(),
            ..around('b')
        };
        let checked = service.check(&observed, &env());
        let job = started(service.plan(&checked, &observed, at(NOW)));
        observe(&mut observed, &job, how, 5);
        let mut after = service.clone();
        after.status = Some(service.report(&checked, &observed, at(NOW)).status);
        let deployment = deployment(&after, &observed, &env()).expect("still served");
        assert_eq!(part(&deployment, DIGEST), json!(digest('a')));
        let status = after.status.expect("just set");
        assert_eq!(status.run_status.artifact.expect("published").digest, digest('a'));
    }
    // Also when the model's resource is gone: what is served can still be scaled.
    let gone = Observed {
        deployment: before.deployment,
        ..Observed::default()
    };
    let mut scaled = service;
    scaled.spec.replicas = Some(5);
    let deployment = deployment(&scaled, &gone, &env()).expect("still served");
    assert_eq!(part(&deployment, "/spec/replicas"), json!(5));
}

#[test]
fn an_operator_with_another_image_restarts_no_pod() {
    let (service, observed) = serving(json!({}));
    let newer = Env {
        runtime_image: "strata-runtime:2".into(),
        ..env()
    };
    let deployment = deployment(&service, &observed, &newer);
    assert_eq!(deployment, observed.deployment);
    assert_eq!(part(&deployment.expect("served"), POD_IMAGE), json!(IMAGE));
}

/// The Deployments that the operator of commit 2711e47 makes of the two services below: an upgrade must not change the
/// template of pods that serve, or it restarts all of them at once.
const BEFORE: &str = include_str!("deployments-2711e47.json");

#[test]
fn an_upgrade_from_the_last_chart_restarts_no_pod() {
    let before: Value = serde_json::from_str(BEFORE).expect("JSON");
    for (name, change) in [
        ("plain", json!({})),
        (
            "full",
            json!({"auth": {"secret": {"name": "keys", "key": "current"}}, "tls": {"secretName": "cert"},
                "kvCache": {"memory": "64Mi", "dtype": "F32", "prefixCaching": false}, "maxSequenceTokens": 512,
                "pod": {"serviceAccountName": "sa", "labels": {"team": "a"}, "env": [{"name": "A", "value": "1"}]}}),
        ),
    ] {
        let (_, observed) = serving(change);
        let now = observed.deployment.expect("served");
        for place in ["/spec/template", "/spec/selector"] {
            let was = before[name].pointer(place).expect(place);
            assert_eq!(&part(&now, place), was, "{name}{place}");
        }
    }
}

#[test]
fn suspend_frees_the_serving_pods() {
    let (mut service, observed) = serving(json!({}));
    service.spec.common.suspend = Some(true);
    let deployment = deployment(&service, &observed, &env()).expect("kept");
    assert_eq!(part(&deployment, "/spec/replicas"), json!(0));
    let status = service
        .report(&service.check(&observed, &env()), &observed, at(NOW))
        .status;
    let ready = status.run_status.conditions.last().expect("Ready is last").clone();
    assert_eq!((ready.reason.as_str(), ready.status.as_str()), ("Suspended", "Unknown"));
}

#[test]
fn a_refused_spec_leaves_the_pods_that_serve_as_they_are() {
    let (mut service, observed) = serving(json!({}));
    service.spec.replicas = Some(7);
    let pod = json!({"labels": {"strata.dev/run": "mine"}});
    service.spec.common.pod = Some(serde_json::from_value(pod).expect("valid overrides"));
    assert!(matches!(service.check(&observed, &env()), Err(Refusal::Spec(..))));
    assert_eq!(deployment(&service, &observed, &env()), None);
}

#[test]
fn pods_are_spread_over_nodes_and_have_time_to_stop() {
    for (change, drain) in [
        (json!({}), 25),
        (json!({"drain": "2m"}), 120),
        (
            json!({"autoscale": {"maxReplicas": 2, "targets": {"waitingRequests": 2}}, "replicas": 1}),
            300,
        ),
    ] {
        let (_, observed) = serving(change);
        let deployment = observed.deployment.expect("served");
        let spread = part(&deployment, "/spec/template/spec/topologySpreadConstraints/0");
        assert_eq!(spread["topologyKey"], "kubernetes.io/hostname");
        assert_eq!(spread["whenUnsatisfiable"], "ScheduleAnyway");
        assert_eq!(spread["labelSelector"], part(&deployment, "/spec/selector"));
        let command = part(&deployment, "/spec/template/spec/containers/0/command").to_string();
        assert!(
            command.contains(&format!("\"--shutdown-timeout\",\"{drain}\"")),
            "{command}"
        );
        let grace = part(&deployment, "/spec/template/spec/terminationGracePeriodSeconds");
        assert!(
            grace.as_i64() > Some(5 + drain),
            "its --shutdown-delay and --shutdown-timeout: {grace}"
        );
    }
    let long = inference("s", json!({"drain": "25h"}));
    assert!(
        matches!(long.check(&around('a'), &env()), Err(Refusal::Spec(_, message)) if message.contains("spec.drain"))
    );
}

#[test]
fn a_drain_takes_one_pod_at_a_time_and_never_waits_for_a_lone_one_or_a_second_budget() {
    let other = |selector: Value| -> Vec<PodDisruptionBudget> {
        let budget = json!({"metadata": {"name": "mine"}, "spec": {"minAvailable": 1, "selector": selector}});
        vec![serde_json::from_value(budget).expect("a valid budget")]
    };
    let labels = |value: &str| json!({"matchLabels": {"strata.dev/name": value}});
    let team = |operator: &str| json!({"matchExpressions": [{"key": "team", "operator": operator, "values": ["a"]}]});
    for (replicas, suspend, others, wanted) in [
        (2, false, vec![], true),
        (1, false, vec![], false),
        (0, false, vec![], false),
        (2, true, vec![], false),
        (2, false, other(labels("s")), false),
        (2, false, other(json!({})), false),
        (2, false, other(Value::Null), true),
        (2, false, other(labels("t")), true),
        (2, false, other(team("In")), false),
        (2, false, other(team("NotIn")), true),
    ] {
        let pod = json!({"labels": {"team": "a"}});
        let (mut service, mut observed) = serving(json!({"replicas": replicas, "pod": pod}));
        service.spec.common.suspend = Some(suspend);
        observed.budgets = others;
        let planned = service.plan(&service.check(&observed, &env()), &observed, at(NOW));
        let what = format!("replicas {replicas}, suspend {suspend}, {:?}", observed.budgets);
        let Wanted::There(budget) = planned.budget else {
            assert_eq!(planned.budget, Wanted::Gone, "{what}");
            assert!(!wanted, "{what}");
            continue;
        };
        assert!(wanted, "{what}");
        let spec = serde_json::to_value(budget.spec).expect("it serializes");
        let selector = part(&observed.deployment.expect("served"), "/spec/selector");
        let whole = json!({"maxUnavailable": 1, "selector": selector, "unhealthyPodEvictionPolicy": "AlwaysAllow"});
        assert_eq!(spec, whole);
    }
    // One that scales has its budget also while there is one pod: it lets that one go.
    for (max, wanted) in [(3, true), (1, false)] {
        let scaled = json!({"minReplicas": 1, "maxReplicas": max, "targets": {"waitingRequests": 4}});
        let (service, observed) = serving(json!({"replicas": null, "autoscale": scaled}));
        let planned = service.plan(&service.check(&observed, &env()), &observed, at(NOW));
        assert_eq!(matches!(planned.budget, Wanted::There(_)), wanted, "at most {max}");
    }
    // What was not looked for is neither made nor removed.
    let (service, mut observed) = serving(json!({}));
    observed.deployment = None;
    let planned = service.plan(&service.check(&observed, &env()), &observed, at(NOW));
    assert_eq!(planned.budget, Wanted::AsItIs);
}

#[test]
fn a_cache_that_is_no_size_is_refused() {
    for (cache, words) in [
        (json!({"memory": "10"}), "spec.kvCache.memory"),
        (
            json!({"spill": {"size": "10"}}),
            "spec.kvCache.spill.size must be a size between 1Mi and 16Ti",
        ),
        (json!({"spill": {"size": "17Ti"}}), "got 17Ti"),
        (
            json!({"spill": {"size": "1Gi"}, "prefixCaching": false}),
            "leave out one of the two",
        ),
    ] {
        match inference("s", json!({"kvCache": cache})).check(&around('a'), &env()) {
            Err(Refusal::Spec(Reason::SpecInvalid, message)) => assert!(message.contains(words), "{message}"),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_cache_that_spills_has_a_folder_of_the_nodes_disk_that_is_asked_for_and_a_little_larger_than_its_file() {
    let own = json!({"resources": {"requests": {"cpu": "1"}}});
    for (size, bytes, limit, asked, pod) in [
        ("10Gi", 10u64 << 30, "10304Mi", json!("10240Mi"), json!({})),
        ("1.5Gi", 3 << 29, "1600Mi", json!("1536Mi"), json!({})),
        ("1000001k", 1_000_001_000, "1018Mi", json!("954Mi"), json!({})),
        // Whoever says what the pods ask for says all of it.
        ("10Gi", 10 << 30, "10304Mi", Value::Null, own),
    ] {
        let (_, observed) = serving(json!({"kvCache": {"spill": {"size": size}}, "pod": pod}));
        let pod = part(&observed.deployment.expect("served"), "/spec/template/spec");
        let named = |list: &Value| {
            let mut list = list.as_array().expect("a list").iter();
            list.find(|one| one["name"] == "kv-spill").expect("it is there").clone()
        };
        assert_eq!(named(&pod["volumes"])["emptyDir"], json!({"sizeLimit": limit}));
        let container = &pod["containers"][0];
        let folder = named(&container["volumeMounts"])["mountPath"].clone();
        let command = container["command"].to_string();
        let options = format!("\"--kv-spill-dir\",{folder},\"--kv-spill-bytes\",\"{bytes}\"");
        assert!(
            command.contains(&options) && command.contains("--enable-prefix-caching"),
            "{command}"
        );
        assert_eq!(container["resources"]["requests"]["ephemeral-storage"], asked, "{size}");
    }
    // What is on its way to the disk and back takes memory; without a disk nothing of it is there.
    let memory = |change: Value| {
        let deployment = serving(change).1.deployment.expect("served");
        let text = serde_json::to_string(&deployment).expect("it serializes");
        let request = part(
            &deployment,
            "/spec/template/spec/containers/0/resources/requests/memory",
        );
        let request = request.as_str().and_then(|text| text.strip_suffix("Mi"));
        (request.and_then(|mib| mib.parse::<u32>().ok()).expect("MiB"), text)
    };
    let (plain, text) = memory(json!({}));
    assert!(!text.contains("spill") && !text.contains("ephemeral-storage"), "{text}");
    assert_eq!(memory(json!({"kvCache": {"spill": {"size": "1Gi"}}})).0, plain + 128);
}

fn pod(c: char, status: Value) -> Pod {
    serde_json::from_value(json!({
        "metadata": {"name": "p", "labels": {"app.kubernetes.io/component": "serve"}, "annotations": {"strata.dev/digest": digest(c)}},
        "spec": {"containers": [{"name": "strata", "image": IMAGE}]},
        "status": status,
    }))
    .expect("a valid pod")
}

#[test]
fn serving_is_said_only_of_pods_that_answer_with_the_current_artifact() {
    let ready = |c| {
        pod(
            c,
            json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}),
        )
    };
    let starting = || pod('a', json!({"phase": "Running"}));
    let held = |word: &str| {
        let state = json!({"waiting": {"reason": word}});
        let container = json!({"name": "strata", "image": "", "imageID": "", "ready": false, "restartCount": 3, "state": state,
            "lastState": {"terminated": {"exitCode": 70, "reason": "Error", "message": "no such weights"}}});
        pod('a', json!({"phase": "Pending", "containerStatuses": [container]}))
    };
    // Started once more after it failed; ready or not, since so many seconds.
    let again = |exit_code: i32, is_ready: bool, seconds: i64| {
        let container = json!({"name": "strata", "image": "", "imageID": "", "ready": is_ready, "restartCount": 1,
            "state": {"running": {"startedAt": at(NOW - seconds).to_string()}},
            "lastState": {"terminated": {"exitCode": exit_code, "message": "damaged weights"}}});
        let ready = json!([{"type": "Ready", "status": if is_ready { "True" } else { "False" }}]);
        pod(
            'a',
            json!({"phase": "Running", "conditions": ready, "containerStatuses": [container]}),
        )
    };
    let unscheduled = pod(
        'a',
        json!({"phase": "Pending", "conditions": [
        {"type": "PodScheduled", "status": "False", "message": "1 Insufficient memory"}]}),
    );
    let counts = |generation: i64, updated: i32, replicas: i32, available: i32, complete: bool| -> Deployment {
        let reason = if complete {
            "NewReplicaSetAvailable"
        } else {
            "ReplicaSetUpdated"
        };
        serde_json::from_value(json!({
            "metadata": {"generation": 2},
            "status": {"observedGeneration": generation, "updatedReplicas": updated, "replicas": replicas,
                "availableReplicas": available,
                "conditions": [{"type": "Progressing", "status": "True", "reason": reason}]},
        }))
        .expect("a valid Deployment")
    };
    let artifact = published('a').artifact;
    let whole = || Some(counts(2, 2, 2, 2, true));
    for (published, wanted, deployment, pods, reason, says) in [
        (false, 2, None, vec![], Reason::Blocked, "nothing is published"),
        (true, 2, None, vec![], Reason::RollingOut, "not there yet"),
        (true, 0, whole(), vec![], Reason::ScaledToZero, "nothing answers"),
        (
            true,
            2,
            whole(),
            vec![ready('a'), ready('a')],
            Reason::Serving,
            "2 of 2",
        ),
        (
            true,
            2,
            whole(),
            vec![ready('b'), ready('b')],
            Reason::ReplicasUnavailable,
            "0 of 2",
        ),
        (
            true,
            2,
            Some(counts(1, 2, 2, 2, true)),
            vec![ready('a'), ready('a')],
            Reason::RollingOut,
            "2 of 2",
        ),
        (
            true,
            2,
            Some(counts(2, 1, 3, 2, false)),
            vec![ready('a'), ready('b')],
            Reason::RollingOut,
            "1 of 2",
        ),
        (
            true,
            2,
            Some(counts(2, 2, 2, 1, true)),
            vec![ready('a'), starting()],
            Reason::ReplicasUnavailable,
            "1 of 2",
        ),
        (
            true,
            2,
            whole(),
            vec![held("CrashLoopBackOff")],
            Reason::CrashLooping,
            "exit status 70 (Error: no such weights)",
        ),
        (
            true,
            2,
            whole(),
            vec![ready('a'), again(64, false, 5)],
            Reason::CrashLooping,
            "exit status 64 (damaged weights)",
        ),
        (
            true,
            2,
            whole(),
            vec![ready('a'), again(64, true, 5)],
            Reason::Serving,
            "2 of 2",
        ),
        (
            true,
            2,
            whole(),
            vec![ready('a'), again(0, false, 5)],
            Reason::ReplicasUnavailable,
            "1 of 2",
        ),
        (
            true,
            2,
            whole(),
            vec![ready('a'), again(64, false, 900)],
            Reason::ReplicasUnavailable,
            "1 of 2",
        ),
        (
            true,
            2,
            whole(),
            vec![held("ImagePullBackOff")],
            Reason::ImagePullFailed,
            IMAGE,
        ),
        (
            true,
            2,
            Some(counts(2, 1, 2, 1, false)),
            vec![ready('a'), unscheduled],
            Reason::RollingOut,
            "Insufficient memory",
        ),
    ] {
        let artifact = artifact.as_ref().filter(|_| published);
        let service = inference("s", json!({"replicas": wanted}));
        let serving = service.check(&around('a'), &env()).expect("a good spec").serving;
        let model = artifact.map(|artifact| artifact.digest.as_str());
        let standing = standing(model, &serving, deployment.as_ref(), &serving_pods(&pods), at(NOW));
        assert_eq!(standing.reason, reason, "{says}: {standing:?}");
        assert!(standing.message.contains(says), "{standing:?}");
    }
}

#[test]
fn the_digest_that_is_served_is_that_of_the_ready_pods() {
    let ready = |c| {
        pod(
            c,
            json!({"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}),
        )
    };
    let mut service = inference("s", json!({}));
    service.status = Some(InferenceServiceStatus {
        run_status: at_attempt("x", 1, 0),
        ..Default::default()
    });
    let said = |pods: Vec<Pod>| {
        let observed = Observed { pods, ..around('a') };
        let checked = service.check(&observed, &env());
        service.report(&checked, &observed, at(NOW)).status.serving_digest
    };
    assert_eq!(said(vec![ready('a'), ready('a')]), Some(digest('a')));
    assert_eq!(
        said(vec![ready('a'), ready('b')]),
        None,
        "in the middle of a rollout there is no one digest"
    );
    assert_eq!(said(vec![]), None);
}

#[test]
fn adapters_and_a_draft_model_join_when_they_publish_follow_new_digests_and_stay_when_their_resource_is_gone() {
    let change = json!({
        "adapters": [{"name": "polite", "alignmentJob": {"name": "polite"}}, {"name": "terse", "uri": "pvc://raw/terse"}],
        "speculation": {"draftModel": {"model": {"pretrainJob": {"name": "small"}}, "draftTokens": 2}},
    });
    let (mut service, mut observed) = serving(change.clone());
    let words = |deployment: &Deployment| -> Vec<String> {
        serde_json::from_value(part(deployment, "/spec/template/spec/containers/0/command")).expect("words")
    };
    let claims = |deployment: &Deployment| -> Vec<Value> {
        let volumes = part(deployment, "/spec/template/spec/volumes");
        let volumes = volumes.as_array().expect("volumes").iter();
        volumes
            .map(|volume| volume["persistentVolumeClaim"]["claimName"].clone())
            .filter(|name| !name.is_null())
            .collect()
    };
    let polite = |c: char| {
        json!({"name": "polite", "path": format!("pvc://artifacts/ns/x/{c}"), "digest": digest(c)}).to_string()
    };
    let draft = json!({"method": "draft_model", "num_speculative_tokens": 2, "model": "pvc://artifacts/ns/x/d", "digest": digest('d')});
    let draft = draft.to_string();
    let terse = json!({"name": "terse", "path": "pvc://raw/terse"}).to_string();

    // The service names all of them, so that their publications wake it; until then the pods serve without.
    for to in [
        to(ResourceKind::AlignmentJob, "polite"),
        to(ResourceKind::PretrainJob, "small"),
    ] {
        assert!(service.refs().contains(&to), "{to}");
    }
    let before = observed.deployment.clone().expect("served");
    assert!(
        words(&before).ends_with(&["--lora-modules".to_owned(), terse.clone()]),
        "{:?}",
        words(&before)
    );
    assert_eq!(claims(&before), ["artifacts", "raw"]);
    let status = service
        .report(&service.check(&observed, &env()), &observed, at(NOW))
        .status
        .run_status;
    let ready = status
        .conditions
        .iter()
        .find(|condition| condition.type_ == "InputsReady")
        .expect("said");
    assert_eq!(ready.reason, "ReferenceNotFound");
    assert!(
        ready.message.contains("AlignmentJob/polite") && ready.message.contains("serve without it"),
        "{}",
        ready.message
    );

    let alone = service
        .check(&observed, &env())
        .expect("good")
        .serving
        .sizes(400 << 20)
        .memory_mib;
    observed
        .upstream
        .insert(to(ResourceKind::AlignmentJob, "polite"), published('b'));
    observed
        .upstream
        .insert(to(ResourceKind::PretrainJob, "small"), published('d'));
    let with = deployment(&service, &observed, &env()).expect("served");
    let said = words(&with);
    let lora = [
        "--enable-lora",
        "--max-loras",
        "2",
        "--max-lora-rank",
        "1024",
        "--lora-modules",
        &polite('b'),
        &terse,
    ];
    let all = lora
        .iter()
        .copied()
        .chain(["--speculative-config", &draft])
        .map(str::to_owned);
    assert!(said.ends_with(&all.collect::<Vec<_>>()), "{said:?}");
    assert_eq!(
        service
            .check(&observed, &env())
            .expect("good")
            .serving
            .sizes(400 << 20)
            .memory_mib,
        alone + 500
    );
    // The same artifact of the same run: nothing is quantized anew.
    assert_eq!(part(&with, DIGEST), part(&before, DIGEST));

    let checked = service.check(&observed, &env());
    service.status = Some(service.report(&checked, &observed, at(NOW)).status);
    let inputs = &service.status.as_ref().expect("just set").run_status.inputs;
    let names: Vec<&str> = inputs.iter().map(|input| input.name.as_str()).collect();
    assert_eq!(names, ["model", "adapters/polite", "adapters/terse", "draftModel"]);
    // What was loaded stays as it is when its resource is deleted; a new publication is followed.
    observed.upstream.remove(&to(ResourceKind::AlignmentJob, "polite"));
    assert_eq!(deployment(&service, &observed, &env()), Some(with));
    observed
        .upstream
        .insert(to(ResourceKind::AlignmentJob, "polite"), published('c'));
    assert!(words(&deployment(&service, &observed, &env()).expect("served")).contains(&polite('c')));

    // Without any of it, nothing is said of it: pods of before are not restarted.
    let (_, plain) = serving(json!({}));
    let text = serde_json::to_string(&plain.deployment).expect("it serializes");
    assert!(
        !["lora", "speculative", "max-num"]
            .iter()
            .any(|word| text.contains(word)),
        "{text}"
    );
}

#[test]
fn bounds_of_requests_and_guesses_from_the_text_are_handed_to_the_server() {
    let change =
        json!({"maxConcurrentRequests": 8, "maxWaitingRequests": 0, "speculation": {"ngram": {"maxLookupTokens": 6}}});
    let (_, observed) = serving(change);
    let command = part(
        &observed.deployment.expect("served"),
        "/spec/template/spec/containers/0/command",
    );
    let words: Vec<String> = serde_json::from_value(command).expect("words");
    let ngram = json!({"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 6, "prompt_lookup_min": 2});
    for pair in [
        ["--max-num-seqs", "8"],
        ["--max-num-waiting", "0"],
        ["--speculative-config", &ngram.to_string()],
    ] {
        assert!(words.windows(2).any(|window| window == pair), "{pair:?} in {words:?}");
    }
}
