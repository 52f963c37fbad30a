//! What the policy does, without pods.

use super::demand::Driver;
use super::policy::{Cause, Decision, Memory, decide};
use super::settings::{Settings, SettingsError, Targets};
use super::{Fleet, Histogram, Load, Replica};

const PACE_SECONDS: i64 = 15;

fn targets() -> Targets {
    Targets {
        kv_cache_utilization: Some(0.7),
        waiting_requests: Some(4.0),
        ..Targets::default()
    }
}

fn settings(min: u32, max: u32) -> Settings {
    Settings::new(min, max, None, targets()).expect("the bounds are right")
}

fn pod(kv: f64, running: f64, waiting: f64) -> Replica {
    Replica::Answering(Load {
        window_seconds: PACE_SECONDS as f64,
        running: Some(running),
        waiting: Some(waiting),
        kv_cache_utilization: Some(kv),
        ..Load::default()
    })
}

fn fleet(pods: impl IntoIterator<Item = Replica>) -> Fleet {
    let named = |(index, pod)| (format!("pod-{index:03}"), pod);
    pods.into_iter().enumerate().map(named).collect()
}

/// Decides once a window for a fleet that follows at once and shares `kv` replicas' worth of cache evenly.
fn follow(settings: &Settings, start: u32, steps: i64, kv: impl Fn(i64) -> f64) -> Vec<Decision> {
    let mut memory = Memory::default();
    let mut count = start;
    let mut decisions = Vec::new();
    for step in 0..steps {
        let share = (kv(step) / f64::from(count)).min(1.0);
        let pods = fleet((0..count).map(|_| pod(share, 10.0 * share, 0.0)));
        let decision = decide(settings, &memory, &pods, step * PACE_SECONDS);
        memory = decision.memory.clone();
        count = decision.replicas;
        decisions.push(decision);
    }
    decisions
}

fn changes(decisions: &[Decision]) -> Vec<i64> {
    let change = |decision: &Decision| i64::from(decision.replicas) - i64::from(decision.before);
    decisions.iter().map(change).filter(|change| *change != 0).collect()
}

#[test]
fn settings_that_cannot_be_kept_are_refused_with_what_to_write_instead() {
    let refused = |min, max, budget, targets| {
        Settings::new(min, max, budget, targets)
            .expect_err("it is wrong")
            .to_string()
    };
    assert_eq!(Settings::new(0, 4, None, targets()), Err(SettingsError::MinIsZero));
    assert!(refused(4, 2, None, targets()).contains("maxReplicas (2) is below minReplicas (4)"));
    assert!(refused(3, 8, Some((8, 4)), targets()).contains("over maxAccelerators (8)"));
    for value in [0.0, -1.0, f64::NAN, 1.1] {
        let wrong = Targets {
            kv_cache_utilization: Some(value),
            ..Targets::default()
        };
        assert!(refused(1, 2, None, wrong).contains("write 1 to 100"), "{value}");
    }
    assert!(
        Settings::new(1, 2, Some((0, 0)), targets()).is_ok(),
        "replicas without accelerators cost none"
    );
}

#[test]
fn what_is_seen_decides_as_the_table_says() {
    let silent = || Replica::Silent("time-out".into());
    let rows: [(&str, Vec<Replica>, u32, Cause); 8] = [
        ("cache at target", vec![pod(0.69, 9.0, 0.0); 2], 2, Cause::Steady),
        ("cache over target", vec![pod(0.9, 9.0, 0.0); 2], 3, Cause::LoadRose),
        (
            "what waits needs cache too",
            vec![pod(0.6, 10.0, 10.0)],
            2,
            Cause::LoadRose,
        ),
        (
            "a start counts as capacity",
            vec![pod(0.9, 9.0, 0.0), pod(0.9, 9.0, 0.0), Replica::Starting],
            3,
            Cause::Steady,
        ),
        (
            "a silent pod keeps its place",
            vec![pod(0.9, 9.0, 0.0), pod(0.9, 9.0, 0.0), silent()],
            4,
            Cause::LoadRose,
        ),
        ("all silent", vec![silent(), silent()], 2, Cause::MetricsMissing),
        ("all starting", vec![Replica::Starting; 3], 3, Cause::MetricsMissing),
        ("idle at first", vec![pod(0.0, 0.0, 0.0); 3], 3, Cause::Stabilizing),
    ];
    for (case, pods, replicas, cause) in rows {
        let decision = decide(&settings(1, 8), &Memory::default(), &fleet(pods), 1_000);
        assert_eq!(
            (decision.replicas, decision.cause),
            (replicas, cause),
            "{case}: {}",
            decision.message
        );
    }
}

