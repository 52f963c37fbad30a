//! The Go programs of a bed, compiled from the modules that their projects publish, once for each version.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::bed::cache;
use crate::bed::command::{self, say};

/// A program that is compiled from a Go module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the variants are the programs' own names")]
pub enum Program {
    KubeApiserver,
    KubeControllerManager,
    KubeScheduler,
    Kubelet,
    KubeProxy,
    Kubectl,
    Etcd,
    Coredns,
    Helm,
    Kubeconform,
    Crane,
    LuaHealth,
    Argocd,
    Kwok,
    Kueue,
    Jobset,
    Prometheus,
}

/// What the modules below ask for.
const GO: &str = "1.26";
/// From this one on, Go fetches the version that a module asks for.
const FETCHING_MINOR: u32 = 21;

/// What a bed runs, in the order in which it is compiled.
pub const BED: [Program; 8] = [
    Program::KubeApiserver,
    Program::KubeControllerManager,
    Program::KubeScheduler,
    Program::Kubelet,
    Program::KubeProxy,
    Program::Kubectl,
    Program::Etcd,
    Program::Coredns,
];

/// What only tests run.
pub const TOOLS: [Program; 5] = [
    Program::Helm,
    Program::Kubeconform,
    Program::LuaHealth,
    Program::Prometheus,
    Program::Kwok,
];

/// Who else decides when and how pods begin.
pub const QUEUES: [Program; 2] = [Program::Kueue, Program::Jobset];

/// Argo CD: what `make test-argocd` runs, and nothing else.
pub const ARGO_CD: [Program; 1] = [Program::Argocd];

/// What plays nodes that are not there.
pub const FLEET: [Program; 1] = [Program::Kwok];

/// A module: everything of it is compiled by one run of `go build`.
struct Module {
    path: &'static str,
    version: &'static str,
    /// On 2 cores, with nothing in Go's own caches.
    usual_minutes: u32,
    source: Source,
    /// Variables that the linker sets, so that the programs know their version.
    stamps: &'static [&'static str],
    programs: &'static [Program],
}

