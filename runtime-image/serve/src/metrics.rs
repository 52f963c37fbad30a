//! Metrics under vLLM's names, so that its dashboards and the schedulers that read them work unchanged.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard};
use std::time::Instant;

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
const PER_TOKEN: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
];
const PHASE: &[f64] = &[
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];
/// And in tokens of a step, and choices of a request.
const STEP: &[f64] = &[
    1.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0,
];
const CHOICES: &[f64] = &[1.0, 2.0, 5.0, 10.0, 20.0];
/// Methods that are told apart; a client may send any other word.
const METHODS: [&str; 4] = ["GET", "POST", "DELETE", "OPTIONS"];

/// When what happened to one answer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Timing {
    arrived: Instant,
    scheduled: Option<Instant>,
    first_token: Option<Instant>,
    last_token: Option<Instant>,
}

impl Timing {
    pub(crate) fn new(arrived: Instant) -> Self {
        Timing {
            arrived,
            scheduled: None,
            first_token: None,
            last_token: None,
        }
    }

    /// It is computed now; only the first time counts.
    pub(crate) fn scheduled(&mut self, now: Instant) {
        self.scheduled.get_or_insert(now);
    }
}

/// The server's metrics.
pub struct Metrics {
    registry: Registry,
    adapters: GaugeVec,
    /// What it shows: the most adapters, those that run, those that wait. Empty until adapters are accepted.
    shown_adapters: Mutex<Option<(usize, String, String)>>,
    running: IntGauge,
    waiting: IntGauge,
    /// Under the name of today and under the one that older dashboards read; so below, too.
    usage: [Gauge; 2],
    prefix_queries: [IntCounter; 2],
    prefix_hits: [IntCounter; 2],
    disk_queries: IntCounter,
    disk_hits: IntCounter,
    disk_bytes: IntGauge,
    damaged: IntCounter,
    preemptions: IntCounter,
    drafts: IntCounter,
    draft_tokens: IntCounter,
    accepted_tokens: IntCounter,
    prompt_tokens: IntCounter,
    cached_tokens: IntCounter,
    generation_tokens: IntCounter,
    finished: IntCounterVec,
    http_requests: IntCounterVec,
    first_token: Histogram,
    between_tokens: [Histogram; 2],
    mean_per_token: Histogram,
    whole: Histogram,
    queue: Histogram,
    prefill: Histogram,
    decode: Histogram,
    inference: Histogram,
    request_prompt: Histogram,
    request_computed: Histogram,
    request_generation: Histogram,
    request_max_tokens: Histogram,
    request_choices: Histogram,
    longest_choice: Histogram,
    step_tokens: Histogram,
}

/// 1, 2, 5, 10, 20, 50, … up to the longest request.
fn token_buckets(most: usize) -> Vec<f64> {
    let decades = (0..).map(|exponent| 10f64.powi(exponent));
    let all = decades.flat_map(|decade| [1.0, 2.0, 5.0].map(|factor| factor * decade));
    all.take_while(|bound| *bound <= most.max(1) as f64).collect()
}

