//! How many pods are wanted where their number follows what they say, and what there is to say about it. Pure: what the
//! pods said comes from the scraper, the number from [`crate::autoscale::policy`].

use std::collections::BTreeMap;

use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use serde_json::{Map, Number, Value};
use strata_api::{Autoscale, InferenceService, InferenceServiceStatus, Reason};
use strata_contract::SERVE_PORT;

use super::phase::{is_ready, serving_pods};
use super::scaling::{answers, names};
use crate::autoscale::demand::{Learned, Measured};
use crate::autoscale::metrics::Figure;
use crate::autoscale::policy::{Cause, Decision, Memory, decide};
use crate::autoscale::scrape::{Questions, Round, Target};
use crate::autoscale::settings::{Settings, Targets};
use crate::autoscale::{Fleet, Load, Replica};
use crate::engine::apply::FIELD_MANAGER;
use crate::engine::ask;
use crate::engine::kind::Observed;
use crate::workload::quantity;

/// How long another writer's number is followed after it wrote: two writers that each correct the other would start and stop
/// pods for ever.
pub const FOLLOWED: SignedDuration = SignedDuration::from_mins(5);
/// Resources that count as accelerators, by how their names begin.
const ACCELERATORS: [&str; 7] = [
    "nvidia.com/gpu",
    "nvidia.com/mig-",
    "amd.com/gpu",
    "google.com/tpu",
    "gpu.intel.com/",
    "habana.ai/gaudi",
    "aws.amazon.com/neuron",
];

/// What is wanted, and why.
#[derive(Clone, Debug, PartialEq)]
pub struct Scaled {
    /// Fewest pods that may be.
    pub min: i32,
    /// Pods that are wanted of the server.
    pub replicas: i32,
    /// What led to it.
    pub decision: Decision,
    /// The round of questions that it rests on.
    pub round: u64,
    /// How the pods answer; none before they were asked.
    pub metrics: Option<(Reason, String)>,
    /// Who else sets the number, and is followed for now.
    pub writer: Option<Writer>,
}

/// Someone else who sets the replicas of the Deployment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Writer {
    /// Its name as a field manager.
    pub name: String,
    /// Since when it is followed.
    pub at: Timestamp,
    /// What it wrote, within the bounds.
    pub replicas: i32,
}

/// The pods to ask for their metrics; none where nothing scales by itself.
pub fn questions(service: &InferenceService, pods: &[Pod]) -> Option<Questions> {
    service.spec.autoscale.as_ref()?;
    let pods = serving_pods(pods);
    if service.spec.common.suspend == Some(true) || pods.is_empty() {
        return None;
    }
    let target = |pod: &&Pod| {
        let host = ask::host(pod.status.as_ref()?.pod_ip.as_deref()?);
        let container = pod.spec.as_ref()?.containers.first()?;
        let port = container.ports.iter().flatten().next();
        let port = port.map_or(i32::from(SERVE_PORT), |port| port.container_port);
        // What this very pod speaks: one from before a change may speak the other.
        let probe = container
            .readiness_probe
            .as_ref()
            .and_then(|probe| probe.http_get.as_ref());
        let scheme = match probe.and_then(|probe| probe.scheme.as_deref()) {
            Some("HTTPS") => "https",
            _ => "http",
        };
        Some(Target {
            pod: pod.name_any(),
            uid: pod.uid()?,
            base: format!("{scheme}://{host}:{port}"),
        })
    };
    Some(Questions {
        model: service.name_any(),
        targets: pods.iter().filter(|pod| is_ready(pod)).filter_map(target).collect(),
    })
}

/// What is wanted now.
///
/// # Errors
/// Settings that cannot be kept, in words for the user.
pub fn scaled(service: &InferenceService, autoscale: &Autoscale, observed: &Observed) -> Result<Scaled, String> {
    let settings = settings(service, autoscale)?;
    let min = autoscale.min_replicas.unwrap_or(1).max(1);
    let deployment = observed.deployment.as_ref();
    let before = observed.scaling.as_ref().and_then(|scaling| scaling.decided.clone());
    let memory = match &before {
        Some((_, decision)) => decision.memory.clone(),
        None => restored(service.status.as_ref(), deployment, min),
    };
    let nobody = Round::default();
    let (round, now) = match &observed.scaling {
        Some(scaling) => (&scaling.round, scaling.now),
        None => (&nobody, Timestamp::UNIX_EPOCH),
    };
    let needed = needed(autoscale);
    let (fleet, missing) = fleet(&serving_pods(&observed.pods), round, &needed);
    let decision = match before {
        Some((number, decision)) if number == round.number => decision,
        // Before anybody was asked, everything stays.
        _ if round.number == 0 => held(memory),
        _ => decide(&settings, &memory, &fleet, now.as_second()),
    };
    let (least, most) = (
        i32::try_from(settings.min()).unwrap_or(i32::MAX),
        i32::try_from(settings.most()).unwrap_or(i32::MAX),
    );
    let wanted = i32::try_from(decision.replicas).unwrap_or(i32::MAX).clamp(least, most);
    let writer = followed(deployment, service.status.as_ref(), (least, most), now).filter(|one| one.replicas != wanted);
    Ok(Scaled {
        min,
        replicas: writer.as_ref().map_or(wanted, |writer| writer.replicas),
        metrics: (round.number > 0).then(|| answers(&fleet, round, &missing)),
        round: round.number,
        decision,
        writer,
    })
}

