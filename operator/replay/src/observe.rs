//! What a server counts, and what a scrape makes of it: histograms with vLLM's buckets, so that the policy sees no more than it
//! would in a cluster.

use strata_operator::autoscale::{Histogram, Load};

/// Bounds of the time to the first token in seconds, as vLLM has them.
const FIRST_TOKEN_BOUNDS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
/// Bounds of the time between tokens in seconds, as vLLM has them.
const TOKEN_BOUNDS: [f64; 18] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
];

/// Observations by bucket, the last one unbounded.
#[derive(Clone, Debug)]
struct Buckets {
    bounds: &'static [f64],
    counts: Vec<f64>,
    sum: f64,
}

impl Buckets {
    fn new(bounds: &'static [f64]) -> Self {
        Self {
            bounds,
            counts: vec![0.0; bounds.len() + 1],
            sum: 0.0,
        }
    }

    fn add(&mut self, value: f64, times: f64) {
        let at = self.bounds.partition_point(|bound| *bound < value);
        self.counts[at] += times;
        self.sum += value * times;
    }

    /// What was observed since the last call.
    fn take(&mut self) -> Histogram {
        let mut below = 0.0;
        let bounds = self.bounds.iter().copied().chain([f64::INFINITY]);
        let buckets = bounds
            .zip(&mut self.counts)
            .map(|(bound, count)| {
                below += std::mem::take(count);
                (bound, below)
            })
            .collect();
        Histogram {
            buckets,
            sum_seconds: Some(std::mem::take(&mut self.sum)),
        }
    }
}

/// A server's counters since the last scrape.
#[derive(Clone, Debug)]
pub struct Counters {
    /// Prompt tokens computed.
    pub prompt_tokens: f64,
    /// Tokens generated.
    pub generation_tokens: f64,
    /// Requests finished.
    pub finished: f64,
    first_token: Buckets,
    between_tokens: Buckets,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            prompt_tokens: 0.0,
            generation_tokens: 0.0,
            finished: 0.0,
            first_token: Buckets::new(&FIRST_TOKEN_BOUNDS),
            between_tokens: Buckets::new(&TOKEN_BOUNDS),
        }
    }
}

impl Counters {
    /// A first token, so long after its request came.
    pub fn first_token(&mut self, seconds: f64) {
        self.first_token.add(seconds, 1.0);
    }

    /// So many tokens, each so long after the one before it.
    pub fn tokens(&mut self, seconds: f64, count: f64) {
        self.between_tokens.add(seconds, count);
    }

    /// What the operator's scraper makes of it; the counters begin anew.
    pub fn scrape(&mut self, window_seconds: f64, running: usize, waiting: usize, kv_cache_utilization: f64) -> Load {
        let rate = |value: &mut f64| (window_seconds > 0.0).then(|| std::mem::take(value));
        Load {
            window_seconds,
            running: Some(running as f64),
            waiting: Some(waiting as f64),
            kv_cache_utilization: Some(kv_cache_utilization),
            prompt_tokens: rate(&mut self.prompt_tokens),
            generation_tokens: rate(&mut self.generation_tokens),
            finished: rate(&mut self.finished),
            time_to_first_token: Some(self.first_token.take()),
            inter_token_latency: Some(self.between_tokens.take()),
        }
    }
}
