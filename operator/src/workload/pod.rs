//! The pod that every workload of Strata runs in: restricted, without a token, with the user's overrides.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Capabilities, Container, ContainerPort, EmptyDirVolumeSource, EnvVar, PodSecurityContext, PodSpec, PodTemplateSpec,
    ResourceRequirements, SeccompProfile, SecurityContext, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use strata_api::PodOverrides;

use super::labels;
use super::volume::Claims;
use crate::placement::Placement;

/// User and group of every process; what a volume must let read and write.
pub const USER_ID: i64 = 65532;
/// Name of the one container.
pub const CONTAINER: &str = "strata";

/// What a container asks for when the user says nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Requested processor time in thousandths of a core. There is no limit: idle cores may be used.
    pub cpu_millis: u32,
    /// Requested memory in MiB.
    pub memory_mib: u32,
    /// Memory limit in MiB.
    pub memory_limit_mib: u32,
}

/// What differs between the pods of Strata.
pub struct PodParts<'a> {
    /// Labels, which win over the user's.
    pub labels: BTreeMap<String, String>,
    /// Annotations, which win over the user's.
    pub annotations: BTreeMap<String, String>,
    /// Image of the container.
    pub image: String,
    /// Command and arguments.
    pub command: Vec<String>,
    /// Environment besides the user's.
    pub env: Vec<EnvVar>,
    /// The port and its name.
    pub port: (&'static str, u16),
    /// Claims to mount.
    pub claims: &'a Claims,
    /// More volumes and their mounts.
    pub volumes: Vec<(Volume, VolumeMount)>,
    /// What the container asks for without the user's word.
    pub sizes: Sizes,
    /// Time to stop in, in seconds.
    pub grace_seconds: i64,
    /// `Never` for a stage; absent: always restarted.
    pub restart_policy: Option<&'static str>,
    /// Where it goes; absent: wherever there is room.
    pub placement: Option<&'a Placement>,
    /// What the user set.
    pub overrides: &'a PodOverrides,
}

/// The pod template.
pub fn template(parts: PodParts<'_>) -> PodTemplateSpec {
    let overrides = parts.overrides;
    let (mut volumes, mut mounts) = parts.claims.volumes();
    for (volume, mount) in parts.volumes {
        volumes.push(volume);
        mounts.push(mount);
    }
    volumes.push(Volume {
        name: "tmp".into(),
        empty_dir: Some(EmptyDirVolumeSource {
            size_limit: Some(Quantity("1Gi".into())),
            ..EmptyDirVolumeSource::default()
        }),
        ..Volume::default()
    });
    mounts.push(VolumeMount {
        name: "tmp".into(),
        mount_path: "/tmp".into(),
        ..VolumeMount::default()
    });
    let container = Container {
        name: CONTAINER.into(),
        image: Some(parts.image),
        image_pull_policy: Some("IfNotPresent".into()),
        command: Some(parts.command),
        env: filled(overrides.env.iter().cloned().chain(parts.env).collect()),
        ports: Some(vec![ContainerPort {
            name: Some(parts.port.0.into()),
            container_port: parts.port.1.into(),
            ..ContainerPort::default()
        }]),
        resources: Some(with_devices(
            overrides.resources.clone().unwrap_or_else(|| resources(parts.sizes)),
            parts.placement,
        )),
        volume_mounts: Some(mounts),
        security_context: Some(restricted()),
        termination_message_path: Some("/dev/termination-log".into()),
        termination_message_policy: Some("File".into()),
        ..Container::default()
    };
    let merged = |theirs: &BTreeMap<String, String>, ours: BTreeMap<String, String>| {
        let mut all = theirs.clone();
        all.extend(ours);
        (!all.is_empty()).then_some(all)
    };
    let placement = parts.placement;
    // The user's own word wins, key by key.
    let node_selector = merged(
        &placement
            .map(|placement| placement.node_selector.clone())
            .unwrap_or_default(),
        overrides.node_selector.clone(),
    );
    let tolerations = placement.into_iter().flat_map(|placement| &placement.tolerations);
    let tolerations = tolerations.chain(&overrides.tolerations).cloned().collect();
    let annotations = match placement {
        Some(placement) => {
            let accelerator = (labels::ACCELERATOR.to_owned(), placement.accelerator.clone());
            parts.annotations.into_iter().chain([accelerator]).collect()
        }
        None => parts.annotations,
    };
    PodTemplateSpec {
        metadata: Some(ObjectMeta {
            labels: merged(&overrides.labels, parts.labels),
            annotations: merged(&overrides.annotations, annotations),
            ..ObjectMeta::default()
        }),
        spec: Some(PodSpec {
            containers: vec![container],
            volumes: Some(volumes),
            restart_policy: parts.restart_policy.map(str::to_owned),
            termination_grace_period_seconds: Some(parts.grace_seconds),
            automount_service_account_token: Some(false),
            // Links would put every Service of the namespace into the environment.
            enable_service_links: Some(false),
            security_context: Some(PodSecurityContext {
                run_as_non_root: Some(true),
                run_as_user: Some(USER_ID),
                run_as_group: Some(USER_ID),
                fs_group: Some(USER_ID),
                fs_group_change_policy: Some("OnRootMismatch".into()),
                seccomp_profile: Some(SeccompProfile {
                    type_: "RuntimeDefault".into(),
                    ..SeccompProfile::default()
                }),
                ..PodSecurityContext::default()
            }),
            service_account_name: overrides.service_account_name.clone(),
            image_pull_secrets: filled(overrides.image_pull_secrets.clone()),
            priority_class_name: overrides.priority_class_name.clone(),
            runtime_class_name: overrides.runtime_class_name.clone(),
            node_selector,
            tolerations: filled(tolerations),
            affinity: placement.and_then(Placement::node_affinity),
            ..PodSpec::default()
        }),
    }
}

/// What every container is denied: the Pod Security Standard "restricted", and a root file system to write to.
pub fn restricted() -> SecurityContext {
    SecurityContext {
        allow_privilege_escalation: Some(false),
        read_only_root_filesystem: Some(true),
        capabilities: Some(Capabilities {
            drop: Some(vec!["ALL".into()]),
            ..Capabilities::default()
        }),
        ..SecurityContext::default()
    }
}

fn filled<T>(list: Vec<T>) -> Option<Vec<T>> {
    (!list.is_empty()).then_some(list)
}

/// Adds what the placement asks for, where the user does not ask for another number of it. Devices are not shared: the
/// limit is the request.
fn with_devices(mut resources: ResourceRequirements, placement: Option<&Placement>) -> ResourceRequirements {
    for (name, count) in placement.into_iter().flat_map(|placement| &placement.resources) {
        let limits = resources.limits.get_or_insert_default();
        let count = limits
            .entry(name.clone())
            .or_insert_with(|| Quantity(count.to_string()))
            .clone();
        resources.requests.get_or_insert_default().insert(name.clone(), count);
    }
    resources
}

fn resources(sizes: Sizes) -> ResourceRequirements {
    let entry = |key: &str, value: String| (key.to_owned(), Quantity(value));
    ResourceRequirements {
        requests: Some(
            [
                entry("cpu", format!("{}m", sizes.cpu_millis)),
                entry("memory", format!("{}Mi", sizes.memory_mib)),
            ]
            .into(),
        ),
        limits: Some([entry("memory", format!("{}Mi", sizes.memory_limit_mib))].into()),
        ..ResourceRequirements::default()
    }
}
