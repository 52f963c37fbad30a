//! The scaling policies that ours is compared with, each by its published rule, written anew from its documentation.
//!
//! - Kubernetes' HorizontalPodAutoscaler: the algorithm of kubernetes.io/docs/concepts/workloads/autoscaling/horizontal-pod-autoscale
//!   with its defaults: a sync every 15 s, a tolerance of 0.1, up at most by the larger of 4 pods and 100 % in 15 s, down to the
//!   highest recommendation of 300 s.
//! - KEDA: keda.sh/docs/latest/reference/scaledobject-spec. It feeds an HPA with a metric of type AverageValue; polling interval and
//!   cooldown period only count between 0 and 1 replicas, and there is always one here.
//! - llm-d's Workload Variant Autoscaler: docs/saturation-analyzer.md (rule 1, on percentages) and the token-based analyzer (rule 2,
//!   the default since v0.9) of github.com/llm-d/llm-d-workload-variant-autoscaler, looking every 60 s at the peaks of a minute, with
//!   its wanted replicas handed to an HPA.

use std::collections::{BTreeMap, VecDeque};

use strata_operator::autoscale::{Fleet, Load, Replica};

use crate::scaler::{Answer, Scaler};

const TOLERANCE: f64 = 0.1;
const DOWN_WINDOW_SECONDS: f64 = 300.0;
/// Windows before and after which llm-d's chart lets the HPA follow, in seconds.
const SATURATION_WINDOW_SECONDS: f64 = 240.0;
const SATURATION_PACE_SECONDS: f64 = 60.0;
/// llm-d's defaults.
const QUEUE_THRESHOLD: f64 = 5.0;
const QUEUE_SPARE: f64 = 3.0;
const KV_SPARE: f64 = 0.1;
const KV_THRESHOLD: f64 = 0.8;
const BOUNDARY_BELOW: f64 = 0.15;
const OBSERVED: usize = 10;

/// Bounds of the number.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// The least.
    pub min: u32,
    /// The most.
    pub max: u32,
}

/// What an HPA does once it has a recommendation.
#[derive(Clone, Debug)]
struct Behaviour {
    bounds: Bounds,
    up_window_seconds: f64,
    down_window_seconds: f64,
    recommended: VecDeque<(f64, u32)>,
}

impl Behaviour {
    fn new(bounds: Bounds, up_window_seconds: f64, down_window_seconds: f64) -> Self {
        Self {
            bounds,
            up_window_seconds,
            down_window_seconds,
            recommended: VecDeque::new(),
        }
    }

    fn follow(&mut self, recommended: u32, current: u32, now: f64) -> u32 {
        let longest = self.up_window_seconds.max(self.down_window_seconds);
        self.recommended.push_back((now, recommended));
        self.recommended.retain(|(at, _)| now - at <= longest);
        let within = |window: f64| {
            let inside = self.recommended.iter().filter(move |(at, _)| now - at <= window);
            inside.map(|(_, replicas)| *replicas)
        };
        let up = within(self.up_window_seconds).min().unwrap_or(recommended);
        let down = within(self.down_window_seconds).max().unwrap_or(recommended);
        let stable = current.max(up).min(down.max(up));
        let most = (current * 2).max(current + 4);
        stable.min(most).clamp(self.bounds.min, self.bounds.max)
    }
}

/// The recommendation for a metric of type AverageValue that is one number for all.
fn average_value(sum: f64, target: f64, current: u32) -> u32 {
    let ratio = sum / (target * f64::from(current.max(1)));
    if (ratio - 1.0).abs() <= TOLERANCE {
        return current;
    }
    (sum / target).ceil() as u32
}

/// An HPA on the mean share of the KV-cache of its pods.
#[derive(Clone, Debug)]
pub struct HpaOnCache {
    target: f64,
    behaviour: Behaviour,
}

impl HpaOnCache {
    /// With a target share, 0 to 1.
    pub fn new(target: f64, bounds: Bounds) -> Self {
        Self {
            target,
            behaviour: Behaviour::new(bounds, 0.0, DOWN_WINDOW_SECONDS),
        }
    }

    fn recommend(&self, fleet: &Fleet, current: u32) -> u32 {
        let shares: Vec<f64> = loads(fleet).filter_map(|(_, load)| load.kv_cache_utilization).collect();
        if shares.is_empty() {
            return current;
        }
        let (sum, known) = (shares.iter().sum::<f64>(), shares.len() as f64);
        let ratio = sum / known / self.target;
        if (ratio - 1.0).abs() <= TOLERANCE {
            return current;
        }
        let unknown = fleet.len() as f64 - known;
        if unknown == 0.0 {
            return (ratio * known).ceil() as u32;
        }
        // Pods without the metric count as idle on the way up, and as at the target on the way down.
        let filled = if ratio > 1.0 { sum } else { sum + unknown * self.target };
        let all = known + unknown;
        let ratio_of_all = filled / all / self.target;
        if (ratio_of_all - 1.0).abs() <= TOLERANCE || (ratio > 1.0) != (ratio_of_all > 1.0) {
            return current;
        }
        let replicas = (ratio_of_all * all).ceil() as u32;
        let turned = (ratio_of_all < 1.0 && replicas > current) || (ratio_of_all > 1.0 && replicas < current);
        if turned { current } else { replicas }
    }
}

