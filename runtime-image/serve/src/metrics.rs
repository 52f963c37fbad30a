//! Metrics under vLLM's names, so that its dashboards and the schedulers that read them work unchanged.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry,
    TextEncoder,
};

use crate::engine::{FinishReason, Usage};
use crate::schedule::{Counts, Limits, Scheduler};

/// Upper bounds of vLLM's buckets, in seconds.
const FIRST_TOKEN: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const BETWEEN_TOKENS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const WHOLE_REQUEST: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
const TOKENS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0, 10000.0,
];

/// The server's metrics.
pub struct Metrics {
    registry: Registry,
    adapters: GaugeVec,
    /// What it shows: the most adapters, those that run, those that wait. Empty until adapters are accepted.
    shown_adapters: Mutex<Option<(usize, String, String)>>,
    running: IntGauge,
    waiting: IntGauge,
    usage: Gauge,
    prefix_queries: IntCounter,
    prefix_hits: IntCounter,
    preemptions: IntCounter,
    drafts: IntCounter,
    draft_tokens: IntCounter,
    accepted_tokens: IntCounter,
    prompt_tokens: IntCounter,
    generation_tokens: IntCounter,
    finished: IntCounterVec,
    first_token: Histogram,
    between_tokens: Histogram,
    whole_request: Histogram,
    request_prompt: Histogram,
    request_generation: Histogram,
    step_tokens: Histogram,
}

