//! How many replicas: one pure function of the settings, of what was seen before, of the pods, and of the time.
//!
//! - **Up** at once, to what the load will need when a pod that is made now is ready: its level, its trend over the measured
//!   cold start, and its noise. Pods that start count as capacity that comes.
//! - **Down** only to what the load needed at its highest in a whole window, with some to spare, not within a window after any
//!   change, and not while it rises: in no window is there an up and then a down. And for a while after a down, no forecast leads
//!   up: only what is needed by then does. While it does not know yet what a pod can carry, it may err once; of a steady load it
//!   then stays at its number.
//! - **Missing is not zero.** A silent pod is counted neither as idle nor as full: it keeps its place, nothing is scaled down
//!   while one is silent, and what is needed is seen from the others.
//! - After a restart, or a time without decisions, nothing is scaled down for one window: what was before is not known.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::demand::{Driver, Learned, Measured, Queue, measure};
use super::settings::Settings;
use super::{Fleet, Replica};

/// Cold start of a pod that is not measured yet, in seconds.
const COLD_START_SECONDS: f64 = 120.0;
/// Shortest and longest window, in seconds, and how many cold starts it has between them: a pod is to serve longer than it took to
/// start.
const WINDOW_SECONDS: (f64, f64) = (120.0, 600.0);
const WINDOW_COLD_STARTS: f64 = 2.5;
/// Shortest and longest time over which a trend is taken, in seconds; between them it is what it is carried ahead.
const TREND_SECONDS: (f64, f64) = (120.0, 300.0);
/// The pace of decisions, in seconds: a pod that is made now was needed up to so long ago.
const PACE_SECONDS: f64 = 15.0;
/// Most that a trend adds to what is needed now, as a share of it: loads turn.
const MOST_AHEAD: f64 = 0.1;
/// Samples that a trend needs.
const FEWEST_SAMPLES: f64 = 5.0;
/// How many standard errors the load may be above what is forecast.
const NOISE_DEVIATIONS: f64 = 2.8;
/// What must be to spare after a scale-down: a share of the need, and of its square root, as the load of a few replicas varies by
/// more of itself than that of many.
const SPARE: (f64, f64) = (0.2, 0.6);
/// For so long after a scale-down more are made for what is needed, and not for what is forecast, in seconds.
const HOLD_SECONDS: i64 = 300;
/// A need this little above whole replicas is not worth one more.
const NEGLIGIBLE: f64 = 0.02;
/// Without a decision for that long, what was before does not count, in seconds.
const GAP_SECONDS: i64 = 120;
/// Most samples that are kept.
const SAMPLES: usize = 128;
/// Most starting pods whose time is taken.
const STARTING: usize = 16;

/// What the next decision needs of the ones before. `Default` before the first one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Memory {
    /// What was decided last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replicas: Option<u32>,
    /// When the number was last changed, in seconds since the epoch.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub changed_at: Option<i64>,
    /// What was learned of a replica.
    #[serde(default)]
    pub learned: Learned,
    /// What is of no use after a restart; not written.
    #[serde(skip)]
    pub recent: Recent,
}

/// What was seen since the operator runs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Recent {
    since: Option<i64>,
    seen_at: Option<i64>,
    lowered_at: Option<i64>,
    samples: Vec<Sample>,
    queue: Option<Queue>,
    starting: BTreeMap<String, i64>,
}

/// What the load needed at a moment, in replicas.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sample {
    at: i64,
    need: f64,
    answering: u32,
    /// Whether pods were full, so that they show less of the load than there is.
    full: bool,
}

/// Why the number is what it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The load needs this many.
    LoadRose,
    /// It needed fewer for a whole window.
    LoadFell,
    /// The number is right.
    Steady,
    /// Fewer would do now; it is waited whether that lasts.
    Stabilizing,
    /// More are needed than there may be.
    AtMaximum,
    /// More are needed than the budget of accelerators allows.
    OverBudget,
    /// It was outside of the bounds.
    OutOfBounds,
    /// Pods do not say what is needed.
    MetricsMissing,
}

