//! `strata-operator`: parse arguments, join the election, run until told to stop.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use k8s_openapi::jiff::SignedDuration;
use kube::Client;
use kube::client::ClientBuilder;
use strata_contract::Uri;
use strata_operator::autoscale::scrape::Scraper;
use strata_operator::engine::backoff::Failures;
use strata_operator::engine::cache::Caches;
use strata_operator::engine::events::Recorder;
use strata_operator::engine::guard::{GuardLayer, Leadership};
use strata_operator::engine::index::Index;
use strata_operator::engine::kind::Env;
use strata_operator::engine::nodes::Nodes;
use strata_operator::engine::progress::Poller;
use strata_operator::engine::provision::Provisioners;
use strata_operator::engine::reconcile::Context;
use strata_operator::engine::watch::{Started, Wake, Watches, start};
use strata_operator::leader::{Election, Times};
use strata_operator::metrics::Metrics;
use strata_operator::placement::Table;
use strata_operator::server::{Shown, router};
use tokio::net::TcpListener;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing_subscriber::EnvFilter;

/// Longest silence of the API server about the Lease.
const LEASE_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest silence of the API server on any other connection; longer than a watch without news (200 s).
const READ_TIMEOUT: Duration = Duration::from_secs(230);
/// Time for the reconciles under way to end after a signal.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// The operator of Strata: datasets, pretraining, alignment and serving of language models on Kubernetes.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Image of the pods that new runs start. Runs that have begun keep theirs.
    #[arg(long, env = "STRATA_RUNTIME_IMAGE")]
    runtime_image: String,
    /// Image of the pods that run on NVIDIA's GPUs; without, such runs are refused.
    #[arg(long, env = "STRATA_RUNTIME_IMAGE_CUDA")]
    runtime_image_cuda: Option<String>,
    /// What is added to the accelerator table: accelerators, pools that may be at zero, prices (YAML).
    #[arg(long, value_name = "FILE")]
    accelerators: Option<PathBuf>,
    /// Where results are published if a resource does not say: pvc://CLAIM/FOLDER.
    #[arg(long, env = "STRATA_DEFAULT_STORAGE")]
    default_storage: Option<Uri>,
    /// How long a serving pod of a new version waits for room before one of the version before makes place, in seconds.
    #[arg(long, default_value_t = 600)]
    rollout_patience_seconds: u32,
    /// Address of /metrics, /healthz and /readyz.
    #[arg(long, default_value = "0.0.0.0:8080")]
    metrics_addr: SocketAddr,
    /// Of several replicas, only one works. Without, this one works in any case.
    #[arg(long)]
    leader_elect: bool,
    /// Namespace of the Lease.
    #[arg(long, env = "POD_NAMESPACE", default_value = "strata-system")]
    leader_elect_namespace: String,
    /// Name of the Lease: one for each installation in a namespace.
    #[arg(long, default_value = "strata-operator")]
    leader_elect_name: String,
    /// Name of this replica in the Lease and in Events.
    #[arg(long, env = "POD_NAME")]
    identity: Option<String>,
    /// Form of the log lines.
    #[arg(long, value_enum, default_value_t = LogFormat::Json)]
    log_format: LogFormat,
    /// Look at one namespace only.
    #[arg(long)]
    watch_namespace: Option<String>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Text,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr);
    match arguments.log_format {
        LogFormat::Json => log
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .init(),
        LogFormat::Text => log.init(),
    }
    match launch(arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format!("{error:#}"), "the operator ends");
            ExitCode::FAILURE
        }
    }
}

fn launch(arguments: Arguments) -> anyhow::Result<()> {
    let runtime = |threads: usize| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(threads)
            .enable_all()
            .build();
        runtime.context("no threads can be started")
    };
    // The election has a thread of its own: of thousands of resources that wait, none stands before a renewal.
    let election = runtime(1)?;
    runtime(2)?.block_on(run(arguments, election.handle()))
}

