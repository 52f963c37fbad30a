//! From a spec and what it refers to, to an [`Order`]: what is to be run, or why nothing is.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::ResourceExt;
use strata_api::{ArtifactStatus, Common, InputStatus, PlacementStatus, PodOverrides, Reason, Reference, RunStatus};
use strata_contract::{Checkpoint, Input, Resource, Stage, StageContainer, Uri, hash_canonical};

use super::{Engine, Runs, attempt};
use crate::engine::kind::{Env, Observed, Ref, Refusal, ResourceKind, Status};
use crate::placement::{self, Placement, Preflight};
use crate::workload::container;
use crate::workload::job::MAX_RESOURCE_NAME;
use crate::workload::labels;
use crate::workload::pod::Sizes;
use crate::workload::volume::Claims;

/// Attempts that may fail, where the spec does not say.
const DEFAULT_RETRIES: i32 = 3;

/// Something that a run reads, as the spec names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputRef {
    /// What it is to the stage.
    pub name: String,
    /// Where it comes from.
    pub source: Source,
}

/// Where an input comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// What a resource published.
    Artifact {
        /// The resource.
        from: Ref,
        /// The digest that the user pinned.
        digest: Option<String>,
    },
    /// A URI, as written.
    Plain(String),
}

impl InputRef {
    /// The input that a reference to a resource of `kind` names.
    pub fn artifact(name: &str, kind: ResourceKind, reference: &Reference) -> Self {
        Self {
            name: name.into(),
            source: Source::Artifact {
                from: Ref {
                    kind,
                    name: reference.name.clone(),
                },
                digest: reference.digest.clone(),
            },
        }
    }

    /// The resource that publishes it, if one does.
    pub fn from(&self) -> Option<Ref> {
        match &self.source {
            Source::Artifact { from, .. } => Some(from.clone()),
            Source::Plain(_) => None,
        }
    }

    /// The model that `source` names, as the input `name`.
    pub fn model(name: &str, source: &strata_api::ModelSource) -> Option<Self> {
        match (&source.pretrain_job, &source.alignment_job, &source.uri) {
            (Some(reference), None, None) => Some(Self::artifact(name, ResourceKind::PretrainJob, reference)),
            (None, Some(reference), None) => Some(Self::artifact(name, ResourceKind::AlignmentJob, reference)),
            (None, None, Some(uri)) => Some(Self {
                name: name.into(),
                source: Source::Plain(uri.0.clone()),
            }),
            _ => None,
        }
    }
}

/// A run that can be carried out: everything resolved, nothing raw left.
#[derive(Clone, Debug)]
pub struct Order {
    /// Who wants it.
    pub resource: Resource,
    /// Kind of who wants it.
    pub kind: ResourceKind,
    /// Owner of what is made for it.
    pub owner: OwnerReference,
    /// Generation of the spec that this was made from.
    pub generation: i64,
    /// Hash of what determines the result, 16 hexadecimal digits.
    pub run_id: String,
    /// What to do.
    pub stage: Stage,
    /// What it reads from others.
    pub inputs: Vec<Input>,
    /// Where it publishes: the run's own folder.
    pub output: Uri,
    /// Claims that its pod mounts.
    pub claims: Claims,
    /// Attempts that may fail.
    pub retries: i32,
    /// Longest time of an attempt in seconds.
    pub deadline_seconds: Option<i64>,
    /// Whether the user wants it stopped.
    pub suspend: bool,
    /// What the container asks for.
    pub sizes: Sizes,
    /// What the user set on pods.
    pub pod: PodOverrides,
    /// Where its pods go; absent: wherever there is room.
    pub placement: Option<Placement>,
    /// What is expected there.
    pub expected: Option<PlacementStatus>,
    /// Image of a run that begins now.
    pub image: String,
    /// The user's container that does the work; absent: Strata's own engine.
    pub container: Option<container::Stage>,
    /// Strata's image, from which a container gets the shim.
    pub shim_image: String,
    /// Nodes of an attempt.
    pub nodes: u32,
    /// The queue in which attempts wait for Kueue.
    pub queue: Option<String>,
}

