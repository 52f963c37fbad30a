//! The demo: one real model's whole life on a real cluster, watched.
//!
//! ```text
//! cluster up → images → operator → samples → watch until the endpoint is ready → chat → table → lineage
//! ```

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};

use crate::bed::command::{self, say};
use crate::bed::{Bed, slot, volume::Volume};
use crate::image::catalog;

mod chat;
mod life;
mod lineage;
mod table;

pub use chat::Forward;
pub use life::Life;
pub use lineage::of_service as lineage;

/// Namespace of the demo's resources.
pub const NAMESPACE: &str = "strata-demo";
/// Longest time that the whole life may take: several times what two slow cores need.
const LIFE_DEADLINE: Duration = Duration::from_secs(45 * 60);
/// The question that the aligned model is asked.
const QUESTION: &str = "Give me three short tips for being a good neighbour.";

/// Which cluster the demo runs on.
#[derive(Debug, Clone)]
pub enum Cluster {
    /// A bed of this machine.
    Bed(Bed),
    /// The one of the current kubectl context, with images in this registry.
    Current {
        /// Host and path that the cluster pulls from.
        registry: String,
    },
}

impl Cluster {
    /// The demo's bed, or the current context's cluster.
    ///
    /// # Errors
    /// `cluster` is neither empty nor `current`, or the registry is missing.
    pub fn from_names(cluster: &str, registry: &str) -> Result<Self> {
        match (cluster, registry) {
            ("", _) => Ok(Self::Bed(Bed::new(slot::DEMO))),
            ("current", "") => bail!("CLUSTER=current needs REGISTRY=HOST/PATH: where the images go that it pulls"),
            ("current", registry) => Ok(Self::Current {
                registry: registry.trim_end_matches('/').into(),
            }),
            (other, _) => {
                bail!("CLUSTER={other}: write CLUSTER=current, or leave it out for a cluster on this machine")
            }
        }
    }

    fn kubectl(&self) -> Command {
        match self {
            Self::Bed(bed) => bed.kubectl(),
            Self::Current { .. } => Command::new("kubectl"),
        }
    }

    async fn client(&self) -> Result<Client> {
        match self {
            Self::Bed(bed) => bed.client().await,
            Self::Current { .. } => {
                let file = Kubeconfig::read().context("there is no kubectl context")?;
                Ok(Client::try_from(
                    Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?,
                )?)
            }
        }
    }

    /// Manifests of `folder` with the images of this cluster's registry.
    fn manifests(&self, folder: &str) -> Result<String> {
        let path = repository().join(folder);
        let text = command::output(self.kubectl().arg("kustomize").arg(&path))?;
        Ok(match self {
            Self::Bed(_) => text,
            Self::Current { registry } => text.replace("strata.local/", &format!("{registry}/")),
        })
    }