/// How a main module is made around it.
enum Source {
    /// The packages are tools of ours.
    Tools,
    /// As `Tools`; its `./staging/` replacements become the published modules of this version.
    Staging(&'static str),
    /// As `Tools`, with the replacements of its own `go.mod`, by whose versions its requirements fit together.
    Replaced,
    /// As `Tools`, compiled with these build tags.
    Tagged(&'static str),
    /// A `main.go` of ours.
    Main(&'static str),
}

const MODULES: &[Module] = &[
    Module {
        path: "k8s.io/kubernetes",
        version: "v1.36.3",
        usual_minutes: 15,
        source: Source::Staging("v0.36.3"),
        stamps: &[
            "k8s.io/component-base/version.gitVersion={version}",
            "k8s.io/component-base/version.gitMajor={major}",
            "k8s.io/component-base/version.gitMinor={minor}",
        ],
        programs: &[
            Program::KubeApiserver,
            Program::KubeControllerManager,
            Program::KubeScheduler,
            Program::Kubelet,
            Program::KubeProxy,
            Program::Kubectl,
        ],
    },
    Module {
        path: "go.etcd.io/etcd/server/v3",
        version: "v3.6.8",
        usual_minutes: 2,
        source: Source::Tools,
        stamps: &[],
        programs: &[Program::Etcd],
    },
    Module {
        path: "github.com/coredns/coredns",
        version: "v1.15.0",
        usual_minutes: 3,
        source: Source::Main(include_str!("../../manifests/coredns.go.txt")),
        stamps: &[],
        programs: &[Program::Coredns],
    },
    Module {
        path: "helm.sh/helm/v3",
        version: "v3.22.0",
        usual_minutes: 2,
        source: Source::Tools,
        stamps: &["helm.sh/helm/v3/internal/version.version={version}"],
        programs: &[Program::Helm],
    },
    Module {
        path: "github.com/yannh/kubeconform",
        version: "v0.8.0",
        usual_minutes: 1,
        source: Source::Tools,
        stamps: &["main.version={version}"],
        programs: &[Program::Kubeconform],
    },
    Module {
        path: "github.com/google/go-containerregistry",
        version: "v0.22.1",
        usual_minutes: 1,
        source: Source::Tools,
        stamps: &[],
        programs: &[Program::Crane],
    },
    Module {
        path: "github.com/yuin/gopher-lua",
        // What Argo CD asks for.
        version: "v1.1.1",
        usual_minutes: 1,
        source: Source::Main(include_str!("../../manifests/lua-health.go.txt")),
        stamps: &[],
        programs: &[Program::LuaHealth],
    },
    Module {
        path: "github.com/argoproj/argo-cd/v3",
        version: "v3.2.11",
        usual_minutes: 12,
        source: Source::Replaced,
        stamps: &["github.com/argoproj/argo-cd/v3/common.version={version}"],
        programs: &[Program::Argocd],
    },
    Module {
        path: "sigs.k8s.io/kwok",
        version: "v0.8.0",
        usual_minutes: 2,
        source: Source::Tools,
        stamps: &["sigs.k8s.io/kwok/pkg/consts.Version={version}"],
        programs: &[Program::Kwok],
    },
    Module {
        path: "sigs.k8s.io/kueue",
        version: "v0.15.0",
        usual_minutes: 8,
        source: Source::Tools,
        stamps: &[],
        programs: &[Program::Kueue],
    },
    Module {
        path: "sigs.k8s.io/jobset",
        version: "v0.11.0",
        usual_minutes: 4,
        source: Source::Tools,
        stamps: &[],
        programs: &[Program::Jobset],
    },
    Module {
        path: "github.com/prometheus/prometheus",
        version: "v0.316.0",
        usual_minutes: 6,
        // Of its ways to find targets, only Kubernetes: the others are the libraries of all clouds.
        source: Source::Tagged("remove_all_sd,enable_kubernetes_sd"),
        stamps: &["github.com/prometheus/common/version.Version={version}"],
        programs: &[Program::Prometheus],
    },
];

impl Program {
    /// The name of its file.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::KubeApiserver => "kube-apiserver",
            Self::KubeControllerManager => "kube-controller-manager",
            Self::KubeScheduler => "kube-scheduler",
            Self::Kubelet => "kubelet",
            Self::KubeProxy => "kube-proxy",
            Self::Kubectl => "kubectl",
            Self::Etcd => "etcd",
            Self::Coredns => "coredns",
            Self::Helm => "helm",
            Self::Kubeconform => "kubeconform",
            Self::Crane => "crane",
            Self::LuaHealth => "lua-health",
            Self::Argocd => "argocd",
            Self::Kwok => "kwok",
            Self::Kueue => "kueue",
            Self::Jobset => "jobset",
            Self::Prometheus => "prometheus",
        }
    }

    /// The Go package that holds its `main`.
    fn package(self, module: &Module) -> String {
        match (self, &module.source) {
            (_, Source::Main(_)) => ".".to_owned(),
            (Self::Etcd | Self::Jobset, _) => module.path.to_owned(),
            // One program, which is the controller, the repo server or the command line by the name it is called by.
            (Self::Argocd, _) => format!("{}/cmd", module.path),
            _ => format!("{}/cmd/{}", module.path, self.name()),
        }
    }

    fn module(self) -> &'static Module {
        MODULES
            .iter()
            .find(|m| m.programs.contains(&self))
            .expect("every program is listed in a module")
    }

    /// Its version, with the leading `v`.
    #[must_use]
    pub fn version(self) -> &'static str {
        self.module().version
    }
}

/// Where `program` lies once it is compiled: a folder for each version, so that it keeps its own name.
#[must_use]
pub fn path(program: Program) -> PathBuf {
    cache::programs().join(program.version()).join(program.name())
}