impl Cause {
    /// The word for history and labels.
    pub fn name(self) -> &'static str {
        match self {
            Self::LoadRose => "LoadRose",
            Self::LoadFell => "LoadFell",
            Self::Steady => "Steady",
            Self::Stabilizing => "Stabilizing",
            Self::AtMaximum => "AtMaximum",
            Self::OverBudget => "OverBudget",
            Self::OutOfBounds => "OutOfBounds",
            Self::MetricsMissing => "MetricsMissing",
        }
    }
}

/// What is decided.
#[derive(Clone, Debug, PartialEq)]
pub struct Decision {
    /// Wanted replicas.
    pub replicas: u32,
    /// What they were before.
    pub before: u32,
    /// Why.
    pub cause: Cause,
    /// Why, with the numbers, for a person.
    pub message: String,
    /// For the next decision.
    pub memory: Memory,
    /// What it rests on.
    pub measured: Measured,
}

/// Decides. It is called at a steady pace, such as every 15 seconds, with what was scraped just before.
pub fn decide(settings: &Settings, memory: &Memory, fleet: &Fleet, now_seconds: i64) -> Decision {
    let mut memory = memory.clone();
    let before = memory.replicas.unwrap_or(fleet.len() as u32);
    let gap = memory
        .recent
        .seen_at
        .is_none_or(|at| now_seconds.saturating_sub(at) > GAP_SECONDS || at > now_seconds);
    if gap {
        memory.recent = Recent {
            since: Some(now_seconds),
            ..Recent::default()
        };
    }
    memory.recent.seen_at = Some(now_seconds);
    time_cold_starts(&mut memory, fleet, now_seconds);
    let queue = memory.recent.queue;
    let (measured, queue) = measure(settings.targets(), &mut memory.learned, queue, fleet);
    memory.recent.queue = queue;
    let window = window_seconds(settings, &memory.learned);
    if let Some(need) = measured.need {
        let samples = &mut memory.recent.samples;
        samples.push(Sample {
            at: now_seconds,
            need,
            answering: measured.answering,
            full: measured.is_full(),
        });
        samples.retain(|sample| now_seconds - sample.at <= window.max(TREND_SECONDS.1 as i64));
        let excess = samples.len().saturating_sub(SAMPLES);
        samples.drain(..excess);
    }
    let (replicas, cause, why) = choose(settings, &memory, &measured, before, now_seconds);
    if replicas < before {
        memory.recent.lowered_at = Some(now_seconds);
    }
    if replicas != before || memory.replicas.is_none() {
        memory.changed_at = (replicas != before).then_some(now_seconds).or(memory.changed_at);
    }
    memory.replicas = Some(replicas);
    Decision {
        replicas,
        before,
        cause,
        message: format!("{why}; {}", figures(&measured)),
        memory,
        measured,
    }
}

