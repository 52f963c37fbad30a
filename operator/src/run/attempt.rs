//! One attempt: how its Job and its pod go, or how they ended.

use std::collections::BTreeMap;

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ContainerStateTerminated, ContainerStatus, Pod, PodCondition};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::ResourceExt;
use strata_api::{AttemptFailure, AttemptOutcome, Reason};
use strata_contract::{EXIT_BAD_INPUT, EXIT_DONE, EXIT_INTERRUPTED, Report};

use super::label;
use crate::engine::kind::Observed;
use crate::workload::labels;
use crate::workload::pod::CONTAINER;

/// Longest part of a foreign text that is quoted, in characters.
const QUOTE_CHARS: usize = 512;
/// How much later than promised a pod may stop before its node is taken for lost.
const STOP_TOLERANCE: SignedDuration = SignedDuration::from_secs(60);

/// What is said of a queued attempt before Kueue has said anything.
pub const NOT_SEEN: &str = "Kueue has not seen it yet";

/// How an attempt goes.
#[derive(Clone, Debug, PartialEq)]
pub enum State {
    /// Its pod is not running yet; why.
    Waiting(Reason, String),
    /// Its pod runs.
    Running(String),
    /// It published.
    Published(Box<Report>),
    /// It ended without a result; with the report, if there was one.
    Failed(AttemptFailure, Option<Box<Report>>),
}

/// Number of the attempt that a Job is.
pub fn number(job: &Job) -> i32 {
    label(job, labels::ATTEMPT).parse().unwrap_or(0)
}

/// Whether a Job has come to its end.
pub fn finished(job: &Job) -> bool {
    ended(job).is_some()
}

/// Generation of the spec that a Job was made from.
fn generation(job: &Job) -> Option<i64> {
    job.annotations().get(labels::GENERATION)?.parse().ok()
}

/// Whether a Job is stopped for now, by whomever.
pub fn is_suspended(job: &Job) -> bool {
    job.spec.as_ref().and_then(|spec| spec.suspend).unwrap_or(false)
}

/// The queue in which a Job waits, or waited, for Kueue.
pub fn queue(job: &Job) -> Option<&str> {
    Some(label(job, labels::QUEUE)).filter(|queue| !queue.is_empty())
}

/// What holds a Job that Kueue keeps in its queue.
pub fn queued(job: &Job, observed: &Observed) -> Option<State> {
    let queue = queue(job).filter(|_| is_suspended(job) && !finished(job))?;
    let said = job.metadata.uid.as_ref().and_then(|uid| observed.queue.get(uid));
    let (reason, why) = match said {
        Some(said) if said.is_evicted => (Reason::Preempted, said.message.as_str()),
        Some(said) => (Reason::Queued, said.message.as_str()),
        None => (Reason::Queued, NOT_SEEN),
    };
    Some(State::Waiting(reason, quote(&format!("in queue {queue}: {why}"))))
}

/// Number of the node, of several, that a pod is.
fn node(pod: &Pod) -> u32 {
    let index = pod.labels().get("batch.kubernetes.io/job-completion-index");
    index.and_then(|index| index.parse().ok()).unwrap_or(0)
}

/// The pods of a Job, one for each node, by its number: the last ones, as a resumed Job has several.
fn pods_of<'a>(job: &Job, pods: &'a [Pod]) -> BTreeMap<u32, &'a Pod> {
    let Some(uid) = job.metadata.uid.as_deref() else {
        return BTreeMap::new();
    };
    // A label can be put on any pod, and a report is believed: only the Job controller makes itself the owner.
    let of_job = |pod: &&Pod| pod.owner_references().iter().any(|owner| owner.uid == uid);
    let mut ours: Vec<&Pod> = pods.iter().filter(of_job).collect();
    ours.sort_by_key(|pod| pod.metadata.creation_timestamp.clone());
    ours.into_iter().map(|pod| (node(pod), pod)).collect()
}