impl Metrics {
    /// The metrics of one model, all with the label `model_name`.
    pub fn new(model_name: &str, limits: &Limits, cache_dtype: &str) -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let opts =
            |name: &str, help: &str| Opts::new(format!("vllm:{name}"), help).const_label("model_name", model_name);
        macro_rules! register {
            ($metric:expr) => {{
                let metric = $metric?;
                registry.register(Box::new(metric.clone()))?;
                metric
            }};
        }
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            Histogram::with_opts(HistogramOpts {
                common_opts: opts(name, help),
                buckets: buckets.to_vec(),
            })
        };
        let config = register!(GaugeVec::new(
            opts("cache_config_info", "The cache's configuration, in labels."),
            &["block_size", "num_gpu_blocks", "cache_dtype", "enable_prefix_caching"],
        ));
        let (size, blocks) = (limits.block_tokens.to_string(), limits.blocks.to_string());
        let prefix = if limits.prefix_caching { "True" } else { "False" };
        config
            .with_label_values(&[size.as_str(), blocks.as_str(), cache_dtype, prefix])
            .set(1.0);
        let finished = register!(IntCounterVec::new(
            opts("request_success_total", "Requests that ended, by reason."),
            &["finished_reason"]
        ));
        for reason in [FinishReason::Stop, FinishReason::Length, FinishReason::Abort] {
            finished.with_label_values(&[reason.name()]); // shown as 0 from the start
        }
        Ok(Metrics {
            adapters: register!(GaugeVec::new(
                opts(
                    "lora_requests_info",
                    "Adapters of the requests that run and wait, in labels; when that changed."
                ),
                &["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
            )),
            shown_adapters: Mutex::default(),
            running: register!(IntGauge::with_opts(opts(
                "num_requests_running",
                "Requests being computed."
            ))),
            waiting: register!(IntGauge::with_opts(opts(
                "num_requests_waiting",
                "Requests waiting for blocks or a place."
            ))),
            usage: register!(Gauge::with_opts(opts(
                "kv_cache_usage_perc",
                "Share of the cache's blocks in use, 0 to 1."
            ))),
            prefix_queries: register!(IntCounter::with_opts(opts(
                "prefix_cache_queries_total",
                "Prompt tokens looked up in the prefix cache."
            ))),
            prefix_hits: register!(IntCounter::with_opts(opts(
                "prefix_cache_hits_total",
                "Prompt tokens found in the prefix cache."
            ))),
            preemptions: register!(IntCounter::with_opts(opts(
                "num_preemptions_total",
                "Times a request lost its blocks and was computed again."
            ))),
            drafts: register!(IntCounter::with_opts(opts(
                "spec_decode_num_drafts_total",
                "Times that tokens were guessed ahead."
            ))),
            draft_tokens: register!(IntCounter::with_opts(opts(
                "spec_decode_num_draft_tokens_total",
                "Tokens guessed ahead."
            ))),
            accepted_tokens: register!(IntCounter::with_opts(opts(
                "spec_decode_num_accepted_tokens_total",
                "Tokens guessed ahead that were right."
            ))),
            prompt_tokens: register!(IntCounter::with_opts(opts(
                "prompt_tokens_total",
                "Prompt tokens processed."
            ))),
            generation_tokens: register!(IntCounter::with_opts(opts(
                "generation_tokens_total",
                "Tokens generated."
            ))),
            finished,
            first_token: register!(histogram(
                "time_to_first_token_seconds",
                "From arrival to the first token.",
                FIRST_TOKEN
            )),
            between_tokens: register!(histogram(
                "inter_token_latency_seconds",
                "Between two tokens of a request.",
                BETWEEN_TOKENS
            )),
            whole_request: register!(histogram(
                "e2e_request_latency_seconds",
                "From arrival to the end.",
                WHOLE_REQUEST
            )),
            request_prompt: register!(histogram(
                "request_prompt_tokens",
                "Prompt tokens of a request.",
                TOKENS
            )),
            request_generation: register!(histogram(
                "request_generation_tokens",
                "Generated tokens of a request.",
                TOKENS
            )),
            step_tokens: register!(histogram(
                "iteration_tokens_total",
                "Tokens computed in a step.",
                TOKENS
            )),
            registry,
        })
    }

    /// Prometheus' text format.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        let mut out = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut out)?;
        Ok(String::from_utf8_lossy(&out).into_owned())
    }

    pub(crate) fn scheduler(&self, scheduler: &Scheduler) {
        self.running.set(scheduler.running() as i64);
        self.waiting.set(scheduler.waiting() as i64);
        self.usage.set(scheduler.usage());
        let Counts {
            preemptions,
            prefix_queries,
            prefix_hits,
        } = scheduler.counts();
        for (counter, now) in [
            (&self.preemptions, preemptions),
            (&self.prefix_queries, prefix_queries),
            (&self.prefix_hits, prefix_hits),
        ] {
            counter.inc_by(now.saturating_sub(counter.get()));
        }
    }

    pub(crate) fn speculated(&self, drafts: usize, accepted: usize) {
        self.drafts.inc();
        self.draft_tokens.inc_by(drafts as u64);
        self.accepted_tokens.inc_by(accepted as u64);
    }

    /// From now on adapters are shown; at most `most` are loaded.
    pub(crate) fn enable_adapters(&self, most: usize) {
        self.show_adapters(most, String::new(), String::new());
    }

    /// Shows the adapters of the requests that run, and of those that wait.
    pub(crate) fn adapters<'a>(&self, names: impl FnOnce() -> (BTreeSet<&'a str>, BTreeSet<&'a str>)) {
        let Some(before) = self.shown().clone() else {
            return;
        };
        let (running, waiting) = names();
        let join = |names: BTreeSet<&str>| names.into_iter().collect::<Vec<_>>().join(",");
        let now = (before.0, join(running), join(waiting));
        if now != before {
            self.show_adapters(now.0, now.1, now.2);
        }
    }

    fn show_adapters(&self, most: usize, running: String, waiting: String) {
        // A schedule of llm-d's reads the newest line: there is only one.
        self.adapters.reset();
        self.adapters
            .with_label_values(&[most.to_string().as_str(), running.as_str(), waiting.as_str()])
            .set(crate::http::unix_seconds() as f64);
        *self.shown() = Some((most, running, waiting));
    }

    fn shown(&self) -> MutexGuard<'_, Option<(usize, String, String)>> {
        self.shown_adapters
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    pub(crate) fn step(&self, tokens: usize) {
        self.step_tokens.observe(tokens as f64);
    }

    pub(crate) fn first_token(&self, prompt_tokens: usize, since_arrival: Duration) {
        self.prompt_tokens.inc_by(prompt_tokens as u64);
        self.generation_tokens.inc();
        self.first_token.observe(since_arrival.as_secs_f64());
    }

    pub(crate) fn next_token(&self, since_last: Duration) {
        self.generation_tokens.inc();
        self.between_tokens.observe(since_last.as_secs_f64());
    }

    pub(crate) fn finished(&self, reason: FinishReason, usage: &Usage, since_arrival: Duration) {
        self.finished.with_label_values(&[reason.name()]).inc();
        self.whole_request.observe(since_arrival.as_secs_f64());
        self.request_prompt.observe(usage.prompt_tokens as f64);
        self.request_generation.observe(usage.completion_tokens as f64);
    }
}
