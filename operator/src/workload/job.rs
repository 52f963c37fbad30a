//! One attempt as a Job and the ConfigMap with its stage's configuration.

use std::path::Path;

use k8s_openapi::api::batch::v1::{Job, JobSpec};
use k8s_openapi::api::core::v1::{
    ConfigMap, ConfigMapVolumeSource, EnvVar, EnvVarSource, ObjectFieldSelector, Service, Volume, VolumeMount,
};
use k8s_openapi::api::resource::v1::ResourceClaimTemplate;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use strata_api::PodOverrides;
use strata_contract::{
    ATTEMPT_ENV, CONFIG_ENV, CONFIG_PATH, COORDINATOR_ENV, EXCHANGE_DIR, NODE_COUNT_ENV, NODE_RANK_ENV, STAGE_PORT,
    StageConfig, VOLUMES_DIR, hash_canonical, stage_paths,
};

use super::container::{self, add_shim, variable};
use super::pod::{PodParts, Sizes, template};
use super::volume::Claims;
use super::{claim, jobset, labels, service};
use crate::engine::kind::ResourceKind;
use crate::placement::Placement;

/// Time that a stage has to save its work, in seconds.
const STAGE_GRACE_SECONDS: i64 = 60;
/// Longest name of a resource whose attempts' names still fit into a label: `NAME-RUNRUNRU-ATTEMPT`, 63 characters.
pub const MAX_RESOURCE_NAME: usize = 48;

/// Longest name of an attempt on several nodes: the names of its pods, `NAME-n-0-INDEX-RANDOM` in a JobSet, have 63 characters.
const MAX_GANG_NAME: usize = 47;

/// The nodes of an attempt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nodes {
    /// How many.
    pub count: u32,
    /// Whether JobSet is there to hold them together; else it is an Indexed Job.
    pub in_jobset: bool,
}

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
    /// The user's container, and Strata's image, from which it gets the shim.
    pub container: Option<(&'a container::Stage, &'a str)>,
    /// Its nodes.
    pub nodes: Nodes,
    /// The queue in which Kueue keeps it until there is room.
    pub queue: Option<&'a str>,
    /// Longest time for the attempt.
    pub deadline_seconds: Option<i64>,
    /// Claims to mount.
    pub claims: &'a Claims,
    /// What the container asks for.
    pub sizes: Sizes,
    /// Where its pods go; absent: wherever there is room.
    pub placement: Option<&'a Placement>,
    /// What the user set.
    pub overrides: &'a PodOverrides,
}

/// The objects of an attempt, in the order in which they are made.
#[derive(Debug, PartialEq)]
pub struct Attempt {
    /// Names for its nodes, where it needs them and no JobSet makes them.
    pub names: Option<Service>,
    /// What its stage is to do.
    pub config_map: ConfigMap,
    /// What its pods claim.
    pub claims: Option<ResourceClaimTemplate>,
    /// Its pods.
    pub job: Job,
}

/// Name of an attempt's Job, ConfigMap and claim template.
pub fn name(resource: &str, run_id: &str, attempt: u32, nodes: u32) -> String {
    let rest = format!("-{}-{attempt}", run_id.get(..8).unwrap_or(run_id));
    match nodes > 1 && resource.len() + rest.len() > MAX_GANG_NAME {
        false => format!("{resource}{rest}"),
        true => {
            // Two long names that begin alike must not become one.
            let hash = hash_canonical(&resource);
            let kept = MAX_GANG_NAME.saturating_sub(rest.len() + 5);
            format!("{}-{}{rest}", &resource[..kept.min(resource.len())], &hash[..4])
        }
    }
}

/// Name of the Service by which the nodes of a resource's attempts find each other, where no JobSet makes one.
fn names_of_nodes(resource: &str, command: &str) -> String {
    format!("{resource}-{command}-nodes")
}

