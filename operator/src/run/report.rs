//! From a run's phase, after the server's answers, to what the status says.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use strata_api::{
    ArtifactStatus, AttemptFailure, AttemptOutcome, ConditionType, GateStatus, InputStatus, ProgressStatus, Reason,
    RunInfo, RunStatus,
};
use strata_contract::{Input, Progress, Report};

use super::attempt::{self, State};
use super::check::is_published;
use super::conditions::{Finding, merge, reason, whole_seconds};
use super::phase::{Ledger, Phase, phase};
use super::{Order, Runs};
use crate::engine::kind::{Observed, Refusal, Status};
use crate::placement;

/// How often a running attempt is asked for its progress.
pub const PROGRESS_PERIOD: Duration = Duration::from_secs(30);
/// When a queued attempt is looked at again of which Kueue has said nothing.
const FIRST_WORDS: Duration = Duration::from_secs(2);
/// Earlier artifacts that a status remembers, so that a digest can pin them.
const KEPT_ARTIFACTS: usize = 10;

/// What there is to say about a run; [`Judged::finish`] makes it a status.
#[derive(Debug)]
pub struct Judged {
    /// The status but for its conditions, which are those of before.
    pub status: RunStatus,
    /// The conditions.
    pub findings: Vec<Finding>,
    /// When to look again if nothing happens.
    pub requeue: Option<Duration>,
}

impl Judged {
    /// The status, with `more` conditions after the run's and before `Ready`.
    pub fn finish(&self, more: &[Finding], now: Timestamp) -> RunStatus {
        let findings: Vec<Finding> = self.findings.iter().chain(more).cloned().collect();
        let mut status = self.status.clone();
        status.conditions = merge(&findings, &status.conditions, status.observed_generation, now);
        status
    }
}

/// What there is to say about the run of `resource`.
pub fn judge<T: Runs>(resource: &T, checked: Result<&Order, &Refusal>, observed: &Observed, now: Timestamp) -> Judged {
    let before = resource
        .status()
        .map(|status| status.run_status().clone())
        .unwrap_or_default();
    let mut status = before.clone();
    status.observed_generation = resource.meta().generation;
    let order = match checked {
        Ok(order) => order,
        Err(refusal) => return goes_on(resource, refusal, status, observed, now),
    };
    let ledger = Ledger::read(&order.run_id, order.generation, &before, observed, now);
    let phase = phase(order, &ledger, &before, observed, now);

    // What runs has its place, also if it would have none now.
    status.placement = match (&order.expected, resource.hardware()) {
        (Some(_), _) if phase == Phase::Published => before.placement.clone().or_else(|| order.expected.clone()),
        (Some(expected), _) => Some(expected.clone()),
        (None, Some(_)) => before.placement.clone(),
        (None, None) => None,
    };
    let is_running = matches!(phase, Phase::Active(State::Running(_)));
    status.progress = progress(&ledger, observed, &before).filter(|_| is_running);
    // What is published needs no Job any more: that one is gone says nothing.
    if ledger.attempt > 0 && phase != Phase::Published {
        let mut run = run_info(&order.run_id, &ledger, &before);
        match phase {
            Phase::Repin => run.failure = Some(repin(order, &ledger, now)),
            Phase::Withdraw => run.failure = Some(withdrawn(order, &ledger, now)),
            _ => {}
        }
        status.run = Some(run);
    }
    let is_new_run = status.run.as_ref().map(|run| &run.id) != before.run.as_ref().map(|run| &run.id);
    match (&phase, &ledger.report) {
        (Phase::Publishing(report), _) => publish(&mut status, &order.run_id, &order.inputs, report),
        (_, Some(report)) => status.gates = gates(report),
        (_, None) if is_new_run => status.gates = Vec::new(),
        _ => {}
    }
    let (why, message) = match (&phase, &observed.refused.run) {
        (Phase::Published | Phase::Publishing(_), _) | (_, None) => succeeded(order, &phase, &ledger, &before),
        (_, Some(refused)) => refused.clone(),
    };
    let inputs = match order.inputs.len() {
        0 => "the spec names only plain URIs".to_owned(),
        count => format!("{count} of {count} published"),
    };
    Judged {
        status,
        findings: [
            Some(Finding::new(
                ConditionType::Accepted,
                Reason::SpecAccepted,
                format!("run {}", order.run_id),
            )),
            resource.hardware().map(|_| placed(order, &phase)),
            Some(Finding::new(ConditionType::InputsReady, Reason::InputsResolved, inputs)),
            Some(Finding::new(ConditionType::Succeeded, why, message)),
        ]
        .into_iter()
        .flatten()
        .collect(),
        requeue: requeue(&phase, now),
    }
}

