//! A real one-node Kubernetes on this machine: etcd, the control plane, containerd, kubelet, kube-proxy and CoreDNS.
//!
//! ```text
//!  host ── veth strata-N ──┐
//!                          │  namespaces: network, mounts, processes
//!   bed supervise (pid 1) ─┼─ etcd, kube-apiserver, …, containerd ─ pods
//!                          │
//!   $STRATA_CACHE/bed/N ───┘  state: certificates, logs, images, volumes
//! ```
//!
//! Everything of a bed hangs on one process. When it ends, for whatever reason, the kernel ends all programs and pods
//! with it, unmounts what they mounted, and drops their iptables rules, bridges and addresses. So `down` has one
//! process to end, known by id and start time, and a crash leaves only a folder and an empty control group.

pub mod cache;
pub mod cgroup;
pub mod command;
pub mod config;
pub mod go;
pub mod host;
pub mod machine;
pub mod network;
pub mod pki;
pub mod process;
pub mod slot;
pub mod supervise;
pub mod volume;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Node;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Api, Client, Config};

use crate::image::{Built, catalog};
use crate::wait;
use command::say;
use pki::Pki;
use process::Recorded;
use slot::Slot;

/// How long a healthy machine may need for one step of `up`.
const STEP: Duration = Duration::from_secs(120);
const COREDNS: &str = include_str!("../manifests/coredns.yaml");

/// The bed in one slot, whether it runs or not.
#[derive(Debug, Clone)]
pub struct Bed {
    slot: Slot,
    state: PathBuf,
}

impl Bed {
    /// The bed in `slot`.
    #[must_use]
    pub fn new(slot: Slot) -> Self {
        Self {
            slot,
            state: slot.state(),
        }
    }

    /// The bed that the tests use: `STRATA_E2E` holds its slot.
    ///
    /// # Errors
    /// The variable is missing or no slot.
    pub fn from_env() -> Result<Self> {
        let slot =
            std::env::var("STRATA_E2E").context("STRATA_E2E names no bed: run these tests with `make test-e2e`")?;
        Ok(Self::new(slot.parse().map_err(anyhow::Error::msg)?))
    }

    /// Its slot.
    #[must_use]
    pub fn slot(&self) -> Slot {
        self.slot
    }

    /// The folder of all its files.
    #[must_use]
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// The administrator's kubeconfig.
    #[must_use]
    pub fn kubeconfig(&self) -> PathBuf {
        Pki::at(&self.state).kubeconfig("admin").into()
    }

    /// The first process inside, if it runs.
    #[must_use]
    pub fn init(&self) -> Option<Recorded> {
        Recorded::read(&self.record()).filter(|recorded| recorded.is_alive())
    }

    /// A client with all rights.
    ///
    /// # Errors
    /// The bed was never started.
    pub async fn client(&self) -> Result<Client> {
        let path = self.kubeconfig();
        let file = Kubeconfig::read_from(&path)
            .with_context(|| format!("no bed in slot {}: `bed up` starts it", self.slot))?;
        let mut config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
        // One from the environment knows nothing of this machine's own addresses.
        config.proxy_url = None;
        Ok(Client::try_from(config)?)
    }

    /// `kubectl` as the administrator.
    #[must_use]
    pub fn kubectl(&self) -> Command {
        let mut command = Command::new(go::path(go::Program::Kubectl));
        command.env("KUBECONFIG", self.kubeconfig()).env("NO_PROXY", "*");
        command
    }

    /// A command inside the bed's mount and network namespaces.
    ///
    /// # Errors
    /// The bed does not run.
    pub fn inside(&self, program: &str) -> Result<Command> {
        let init = self
            .init()
            .with_context(|| format!("the bed in slot {} does not run", self.slot))?;
        let mut command = Command::new("nsenter");
        command.args(["-t", &init.pid.to_string(), "-m", "-n", "-p", program]);
        Ok(command)
    }