/// The attempt's objects.
pub fn build(parts: &JobParts<'_>) -> Attempt {
    let run = &parts.config.run;
    let command = parts.config.stage.command();
    let mut labels = labels::common(parts.kind, &run.resource.name, command);
    labels.insert(labels::RUN.into(), run.id.clone());
    labels.insert(labels::ATTEMPT.into(), run.attempt.to_string());
    let Nodes { count, in_jobset } = parts.nodes;
    let name = name(&run.resource.name, &run.id, run.attempt, count);
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
    let mut env = vec![
        variable(CONFIG_ENV, CONFIG_PATH),
        from_field(ATTEMPT_ENV, "metadata.labels['batch.kubernetes.io/controller-uid']"),
    ];
    let service_name = names_of_nodes(&run.resource.name, command);
    if let Some((container, _)) = parts.container {
        let coordinator = match (count, in_jobset) {
            (1, _) => "localhost".to_owned(),
            (_, true) => jobset::coordinator(&name),
            (_, false) => format!("{name}-0.{service_name}"),
        };
        env.extend(variables(parts.config, container, count, coordinator));
    }
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
    let mut template = template(PodParts {
        labels: labels.clone(),
        annotations: Default::default(),
        image: parts.image.to_owned(),
        command: match parts.container {
            Some((container, _)) => container.command(),
            None => vec!["strata-runtime".into(), command.into()],
        },
        env,
        port: ("metrics", STAGE_PORT),
        claims: parts.claims,
        volumes: vec![config_volume],
        sizes: parts.sizes,
        grace_seconds: STAGE_GRACE_SECONDS,
        restart_policy: Some("Never"),
        placement: parts.placement,
        overrides: parts.overrides,
    });
    if let Some((container, image)) = parts.container {
        add_shim(&mut template, image);
        container::adapt(&mut template, &container.needs, parts.overrides.resources.is_some());
    }
    let claims = parts
        .placement
        .and_then(|placement| placement.claim.as_ref())
        .map(|wanted| {
            claim::bind(&mut template, &name);
            claim::build(metadata.clone(), parts.owner, wanted)
        });
    let needs_names = count > 1 && !in_jobset;
    if let (true, Some(spec)) = (needs_names, template.spec.as_mut()) {
        spec.subdomain = Some(service_name.clone());
    }
    let generation = (labels::GENERATION.to_owned(), parts.generation.to_string());
    let metadata_of_job = {
        let mut metadata = metadata.clone();
        metadata.annotations = Some([generation].into());
        if let (Some(labels), Some(queue)) = (metadata.labels.as_mut(), parts.queue) {
            labels.insert(labels::QUEUE.into(), queue.to_owned());
        }
        metadata
    };
    let many = (count > 1).then(|| i32::try_from(count).unwrap_or(i32::MAX));
    let mut job = Job {
        metadata: metadata_of_job,
        spec: Some(JobSpec {
            backoff_limit: Some(0),
            pod_replacement_policy: Some("Failed".into()),
            active_deadline_seconds: parts.deadline_seconds,
            // Kueue alone resumes it.
            suspend: parts.queue.map(|_| true),
            completion_mode: many.map(|_| "Indexed".to_owned()),
            completions: many,
            parallelism: many,
            template,
            ..JobSpec::default()
        }),
        ..Job::default()
    };
    if count > 1 && in_jobset {
        jobset::mark(&mut job);
    }
    let names = needs_names.then(|| {
        let selector = labels::common(parts.kind, &run.resource.name, command);
        let metadata = ObjectMeta {
            name: Some(service_name),
            namespace: metadata.namespace,
            labels: Some(selector.clone()),
            ..ObjectMeta::default()
        };
        service::of_nodes(metadata, parts.owner, selector)
    });
    Attempt {
        names,
        config_map,
        claims,
        job,
    }
}

/// What a container finds in its environment. Its own variables come last, and never hide Strata's: their names differ.
fn variables(config: &StageConfig, container: &container::Stage, nodes: u32, coordinator: String) -> Vec<EnvVar> {
    let (volumes, exchange) = (Path::new(VOLUMES_DIR), Path::new(EXCHANGE_DIR));
    // The kubelet puts the attempt's id in the place of its variable.
    let paths = stage_paths(volumes, exchange, &config.run.output, &format!("$({ATTEMPT_ENV})"));
    let rank = match nodes {
        1 => variable(NODE_RANK_ENV, "0"),
        _ => from_field(
            NODE_RANK_ENV,
            "metadata.annotations['batch.kubernetes.io/job-completion-index']",
        ),
    };
    let own = container
        .run
        .env
        .iter()
        .map(|(name, value)| variable(name, value.as_str()));
    paths
        .into_iter()
        .map(|(name, path)| variable(name, path.to_string_lossy()))
        .chain([
            rank,
            variable(NODE_COUNT_ENV, nodes.to_string()),
            variable(COORDINATOR_ENV, coordinator),
        ])
        .chain(own)
        .collect()
}

/// A variable with what the API server knows of the pod.
fn from_field(name: &str, path: &str) -> EnvVar {
    EnvVar {
        name: name.to_owned(),
        value_from: Some(EnvVarSource {
            field_ref: Some(ObjectFieldSelector {
                field_path: path.to_owned(),
                ..ObjectFieldSelector::default()
            }),
            ..EnvVarSource::default()
        }),
        ..EnvVar::default()
    }
}
