//! The Deployment of serving pods.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStrategy, RollingUpdateDeployment};
use k8s_openapi::api::core::v1::{HTTPGetAction, PodTemplateSpec, Probe, TopologySpreadConstraint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::service::Scheme;

/// Time between two looks at a pod that starts, in seconds.
const STARTUP_PERIOD_SECONDS: i32 = 2;

/// How serving pods are asked whether they live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Probes {
    /// Path that answers while the server lives.
    pub health: String,
    /// Path that answers while it takes requests.
    pub ready: String,
    /// Longest time until it lives.
    pub startup_seconds: i64,
}

impl Probes {
    /// Those of Strata's own server. Loading weights may take minutes: the start has five of them, the others judge what runs.
    pub fn own() -> Self {
        Self {
            health: "/health".into(),
            ready: "/ready".into(),
            startup_seconds: 300,
        }
    }
}

/// How pods of a new version come in the place of those before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rollout {
    /// A pod goes when its successor is ready.
    Surge,
    /// A pod goes, and its successor comes to its place: there is no room for both.
    Replace,
}

impl Rollout {
    /// How a Deployment does it.
    pub fn of(deployment: &Deployment) -> Self {
        let strategy = deployment.spec.as_ref().and_then(|spec| spec.strategy.as_ref());
        match strategy.and_then(|strategy| strategy.rolling_update.as_ref()?.max_surge.as_ref()) {
            Some(IntOrString::Int(0)) => Self::Replace,
            _ => Self::Surge,
        }
    }

    /// Pods more, and pods fewer, than are wanted.
    fn bounds(self) -> (i32, i32) {
        match self {
            Self::Surge => (1, 0),
            Self::Replace => (0, 1),
        }
    }
}

/// The Deployment of a service.
#[allow(clippy::too_many_arguments, reason = "each is another part of the Deployment")]
pub fn build(
    metadata: ObjectMeta,
    owner: &OwnerReference,
    selector: BTreeMap<String, String>,
    replicas: i32,
    scheme: Scheme,
    probes: &Probes,
    rollout: Rollout,
    mut template: PodTemplateSpec,
) -> Deployment {
    let (more, fewer) = rollout.bounds();
    for pod in template.spec.iter_mut() {
        pod.topology_spread_constraints = Some(vec![on_many_nodes(selector.clone())]);
    }
    for container in template.spec.iter_mut().flat_map(|spec| &mut spec.containers) {
        let looks = i32::try_from(probes.startup_seconds / i64::from(STARTUP_PERIOD_SECONDS)).unwrap_or(i32::MAX);
        container.startup_probe = Some(probe(&probes.health, scheme, STARTUP_PERIOD_SECONDS, looks.max(1)));
        container.readiness_probe = Some(probe(&probes.ready, scheme, 2, 2));
        container.liveness_probe = Some(probe(&probes.health, scheme, 10, 6));
    }
    Deployment {
        metadata: ObjectMeta {
            owner_references: Some(vec![owner.clone()]),
            ..metadata
        },
        spec: Some(DeploymentSpec {
            replicas: Some(replicas),
            revision_history_limit: Some(2),
            // Longer than a start may take.
            progress_deadline_seconds: Some(i32::try_from(probes.startup_seconds + 300).unwrap_or(i32::MAX)),
            selector: LabelSelector {
                match_labels: Some(selector),
                ..LabelSelector::default()
            },
            strategy: Some(DeploymentStrategy {
                type_: Some("RollingUpdate".into()),
                rolling_update: Some(RollingUpdateDeployment {
                    max_surge: Some(IntOrString::Int(more)),
                    max_unavailable: Some(IntOrString::Int(fewer)),
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
