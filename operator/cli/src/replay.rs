//! `strata replay`: what the operator's scaling would have done with a recorded load, without a cluster: the same policy, with a
//! model of a fleet instead of one.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use serde::{Deserialize as _, Serialize};
use strata_api::InferenceService;
use strata_lint::{INPUT_LIMIT_BYTES, Severity, lint};
use strata_operator::inference;
use strata_replay::calibration::{H100_70B, STRATA_CPU};
use strata_replay::engine::Profile;
use strata_replay::fleet::{self, Outcome, Setup};
use strata_replay::scaler::Ours;
use strata_replay::trace::Trace;

use crate::input;
use crate::output::{self, Format};

/// Lines of the table over time, at most.
const LINES: usize = 60;

/// A load, and what is to be scaled.
#[derive(clap::Args)]
pub struct Arguments {
    /// The load: a CSV file with the columns TIMESTAMP, ContextTokens and GeneratedTokens, as Azure's public traces have them; .gz too.
    #[arg(long)]
    trace: PathBuf,
    /// A manifest with an InferenceService that has spec.autoscale.
    #[arg(short = 'f', long = "filename")]
    manifest: PathBuf,
    /// The servers' speed.
    #[arg(long, value_enum, default_value = "h100-70b")]
    server: Server,
    /// How many times the load, of the same shape.
    #[arg(long, default_value_t = 1.0, value_parser = times)]
    times: f64,
    /// Time from a pod's making to its first answer, in seconds.
    #[arg(long, default_value_t = 180, value_parser = clap::value_parser!(u32).range(0..=7200))]
    cold_start_seconds: u32,
    /// Who gets a request.
    #[arg(long, value_enum, default_value = "least-load")]
    router: Router,
    /// How the result is written.
    #[arg(short, long, value_enum, default_value = "text")]
    output: Format,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Server {
    /// Llama-3.3-70B in FP8 on 2 H100, as NVIDIA measured it.
    #[value(name = "h100-70b")]
    H100,
    /// SmolLM2-135M in Q4_1 with Strata's engine on 2 processors.
    #[value(name = "strata-cpu")]
    Cpu,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Router {
    /// The server with the fewest requests.
    LeastLoad,
    /// One after the other, as a Service does it on average.
    RoundRobin,
}

fn times(text: &str) -> Result<f64, String> {
    let times = text.parse::<f64>().ok().filter(|times| (0.01..=1000.0).contains(times));
    times.ok_or_else(|| format!("write a number from 0.01 to 1000, not {text}"))
}

/// What is shown.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Replay {
    server: &'static str,
    requests: usize,
    seconds: f64,
    objective_seconds: Option<f64>,
    attainment: Option<f64>,
    time_to_first_token_p95_seconds: f64,
    accelerator_hours: f64,
    accelerators_per_replica: u32,
    most_replicas: u32,
    preemptions: u64,
    changes: Vec<Change>,
    flaps: usize,
    minutes: Vec<Minute>,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Change {
    at_seconds: f64,
    from: u32,
    to: u32,
    why: String,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Minute {
    at_seconds: f64,
    requests: usize,
    time_to_first_token_p95_seconds: Option<f64>,
    wanted: u32,
    ready: u32,
}

/// Replays, and shows what came of it.
pub fn run(arguments: &Arguments) -> Result<()> {
    let service = read(&arguments.manifest)?;
    let Some(autoscale) = &service.spec.autoscale else {
        bail!(
            "{}: the InferenceService has no spec.autoscale: add it, as there is nothing to replay",
            arguments.manifest.display()
        );
    };
    let settings = inference::settings(&service, autoscale).map_err(anyhow::Error::msg)?;
    let objective = settings.targets().time_to_first_token_p95_seconds;
    let mut trace = Trace::read(&arguments.trace)?;
    if arguments.times != 1.0 {
        trace = trace.louder(arguments.times, 1);
    }
    let profile: Profile = match arguments.server {
        Server::H100 => H100_70B,
        Server::Cpu => STRATA_CPU,
    };
    let setup = Setup {
        profile,
        cold_start_seconds: f64::from(arguments.cold_start_seconds),
        router: match arguments.router {
            Router::LeastLoad => fleet::Router::LeastLoad,
            Router::RoundRobin => fleet::Router::RoundRobin,
        },
        start: u32::try_from(autoscale.min_replicas.unwrap_or(1)).unwrap_or(1).max(1),
        objective_seconds: objective.unwrap_or(f64::INFINITY),
    };
    let outcome = fleet::run(&setup, &trace, &mut Ours::new(settings));
    output::write(arguments.output, &shown(&setup, &trace, objective, outcome), text)
}

/// The first InferenceService of a file, judged as the API server would.
fn read(path: &Path) -> Result<InferenceService> {
    let shown = path.display();
    let text = input::read(path, INPUT_LIMIT_BYTES as u64).with_context(|| format!("cannot read {shown}"))?;
    if text.len() > INPUT_LIMIT_BYTES {
        bail!("{shown} is larger than {INPUT_LIMIT_BYTES} bytes");
    }
    if lint(&text).iter().any(|finding| finding.severity == Severity::Error) {
        bail!("the API server would refuse {shown}: strata lint -f {shown} says why");
    }
    for document in serde_yaml::Deserializer::from_str(&text) {
        let value = serde_yaml::Value::deserialize(document).with_context(|| format!("{shown} is no YAML"))?;
        if value.get("kind").and_then(serde_yaml::Value::as_str) == Some("InferenceService") {
            return serde_yaml::from_value(value).with_context(|| format!("{shown} has no readable InferenceService"));
        }
    }
    bail!("{shown} has no InferenceService: write one with spec.autoscale");
}

fn shown(setup: &Setup, trace: &Trace, objective: Option<f64>, outcome: Outcome) -> Replay {
    Replay {
        server: setup.profile.name,
        requests: outcome.requests,
        seconds: trace.seconds,
        objective_seconds: objective,
        attainment: objective.map(|_| outcome.attainment),
        time_to_first_token_p95_seconds: outcome.first_token_p95,
        accelerator_hours: outcome.accelerator_hours,
        accelerators_per_replica: setup.profile.accelerators,
        most_replicas: outcome
            .windows
            .iter()
            .map(|window| window.wanted)
            .max()
            .unwrap_or(setup.start),
        preemptions: outcome.preemptions,
        flaps: outcome.flaps(),
        changes: outcome
            .changes
            .into_iter()
            .map(|change| Change {
                at_seconds: change.at,
                from: change.before,
                to: change.after,
                why: change.why,
            })
            .collect(),
        minutes: outcome
            .windows
            .into_iter()
            .map(|window| Minute {
                at_seconds: window.at,
                requests: window.requests,
                // JSON has no infinity: a first token that never came is null, as is none.
                time_to_first_token_p95_seconds: window.first_token_p95.filter(|seconds| seconds.is_finite()),
                wanted: window.wanted,
                ready: window.ready,
            })
            .collect(),
    }
}

fn clock(seconds: f64) -> String {
    let minutes = (seconds / 60.0) as u64;
    format!("{:02}:{:02}:{:02}", minutes / 60, minutes % 60, seconds as u64 % 60)
}

fn text(replay: &Replay) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "{:>9} {:>9} {:>14} {:>7} {:>6}",
        "TIME", "REQUESTS", "FIRST TOKEN", "WANTED", "READY"
    );
    let every = replay.minutes.len().div_ceil(LINES).max(1);
    for minutes in replay.minutes.chunks(every) {
        let (Some(first), Some(last)) = (minutes.first(), minutes.last()) else {
            continue;
        };
        let slowest = minutes
            .iter()
            .filter_map(|minute| minute.time_to_first_token_p95_seconds)
            .reduce(f64::max);
        let slowest = slowest.map_or_else(|| "-".into(), |seconds| format!("{seconds:.3} s"));
        let requests: usize = minutes.iter().map(|minute| minute.requests).sum();
        let _ = writeln!(
            out,
            "{:>9} {requests:>9} {slowest:>14} {:>7} {:>6}",
            clock(first.at_seconds),
            last.wanted,
            last.ready
        );
    }
    let _ = writeln!(out);
    for change in &replay.changes {
        let _ = writeln!(
            out,
            "{} {} to {}: {}",
            clock(change.at_seconds),
            change.from,
            change.to,
            change.why
        );
    }
    let _ = writeln!(
        out,
        "\n{}: {} requests in {}; 95 % of the first tokens within {:.3} s; {:.2} accelerator-hours, {} replicas at most, {} changes, \
         {} of them taken back within 5 minutes",
        replay.server,
        replay.requests,
        clock(replay.seconds),
        replay.time_to_first_token_p95_seconds,
        replay.accelerator_hours,
        replay.most_replicas,
        replay.changes.len(),
        replay.flaps,
    );
    if let (Some(objective), Some(attainment)) = (replay.objective_seconds, replay.attainment) {
        let _ = writeln!(
            out,
            "timeToFirstTokenP95 {objective} s was kept in {:.1} % of the minutes",
            attainment * 100.0
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn replay(spec: &str, output: Format) -> Result<String> {
        let folder = tempfile::tempdir()?;
        let (manifest, trace) = (folder.path().join("isvc.yaml"), folder.path().join("trace.csv"));
        std::fs::write(
            &manifest,
            format!(
                "apiVersion: strata.dev/v1alpha1\nkind: InferenceService\nmetadata: {{ name: a }}\nspec: {{ model: {{ uri: \"pvc://m/a\" }}, {spec} }}\n"
            ),
        )?;
        let lines: String = (0..4000)
            .map(|index| format!("{},1000,200\n", f64::from(index) / 4.0))
            .collect();
        std::fs::write(&trace, format!("TIMESTAMP,ContextTokens,GeneratedTokens\n{lines}"))?;
        let service = read(&manifest)?;
        let autoscale = service.spec.autoscale.as_ref().context("autoscale")?;
        let settings = inference::settings(&service, autoscale).map_err(anyhow::Error::msg)?;
        let objective = settings.targets().time_to_first_token_p95_seconds;
        let setup = Setup {
            profile: H100_70B,
            cold_start_seconds: 60.0,
            router: fleet::Router::LeastLoad,
            start: 1,
            objective_seconds: objective.unwrap_or(f64::INFINITY),
        };
        let trace = Trace::read(&trace)?;
        let outcome = fleet::run(&setup, &trace, &mut Ours::new(settings));
        let shown = shown(&setup, &trace, objective, outcome);
        Ok(match output {
            Format::Text => text(&shown),
            Format::Json => serde_json::to_string(&shown)?,
        })
    }

    #[test]
    fn a_manifest_and_a_trace_give_a_table_and_a_summary_and_the_same_as_json() {
        let spec = "autoscale: { maxReplicas: 4, targets: { timeToFirstTokenP95: 1s } }";
        let text = replay(spec, Format::Text).unwrap();
        assert!(text.contains("4000 requests in 00:16:40"), "{text}");
        assert!(
            text.contains("timeToFirstTokenP95 1 s was kept in 100.0 % of the minutes"),
            "{text}"
        );
        let json: serde_json::Value = serde_json::from_str(&replay(spec, Format::Json).unwrap()).unwrap();
        assert_eq!((&json["requests"], &json["attainment"]), (&4000.into(), &1.0.into()));
        assert_eq!(json["minutes"].as_array().map(Vec::len), Some(16));
    }

    #[test]
    fn a_manifest_that_the_server_would_refuse_is_not_replayed() {
        let spec = "autoscale: { minReplicas: 3, maxReplicas: 2, targets: { timeToFirstTokenP95: 1s } }";
        let error = replay(spec, Format::Text).unwrap_err().to_string();
        assert!(error.contains("strata lint"), "{error}");
    }
}
