//! A service whose engine is a container of the user's: it serves the model as it was published, so there is no preparing run.
//! Only the pods differ from those of Strata's own server, and what is said of the run.

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Lifecycle, LifecycleHandler, PodTemplateSpec, SleepAction};
use kube::ResourceExt;
use strata_api::{ArtifactStatus, ConditionType, InferenceService, InputStatus, Reason, RunStatus, ServingContainer};
use strata_contract::{Input, MODEL_DIGEST_ENV, MODEL_DIR, MODEL_NAME_ENV, MODEL_PATH_ENV, PORT_ENV, SERVE_PORT, Uri};

use super::check::Serving;
use crate::engine::kind::{Env, Observed, Planned, Refusal, ResourceKind};
use crate::placement::Placement;
use crate::run::check::{check_name, check_pod, resolve_all};
use crate::run::conditions::Finding;
use crate::run::plan;
use crate::run::report::{self, Judged};
use crate::workload::container::{Needs, SHIM_CONTAINER, adapt, add_init, variable};
use crate::workload::deployment::Probes;
use crate::workload::labels;
use crate::workload::pod::{PodParts, Sizes, template};
use crate::workload::volume::Claims;

/// Longest time for the model to load where the spec does not say, in seconds.
const DEFAULT_STARTUP_SECONDS: i64 = 30 * 60;
/// Time in which a pod that is to stop still answers, until nobody sends it requests any more, in seconds.
const DEREGISTER_SECONDS: i64 = 5;
/// Requested memory beside the model's, in MiB.
const BASE_MIB: u64 = 512;

/// Settings of a serving container.
#[derive(Clone, Debug)]
pub struct Container {
    image: String,
    command: Vec<String>,
    args: Vec<String>,
    env: Vec<(String, String)>,
    port: u16,
    probes: Probes,
    needs: Needs,
    shim_image: String,
    /// What it serves, or why that is not to be had.
    pub model: Result<Model, Refusal>,
}

/// A model that is served as it is.
#[derive(Clone, Debug, PartialEq)]
pub struct Model {
    uri: Uri,
    /// Of an artifact.
    digest: Option<String>,
    bytes: u64,
    run_id: Option<String>,
    input: Option<Input>,
}

impl Model {
    /// What pods say that they serve: the digest, or the URI of a model that has none.
    pub fn identity(&self) -> String {
        self.digest.clone().unwrap_or_else(|| self.uri.to_string())
    }

    /// Name of the link to it, by which some servers know its format.
    fn file_name(&self, service: &str) -> String {
        let text = self.uri.to_string();
        let last = text.rsplit('/').next().unwrap_or_default();
        match &self.digest {
            None if !last.is_empty() => last.to_owned(),
            _ => service.to_owned(),
        }
    }

    /// The model of an artifact that a status names.
    fn of(artifact: &ArtifactStatus) -> Option<Self> {
        Some(Self {
            uri: artifact.uri.parse().ok()?,
            digest: Some(artifact.digest.clone()),
            bytes: u64::try_from(artifact.bytes).unwrap_or(0),
            run_id: Some(artifact.run_id.clone()),
            input: None,
        })
    }
}

/// Judges a spec.
///
/// # Errors
/// The condition that says why nothing is served.
pub fn check(
    service: &InferenceService,
    container: &ServingContainer,
    observed: &Observed,
    env: &Env,
) -> Result<Container, Refusal> {
    let invalid = |message: String| Refusal::Spec(Reason::SpecInvalid, message);
    let seconds = |field: &str, text: &Option<strata_api::Duration>, default: i64| match text {
        None => Ok(default),
        Some(text) => text
            .seconds()
            .and_then(|seconds| i64::try_from(seconds).ok())
            .filter(|seconds| *seconds > 0)
            .ok_or_else(|| {
                invalid(format!(
                    "spec.engine.container.{field} must be a duration above 0, such as 10m"
                ))
            }),
    };
    check_name(&service.name_any()).map_err(invalid)?;
    check_pod(&service.spec.common.pod.clone().unwrap_or_default()).map_err(invalid)?;
    let health = container.health_path.clone().unwrap_or_else(|| "/health".into());
    let port = u16::try_from(container.port.unwrap_or(SERVE_PORT.into()));
    Ok(Container {
        image: container.image.clone(),
        command: container.command.clone(),
        args: container.args.clone(),
        env: container
            .env
            .iter()
            .map(|each| (each.name.clone(), each.value.clone()))
            .collect(),
        port: port.map_err(|_| invalid("spec.engine.container.port is out of range".into()))?,
        probes: Probes {
            ready: container.ready_path.clone().unwrap_or_else(|| health.clone()),
            health,
            startup_seconds: seconds("startup", &container.startup, DEFAULT_STARTUP_SECONDS)?,
        },
        needs: Needs::parse(&container.needs).map_err(invalid)?,
        shim_image: env.runtime_image.clone(),
        model: model(service, observed),
    })
}

