//! `make bench-autoscale`: the operator's policy beside others on a recorded load. Everybody else's threshold is chosen afterwards,
//! the cheapest that attains the objective; ours has its one default.
//!
//!     bench-autoscale TRACE RESULT.json
//!
//! The last line of the output is one JSON object: the worst of all scenarios.

use std::error::Error;
use std::io::Write as _;
use std::path::Path;
use std::sync::Mutex;

use serde_json::{Value, json};
use strata_operator::autoscale::settings::{Settings, Targets};
use strata_replay::calibration::{H100_70B, NIM_70B, STRATA_CPU, modelled};
use strata_replay::fleet::{Outcome, Router, Setup, WINDOW_SECONDS, run};
use strata_replay::rivals::{Bounds, HpaOnCache, Keda, Saturation};
use strata_replay::scaler::{Fixed, Ours, Scaler, Schedule};
use strata_replay::trace::Trace;

/// Objective for the 95th percentile of the time to the first token, in seconds, and the share of minutes that must keep it.
const OBJECTIVE_SECONDS: f64 = 1.0;
const WANTED_ATTAINMENT: f64 = 0.99;
/// How many times the trace: at its peak it then needs nine servers.
const TIMES: f64 = 8.0;
/// With which the fleet begins: the smallest fixed one that attains the objective.
const START: u32 = 9;
const BOUNDS: Bounds = Bounds { min: 1, max: 24 };
const COLD_START_SECONDS: f64 = 180.0;
/// Ours is seen on days drawn otherwise too: on one it may have luck.
const OTHER_DRAWS: [u64; 5] = [21, 22, 23, 24, 25];

type MakeScaler = Box<dyn Fn() -> Box<dyn Scaler> + Send + Sync>;

/// A policy with one setting.
struct Contender {
    family: &'static str,
    setting: String,
    start: u32,
    make: MakeScaler,
}

struct Result {
    family: &'static str,
    setting: String,
    start: u32,
    outcome: Outcome,
}

fn main() -> std::result::Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, trace, result] = &arguments[..] else {
        return Err("write bench-autoscale TRACE RESULT.json".into());
    };
    let mut out = std::io::stdout().lock();
    let recorded = Trace::read(Path::new(trace))?;
    let hour = recorded.louder(TIMES, 1);
    let day = hour.daily(24.0, 0.3, 2);
    let mut scenarios = Vec::new();
    for (name, trace) in [("hour", &hour), ("day", &day)] {
        let results = compare(trace);
        writeln!(
            out,
            "\n{name}: {} requests in {:.0} s",
            trace.requests.len(),
            trace.seconds
        )?;
        for result in &results {
            writeln!(out, "{}", line(result))?;
        }
        scenarios.push(scenario(name, trace, &results));
    }
    writeln!(out, "\nother draws of the day")?;
    let mut draws = Vec::new();
    for seed in OTHER_DRAWS {
        let day = recorded.louder(TIMES, seed).daily(24.0, 0.3, seed);
        for result in replay(&day, contenders().into_iter().take(1).collect()) {
            writeln!(out, "{}", line(&result))?;
            draws.push(json!({
                "attainment": result.outcome.attainment,
                "gpu_hours": result.outcome.accelerator_hours,
                "changes": result.outcome.changes.len(),
                "flaps": result.outcome.flaps(),
            }));
        }
    }
    let worst = |key: &str, most: bool| {
        let values = scenarios
            .iter()
            .filter_map(|scenario| scenario["summary"][key].as_f64());
        values.fold(None::<f64>, |worst, value| {
            Some(worst.map_or(value, |worst| if most { worst.max(value) } else { worst.min(value) }))
        })
    };
    let summary = json!({
        "slo_attainment": worst("slo_attainment", false),
        "gpu_hours_vs_best_peer": worst("gpu_hours_vs_best_peer", true),
        "flaps": worst("flaps", true).map(|flaps| flaps as u64),
    });
    let whole = json!({ "summary": summary, "scenarios": scenarios, "draws": draws, "calibration": calibration() });
    std::fs::write(result, serde_json::to_string_pretty(&whole)?)?;
    writeln!(out, "{summary}")?;
    Ok(())
}

fn line(result: &Result) -> String {
    let outcome = &result.outcome;
    format!(
        "{:24} {:>10}  attainment {:.4}  p95 {:8.3} s  {:7.2} GPU-hours  {:3} changes  {:3} flaps",
        result.family,
        result.setting,
        outcome.attainment,
        outcome.first_token_p95,
        outcome.accelerator_hours,
        outcome.changes.len(),
        outcome.flaps(),
    )
}

