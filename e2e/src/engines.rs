//! Stands for the engines of the pods that kwok plays: one server on this machine, at the address that they all have, says
//! the same for each. So the operator asks as many pods as it would, and reads as much.

use anyhow::{Context as _, Result};
use axum::Router;
use axum::routing::get;
use strata_contract::SERVE_PORT;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::bed::slot::Slot;

/// What an engine says that computes nothing, with about as many buckets as ours has. Without the label of a model: the pods serve a
/// thousand different ones.
fn metrics(waiting: u32) -> String {
    let numbers = [
        ("num_requests_running", 0),
        ("num_requests_waiting", waiting),
        ("kv_cache_usage_perc", 0),
        ("prompt_tokens_total", 0),
        ("generation_tokens_total", 0),
        ("request_success_total", 0),
    ];
    let line = |(name, value)| format!("vllm:{name} {value}\n");
    let mut text: String = numbers.into_iter().map(line).collect();
    for name in ["time_to_first_token_seconds", "inter_token_latency_seconds"] {
        let bounds = (0..20).map(|power| (0.001 * 2_f64.powi(power)).to_string());
        for bound in bounds.chain(["+Inf".into()]) {
            text += &format!("vllm:{name}_bucket{{le=\"{bound}\"}} 0\n");
        }
        text += &format!("vllm:{name}_sum 0\n");
    }
    text
}

/// The server. It ends with this value.
pub struct Engines(JoinHandle<()>);

impl Engines {
    /// Answers at the host's end of the link into `slot`, for pods on each of which so many requests wait.
    ///
    /// # Errors
    /// Somebody else listens there.
    pub async fn start(slot: Slot, waiting: u32) -> Result<Self> {
        let address = (slot.host_address(), SERVE_PORT);
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("cannot listen at {address:?}"))?;
        let text = metrics(waiting);
        let routes = Router::new().route("/metrics", get(async move || text));
        Ok(Self(tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, routes).await {
                crate::bed::command::say(format_args!("the engines fell silent: {error}"));
            }
        })))
    }
}

impl Drop for Engines {
    fn drop(&mut self) {
        self.0.abort();
    }
}