fn held(memory: Memory) -> Decision {
    let replicas = memory.replicas.unwrap_or(0);
    Decision {
        replicas,
        before: replicas,
        cause: Cause::MetricsMissing,
        message: "no pod was asked yet".into(),
        memory,
        measured: Measured::default(),
    }
}

/// What the policy is told to keep.
///
/// # Errors
/// Settings that cannot be kept, in words for the user.
pub fn settings(service: &InferenceService, autoscale: &Autoscale) -> Result<Settings, String> {
    let count = |number: i32| u32::try_from(number).unwrap_or(0);
    let latency = |field: &str, latency: &Option<strata_api::Latency>| match latency {
        None => Ok(None),
        Some(latency) => match latency.seconds() {
            Some(seconds) => Ok(Some(seconds)),
            None => Err(format!(
                "spec.autoscale.targets.{field} must be a time such as 500ms; got {}",
                latency.0
            )),
        },
    };
    let length = |field: &str, duration: &Option<strata_api::Duration>| match duration {
        None => Ok(None),
        Some(duration) => match duration.seconds().and_then(|seconds| i64::try_from(seconds).ok()) {
            Some(seconds) => Ok(Some(seconds)),
            None => Err(format!(
                "spec.autoscale.{field} must be a time such as 5m; got {}",
                duration.0
            )),
        },
    };
    let aims = &autoscale.targets;
    let targets = Targets {
        kv_cache_utilization: aims
            .kv_cache_utilization_percent
            .map(|percent| f64::from(percent) / 100.0),
        waiting_requests: aims.waiting_requests.map(f64::from),
        time_to_first_token_p95_seconds: latency("timeToFirstTokenP95", &aims.time_to_first_token_p95)?,
        inter_token_latency_p95_seconds: latency("interTokenLatencyP95", &aims.inter_token_latency_p95)?,
    };
    let budget = match autoscale.max_accelerators {
        None => None,
        Some(most) => match accelerators(service) {
            0 => {
                return Err(
                    "spec.autoscale.maxAccelerators counts the accelerators of spec.hardware, or in the limits of \
                     spec.pod.resources, and there are none: leave it out, or set them"
                        .into(),
                );
            }
            per_pod => Some((count(most), per_pod)),
        },
    };
    let min = count(autoscale.min_replicas.unwrap_or(1));
    let mut settings = Settings::new(min, count(autoscale.max_replicas), budget, targets)
        .map_err(|error| format!("spec.autoscale: {error}"))?;
    if let Some(seconds) = length("scaleDownWindow", &autoscale.scale_down_window)? {
        settings = settings.with_window(seconds);
    }
    if let Some(seconds) = length("coldStart", &autoscale.cold_start)? {
        settings = settings.with_cold_start(seconds as f64);
    }
    Ok(settings)
}

/// Accelerators that one pod holds.
fn accelerators(service: &InferenceService) -> u32 {
    let pod = service.spec.common.pod.as_ref();
    let limits = pod.and_then(|pod| pod.resources.as_ref()?.limits.as_ref());
    let hardware = service.spec.common.hardware.as_ref();
    let asked = hardware.filter(|hardware| hardware.accelerator.as_deref().is_some_and(|name| name != "cpu"));
    if let Some(hardware) = asked {
        return hardware.accelerators_per_node.unwrap_or(1).unsigned_abs();
    }
    let counted = limits
        .into_iter()
        .flatten()
        .filter(|(name, _)| ACCELERATORS.iter().any(|known| name.starts_with(known)))
        .filter_map(|(_, quantity)| quantity::parse(&quantity.0));
    counted.sum::<f64>() as u32
}

/// What was decided before this process began, as far as the status and the Deployment tell.
fn restored(status: Option<&InferenceServiceStatus>, deployment: Option<&Deployment>, min: i32) -> Memory {
    let known = status.and_then(|status| status.autoscale.as_ref());
    let there = deployment
        .and_then(|deployment| deployment.spec.as_ref()?.replicas)
        .filter(|replicas| *replicas > 0);
    let replicas = there.or(known.map(|known| known.desired_replicas)).unwrap_or(min);
    let changed = known.and_then(|known| known.changed.as_ref());
    Memory {
        replicas: u32::try_from(replicas).ok(),
        changed_at: changed.map(|changed| changed.0.as_second()),
        learned: known.map(|known| learned(&known.learned)).unwrap_or_default(),
        ..Memory::default()
    }
}