/// The pod that speaks for a Job: that of node 0, which publishes. Of a Job that failed, the one that failed first by itself: the
/// others were only stopped.
pub fn pod_of<'a>(job: &Job, pods: &'a [Pod]) -> Option<&'a Pod> {
    let ours = pods_of(job, pods);
    let failed = || {
        let ends = ours.values().filter_map(|pod| Some((*pod, terminated(pod)?)));
        ends.filter(|(_, end)| end.exit_code != EXIT_DONE)
            .min_by_key(|(pod, end)| (pod.metadata.deletion_timestamp.is_some(), end.finished_at.clone()))
            .map(|(pod, _)| pod)
    };
    let has_failed = ours.len() > 1 && ended(job).is_some_and(|end| !end.complete);
    has_failed
        .then(failed)
        .flatten()
        .or_else(|| ours.values().next().copied())
}

/// How the attempt of `job` goes.
pub fn state(job: &Job, pods: &[Pod], now: Timestamp) -> State {
    let pod = pod_of(job, pods);
    let Some(end) = ended(job) else {
        return all_going(job, pods, now);
    };
    let container = pod.and_then(terminated);
    let report = container
        .and_then(|container| container.message.as_deref())
        .and_then(parse_report);
    if end.complete
        && let Some(report) = report.clone().filter(|report| report.artifact.is_some())
    {
        return State::Published(Box::new(report));
    }
    let (reason, outcome, message) = judge(&end, pod, container, report.as_ref());
    let failure = AttemptFailure {
        attempt: number(job),
        reason: reason.name().to_owned(),
        message: quote(&message),
        outcome,
        time: end.time,
        generation: generation(job),
    };
    State::Failed(failure, report.map(Box::new))
}

/// The attempt that vanished with its Job.
pub fn vanished(attempt: i32, generation: i64, now: Timestamp) -> AttemptFailure {
    AttemptFailure {
        attempt,
        reason: Reason::PodLost.name().into(),
        message: "the Job is gone without a report".into(),
        outcome: AttemptOutcome::Interrupted,
        time: Time(now),
        generation: Some(generation),
    }
}

struct End {
    complete: bool,
    deadline: bool,
    message: String,
    time: Time,
}

fn ended(job: &Job) -> Option<End> {
    let status = job.status.as_ref()?;
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let holds = |kind: &str| {
        conditions
            .iter()
            .find(|condition| condition.type_ == kind && condition.status == "True")
    };
    let (condition, complete) = holds("Complete")
        .map(|condition| (condition, true))
        .or_else(|| Some((holds("Failed")?, false)))?;
    let time = condition
        .last_transition_time
        .clone()
        .or_else(|| status.completion_time.clone())
        .unwrap_or(Time(Timestamp::UNIX_EPOCH));
    Some(End {
        complete,
        deadline: condition.reason.as_deref() == Some("DeadlineExceeded"),
        message: condition.message.clone().unwrap_or_default(),
        time,
    })
}

/// What the end of an attempt without a result means: a chain of rules, the first that applies.
fn judge(
    end: &End,
    pod: Option<&Pod>,
    container: Option<&ContainerStateTerminated>,
    report: Option<&Report>,
) -> (Reason, AttemptOutcome, String) {
    use AttemptOutcome::{Failed, Fatal, Interrupted};
    if end.deadline {
        return (Reason::DeadlineExceeded, Failed, end.message.clone());
    }
    let Some(pod) = pod else {
        return (
            Reason::PodLost,
            Interrupted,
            format!("the pod is gone without a report ({})", end.message),
        );
    };
    if let Some((reason, message)) = disruption(pod) {
        // A pod that outgrew what it asked for would be evicted again and again: that counts.
        let by_kubelet = reason == "TerminationByKubelet";
        let outgrew_request = message.contains("was using") && message.contains("request is");
        if by_kubelet && outgrew_request && message.contains("larger consumption of memory") {
            let message = format!("{message} Raise spec.pod.resources.requests.memory to what it needs");
            return (Reason::OutOfMemory, Failed, message);
        }
        let own_fault = by_kubelet && (outgrew_request || message.contains("limit"));
        return (Reason::PodLost, if own_fault { Failed } else { Interrupted }, message);
    }
    let Some(container) = container else {
        let why = pod
            .status
            .as_ref()
            .and_then(|status| status.message.clone())
            .unwrap_or_default();
        return (
            Reason::PodLost,
            Interrupted,
            format!("the pod ended without a status of its container {why}"),
        );
    };
    let words = |fallback: &str| match (report, container.message.as_deref().map(str::trim)) {
        (Some(report), _) => report.message.clone(),
        (None, Some(text)) if !text.is_empty() => format!("exit status {}: {text}", container.exit_code),
        _ => format!("exit status {}: {fallback}", container.exit_code),
    };
    let reported = || {
        report
            .and_then(|report| report.failure)
            .map_or(Reason::Internal, Reason::from)
    };
    if container.reason.as_deref() == Some("OOMKilled") {
        let message = "the container was killed at its memory limit: raise spec.pod.resources.limits.memory";
        return (Reason::OutOfMemory, Failed, message.into());
    }
    match container.exit_code {
        EXIT_INTERRUPTED => (
            Reason::Interrupted,
            Interrupted,
            words("interrupted; its work is saved"),
        ),
        _ if pod.metadata.deletion_timestamp.is_some() => (Reason::PodLost, Interrupted, words("the pod was deleted")),
        EXIT_BAD_INPUT => (
            reported(),
            Fatal,
            words("the stage refused its input and left no report"),
        ),
        EXIT_DONE => (
            Reason::Internal,
            Failed,
            words("the stage ended well but left no report of an artifact"),
        ),
        _ => (reported(), Failed, words("the stage left no report")),
    }
}