fn choose(settings: &Settings, memory: &Memory, measured: &Measured, before: u32, now: i64) -> (u32, Cause, String) {
    let bounded = before.clamp(settings.min, settings.most());
    if bounded != before {
        let (min, most) = (settings.min, settings.most());
        let why = format!("{before} replicas are outside of {min} to {most}");
        return (bounded, Cause::OutOfBounds, why);
    }
    let samples = &memory.recent.samples;
    let (Some(need), Some(forecast)) = (measured.need, forecast(settings, samples, &memory.learned, now)) else {
        let silent = measured.silent;
        let why = match measured.answering {
            0 if silent == 0 => "no pod is ready yet".to_owned(),
            0 => format!("none of {silent} ready pods says what is needed"),
            answering => format!("the metrics of {answering} pods do not say how busy they are"),
        };
        return (before, Cause::MetricsMissing, why);
    };
    let is_held = memory.recent.lowered_at.is_some_and(|at| now - at < HOLD_SECONDS);
    let expected = if is_held {
        need.min(forecast.need)
    } else {
        forecast.need
    };
    // A silent pod keeps its place: what it does is not known.
    let wanted = whole(expected).saturating_add(measured.silent);
    if wanted > before {
        let most = settings.most();
        let when = match is_held {
            true => "now".to_owned(),
            false => format!("in {:.0} s", horizon_seconds(settings, &memory.learned)),
        };
        let by = measured.driver.map_or("the load", of);
        let why = format!("{when} {by} needs {wanted} replicas");
        return match wanted.min(most) {
            replicas if replicas > before && replicas == wanted => (replicas, Cause::LoadRose, why),
            replicas if replicas > before => (replicas, Cause::LoadRose, format!("{why}, and {most} is the most")),
            _ if most < settings.max => (
                before,
                Cause::OverBudget,
                format!("{why}, and the budget of accelerators allows {most}"),
            ),
            _ => (before, Cause::AtMaximum, format!("{why}, and maxReplicas is {most}")),
        };
    }
    let window = window_seconds(settings, &memory.learned);
    let highest = (samples.iter().filter(|sample| now - sample.at <= window))
        .map(|sample| sample.need)
        .collect::<Vec<_>>();
    let highest = highest
        .windows(3)
        .map(|near| near.iter().sum::<f64>() / 3.0)
        .fold(forecast.need, f64::max);
    let enough = whole(highest * (1.0 + SPARE.0) + highest.sqrt() * SPARE.1).max(settings.min);
    if enough >= before {
        return (before, Cause::Steady, format!("{before} replicas are right"));
    }
    if measured.silent > 0 {
        let why = format!(
            "{enough} replicas would do, but {} ready pods are silent",
            measured.silent
        );
        return (before, Cause::MetricsMissing, why);
    }
    let since = memory.changed_at.max(memory.recent.since).unwrap_or(now);
    if now - since < window {
        let left = window - (now - since);
        let why = format!("{enough} replicas would do; after another {left} s of that they will be fewer");
        return (before, Cause::Stabilizing, why);
    }
    if forecast.rises {
        let why = format!("{enough} replicas would do, but the load rises");
        return (before, Cause::Stabilizing, why);
    }
    let why = format!("for {window} s no more than {enough} replicas were needed");
    (enough, Cause::LoadFell, why)
}

/// What the load will need.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Forecast {
    /// Replicas.
    need: f64,
    /// Whether it rises by more than noise.
    rises: bool,
}

/// What the load will need when a pod that is made now is ready: its level, its trend where that is more than noise, and as much
/// above both as noise makes likely.
fn forecast(settings: &Settings, samples: &[Sample], learned: &Learned, now: i64) -> Option<Forecast> {
    let last = samples.last()?;
    let horizon = horizon_seconds(settings, learned) + PACE_SECONDS;
    let span = horizon.clamp(TREND_SECONDS.0, TREND_SECONDS.1) as i64;
    let within = || samples.iter().rev().take_while(move |sample| now - sample.at <= span);
    // What full pods show of a load is less than the load: it seems to rise when another one becomes ready.
    let is_hidden = within().any(|sample| sample.full);
    let recent: Vec<(f64, f64)> = within()
        .take_while(|sample| !is_hidden || sample.answering == last.answering)
        .map(|sample| ((sample.at - now) as f64, sample.need))
        .collect();
    let count = recent.len() as f64;
    if count < FEWEST_SAMPLES {
        return Some(Forecast {
            need: last.need,
            rises: false,
        });
    }
    let mean = |of: &dyn Fn(&(f64, f64)) -> f64| recent.iter().map(of).sum::<f64>() / count;
    let (at, need) = (mean(&|sample| sample.0), mean(&|sample| sample.1));
    let spread = mean(&|sample| (sample.0 - at).powi(2)).max(1.0);
    let slope = mean(&|sample| (sample.0 - at) * (sample.1 - need)) / spread;
    let left = mean(&|sample| (sample.1 - need - slope * (sample.0 - at)).powi(2));
    let noise = (left * count / (count - 2.0)).sqrt();
    // A slope within twice its standard error is none.
    let is_trend = slope > 2.0 * noise / (count * spread).sqrt();
    let (level, error) = if is_trend {
        (
            need - slope * at + (slope * horizon).min(MOST_AHEAD * need),
            noise * (1.0 / count + at.powi(2) / (count * spread)).sqrt(),
        )
    } else {
        // Without a trend the newest third counts, as a step shows there first.
        let newest = &recent[..(recent.len() / 3).max(3)];
        let level = newest.iter().map(|sample| sample.1).sum::<f64>() / newest.len() as f64;
        (level, noise / (newest.len() as f64).sqrt())
    };
    Some(Forecast {
        need: (level + NOISE_DEVIATIONS * error).max(0.0),
        rises: is_trend && slope > 0.0,
    })
}