/// The figures that the targets need, with the field that needs each.
fn needed(autoscale: &Autoscale) -> Vec<(Figure, &'static str)> {
    let aims = &autoscale.targets;
    [
        (
            aims.kv_cache_utilization_percent.is_some(),
            Figure::KvCacheUtilization,
            "kvCacheUtilizationPercent",
        ),
        (aims.waiting_requests.is_some(), Figure::Waiting, "waitingRequests"),
        (
            aims.time_to_first_token_p95.is_some(),
            Figure::TimeToFirstToken,
            "timeToFirstTokenP95",
        ),
        (
            aims.inter_token_latency_p95.is_some(),
            Figure::InterTokenLatency,
            "interTokenLatencyP95",
        ),
    ]
    .into_iter()
    .filter_map(|(is_aimed_at, figure, field)| is_aimed_at.then_some((figure, field)))
    .collect()
}

/// The pods as the policy sees them, and the targets that some answering pod has no figure for.
fn fleet(pods: &[&Pod], round: &Round, needed: &[(Figure, &'static str)]) -> (Fleet, BTreeMap<Figure, &'static str>) {
    let mut missing = BTreeMap::new();
    let is_there = |pod: &&&Pod| {
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        pod.metadata.deletion_timestamp.is_none() && !matches!(phase, Some("Failed" | "Succeeded"))
    };
    let replica = |pod: &&Pod| {
        let replica = match round.pods.get(&pod.name_any()).filter(|_| is_ready(pod)) {
            None => Replica::Starting,
            Some(Err(why)) => Replica::Silent(why.to_string()),
            Some(Ok(load)) => {
                let absent: Vec<_> = needed.iter().filter(|(figure, _)| !says(load, *figure)).collect();
                missing.extend(absent.iter().copied().copied());
                match absent.len() == needed.len() {
                    true => Replica::Silent(format!("it shows none of {}", names(absent.iter().map(|one| one.0)))),
                    false => Replica::Answering(load.clone()),
                }
            }
        };
        (pod.name_any(), replica)
    };
    let fleet = pods.iter().filter(is_there).map(replica).collect();
    (fleet, missing)
}

/// Whether a pod says this. A histogram needs two answers.
fn says(load: &Load, figure: Figure) -> bool {
    let is_first = load.window_seconds <= 0.0;
    match figure {
        Figure::KvCacheUtilization => load.kv_cache_utilization.is_some(),
        Figure::Waiting => load.waiting.is_some(),
        Figure::TimeToFirstToken => is_first || load.time_to_first_token.is_some(),
        Figure::InterTokenLatency => is_first || load.inter_token_latency.is_some(),
        _ => true,
    }
}

/// Who else set the replicas of the Deployment, and is still followed. What is written through `/scale` has no time in the
/// managed fields: then it counts from when the status first told.
fn followed(
    deployment: Option<&Deployment>,
    status: Option<&InferenceServiceStatus>,
    (least, most): (i32, i32),
    now: Timestamp,
) -> Option<Writer> {
    let told = status
        .and_then(|status| status.autoscale.as_ref())
        .filter(|told| told.reason == Reason::AnotherWriter.name());
    let since = told
        .and_then(|told| told.changed.as_ref())
        .map_or(now, |changed| changed.0);
    let owner = deployment.and_then(another_writer);
    let writer = match (owner, told) {
        (None, None) => return None,
        // Caches have no managed fields, and what was over the bounds was corrected.
        (None, Some(told)) => Writer {
            name: told.message.split_whitespace().next().unwrap_or_default().to_owned(),
            at: since,
            replicas: told.desired_replicas,
        },
        (Some((name, at, replicas)), told) => {
            let replicas = replicas.clamp(least, most);
            let is_told = told.is_some_and(|told| told.desired_replicas == replicas);
            let at = if is_told { since } else { at.unwrap_or(now) };
            Writer { name, at, replicas }
        }
    };
    Some(writer).filter(|writer| now.duration_since(writer.at) < FOLLOWED)
}

/// Who else owns the replicas of the Deployment: its name, when it wrote if that is known, and the number.
fn another_writer(deployment: &Deployment) -> Option<(String, Option<Timestamp>, i32)> {
    let replicas = deployment.spec.as_ref()?.replicas?;
    let entries = deployment.metadata.managed_fields.iter().flatten();
    let mut others = entries.filter(|entry| {
        let fields = entry.fields_v1.as_ref().map(|fields| &fields.0);
        let sets = fields.and_then(|fields| fields.pointer("/f:spec/f:replicas")).is_some();
        sets && entry.manager.as_deref() != Some(FIELD_MANAGER)
    });
    let other = others.next()?;
    let name = other.manager.clone().unwrap_or_default();
    Some((name, other.time.as_ref().map(|time| time.0), replicas))
}

/// What was learned before; what does not read is learned again.
fn learned(texts: &BTreeMap<String, String>) -> Learned {
    let numbers: Map<String, Value> = texts
        .iter()
        .filter_map(|(name, text)| Some((name.clone(), Number::from_f64(text.parse().ok()?)?.into())))
        .collect();
    serde_json::from_value(numbers.into()).unwrap_or_default()
}
