//! A container of the user's that serves: what its pods are, and that nothing is prepared.

use k8s_openapi::api::core::v1::PodSpec;
use serde_json::{Value, json};

use super::around;
use crate::engine::kind::{Env, Kind, Observed, Planned};
use crate::fixtures::{IMAGE, NOW, at, digest, env, inference};

fn service(change: Value) -> strata_api::InferenceService {
    let mut container = json!({"image": "example.org/vllm:1", "args": ["--model=$(STRATA_MODEL_PATH)"]});
    crate::fixtures::merge(&mut container, change);
    inference("s", json!({"engine": {"container": container}}))
}

fn planned(service: &strata_api::InferenceService, observed: &Observed, env: &Env) -> Planned {
    service.plan(&service.check(observed, env), observed, at(NOW))
}

fn pod(planned: &Planned) -> PodSpec {
    let deployment = planned.deployment.as_ref().expect("a Deployment");
    let spec = deployment.spec.as_ref().expect("a spec");
    spec.template.spec.clone().expect("a pod")
}

#[test]
fn a_container_serves_the_model_as_it_was_published_after_a_look_at_its_digest() {
    let service = service(json!({"port": 8080, "readyPath": "/v1/models", "startup": "1h"}));
    let planned = planned(&service, &around('a'), &env());
    assert!(
        planned.start.is_none() && planned.service.is_some(),
        "nothing is prepared"
    );
    let pod = pod(&planned);
    let init = &pod.init_containers.as_ref().expect("the shim")[0];
    assert_eq!(init.image.as_deref(), Some(IMAGE));
    let look = init.command.as_ref().expect("a command").join(" ");
    let from = "pvc://artifacts/ns/x/a";
    assert_eq!(
        look,
        format!(
            "strata-shim locate --model {from} --link /strata/model/s --digest {}",
            digest('a')
        )
    );
    let container = &pod.containers[0];
    assert_eq!(
        (container.image.as_deref(), &container.command),
        (Some("example.org/vllm:1"), &None)
    );
    let env = container.env.as_ref().expect("variables");
    let value = |name: &str| env.iter().find(|variable| variable.name == name)?.value.clone();
    assert_eq!(value("STRATA_MODEL_PATH").as_deref(), Some("/strata/model/s"));
    assert_eq!(value("STRATA_MODEL_NAME").as_deref(), Some("s"));
    assert_eq!(value("STRATA_PORT").as_deref(), Some("8080"));
    let ready = container
        .readiness_probe
        .as_ref()
        .and_then(|probe| probe.http_get.as_ref()?.path.clone());
    assert_eq!(ready.as_deref(), Some("/v1/models"));
    let startup = container
        .startup_probe
        .as_ref()
        .and_then(|probe| probe.failure_threshold);
    assert_eq!(startup, Some(1800), "an hour in steps of 2 seconds");
    assert_eq!(pod.termination_grace_period_seconds, Some(30));

    let status = service
        .report(&service.check(&around('a'), &self::env()), &around('a'), at(NOW))
        .status;
    let artifact = status.run_status.artifact.expect("what is served");
    assert_eq!((artifact.digest, artifact.uri.as_str()), (digest('a'), from));
    assert!(status.run_status.run.is_none());
    let succeeded = status
        .run_status
        .conditions
        .iter()
        .find(|condition| condition.type_ == "Succeeded");
    assert_eq!(succeeded.map(|condition| condition.reason.as_str()), Some("Published"));
}

#[test]
fn a_plain_model_is_known_by_its_uri_and_keeps_its_name_for_servers_that_look_at_it() {
    let mut service = service(json!({}));
    service.spec.model = serde_json::from_value(json!({"uri": "pvc://models/llama.gguf"})).expect("a source");
    let pod = pod(&planned(&service, &Observed::default(), &env()));
    let look = pod.init_containers.expect("the shim")[0]
        .command
        .clone()
        .expect("a command")
        .join(" ");
    assert_eq!(
        look,
        "strata-shim locate --model pvc://models/llama.gguf --link /strata/model/llama.gguf"
    );
    let report = service.report(
        &service.check(&Observed::default(), &env()),
        &Observed::default(),
        at(NOW),
    );
    assert!(report.status.run_status.artifact.is_none(), "nobody knows its digest");
}

#[test]
fn another_operator_changes_no_pod_of_a_container_and_a_lost_model_takes_none_away() {
    let service = service(json!({}));
    let first = planned(&service, &around('a'), &env());
    let newer = Env {
        runtime_image: "strata-runtime:2".into(),
        ..env()
    };
    let mut observed = around('a');
    observed.deployment = first.deployment.clone();
    assert_eq!(planned(&service, &observed, &newer).deployment, first.deployment);
    let mut observed = around('b');
    observed.deployment = first.deployment.clone();
    let init = pod(&planned(&service, &observed, &newer))
        .init_containers
        .expect("the shim");
    assert_eq!(
        init[0].image.as_deref(),
        Some("strata-runtime:2"),
        "with another model it may"
    );

    let mut after = service.clone();
    after.status = Some(
        service
            .report(&service.check(&around('a'), &env()), &around('a'), at(NOW))
            .status,
    );
    let lost = Observed {
        deployment: first.deployment.clone(),
        ..Observed::default()
    };
    assert_eq!(planned(&after, &lost, &env()).deployment, first.deployment);
}

#[test]
fn a_queue_is_named_on_the_deployment() {
    let mut service = service(json!({}));
    service.spec.common.scheduler = serde_json::from_value(json!({"kubernetes": {"queue": "q"}})).expect("a scheduler");
    let deployment = planned(&service, &around('a'), &env())
        .deployment
        .expect("a Deployment");
    let labels = deployment.metadata.labels.expect("labels");
    assert_eq!(labels[crate::workload::labels::QUEUE], "q");
}