impl Scaler for HpaOnCache {
    fn replicas(&mut self, fleet: &Fleet, wanted: u32, now: f64) -> Answer {
        let recommended = self.recommend(fleet, wanted);
        answer(self.behaviour.follow(recommended, wanted, now))
    }
}

/// KEDA on a number of requests.
#[derive(Clone, Debug)]
pub struct Keda {
    target: f64,
    with_running: bool,
    behaviour: Behaviour,
}

impl Keda {
    /// On waiting requests, so many for each replica.
    pub fn waiting(target: f64, bounds: Bounds) -> Self {
        Self {
            target,
            with_running: false,
            behaviour: Behaviour::new(bounds, 0.0, DOWN_WINDOW_SECONDS),
        }
    }

    /// On all requests that are inside, waiting or computed, so many for each replica.
    pub fn inside(target: f64, bounds: Bounds) -> Self {
        Self {
            with_running: true,
            ..Self::waiting(target, bounds)
        }
    }
}

impl Scaler for Keda {
    fn replicas(&mut self, fleet: &Fleet, wanted: u32, now: f64) -> Answer {
        let requests = |load: &Load| {
            let running = if self.with_running { load.running } else { None };
            load.waiting.unwrap_or(0.0) + running.unwrap_or(0.0)
        };
        let sum: f64 = loads(fleet).map(|(_, load)| requests(load)).sum();
        let recommended = average_value(sum, self.target, wanted);
        answer(self.behaviour.follow(recommended, wanted, now))
    }
}

/// What llm-d's saturation analyzers look at.
#[derive(Clone, Copy, Debug, Default)]
struct Peak {
    cache: f64,
    queue: f64,
}

/// Which of llm-d's rules.
#[derive(Clone, Debug)]
enum Rule {
    /// Percentages: one more when the mean spare share or queue is below its trigger, one fewer when it stays above without one.
    Percent { threshold: f64 },
    /// Tokens: as many as the demand needs of the capacity that was seen.
    Tokens {
        up: f64,
        cache_tokens: f64,
        step_tokens: f64,
        sequences: f64,
        seen: VecDeque<f64>,
    },
}

/// llm-d's Workload Variant Autoscaler.
#[derive(Clone, Debug)]
pub struct Saturation {
    rule: Rule,
    peaks: BTreeMap<String, VecDeque<Peak>>,
    lengths: (f64, f64),
    wish: Option<u32>,
    looked_at: f64,
    behaviour: Behaviour,
}

impl Saturation {
    /// By percentages, with the share of the cache from which a replica counts as saturated.
    pub fn percent(threshold: f64, waits: bool, bounds: Bounds) -> Self {
        Self::new(Rule::Percent { threshold }, waits, bounds)
    }

    /// By tokens, with the share of the capacity above which there is to be more of it.
    pub fn tokens(up: f64, waits: bool, profile: &crate::engine::Profile, bounds: Bounds) -> Self {
        let rule = Rule::Tokens {
            up,
            cache_tokens: f64::from(profile.cache_tokens),
            step_tokens: f64::from(profile.step_tokens),
            sequences: f64::from(profile.sequences),
            seen: VecDeque::new(),
        };
        Self::new(rule, waits, bounds)
    }

    /// `waits`: the HPA holds an increase for 240 s, as the chart has it, and not only a decrease.
    fn new(rule: Rule, waits: bool, bounds: Bounds) -> Self {
        let up = if waits { SATURATION_WINDOW_SECONDS } else { 0.0 };
        Self {
            rule,
            peaks: BTreeMap::new(),
            lengths: (0.0, 0.0),
            wish: None,
            looked_at: f64::NEG_INFINITY,
            behaviour: Behaviour::new(bounds, up, SATURATION_WINDOW_SECONDS),
        }
    }

