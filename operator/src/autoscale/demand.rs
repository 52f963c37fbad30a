//! From what pods say to how many of them the load needs, in replicas and fractions of one.
//!
//! **How busy a replica is** follows from the time between tokens. A step of continuous batching takes `a + b·tokens +
//! c·cached tokens`; under a steady load both sums grow with the time that a step takes, so that the time is
//! `a / (1 − busy)`, where `busy` is the load's share of the most that the replica can carry, whatever the mix of prompts and
//! answers. `a`, the time between tokens without load, is the least one seen. So `busy = 1 − a / time between tokens`: a
//! capacity that is measured at any load, and not only when it is reached. Of a light load it says too little, as a few more
//! sequences hardly lengthen a step: there the tokens computed, against the capacity that was seen, are the least it can be.
//!
//! **How busy a replica may be** follows from the objectives by the same law: a latency of `τ / (1 − busy)` keeps its objective
//! up to `busy = 1 − τ / objective`.

use serde::{Deserialize, Serialize};

use super::settings::Targets;
use super::{Fleet, Histogram, Load, Replica};

/// Observations that a mean or a quantile of a window needs.
const FEWEST_OBSERVATIONS: f64 = 20.0;
/// The busiest that a replica is planned to be: what is left is for the noise of arrivals, which queue at any load.
const MOST_BUSY: f64 = 0.85;
/// The least busy: an objective that is missed even so is not met by more replicas.
const LEAST_BUSY: f64 = 0.25;
/// Above that a replica counts as full: its latencies tell of the queue and no longer of the load.
const FULL: f64 = 0.9;
/// Below that the time between tokens says too little, and the capacity is not learned from it.
const LIGHT: f64 = 0.4;
/// By how much more or fewer requests may be inside at the end of a window than in the mean over it.
const UNSTEADY: f64 = 2.0;
/// The most that the learned capacity makes of a light load: it may be of another mix of prompts and answers.
const MOST_BY_CAPACITY: f64 = 0.6;
/// Weight of a new observation in what is learned slowly.
const SLOW: f64 = 0.1;
/// How much the least time between tokens grows in each window: the model or the mix may have changed.
const FORGETTING: f64 = 1.0002;
/// Time in which a queue is to be gone, in seconds.
const DRAIN_SECONDS: f64 = 300.0;

/// What was learned of a replica; it stays true over a restart of the operator.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Learned {
    /// Time between tokens without load, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_token_seconds: Option<f64>,
    /// `τ` of the time to the first token, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_first_token_seconds: Option<f64>,
    /// `τ` of the 95th percentile of the time between tokens, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_slow_token_seconds: Option<f64>,
    /// Tokens a second, of prompts and answers, that a replica computes when it is full.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity_tokens_per_second: Option<f64>,
    /// Time from a pod's making to its first answer, in seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cold_start_seconds: Option<f64>,
}

/// What asks for the most replicas.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// Tokens to compute, against what a replica can compute.
    Throughput,
    /// The share of the KV-cache that is held.
    KvCache,
    /// Requests that wait.
    Waiting,
    /// The objective for the time to the first token.
    TimeToFirstToken,
    /// The objective for the time between tokens.
    InterTokenLatency,
}

/// What was seen of the whole fleet at one moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Measured {
    /// Pods that said what is needed.
    pub answering: u32,
    /// Ready pods that did not.
    pub silent: u32,
    /// Requests that are computed.
    pub running: Option<f64>,
    /// Requests that wait.
    pub waiting: Option<f64>,
    /// Mean share of the KV-cache that is held.
    pub kv_cache_utilization: Option<f64>,
    /// Mean share of its capacity that a replica is busy with.
    pub busy: Option<f64>,
    /// How busy it may be.
    pub busy_limit: Option<f64>,
    /// Tokens a second in all, of prompts and answers.
    pub tokens_per_second: Option<f64>,
    /// 95th percentile of the time to the first token, in seconds.
    pub time_to_first_token_p95: Option<f64>,
    /// 95th percentile of the time between tokens, in seconds.
    pub inter_token_latency_p95: Option<f64>,
    /// Replicas that the load needs of those that answer; `None` where nothing tells.
    pub need: Option<f64>,
    /// What asks for them.
    pub driver: Option<Driver>,
}