async fn run(arguments: Arguments, elections: &Handle) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("no signals can be received")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("no signals can be received")?;
    let table = match &arguments.accelerators {
        Some(file) => Table::open(file).with_context(|| format!("--accelerators {}", file.display()))?,
        None => Table::default(),
    };
    let metrics = Arc::new(Metrics::new().context("the metrics clash")?);
    let ready = Arc::new(AtomicBool::new(false));
    let listener = TcpListener::bind(arguments.metrics_addr)
        .await
        .with_context(|| format!("cannot listen on {}", arguments.metrics_addr))?;
    let wake = Wake::default();
    let shown = Shown {
        metrics: metrics.clone(),
        wake: wake.clone(),
        ready: ready.clone(),
    };
    let server = tokio::spawn(async move { axum::serve(listener, router(shown)).await });

    let mut config = kube::Config::infer()
        .await
        .context("no cluster: neither a kubeconfig nor a service account")?;
    config.read_timeout = Some(READ_TIMEOUT);
    // Without, the time for which a connection stood idle counts too.
    config.reset_reader_on_write = true;
    let leadership = Leadership::default();
    let client = ClientBuilder::try_from(config.clone())?
        .with_layer(&GuardLayer(leadership.clone()))
        .build();
    let identity = arguments
        .identity
        .unwrap_or_else(|| format!("strata-operator-{}", std::process::id()));

    let mut election = None;
    if arguments.leader_elect {
        // The Lease is taken by a client of its own: the guarded one writes only for the leader.
        config.read_timeout = Some(LEASE_TIMEOUT);
        let (namespace, name) = (arguments.leader_elect_namespace, arguments.leader_elect_name);
        let (identity_there, leadership_there) = (identity.clone(), leadership.clone());
        let joining = elections.spawn(async move {
            let client = Client::try_from(config)?;
            let times = Times::OPERATOR;
            Election::join(client, &namespace, &name, &identity_there, times, leadership_there).await
        });
        let mut joined = joining.await.context("the election's thread ended")??;
        // A replica that stands by could take over: it is ready.
        ready.store(true, Ordering::Relaxed);
        tracing::info!(identity, "standing by for the Lease");
        let elected = tokio::select! {
            elected = joined.leads.wait_for(|leads| *leads) => elected.is_ok(),
            _ = terminate.recv() => false,
            _ = interrupt.recv() => false,
        };
        if !elected {
            joined.release().await;
            return Ok(());
        }
        ready.store(false, Ordering::Relaxed);
        election = Some(joined);
    } else {
        leadership.set(true);
    }
    metrics.set_leader(true);
    tracing::info!(identity, image = arguments.runtime_image, "leading");

    let index = Arc::new(Index::default());
    let context = Arc::new(Context {
        client: client.clone(),
        env: Env {
            runtime_image: arguments.runtime_image,
            runtime_image_cuda: arguments.runtime_image_cuda,
            default_storage: arguments.default_storage,
            rollout_patience: SignedDuration::from_secs(arguments.rollout_patience_seconds.into()),
        },
        caches: Caches::default(),
        index: index.clone(),
        fleet: Nodes::new(Arc::new(table)),
        failures: Failures::default(),
        provisioners: Provisioners::default(),
        poller: Poller::new(wake.clone()),
        scraper: Scraper::new(wake.clone()).context("no TLS to ask pods with")?,
        recorder: Recorder::new(client.clone(), "strata-operator", &identity),
        metrics: metrics.clone(),
    });
    let watches = Watches {
        client,
        namespace: arguments.watch_namespace,
        wake,
        index,
    };
    let (stop, stopped) = watch::channel(false);
    let Started { mut watches, mut loops } = start(&context, &watches, &stopped);
    let filling = tokio::spawn(async move {
        context.caches.filled().await;
        ready.store(true, Ordering::Relaxed);
        tracing::info!("the caches are filled");
    });

    let lost = async {
        match &mut election {
            Some(election) => {
                // An error means that the election's task is gone, which is a loss too.
                let _ = election.leads.wait_for(|leads| !*leads).await;
            }
            None => std::future::pending().await,
        }
    };
    let is_lost = tokio::select! {
        _ = terminate.recv() => false,
        _ = interrupt.recv() => false,
        () = lost => true,
        ended = watches.join_next() => anyhow::bail!("a watch ended by itself: {ended:?}"),
        ended = loops.join_next() => anyhow::bail!("a loop ended by itself: {ended:?}"),
    };
    tracing::info!(is_lost, "stopping: what is under way is finished first");
    stop.send_replace(true);
    let all = async { while loops.join_next().await.is_some() {} };
    if tokio::time::timeout(STOP_TIMEOUT, all).await.is_err() {
        tracing::warn!("a reconcile did not end in time; the next replica goes on from what it did");
    }
    leadership.set(false);
    metrics.set_leader(false);
    filling.abort();
    watches.shutdown().await;
    if let Some(election) = election {
        election.release().await;
    }
    server.abort();
    match is_lost {
        true => anyhow::bail!("the Lease is lost; a fresh start stands by"),
        false => Ok(()),
    }
}
