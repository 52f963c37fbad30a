//! A container of the user's: how the shim comes to be in it, and what it needs of its pod.
//!
//! ```text
//! init container   Strata's image   strata-shim inject /strata/shim          for a stage
//!                                   strata-shim locate … --link /strata/model/NAME    before serving
//! container        the user's       /strata/shim/ld.so … strata-shim run -- PROGRAM   or, serving, its own entry point
//! ```

use k8s_openapi::api::core::v1::{
    Container, EmptyDirVolumeSource, EnvVar, PodTemplateSpec, ResourceRequirements, Volume, VolumeMount,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use strata_api::ContainerNeeds;
use strata_contract::{EXCHANGE_DIR, SHIM, SHIM_DIR, SHIM_LOADER, StageContainer};

use super::pod::{CONTAINER, restricted};
use super::quantity;

/// Name of the init container with Strata's image.
pub const SHIM_CONTAINER: &str = "strata-shim";

/// A container that carries out a stage, with everything checked.
#[derive(Clone, Debug, PartialEq)]
pub struct Stage {
    /// What determines the result.
    pub run: StageContainer,
    /// What it needs of its pod.
    pub needs: Needs,
}

/// What a container of the user's needs of its pod.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Needs {
    shared_memory: Option<Quantity>,
    scratch: Option<Quantity>,
    user_id: Option<i64>,
    writes_to_root: bool,
}

impl Needs {
    /// Judges what a spec says.
    ///
    /// # Errors
    /// A sentence that names the field.
    pub fn parse(needs: &ContainerNeeds) -> Result<Self, String> {
        let size = |field: &str, text: &Option<Quantity>| match text {
            Some(text) if quantity::bytes(&text.0).is_none_or(|bytes| bytes < 1) => Err(format!(
                "spec.engine.container.{field} must be a size above 0, such as 1Gi; got {}",
                text.0
            )),
            text => Ok(text.clone()),
        };
        Ok(Self {
            shared_memory: size("sharedMemory", &needs.shared_memory)?,
            scratch: size("scratch", &needs.scratch)?,
            user_id: needs.run_as_user,
            writes_to_root: needs.writable_root_filesystem.unwrap_or(false),
        })
    }
}

impl Stage {
    /// Judges what a spec says.
    ///
    /// # Errors
    /// A sentence that names the field.
    pub fn parse(container: &strata_api::StageContainer) -> Result<Self, String> {
        let variables = container.env.iter();
        Ok(Self {
            run: StageContainer {
                image: container.image.clone(),
                command: container.command.clone(),
                args: container.args.clone(),
                env: variables.map(|each| (each.name.clone(), each.value.clone())).collect(),
            },
            needs: Needs::parse(&container.needs)?,
        })
    }

    /// The command of its container: the shim, which runs the user's.
    pub fn command(&self) -> Vec<String> {
        let shim = [
            format!("{SHIM_DIR}/{SHIM_LOADER}"),
            "--library-path".into(),
            SHIM_DIR.into(),
            format!("{SHIM_DIR}/{SHIM}"),
            "run".into(),
            "--".into(),
        ];
        let theirs = self.run.command.iter().chain(&self.run.args).cloned();
        shim.into_iter().chain(theirs).collect()
    }
}

/// A variable with a plain value.
pub fn variable(name: &str, value: impl Into<String>) -> EnvVar {
    EnvVar {
        name: name.to_owned(),
        value: Some(value.into()),
        ..EnvVar::default()
    }
}

/// Puts the shim into the pod of a stage's container, with the folder that the two share.
pub fn add_shim(template: &mut PodTemplateSpec, image: &str) {
    let arguments = ["inject".to_owned(), SHIM_DIR.to_owned()];
    add_init(template, image, arguments.into(), ("shim", SHIM_DIR), Vec::new());
    add_folder(template, "exchange", EXCHANGE_DIR, None);
}