    /// Installs and compiles what a bed needs; seconds when all is there.
    ///
    /// # Errors
    /// What is missing and cannot be installed, in one line.
    pub fn build() -> Result<()> {
        // What cannot be installed is named before minutes go into what can.
        machine::check()?;
        go::check(&go::BED)?;
        machine::install(&machine::BED)?;
        go::build(&go::BED)
    }

    /// Starts the bed, unless it runs and is healthy. What a crashed or ailing one left is taken down first.
    ///
    /// # Errors
    /// The step that failed, with the end of the log that explains it.
    pub async fn up(&self) -> Result<()> {
        Self::build()?;
        let _alone = cache::lock(&self.slot.name())?;
        if self.is_healthy().await {
            say(format_args!(
                "the bed in slot {} runs and is healthy; nothing to do",
                self.slot
            ));
            return Ok(());
        }
        self.clear()?;
        let started = Instant::now();
        say(format_args!(
            "starting the bed in slot {} (about half a minute)",
            self.slot
        ));
        self.prepare_files()?;
        cgroup::create(&self.slot.name())?;
        let init = Recorded::of(supervise::launch(
            &self.state.join("plan.json"),
            &self.state.join("log/supervise.log"),
        )?)?;
        init.write(&self.record())?;
        network::connect(self.slot, init.pid)?;
        let (imported, ready) = tokio::join!(
            tokio::task::spawn_blocking({
                let bed = self.clone();
                move || bed.import(&catalog::BED).map(drop)
            }),
            self.wait_for_api(),
        );
        let client = ready?;
        imported??;
        let dns = self.slot.dns_address().to_string();
        let manifest = COREDNS.replace("{dns}", &dns).replace("{image}", catalog::COREDNS);
        command::output_with_input(self.kubectl().args(["apply", "--server-side", "-f", "-"]), &manifest)?;
        self.wait_for_node(&client).await?;
        let deployments: Api<Deployment> = Api::namespaced(client, "kube-system");
        wait::until(
            &deployments,
            "coredns",
            "is available",
            STEP,
            wait::deployment_is_available,
        )
        .await
        .with_context(|| self.explain("kubelet"))?;
        say(format_args!(
            "the bed in slot {} is up after {} s",
            self.slot,
            started.elapsed().as_secs()
        ));
        Ok(())
    }

    /// Ends everything of the bed and removes its files. Nothing to do is no error.
    ///
    /// # Errors
    /// A process that does not end, or a file that cannot be removed.
    pub fn down(&self) -> Result<()> {
        let _alone = cache::lock(&self.slot.name())?;
        self.clear()
    }

    fn clear(&self) -> Result<()> {
        if !self.state.exists() {
            return Ok(());
        }
        if let Some(init) = self.init() {
            init.kill(Duration::from_secs(30))?;
        }
        network::disconnect(self.slot);
        cgroup::remove(&self.slot.name())?;
        fs::remove_dir_all(&self.state).with_context(|| format!("cannot remove {}", self.state.display()))?;
        host::restore()?;
        say(format_args!("the bed in slot {} is gone", self.slot));
        Ok(())
    }

    /// Builds images, gives them to containerd, except those that it has, and returns them.
    ///
    /// # Errors
    /// The bed does not run, an image cannot be built, or containerd refuses it.
    pub fn import(&self, names: &[catalog::Name]) -> Result<Vec<Built>> {
        let end = Instant::now() + STEP;
        let present = loop {
            match command::output(self.ctr()?.args(["images", "list"])) {
                Ok(list) => break list,
                Err(_) if Instant::now() < end => std::thread::sleep(Duration::from_millis(100)),
                Err(error) => return Err(error.context(self.explain("containerd"))),
            }
        };
        // Another bed's import writes the same files.
        let _alone = cache::lock("images")?;
        let mut all = Vec::new();
        for name in names {
            let built = name.build()?;
            let has = |name: &str| {
                present
                    .lines()
                    .any(|line| line.starts_with(&format!("{name} ")) && line.contains(&built.digest))
            };
            if !has(&built.reference) {
                let import = ["images", "import", "--snapshotter", snapshotter(&self.state)];
                command::output(self.ctr()?.args(import).arg(&built.tar))?;
                say(format_args!("imported {}", built.reference));
            }
            // The manifests of config/ work as they are, too.
            let in_manifests = name.in_manifests();
            if !has(&in_manifests) {
                let tag = ["images", "tag", "--force", &built.reference, &in_manifests];
                command::output(self.ctr()?.args(tag))?;
            }
            all.push(built);
        }
        Ok(all)
    }