/// Reason and message of the pod's disruption, if it was one.
fn disruption(pod: &Pod) -> Option<(String, String)> {
    let status = pod.status.as_ref()?;
    let conditions = status.conditions.as_deref().unwrap_or_default();
    let condition = conditions
        .iter()
        .find(|condition| condition.type_ == "DisruptionTarget" && condition.status == "True")?;
    let message = condition
        .message
        .clone()
        .or_else(|| status.message.clone())
        .unwrap_or_default();
    Some((condition.reason.clone().unwrap_or_default(), message))
}

/// How a Job goes on all its nodes: it runs when every one does.
fn all_going(job: &Job, pods: &[Pod], now: Timestamp) -> State {
    let wanted = job.spec.as_ref().and_then(|spec| spec.completions).unwrap_or(1);
    let ours = pods_of(job, pods);
    let Some(pod) = ours.values().next().copied().filter(|_| wanted > 1) else {
        return going(job, ours.values().next().copied(), now);
    };
    for (node, pod) in &ours {
        if let State::Waiting(reason, message) = going(job, Some(pod), now) {
            return State::Waiting(reason, format!("node {node} of {wanted}: {message}"));
        }
    }
    if usize::try_from(wanted).is_ok_and(|wanted| ours.len() < wanted) {
        return State::Waiting(
            Reason::Pending,
            format!("{} of {wanted} nodes have their pod; the others follow", ours.len()),
        );
    }
    match going(job, Some(pod), now) {
        State::Running(_) => State::Running(format!("attempt {} is running on {wanted} nodes", number(job))),
        state => state,
    }
}

fn going(job: &Job, pod: Option<&Pod>, now: Timestamp) -> State {
    let Some(pod) = pod else {
        if is_suspended(job) {
            let wait = "the Job is suspended: it starts when whatever queues it (Kueue) lets it";
            return State::Waiting(Reason::Pending, wait.into());
        }
        let wait =
            "the Job's pod is not there yet; if this lasts, quota or PodSecurity may refuse it: see the Job's events";
        return State::Waiting(Reason::Pending, wait.into());
    };
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
    let node = node.unwrap_or("?");
    // The time in the mark is the one by which the pod should have stopped.
    let late = |by: &Time| now.duration_since(by.0) > STOP_TOLERANCE;
    if pod.metadata.deletion_timestamp.as_ref().is_some_and(late) {
        let name = pod.name_any();
        let wait = format!(
            "pod {name} does not stop, so node {node} may be lost, and two attempts must not run at once: if the node is \
             gone, delete the Node, or the pod with `kubectl delete pod {name} --force`; the next attempt then starts"
        );
        return State::Waiting(Reason::PodLost, wait);
    }
    match waiting(pod) {
        Some((reason, message)) => State::Waiting(reason, message),
        None => State::Running(format!("attempt {} is running on node {node}", number(job))),
    }
}

