//! Where a run stands.
//!
//! ```text
//!                      ┌───────────── published before (status.artifact is of this run id) ──────────────┐
//!                      │                                                                                  ▼
//!   Order ──▶ other runs' Jobs active? ──yes──▶ Superseding ──gone──▶ Start(1) ──▶ Active ──report──▶ Published
//!                      │ no                                            ▲  ▲         │ │ ▲
//!                      └───────────────────────────────────────────────┘  │  suspend│ │ │resume
//!                                                                         │         ▼ │ │
//!                                                Backoff ◀──failed, again─┼── end ◀───┘ Suspended
//!                                                   └──────pause over─────┘    │
//!                                                                              └──not again──▶ Failed
//! ```
//!
//! What is known comes from two places: `status.run`, which remembers what was already judged (so that nothing is
//! judged anew when a pod or a Job is collected later), and the Jobs, which know what happened since. An attempt's
//! Job is kept until the status has its end.

use std::time::Duration;

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use strata_api::{AttemptFailure, AttemptOutcome, Reason, RunStatus};
use strata_contract::Report;

use super::attempt::{self, State};
use super::check::is_published;
use super::{Order, label};
use crate::engine::kind::Observed;
use crate::workload::container::SHIM_CONTAINER;
use crate::workload::labels;

/// Pause after the first failure; it doubles with each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(10);
/// Longest pause after a failure.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);
/// Longest pause after an interruption, which costs no retry.
const LONGEST_INTERRUPTION_PAUSE: Duration = Duration::from_secs(60);
/// An attempt that was interrupted after less than this has hardly got on.
const SHORT_ATTEMPT: SignedDuration = SignedDuration::from_mins(5);
/// Interruptions in a row of short attempts; from the next one on they count as failures, or they could go on for ever.
const FREE_INTERRUPTIONS: i32 = 20;

/// Where a run stands.
#[derive(Clone, Debug, PartialEq)]
pub enum Phase {
    /// The status already has the artifact of this run.
    Published,
    /// The current attempt has just published; the status does not have it yet.
    Publishing(Box<Report>),
    /// A Job of another run, or of an attempt that was given up, is still there.
    Superseding,
    /// The user stopped it.
    Suspended,
    /// Attempt `attempt` is to start.
    Start {
        /// Its number.
        attempt: i32,
        /// Its image.
        image: String,
    },
    /// The current attempt waits or runs.
    Active(State),
    /// An image of the run cannot be pulled, and the operator has another one by now.
    Repin,
    /// The attempt is in a queue where it is not to be: the user stopped it, or named another queue before it began.
    Withdraw,
    /// The next attempt starts at `until`.
    Backoff {
        /// When.
        until: Timestamp,
        /// How the last attempt ended.
        failure: AttemptFailure,
    },
    /// There is no further attempt.
    Failed(AttemptFailure),
}

/// What is known of a run's attempts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ledger {
    /// Number of the last attempt; 0 before the first.
    pub attempt: i32,
    /// Attempts that count as failed, since the spec last changed.
    pub failures: i32,
    /// Short attempts in a row that were interrupted.
    pub interruptions: i32,
    /// Image of the run; empty before the first attempt.
    pub image: String,
    /// Accelerator that the image is for; absent: none was asked for.
    pub accelerator: Option<String>,
    /// Job of the last attempt, if it is still there.
    pub job: Option<Job>,
    /// How the last attempt ended without a result.
    pub failure: Option<AttemptFailure>,
    /// How the last attempt goes, if that is not an end without a result.
    pub state: Option<State>,
    /// What the last attempt reported when it ended without a result.
    pub report: Option<Box<Report>>,
}

impl Ledger {
    /// Reads the attempts of the run `run_id` from the status and the Jobs; `generation` is the spec's.
    pub fn read(run_id: &str, generation: i64, status: &RunStatus, observed: &Observed, now: Timestamp) -> Self {
        let mut ledger = Self::default();
        if let Some(run) = status.run.as_ref().filter(|run| run.id == run_id) {
            ledger.attempt = run.attempt;
            ledger.failures = run.failures;
            ledger.interruptions = run.interruptions.unwrap_or(0);
            ledger.image = run.image.clone();
            ledger.accelerator = run.accelerator.clone();
            ledger.failure = run.failure.clone();
        }
        let mut jobs: Vec<&Job> = observed
            .jobs
            .iter()
            .filter(|job| label(job, labels::RUN) == run_id)
            .collect();
        jobs.sort_by_key(|job| attempt::number(job));
        for job in jobs {
            ledger.observe(job, observed, now);
        }
        ledger.forgive(Some(generation));
        let judged = ledger
            .failure
            .as_ref()
            .is_some_and(|failure| failure.attempt == ledger.attempt);
        if ledger.attempt > 0 && ledger.state.is_none() && !judged {
            ledger.end(attempt::vanished(ledger.attempt, generation, now), None);
        }
        ledger
    }

    /// Whether `job` is the last attempt, and its end is not yet in the status.
    pub fn is_current(&self, job: &Job) -> bool {
        self.job
            .as_ref()
            .is_some_and(|current| current.metadata.uid == job.metadata.uid)
    }

    /// The budget is that of one generation of the spec: who raises a memory limit, or the budget itself, wants to see
    /// it tried. What was saved stays, as the run is the same.
    fn forgive(&mut self, generation: Option<i64>) {
        let spent = self.failure.as_ref().and_then(|failure| failure.generation);
        if spent.is_some() && generation > spent {
            self.failures = 0;
        }
    }

