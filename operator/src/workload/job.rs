//! One attempt as a Job and the ConfigMap with its stage's configuration.

use k8s_openapi::api::batch::v1::{Job, JobSpec};
use k8s_openapi::api::core::v1::{
    ConfigMap, ConfigMapVolumeSource, EnvVar, EnvVarSource, ObjectFieldSelector, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use strata_api::PodOverrides;
use strata_contract::{ATTEMPT_ENV, CONFIG_ENV, CONFIG_PATH, STAGE_PORT, StageConfig};

use super::labels;
use super::pod::{PodParts, Sizes, template};
use super::volume::Claims;
use crate::engine::kind::ResourceKind;

/// Time that a stage has to save its work, in seconds.
const STAGE_GRACE_SECONDS: i64 = 60;
/// Longest name of a resource whose attempts' names still fit into a label: `NAME-RUNRUNRU-ATTEMPT`, 63 characters.
pub const MAX_RESOURCE_NAME: usize = 48;

/// What a Job is made from.
pub struct JobParts<'a> {
    /// Kind of the resource.
    pub kind: ResourceKind,
    /// Who owns the Job.
    pub owner: &'a OwnerReference,
    /// What the stage is to do.
    pub config: &'a StageConfig,
    /// Generation of the resource's spec.
    pub generation: i64,
    /// Image of the run.
    pub image: &'a str,
    /// Longest time for the attempt.
    pub deadline_seconds: Option<i64>,
    /// Claims to mount.
    pub claims: &'a Claims,
    /// What the container asks for.
    pub sizes: Sizes,
    /// What the user set.
    pub overrides: &'a PodOverrides,
}

/// Name of an attempt's Job and ConfigMap.
pub fn name(resource: &str, run_id: &str, attempt: u32) -> String {
    format!("{resource}-{}-{attempt}", run_id.get(..8).unwrap_or(run_id))
}

/// The attempt's ConfigMap and Job.
pub fn build(parts: &JobParts<'_>) -> (ConfigMap, Job) {
    let run = &parts.config.run;
    let command = parts.config.stage.command();
    let mut labels = labels::common(parts.kind, &run.resource.name, command);
    labels.insert(labels::RUN.into(), run.id.clone());
    labels.insert(labels::ATTEMPT.into(), run.attempt.to_string());
    let name = name(&run.resource.name, &run.id, run.attempt);
    let metadata = ObjectMeta {
        name: Some(name.clone()),
        namespace: Some(run.resource.namespace.clone()),
        labels: Some(labels.clone()),
        owner_references: Some(vec![parts.owner.clone()]),
        ..ObjectMeta::default()
    };
    let (config_dir, config_file) = CONFIG_PATH.rsplit_once('/').expect("the path of a file has a folder");
    let json = serde_json::to_string_pretty(parts.config).expect("a stage configuration serializes to JSON");
    let config_map = ConfigMap {
        metadata: metadata.clone(),
        immutable: Some(true),
        data: Some([(config_file.to_owned(), json)].into()),
        ..ConfigMap::default()
    };
    let env = vec![
        EnvVar {
            name: CONFIG_ENV.into(),
            value: Some(CONFIG_PATH.into()),
            ..EnvVar::default()
        },
        EnvVar {
            name: ATTEMPT_ENV.into(),
            value_from: Some(EnvVarSource {
                field_ref: Some(ObjectFieldSelector {
                    field_path: "metadata.labels['batch.kubernetes.io/controller-uid']".into(),
                    ..ObjectFieldSelector::default()
                }),
                ..EnvVarSource::default()
            }),
            ..EnvVar::default()
        },
    ];
    let config_volume = (
        Volume {
            name: "config".into(),
            config_map: Some(ConfigMapVolumeSource {
                name: name.clone(),
                ..ConfigMapVolumeSource::default()
            }),
            ..Volume::default()
        },
        VolumeMount {
            name: "config".into(),
            mount_path: config_dir.to_owned(),
            read_only: Some(true),
            ..VolumeMount::default()
        },
    );
    let template = template(PodParts {
        labels,
        annotations: Default::default(),
        image: parts.image.to_owned(),
        command: vec!["strata-runtime".into(), command.into()],
        env,
        port: ("metrics", STAGE_PORT),
        claims: parts.claims,
        volumes: vec![config_volume],
        sizes: parts.sizes,
        grace_seconds: STAGE_GRACE_SECONDS,
        restart_policy: Some("Never"),
        overrides: parts.overrides,
    });
    let generation = (labels::GENERATION.to_owned(), parts.generation.to_string());
    let job = Job {
        metadata: ObjectMeta {
            annotations: Some([generation].into()),
            ..metadata
        },
        spec: Some(JobSpec {
            backoff_limit: Some(0),
            pod_replacement_policy: Some("Failed".into()),
            active_deadline_seconds: parts.deadline_seconds,
            template,
            ..JobSpec::default()
        }),
        ..Job::default()
    };
    (config_map, job)
}
