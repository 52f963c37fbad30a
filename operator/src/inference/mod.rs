//! InferenceService: a model to an endpoint. A preparing run (stage `quantize`, see [`crate::run`]) makes the file
//! that is served; a Deployment serves what was published last, and a Service is its address.

mod check;
mod phase;
mod plan;
mod report;
#[cfg(test)]
mod tests;

use k8s_openapi::jiff::Timestamp;
use strata_api::{InferenceService, InferenceServiceStatus};

use crate::engine::kind::{Env, Kind, Observed, Outcome, Planned, Ref, Refusal, ResourceKind, Upstream};
use crate::run;

pub use check::Checked;

impl Kind for InferenceService {
    const KIND: ResourceKind = ResourceKind::InferenceService;
    const SERVES: bool = true;
    type Checked = Checked;

    fn refs(&self) -> Vec<Ref> {
        run::refs(self)
    }

    fn upstream(&self) -> Upstream {
        run::upstream(self)
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
