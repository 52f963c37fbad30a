//! The real Argo CD beside a bed: its application controller and repo server as processes of this machine, under a
//! ServiceAccount of the bed, and a git repository that it keeps the cluster in step with.
//!
//! Its API server, user interface and single sign-on are left out: nothing of Strata passes through them.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use kube::api::{ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams};
use kube::{Api, Client};
use serde_json::{Value, json};

use crate::bed::command::{output, output_with_input, tail_of_file};
use crate::bed::go::{self, Program};
use crate::bed::process::Owned;
use crate::bed::{Bed, machine};
use crate::namespace::tool;
use crate::{repository, wait};

/// Its namespace.
pub const NAMESPACE: &str = "argocd";
/// As what it writes.
pub const USER: &str = "system:serviceaccount:argocd:argocd-application-controller";
/// The program, by the name that the controller is called by.
const CONTROLLER: &str = "argocd-application-controller";
/// How long it may need to start, or to see a commit.
const DEADLINE: Duration = Duration::from_secs(120);
/// The branch that is followed.
const BRANCH: &str = "main";

/// A running Argo CD with one Application; ends when dropped.
pub struct ArgoCd {
    bed: Bed,
    applications: Api<DynamicObject>,
    folder: tempfile::TempDir,
    programs: Vec<(&'static str, Owned)>,
}

impl ArgoCd {
    /// Starts it, with the judgement of health that `config/argocd` gives it.
    ///
    /// # Errors
    /// Something is missing, or does not start; the message holds the end of its log.
    pub async fn start(bed: &Bed, client: &Client) -> Result<Self> {
        machine::install(&[machine::GIT, machine::REDIS])?;
        let argocd = tool(Program::Argocd)?;
        let argocd: &Path = argocd.as_ref();
        let folder = tempfile::tempdir()?;
        prepare(bed)?;
        let kubeconfig = kubeconfig(bed, folder.path())?;
        let [redis, repositories, metrics, more_metrics] = ports::<4>()?;
        let address = |port: u16| format!("127.0.0.1:{port}");
        let mut this = Self {
            bed: bed.clone(),
            applications: Api::namespaced_with(client.clone(), NAMESPACE, &kind("Application")),
            folder,
            programs: Vec::new(),
        };

        let server = machine::find(machine::REDIS.program).context("redis-tools are not installed")?;
        let mut command = Command::new(server);
        command.arg0("redis-server");
        command.args(["--bind", "127.0.0.1", "--port", &redis.to_string()]);
        command.args(["--save", "", "--appendonly", "no"]);
        this.run("redis", command)?;

        let mut command = Command::new(argocd);
        command
            .env("ARGOCD_BINARY_NAME", "argocd-repo-server")
            .env("ARGOCD_GPG_ENABLED", "false");
        command.args([
            "--disable-tls",
            "--address",
            "127.0.0.1",
            "--metrics-address",
            "127.0.0.1",
        ]);
        command.args([
            "--port",
            &repositories.to_string(),
            "--metrics-port",
            &metrics.to_string(),
        ]);
        command.args(["--redis", &address(redis)]);
        this.run("repo-server", command)?;

        let mut command = Command::new(argocd);
        command.env("ARGOCD_BINARY_NAME", CONTROLLER);
        // The bed, seen from here, is the cluster that it says it runs in.
        command
            .env("ARGOCD_FAKE_IN_CLUSTER", "true")
            .env("HOSTNAME", "argocd-application-controller-0");
        command
            .env("KUBECONFIG", &kubeconfig)
            .arg("--kubeconfig")
            .arg(&kubeconfig);
        command.args(["--namespace", NAMESPACE, "--metrics-port", &more_metrics.to_string()]);
        command.args(["--redis", &address(redis), "--repo-server", &address(repositories)]);
        // What it judges of each resource is written where a test can read it.
        command.args(["--repo-server-plaintext", "--persist-resource-health"]);
        this.run("application-controller", command)?;
        this.git(&["init", "--quiet", "--initial-branch", BRANCH])?;
        Ok(this)
    }