#[test]
fn bounds_and_budget_hold_and_say_so() {
    let busy = || fleet(vec![pod(1.0, 10.0, 30.0); 2]);
    let budget = Settings::new(1, 8, Some((11, 4)), targets()).expect("right");
    let decision = decide(&budget, &Memory::default(), &busy(), 0);
    assert_eq!(
        (decision.replicas, decision.cause),
        (2, Cause::OverBudget),
        "{}",
        decision.message
    );
    let decision = decide(&settings(1, 2), &Memory::default(), &busy(), 0);
    assert_eq!(
        (decision.replicas, decision.cause),
        (2, Cause::AtMaximum),
        "{}",
        decision.message
    );
    for (start, expected) in [(1, 3), (9, 4)] {
        let decision = decide(
            &settings(3, 4),
            &Memory::default(),
            &fleet(vec![Replica::Starting; start]),
            0,
        );
        assert_eq!((decision.replicas, decision.cause), (expected, Cause::OutOfBounds));
    }
}

#[test]
fn down_needs_a_whole_window_and_never_happens_beside_a_silent_pod() {
    let down = follow(&settings(1, 8), 4, 40, |_| 0.3);
    assert_eq!(changes(&down), [-3]);
    let at = down
        .iter()
        .position(|decision| decision.replicas < decision.before)
        .expect("it fell");
    assert!(
        at as i64 * PACE_SECONDS >= 300,
        "the window is 2.5 times the cold start that is assumed: {at}"
    );
    assert_eq!(down[at].cause, Cause::LoadFell);

    let mut memory = Memory::default();
    for step in 0..60 {
        let mut pods = fleet(vec![pod(0.1, 1.0, 0.0); 3]);
        pods.insert("silent".into(), Replica::Silent("refused".into()));
        let decision = decide(&settings(1, 8), &memory, &pods, step * PACE_SECONDS);
        assert_eq!(decision.replicas, 4, "{}", decision.message);
        memory = decision.memory;
    }
}

#[test]
fn a_restart_holds_a_window_but_does_not_forget_what_was_learned() {
    let before = follow(&settings(1, 8), 2, 4, |_| 0.5).pop().expect("decided").memory;
    let text = serde_json::to_string(&before).expect("serializes");
    assert!(text.len() < 500, "{text}");
    let mut memory: Memory = serde_json::from_str(&text).expect("reads");
    assert_eq!(memory.learned, before.learned);
    for step in 0..20 {
        let decision = decide(
            &settings(1, 8),
            &memory,
            &fleet(vec![pod(0.15, 1.2, 0.0); 2]),
            10_000 + step * PACE_SECONDS,
        );
        assert_eq!(decision.replicas, 2, "{step}: {}", decision.message);
        memory = decision.memory;
    }
    let decision = decide(
        &settings(1, 8),
        &memory,
        &fleet(vec![pod(0.15, 1.2, 0.0); 2]),
        10_000 + 20 * PACE_SECONDS,
    );
    assert_eq!(decision.replicas, 1, "{}", decision.message);
}

#[test]
fn a_cold_start_is_measured_and_looked_ahead_by() {
    let mut memory = Memory::default();
    let starts = |starting: bool| {
        let second = if starting {
            Replica::Starting
        } else {
            pod(0.3, 3.0, 0.0)
        };
        fleet([pod(0.3, 3.0, 0.0), second])
    };
    memory = decide(&settings(1, 8), &memory, &fleet([pod(0.3, 3.0, 0.0)]), 0).memory;
    for (now, starting) in [(15, true), (60, true), (105, true), (165, false)] {
        memory = decide(&settings(1, 8), &memory, &starts(starting), now).memory;
    }
    assert_eq!(memory.learned.cold_start_seconds, Some(150.0));
    // A load that rises by a replica in 10 minutes: more are made before they are needed.
    let rising = follow(&settings(1, 8), 1, 40, |step| {
        0.2 + 0.7 * (step * PACE_SECONDS) as f64 / 600.0
    });
    let first = rising.iter().find(|decision| decision.replicas > 1).expect("it rose");
    assert!(first.measured.need.expect("measured") < 1.0, "{}", first.message);
}

#[test]
fn a_steady_load_changes_the_number_at_most_once_wherever_it_starts() {
    for start in 1..=12 {
        for load in 0..80 {
            let changes = changes(&follow(&settings(1, 12), start, 120, |_| f64::from(load) / 10.0));
            // A cache that is full does not show all of a load: from there it may take several steps up, never one down.
            let hidden = f64::from(load) / 10.0 > f64::from(start);
            assert!(
                changes.len() <= 1 || hidden && changes.iter().all(|change| *change > 0),
                "{start} {load}: {changes:?}"
            );
        }
    }
}