    fn apply(&self, arguments: &[&str], manifests: &str) -> Result<()> {
        let mut kubectl = self.kubectl();
        kubectl
            .args(["apply", "--server-side", "--force-conflicts"])
            .args(arguments)
            .args(["-f", "-"]);
        command::output_with_input(&mut kubectl, manifests).map(drop)
    }
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Runs the whole demo.
///
/// # Errors
/// The step that failed, with what the cluster said.
pub async fn run(cluster: &Cluster) -> Result<()> {
    let started = Instant::now();
    step(1, "a cluster");
    match cluster {
        Cluster::Bed(bed) => {
            bed.up().await?;
            step(2, "images, built without Docker");
            bed.import(&catalog::STRATA)?;
        }
        Cluster::Current { registry } => {
            say("using the cluster of the current kubectl context");
            step(2, "images, built without Docker");
            catalog::push(registry)?;
        }
    }
    step(3, "the operator: kubectl apply -k config/default");
    install(cluster)?;
    step(4, "the samples: kubectl apply -k config/samples");
    apply_samples(cluster).await?;
    step(5, "the life of a model (about ten minutes on two cores)");
    let client = cluster.client().await?;
    Life::new(client.clone(), NAMESPACE).watch(LIFE_DEADLINE).await?;
    step(6, "a chat with the model that was just aligned");
    let forward = Forward::start(cluster.kubectl(), NAMESPACE, "assistant").await?;
    shell_line(&format!("user: {QUESTION}"));
    forward.chat("assistant", QUESTION, print_piece).await?;
    print_piece("\n");
    step(7, "what there is now: kubectl get strata");
    shell_line(&command::output(
        cluster.kubectl().args(["-n", NAMESPACE, "get", "strata"]),
    )?);
    step(8, "where the endpoint comes from");
    shell_line(&lineage(&client, NAMESPACE, "assistant").await?);
    next(cluster, started.elapsed());
    Ok(())
}

/// Removes what [`run`] made.
///
/// # Errors
/// What could not be removed.
pub fn down(cluster: &Cluster) -> Result<()> {
    match cluster {
        Cluster::Bed(bed) => bed.down(),
        Cluster::Current { .. } => {
            let delete = ["delete", "--ignore-not-found", "--wait=true"];
            command::output(cluster.kubectl().args(delete).args(["namespace", NAMESPACE]))?;
            let manifests = cluster.manifests("config/default")?;
            command::output_with_input(cluster.kubectl().args(delete).args(["-f", "-"]), &manifests)?;
            say("the demo, the operator and the CRDs are gone from the cluster");
            Ok(())
        }
    }
}

fn install(cluster: &Cluster) -> Result<()> {
    cluster.apply(&[], &cluster.manifests("config/default")?)?;
    command::output(cluster.kubectl().args([
        "-n",
        "strata-system",
        "rollout",
        "status",
        "deployment/strata-operator",
        "--timeout=180s",
    ]))?;
    say("the operator is ready");
    Ok(())
}

async fn apply_samples(cluster: &Cluster) -> Result<()> {
    let namespace = format!(
        "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {NAMESPACE}\n  labels:\n    \
         pod-security.kubernetes.io/enforce: restricted\n"
    );
    cluster.apply(&[], &namespace)?;
    if let Cluster::Bed(bed) = cluster {
        for claim in ["raw", "artifacts"] {
            Volume::ensure(bed, &cluster.client().await?, (NAMESPACE, claim), "8Gi").await?;
        }
    }
    cluster.apply(&["-n", NAMESPACE], &cluster.manifests("config/samples")?)
}

fn step(number: u8, words: &str) {
    shell_line(&format!("\n[{number}/8] {words}"));
}

fn next(cluster: &Cluster, elapsed: Duration) {
    let (minutes, seconds) = (elapsed.as_secs() / 60, elapsed.as_secs() % 60);
    shell_line(&format!("\nDone in {minutes} min {seconds} s. What to try next:\n"));
    let bed = matches!(cluster, Cluster::Bed(_));
    if let Cluster::Bed(bed) = cluster {
        shell_line(&format!("  export KUBECONFIG={}", bed.kubeconfig().display()));
        if let Some(folder) = Path::new(bed.kubectl().get_program())
            .parent()
            .filter(|f| f.is_absolute())
        {
            shell_line(&format!("  export PATH={}:$PATH", folder.display()));
        }
    }
    for line in [
        "kubectl -n strata-demo get strata",
        "kubectl -n strata-demo describe alignmentjob assistant",
        "kubectl -n strata-demo scale inferenceservice assistant --replicas=1",
        "kubectl -n strata-demo port-forward service/assistant 8000:80 &",
        r#"curl -N localhost:8000/v1/chat/completions -H 'content-type: application/json' -d '{"model":"assistant","stream":true,"messages":[{"role":"user","content":"Hello!"}]}'"#,
    ] {
        shell_line(&format!("  {line}"));
    }
    shell_line(&format!(
        "  make demo-down{}",
        if bed { "" } else { " CLUSTER=current REGISTRY=…" }
    ));
}

/// The demo's words are its result, so they go to standard output.
#[allow(clippy::print_stdout, reason = "the demo talks to a person")]
fn shell_line(text: &str) {
    println!("{text}");
}

#[allow(clippy::print_stdout, reason = "the demo talks to a person")]
fn print_piece(text: &str) {
    print!("{text}");
    // A closed standard output is noticed by the next line.
    let _ = std::io::stdout().flush();
}