    fn remember(&mut self, fleet: &Fleet) {
        self.peaks
            .retain(|name, _| matches!(fleet.get(name), Some(Replica::Answering(_))));
        let (mut prompts, mut answers, mut finished) = (0.0, 0.0, 0.0);
        for (name, load) in loads(fleet) {
            let peaks = self.peaks.entry(name.clone()).or_default();
            peaks.push_back(Peak {
                cache: load.kv_cache_utilization.unwrap_or(0.0),
                queue: load.waiting.unwrap_or(0.0),
            });
            while peaks.len() > 4 {
                peaks.pop_front();
            }
            prompts += load.prompt_tokens.unwrap_or(0.0);
            answers += load.generation_tokens.unwrap_or(0.0);
            finished += load.finished.unwrap_or(0.0);
        }
        if finished > 0.0 {
            self.lengths = (prompts / finished, answers / finished);
        }
    }

    fn look(&mut self, fleet: &Fleet, current: u32) -> u32 {
        let highest = |peaks: &VecDeque<Peak>| Peak {
            cache: peaks.iter().map(|peak| peak.cache).fold(0.0, f64::max),
            queue: peaks.iter().map(|peak| peak.queue).fold(0.0, f64::max),
        };
        let peaks: Vec<Peak> = self.peaks.values().map(highest).collect();
        if peaks.is_empty() {
            return current;
        }
        let ready = peaks.len() as u32;
        let pending = (fleet.len() as u32).saturating_sub(ready);
        match &mut self.rule {
            Rule::Percent { threshold } => percent(*threshold, &peaks, pending, current),
            Rule::Tokens {
                up,
                cache_tokens,
                step_tokens,
                sequences,
                seen,
            } => {
                let (prompt, answer) = self.lengths;
                let by_memory = *cache_tokens * KV_THRESHOLD;
                let at_once = (*step_tokens * answer / (prompt + answer).max(1.0)).min(*sequences);
                let derived = Some(at_once * (prompt + answer / 2.0)).filter(|tokens| *tokens > 0.0);
                let mut capacities = Vec::new();
                let mut demand = 0.0;
                for peak in &peaks {
                    let used = peak.cache * *cache_tokens;
                    demand += used + peak.queue * prompt;
                    let by_compute = if peak.queue >= QUEUE_THRESHOLD && used > 0.0 {
                        seen.push_back(used);
                        while seen.len() > OBSERVED {
                            seen.pop_front();
                        }
                        used
                    } else if seen.is_empty() {
                        derived.unwrap_or(by_memory)
                    } else {
                        seen.iter().sum::<f64>() / seen.len() as f64
                    };
                    capacities.push(by_compute.min(by_memory));
                }
                capacities.sort_by(f64::total_cmp);
                let capacity = capacities[capacities.len() / 2].max(1.0);
                let missing = demand / *up - f64::from(ready + pending) * capacity;
                let spare = f64::from(ready) * capacity - demand / (*up - BOUNDARY_BELOW).max(0.05);
                if missing > 0.0 {
                    current + (missing / capacity).ceil() as u32
                } else if spare > 0.0 {
                    current.saturating_sub((spare / capacity).floor() as u32).max(1)
                } else {
                    current
                }
            }
        }
    }
}

/// llm-d's first rule.
fn percent(threshold: f64, peaks: &[Peak], pending: u32, current: u32) -> u32 {
    let calm: Vec<&Peak> = peaks
        .iter()
        .filter(|peak| peak.cache < threshold && peak.queue < QUEUE_THRESHOLD)
        .collect();
    let count = calm.len() as f64;
    let cache: f64 = calm.iter().map(|peak| peak.cache).sum();
    let queue: f64 = calm.iter().map(|peak| peak.queue).sum();
    let is_short = |count: f64| {
        threshold - cache / count < KV_SPARE.min(threshold / 2.0) || QUEUE_THRESHOLD - queue / count < QUEUE_SPARE
    };
    if calm.is_empty() || is_short(count) {
        // None while pods start: their capacity is not seen yet.
        return if pending > 0 { current } else { current + 1 };
    }
    if calm.len() >= 2 && pending == 0 && !is_short(count - 1.0) {
        return current.saturating_sub(1).max(1);
    }
    current
}

impl Scaler for Saturation {
    fn replicas(&mut self, fleet: &Fleet, wanted: u32, now: f64) -> Answer {
        self.remember(fleet);
        if now - self.looked_at >= SATURATION_PACE_SECONDS {
            self.looked_at = now;
            self.wish = Some(self.look(fleet, wanted));
        }
        let wish = self.wish.unwrap_or(wanted);
        let recommended = average_value(f64::from(wish), 1.0, wanted);
        answer(self.behaviour.follow(recommended, wanted, now))
    }
}

fn loads(fleet: &Fleet) -> impl Iterator<Item = (&String, &Load)> {
    fleet.iter().filter_map(|(name, replica)| match replica {
        Replica::Answering(load) => Some((name, load)),
        _ => None,
    })
}

fn answer(replicas: u32) -> Answer {
    Answer {
        replicas,
        why: String::new(),
    }
}