    /// Whether the API server answers and the node is ready.
    pub async fn is_healthy(&self) -> bool {
        if self.init().is_none() {
            return false;
        }
        let check = async {
            let client = self.client().await?;
            let node = Api::<Node>::all(client).get(&self.slot.name()).await?;
            anyhow::Ok(wait::node_is_ready(Some(&node)))
        };
        matches!(tokio::time::timeout(Duration::from_secs(10), check).await, Ok(Ok(true)))
    }

    fn record(&self) -> PathBuf {
        self.state.join("init.json")
    }

    fn ctr(&self) -> Result<Command> {
        let mut command = self.inside("ctr")?;
        command.args(["--address", config::CONTAINERD_SOCKET, "--namespace", "k8s.io"]);
        Ok(command)
    }

    fn prepare_files(&self) -> Result<()> {
        for folder in ["log/pods", "log/containers", "cni", "kubelet", "volumes"] {
            fs::create_dir_all(self.state.join(folder))?;
        }
        let plan = config::plan(self.slot, &self.state);
        host::prepare(&plan.mount_points())?;
        Pki::at(&self.state).create(self.slot)?;
        for (name, text) in config::files(self.slot, &self.state, snapshotter(&self.state)) {
            fs::write(self.state.join(name), text)?;
        }
        fs::write(self.state.join("plan.json"), serde_json::to_vec_pretty(&plan)?)?;
        Ok(())
    }

    async fn wait_for_api(&self) -> Result<Client> {
        let client = self.client().await?;
        let end = Instant::now() + STEP;
        loop {
            let request = http::Request::get("/readyz").body(Vec::new())?;
            match client.request_text(request).await {
                Ok(_) => return Ok(client),
                Err(_) if self.init().is_none() => bail!("the bed ended: {}", self.explain("supervise")),
                Err(error) if Instant::now() > end => return Err(error).context(self.explain("kube-apiserver")),
                Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
            }
        }
    }

    async fn wait_for_node(&self, client: &Client) -> Result<()> {
        let nodes: Api<Node> = Api::all(client.clone());
        wait::until(&nodes, &self.slot.name(), "is ready", STEP, wait::node_is_ready)
            .await
            .map(drop)
            .with_context(|| self.explain("kubelet"))
    }

    /// The end of a program's log, for an error.
    fn explain(&self, program: &str) -> String {
        let log = self.state.join(format!("log/{program}.log"));
        format!(
            "{program} says, in {}:\n{}",
            log.display(),
            command::tail_of_file(&log, 12)
        )
    }
}

/// `overlayfs`, except on a file system that is an overlay itself: those do not stack.
fn snapshotter(state: &Path) -> &'static str {
    let path = std::ffi::CString::new(state.to_string_lossy().as_bytes()).expect("a path holds no NUL");
    // SAFETY: a zeroed statfs is a valid value for the kernel to fill, and the path ends in NUL.
    let stacked = unsafe {
        let mut info: libc::statfs = std::mem::zeroed();
        libc::statfs(path.as_ptr(), &raw mut info) == 0 && info.f_type == libc::OVERLAYFS_SUPER_MAGIC
    };
    if stacked { "native" } else { "overlayfs" }
}