/// Every contender on a trace, and after them those that knew it.
fn compare(trace: &Trace) -> Vec<Result> {
    let mut results = replay(trace, contenders());
    let knowing = knowing(&results);
    results.extend(replay(trace, knowing));
    results
}

const PRESENT: &str = "present known";
const FORESIGHT: &str = "foresight";

/// Nobody's policies, but what the others can be held to. What each minute needs is the smallest fixed fleet that kept the objective in
/// it; *present known* is told that of the minute that is, and *foresight* of those to come, a cold start ahead.
fn knowing(results: &[Result]) -> Vec<Contender> {
    // From the smallest on.
    let fixed: Vec<&Result> = results.iter().filter(|result| result.family == FIXED).collect();
    let minutes = fixed.first().map_or(0, |result| result.outcome.windows.len());
    let keeps = |result: &Result, minute: usize| {
        let window = result.outcome.windows.get(minute);
        window.is_some_and(|window| window.first_token_p95.is_none_or(|p95| p95 <= OBJECTIVE_SECONDS))
    };
    let needs: Vec<u32> = (0..minutes)
        .map(|minute| {
            let smallest = fixed.iter().find(|result| keeps(result, minute));
            smallest.or(fixed.last()).map_or(START, |result| result.start)
        })
        .collect();
    let most = |minutes: &[u32]| minutes.iter().copied().max().unwrap_or(START);
    let knows = |family, setting, start, schedule: Vec<u32>| {
        let make: MakeScaler = Box::new(move || Box::new(Schedule(schedule.clone())));
        Contender {
            family,
            setting,
            start,
            make,
        }
    };
    let mut all = Vec::new();
    for times in [1.1, 1.2, 1.3, 1.4] {
        for window in [0, 4, 8] {
            let spared = |need| (f64::from(need) * times).ceil() as u32;
            let seen = |minute: usize| spared(most(&needs[minute.saturating_sub(window)..=minute]));
            let schedule = (0..minutes).map(seen).collect();
            all.push(knows(PRESENT, format!("{times}, {window} min"), START, schedule));
        }
    }
    let ahead = (COLD_START_SECONDS / WINDOW_SECONDS).ceil() as usize + 1;
    let coming = |minute: usize| most(&needs[minute..minutes.min(minute + ahead + 1)]);
    let schedule: Vec<u32> = (0..minutes).map(coming).collect();
    let start = schedule.first().copied().unwrap_or(START);
    all.push(knows(FORESIGHT, "of all".into(), start, schedule));
    all
}

