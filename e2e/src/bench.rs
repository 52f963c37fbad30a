//! How the operator does with many resources: `make bench-operator`.
//!
//! On a bed of its own with nodes that kwok plays, first as many plain Jobs as resources (Kubernetes' own Job controller,
//! beside which we are measured), then the resources: copies of the samples. All Jobs end well a few seconds after they
//! began, with a report as the runtime image leaves it.

mod count;
mod world;

use std::fmt::Write as _;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::json;
use strata_contract::{ArtifactRef, CONTRACT_VERSION, FailureReason, Report};

use crate::bed::Bed;
use crate::bed::command::say;
use crate::bed::slot::Slot;
use crate::engines::Engines;
use crate::fleet::{self, Fleet};
use crate::{audit, install, operator, wait};
use count::Counter;
use world::World;

/// How long a pod of a Job runs.
const RUN_SECONDS: u32 = 5;
/// Longest time for one step with 10,000 resources.
const DEADLINE: Duration = Duration::from_secs(3600);
/// How long nobody may have written before things count as steady: what a service's pods say is written once more up to 40 s
/// after they came.
const QUIET: Duration = Duration::from_secs(45);
/// How long steady state is watched.
const STEADY: Duration = Duration::from_secs(60);
/// How long a restarted operator is watched: serving pods are asked for the first times again.
const FIRST_ROUNDS: Duration = Duration::from_secs(30);
/// Between two looks.
const PAUSE: Duration = Duration::from_millis(500);

/// How much of everything.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Resources, a quarter of each kind.
    pub resources: usize,
    /// Nodes.
    pub nodes: usize,
}

/// Runs it all; the last line of the answer is JSON.
///
/// # Errors
/// What did not work.
pub async fn run(slot: Slot, size: Size) -> Result<String> {
    let bed = Bed::new(slot);
    bed.down()?;
    bed.up().await?;
    let result = on(&bed, size).await;
    match &result {
        Ok(_) => bed.down()?,
        Err(_) => say(format_args!("the bed in slot {slot} stays up for a look")),
    }
    result
}

