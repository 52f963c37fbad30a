//! What a person wants to see when a test failed: events, pods with their logs, and our custom resources.

use std::fmt::Write;

use k8s_openapi::api::core::v1::{ContainerStatus, Event, Pod};
use kube::api::{DynamicObject, ListParams, LogParams};
use kube::{Api, Client, ResourceExt};

/// Where the operator runs; its log belongs to every failure.
const OPERATOR_NAMESPACE: &str = "strata-system";
const OUR_GROUP: &str = "strata.dev";
const LOG_LINES: i64 = 40;

/// The state of `namespace` as text. What cannot be read is said in its place: this runs when things are broken.
pub async fn namespace(client: &Client, namespace: &str) -> String {
    let mut out = String::new();
    resources(client, namespace, &mut out).await;
    events(client, namespace, &mut out).await;
    pods(client, namespace, &mut out).await;
    pods(client, OPERATOR_NAMESPACE, &mut out).await;
    out
}

async fn resources(client: &Client, namespace: &str, out: &mut String) {
    // No such group: the operator is not installed, and there is nothing to show.
    let Ok(group) = kube::discovery::group(client, OUR_GROUP).await else {
        return;
    };
    for (kind, _) in group.recommended_resources() {
        let api: Api<DynamicObject> = Api::namespaced_with(client.clone(), namespace, &kind);
        match api.list(&ListParams::default()).await {
            Ok(list) => {
                for mut object in list {
                    object.managed_fields_mut().clear();
                    let text = serde_yaml::to_string(&object).unwrap_or_else(|error| error.to_string());
                    let _ = writeln!(out, "--- {} {}\n{text}", kind.kind, object.name_any());
                }
            }
            Err(error) => {
                let _ = writeln!(out, "--- {}: {error}", kind.plural);
            }
        }
    }
}

async fn events(client: &Client, namespace: &str, out: &mut String) {
    let _ = writeln!(out, "--- events of {namespace}");
    let api: Api<Event> = Api::namespaced(client.clone(), namespace);
    match api.list(&ListParams::default()).await {
        Ok(mut list) => {
            list.items.sort_by_key(|e| e.metadata.creation_timestamp.clone());
            for event in list {
                let object = event.involved_object;
                let _ = writeln!(
                    out,
                    "{} {} {}/{}: {}",
                    event.type_.unwrap_or_default(),
                    event.reason.unwrap_or_default(),
                    object.kind.unwrap_or_default(),
                    object.name.unwrap_or_default(),
                    event.message.unwrap_or_default()
                );
            }
        }
        Err(error) => {
            let _ = writeln!(out, "{error}");
        }
    }
}

async fn pods(client: &Client, namespace: &str, out: &mut String) {
    let api: Api<Pod> = Api::namespaced(client.clone(), namespace);
    let pods = match api.list(&ListParams::default()).await {
        Ok(list) => list.items,
        Err(error) => {
            let _ = writeln!(out, "--- pods of {namespace}: {error}");
            return;
        }
    };
    for pod in pods {
        let status = pod.status.clone().unwrap_or_default();
        let phase = status.phase.unwrap_or_default();
        let _ = writeln!(
            out,
            "--- pod {namespace}/{}: {phase} {}",
            pod.name_any(),
            status.message.unwrap_or_default()
        );
        let containers = status
            .init_container_statuses
            .into_iter()
            .chain(status.container_statuses)
            .flatten();
        for container in containers {
            log(&api, &pod.name_any(), &container, out).await;
        }
    }
}

async fn log(api: &Api<Pod>, pod: &str, container: &ContainerStatus, out: &mut String) {
    let state = |state| serde_json::to_string(&state).unwrap_or_default();
    let _ = writeln!(
        out,
        "{}: restarts {}, now {}, before {}",
        container.name,
        container.restart_count,
        state(&container.state),
        state(&container.last_state)
    );
    for previous in [true, false] {
        if previous && container.restart_count == 0 {
            continue;
        }
        let params = LogParams {
            container: Some(container.name.clone()),
            tail_lines: Some(LOG_LINES),
            previous,
            ..LogParams::default()
        };
        match api.logs(pod, &params).await {
            Ok(text) => out.push_str(&text),
            Err(error) => {
                let _ = writeln!(out, "no log: {error}");
            }
        }
    }
}