/// Compiles those of `programs` that are not in the cache, one module after the other. One caller at a time.
///
/// # Errors
/// As [`check`], or a module does not compile; the message holds the compiler's.
pub fn build(programs: &[Program]) -> Result<()> {
    check(programs)?;
    let _alone = cache::lock("go")?;
    for module in MODULES {
        let wanted = module
            .programs
            .iter()
            .any(|p| programs.contains(p) && !path(*p).exists());
        if wanted {
            build_module(module)?;
        }
    }
    Ok(())
}

/// Checks Go itself, where one of `programs` is still to be compiled.
///
/// # Errors
/// Go is missing or too old; the message says what to install.
pub fn check(programs: &[Program]) -> Result<()> {
    if programs.iter().all(|program| path(*program).exists()) {
        return Ok(());
    }
    let remedy = format!("install Go {GO}, or 1.{FETCHING_MINOR} or newer, which fetches {GO} by itself");
    let Ok(run) = Command::new("go").args(["env", "GOVERSION"]).output() else {
        bail!("Go is missing: {remedy}, and put `go` on the PATH");
    };
    let said = String::from_utf8_lossy(&run.stdout);
    // Go before 1.17 does not know the variable and says nothing.
    if said.trim().is_empty() || minor(&said).is_some_and(|minor| minor < FETCHING_MINOR) {
        bail!("the `go` on the PATH is too old ({}): {remedy}", said.trim());
    }
    Ok(())
}

/// The 26 of `go1.26.8`; `None` for a version of another form, as developers of Go have.
fn minor(version: &str) -> Option<u32> {
    version.trim().strip_prefix("go1.")?.split('.').next()?.parse().ok()
}

fn build_module(module: &Module) -> Result<()> {
    let names: Vec<&str> = module.programs.iter().map(|p| p.name()).collect();
    say(format_args!(
        "compiling {} {} (about {} min on 2 cores the first time)",
        names.join(", "),
        module.version,
        module.usual_minutes
    ));
    let started = std::time::Instant::now();
    let folder = cache::root()
        .join("go")
        .join(module.path.replace('/', "_"))
        .join(module.version);
    fs::create_dir_all(&folder)?;
    let packages: Vec<String> = module.programs.iter().map(|p| p.package(module)).collect();
    let mut main = format!("module bed\ngo {GO}.0\nrequire {} {}\n", module.path, module.version);
    match module.source {
        Source::Staging(version) => main.push_str(&staged(&upstream_go_mod(module)?, version)),
        Source::Replaced => main.push_str(&replaced(&upstream_go_mod(module)?)),
        Source::Tools | Source::Tagged(_) | Source::Main(_) => {}
    }
    fs::write(folder.join("go.mod"), main)?;
    let _ = fs::remove_file(folder.join("go.sum"));
    match module.source {
        Source::Main(text) => fs::write(folder.join("main.go"), text)?,
        Source::Tools | Source::Staging(_) | Source::Replaced | Source::Tagged(_) => {
            let versioned = packages.iter().map(|p| format!("{p}@{}", module.version));
            command::output(go(&folder).args(["get", "-tool"]).args(versioned))?;
        }
    }
    let built = folder.join("bin");
    let _ = fs::remove_dir_all(&built);
    fs::create_dir_all(&built)?;
    // With one package, a file name: the package's own name may be its version (`v3`).
    let target = if let [one] = module.programs {
        built.join(one.name())
    } else {
        built.join("")
    };
    let tags = if let Source::Tagged(tags) = module.source {
        tags
    } else {
        ""
    };
    command::output(
        go(&folder)
            .args([
                "build",
                "-tags",
                tags,
                "-mod=mod",
                "-trimpath",
                "-ldflags",
                &linker_flags(module),
                "-o",
            ])
            .arg(target)
            .args(packages),
    )?;
    for program in module.programs {
        let to = path(*program);
        fs::create_dir_all(to.parent().expect("a program lies in a folder"))?;
        fs::rename(built.join(program.name()), &to).with_context(|| format!("go build left no {}", program.name()))?;
    }
    say(format_args!(
        "compiled {} in {} s",
        names.join(", "),
        started.elapsed().as_secs()
    ));
    Ok(())
}