fn model(service: &InferenceService, observed: &Observed) -> Result<Model, Refusal> {
    let input = resolve_all(service, observed)?.into_iter().next().ok_or_else(|| {
        let message = "spec.model: exactly one of pretrainJob, alignmentJob, uri must be set";
        Refusal::Spec(Reason::SpecInvalid, message.into())
    })?;
    let upstream = observed
        .upstream
        .values()
        .flat_map(|upstream| upstream.artifact.iter().chain(&upstream.previous));
    let published = upstream
        .into_iter()
        .find(|artifact| Some(&artifact.digest) == input.digest.as_ref());
    Ok(Model {
        uri: input.uri.clone(),
        digest: input.digest.clone(),
        bytes: input.bytes.unwrap_or(0),
        run_id: published.map(|artifact| artifact.run_id.clone()),
        input: Some(input),
    })
}

impl Container {
    /// How its pods are asked whether they live.
    pub fn probes(&self) -> &Probes {
        &self.probes
    }

    /// What is served now: what the spec names, or else what was served last.
    pub fn served(&self, status: &RunStatus) -> Option<Model> {
        match &self.model {
            Ok(model) => Some(model.clone()),
            Err(_) => status.artifact.as_ref().and_then(Model::of),
        }
    }

    /// The serving pods.
    pub fn pods(
        &self,
        name: &str,
        serving: &Serving,
        placement: Option<&Placement>,
        model: &Model,
        there: Option<&Deployment>,
    ) -> PodTemplateSpec {
        let mut claims = Claims::default();
        claims.read(&model.uri);
        let mut labels = labels::common(ResourceKind::InferenceService, name, labels::SERVE);
        if let Some(run_id) = &model.run_id {
            labels.insert(labels::RUN.into(), run_id.clone());
        }
        let path = format!("{MODEL_DIR}/{}", model.file_name(name));
        let mut env = vec![
            variable(MODEL_PATH_ENV, path.as_str()),
            variable(MODEL_NAME_ENV, name),
            variable(PORT_ENV, self.port.to_string()),
        ];
        env.extend(
            model
                .digest
                .as_ref()
                .map(|digest| variable(MODEL_DIGEST_ENV, digest.as_str())),
        );
        env.extend(self.env.iter().map(|(name, value)| variable(name, value.as_str())));
        let memory_mib = u32::try_from(BASE_MIB + model.bytes.div_ceil(1 << 20)).unwrap_or(u32::MAX);
        let mut template = template(PodParts {
            labels,
            annotations: BTreeMap::from([(labels::DIGEST.to_owned(), model.identity())]),
            image: self.image.clone(),
            command: self.command.clone(),
            env,
            port: ("http", self.port),
            claims: &claims,
            volumes: Vec::new(),
            sizes: Sizes {
                cpu_millis: 250,
                memory_mib,
                memory_limit_mib: memory_mib,
            },
            grace_seconds: DEREGISTER_SECONDS + serving.drain_seconds,
            restart_policy: None,
            placement,
            overrides: &serving.pod,
        });
        for container in template.spec.iter_mut().flat_map(|spec| &mut spec.containers) {
            container.command = container.command.take().filter(|command| !command.is_empty());
            container.args = Some(self.args.clone()).filter(|args| !args.is_empty());
            container.lifecycle = Some(Lifecycle {
                pre_stop: Some(LifecycleHandler {
                    sleep: Some(SleepAction {
                        seconds: DEREGISTER_SECONDS,
                    }),
                    ..LifecycleHandler::default()
                }),
                ..Lifecycle::default()
            });
        }
        let mut arguments = vec![
            "locate".to_owned(),
            "--model".into(),
            model.uri.to_string(),
            "--link".into(),
            path,
        ];
        if let Some(digest) = &model.digest {
            arguments.extend(["--digest".to_owned(), digest.clone()]);
        }
        // Another operator version restarts no pod: the shim changes with what is served.
        let shim = there.and_then(|there| shim_of(there, &model.identity()));
        let shim = shim.unwrap_or_else(|| self.shim_image.clone());
        add_init(
            &mut template,
            &shim,
            arguments,
            ("model", MODEL_DIR),
            claims.volumes().1,
        );
        adapt(&mut template, &self.needs, serving.pod.resources.is_some());
        template
    }
}

