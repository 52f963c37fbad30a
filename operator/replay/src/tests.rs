//! The model beside what can be worked out by hand, and beside what was measured.

use proptest::prelude::*;
use strata_operator::autoscale::settings::{Settings, Targets};
use strata_operator::autoscale::{Fleet, Load, Replica};

use crate::calibration::{H100_70B, NIM_70B, STRATA_CPU, STRATA_ROWS, modelled};
use crate::engine::{Event, Profile, Request, Server};
use crate::fleet::{Router, Setup, run};
use crate::rivals::{Bounds, HpaOnCache, Keda};
use crate::scaler::{Fixed, Ours, Scaler};
use crate::trace::{Random, Trace};

/// A step of 10 ms and 1 ms for each token, to reckon with.
const PLAIN: Profile = Profile {
    name: "plain",
    accelerators: 2,
    step: 0.010,
    token: 0.001,
    cached: 0.0,
    attention: 0.0,
    cache_tokens: 1000,
    block_tokens: 10,
    step_tokens: 50,
    sequences: 8,
    reserves: false,
};

fn request(at: f64, prompt: u32, output: u32) -> Request {
    Request { at, prompt, output }
}

/// Drives a server until it has no work: (second, event).
fn drive(server: &mut Server) -> Vec<(f64, Event)> {
    let mut events = Vec::new();
    for _ in 0..100_000 {
        let Some(now) = server.next() else { break };
        server.advance(|event| events.push((now, event)));
    }
    events
}

fn close(is: f64, expected: f64) -> bool {
    (is - expected).abs() < 1e-9
}

#[test]
fn one_request_takes_its_prompt_in_chunks_and_then_a_step_for_each_token() {
    let mut server = Server::new(PLAIN);
    server.accept(request(0.0, 120, 4), 0.0);
    let events = drive(&mut server);
    // 50, 50 and 20 tokens: 60 + 60 + 30 ms; then three steps of one token each.
    assert!(matches!(events[0], (now, Event::FirstToken(_, seconds)) if close(now, 0.150) && close(seconds, 0.150)));
    assert!(matches!(events[1], (now, Event::Finished(_)) if close(now, 0.150 + 3.0 * 0.011)));
    assert_eq!((server.inside(), server.cache_share()), (0, 0.0), "all is given back");
    let load = server.counters.scrape(1.0, 0, 0, 0.0);
    assert_eq!(
        (load.prompt_tokens, load.generation_tokens, load.finished),
        (Some(120.0), Some(4.0), Some(1.0))
    );
    assert!(close(
        load.inter_token_latency.and_then(|all| all.mean()).expect("three"),
        0.011
    ));
}

#[test]
fn requests_share_steps_and_wait_for_a_place() {
    let mut server = Server::new(Profile { sequences: 2, ..PLAIN });
    for _ in 0..3 {
        server.accept(request(0.0, 10, 2), 0.0);
    }
    // The first one came alone; then the second one's prompt beside the first one's token; the third one waits for a place.
    assert_eq!((server.computed(), server.queued()), (1, 2));
    let events = drive(&mut server);
    let first_tokens: Vec<f64> = events
        .iter()
        .filter_map(|(_, event)| match event {
            Event::FirstToken(_, seconds) => Some(*seconds),
            Event::Finished(_) => None,
        })
        .collect();
    // 10 + 10; then 10 + 1 + 10; the first one's place is free after that, so 10 + 1 + 10 again.
    let expected = [0.020, 0.041, 0.062];
    assert!(
        first_tokens
            .iter()
            .zip(expected)
            .all(|(is, expected)| close(*is, expected)),
        "{first_tokens:?}"
    );
}

#[test]
fn a_full_cache_puts_the_newest_request_back_and_answers_all() {
    let mut server = Server::new(Profile {
        cache_tokens: 100,
        ..PLAIN
    });
    server.accept(request(0.0, 40, 50), 0.0);
    server.accept(request(0.0, 40, 50), 0.0);
    let events = drive(&mut server);
    let ended = events
        .iter()
        .filter(|(_, event)| matches!(event, Event::Finished(_)))
        .count();
    let begun = events.len() - ended;
    // Each needs 90 of 100 tokens in the end: both cannot be held.
    assert_eq!((begun, ended), (2, 2));
    assert!(server.preemptions >= 1);
    assert_eq!(server.cache_share(), 0.0);
    let mut server = Server::new(Profile {
        cache_tokens: 100,
        reserves: true,
        ..PLAIN
    });
    server.accept(request(0.0, 40, 50), 0.0);
    server.accept(request(0.0, 40, 50), 0.0);
    drive(&mut server);
    assert_eq!(server.preemptions, 0, "one that is begun has room for its whole answer");
}