    /// Counts an attempt that gave no result, and lasted this long.
    fn end(&mut self, mut failure: AttemptFailure, lasted: Option<SignedDuration>) {
        self.forgive(failure.generation);
        if failure.outcome == AttemptOutcome::Interrupted {
            let is_short = lasted.is_none_or(|lasted| lasted < SHORT_ATTEMPT);
            self.interruptions = if is_short { self.interruptions + 1 } else { 0 };
            if self.interruptions > FREE_INTERRUPTIONS {
                failure.outcome = AttemptOutcome::Failed;
                failure.message = format!("{} ({} interruptions in a row)", failure.message, self.interruptions);
            }
        }
        self.failures += i32::from(failure.outcome != AttemptOutcome::Interrupted);
        self.failure = Some(failure);
    }

    fn observe(&mut self, job: &Job, observed: &Observed, now: Timestamp) {
        let number = attempt::number(job);
        let judged = self.failure.as_ref().is_some_and(|failure| failure.attempt >= number);
        if number < self.attempt || judged {
            return;
        }
        self.attempt = number;
        if let Some(image) = image(job) {
            self.image = image.to_owned();
            self.accelerator = accelerator(job);
        }
        self.state = None;
        self.report = None;
        match attempt::state(job, &observed.pods, now) {
            State::Failed(failure, report) => {
                let began = job.status.as_ref().and_then(|status| status.start_time.as_ref());
                let lasted = began.map(|began| failure.time.0.duration_since(began.0));
                self.end(failure, lasted);
                self.report = report;
            }
            state => self.state = Some(attempt::queued(job, observed).unwrap_or(state)),
        }
        self.job = Some(job.clone());
    }
}

fn image(job: &Job) -> Option<&str> {
    let template = &job.spec.as_ref()?.template;
    template.spec.as_ref()?.containers.first()?.image.as_deref()
}

/// Strata's image beside a container of the user's.
fn shim_image(job: &Job) -> Option<&str> {
    let template = &job.spec.as_ref()?.template;
    let all = template.spec.as_ref()?.init_containers.as_ref()?;
    let shim = all.iter().find(|container| container.name == SHIM_CONTAINER)?;
    shim.image.as_deref()
}

fn accelerator(job: &Job) -> Option<String> {
    let template = &job.spec.as_ref()?.template;
    let annotations = template.metadata.as_ref()?.annotations.as_ref()?;
    annotations.get(labels::ACCELERATOR).cloned()
}

/// Whether a Job still has or may get a pod.
fn is_active(job: &Job) -> bool {
    !attempt::finished(job) || job.metadata.deletion_timestamp.is_some()
}

/// Where the run that `order` asks for stands.
pub fn phase(order: &Order, ledger: &Ledger, status: &RunStatus, observed: &Observed, now: Timestamp) -> Phase {
    if is_published(status, &order.run_id) {
        return Phase::Published;
    }
    if let Some(State::Published(report)) = &ledger.state {
        return Phase::Publishing(report.clone());
    }
    if observed
        .jobs
        .iter()
        .any(|job| is_active(job) && !ledger.is_current(job))
    {
        return Phase::Superseding;
    }
    if let Some(state) = &ledger.state {
        let stuck = matches!(state, State::Waiting(Reason::ImagePullFailed, _));
        let job = ledger.job.as_ref();
        let queue = job.and_then(attempt::queue);
        let has_begun = !job.is_some_and(attempt::is_suspended);
        let of_another = job.and_then(shim_image).is_some_and(|image| image != order.shim_image);
        return match state {
            _ if queue.is_some() && order.suspend => Phase::Withdraw,
            _ if queue.is_some() && !has_begun && queue != order.queue.as_deref() => Phase::Withdraw,
            _ if order.suspend => Phase::Suspended,
            _ if stuck && (ledger.image != order.image || of_another) => Phase::Repin,
            state => Phase::Active(state.clone()),
        };
    }
    let Some(failure) = ledger.failure.clone() else {
        return match order.suspend {
            true => Phase::Suspended,
            false => Phase::Start {
                attempt: 1,
                image: order.image.clone(),
            },
        };
    };
    if failure.outcome == AttemptOutcome::Fatal || ledger.failures > order.retries {
        return Phase::Failed(failure);
    }
    if order.suspend {
        return Phase::Suspended;
    }
    let until = failure.time.0.saturating_add(pause(ledger)).unwrap_or(Timestamp::MAX);
    if now < until {
        return Phase::Backoff { until, failure };
    }
    let wanted = order.placement.as_ref().map(|placement| &placement.accelerator);
    let is_for_another = ledger.accelerator.as_ref() != wanted;
    let repin = failure.reason == Reason::ImagePullFailed.name() || ledger.image.is_empty() || is_for_another;
    Phase::Start {
        attempt: ledger.attempt + 1,
        image: if repin {
            order.image.clone()
        } else {
            ledger.image.clone()
        },
    }
}

/// The pause before the next attempt.
fn pause(ledger: &Ledger) -> SignedDuration {
    let interrupted = ledger
        .failure
        .as_ref()
        .is_some_and(|failure| failure.outcome == AttemptOutcome::Interrupted);
    let (first, times, longest) = match interrupted {
        true => (Duration::from_secs(1), ledger.interruptions, LONGEST_INTERRUPTION_PAUSE),
        false => (FIRST_PAUSE, ledger.failures, LONGEST_PAUSE),
    };
    let doublings = u32::try_from(times - 1).unwrap_or(0).min(16);
    let pause = (first * 2_u32.pow(doublings)).min(longest);
    SignedDuration::try_from(pause).unwrap_or(SignedDuration::MAX)
}
