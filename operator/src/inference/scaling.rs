//! What is said about scaling: two conditions, the figures, and the last changes.

use std::collections::BTreeMap;

use k8s_openapi::jiff::{SignedDuration, Timestamp};
use serde_json::Value;
use strata_api::{
    Autoscale, AutoscaleStatus, ConditionType, InferenceService, InferenceServiceStatus, Reason, ScalingEvent, Verdict,
};

use super::scale::{FOLLOWED, Scaled};
use crate::autoscale::demand::{Learned, Measured};
use crate::autoscale::metrics::Figure;
use crate::autoscale::policy::Cause;
use crate::autoscale::scrape::Round;
use crate::autoscale::{Fleet, Replica};
use crate::run::conditions::{Finding, reason, whole_seconds};

/// How often figures are written that lead to no change.
const FIGURES_PERIOD: SignedDuration = SignedDuration::from_secs(30);
/// Changes that a status remembers.
const KEPT_CHANGES: usize = 10;

/// The conditions of a service that scales by itself. A restart of the operator changes none of them.
pub fn findings(service: &InferenceService, scaled: &Scaled, autoscale: &Autoscale) -> [Finding; 2] {
    let before = |kind| as_before(service.status.as_ref(), kind);
    let (metrics, effective) = match &scaled.metrics {
        Some(metrics) => (metrics.clone(), effective(scaled, autoscale)),
        None => (
            before(ConditionType::MetricsAvailable)
                .unwrap_or((Reason::MetricsPending, "no ready pod was asked yet".into())),
            before(ConditionType::ScalingEffective).unwrap_or_else(|| effective(scaled, autoscale)),
        ),
    };
    [
        Finding::new(ConditionType::MetricsAvailable, metrics.0, metrics.1),
        Finding::new(ConditionType::ScalingEffective, effective.0, effective.1),
    ]
}

/// How the pods answer, for condition MetricsAvailable. Its words change only with what they say.
pub fn answers(fleet: &Fleet, round: &Round, missing: &BTreeMap<Figure, &'static str>) -> (Reason, String) {
    let ready = fleet.values().filter(|replica| **replica != Replica::Starting).count();
    let silent: Vec<(&String, &String)> = fleet
        .iter()
        .filter_map(|(pod, replica)| match replica {
            Replica::Silent(why) => Some((pod, why)),
            _ => None,
        })
        .collect();
    let is_other_model = |pod: &String| matches!(round.pods.get(pod), Some(Err(said)) if said.is_other_model());
    match silent.first() {
        _ if ready == 0 => (Reason::MetricsPending, "no ready pod was asked yet".into()),
        Some((pod, why)) if silent.len() < ready => {
            let message = format!("{} of {ready} ready pods are silent: {pod}: {why}", silent.len());
            (Reason::MetricsPartial, message)
        }
        Some((pod, why)) if silent.iter().all(|(pod, _)| is_other_model(pod)) => {
            (Reason::ModelNameWrong, format!("{pod}: {why}"))
        }
        // They answer, but with nothing that is aimed at.
        Some((pod, why)) if matches!(round.pods.get(*pod), Some(Ok(_))) => {
            (Reason::MetricMissing, format!("{pod}: {why}"))
        }
        Some((pod, why)) => (Reason::MetricsSilent, format!("{pod}: {why}")),
        None => match missing.iter().next() {
            None => (Reason::MetricsRead, "all ready pods are read".into()),
            Some((figure, field)) => (
                Reason::MetricMissing,
                format!(
                    "spec.autoscale.targets.{field} needs one of {}, and a pod has none",
                    names([*figure].into_iter())
                ),
            ),
        },
    }
}

/// The names of figures, for a message.
pub fn names(figures: impl Iterator<Item = Figure>) -> String {
    figures.flat_map(Figure::names).copied().collect::<Vec<_>>().join(", ")
}

/// Whether the number of pods is what scaling wants, for condition ScalingEffective.
fn effective(scaled: &Scaled, autoscale: &Autoscale) -> (Reason, String) {
    if let Some(writer) = &scaled.writer {
        let until = whole_seconds(writer.at + FOLLOWED).0;
        let message = format!(
            "{} set the Deployment's replicas to {}, and not this operator: it is followed until {until}",
            writer.name, writer.replicas
        );
        return (Reason::AnotherWriter, message);
    }
    match (&scaled.metrics, scaled.decision.cause) {
        (None, _) => (
            Reason::MetricsPending,
            "the number of pods stays until they are asked".into(),
        ),
        (Some((reason, _)), _) if reason.verdict() == Verdict::False => {
            (Reason::Blocked, "see condition MetricsAvailable".into())
        }
        (_, Cause::AtMaximum) => (
            Reason::AtMaximum,
            format!(
                "more than maxReplicas ({}) are needed; status.autoscale has the figures",
                autoscale.max_replicas
            ),
        ),
        (_, Cause::OverBudget) => (
            Reason::OverBudget,
            "more are needed than maxAccelerators allows; status.autoscale has the figures".into(),
        ),
        _ => (Reason::ScalingActive, "the number of pods follows the metrics".into()),
    }
}

