//! The Deployment of serving pods.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment};
use k8s_openapi::api::core::v1::{HTTPGetAction, PodTemplateSpec, Probe, TopologySpreadConstraint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::service::Scheme;

/// A Deployment that replaces a pod only when its successor is ready.
pub fn build(
    metadata: ObjectMeta,
    owner: &OwnerReference,
    selector: BTreeMap<String, String>,
    replicas: i32,
    scheme: Scheme,
    mut template: PodTemplateSpec,
) -> Deployment {
    for pod in template.spec.iter_mut() {
        pod.topology_spread_constraints = Some(vec![on_many_nodes(selector.clone())]);
    }
    for container in template.spec.iter_mut().flat_map(|spec| &mut spec.containers) {
        // Loading weights may take minutes: the start has five of them, the others judge what runs.
        container.startup_probe = Some(probe("/health", scheme, 2, 150));
        container.readiness_probe = Some(probe("/ready", scheme, 2, 2));
        container.liveness_probe = Some(probe("/health", scheme, 10, 6));
    }
    Deployment {
        metadata: ObjectMeta {
            owner_references: Some(vec![owner.clone()]),
            ..metadata
        },
        spec: Some(DeploymentSpec {
            replicas: Some(replicas),
            revision_history_limit: Some(2),
            progress_deadline_seconds: Some(600),
            selector: LabelSelector {
                match_labels: Some(selector),
                ..LabelSelector::default()
            },
            strategy: Some(DeploymentStrategy {
                type_: Some("RollingUpdate".into()),
                rolling_update: Some(RollingUpdateDeployment {
                    max_surge: Some(IntOrString::Int(1)),
                    max_unavailable: Some(IntOrString::Int(0)),
                }),
            }),
            template,
            ..DeploymentSpec::default()
        }),
        ..Deployment::default()
    }
}

/// One lost node should not take all pods, where there are several nodes with room.
fn on_many_nodes(selector: BTreeMap<String, String>) -> TopologySpreadConstraint {
    TopologySpreadConstraint {
        max_skew: 1,
        topology_key: "kubernetes.io/hostname".into(),
        when_unsatisfiable: "ScheduleAnyway".into(),
        label_selector: Some(LabelSelector {
            match_labels: Some(selector),
            ..LabelSelector::default()
        }),
        // Each version by itself: else the pods that go would push the new ones together.
        match_label_keys: Some(vec!["pod-template-hash".into()]),
        ..TopologySpreadConstraint::default()
    }
}

fn probe(path: &str, scheme: Scheme, period_seconds: i32, failure_threshold: i32) -> Probe {
    Probe {
        http_get: Some(HTTPGetAction {
            path: Some(path.into()),
            port: IntOrString::String("http".into()),
            // The kubelet does not look who signed the certificate.
            scheme: (scheme == Scheme::Https).then(|| "HTTPS".to_owned()),
            ..HTTPGetAction::default()
        }),
        period_seconds: Some(period_seconds),
        timeout_seconds: Some(2),
        failure_threshold: Some(failure_threshold),
        ..Probe::default()
    }
}