/// Judges a spec.
///
/// # Errors
/// The condition that says why nothing is run.
pub fn check<T: Runs>(resource: &T, observed: &Observed, env: &Env) -> Result<Order, Refusal> {
    let spec_invalid = |message: String| Refusal::Spec(Reason::SpecInvalid, message);
    let common = resource.common();
    let name = resource.name_any();
    let namespace = resource.namespace().unwrap_or_default();
    let this = Ref {
        kind: T::RUN_KIND,
        name: name.clone(),
    };

    check_name(&name).map_err(spec_invalid)?;
    let pod = common.pod.clone().unwrap_or_default();
    check_pod(&pod).map_err(spec_invalid)?;
    let storage = match &common.storage {
        Some(storage) => storage
            .uri
            .0
            .parse()
            .map_err(|error| spec_invalid(format!("spec.storage.uri: {error}")))?,
        None => env.default_storage.clone().ok_or_else(|| {
            let message = "write spec.storage.uri: pvc://CLAIM/FOLDER, or set the operator's default storage";
            Refusal::Spec(Reason::StorageMissing, message.into())
        })?,
    };
    let deadline_seconds = match &common.deadline {
        None => None,
        Some(text) => Some(
            text.seconds()
                .filter(|seconds| *seconds > 0)
                .and_then(|seconds| i64::try_from(seconds).ok())
                .ok_or_else(|| spec_invalid("spec.deadline must be a duration above 0, such as 30m".into()))?,
        ),
    };
    let engine = resource.engine().map_err(spec_invalid)?;
    let container = match engine {
        Engine::Own(_) => None,
        Engine::Container(container) => Some(container::Stage::parse(container).map_err(spec_invalid)?),
    };
    if let Some(circle) = circle(&this, resource, observed) {
        let message = format!("the resource depends on itself: {circle}; break the circle");
        return Err(Refusal::Spec(Reason::ReferenceCycle, message));
    }
    // The plain fields are judged before the inputs are there: a wrong one should not wait for hours to be named.
    let wanted = resource.inputs();
    let placeholders: Vec<Input> = wanted
        .iter()
        .map(placeholder)
        .collect::<Result<_, _>>()
        .map_err(spec_invalid)?;
    resource.stage(&placeholders).map_err(spec_invalid)?;
    resource.fits(observed).map_err(spec_invalid)?;
    let placed = placement::of_run(resource, observed).and_then(|preflight| {
        let image = match &container {
            Some(container) => container.run.image.clone(),
            None => placement::image(preflight.as_ref().map(|preflight| &preflight.placement), env)?,
        };
        Ok((preflight, image))
    });
    if let Err(misfit) = &placed
        && misfit.reason == Reason::SpecInvalid
    {
        return Err(spec_invalid(misfit.message.clone()));
    }

    let none = RunStatus::default();
    let status = resource.status().map_or(&none, Status::run_status);
    let run_with = |inputs: Vec<Input>| {
        let stage = resource.stage(&inputs).map_err(spec_invalid)?;
        let made_by = container.as_ref().map(|container| &container.run);
        let run_id = run_id(T::RUN_KIND, &stage, made_by, common.run_generation.unwrap_or(0));
        Ok((inputs, stage, run_id))
    };
    let inputs: Result<Vec<Input>, Refusal> = wanted
        .iter()
        .map(|input| resolve(input, &namespace, status, observed))
        .collect();
    let (inputs, stage, run_id) = match inputs {
        Ok(inputs) => run_with(inputs)?,
        // What is published stays good when that which it was made from is gone; but nothing new starts from it.
        Err(refusal) => as_published(&wanted, &namespace, status, observed)
            .and_then(|inputs| run_with(inputs).ok())
            .filter(|(.., run_id)| is_published(status, run_id))
            // What can never be computed here should not wait for hours for its inputs.
            .ok_or_else(|| placed.as_ref().err().cloned().map_or(refusal, Refusal::Placement))?,
    };
    // What runs or is done has its place, whatever became of the nodes since.
    let has_place = is_published(status, &run_id) || observed.jobs.iter().any(|job| !attempt::finished(job));
    let (preflight, image) = match placed {
        Ok((preflight, image)) => (preflight, image),
        Err(_) if has_place => (None, env.runtime_image.clone()),
        Err(misfit) => return Err(Refusal::Placement(misfit)),
    };
    let output = storage.join(&format!(
        "{namespace}/{}/{name}/{run_id}",
        T::RUN_KIND.name().to_lowercase()
    ));
    let mut claims = Claims::default();
    inputs.iter().for_each(|input| claims.read(&input.uri));
    if let Stage::Curate(config) = &stage {
        config.sources.iter().for_each(|source| claims.read(&source.uri));
    }
    claims.write(&output);
    Ok(Order {
        kind: T::RUN_KIND,
        owner: owner(resource),
        generation: resource.meta().generation.unwrap_or(0),
        run_id,
        inputs,
        stage,
        output,
        claims,
        retries: common.retries.unwrap_or(DEFAULT_RETRIES),
        deadline_seconds,
        suspend: common.suspend.unwrap_or(false),
        sizes: T::SIZES,
        pod,
        nodes: preflight.as_ref().map_or(1, |preflight| preflight.placement.nodes),
        expected: preflight
            .as_ref()
            .map(|Preflight { placement, estimate }| estimate.status(placement, &observed.fleet.table)),
        placement: preflight.map(|preflight| preflight.placement),
        image: match &container {
            Some(container) => container.run.image.clone(),
            None => image,
        },
        container,
        shim_image: env.runtime_image.clone(),
        queue: queue(common).map(str::to_owned),
        resource: Resource {
            kind: T::RUN_KIND.name().into(),
            namespace,
            name,
        },
    })
}