/// What is refused starts nothing; but the attempt under way goes on with the inputs that it began with, and how it ends
/// is not lost.
fn goes_on<T: Runs>(resource: &T, refusal: &Refusal, before: RunStatus, observed: &Observed, now: Timestamp) -> Judged {
    let mut status = before.clone();
    status.progress = None;
    let (mut running, mut requeue) = (None, None);
    if let Some(run) = before.run.as_ref().filter(|run| !is_published(&before, &run.id)) {
        let generation = before.observed_generation.unwrap_or(0);
        let ledger = Ledger::read(&run.id, generation, &before, observed, now);
        status.run = Some(run_info(&run.id, &ledger, &before));
        match (&ledger.state, &ledger.report) {
            (Some(State::Published(report)), _) => {
                publish(&mut status, &run.id, &[], report);
                // The status now knows the inputs, and may be found good with them.
                requeue = Some(Duration::from_secs(1));
            }
            (Some(State::Running(message)), _) => {
                status.progress = progress(&ledger, observed, &before);
                running = Some(message.clone());
                requeue = Some(PROGRESS_PERIOD);
            }
            (_, Some(report)) => status.gates = gates(report),
            _ => {}
        }
    }
    Judged {
        status,
        findings: refused(resource, refusal, running, observed),
        requeue,
    }
}

/// Whether there is a place for the run, or for what it has become.
fn placed(order: &Order, phase: &Phase) -> Finding {
    let has = |message: &str| Finding::new(ConditionType::Placed, Reason::Fits, message);
    match (phase, &order.placement) {
        (Phase::Published | Phase::Publishing(_), _) => has("the run is done"),
        (Phase::Active(State::Running(_)), _) => has("the run has its node"),
        (_, Some(placement)) => placement.finding(),
        (_, None) => has("the attempt under way keeps its place"),
    }
}

/// What is said where nothing is run.
pub fn refused<T: Runs>(resource: &T, refusal: &Refusal, running: Option<String>, observed: &Observed) -> Vec<Finding> {
    use ConditionType::{Accepted, InputsReady, Placed, Succeeded};
    let blocked = |kind: ConditionType, by: &str| Finding::new(kind, Reason::Blocked, format!("see condition {by}"));
    let succeeded = |by: &str| match running.clone() {
        Some(message) => Finding::new(Succeeded, Reason::Running, message),
        None => blocked(Succeeded, by),
    };
    let hardware = resource.hardware();
    let found = match refusal {
        Refusal::Spec(reason, message) => vec![
            Finding::new(Accepted, *reason, message.clone()),
            blocked(Placed, "Accepted"),
            blocked(InputsReady, "Accepted"),
            succeeded("Accepted"),
        ],
        Refusal::Placement(misfit) => vec![
            Finding::new(Accepted, Reason::SpecAccepted, "the spec can be carried out"),
            misfit.finding(),
            blocked(InputsReady, "Placed"),
            succeeded("Placed"),
        ],
        Refusal::Inputs(reason, message) => vec![
            Finding::new(Accepted, Reason::SpecAccepted, "the spec can be carried out"),
            match &running {
                Some(_) => Finding::new(Placed, Reason::Fits, "the run has its node"),
                None => match placement::of_run(resource, observed) {
                    Ok(Some(preflight)) => preflight.placement.finding(),
                    Ok(None) => blocked(Placed, "Accepted"),
                    Err(misfit) => misfit.finding(),
                },
            },
            Finding::new(InputsReady, *reason, message.clone()),
            succeeded("InputsReady"),
        ],
    };
    let is_asked = |finding: &Finding| finding.kind != Placed || hardware.is_some();
    found.into_iter().filter(is_asked).collect()
}

/// Written before the Job is gone: the next attempt then takes the operator's image.
fn repin(order: &Order, ledger: &Ledger, now: Timestamp) -> AttemptFailure {
    AttemptFailure {
        attempt: ledger.attempt,
        reason: Reason::ImagePullFailed.name().into(),
        message: cannot_be_pulled(order, ledger),
        outcome: AttemptOutcome::Interrupted,
        time: whole_seconds(now),
        generation: Some(order.generation),
    }
}