impl Measured {
    /// Whether pods show less of the load than there is.
    pub fn is_full(&self) -> bool {
        let queue = self.waiting.unwrap_or(0.0) > 2.0 * f64::from(self.answering);
        queue
            || self.busy.is_some_and(|busy| busy > FULL)
            || self.kv_cache_utilization.is_some_and(|share| share > FULL)
    }
}

/// Waiting requests in all before: what came in is what was finished and by how much more wait.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Queue {
    /// Requests that waited or were computed.
    pub inside: f64,
}

/// Measures a fleet, and learns from it.
pub fn measure(
    targets: &Targets,
    learned: &mut Learned,
    before: Option<Queue>,
    fleet: &Fleet,
) -> (Measured, Option<Queue>) {
    let loads: Vec<&Load> = fleet
        .values()
        .filter_map(|replica| match replica {
            Replica::Answering(load) => Some(load),
            _ => None,
        })
        .collect();
    let count = loads.len() as f64;
    let first_token = merged(&loads, |load| load.time_to_first_token.as_ref());
    let between = merged(&loads, |load| load.inter_token_latency.as_ref());
    let enough = |histogram: &&Histogram| histogram.count() >= FEWEST_OBSERVATIONS;
    let p95 = |histogram: &Option<Histogram>| histogram.as_ref().filter(enough).and_then(|all| all.quantile(0.95));
    let mut measured = Measured {
        answering: loads.len() as u32,
        silent: fleet
            .values()
            .filter(|replica| matches!(replica, Replica::Silent(_)))
            .count() as u32,
        running: total(&loads, |load| load.running),
        waiting: total(&loads, |load| load.waiting),
        kv_cache_utilization: total(&loads, |load| load.kv_cache_utilization).map(|sum| sum / count),
        tokens_per_second: total(&loads, tokens_per_second),
        time_to_first_token_p95: p95(&first_token),
        inter_token_latency_p95: p95(&between),
        ..Measured::default()
    };
    let queue = measured.running.zip(measured.waiting).map(|(running, waiting)| Queue {
        inside: running + waiting,
    });
    if loads.is_empty() {
        return (measured, queue);
    }
    learn_idle_token(learned, &loads);
    measured.busy = total(&loads, |load| busy(load, learned)).map(|sum| sum / count);
    if is_steady(&loads) {
        let busy_by_time = total(&loads, |load| busy_by_time(load, learned)).map(|sum| sum / count);
        learn_capacity(learned, &measured, busy_by_time);
    }
    learn_latencies(learned, &measured);
    let (limit, by) = busy_limit(targets, learned);
    measured.busy_limit = Some(limit);
    let arrivals = arrivals_per_finished(&loads, before, queue);
    let needs = [
        (
            measured
                .busy
                .map(|busy| throughput(busy, &loads, &measured, arrivals) / limit),
            by,
        ),
        (kv_cache(targets, &loads), Driver::KvCache),
        (waiting(targets, &measured), Driver::Waiting),
    ];
    let most = needs
        .into_iter()
        .filter_map(|(need, driver)| Some((need?, driver)))
        .max_by(|(a, _), (b, _)| a.total_cmp(b));
    (measured.need, measured.driver) = (most.map(|(need, _)| need), most.map(|(_, driver)| driver));
    (measured, queue)
}

/// The sum over all pods, or `None` if one of them did not say it.
fn total(loads: &[&Load], of: impl Fn(&Load) -> Option<f64>) -> Option<f64> {
    (!loads.is_empty()).then_some(())?;
    loads
        .iter()
        .map(|load| of(load).filter(|value| value.is_finite() && *value >= 0.0))
        .sum()
}