/// Lets Strata's image run `arguments` of the shim before the container starts; `folder` is a folder that both see.
pub fn add_init(
    template: &mut PodTemplateSpec,
    image: &str,
    arguments: Vec<String>,
    folder: (&str, &str),
    more_mounts: Vec<VolumeMount>,
) {
    let size = |cpu: &str, memory: &str| {
        [("cpu", cpu), ("memory", memory)].map(|(name, size)| (name.to_owned(), Quantity(size.into())))
    };
    let (name, path) = folder;
    let mounts = [mount(name, path)].into_iter().chain(more_mounts).collect();
    let init = Container {
        name: SHIM_CONTAINER.into(),
        image: Some(image.to_owned()),
        image_pull_policy: Some("IfNotPresent".into()),
        command: Some([SHIM.to_owned()].into_iter().chain(arguments).collect()),
        resources: Some(ResourceRequirements {
            requests: Some(size("10m", "32Mi").into()),
            limits: Some([("memory".to_owned(), Quantity("256Mi".into()))].into()),
            ..ResourceRequirements::default()
        }),
        volume_mounts: Some(mounts),
        security_context: Some(restricted()),
        termination_message_path: Some("/dev/termination-log".into()),
        termination_message_policy: Some("FallbackToLogsOnError".into()),
        ..Container::default()
    };
    if let Some(spec) = template.spec.as_mut() {
        spec.init_containers.get_or_insert_default().push(init);
    }
    add_folder(template, name, path, None);
}

/// Gives the container what it needs of its pod. What it asks for is the user's to say: Strata's own limits would be wrong.
pub fn adapt(template: &mut PodTemplateSpec, needs: &Needs, has_resources: bool) {
    if let Some(size) = &needs.shared_memory {
        add_folder(template, "shm", "/dev/shm", Some(size));
    }
    let Some(spec) = template.spec.as_mut() else { return };
    if let Some(size) = &needs.scratch {
        let tmp = spec.volumes.iter_mut().flatten().find(|volume| volume.name == "tmp");
        if let Some(folder) = tmp.and_then(|volume| volume.empty_dir.as_mut()) {
            folder.size_limit = Some(size.clone());
        }
    }
    for container in spec
        .containers
        .iter_mut()
        .filter(|container| container.name == CONTAINER)
    {
        let env = container.env.get_or_insert_default();
        if !env.iter().any(|variable| variable.name == "HOME") {
            env.push(variable("HOME", "/tmp"));
        }
        if let (false, Some(resources)) = (has_resources, container.resources.as_mut()) {
            // Devices are not shared: their limit is their request.
            for limits in resources.limits.iter_mut() {
                limits.retain(|name, _| name.contains('/'));
            }
            resources.limits = resources.limits.take().filter(|limits| !limits.is_empty());
        }
        let security = container.security_context.get_or_insert_default();
        if needs.writes_to_root {
            security.read_only_root_filesystem = Some(false);
        }
        if let Some(id) = needs.user_id {
            security.run_as_user = Some(id);
            security.run_as_non_root = Some(id != 0);
        }
    }
}

/// An empty folder of the pod in its container; with a size, it is in memory.
fn add_folder(template: &mut PodTemplateSpec, name: &str, path: &str, memory: Option<&Quantity>) {
    let Some(spec) = template.spec.as_mut() else { return };
    spec.volumes.get_or_insert_default().push(Volume {
        name: name.to_owned(),
        empty_dir: Some(EmptyDirVolumeSource {
            medium: memory.map(|_| "Memory".to_owned()),
            size_limit: Some(memory.cloned().unwrap_or_else(|| Quantity("256Mi".into()))),
        }),
        ..Volume::default()
    });
    for container in &mut spec.containers {
        container.volume_mounts.get_or_insert_default().push(mount(name, path));
    }
}

fn mount(name: &str, path: &str) -> VolumeMount {
    VolumeMount {
        name: name.to_owned(),
        mount_path: path.to_owned(),
        ..VolumeMount::default()
    }
}