fn cannot_be_pulled(order: &Order, ledger: &Ledger) -> String {
    // A container's own image is in the run's id: then it is the shim's that has changed.
    match &order.container {
        Some(_) => format!(
            "the image of the shim cannot be pulled; the next attempt takes {}",
            order.shim_image
        ),
        None => format!(
            "{} cannot be pulled; the next attempt takes {}",
            ledger.image, order.image
        ),
    }
}

/// Written before the Job is gone: it was not lost, and the next attempt follows when it may.
fn withdrawn(order: &Order, ledger: &Ledger, now: Timestamp) -> AttemptFailure {
    AttemptFailure {
        attempt: ledger.attempt,
        reason: Reason::Interrupted.name().into(),
        message: "it was taken back from its queue".into(),
        outcome: AttemptOutcome::Interrupted,
        time: whole_seconds(now),
        generation: Some(order.generation),
    }
}

fn run_info(run_id: &str, ledger: &Ledger, before: &RunStatus) -> RunInfo {
    let known = before.run.as_ref().filter(|run| run.id == run_id);
    let report = match &ledger.state {
        Some(State::Published(report)) => Some(report),
        _ => ledger.report.as_ref(),
    };
    RunInfo {
        id: run_id.to_owned(),
        attempt: ledger.attempt,
        failures: ledger.failures,
        interruptions: Some(ledger.interruptions).filter(|count| *count > 0),
        image: ledger.image.clone(),
        accelerator: ledger.accelerator.clone(),
        job: ledger
            .job
            .as_ref()
            .map(ResourceExt::name_any)
            .or_else(|| known.and_then(|run| run.job.clone())),
        resumed_from_step: report
            .and_then(|report| report.resumed_from_step)
            .and_then(|step| i64::try_from(step).ok())
            .or_else(|| known.and_then(|run| run.resumed_from_step)),
        failure: ledger.failure.clone().map(|failure| AttemptFailure {
            time: whole_seconds(failure.time.0),
            ..failure
        }),
    }
}

fn publish(status: &mut RunStatus, run_id: &str, handed_in: &[Input], report: &Report) {
    let Some(artifact) = &report.artifact else { return };
    let published = ArtifactStatus {
        uri: artifact.uri.to_string(),
        digest: artifact.digest.clone(),
        bytes: i64::try_from(artifact.bytes).unwrap_or(i64::MAX),
        run_id: run_id.to_owned(),
    };
    replace_artifact(status, published);
    // A report that had to be shortened has no inputs, or not their resources: then they are what was handed in.
    let resource_of = |name: &str| handed_in.iter().find(|input| input.name == name)?.resource.clone();
    let read = report.inputs.iter().map(|input| Input {
        resource: input.resource.clone().or_else(|| resource_of(&input.name)),
        ..input.clone()
    });
    status.inputs = match report.inputs.is_empty() {
        true => handed_in.iter().map(input).collect(),
        false => read.map(|read| input(&read)).collect(),
    };
    let finite = report.metrics.iter().filter(|(_, value)| value.is_finite());
    status.metrics = finite.map(|(name, value)| (name.clone(), value.to_string())).collect();
    status.gates = gates(report);
}

/// Puts `artifact` in the place of the one before, which is remembered.
pub fn replace_artifact(status: &mut RunStatus, artifact: ArtifactStatus) {
    let digest = artifact.digest.clone();
    let previous = status.artifact.replace(artifact);
    status.previous_artifacts.splice(..0, previous);
    status.previous_artifacts.retain(|previous| previous.digest != digest);
    status.previous_artifacts.truncate(KEPT_ARTIFACTS);
}

/// An input as a status says it.
pub fn input(input: &Input) -> InputStatus {
    InputStatus {
        name: input.name.clone(),
        uri: input.uri.to_string(),
        digest: input.digest.clone(),
        resource: input
            .resource
            .as_ref()
            .map(|resource| format!("{}/{}", resource.kind, resource.name)),
    }
}

fn gates(report: &Report) -> Vec<GateStatus> {
    let gate = |gate: &strata_contract::GateResult| GateStatus {
        metric: gate.metric.clone(),
        value: gate.value.map(|value| value.to_string()),
        passed: gate.passed,
    };
    report.gates.iter().map(gate).collect()
}

fn progress(ledger: &Ledger, observed: &Observed, before: &RunStatus) -> Option<ProgressStatus> {
    let pod = ledger.job.as_ref().and_then(|job| attempt::pod_of(job, &observed.pods));
    let known = pod.and_then(|pod| observed.progress.get(pod.metadata.uid.as_deref()?));
    // A stage that has just started knows no total yet.
    match known.filter(|progress| progress.total > 0) {
        Some(progress) => Some(progress_status(progress)),
        None => before
            .progress
            .clone()
            .filter(|_| before.run.as_ref().is_some_and(|run| run.attempt == ledger.attempt)),
    }
}