/// Contenders on a trace, side by side on all processors.
fn replay(trace: &Trace, contenders: Vec<Contender>) -> Vec<Result> {
    let queue = Mutex::new(contenders.into_iter().enumerate());
    let done = Mutex::new(Vec::new());
    let work = || {
        loop {
            let next = queue.lock().map(|mut queue| queue.next());
            let Ok(Some((place, contender))) = next else { break };
            let setup = Setup {
                profile: H100_70B,
                cold_start_seconds: COLD_START_SECONDS,
                router: Router::LeastLoad,
                start: contender.start,
                objective_seconds: OBJECTIVE_SECONDS,
            };
            let outcome = run(&setup, trace, &mut *(contender.make)());
            let result = Result {
                family: contender.family,
                setting: contender.setting,
                start: contender.start,
                outcome,
            };
            if let Ok(mut done) = done.lock() {
                done.push((place, result));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    let mut done = done.into_inner().unwrap_or_default();
    done.sort_by_key(|(place, _)| *place);
    done.into_iter().map(|(_, result)| result).collect()
}

const OURS: &str = "Strata";
const FIXED: &str = "fixed fleet";

fn contenders() -> Vec<Contender> {
    fn contender(family: &'static str, setting: String, make: MakeScaler) -> Contender {
        Contender {
            family,
            setting,
            start: START,
            make,
        }
    }
    let targets = Targets {
        time_to_first_token_p95_seconds: Some(OBJECTIVE_SECONDS),
        ..Targets::default()
    };
    let settings = Settings::new(BOUNDS.min, BOUNDS.max, None, targets);
    let ours: MakeScaler = Box::new(move || match settings.clone() {
        Ok(settings) => Box::new(Ours::new(settings)),
        Err(_) => Box::new(Fixed(START)),
    });
    let mut all = vec![contender(OURS, "default".into(), ours)];
    for replicas in 3..=10 {
        all.push(Contender {
            start: replicas,
            ..contender(FIXED, replicas.to_string(), Box::new(move || Box::new(Fixed(replicas))))
        });
    }
    for target in [0.06, 0.1, 0.14, 0.16, 0.17, 0.18, 0.19, 0.2, 0.25] {
        let make: MakeScaler = Box::new(move || Box::new(HpaOnCache::new(target, BOUNDS)));
        all.push(contender("HPA on KV use", target.to_string(), make));
    }
    for target in [0.25, 1.0] {
        let make: MakeScaler = Box::new(move || Box::new(Keda::waiting(target, BOUNDS)));
        all.push(contender("KEDA on waiting", target.to_string(), make));
    }
    for target in [10.0, 20.0, 30.0, 40.0, 50.0] {
        let make: MakeScaler = Box::new(move || Box::new(Keda::inside(target, BOUNDS)));
        all.push(contender("KEDA on all requests", target.to_string(), make));
    }
    for threshold in [0.25, 0.3, 0.35, 0.4, 0.5] {
        let make: MakeScaler = Box::new(move || Box::new(Saturation::percent(threshold, false, BOUNDS)));
        all.push(contender("llm-d saturation 1", threshold.to_string(), make));
    }
    let waits: MakeScaler = Box::new(|| Box::new(Saturation::percent(0.3, true, BOUNDS)));
    all.push(contender("llm-d saturation 1", "0.3, held".into(), waits));
    for up in [0.25, 0.5, 0.85] {
        let make: MakeScaler = Box::new(move || Box::new(Saturation::tokens(up, false, &H100_70B, BOUNDS)));
        all.push(contender("llm-d saturation 2", up.to_string(), make));
    }
    all
}

/// What is kept of a scenario.
fn scenario(name: &str, trace: &Trace, results: &[Result]) -> Value {
    let attains = |result: &&Result| result.outcome.attainment >= WANTED_ATTAINMENT;
    let cheaper = |a: &&Result, b: &&Result| a.outcome.accelerator_hours.total_cmp(&b.outcome.accelerator_hours);
    let ours = results.iter().find(|result| result.family == OURS);
    let best = results
        .iter()
        .filter(|result| ![OURS, PRESENT, FORESIGHT].contains(&result.family))
        .filter(attains)
        .min_by(cheaper);
    let hours = |result: Option<&Result>| result.map(|result| result.outcome.accelerator_hours);
    let lines: Vec<Value> = results
        .iter()
        .map(|result| {
            let outcome = &result.outcome;
            // Each family's cheapest that attains it is drawn, or the one that comes closest.
            let points: Vec<Value> = outcome
                .windows
                .iter()
                .map(|window| {
                    json!([
                        window.at,
                        window.requests,
                        window.first_token_p95,
                        window.wanted,
                        window.ready
                    ])
                })
                .collect();
            json!({
                "family": result.family,
                "setting": result.setting,
                "attainment": outcome.attainment,
                "requests_within": outcome.requests_within,
                "first_token_p95": outcome.first_token_p95,
                "gpu_hours": outcome.accelerator_hours,
                "changes": outcome.changes.len(),
                "flaps": outcome.flaps(),
                "preemptions": outcome.preemptions,
                "windows": if name == "hour" || [OURS, FORESIGHT].contains(&result.family) { points } else { Vec::new() },
            })
        })
        .collect();
    json!({
        "name": name,
        "requests": trace.requests.len(),
        "seconds": trace.seconds,
        "summary": {
            "slo_attainment": ours.map(|ours| ours.outcome.attainment),
            "gpu_hours_vs_best_peer": hours(ours).zip(hours(best)).map(|(ours, best)| ours / best),
            "flaps": ours.map(|ours| ours.outcome.flaps()),
            "best_peer": best.map(|best| format!("{} {}", best.family, best.setting)),
        },
        "results": lines,
    })
}

/// What was published beside what the model says.
fn calibration() -> Value {
    let rows = NIM_70B.iter().map(|row| {
        let model = modelled(&H100_70B, row);
        json!({
            "prompt": row.prompt, "output": row.output, "clients": row.clients,
            "between_tokens": [row.between_tokens, model.between_tokens],
            "first_token": [row.first_token, model.first_token],
            "throughput": [row.throughput, model.throughput],
        })
    });
    let ours = strata_replay::calibration::STRATA_ROWS.iter().map(|row| {
        let model = modelled(&STRATA_CPU, row);
        json!({"prompt": row.prompt, "output": row.output, "clients": row.clients, "throughput": [row.throughput, model.throughput]})
    });
    json!({ "h100": rows.collect::<Vec<_>>(), "strata": ours.collect::<Vec<_>>() })
}
