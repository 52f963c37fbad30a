//! What every run shares, whatever its kind: one attempt = one Job, waiting for inputs, retries, reuse of a result.
//!
//! A kind says only how its spec becomes a stage's configuration and what its inputs are ([`Runs`]); the files here
//! are the same four as in a kind's folder:
//!
//! ```text
//! check.rs      spec + inputs → Order (run id, stage, output)       | Refusal
//! attempt.rs    Job + Pod → how an attempt goes or how it ended
//! phase.rs      Order + status.run + Jobs + Pods + now → Phase
//! plan.rs       Phase → Jobs to start, suspend, delete
//! report.rs     Phase → conditions and the rest of the status
//! ```

pub mod attempt;
pub mod check;
pub mod conditions;
pub mod fields;
pub mod phase;
pub mod plan;
pub mod report;
#[cfg(test)]
mod tests;

use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::jiff::Timestamp;
use kube::Resource;
use kube::core::object::HasStatus;
use strata_api::{Common, Hardware, RunStatus, StageContainer};
use strata_contract::{Input, Stage};

use crate::engine::cache::Cached;
use crate::engine::kind::{Env, Kind, Observed, Outcome, Planned, Ref, Refusal, ResourceKind, Status, Upstream};
use crate::placement::preflight::{ModelShape, Work};
use crate::workload::pod::Sizes;

pub use check::{InputRef, Order, Source};
pub use phase::Phase;

/// By what a run is carried out.
#[derive(Clone, Copy, Debug)]
pub enum Engine<'a> {
    /// Strata's own, by its name in the spec.
    Own(&'static str),
    /// The user's container.
    Container(&'a StageContainer),
}

impl<'a> Engine<'a> {
    /// The engine that a union's members say; without any, Strata's own.
    ///
    /// # Errors
    /// A sentence that says what to write instead.
    pub fn of<T>(name: &'static str, own: Option<&T>, container: Option<&'a StageContainer>) -> Result<Self, String> {
        match (own, container) {
            (_, None) => Ok(Self::Own(name)),
            (None, Some(container)) => Ok(Self::Container(container)),
            (Some(_), Some(_)) => Err(format!("spec.engine: exactly one of {name}, container must be set")),
        }
    }
}

/// How a spec becomes a run.
pub trait Runs: Resource<DynamicType = ()> + HasStatus<Status: Status> {
    /// Which kind.
    const RUN_KIND: ResourceKind;
    /// What the stage's container asks for.
    const SIZES: Sizes;

    /// The fields that all kinds share.
    fn common(&self) -> &Common;

    /// By what the run is carried out.
    ///
    /// # Errors
    /// A sentence that says what to write instead.
    fn engine(&self) -> Result<Engine<'_>, String>;

    /// What the run computes on.
    fn hardware(&self) -> Option<&Hardware> {
        self.common().hardware.as_ref()
    }

    /// What there is to compute, as far as it is known.
    fn work(&self, observed: &Observed) -> Work {
        let _ = observed;
        Work::Other
    }

    /// Of a Dataset: size of the vocabulary that it trains.
    fn vocab_size(&self) -> Option<u32> {
        None
    }

    /// Of a PretrainJob: the shape of its model, but for the vocabulary.
    fn shape(&self) -> Option<ModelShape> {
        None
    }

    /// What the run reads from others, in the order in which [`Runs::stage`] gets it.
    fn inputs(&self) -> Vec<InputRef>;

    /// The stage's configuration, given the resolved inputs.
    ///
    /// # Errors
    /// A sentence that says what to write instead.
    fn stage(&self, inputs: &[Input]) -> Result<Stage, String>;

    /// Judges what the inputs are, beyond that they are there.
    ///
    /// # Errors
    /// A sentence that says which input does not fit and what would.
    fn fits(&self, observed: &Observed) -> Result<(), String> {
        let _ = observed;
        Ok(())
    }

    /// Of a Dataset: what its records are and whether it makes token files.
    fn dataset(&self) -> Option<(strata_contract::Task, bool)> {
        None
    }
}

/// What `resource` shows to those that refer to it.
pub fn upstream<T: Runs>(resource: &T) -> Upstream {
    let status = resource.status().map(Status::run_status);
    let ready = status.and_then(|status| status.conditions.iter().find(|condition| condition.type_ == "Ready"));
    Upstream {
        artifact: status.and_then(|status| status.artifact.clone()),
        previous: status
            .map(|status| status.previous_artifacts.clone())
            .unwrap_or_default(),
        not_ready: ready
            .filter(|ready| ready.status != "True")
            .map(|ready| (ready.reason.clone(), ready.message.clone())),
        refs: refs(resource),
        dataset: resource.dataset(),
        vocab_size: resource.vocab_size(),
        shape: resource.shape(),
    }
}

/// What `resource` refers to.
pub fn refs<T: Runs>(resource: &T) -> Vec<Ref> {
    resource.inputs().iter().filter_map(InputRef::from).collect()
}

/// A kind that is nothing but its run.
pub trait RunKind: Runs {}

impl<T> Kind for T
where
    T: RunKind
        + Cached
        + HasStatus<Status = RunStatus>
        + Resource<DynamicType = (), Scope = k8s_openapi::NamespaceResourceScope>
        + Clone
        + std::fmt::Debug
        + serde::Serialize
        + serde::de::DeserializeOwned
        + Send
        + Sync
        + 'static,
{
    const KIND: ResourceKind = T::RUN_KIND;
    const SERVES: bool = false;
    type Checked = Order;

    fn refs(&self) -> Vec<Ref> {
        refs(self)
    }

    fn nodes(&self) -> u32 {
        let hardware = self.hardware();
        hardware.map_or(1, |hardware| match (&hardware.topology, hardware.node_count) {
            // How many hosts a slice has is known with its nodes.
            (Some(_), None) => u32::MAX,
            (_, count) => count.unwrap_or(1).unsigned_abs(),
        })
    }

    fn upstream(&self) -> Upstream {
        upstream(self)
    }

    fn check(&self, observed: &Observed, env: &Env) -> Result<Order, Refusal> {
        check::check(self, observed, env)
    }

    fn plan(&self, checked: &Result<Order, Refusal>, observed: &Observed, now: Timestamp) -> Planned {
        plan::plan(self, checked.as_ref(), observed, now)
    }

    fn report(&self, checked: &Result<Order, Refusal>, observed: &Observed, now: Timestamp) -> Outcome<RunStatus> {
        let judged = report::judge(self, checked.as_ref(), observed, now);
        Outcome {
            status: judged.finish(&[], now),
            requeue: judged.requeue,
        }
    }
}

/// Label of a Job's, or the empty text.
pub(crate) fn label<'a>(job: &'a Job, key: &str) -> &'a str {
    job.metadata
        .labels
        .as_ref()
        .and_then(|labels| labels.get(key))
        .map_or("", String::as_str)
}