/// The queue in which a resource's work waits for Kueue.
pub fn queue(common: &Common) -> Option<&str> {
    Some(common.scheduler.as_ref()?.kubernetes.queue.as_str())
}

/// The reference that makes `resource` the owner of something.
pub fn owner<T: Runs>(resource: &T) -> OwnerReference {
    OwnerReference {
        api_version: T::api_version(&()).into_owned(),
        kind: T::kind(&()).into_owned(),
        name: resource.name_any(),
        uid: resource.uid().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// Judges a resource's name.
///
/// # Errors
/// The rule.
pub fn check_name(name: &str) -> Result<(), String> {
    let plain = name
        .chars()
        .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    if plain && name.len() <= MAX_RESOURCE_NAME && name.starts_with(|c: char| c.is_ascii_lowercase()) {
        return Ok(());
    }
    Err(strata_api::NAME_RULE.into())
}

/// Judges what a user sets on pods.
///
/// # Errors
/// A sentence that says what to write instead.
pub fn check_pod(pod: &PodOverrides) -> Result<(), String> {
    if let Some(variable) = pod.env.iter().find(|variable| variable.name.starts_with("STRATA_")) {
        return Err(format!(
            "spec.pod.env: {} is Strata's: choose a name that does not begin with STRATA_",
            variable.name
        ));
    }
    if let Some(key) = pod.labels.keys().find(|key| labels::is_ours(key)) {
        return Err(format!("spec.pod.labels: {key} is set by Strata: choose another key"));
    }
    match pod.annotations.keys().find(|key| key.starts_with(labels::GROUP_PREFIX)) {
        Some(key) => Err(format!(
            "spec.pod.annotations: {key} is set by Strata: choose another key"
        )),
        None => Ok(()),
    }
}

/// The way from `this` back to itself, if there is one.
fn circle<T: Runs>(this: &Ref, resource: &T, observed: &Observed) -> Option<String> {
    let mut ways: Vec<Vec<Ref>> = super::refs(resource).into_iter().map(|to| vec![to]).collect();
    let mut seen = std::collections::BTreeSet::new();
    while let Some(way) = ways.pop() {
        let here = way.last()?;
        if here == this {
            let names: Vec<String> = std::iter::once(this).chain(&way).map(Ref::to_string).collect();
            return Some(names.join(" → "));
        }
        if seen.insert(here.clone()) {
            for next in observed
                .upstream
                .get(here)
                .into_iter()
                .flat_map(|upstream| &upstream.refs)
            {
                ways.push(way.iter().chain([next]).cloned().collect());
            }
        }
    }
    None
}

/// An input that stands for one that may not be there yet.
fn placeholder(input: &InputRef) -> Result<Input, String> {
    let uri = match &input.source {
        Source::Artifact { .. } => Uri::File("/".into()),
        Source::Plain(text) => text.parse().map_err(|error| format!("{}: {error}", input.name))?,
    };
    Ok(Input {
        name: input.name.clone(),
        uri,
        digest: None,
        bytes: None,
        resource: None,
    })
}

/// Whether what is published is of the run `run_id`.
pub fn is_published(status: &RunStatus, run_id: &str) -> bool {
    status
        .artifact
        .as_ref()
        .is_some_and(|artifact| artifact.run_id == run_id)
}

/// What `resource` reads from others, as it is there now.
///
/// # Errors
/// The condition that says which input is not there.
pub fn resolve_all<T: Runs>(resource: &T, observed: &Observed) -> Result<Vec<Input>, Refusal> {
    let none = RunStatus::default();
    let status = resource.status().map_or(&none, Status::run_status);
    let namespace = resource.namespace().unwrap_or_default();
    let inputs = resource.inputs();
    inputs
        .iter()
        .map(|input| resolve(input, &namespace, status, observed))
        .collect()
}

fn resolve(input: &InputRef, namespace: &str, status: &RunStatus, observed: &Observed) -> Result<Input, Refusal> {
    let (from, pinned) = match &input.source {
        Source::Artifact { from, digest } => (from, digest),
        Source::Plain(_) => return placeholder(input).map_err(|message| Refusal::Spec(Reason::SpecInvalid, message)),
    };
    // A digest says all: what was read under it once is known, whatever became of its resource since.
    let known = |known: &&InputStatus| known.digest == *pinned && known.resource == Some(from.to_string());
    if let Some(known) = status.inputs.iter().find(known).filter(|_| pinned.is_some()) {
        return artifact(input, from, namespace, &known.uri, pinned.clone(), None);
    }
    let Some(upstream) = observed.upstream.get(from) else {
        let message = format!("{from} ({}) does not exist: apply it, or correct the name", input.name);
        return Err(Refusal::Inputs(Reason::ReferenceNotFound, message));
    };
    let Some(last) = &upstream.artifact else {
        let why = match &upstream.not_ready {
            Some((reason, message)) => format!("{reason}: {message}"),
            None => "no status yet".into(),
        };
        let message = format!("waiting for {from} to publish ({why})");
        return Err(Refusal::Inputs(Reason::WaitingForInput, message));
    };
    let mut all = std::iter::once(last).chain(&upstream.previous);
    let wanted = |published: &&ArtifactStatus| pinned.as_ref().is_none_or(|pinned| *pinned == published.digest);
    let found = all.find(wanted).ok_or_else(|| {
        let message = format!(
            "{from} published {} last, and none of the {} before that it remembers has the pinned digest {}: correct it, \
             or leave it out",
            last.digest,
            upstream.previous.len(),
            pinned.as_deref().unwrap_or_default(),
        );
        Refusal::Inputs(Reason::DigestNotFound, message)
    })?;
    let bytes = u64::try_from(found.bytes).ok();
    artifact(input, from, namespace, &found.uri, Some(found.digest.clone()), bytes)
}

/// The input that an artifact of `from` is.
fn artifact(
    input: &InputRef,
    from: &Ref,
    namespace: &str,
    uri: &str,
    digest: Option<String>,
    bytes: Option<u64>,
) -> Result<Input, Refusal> {
    let uri = uri.parse().map_err(|error| {
        Refusal::Inputs(
            Reason::WaitingForInput,
            format!("the artifact of {from} has no usable address: {error}"),
        )
    })?;
    Ok(Input {
        name: input.name.clone(),
        uri,
        digest,
        bytes,
        resource: Some(Resource {
            kind: from.kind.name().into(),
            namespace: namespace.into(),
            name: from.name.clone(),
        }),
    })
}

/// The inputs, where one is not to be had as it was when the last artifact was made from it.
fn as_published(wanted: &[InputRef], namespace: &str, status: &RunStatus, observed: &Observed) -> Option<Vec<Input>> {
    let input = |input| resolve_or_remember(input, namespace, status, observed).ok();
    wanted.iter().map(input).collect()
}

/// The input; where it is not to be had, as the status remembers it.
///
/// # Errors
/// The condition that says why it is not there.
pub fn resolve_or_remember(
    input: &InputRef,
    namespace: &str,
    status: &RunStatus,
    observed: &Observed,
) -> Result<Input, Refusal> {
    resolve(input, namespace, status, observed).or_else(|refusal| {
        // What is pinned is that or nothing.
        let Source::Artifact { from, digest: None } = &input.source else {
            return Err(refusal);
        };
        let is_it = |known: &&InputStatus| known.name == input.name && known.resource == Some(from.to_string());
        match status.inputs.iter().find(is_it) {
            Some(known) => artifact(input, from, namespace, &known.uri, known.digest.clone(), None),
            None => Err(refusal),
        }
    })
}

/// Hash of what determines the result: the stage without what only says where things are or how often to save.
///
/// Whoever adds a field to a stage's configuration leaves it out of the JSON where it has its default
/// (`skip_serializing_if`): otherwise every run there is gets another id, and is computed again.
fn run_id(kind: ResourceKind, stage: &Stage, container: Option<&StageContainer>, run_generation: i64) -> String {
    let mut stage = stage.clone();
    let fixed = Checkpoint {
        every_seconds: 0,
        keep: 0,
    };
    let inputs: Vec<&mut Input> = match &mut stage {
        Stage::Curate(_) => Vec::new(),
        Stage::Pretrain(config) => {
            config.checkpoint = fixed;
            config.datasets.iter_mut().collect()
        }
        Stage::Align(config) => {
            config.checkpoint = fixed;
            let capability = config.evaluation.capability.iter_mut();
            capability
                .chain(&mut config.datasets)
                .chain([&mut config.base])
                .collect()
        }
        Stage::Quantize(config) => vec![&mut config.model],
    };
    for input in inputs {
        input.bytes = None;
        input.resource = None;
        if input.digest.is_some() {
            input.uri = Uri::File("/".into());
        }
    }
    let mut what = serde_json::json!({
        "kind": kind.name(),
        "stage": stage,
        "runGeneration": run_generation,
    });
    // Left out where there is none: Strata's own runs keep the ids that they had before there was a choice.
    if let Some(container) = container {
        what["container"] = serde_json::json!(container);
    }
    let mut hash = hash_canonical(&what);
    hash.truncate(16);
    hash
}