fn progress_status(progress: &Progress) -> ProgressStatus {
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let percent = match progress.total {
        0 => 0,
        total => u128::from(progress.done) * 100 / u128::from(total),
    };
    ProgressStatus {
        activity: progress.activity.clone(),
        done: number(progress.done),
        total: number(progress.total),
        unit: progress.unit.clone(),
        percent: i32::try_from(percent.min(100)).unwrap_or(100),
    }
}

fn succeeded(order: &Order, phase: &Phase, ledger: &Ledger, before: &RunStatus) -> (Reason, String) {
    match phase {
        Phase::Published => (Reason::Published, published_before(before)),
        Phase::Publishing(report) => (Reason::Published, attempt::quote(&report.message)),
        Phase::Superseding => {
            let message = "the pods of an earlier run or attempt are stopping; they save their work first";
            (Reason::Pending, message.into())
        }
        Phase::Suspended => (Reason::Suspended, "spec.suspend is true; what was saved is kept".into()),
        Phase::Withdraw if order.suspend => {
            let message = "spec.suspend is true; the attempt is taken back from its queue, and what was saved is kept";
            (Reason::Suspended, message.into())
        }
        Phase::Withdraw => {
            let message = "the attempt is taken back from its queue; the next one goes where spec.scheduler says";
            (Reason::Pending, message.into())
        }
        Phase::Start { attempt, .. } => (Reason::Pending, format!("attempt {attempt} is about to start")),
        Phase::Active(State::Waiting(reason, message)) => (*reason, message.clone()),
        Phase::Active(State::Running(message)) => (Reason::Running, message.clone()),
        Phase::Active(State::Published(_) | State::Failed(..)) => (Reason::Pending, "the attempt has ended".into()),
        Phase::Repin => {
            let message = format!("{}; starting again", cannot_be_pulled(order, ledger));
            (Reason::ImagePullFailed, message)
        }
        Phase::Backoff { failure, .. } if failure.outcome == AttemptOutcome::Interrupted => {
            let message = format!(
                "attempt {} was interrupted: {}; the next one goes on",
                failure.attempt, failure.message
            );
            (Reason::Interrupted, message)
        }
        Phase::Backoff { failure, until } => {
            let message = format!(
                "attempt {} failed ({}): {}; failure {} of {} that are allowed, next attempt at {}",
                failure.attempt,
                failure.reason,
                failure.message,
                ledger.failures,
                order.retries,
                whole_seconds(*until).0
            );
            (Reason::Retrying, message)
        }
        Phase::Failed(failure) => {
            let why = reason(&failure.reason).unwrap_or(Reason::Internal);
            let last = match failure.outcome {
                AttemptOutcome::Fatal => "another would end the same way",
                _ => "no attempt of spec.retries is left; a change of the spec, such as more of them, gives new ones",
            };
            let message = format!(
                "attempt {} failed: {} ({last}). {}",
                failure.attempt,
                failure.message,
                why.meaning()
            );
            (why, message)
        }
    }
}

/// The words that were found when the artifact was published; they are not computed twice.
fn published_before(before: &RunStatus) -> String {
    let succeeded = before.conditions.iter().find(|condition| {
        condition.type_ == ConditionType::Succeeded.name() && condition.reason == Reason::Published.name()
    });
    match (succeeded, &before.artifact) {
        (Some(condition), _) => condition.message.clone(),
        (None, Some(artifact)) => format!("published {}", artifact.digest),
        (None, None) => String::new(),
    }
}

fn requeue(phase: &Phase, now: Timestamp) -> Option<Duration> {
    match phase {
        // What holds it in a queue is said by an object that is not watched; its first words come within seconds.
        Phase::Active(State::Waiting(Reason::Queued, words)) if words.ends_with(attempt::NOT_SEEN) => Some(FIRST_WORDS),
        Phase::Active(State::Running(_) | State::Waiting(Reason::Queued | Reason::Preempted, _)) => {
            Some(PROGRESS_PERIOD)
        }
        Phase::Backoff { until, .. } => {
            let wait = Duration::try_from(until.duration_since(now)).unwrap_or(Duration::ZERO);
            Some(wait.max(Duration::from_millis(100)))
        }
        _ => None,
    }
}