    fn run(&mut self, name: &'static str, mut command: Command) -> Result<()> {
        let log = fs::File::create(self.log(name))?;
        command
            .env("NO_PROXY", "*")
            .env("HOME", self.folder.path())
            .env("TMPDIR", self.folder.path())
            .env("ARGOCD_TLS_DATA_PATH", self.folder.path().join("tls"))
            .env("ARGOCD_SSH_DATA_PATH", self.folder.path().join("ssh"))
            .current_dir(self.folder.path())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let program = Owned::start(&mut command).with_context(|| format!("cannot start {name}"))?;
        self.programs.push((name, program));
        Ok(())
    }

    fn log(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.log"))
    }

    /// What its programs said last, for an error.
    #[must_use]
    pub fn explain(&self) -> String {
        let logs = self.programs.iter().map(|(name, _)| {
            let tail = tail_of_file(&self.log(name), 25);
            format!("--- {name}\n{tail}\n")
        });
        logs.collect()
    }

    fn git(&self, arguments: &[&str]) -> Result<String> {
        let repository = self.repository();
        fs::create_dir_all(&repository)?;
        let mut git = Command::new("git");
        // Whatever the user's own settings are.
        git.env("GIT_CONFIG_GLOBAL", "/dev/null")
            .env("GIT_CONFIG_SYSTEM", "/dev/null");
        git.args(["-c", "user.name=e2e", "-c", "user.email=e2e@example.org"]);
        output(git.current_dir(repository).args(arguments))
    }

    fn repository(&self) -> PathBuf {
        self.folder.path().join("repository")
    }

    /// Commits files, by name; one without content is removed. Returns the commit.
    ///
    /// # Errors
    /// Git's.
    pub fn commit(&self, message: &str, files: &[(&str, Option<&str>)]) -> Result<String> {
        let models = self.repository().join("models");
        fs::create_dir_all(&models)?;
        for (name, content) in files {
            match content {
                Some(content) => fs::write(models.join(name), content)?,
                None => fs::remove_file(models.join(name))?,
            }
        }
        self.git(&["add", "--all"])?;
        self.git(&["commit", "--quiet", "--message", message])?;
        Ok(self.git(&["rev-parse", "HEAD"])?.trim().to_owned())
    }

    /// Applies `config/argocd/application.yaml`, pointed at the repository and at `namespace`.
    ///
    /// # Errors
    /// The API server refuses it.
    pub async fn application(&self, namespace: &str) -> Result<()> {
        let mut application: Value = serde_yaml::from_str(&fs::read_to_string(config().join("application.yaml"))?)?;
        application["spec"]["source"]["repoURL"] = format!("file://{}", self.repository().display()).into();
        application["spec"]["destination"]["namespace"] = namespace.into();
        apply(&self.bed, &[application])
    }

    /// Removes the Application and leaves what it made.
    ///
    /// # Errors
    /// The API server's.
    pub async fn remove(&self) -> Result<()> {
        self.applications.delete(APPLICATION, &DeleteParams::default()).await?;
        wait::until_gone(&self.applications, APPLICATION, DEADLINE).await
    }

    /// Asks for a new look at git and cluster, whatever is cached, and waits until it was taken.
    ///
    /// # Errors
    /// It was not in time.
    pub async fn refresh(&self) -> Result<Value> {
        let annotation = "argocd.argoproj.io/refresh";
        let ask = Patch::Merge(json!({"metadata": {"annotations": {(annotation): "hard"}}}));
        self.applications
            .patch(APPLICATION, &PatchParams::default(), &ask)
            .await?;
        // It takes the annotation away when it has looked.
        let looked = |application: &Value| application["metadata"]["annotations"].get(annotation).is_none();
        self.until("has looked again", DEADLINE, looked).await
    }