#[test]
fn the_model_is_within_a_tenth_of_what_nvidia_measured() {
    for row in NIM_70B {
        let model = modelled(&H100_70B, &row);
        let off = model.between_tokens / row.between_tokens - 1.0;
        assert!(
            off.abs() < 0.1,
            "{row:?}: {:.1} ms between tokens",
            model.between_tokens
        );
        let off = model.throughput / row.throughput - 1.0;
        assert!(off.abs() < 0.1, "{row:?}: {:.0} tokens a second", model.throughput);
    }
}

#[test]
fn the_model_is_within_a_quarter_of_our_own_engine() {
    for row in STRATA_ROWS {
        let model = modelled(&STRATA_CPU, &row);
        let off = model.throughput / row.throughput - 1.0;
        assert!(off.abs() < 0.25, "{row:?}: {:.0} tokens a second", model.throughput);
    }
}

/// Requests at a steady rate, as chance has it.
fn steady(per_second: f64, seconds: f64, seed: u64) -> Trace {
    let mut random = Random(seed);
    let mut requests = Vec::new();
    let mut at = 0.0;
    while at < seconds {
        at -= (1.0 - random.share()).ln() / per_second;
        requests.push(request(
            at,
            200 + (random.share() * 1600.0) as u32,
            50 + (random.share() * 300.0) as u32,
        ));
    }
    Trace::new(requests)
}

fn setup(start: u32) -> Setup {
    Setup {
        profile: H100_70B,
        cold_start_seconds: 120.0,
        router: Router::LeastLoad,
        start,
        objective_seconds: 1.0,
    }
}

fn ours(max: u32) -> Ours {
    let targets = Targets {
        time_to_first_token_p95_seconds: Some(1.0),
        ..Targets::default()
    };
    Ours::new(Settings::new(1, max, None, targets).expect("the bounds are right"))
}

#[test]
fn a_fixed_fleet_costs_its_hours_and_the_same_run_gives_the_same_outcome() {
    let trace = steady(8.0, 1800.0, 1);
    let outcome = run(&setup(3), &trace, &mut Fixed(3));
    assert!(close(outcome.accelerator_hours, 3.0 * 2.0 * trace.seconds / 3600.0));
    assert_eq!((outcome.attainment, outcome.changes.len()), (1.0, 0));
    assert_eq!(outcome, run(&setup(3), &trace, &mut Fixed(3)));
}

#[test]
fn pods_start_cold_and_drain_before_they_go() {
    struct Plan(Vec<(f64, u32)>, Vec<(f64, usize)>);
    impl Scaler for Plan {
        fn replicas(&mut self, fleet: &Fleet, wanted: u32, now: f64) -> crate::scaler::Answer {
            let ready = fleet
                .values()
                .filter(|pod| matches!(pod, Replica::Answering(_)))
                .count();
            self.1.push((now, ready));
            let replicas = self
                .0
                .iter()
                .rev()
                .find(|(at, _)| *at <= now)
                .map_or(wanted, |(_, replicas)| *replicas);
            crate::scaler::Answer {
                replicas,
                why: String::new(),
            }
        }
    }
    let trace = steady(4.0, 600.0, 2);
    let mut plan = Plan(vec![(60.0, 2), (300.0, 1)], Vec::new());
    let outcome = run(&setup(1), &trace, &mut plan);
    let ready = |at: f64| plan.1.iter().find(|(now, _)| *now == at).map(|(_, ready)| *ready);
    assert_eq!((ready(165.0), ready(180.0), ready(315.0)), (Some(1), Some(2), Some(1)));
    assert_eq!(outcome.windows.iter().map(|window| window.requests).sum::<usize>(), {
        let last = 60.0 * outcome.windows.len() as f64;
        trace.requests.iter().filter(|request| request.at < last).count()
    });
    // The second pod lived from 60 s until its last answer after 300 s.
    let second = (outcome.accelerator_hours / 2.0 * 3600.0) - trace.seconds;
    assert!((240.0..300.0).contains(&second), "{second}");
}

#[test]
fn of_a_steady_load_the_policy_learns_how_many_it_needs_and_stays_there() {
    for start in [4, 5, 10] {
        let outcome = run(&setup(start), &steady(24.0, 3.0 * 3600.0, 3), &mut ours(12));
        let late: Vec<_> = outcome.changes.iter().filter(|change| change.at > 3600.0).collect();
        assert!(late.is_empty(), "{start}: {:#?}", outcome.changes);
    }
}

#[test]
fn a_rise_is_met_with_at_most_two_late_minutes_in_the_mean_and_hardly_a_flap() {
    const DRAWS: u64 = 10;
    let outcomes = (1..=DRAWS).map(|seed| {
        // From 6 to 24 requests a second within an hour: one to three replicas more.
        let mut random = Random(seed);
        let mut requests = Vec::new();
        let mut at = 0.0;
        while at < 3600.0 {
            at -= (1.0 - random.share()).ln() / (6.0 + 18.0 * at / 3600.0);
            requests.push(request(at, 1000, 200));
        }
        run(&setup(2), &Trace::new(requests), &mut ours(12))
    });
    let (kept, flaps) = outcomes.fold((0.0, 0), |(kept, flaps), outcome| {
        (kept + outcome.attainment, flaps + outcome.flaps())
    });
    assert!(kept / DRAWS as f64 >= 58.0 / 60.0, "{kept} of {DRAWS}");
    assert!(flaps <= 1, "{flaps} flaps");
}