fn whole(need: f64) -> u32 {
    (need - NEGLIGIBLE).ceil().clamp(0.0, f64::from(u32::MAX / 2)) as u32
}

fn horizon_seconds(settings: &Settings, learned: &Learned) -> f64 {
    let assumed = settings.cold_start_seconds.unwrap_or(COLD_START_SECONDS);
    learned.cold_start_seconds.unwrap_or(assumed)
}

/// Time that a lower load must last before replicas become fewer, in seconds.
fn window_seconds(settings: &Settings, learned: &Learned) -> i64 {
    let measured =
        (WINDOW_COLD_STARTS * horizon_seconds(settings, learned)).clamp(WINDOW_SECONDS.0, WINDOW_SECONDS.1) as i64;
    settings.window_seconds.unwrap_or(measured)
}

/// Takes the time of pods that start; a longer one counts at once, a shorter one slowly.
fn time_cold_starts(memory: &mut Memory, fleet: &Fleet, now: i64) {
    let Memory { recent, learned, .. } = memory;
    recent.starting.retain(|name, made_at| match fleet.get(name) {
        Some(Replica::Starting) => true,
        Some(_) => {
            let seconds = (now - *made_at).max(1) as f64;
            let before = learned.cold_start_seconds.unwrap_or(seconds);
            learned.cold_start_seconds = Some(seconds.max(before + 0.2 * (seconds - before)));
            false
        }
        None => false,
    });
    // Pods that were there at the first look are of an unknown age.
    if recent.since == Some(now) {
        return;
    }
    for (name, replica) in fleet {
        if *replica == Replica::Starting && recent.starting.len() < STARTING {
            recent.starting.entry(name.clone()).or_insert(now);
        }
    }
}

fn of(driver: Driver) -> &'static str {
    match driver {
        Driver::Throughput => "the rate of tokens",
        Driver::KvCache => "the KV-cache",
        Driver::Waiting => "the queue",
        Driver::TimeToFirstToken => "the time to the first token",
        Driver::InterTokenLatency => "the time between tokens",
    }
}

/// The numbers of a message.
fn figures(measured: &Measured) -> String {
    let percent = |share: f64| format!("{:.0} %", share * 100.0);
    let seconds = |value: f64| format!("{value:.2} s");
    let parts = [
        Some(format!("{} answer", measured.answering)),
        (measured.silent > 0).then(|| format!("{} silent", measured.silent)),
        measured.need.map(|need| format!("need now {need:.2}")),
        measured.busy.map(|busy| format!("busy {}", percent(busy))),
        measured.busy_limit.map(|limit| format!("at most {}", percent(limit))),
        measured
            .kv_cache_utilization
            .map(|share| format!("KV-cache {}", percent(share))),
        measured.waiting.map(|waiting| format!("waiting {waiting:.0}")),
        measured
            .time_to_first_token_p95
            .map(|value| format!("first token p95 {}", seconds(value))),
        measured
            .inter_token_latency_p95
            .map(|value| format!("between tokens p95 {value:.3} s")),
    ];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}