    /// Refreshes until the Application, or what the clusters says of it, satisfies `condition`.
    ///
    /// # Errors
    /// It does not in time; the message holds its status and the logs.
    pub async fn until(&self, what: &str, deadline: Duration, condition: impl Fn(&Value) -> bool) -> Result<Value> {
        let holds = |application: Option<&DynamicObject>| {
            let value = application.and_then(|application| serde_json::to_value(application).ok());
            value.is_some_and(|application| condition(&application))
        };
        let found = wait::until(&self.applications, APPLICATION, what, deadline, holds).await;
        Ok(serde_json::to_value(found.with_context(|| self.explain())?)?)
    }
}

/// The name of the Application in `config/argocd`.
const APPLICATION: &str = "models";

/// `config/argocd`.
#[must_use]
pub fn config() -> PathBuf {
    repository::path("config/argocd")
}

/// One of `config/argocd/health-fixtures.yaml`.
#[derive(Debug, serde::Deserialize)]
pub struct Fixture {
    /// What it is about.
    pub case: String,
    metadata: Value,
    #[serde(default)]
    status: Value,
    /// What there is to say about it.
    pub health: Health,
}

/// What Argo CD says of a resource.
#[derive(Debug, PartialEq, Eq, serde::Deserialize)]
pub struct Health {
    /// One of its words.
    pub status: String,
    /// In a sentence.
    pub message: String,
}

impl Fixture {
    /// The fixture as a resource of `kind`.
    #[must_use]
    pub fn of(&self, kind: &str) -> Value {
        let mut resource = json!({"apiVersion": "strata.dev/v1alpha1", "kind": kind, "metadata": self.metadata});
        if !self.status.is_null() {
            resource["status"] = self.status.clone();
        }
        resource
    }
}

/// `config/argocd/health-fixtures.yaml`.
///
/// # Errors
/// It cannot be read.
pub fn fixtures() -> Result<Vec<Fixture>> {
    Ok(serde_yaml::from_str(&fs::read_to_string(
        config().join("health-fixtures.yaml"),
    )?)?)
}

/// The scripts of `config/argocd/argocd-cm.yaml` by kind.
///
/// # Errors
/// It cannot be read, or holds something else.
pub fn scripts() -> Result<BTreeMap<String, String>> {
    let map: Value = serde_yaml::from_str(&fs::read_to_string(config().join("argocd-cm.yaml"))?)?;
    let data: BTreeMap<String, String> = serde_json::from_value(map["data"].clone())?;
    let kind = |(key, script): (String, String)| {
        let kind = key.strip_prefix("resource.customizations.health.strata.dev_");
        Ok((
            kind.with_context(|| format!("{key} is no health of a kind"))?
                .to_owned(),
            script,
        ))
    };
    data.into_iter().map(kind).collect()
}

/// What Argo CD's own command line makes of a resource's health by the ConfigMap of `config/argocd`: status and message.
///
/// # Errors
/// It cannot judge it.
pub fn health(resource: &Value, folder: &Path) -> Result<Health> {
    let path = folder.join("resource.yaml");
    fs::write(&path, serde_yaml::to_string(resource)?)?;
    let mut argocd = Command::new(tool(Program::Argocd)?);
    argocd
        .env("HOME", folder)
        .args(["admin", "settings", "resource-overrides", "health"]);
    let said = output(
        argocd
            .arg(path)
            .arg("--argocd-cm-path")
            .arg(config().join("argocd-cm.yaml")),
    )?;
    let field = |name: &str| {
        said.lines()
            .find_map(|line| line.strip_prefix(name))
            .map(|text| text.trim().to_owned())
    };
    Ok(Health {
        status: field("STATUS:").with_context(|| format!("no verdict: {said}"))?,
        message: field("MESSAGE:").unwrap_or_default(),
    })
}

/// Health and sync of the resource `KIND/NAME` of an Application.
#[must_use]
pub fn resource(application: &Value, kind: &str, name: &str) -> (String, String) {
    let all = application["status"]["resources"].as_array().into_iter().flatten();
    let found = all
        .into_iter()
        .find(|resource| resource["kind"] == kind && resource["name"] == name);
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    found.map_or_else(Default::default, |resource| {
        (word(&resource["health"]["status"]), word(&resource["status"]))
    })
}

fn kind(kind: &str) -> ApiResource {
    ApiResource::from_gvk(&GroupVersionKind::gvk("argoproj.io", "v1alpha1", kind))
}

/// Its CRDs, its namespace, its rights and its settings, as its own manifests have them.
fn prepare(bed: &Bed) -> Result<()> {
    let crds = go::source(Program::Argocd)?.join("manifests/crds");
    for crd in ["application-crd.yaml", "appproject-crd.yaml"] {
        output(
            bed.kubectl()
                .args(["apply", "--server-side", "--force-conflicts", "-f"])
                .arg(crds.join(crd)),
        )?;
    }
    for name in ["applications", "appprojects"] {
        let wanted = ["wait", "--for=condition=Established", "--timeout=60s"];
        output(bed.kubectl().args(wanted).arg(format!("crd/{name}.argoproj.io")))?;
    }
    let part_of = json!({"app.kubernetes.io/part-of": "argocd"});
    let metadata = |name: &str| json!({"name": name, "namespace": NAMESPACE, "labels": part_of});
    apply(
        bed,
        &[json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}})],
    )?;
    apply(
        bed,
        &[
            json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata(CONTROLLER)}),
            json!({"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": CONTROLLER},
                   "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"},
                   "subjects": [{"kind": "ServiceAccount", "name": CONTROLLER, "namespace": NAMESPACE}]}),
            json!({"apiVersion": "v1", "kind": "Secret", "metadata": metadata("argocd-secret")}),
            json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata("argocd-cm")}),
            json!({"apiVersion": "argoproj.io/v1alpha1", "kind": "AppProject", "metadata": metadata("default"), "spec": {
                "sourceRepos": ["*"], "destinations": [{"server": "*", "namespace": "*"}],
                "clusterResourceWhitelist": [{"group": "*", "kind": "*"}]}}),
        ],
    )?;
    // As a user does it.
    let patch = config().join("argocd-cm.yaml");
    let words = [
        "--namespace",
        NAMESPACE,
        "patch",
        "configmap",
        "argocd-cm",
        "--patch-file",
    ];
    output(bed.kubectl().args(words).arg(patch)).map(drop)
}