fn at_cache(shares: &[Option<f64>]) -> Fleet {
    let pod = |share: &Option<f64>| match share {
        Some(share) => Replica::Answering(Load {
            kv_cache_utilization: Some(*share),
            waiting: Some(10.0 * share),
            ..Load::default()
        }),
        None => Replica::Starting,
    };
    shares
        .iter()
        .enumerate()
        .map(|(index, share)| (index.to_string(), pod(share)))
        .collect()
}

#[test]
fn kubernetes_autoscaler_does_what_its_documentation_says() {
    let bounds = Bounds { min: 1, max: 20 };
    let rows: [(&[Option<f64>], u32, &str); 6] = [
        (&[Some(0.8), Some(0.8)], 4, "ceil(2 · 0.8 / 0.5)"),
        (&[Some(0.54), Some(0.54)], 2, "within the tolerance of 0.1"),
        (
            &[Some(0.9), None],
            2,
            "a starting pod counts as idle on the way up: 0.45 of 0.5 is within the tolerance",
        ),
        (&[Some(1.0), Some(1.0), None], 4, "ceil(3 · 0.667 / 0.5)"),
        (&[Some(0.1), Some(0.1)], 2, "down is held for 300 s"),
        (&[Some(1.0); 1], 2, "ceil(1 · 1.0 / 0.5)"),
    ];
    for (shares, expected, why) in rows {
        let mut hpa = HpaOnCache::new(0.5, bounds);
        let current = shares.len() as u32;
        hpa.replicas(&at_cache(&vec![Some(0.5); shares.len()]), current, 0.0);
        assert_eq!(
            hpa.replicas(&at_cache(shares), current, 15.0).replicas,
            expected,
            "{why}"
        );
    }
    let mut hpa = HpaOnCache::new(0.5, bounds);
    let down: Vec<u32> = (0..30)
        .map(|step| {
            hpa.replicas(&at_cache(&[Some(0.1), Some(0.1)]), 2, 15.0 * f64::from(step))
                .replicas
        })
        .collect();
    assert_eq!(
        down.first(),
        Some(&1),
        "without a higher recommendation before it, down is at once"
    );
    let mut keda = Keda::waiting(4.0, bounds);
    assert_eq!(
        keda.replicas(&at_cache(&[Some(0.8), Some(0.8)]), 2, 0.0).replicas,
        4,
        "ceil(16 / 4)"
    );
}

#[test]
fn traces_are_read_and_errors_say_where_and_what_to_write() {
    let text = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-02-28 23:59:59.5,374,44\n2024-02-29 00:00:01.0,396,109\n";
    let trace = Trace::parse(text, "t").expect("it is one");
    assert_eq!(
        trace.requests[1],
        request(1.5, 396, 109),
        "over midnight before a leap day"
    );
    for (text, says) in [
        ("a,b\n1,2\n", "names the columns"),
        (
            "TIMESTAMP,ContextTokens,GeneratedTokens\nx,1,2\n",
            "line 2 of t is \"x,1,2\"",
        ),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,-1,2\n", "whole numbers"),
    ] {
        let error = Trace::parse(text, "t").expect_err("it is none").to_string();
        assert!(error.contains(says), "{error}");
    }
    let louder = trace.louder(3.0, 1);
    assert_eq!(louder.requests.len(), 6);
    assert_eq!(louder, trace.louder(3.0, 1));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn whatever_comes_every_request_is_answered_and_the_cache_is_given_back(
        lengths in proptest::collection::vec((1u32..2000, 0u32..300), 1..40),
        reserves in any::<bool>(),
    ) {
        let mut server = Server::new(Profile { reserves, ..PLAIN });
        for (prompt, output) in &lengths {
            server.accept(request(0.0, *prompt, *output), 0.0);
        }
        let events = drive(&mut server);
        let ended = events.iter().filter(|(_, event)| matches!(event, Event::Finished(_))).count();
        prop_assert_eq!(ended, lengths.len());
        prop_assert_eq!((server.inside(), server.cache_share()), (0, 0.0));
        prop_assert!(events.windows(2).all(|pair| pair[0].0 <= pair[1].0));
    }

    #[test]
    fn no_text_makes_the_reader_panic(text in any::<String>()) {
        let _ = Trace::parse(&text, "t");
        let _ = Trace::parse(&format!("TIMESTAMP,ContextTokens,GeneratedTokens\n{text}"), "t");
    }
}
