//! Conditions: each with a reason that decides its status, and `Ready` as the conjunction of the others.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use strata_api::{ConditionType, Reason, Verdict};

/// Longest message of a condition, in characters.
const MESSAGE_CHARS: usize = 1500;

/// One condition before it is merged with the one of before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Which condition.
    pub kind: ConditionType,
    /// Why it has its status.
    pub reason: Reason,
    /// For a person.
    pub message: String,
}

impl Finding {
    /// A condition of `kind`; its status is its reason's verdict.
    pub fn new(kind: ConditionType, reason: Reason, message: impl Into<String>) -> Self {
        Self {
            kind,
            reason,
            message: message.into(),
        }
    }
}

/// The conditions with `Ready` last: the first that needs a person gives it its reason, else the first that does not
/// hold, else the last.
///
/// A condition whose status is as before keeps its transition time, so that equal findings give equal conditions.
pub fn merge(findings: &[Finding], before: &[Condition], generation: Option<i64>, now: Timestamp) -> Vec<Condition> {
    let first = |verdict: Verdict| findings.iter().find(|finding| finding.reason.verdict() == verdict);
    let decisive = first(Verdict::False)
        .or_else(|| first(Verdict::Unknown))
        .or(findings.last());
    let ready = decisive.map(|finding| Finding::new(ConditionType::Ready, finding.reason, finding.message.clone()));
    findings
        .iter()
        .chain(&ready)
        .map(|finding| {
            let status = match finding.reason.verdict() {
                Verdict::True => "True",
                Verdict::Unknown => "Unknown",
                Verdict::False => "False",
            };
            let same = |condition: &&Condition| condition.type_ == finding.kind.name() && condition.status == status;
            Condition {
                type_: finding.kind.name().into(),
                status: status.into(),
                reason: finding.reason.name().into(),
                message: finding.message.chars().take(MESSAGE_CHARS).collect(),
                observed_generation: generation,
                last_transition_time: before.iter().find(same).map_or_else(
                    || whole_seconds(now),
                    |condition| condition.last_transition_time.clone(),
                ),
            }
        })
        .collect()
}

/// The reason with this name.
pub fn reason(name: &str) -> Option<Reason> {
    Reason::ALL.iter().copied().find(|reason| reason.name() == name)
}

/// The server keeps times to the second; what is compared with its answer must not hold more.
pub fn whole_seconds(time: Timestamp) -> Time {
    Time(Timestamp::from_second(time.as_second()).unwrap_or(Timestamp::UNIX_EPOCH))
}