fn merged<'a>(loads: &[&'a Load], of: impl Fn(&'a Load) -> Option<&'a Histogram>) -> Option<Histogram> {
    let mut all = None::<Histogram>;
    for histogram in loads.iter().filter_map(|load| of(load)) {
        all.get_or_insert_default().add(histogram);
    }
    all
}

fn tokens_per_second(load: &Load) -> Option<f64> {
    let tokens = load.prompt_tokens? + load.generation_tokens?;
    (load.window_seconds > 0.0).then(|| tokens / load.window_seconds)
}

fn token_seconds(load: &Load) -> Option<f64> {
    let histogram = load.inter_token_latency.as_ref()?;
    histogram
        .mean()
        .filter(|mean| histogram.count() >= FEWEST_OBSERVATIONS && *mean > 0.0)
}

/// How busy a replica is by the time between tokens; one that generated nothing and has nothing to do is not.
fn busy_by_time(load: &Load, learned: &Learned) -> Option<f64> {
    let idle = load.window_seconds > 0.0 && load.running == Some(0.0) && load.waiting == Some(0.0);
    match (token_seconds(load), learned.idle_token_seconds) {
        (Some(seconds), Some(least)) => Some((1.0 - least / seconds).clamp(0.0, 1.0)),
        _ if idle => Some(0.0),
        _ => None,
    }
}

/// How busy a replica is.
fn busy(load: &Load, learned: &Learned) -> Option<f64> {
    let by_capacity = tokens_per_second(load)
        .zip(learned.capacity_tokens_per_second)
        .map_or(0.0, |(tokens, capacity)| (tokens / capacity).min(MOST_BY_CAPACITY));
    Some(busy_by_time(load, learned)?.max(by_capacity))
}

/// Whether about as many requests were inside during the window as are now. Where a burst has just come, the tokens of a
/// moment are spread over a window, while the time between them tells of the burst: the capacity would seem a fraction of
/// what it is, and no light load would ever correct it.
fn is_steady(loads: &[&Load]) -> bool {
    let inside_now = total(loads, |load| Some(load.running? + load.waiting?));
    // Little's law: the time that requests spent inside, for each second.
    let inside_before = total(loads, |load| {
        let until_first = load.time_to_first_token.as_ref().and_then(|all| all.sum_seconds);
        let between = load.generation_tokens? * token_seconds(load)?;
        (load.window_seconds > 0.0).then(|| (until_first.unwrap_or(0.0) + between) / load.window_seconds)
    });
    inside_now
        .zip(inside_before)
        .is_some_and(|(now, before)| (before / UNSTEADY..=before * UNSTEADY).contains(&now))
}

fn learn_idle_token(learned: &mut Learned, loads: &[&Load]) {
    let least = loads
        .iter()
        .filter_map(|load| token_seconds(load))
        .min_by(f64::total_cmp);
    if let Some(least) = least {
        let before = learned
            .idle_token_seconds
            .map_or(f64::INFINITY, |before| before * FORGETTING);
        learned.idle_token_seconds = Some(least.min(before));
    }
}

/// What is far off tells of a moment's queue and counts less.
fn blend(slot: &mut Option<f64>, seen: f64) {
    *slot = Some(slot.map_or(seen, |before| {
        before + SLOW * (seen.clamp(before / 2.0, before * 1.5) - before)
    }));
}

fn learn_capacity(learned: &mut Learned, measured: &Measured, busy_by_time: Option<f64>) {
    let tells = |busy: &f64| (LIGHT..FULL).contains(busy);
    if let Some((busy, tokens)) = busy_by_time.filter(tells).zip(measured.tokens_per_second) {
        let capacity = tokens / busy / f64::from(measured.answering);
        blend(&mut learned.capacity_tokens_per_second, capacity);
    }
}

