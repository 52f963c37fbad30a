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

pub mod demand;
mod exposition;
pub mod metrics;
pub mod policy;
pub mod scrape;
pub mod settings;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

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
    /// Sum of the observations in seconds; buckets are too coarse for a mean.
    pub sum_seconds: Option<f64>,
}

impl Histogram {
    /// How many observations there are.
    pub fn count(&self) -> f64 {
        self.buckets.last().map_or(0.0, |(_, count)| *count)
    }

    /// Their mean in seconds; `None` without observations or without their sum.
    pub fn mean(&self) -> Option<f64> {
        let count = self.count();
        self.sum_seconds
            .filter(|sum| count > 0.0 && *sum >= 0.0 && sum.is_finite())
            .map(|sum| sum / count)
    }

    /// The bound that a share of the observations keeps, in seconds, as Prometheus' `histogram_quantile` has it: linear
    /// inside of a bucket, and the last finite bound for what is beyond. `None` without observations.
    pub fn quantile(&self, share: f64) -> Option<f64> {
        let rank = share.clamp(0.0, 1.0) * self.count();
        if self.count() <= 0.0 {
            return None;
        }
        let (mut bound_before, mut count_before) = (0.0, 0.0);
        for (bound, count) in &self.buckets {
            if *count >= rank && *count > count_before {
                let inside = (rank - count_before) / (count - count_before);
                return Some(if bound.is_finite() {
                    bound_before + (bound - bound_before) * inside.clamp(0.0, 1.0)
                } else {
                    bound_before
                });
            }
            (bound_before, count_before) = (*bound, *count);
        }
        Some(bound_before)
    }

    /// Adds another's observations. Bounds that only one has are left out, as between them nothing is known; without
    /// any in common but the infinite one, only count and sum are left.
    pub fn add(&mut self, other: &Self) {
        if self.buckets.is_empty() {
            self.clone_from(other);
            return;
        }
        if other.buckets.is_empty() {
            return;
        }
        let theirs = |bound: f64| other.buckets.iter().find(|(other, _)| *other == bound);
        self.buckets = (self.buckets.iter())
            .filter_map(|(bound, count)| Some((*bound, count + theirs(*bound)?.1)))
            .collect();
        self.sum_seconds = self.sum_seconds.zip(other.sum_seconds).map(|(a, b)| a + b);
    }
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