/// The findings of before, where nothing new is known: a restart of the operator changes no condition.
fn as_before(status: Option<&InferenceServiceStatus>, kind: ConditionType) -> Option<(Reason, String)> {
    let conditions = &status?.run_status.conditions;
    let before = conditions.iter().find(|condition| condition.type_ == kind.name())?;
    Some((reason(&before.reason)?, before.message.clone()))
}

/// What the status says: figures are written seldom, changes at once.
pub fn status(
    scaled: &Scaled,
    before: Option<&InferenceServiceStatus>,
    now: Timestamp,
) -> (Option<AutoscaleStatus>, Vec<ScalingEvent>) {
    let known = before.and_then(|before| before.autoscale.as_ref());
    let mut history = before.map(|before| before.scaling_history.clone()).unwrap_or_default();
    // Nothing was measured yet; what is known stays.
    if scaled.round == 0
        && let Some(known) = known
    {
        return (Some(known.clone()), history);
    }
    let (cause, message) = match &scaled.writer {
        None => (scaled.decision.cause.name(), scaled.decision.message.clone()),
        Some(writer) => (Reason::AnotherWriter.name(), format!("{} wrote it", writer.name)),
    };
    let is_change = known.is_none_or(|known| known.desired_replicas != scaled.replicas);
    let mut next = AutoscaleStatus {
        desired_replicas: scaled.replicas,
        reason: cause.to_owned(),
        message: message.clone(),
        time: None,
        changed: known.and_then(|known| known.changed.clone()),
        observed: figures(&scaled.decision.measured),
        learned: written(&scaled.decision.memory.learned),
    };
    if is_change {
        if let Some(known) = known {
            history.insert(
                0,
                ScalingEvent {
                    time: whole_seconds(now),
                    from: known.desired_replicas,
                    to: scaled.replicas,
                    reason: cause.to_owned(),
                    message,
                },
            );
            history.truncate(KEPT_CHANGES);
            next.changed = Some(whole_seconds(now));
        }
        next.time = Some(whole_seconds(now));
        return (Some(next), history);
    }
    if let Some(known) = known {
        next.time = known.time.clone();
        // The first round after a restart knows no rates yet.
        let is_due = scaled.round > 1
            && known
                .time
                .as_ref()
                .is_none_or(|time| now.duration_since(time.0) >= FIGURES_PERIOD);
        if next == *known || !is_due {
            return (Some(known.clone()), history);
        }
    }
    next.time = Some(whole_seconds(now));
    (Some(next), history)
}

/// What the pods said, by name.
fn figures(measured: &Measured) -> BTreeMap<String, String> {
    observed(measured)
        .into_iter()
        .map(|(name, value)| (name.to_owned(), significant(value, 3)))
        .collect()
}

/// What the pods said, by name; what they did not say is not there.
pub fn observed(measured: &Measured) -> Vec<(&'static str, f64)> {
    let percent = |share: Option<f64>| share.map(|share| (share * 100.0).round());
    [
        ("answeringPods", Some(f64::from(measured.answering))),
        (
            "silentPods",
            Some(f64::from(measured.silent)).filter(|silent| *silent > 0.0),
        ),
        ("runningRequests", measured.running),
        ("waitingRequests", measured.waiting),
        ("kvCacheUtilizationPercent", percent(measured.kv_cache_utilization)),
        ("busyPercent", percent(measured.busy)),
        ("tokensPerSecond", measured.tokens_per_second),
        ("timeToFirstTokenP95Seconds", measured.time_to_first_token_p95),
        ("interTokenLatencyP95Seconds", measured.inter_token_latency_p95),
        ("neededReplicas", measured.need),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name, value?)))
    .collect()
}

/// A number as a text, to so many digits: further ones would only be news for their own sake.
fn significant(value: f64, digits: usize) -> String {
    let text = format!("{:.*e}", digits.saturating_sub(1), value);
    text.parse::<f64>().map_or(text, |value| value.to_string())
}

/// What was learned, as texts by name; [`learned`] reads it.
fn written(learned: &Learned) -> BTreeMap<String, String> {
    let value = serde_json::to_value(learned).unwrap_or(Value::Null);
    let numbers = value.as_object().into_iter().flatten();
    numbers
        .filter_map(|(name, value)| Some((name.clone(), significant(value.as_f64()?, 4))))
        .collect()
}
