//! Stands for the engines of the pods that kwok plays: one server on this machine, at the address that they all have, says
//! for each that it waits for work. So the operator asks as many pods as it would, and reads as much.

use anyhow::{Context as _, Result};
use axum::Router;
use axum::routing::get;
use strata_contract::SERVE_PORT;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::bed::slot::Slot;

/// What an engine says that has nothing to do, with about as many buckets as ours has. Without the label of a model: the pods serve a
/// thousand different ones.
fn idle() -> String {
    let numbers = [
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_success_total",
    ];
    let mut text: String = numbers.iter().map(|name| format!("vllm:{name} 0\n")).collect();
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
pub struct Engine(JoinHandle<()>);

impl Engine {
    /// Answers at the host's end of the link into `slot`.
    ///
    /// # Errors
    /// Somebody else listens there.
    pub async fn start(slot: Slot) -> Result<Self> {
        let address = (slot.host_address(), SERVE_PORT);
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("cannot listen at {address:?}"))?;
        let idle = idle();
        let routes = Router::new().route("/metrics", get(async move || idle));
        Ok(Self(tokio::spawn(async move {
            if let Err(error) = axum::serve(listener, routes).await {
                crate::bed::command::say(format_args!("the engines fell silent: {error}"));
            }
        })))
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.0.abort();
    }
}
