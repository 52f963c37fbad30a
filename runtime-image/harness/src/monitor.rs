//! What others see of a running stage: `/progress`, `/metrics`, progress lines in the log, and the signal to stop.
//!
//! It runs beside the stage in one thread of its own, so that a stage needs to know neither HTTP nor signals.

use std::thread::JoinHandle;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::routing::get;
use prometheus::{Encoder, Gauge, Opts, Registry, TextEncoder};
use strata_contract::FailureReason;
use strata_stage::{StageContext, StageError};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// Time between two progress lines.
const LINE_INTERVAL: Duration = Duration::from_secs(10);

/// The thread beside the stage.
pub(crate) struct Monitor {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<()>,
}

impl Monitor {
    /// Listens on `address` (`none`: nowhere) and on SIGTERM and SIGINT.
    pub(crate) fn start(address: &str, command: &str, context: &StageContext) -> Result<Self, StageError> {
        let failed = |what: String| StageError::new(FailureReason::Internal, format!("monitor on {address}: {what}"));
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(|error| failed(error.to_string()))?;
        let listener = match address {
            "none" => None,
            _ => Some(
                runtime
                    .block_on(tokio::net::TcpListener::bind(address))
                    .map_err(|e| failed(e.to_string()))?,
            ),
        };
        let metrics = Metrics::new(command, context).map_err(|error| failed(error.to_string()))?;
        let (stop, stopped) = oneshot::channel();
        let context = context.clone();
        let thread = std::thread::Builder::new()
            .name("monitor".into())
            .spawn(move || runtime.block_on(watch(listener, metrics, context, stopped)))
            .map_err(|error| failed(error.to_string()))?;
        Ok(Self { stop, thread })
    }

    /// Ends the thread.
    pub(crate) fn stop(self) {
        // The receiver is gone only if the thread has ended already.
        let _ = self.stop.send(());
        if self.thread.join().is_err() {
            tracing::warn!("the monitor panicked");
        }
    }
}

async fn watch(
    listener: Option<tokio::net::TcpListener>,
    metrics: Metrics,
    context: StageContext,
    stopped: oneshot::Receiver<()>,
) {
    let server = async {
        match listener {
            Some(listener) => {
                let app = axum::Router::new()
                    .route(
                        "/progress",
                        get(|State(metrics): State<Metrics>| async move { Json(metrics.context.progress.read()) }),
                    )
                    .route(
                        "/metrics",
                        get(|State(metrics): State<Metrics>| async move { metrics.render() }),
                    )
                    .with_state(metrics);
                if let Err(error) = axum::serve(listener, app).await {
                    tracing::warn!(%error, "the stage goes on without /progress and /metrics");
                }
            }
            None => std::future::pending().await,
        }
        std::future::pending::<()>().await
    };
    tokio::select! {
        () = server => {}
        () = lines(&context) => {}
        () = signals(&context) => {}
        _ = stopped => {}
    }
}

async fn lines(context: &StageContext) {
    let mut ticks = tokio::time::interval(LINE_INTERVAL);
    let mut last = None;
    loop {
        ticks.tick().await;
        let progress = context.progress.read();
        if progress.total > 0 && last.as_ref() != Some(&progress) {
            let percent = progress.done.saturating_mul(100) / progress.total;
            tracing::info!(
                "progress {percent}% {}/{} {} {}",
                progress.done,
                progress.total,
                progress.unit,
                progress.activity
            );
            last = Some(progress);
        }
    }
}

async fn signals(context: &StageContext) {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        tracing::warn!("signals cannot be listened to: a stop loses what was done since the last checkpoint");
        return std::future::pending().await;
    };
    loop {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("asked to stop: saving");
        context.interrupt.set();
    }
}

/// The stage's progress as Prometheus series.
#[derive(Clone)]
struct Metrics {
    registry: Registry,
    done: Gauge,
    total: Gauge,
    context: StageContext,
}

impl Metrics {
    fn new(command: &str, context: &StageContext) -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let gauge = |name: &str, help: &str| -> Result<Gauge, prometheus::Error> {
            let options = Opts::new(name, help)
                .const_label("stage", command)
                .const_label("run", context.run.id.clone());
            let gauge = Gauge::with_opts(options)?;
            registry.register(Box::new(gauge.clone()))?;
            Ok(gauge)
        };
        let done = gauge(
            "strata_stage_progress_done",
            "What the current activity has done, in its unit.",
        )?;
        let total = gauge(
            "strata_stage_progress_total",
            "What the current activity has to do, in its unit.",
        )?;
        Ok(Self {
            registry,
            done,
            total,
            context: context.clone(),
        })
    }

    fn render(&self) -> String {
        let progress = self.context.progress.read();
        self.done.set(progress.done as f64);
        self.total.set(progress.total as f64);
        let mut text = Vec::new();
        if let Err(error) = TextEncoder::new().encode(&self.registry.gather(), &mut text) {
            tracing::warn!(%error, "metrics cannot be written");
        }
        String::from_utf8_lossy(&text).into_owned()
    }
}
