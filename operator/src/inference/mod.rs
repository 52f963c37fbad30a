//! InferenceService: a model to an endpoint. A preparing run (stage `quantize`, see [`crate::run`]) makes the file
//! that is served; a Deployment serves what was published last, and a Service is its address.

mod beside;
mod check;
mod container;
mod phase;
mod plan;
mod report;
mod rollout;
mod scale;
mod scaling;
#[cfg(test)]
mod scaling_tests;
#[cfg(test)]
mod tests;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::jiff::Timestamp;
use strata_api::{InferenceService, InferenceServiceStatus};

use crate::autoscale::policy::Decision;
use crate::autoscale::scrape::Questions;
use crate::engine::kind::{Env, Kind, Observed, Outcome, Planned, Ref, Refusal, ResourceKind, Upstream};
use crate::run;

pub use check::{Checked, wants};
pub use scale::settings;
pub use scaling::observed;

impl Kind for InferenceService {
    const KIND: ResourceKind = ResourceKind::InferenceService;
    const SERVES: bool = true;
    type Checked = Checked;

    fn refs(&self) -> Vec<Ref> {
        let beside = beside::inputs(self);
        let beside = beside.iter().filter_map(run::InputRef::from);
        run::refs(self).into_iter().chain(beside).collect()
    }

    fn nodes(&self) -> u32 {
        1
    }

    fn upstream(&self) -> Upstream {
        run::upstream(self)
    }

    fn questions(&self, pods: &[Pod]) -> Option<Questions> {
        scale::questions(self, pods)
    }

    fn decided(checked: &Result<Checked, Refusal>) -> Option<(u64, &Decision)> {
        let scaled = checked.as_ref().ok()?.serving.scaled.as_ref()?;
        // Before anybody was asked, nothing was decided.
        (scaled.round > 0).then_some((scaled.round, &scaled.decision))
    }

    fn check(&self, observed: &Observed, env: &Env) -> Result<Checked, Refusal> {
        check::check(self, observed, env)
    }

    fn plan(&self, checked: &Result<Checked, Refusal>, observed: &Observed, now: Timestamp) -> Planned {
        plan::plan(self, checked.as_ref(), observed, now)
    }

    fn report(
        &self,
        checked: &Result<Checked, Refusal>,
        observed: &Observed,
        now: Timestamp,
    ) -> Outcome<InferenceServiceStatus> {
        report::report(self, checked.as_ref(), observed, now)
    }
}
