//! The demo: one real model's whole life on a real cluster, watched.
//!
//! ```text
//! cluster up → images → operator → samples → watch until the endpoint is ready → chat → table → lineage → load
//! ```

use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::json;

use crate::bed::command::{self, say};
use crate::bed::{Bed, slot, volume::Volume};
use crate::chats::Way;
use crate::image::catalog;
use crate::repository;
use manifests::{Fit, LABEL};

mod forward;
mod guard;
mod life;
mod manifests;
mod scale;
mod table;

pub use forward::Forward;
pub use life::Life;

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
    /// The one of the current kubectl context.
    Current {
        /// Host and path that the cluster pulls from.
        registry: String,
        /// The class of the claims; empty for the cluster's default.
        storage_class: String,
    },
}

impl Cluster {
    /// The demo's bed, or the current context's cluster.
    ///
    /// # Errors
    /// `cluster` is neither empty nor `current`.
    pub fn from_names(cluster: &str, registry: &str, storage_class: &str) -> Result<Self> {
        match cluster {
            "" => Ok(Self::Bed(Bed::new(slot::DEMO))),
            "current" => Ok(Self::Current {
                registry: registry.into(),
                storage_class: storage_class.into(),
            }),
            other => {
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

    /// `strata`, as a user of the cluster runs it.
    fn strata(&self) -> Result<Command> {
        match self {
            Self::Bed(bed) => crate::strata::program(bed),
            Self::Current { .. } => Ok(Command::new(catalog::ours("strata")?)),
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

    fn apply(&self, arguments: &[&str], manifests: &str) -> Result<()> {
        let mut kubectl = self.kubectl();
        kubectl
            .args(["apply", "--server-side", "--force-conflicts"])
            .args(arguments)
            .args(["-f", "-"]);
        command::output_with_input(&mut kubectl, manifests).map(drop)
    }
}

/// Runs the whole demo.
///
/// # Errors
/// The step that failed, with what the cluster said.
pub async fn run(cluster: &Cluster) -> Result<()> {
    let started = Instant::now();
    step(1, "a cluster");
    let mut fit = prepare(cluster).await?;
    step(2, "images, built without Docker");
    fit.images = match cluster {
        Cluster::Bed(bed) => bed.import(&catalog::STRATA)?,
        Cluster::Current { registry, .. } => catalog::push(registry)?,
    };
    step(3, "the operator: config/default, with these images");
    install(cluster, &fit)?;
    step(4, "the samples: config/samples, with these images");
    apply_samples(cluster, &fit).await?;
    step(5, "the life of a model (five to ten minutes on two cores)");
    let client = cluster.client().await?;
    Life::new(client.clone(), NAMESPACE).watch(LIFE_DEADLINE).await?;
    step(6, "a chat with the model that was just aligned");
    shell_line(&format!("user: {QUESTION}"));
    let mut chat = cluster.strata()?;
    chat.args(["chat", "assistant", "--namespace", NAMESPACE, "--message", QUESTION]);
    chat.args(["--max-tokens", "160", "--temperature", "0"]);
    if !chat.status().context("cannot run strata chat")?.success() {
        bail!("the model did not answer");
    }
    step(7, "what there is now: kubectl get strata");
    shell_line(&command::output(
        cluster.kubectl().args(["-n", NAMESPACE, "get", "strata"]),
    )?);
    step(8, "where the endpoint comes from");
    let lineage = ["lineage", "inferenceservice/assistant", "--namespace", NAMESPACE];
    shell_line(&command::output(cluster.strata()?.args(lineage))?);
    step(9, "a load that one pod cannot hold (one to three minutes)");
    let way = match cluster {
        Cluster::Bed(_) => Way::to_service(&client, NAMESPACE, "assistant").await?,
        Cluster::Current { .. } => Way::Proxy(client.clone(), NAMESPACE.into(), "assistant".into()),
    };
    scale::play(&client, &way).await?;
    next(cluster, started.elapsed());
    Ok(())
}

/// Removes what [`run`] made.
///
/// # Errors
/// What could not be removed.
pub async fn down(cluster: &Cluster) -> Result<()> {
    if let Cluster::Bed(bed) = cluster {
        return bed.down();
    }
    let delete = |kinds: &str| {
        let ours = format!("{LABEL}=true");
        command::output(cluster.kubectl().args(["delete", kinds, "--wait=true", "-l", &ours])).map(drop)
    };
    delete("namespaces,clusterroles,clusterrolebindings")?;
    let others = guard::namespaces_in_use(&cluster.client().await?).await?;
    if others.is_empty() {
        delete("customresourcedefinitions")?;
        say("the demo, the operator and the CRDs are gone from the cluster");
    } else {
        let others: Vec<_> = others.into_iter().collect();
        say(format_args!(
            "the demo and the operator are gone; the CRDs stay, as other namespaces have resources of them ({}). No \
             operator serves these now: install one with charts/strata, or delete them and run this again",
            others.join(", ")
        ));
    }
    Ok(())
}

/// The cluster, running, and how it wants its manifests. Whatever forbids the demo is said here, before anything is done.
async fn prepare(cluster: &Cluster) -> Result<Fit> {
    let (registry, storage_class) = match cluster {
        Cluster::Bed(bed) => {
            bed.up().await?;
            return Ok(Fit::default());
        }
        Cluster::Current {
            registry,
            storage_class,
        } => (registry, storage_class),
    };
    if registry.is_empty() {
        bail!("CLUSTER=current needs REGISTRY=HOST/PATH: where the images go that it pulls");
    }
    let client = cluster.client().await?;
    guard::refuse_others(&client).await?;
    let nodes = guard::nodes(&client).await?;
    if nodes > 1 && storage_class.is_empty() {
        bail!(
            "the cluster has {nodes} nodes, and pods of several share a volume: add STORAGE_CLASS=NAME, a class that \
             offers ReadWriteMany (see kubectl get storageclass)"
        );
    }
    say(format_args!(
        "using the cluster of the current kubectl context; nodes: {nodes}"
    ));
    Ok(Fit {
        storage_class: Some(storage_class.clone()).filter(|class| !class.is_empty()),
        several_nodes: nodes > 1,
        ..Fit::default()
    })
}

fn install(cluster: &Cluster, fit: &Fit) -> Result<()> {
    let manifests = fit.render(cluster.kubectl(), &repository::path("config/default"))?;
    cluster.apply(&[], &manifests)?;
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

async fn apply_samples(cluster: &Cluster, fit: &Fit) -> Result<()> {
    let namespace = json!({
        "apiVersion": "v1",
        "kind": "Namespace",
        "metadata": {"name": NAMESPACE, "labels": {(LABEL): "true", "pod-security.kubernetes.io/enforce": "restricted"}},
    });
    cluster.apply(&[], &namespace.to_string())?;
    if let Cluster::Bed(bed) = cluster {
        for claim in ["raw", "artifacts"] {
            Volume::ensure(bed, &cluster.client().await?, (NAMESPACE, claim), "8Gi").await?;
        }
    }
    // A Job's template never changes, but its image does. What the last one copied is not copied again.
    let delete = [
        "-n",
        NAMESPACE,
        "delete",
        "job",
        "load-samples",
        "--ignore-not-found",
        "--wait",
    ];
    command::output(cluster.kubectl().args(delete))?;
    let manifests = fit.render(cluster.kubectl(), &repository::path("config/samples"))?;
    cluster.apply(&["-n", NAMESPACE], &manifests)
}

fn step(number: u8, words: &str) {
    shell_line(&format!("\n[{number}/9] {words}"));
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
    if let Ok(strata) = catalog::ours("strata") {
        shell_line(&format!("  {} status --namespace strata-demo", strata.display()));
    }
    for line in [
        "kubectl -n strata-demo get strata",
        "kubectl -n strata-demo describe alignmentjob assistant",
        "kubectl -n strata-demo get inferenceservice assistant -o yaml   # status.autoscale, status.scalingHistory",
        "kubectl -n strata-demo port-forward service/assistant 8000:80 &",
        r#"curl -N localhost:8000/v1/chat/completions -H 'content-type: application/json' -d '{"model":"assistant","stream":true,"temperature":0.2,"messages":[{"role":"user","content":"Hello!"}]}'"#,
    ] {
        shell_line(&format!("  {line}"));
    }
    shell_line(&format!(
        "  make demo-down{}",
        if bed { "" } else { " CLUSTER=current" }
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