/// Since when no node fits a pod; `None`: it has one, or nobody has looked yet.
pub fn unplaced_since(pod: &Pod) -> Option<Timestamp> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    let unplaced = conditions.iter().find(|condition| says_unplaced(condition))?;
    Some(unplaced.last_transition_time.as_ref()?.0)
}

/// The condition that says so.
pub fn unplaced(pod: &mut Pod) -> Option<&mut PodCondition> {
    let conditions = pod.status.as_mut()?.conditions.as_mut()?;
    conditions.iter_mut().find(|condition| says_unplaced(condition))
}

fn says_unplaced(condition: &PodCondition) -> bool {
    condition.type_ == "PodScheduled" && condition.reason.as_deref() == Some("Unschedulable")
}

/// Why a pod does not run yet, in the words of the scheduler or the kubelet; `None` if it runs (or ran).
pub fn waiting(pod: &Pod) -> Option<(Reason, String)> {
    let status = pod.status.as_ref();
    if status
        .and_then(|status| status.phase.as_deref())
        .is_some_and(|phase| phase != "Pending")
    {
        return None;
    }
    let conditions = status
        .and_then(|status| status.conditions.as_deref())
        .unwrap_or_default();
    let unscheduled = conditions
        .iter()
        .find(|condition| condition.type_ == "PodScheduled" && condition.status == "False");
    if let Some(condition) = unscheduled {
        let message = condition.message.clone().unwrap_or_default();
        let no_claim = message.contains("persistentvolumeclaim \"") && message.contains("not found");
        let reason = if no_claim {
            Reason::ClaimNotFound
        } else {
            Reason::Pending
        };
        return Some((reason, quote(&message)));
    }
    // An init container that waits is why the other one does.
    let init = status
        .and_then(|status| status.init_container_statuses.as_deref())
        .unwrap_or_default();
    let held = init
        .iter()
        .find(|init| init.state.as_ref().is_some_and(|state| state.waiting.is_some()));
    let state = held
        .or(container(pod))
        .and_then(|container| container.state.as_ref()?.waiting.clone());
    let (word, message) = match state {
        Some(waiting) => (waiting.reason.unwrap_or_default(), waiting.message.unwrap_or_default()),
        None => ("Scheduled".into(), "the kubelet has not started it yet".into()),
    };
    const PULL_WORDS: [&str; 5] = [
        "ImagePullBackOff",
        "ErrImagePull",
        "InvalidImageName",
        "ErrImageNeverPull",
        "ImageInspectError",
    ];
    let reason = if PULL_WORDS.contains(&word.as_str()) {
        Reason::ImagePullFailed
    } else {
        Reason::Pending
    };
    // The kubelet's two words for one failing pull alternate; a condition that follows them would be rewritten for ever.
    let word = if reason == Reason::ImagePullFailed {
        "the image cannot be pulled"
    } else {
        &word
    };
    let image = match held {
        Some(init) => init.image.clone(),
        None => {
            let spec = pod.spec.as_ref();
            spec.and_then(|spec| spec.containers.first()?.image.clone())
                .unwrap_or_default()
        }
    };
    let detail = match reason {
        Reason::ImagePullFailed => image,
        _ => message,
    };
    let text = match detail.is_empty() {
        true => word.to_owned(),
        false => format!("{word}: {detail}"),
    };
    Some((reason, quote(&text)))
}

/// The status of the container that does the work.
pub fn container(pod: &Pod) -> Option<&ContainerStatus> {
    let statuses = pod.status.as_ref()?.container_statuses.as_deref()?;
    statuses.iter().find(|status| status.name == CONTAINER)
}

fn terminated(pod: &Pod) -> Option<&ContainerStateTerminated> {
    container(pod)?.state.as_ref()?.terminated.as_ref()
}

/// Whether a pod's container runs now, and may be asked for its progress.
pub fn is_running(pod: &Pod) -> bool {
    container(pod).is_some_and(|container| container.state.as_ref().is_some_and(|state| state.running.is_some()))
        && pod.metadata.deletion_timestamp.is_none()
}

fn parse_report(text: &str) -> Option<Report> {
    serde_json::from_str(text).ok()
}

/// A foreign text, cut to what a condition can carry, on one line.
pub fn quote(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.char_indices().nth(QUOTE_CHARS) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line,
    }
}