#[test]
fn whatever_the_load_no_up_is_followed_by_a_down_within_a_window() {
    let mut seed = 7_u64;
    let mut random = || {
        seed = seed
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as f64 / f64::from(1_u32 << 31)
    };
    for _ in 0..200 {
        let loads: Vec<f64> = (0..200).map(|_| random() * 8.0).collect();
        let decisions = follow(&settings(1, 12), 3, 200, |step| {
            loads[step as usize] * if step / 50 % 2 == 0 { 1.0 } else { 0.2 }
        });
        let mut up_at = None;
        for (step, decision) in decisions.iter().enumerate() {
            if decision.replicas > decision.before {
                up_at = Some(step as i64);
            }
            if decision.replicas < decision.before {
                let since = up_at.map_or(i64::MAX, |at| (step as i64 - at) * PACE_SECONDS);
                assert!(since >= 300, "down {since} s after up: {}", decision.message);
            }
            assert!((1..=12).contains(&decision.replicas));
        }
    }
}

#[test]
fn after_a_down_more_are_made_for_what_is_needed_and_not_for_what_is_forecast() {
    // Of the cache 70 % is the target: three replicas carry 2.1 of it.
    for (most, expected) in [(2.0, vec![-1]), (2.4, vec![-1, 1])] {
        let load = |step| (1.2 + 0.08 * (step - 20) as f64).clamp(1.2, most);
        assert_eq!(changes(&follow(&settings(1, 8), 4, 60, load)), expected, "{most}");
    }
}

/// A pod that made 15,000 tokens in 15 seconds, with that much time between two, while so many requests were inside.
fn generating(between_seconds: f64, running: f64) -> Replica {
    Replica::Answering(Load {
        window_seconds: 15.0,
        running: Some(running),
        waiting: Some(0.0),
        prompt_tokens: Some(15_000.0),
        generation_tokens: Some(15_000.0),
        finished: Some(60.0),
        inter_token_latency: Some(Histogram {
            buckets: vec![(0.05, 15_000.0), (f64::INFINITY, 15_000.0)],
            sum_seconds: Some(between_seconds * 15_000.0),
        }),
        ..Load::default()
    })
}

#[test]
fn how_busy_a_replica_is_follows_from_the_time_between_tokens() {
    // 10 ms without load, 20 ms now: half of what it can.
    let load = |mean: f64| generating(mean, mean * 1_000.0);
    let settings = Settings::new(1, 8, None, Targets::default()).expect("right");
    let mut memory = decide(&settings, &Memory::default(), &fleet([load(0.01)]), 0).memory;
    let decision = decide(&settings, &memory, &fleet([load(0.02), load(0.02)]), 15);
    let busy = decision.measured.busy.expect("measured");
    assert!((busy - 0.5).abs() < 0.01, "{busy}");
    assert_eq!(decision.measured.driver, Some(Driver::Throughput));
    memory = decision.memory;
    let capacity = memory.learned.capacity_tokens_per_second.expect("learned");
    assert!(
        (capacity - 4_000.0).abs() < 10.0,
        "2000 a second are half of it: {capacity}"
    );
    let decision = decide(&settings, &memory, &fleet([load(0.1), load(0.1)]), 30);
    assert_eq!(
        decision.replicas, 3,
        "0.9 of each of two, at most 0.85 of each: {}",
        decision.message
    );
}

#[test]
fn what_a_replica_can_is_not_learned_while_a_burst_comes_or_goes() {
    let settings = Settings::new(1, 8, None, Targets::default()).expect("right");
    let memory = decide(&settings, &Memory::default(), &fleet([generating(0.01, 10.0)]), 0).memory;
    // In the mean 20 requests were inside.
    for (running, is_learned) in [(1.0, false), (12.0, true), (35.0, true), (160.0, false)] {
        let memory = decide(&settings, &memory, &fleet([generating(0.02, running)]), 15).memory;
        let learned = memory.learned.capacity_tokens_per_second;
        assert_eq!(learned.is_some(), is_learned, "{running}");
    }
}

#[test]
fn quantiles_are_those_of_prometheus_and_sums_keep_common_bounds() {
    let mut histogram = Histogram {
        buckets: vec![(0.1, 50.0), (0.2, 90.0), (f64::INFINITY, 100.0)],
        sum_seconds: Some(12.0),
    };
    // promql: histogram_quantile(0.7, …) = 0.1 + 0.1 · (70 − 50) / 40
    assert!((histogram.quantile(0.7).expect("some") - 0.15).abs() < 1e-12);
    assert_eq!(histogram.quantile(0.99), Some(0.2));
    assert_eq!(histogram.mean(), Some(0.12));
    assert_eq!(Histogram::default().quantile(0.5), None);
    histogram.add(&Histogram {
        buckets: vec![(0.2, 10.0), (f64::INFINITY, 10.0)],
        sum_seconds: Some(1.0),
    });
    assert_eq!(histogram.buckets, [(0.2, 100.0), (f64::INFINITY, 110.0)]);
}