fn go(folder: &Path) -> Command {
    let mut command = Command::new("go");
    command.current_dir(folder).env("CGO_ENABLED", "0").env("GOWORK", "off");
    command
}

fn linker_flags(module: &Module) -> String {
    let mut numbers = module.version.trim_start_matches('v').split('.');
    let (major, minor) = (numbers.next().unwrap_or_default(), numbers.next().unwrap_or_default());
    let mut flags = "-s -w".to_owned();
    for stamp in module.stamps {
        let stamp = stamp
            .replace("{version}", module.version)
            .replace("{major}", major)
            .replace("{minor}", minor);
        flags.push_str(&format!(" -X {stamp}"));
    }
    flags
}

/// The folder of the module's files, as its project published them.
///
/// # Errors
/// Go cannot fetch it.
pub fn source(program: Program) -> Result<PathBuf> {
    Ok(download(program.module(), "Dir")?.into())
}

fn upstream_go_mod(module: &Module) -> Result<String> {
    Ok(fs::read_to_string(download(module, "GoMod")?)?)
}

/// What `go mod download` says of the module.
fn download(module: &Module, what: &str) -> Result<String> {
    let at = format!("{}@{}", module.path, module.version);
    let answer = command::output(go(&std::env::temp_dir()).args(["mod", "download", "-json", &at]))?;
    let answer: serde_json::Value = serde_json::from_str(&answer).context("go mod download did not answer in JSON")?;
    let said = answer[what].as_str();
    said.map(ToOwned::to_owned)
        .with_context(|| format!("go mod download names no {what}"))
}

/// `replace` lines that turn `X => ./staging/…` into the published module, without which `go get` would climb to the
/// newest Kubernetes.
fn staged(go_mod: &str, version: &str) -> String {
    let staged = replacements(go_mod).filter(|(_, target)| target.starts_with("./staging/"));
    let lines = staged.map(|(module, _)| format!("replace {module} => {module} {version}\n"));
    lines.collect()
}

/// The `replace` lines whose target is published: Go heeds only those of the main module, which is ours.
fn replaced(go_mod: &str) -> String {
    let published = replacements(go_mod).filter(|(_, target)| !target.starts_with('.'));
    let lines = published.map(|(module, target)| format!("replace {module} => {target}\n"));
    lines.collect()
}

/// What a `go.mod` replaces, and by what.
fn replacements(go_mod: &str) -> impl Iterator<Item = (&str, &str)> {
    let lines = go_mod
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default().trim());
    lines.filter_map(|line| line.trim_start_matches("replace ").split_once(" => "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn staging_modules_are_replaced_by_published_ones() {
        let go_mod = "module m\nrequire k8s.io/api v0.0.0\nreplace (\n\tk8s.io/api => ./staging/src/k8s.io/api\n\
                      \t// why\n\tother.org/x => other.org/y v1.0.0 // why\n)\nreplace k8s.io/kms => ./staging/src/k8s.io/kms\n";
        let expected = "replace k8s.io/api => k8s.io/api v0.36.3\nreplace k8s.io/kms => k8s.io/kms v0.36.3\n";
        assert_eq!(staged(go_mod, "v0.36.3"), expected);
        assert_eq!(replaced(go_mod), "replace other.org/x => other.org/y v1.0.0\n");
    }

    #[test]
    fn programs_know_their_version() {
        let flags = linker_flags(Program::Kubectl.module());
        assert!(flags.ends_with("version.gitVersion=v1.36.3 -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36"), "{flags}");
    }

    #[test]
    fn an_old_go_is_known() {
        for (said, known) in [
            ("go1.19.8\n", Some(19)),
            ("go1.26", Some(26)),
            ("go1.27rc1", None),
            ("devel +a1b2", None),
        ] {
            assert_eq!(minor(said), known, "{said}");
        }
    }

    #[test]
    fn every_program_of_the_bed_has_a_module() {
        for program in BED {
            assert!(path(program).ends_with(format!("{}/{}", program.version(), program.name())));
        }
    }
}