async fn on(bed: &Bed, size: Size) -> Result<String> {
    say(format_args!(
        "{} resources on {} nodes; load average {}",
        size.resources,
        size.nodes,
        load_average()
    ));
    let client = bed.client().await?;
    install::operator(bed, &[])?;
    let _engines = Engines::start(bed.slot(), 0).await?;
    let mut fleet = Fleet::start(bed, RUN_SECONDS, &report()?)?;
    fleet::add_nodes(&client, size.nodes).await?;
    fleet.check()?;
    let world = World::create(&client, size.resources).await?;
    say(format_args!("{} nodes are ready and the inputs published", size.nodes));

    let all = world.resources();
    let jobs = jobs(&client, &world).await?;
    let resources = resources(&client, &world).await?;
    let mut watcher = Watched::default();
    until_steady(bed, &client, all, &mut watcher).await?;

    let since = audit::mark(bed)?;
    let end = Instant::now() + STEADY;
    while Instant::now() < end {
        watcher.look(&client).await?;
        tokio::time::sleep(PAUSE).await;
    }
    let writes = writes(bed, since)?;
    say(format_args!(
        "{} writes in {} s of steady state{}",
        writes.len(),
        STEADY.as_secs(),
        first_of(&writes)
    ));
    let own_work = own_work(&client).await?;

    let since = audit::mark(bed)?;
    let restart = restart(&client, all, &mut watcher).await?;
    tokio::time::sleep(FIRST_ROUNDS).await;
    let after = self::writes(bed, since)?;
    ensure!(
        after.is_empty(),
        "the restart wrote {} times{}",
        after.len(),
        first_of(&after)
    );
    fleet.check()?;

    let per_minute = writes.len() as f64 * 60.0 / STEADY.as_secs_f64();
    let mut text = String::new();
    writeln!(text, "load average at the end {}", load_average())?;
    write!(
        text,
        "{}",
        json!({
            "resources_per_second": round(resources),
            "vs_job_controller": round(resources / jobs),
            "reconcile_p99_ms": round(own_work * 1000.0),
            "rss_mib": round(watcher.resident_bytes / f64::from(1 << 20)),
            "steady_writes_per_minute": round(per_minute),
            "restart_to_steady_seconds": round(restart.as_secs_f64()),
        })
    )?;
    Ok(text)
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

fn load_average() -> String {
    std::fs::read_to_string("/proc/loadavg")
        .unwrap_or_else(|_| "unknown".into())
        .trim()
        .to_owned()
}

/// What a stage leaves that has published.
fn report() -> Result<String> {
    let mut report = Report::failed(FailureReason::Internal, "made it".into());
    report.failure = None;
    report.contract_version = CONTRACT_VERSION;
    report.artifact = Some(ArtifactRef {
        uri: "pvc://artifacts/out".parse().map_err(anyhow::Error::msg)?,
        digest: format!("sha256:{}", "5".repeat(64)),
        bytes: 1 << 20,
    });
    for (metric, value) in [("documentsKept", 500.0), ("bitsPerByte", 2.5), ("alignmentTax", 0.01)] {
        report.metrics.insert(metric.into(), value);
    }
    Ok(report.to_termination_message())
}

/// Jobs a second to their pod, by Kubernetes' own controller.
async fn jobs(client: &Client, world: &World) -> Result<f64> {
    let count = world.resources();
    let pods = Counter::<Pod>::start(client, "bench=jobs");
    let started = Instant::now();
    world.create_jobs(count).await?;
    let created = started.elapsed();
    let all = pods.until(count, DEADLINE).await?;
    let rate = count as f64 / all.duration_since(started).as_secs_f64();
    say(format_args!(
        "Job controller: {count} Jobs created in {:.1} s, the last has its pod after {:.1} s: {rate:.0} a second",
        created.as_secs_f64(),
        all.duration_since(started).as_secs_f64()
    ));
    // What is under way would disturb what follows.
    let jobs = Api::<Job>::namespaced(client.clone(), world::JOBS);
    wait::poll("the Jobs are complete", DEADLINE, || async {
        let left = ListParams::default().fields("status.successful=0").limit(1);
        let left = jobs.list_metadata(&left).await?;
        Ok(left.items.is_empty().then_some(()))
    })
    .await?;
    Ok(rate)
}

/// Resources a second to their first child, by Strata.
async fn resources(client: &Client, world: &World) -> Result<f64> {
    let jobs = Counter::<Job>::start(client, "strata.dev/kind,strata.dev/attempt=1");
    let before = jobs.settled().await?;
    let started = Instant::now();
    let count = world.create_resources().await?;
    let created = started.elapsed();
    let all = jobs.until(before + count, DEADLINE).await?;
    let rate = count as f64 / all.duration_since(started).as_secs_f64();
    say(format_args!(
        "Strata: {count} resources created in {:.1} s, the last has its Job after {:.1} s: {rate:.0} a second",
        created.as_secs_f64(),
        all.duration_since(started).as_secs_f64()
    ));
    Ok(rate)
}

/// What was seen of the operator's pods over time.
#[derive(Default)]
struct Watched {
    /// The most that one of them held.
    resident_bytes: f64,
}

/// What the leader says of itself.
struct Look {
    /// Resources that are as they should be.
    ready: f64,
    /// Resources that it has looked at.
    known: f64,
    /// Resources that it is to look at.
    queued: f64,
    /// Reconciles so far.
    reconciles: f64,
}

impl Watched {
    /// The leader's figures; `None` while there is no leader.
    async fn look(&mut self, client: &Client) -> Result<Option<Look>> {
        let mut leader = None;
        // A pod that is just starting or ending does not answer.
        for (_, text) in operator::metrics(client).await.unwrap_or_default() {
            let sum = |name: &str| operator::series(&text, name).sum::<f64>();
            self.resident_bytes = self.resident_bytes.max(sum("process_resident_memory_bytes"));
            if sum("strata_operator_leader") > 0.0 {
                let ready = text
                    .lines()
                    .filter(|line| line.starts_with("strata_resources{") && line.contains("ready=\"True\""));
                leader = Some(Look {
                    ready: ready
                        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
                        .sum(),
                    known: sum("strata_resources"),
                    queued: sum("strata_operator_queued"),
                    reconciles: sum("strata_operator_reconciles_total"),
                });
            }
        }
        Ok(leader)
    }
}

/// Waits until every resource is ready and nothing is left to do.
async fn until_steady(bed: &Bed, client: &Client, resources: usize, watched: &mut Watched) -> Result<()> {
    let started = Instant::now();
    let mut said = Instant::now();
    let mut quiet = (audit::mark(bed)?, Instant::now());
    loop {
        ensure!(
            started.elapsed() < DEADLINE,
            "not steady after {} s",
            DEADLINE.as_secs()
        );
        let look = watched.look(client).await?;
        if !writes(bed, quiet.0)?.is_empty() {
            quiet = (audit::mark(bed)?, Instant::now());
        }
        if let Some(look) = look {
            if said.elapsed() > Duration::from_secs(10) {
                said = Instant::now();
                say(format_args!(
                    "{} of {resources} ready after {} s, {} reconciles",
                    look.ready,
                    started.elapsed().as_secs(),
                    look.reconciles
                ));
            }
            if look.ready >= resources as f64 && look.queued == 0.0 && quiet.1.elapsed() > QUIET {
                say(format_args!("steady after {} s", started.elapsed().as_secs()));
                return Ok(());
            }
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Ends all operator pods, and waits until the new leader has looked at every resource and has nothing to do.
async fn restart(client: &Client, resources: usize, watched: &mut Watched) -> Result<Duration> {
    let pods = Api::<Pod>::namespaced(client.clone(), install::NAMESPACE);
    let before: Vec<String> = operator::pods(client).await?.iter().map(|pod| pod.name_any()).collect();
    let started = Instant::now();
    for name in &before {
        pods.delete(name, &DeleteParams::default()).await?;
    }
    while started.elapsed() < DEADLINE {
        let look = watched.look(client).await?;
        let left = operator::pods(client)
            .await?
            .iter()
            .any(|pod| before.contains(&pod.name_any()));
        if let Some(look) = look.filter(|_| !left)
            && look.known >= resources as f64
            && look.queued == 0.0
        {
            ensure!(
                look.ready >= resources as f64,
                "only {} are ready after the restart",
                look.ready
            );
            say(format_args!(
                "steady {:.1} s after the restart",
                started.elapsed().as_secs_f64()
            ));
            return Ok(started.elapsed());
        }
        tokio::time::sleep(PAUSE / 5).await;
    }
    bail!("not steady {} s after the restart", DEADLINE.as_secs())
}

/// What the operator wrote since, but for its Lease.
fn writes(bed: &Bed, since: audit::Mark) -> Result<Vec<audit::Write>> {
    let mut all = audit::writes(bed, install::USER, since)?;
    all.retain(|write| write.resource != "leases");
    Ok(all)
}

/// Some of what was written, for whoever asks why.
fn first_of(writes: &[audit::Write]) -> String {
    let one = |write: &audit::Write| {
        let audit::Write {
            verb,
            resource,
            namespace,
            name,
            ..
        } = write;
        format!("{verb} {resource} {namespace}/{name}")
    };
    let some: Vec<String> = writes.iter().take(3).map(one).collect();
    match some.is_empty() {
        true => String::new(),
        false => format!(", so {}", some.join("; ")),
    }
}

/// 99th percentile of a reconcile's own work in seconds, from the leader's histogram: within a bucket, as Prometheus does.
async fn own_work(client: &Client) -> Result<f64> {
    let mut buckets = std::collections::BTreeMap::<u64, f64>::new();
    for (_, text) in operator::metrics(client).await? {
        for line in text.lines() {
            let Some(rest) = line.strip_prefix("strata_operator_own_work_seconds_bucket{") else {
                continue;
            };
            let bound = rest
                .split("le=\"")
                .nth(1)
                .and_then(|rest| rest.split('"').next())
                .context("a bound")?;
            let bound: f64 = if bound == "+Inf" { f64::INFINITY } else { bound.parse()? };
            let count: f64 = line.rsplit(' ').next().context("a count")?.parse()?;
            // Positive floats are in the order of their bits.
            *buckets.entry(bound.to_bits()).or_default() += count;
        }
    }
    let buckets: Vec<(f64, f64)> = buckets
        .into_iter()
        .map(|(bound, count)| (f64::from_bits(bound), count))
        .collect();
    quantile(&buckets, 0.99).context("the operator has reconciled nothing")
}

/// The quantile of a histogram with cumulated counts.
fn quantile(buckets: &[(f64, f64)], wanted: f64) -> Option<f64> {
    let total = buckets.last()?.1;
    let rank = total * wanted;
    let at = buckets.iter().position(|(_, count)| *count >= rank && total > 0.0)?;
    let (low, below) = at.checked_sub(1).map_or((0.0, 0.0), |before| buckets[before]);
    let (high, count) = buckets[at];
    match high.is_finite() {
        true => Some(low + (high - low) * (rank - below) / (count - below)),
        false => Some(low),
    }
}

#[cfg(test)]
mod tests {
    use super::quantile;

    #[test]
    fn a_quantile_lies_within_its_bucket() {
        let buckets = [(0.001, 50.0), (0.002, 98.0), (0.01, 100.0), (f64::INFINITY, 100.0)];
        let close = |is: Option<f64>, wanted: f64| is.is_some_and(|is| (is - wanted).abs() < 1e-9);
        assert!(close(quantile(&buckets, 0.5), 0.001));
        assert!(close(quantile(&buckets, 0.74), 0.0015));
        assert!(close(quantile(&buckets, 0.99), 0.006));
        assert_eq!(quantile(&[(1.0, 0.0), (f64::INFINITY, 0.0)], 0.99), None);
        assert!(
            close(quantile(&[(1.0, 0.0), (f64::INFINITY, 5.0)], 0.99), 1.0),
            "beyond the last bound"
        );
    }
}
