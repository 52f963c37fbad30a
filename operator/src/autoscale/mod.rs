//! From what serving pods say of themselves to the number of them, with the reason.
//!
//! ```text
//! /metrics of each pod ──scrape──▶ Load ──┐
//!                    (IO; aliases, limits) ├─▶ policy::decide ──▶ Decision ──▶ Deployment, status
//! spec.autoscale ──check──▶ Settings ──────┘        ▲    │
//!                                                   └────┘ Memory
//! ```
//!
//! What is here is data, pure but for the scraper: `strata replay` and the benchmark drive the same policy with a model
//! of a fleet instead of one.

use std::collections::BTreeMap;

pub mod metrics;
pub mod scrape;

/// What one pod did in the time between two scrapes, and how it stands now. Absent means that the pod did not say so,
/// which is not zero.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Load {
    /// Length of the time in seconds; rates are over it. 0: this is the first scrape, and there are no rates.
    pub window_seconds: f64,
    /// Requests that are computed now.
    pub running: Option<f64>,
    /// Requests that wait for a place now.
    pub waiting: Option<f64>,
    /// Share of the KV-cache that requests hold now, 0 to 1.
    pub kv_cache_utilization: Option<f64>,
    /// Prompt tokens computed in the window.
    pub prompt_tokens: Option<f64>,
    /// Tokens generated in the window.
    pub generation_tokens: Option<f64>,
    /// Requests finished in the window.
    pub finished: Option<f64>,
    /// Times to the first token of the window, in seconds.
    pub time_to_first_token: Option<Histogram>,
    /// Times between two tokens of the window, in seconds.
    pub inter_token_latency: Option<Histogram>,
}

/// Observations by upper bound, as a Prometheus histogram has them, of one window.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Histogram {
    /// Upper bound in seconds and how many observations are at most that, ascending; the last bound is infinite.
    pub buckets: Vec<(f64, f64)>,
}

/// A pod, as far as scaling sees it.
#[derive(Clone, Debug, PartialEq)]
pub enum Replica {
    /// It was made, and is not ready yet.
    Starting,
    /// It is ready, and said this.
    Answering(Load),
    /// It is ready, and did not say what is needed; why.
    Silent(String),
}

/// The pods at one moment, by name.
pub type Fleet = BTreeMap<String, Replica>;