impl Metrics {
    /// The metrics of one model, all with the labels `model_name` and `engine`. `max_model_len` is the most tokens of a request.
    pub fn new(
        model_name: &str,
        limits: &Limits,
        max_model_len: usize,
        cache_dtype: &str,
    ) -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let labelled = |name: &str, help: &str| {
            Opts::new(name, help)
                .const_label("model_name", model_name)
                .const_label("engine", "0")
        };
        let opts = |name: &str, help: &str| labelled(&format!("vllm:{name}"), help);
        macro_rules! register {
            ($metric:expr) => {{
                let metric = $metric?;
                registry.register(Box::new(metric.clone()))?;
                metric
            }};
        }
        let gauge = |name, help| Ok::<_, prometheus::Error>(register!(IntGauge::with_opts(opts(name, help))));
        let share = |name, help| Ok::<_, prometheus::Error>(register!(Gauge::with_opts(opts(name, help))));
        let counter = |name, help| Ok::<_, prometheus::Error>(register!(IntCounter::with_opts(opts(name, help))));
        let histogram = |name, help, buckets: &[f64]| {
            let options = HistogramOpts {
                common_opts: opts(name, help),
                buckets: buckets.to_vec(),
            };
            Ok::<_, prometheus::Error>(register!(Histogram::with_opts(options)))
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
        let http_requests = register!(IntCounterVec::new(
            Opts::new(
                "http_requests_total",
                "Requests that were answered, by route and class of status."
            ),
            &["handler", "method", "status"]
        ));
        let tokens = token_buckets(max_model_len);
        let per_token = "Between two tokens of a request.";
        let queries = "Prompt tokens looked up in the prefix cache.";
        let hits = "Prompt tokens found in the prefix cache.";
        let usage = "Share of the cache's blocks in use, 0 to 1.";
        Ok(Metrics {
            adapters: register!(GaugeVec::new(
                opts(
                    "lora_requests_info",
                    "Adapters of the requests that run and wait, in labels; when that changed."
                ),
                &["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
            )),
            shown_adapters: Mutex::default(),
            running: gauge("num_requests_running", "Requests being computed.")?,
            waiting: gauge("num_requests_waiting", "Requests waiting for blocks or a place.")?,
            usage: [
                share("kv_cache_usage_perc", usage)?,
                share("gpu_cache_usage_perc", usage)?,
            ],
            prefix_queries: [
                counter("prefix_cache_queries_total", queries)?,
                counter("gpu_prefix_cache_queries_total", queries)?,
            ],
            prefix_hits: [
                counter("prefix_cache_hits_total", hits)?,
                counter("gpu_prefix_cache_hits_total", hits)?,
            ],
            disk_queries: counter(
                "external_prefix_cache_queries_total",
                "Prompt tokens that were not in the prefix cache, looked up on the disk.",
            )?,
            disk_hits: counter("external_prefix_cache_hits_total", "Prompt tokens read from the disk.")?,
            disk_bytes: register!(IntGauge::with_opts(labelled(
                "strata_kv_spill_used_bytes",
                "Bytes of keys and values on the disk."
            ))),
            damaged: register!(IntCounter::with_opts(labelled(
                "strata_kv_spill_damaged_total",
                "Blocks on the disk that were not what had been written, and were computed instead."
            ))),
            preemptions: counter(
                "num_preemptions_total",
                "Times a request lost its blocks and was computed again.",
            )?,
            drafts: counter("spec_decode_num_drafts_total", "Times that tokens were guessed ahead.")?,
            draft_tokens: counter("spec_decode_num_draft_tokens_total", "Tokens guessed ahead.")?,
            accepted_tokens: counter(
                "spec_decode_num_accepted_tokens_total",
                "Tokens guessed ahead that were right.",
            )?,
            prompt_tokens: counter("prompt_tokens_total", "Prompt tokens processed.")?,
            cached_tokens: counter("prompt_tokens_cached_total", "Of those, found in the prefix cache.")?,
            generation_tokens: counter("generation_tokens_total", "Tokens generated.")?,
            finished,
            http_requests,
            first_token: histogram(
                "time_to_first_token_seconds",
                "From arrival to the first token.",
                FIRST_TOKEN,
            )?,
            between_tokens: [
                histogram("inter_token_latency_seconds", per_token, PER_TOKEN)?,
                histogram("time_per_output_token_seconds", per_token, PER_TOKEN)?,
            ],
            mean_per_token: histogram(
                "request_time_per_output_token_seconds",
                "Mean time between the tokens of a request.",
                PER_TOKEN,
            )?,
            whole: histogram("e2e_request_latency_seconds", "From arrival to the end.", PHASE)?,
            queue: histogram(
                "request_queue_time_seconds",
                "From arrival until it is first computed.",
                PHASE,
            )?,
            prefill: histogram("request_prefill_time_seconds", "From there to the first token.", PHASE)?,
            decode: histogram(
                "request_decode_time_seconds",
                "From the first token to the last.",
                PHASE,
            )?,
            inference: histogram("request_inference_time_seconds", "Prefill and decode.", PHASE)?,
            request_prompt: histogram("request_prompt_tokens", "Prompt tokens of a request.", &tokens)?,
            request_computed: histogram(
                "request_prefill_kv_computed_tokens",
                "Of those, not found in the prefix cache.",
                &tokens,
            )?,
            request_generation: histogram("request_generation_tokens", "Generated tokens of a choice.", &tokens)?,
            request_max_tokens: histogram(
                "request_params_max_tokens",
                "The most tokens that a request may generate.",
                &tokens,
            )?,
            request_choices: histogram("request_params_n", "Choices asked for.", CHOICES)?,
            longest_choice: histogram(
                "request_max_num_generation_tokens",
                "Generated tokens of a request's longest choice.",
                &tokens,
            )?,
            step_tokens: histogram("iteration_tokens_total", "Tokens computed in a step.", STEP)?,
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
        self.usage.iter().for_each(|gauge| gauge.set(scheduler.usage()));
        let Counts {
            preemptions,
            prefix_queries,
            prefix_hits,
            disk_queries,
            disk_hits,
        } = scheduler.counts();
        let up_to = |counter: &IntCounter, now: u64| counter.inc_by(now.saturating_sub(counter.get()));
        up_to(&self.preemptions, preemptions);
        up_to(&self.disk_queries, disk_queries);
        up_to(&self.disk_hits, disk_hits);
        self.prefix_queries
            .iter()
            .for_each(|counter| up_to(counter, prefix_queries));
        self.prefix_hits.iter().for_each(|counter| up_to(counter, prefix_hits));
    }

    /// That many bytes are on the disk.
    pub(crate) fn disk(&self, bytes: usize) {
        self.disk_bytes.set(bytes as i64);
    }

    /// A block on the disk was not what had been written.
    pub(crate) fn damaged(&self) {
        self.damaged.inc();
    }

    /// Requests for embeddings that are being computed, and that wait.
    pub(crate) fn queue(&self, running: usize, waiting: usize) {
        self.running.set(running as i64);
        self.waiting.set(waiting as i64);
    }

    /// A request for embeddings has ended.
    pub(crate) fn embedded(&self, reason: FinishReason, usage: &Usage, timing: &Timing) {
        self.finished.with_label_values(&[reason.name()]).inc();
        self.prompt_tokens.inc_by(usage.prompt_tokens as u64);
        self.request_prompt.observe(usage.prompt_tokens as f64);
        self.whole.observe(timing.arrived.elapsed().as_secs_f64());
        if let Some(scheduled) = timing.scheduled {
            self.queue.observe((scheduled - timing.arrived).as_secs_f64());
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

    /// A token was generated. With the first one, the prompt has been processed.
    pub(crate) fn token(&self, timing: &mut Timing, prompt_tokens: usize, cached_tokens: usize) {
        let now = Instant::now();
        self.generation_tokens.inc();
        match timing.last_token.replace(now) {
            None => {
                timing.first_token = Some(now);
                self.prompt_tokens.inc_by(prompt_tokens as u64);
                self.cached_tokens.inc_by(cached_tokens as u64);
                self.first_token.observe((now - timing.arrived).as_secs_f64());
            }
            Some(before) => {
                let seconds = (now - before).as_secs_f64();
                self.between_tokens
                    .iter()
                    .for_each(|histogram| histogram.observe(seconds));
            }
        }
    }

    /// A choice has ended.
    pub(crate) fn finished(&self, reason: FinishReason, usage: &Usage, timing: &Timing) {
        self.finished.with_label_values(&[reason.name()]).inc();
        self.request_prompt.observe(usage.prompt_tokens as f64);
        let computed = usage.prompt_tokens.saturating_sub(usage.cached_tokens);
        self.request_computed.observe(computed as f64);
        self.request_generation.observe(usage.completion_tokens as f64);
        self.whole.observe(timing.arrived.elapsed().as_secs_f64());
        // A phase that was not reached took no time; it counts, so that the phases of all requests can be compared.
        let between = |from: Option<Instant>, to: Option<Instant>| match (from, to) {
            (Some(from), Some(to)) => to.saturating_duration_since(from).as_secs_f64(),
            _ => 0.0,
        };
        let Timing {
            arrived,
            scheduled,
            first_token,
            last_token,
        } = *timing;
        self.queue
            .observe(between(Some(arrived), scheduled.or_else(|| Some(Instant::now()))));
        self.prefill.observe(between(scheduled, first_token));
        self.decode.observe(between(first_token, last_token));
        self.inference.observe(between(scheduled, last_token));
        if usage.completion_tokens > 1 {
            let tokens = (usage.completion_tokens - 1) as f64;
            self.mean_per_token.observe(between(first_token, last_token) / tokens);
        }
    }

    /// A request asks for that many choices of at most that many tokens.
    pub(crate) fn request(&self, choices: usize, max_tokens: usize) {
        self.request_choices.observe(choices as f64);
        self.request_max_tokens.observe(max_tokens as f64);
    }

    /// All choices of a request have ended; the longest has that many tokens.
    pub(crate) fn answered(&self, longest: usize) {
        self.longest_choice.observe(longest as f64);
    }

    /// A request was answered over HTTP. `handler` is the route, not the path.
    pub(crate) fn http(&self, handler: &str, method: &str, status: u16) {
        let method = METHODS.into_iter().find(|known| *known == method).unwrap_or("OTHER");
        let class = format!("{}xx", status / 100);
        self.http_requests.with_label_values(&[handler, method, &class]).inc();
    }
}