fn learn_latencies(learned: &mut Learned, measured: &Measured) {
    let Some(busy) = measured.busy.filter(|busy| *busy < FULL) else {
        return;
    };
    let queued = measured.waiting.unwrap_or(0.0) > f64::from(measured.answering);
    if queued {
        return;
    }
    if let Some(seconds) = measured.time_to_first_token_p95 {
        blend(&mut learned.idle_first_token_seconds, seconds * (1.0 - busy));
    }
    if let Some(seconds) = measured.inter_token_latency_p95 {
        blend(&mut learned.idle_slow_token_seconds, seconds * (1.0 - busy));
    }
}

/// How busy a replica may be, and by what that is bounded.
fn busy_limit(targets: &Targets, learned: &Learned) -> (f64, Driver) {
    let objective = |objective: Option<f64>, idle: Option<f64>| Some(1.0 - idle? / objective?);
    let bounds = [
        (Some(MOST_BUSY), Driver::Throughput),
        (
            objective(
                targets.time_to_first_token_p95_seconds,
                learned.idle_first_token_seconds,
            ),
            Driver::TimeToFirstToken,
        ),
        (
            objective(targets.inter_token_latency_p95_seconds, learned.idle_slow_token_seconds),
            Driver::InterTokenLatency,
        ),
    ];
    let least = bounds
        .into_iter()
        .filter_map(|(limit, driver)| Some((limit?, driver)))
        .min_by(|(a, _), (b, _)| a.total_cmp(b));
    let (limit, driver) = least.unwrap_or((MOST_BUSY, Driver::Throughput));
    (limit.max(LEAST_BUSY), driver)
}

/// Requests that came in for each that was finished; more than 1 while a queue grows.
fn arrivals_per_finished(loads: &[&Load], before: Option<Queue>, now: Option<Queue>) -> Option<f64> {
    let finished = total(loads, |load| load.finished).filter(|finished| *finished >= FEWEST_OBSERVATIONS)?;
    Some((1.0 + (now?.inside - before?.inside) / finished).clamp(1.0, 2.0))
}

/// Replicas, each busy to the last, that compute what comes in and what waits.
fn throughput(busy: f64, loads: &[&Load], measured: &Measured, arrivals: Option<f64>) -> f64 {
    let computed = busy * loads.len() as f64;
    let growth = if busy > FULL { arrivals.unwrap_or(1.0) } else { 1.0 };
    let finished_per_second = total(loads, |load| {
        (load.window_seconds > 0.0).then(|| load.finished.map(|finished| finished / load.window_seconds))?
    });
    let backlog = finished_per_second
        .filter(|rate| *rate > 0.0)
        .zip(measured.waiting)
        .map_or(0.0, |(rate, waiting)| {
            // A request takes `computed / rate` replica-seconds.
            computed / rate * waiting / DRAIN_SECONDS
        });
    computed * growth + backlog
}

/// Replicas that hold what is computed, and what waits once it is, with the target's share of the cache.
fn kv_cache(targets: &Targets, loads: &[&Load]) -> Option<f64> {
    let target = targets.kv_cache_utilization?;
    let held = total(loads, |load| {
        let share = load.kv_cache_utilization?;
        let with_waiting = match (load.running, load.waiting) {
            (Some(running), Some(waiting)) if running > 0.0 => 1.0 + waiting / running,
            _ => 1.0,
        };
        Some(share * with_waiting)
    })?;
    Some(held / target)
}

/// Replicas that compute as many requests each as now, with no more waiting than the target.
fn waiting(targets: &Targets, measured: &Measured) -> Option<f64> {
    let count = f64::from(measured.answering);
    let (running, waiting) = (measured.running? / count, measured.waiting? / count);
    let target = targets.waiting_requests?;
    Some(if waiting > target {
        count * (running + waiting) / (running + target)
    } else {
        0.0
    })
}