/// Strata's image in the pods that serve `identity` now.
fn shim_of(deployment: &Deployment, identity: &str) -> Option<String> {
    let template = &deployment.spec.as_ref()?.template;
    let serves = template.metadata.as_ref()?.annotations.as_ref()?.get(labels::DIGEST)?;
    let init = template.spec.as_ref()?.init_containers.as_ref()?;
    let shim = init.iter().find(|container| container.name == SHIM_CONTAINER)?;
    shim.image.clone().filter(|_| serves == identity)
}

/// What is wanted of the server beside the pods: that no preparing run of before goes on.
pub fn plan(observed: &Observed) -> Planned {
    Planned {
        delete: plan::all_of(observed),
        ..Planned::default()
    }
}

/// What is said of the run that there is not, and of what is served.
pub fn judge(service: &InferenceService, container: &Container) -> Judged {
    let before = service
        .status
        .as_ref()
        .map(|status| status.run_status.clone())
        .unwrap_or_default();
    let mut status = RunStatus {
        observed_generation: service.metadata.generation,
        conditions: before.conditions.clone(),
        artifact: before.artifact.clone(),
        previous_artifacts: before.previous_artifacts.clone(),
        inputs: before.inputs.clone(),
        ..RunStatus::default()
    };
    let model = match &container.model {
        Ok(model) => model,
        Err(refusal) => {
            return Judged {
                status,
                findings: report::refused(service, refusal, None, &Observed::default()),
                requeue: None,
            };
        }
    };
    let artifact = model.digest.as_ref().map(|digest| ArtifactStatus {
        uri: model.uri.to_string(),
        digest: digest.clone(),
        bytes: i64::try_from(model.bytes).unwrap_or(i64::MAX),
        run_id: model.run_id.clone().unwrap_or_default(),
    });
    // A pinned model whose resource is gone is known by what was said of it before.
    let known = artifact.filter(|artifact| {
        before
            .artifact
            .as_ref()
            .is_none_or(|known| known.digest != artifact.digest)
    });
    match (known, &model.digest) {
        (Some(artifact), _) => report::replace_artifact(&mut status, artifact),
        (None, Some(_)) => {}
        (None, None) => status.artifact = None,
    }
    status.inputs = model.input.iter().map(report::input).collect::<Vec<InputStatus>>();
    let inputs = match model.digest {
        Some(_) => "1 of 1 published",
        None => "the spec names only plain URIs",
    };
    let nothing = "nothing is prepared: the container serves the model as it was published";
    Judged {
        status,
        findings: vec![
            Finding::new(
                ConditionType::Accepted,
                Reason::SpecAccepted,
                "the spec can be carried out",
            ),
            Finding::new(ConditionType::InputsReady, Reason::InputsResolved, inputs),
            Finding::new(ConditionType::Succeeded, Reason::Published, nothing),
        ],
        requeue: None,
    }
}

/// What the pods are to serve, as they say it.
pub fn identity(service: &InferenceService, container: &Container) -> Option<String> {
    let none = RunStatus::default();
    let status = service.status.as_ref().map_or(&none, |status| &status.run_status);
    container.served(status).map(|model| model.identity())
}

impl Container {
    /// Whether the spec asks for a container.
    pub fn wanted(service: &InferenceService) -> Option<&ServingContainer> {
        service.spec.engine.as_ref()?.container.as_ref()
    }
}
