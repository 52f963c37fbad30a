//! Claim templates: made before what needs them and gone when nothing does, whatever happens in between.

use std::collections::BTreeSet;

use serde_json::Value;

use super::*;

/// A run whose first attempt fails and a service of its model, both with claims.
fn claiming() -> Arc<Server> {
    let spec = json!({
        "hardware": {"accelerator": "nvidia-h100", "allocation": "ResourceClaim"},
        "engine": {"container": {"image": "example.org/llm:1", "command": ["work"]}},
    });
    let server = Server::new();
    server.add("datasets", json!(dataset("plays", json!({}))));
    server.add("pretrainjobs", json!(pretrain("bard", spec.clone())));
    server.add("inferenceservices", json!(inference("chat", spec)));
    server.fail_first("bard");
    Arc::new(server)
}

fn names(objects: Vec<Value>) -> BTreeSet<String> {
    let name = |object: &Value| object["metadata"]["name"].as_str().map(str::to_owned);
    objects.iter().filter_map(name).collect()
}

/// Names of the claim templates: of attempts, and of the service.
fn templates(server: &Server) -> (BTreeSet<String>, BTreeSet<String>) {
    let all = names(server.all("resourceclaimtemplates"));
    all.into_iter().partition(|name| name.starts_with("bard-"))
}

/// Names of the attempts of `bard`.
fn attempts(server: &Server) -> BTreeSet<String> {
    let jobs = names(server.all("jobs")).into_iter();
    jobs.filter(|name| name.starts_with("bard-")).collect()
}

#[tokio::test]
async fn what_is_claimed_comes_before_its_pods_and_goes_with_the_last_of_them() {
    let server = claiming();
    live(&server).await;
    let end = server.picture();
    let ready = &end["inferenceservices/chat"]["status"]["conditions"];
    assert_eq!(
        ready.as_array().and_then(|all| all.last()).expect("Ready")["reason"],
        "Serving"
    );
    let (of_attempts, of_service) = templates(&server);
    assert_eq!((of_attempts.len(), of_service.len()), (2, 1));
    assert_eq!(of_attempts, attempts(&server));
    for template in server.all("resourceclaimtemplates") {
        assert_eq!(
            template["metadata"]["ownerReferences"].as_array().map(Vec::len),
            Some(1),
            "{template}"
        );
    }
    for crash in 1..=server.writes() {
        let server = claiming();
        server.crash_after(crash);
        live(&server).await;
        let picture = server.picture();
        for (name, object) in &end {
            let is = picture.get(name);
            assert_eq!(is, Some(object), "{name} after a crash after write {crash}");
        }
        assert_eq!(picture.len(), end.len(), "crash after write {crash}");
    }

    // Another run and another claim: those of before go when they are done with.
    server.change("pretrainjobs/bard", json!({"spec": {"runGeneration": 1}}));
    server.change(
        "inferenceservices/chat",
        json!({"spec": {"hardware": {"acceleratorsPerNode": 2}}}),
    );
    let mut operator = operator(&server, true);
    assert!(round(&mut operator).await);
    let (_, both) = templates(&server);
    assert!(
        both.is_superset(&of_service) && both.len() == 2,
        "while the rollout lasts: {both:?}"
    );
    live(&server).await;
    let (after, of_service_after) = templates(&server);
    assert!(
        after == attempts(&server) && after.is_disjoint(&of_attempts),
        "{after:?}"
    );
    assert!(
        of_service_after.len() == 1 && of_service_after.is_disjoint(&of_service),
        "{of_service_after:?}"
    );

    // Somebody deletes what the next pod needs.
    for name in &of_service_after {
        server.remove(&format!("resourceclaimtemplates/{name}"));
    }
    live(&server).await;
    assert_eq!(templates(&server).1, of_service_after);
}

#[tokio::test]
async fn a_template_that_is_not_ours_is_left_alone_and_a_cluster_without_them_is_named() {
    let server = claiming();
    live(&server).await;
    let (_, of_service) = templates(&server);
    let name = of_service.first().expect("one").clone();
    for (refusal, reason, says) in [
        (None, "NameTaken", "belongs to something else"),
        (
            Some((404, "the server could not find the requested resource")),
            "Refused",
            "serves no resource.k8s.io/v1",
        ),
    ] {
        let server = claiming();
        if refusal.is_none() {
            server.add(
                "resourceclaimtemplates",
                json!({"metadata": {"name": name, "namespace": "ns"}, "spec": {"spec": {}}}),
            );
        }
        server.refuse("resourceclaimtemplates", refusal);
        live(&server).await;
        let all = server.picture();
        let which = if refusal.is_none() {
            "inferenceservices/chat"
        } else {
            "pretrainjobs/bard"
        };
        let said = all[which]["status"]["conditions"].to_string();
        assert!(said.contains(reason) && said.contains(says), "{which}: {said}");
    }
}