fn apply(bed: &Bed, objects: &[Value]) -> Result<()> {
    let list = json!({"apiVersion": "v1", "kind": "List", "items": objects});
    let words = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
    output_with_input(bed.kubectl().args(words), &list.to_string()).map(drop)
}

/// A kubeconfig of its ServiceAccount, so that the audit log tells its writes from the test's.
fn kubeconfig(bed: &Bed, folder: &Path) -> Result<PathBuf> {
    let create = [
        "--namespace",
        NAMESPACE,
        "create",
        "token",
        CONTROLLER,
        "--duration",
        "2h",
    ];
    let token = output(bed.kubectl().args(create))?;
    let view = ["config", "view", "--raw", "--flatten", "--output", "json"];
    let mut config: Value = serde_json::from_str(&output(bed.kubectl().args(view))?)?;
    let users = config["users"].as_array_mut().context("a kubeconfig has users")?;
    ensure!(!users.is_empty(), "the administrator's kubeconfig has no user");
    for user in users {
        user["user"] = json!({"token": token.trim()});
    }
    let path = folder.join("kubeconfig");
    fs::write(&path, config.to_string())?;
    Ok(path)
}

/// Ports of this machine that are free now.
fn ports<const N: usize>() -> Result<[u16; N]> {
    // All are held until all are known, so that none is given twice.
    let held: Vec<TcpListener> = (0..N)
        .map(|_| TcpListener::bind("127.0.0.1:0"))
        .collect::<Result<_, _>>()?;
    let ports: Vec<u16> = held
        .iter()
        .map(|port| port.local_addr().map(|address| address.port()))
        .collect::<Result<_, _>>()?;
    ports
        .try_into()
        .map_err(|_| anyhow::anyhow!("{N} ports were asked for"))
}
