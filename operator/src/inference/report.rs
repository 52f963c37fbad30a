//! From an InferenceService's phase, after the server's answers, to what the status says.

use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::ResourceExt;
use strata_api::{ConditionType, InferenceService, InferenceServiceStatus, Reason, RunStatus};

use super::phase::{digest, is_ready, serving_pods, standing};
use super::rollout::makes_place_at;
use super::{Checked, container, scaling};
use crate::engine::kind::{Observed, Outcome, Refusal};
use crate::placement::Preflight;
use crate::run::conditions::Finding;
use crate::run::report::judge;
use crate::workload::labels;
use crate::workload::service::Scheme;

/// Pause before what is due already.
const SOON: Duration = Duration::from_secs(1);

/// The status.
pub fn report(
    resource: &InferenceService,
    checked: Result<&Checked, &Refusal>,
    observed: &Observed,
    now: Timestamp,
) -> Outcome<InferenceServiceStatus> {
    let container = checked.ok().and_then(|checked| checked.container.as_ref());
    let mut judged = match container {
        Some(container) => container::judge(resource, container),
        None => judge(
            resource,
            checked.and_then(|checked| checked.order.as_ref()),
            observed,
            now,
        ),
    };
    if let Ok(checked) = checked {
        let beside = &checked.serving.beside;
        beside.show(&mut judged.status.inputs);
        // What the run itself lacks is said first.
        let inputs = judged
            .findings
            .iter_mut()
            .find(|finding| finding.reason == Reason::InputsResolved);
        if let (Some(finding), Some((reason, message))) = (inputs, &beside.missing) {
            *finding = Finding::new(ConditionType::InputsReady, *reason, message.clone());
        }
    }
    let pods = serving_pods(&observed.pods);
    let deployment = observed.deployment.as_ref();
    let available = match checked {
        Err(_) => Finding::new(ConditionType::Available, Reason::Blocked, "see condition Accepted"),
        Ok(_) if let Some((reason, message)) = &observed.refused.serving => {
            Finding::new(ConditionType::Available, *reason, message.clone())
        }
        Ok(checked)
            if let Some(Err(_)) = &checked.serving.placement
                && deployment.is_none() =>
        {
            Finding::new(ConditionType::Available, Reason::Blocked, "see condition Placed")
        }
        Ok(checked) => {
            let model = match container {
                Some(container) => container::identity(resource, container),
                None => judged.status.artifact.as_ref().map(|artifact| artifact.digest.clone()),
            };
            let standing = standing(model.as_deref(), &checked.serving, deployment, &pods, now);
            Finding::new(ConditionType::Available, standing.reason, standing.message)
        }
    };
    let before = resource.status.as_ref();
    let (mut findings, mut scale, mut history) = (Vec::new(), None, Vec::new());
    if let (Some(autoscale), Ok(checked)) = (&resource.spec.autoscale, checked) {
        match &checked.serving.scaled {
            Some(scaled) => {
                findings.extend(scaling::findings(resource, scaled, autoscale));
                (scale, history) = scaling::status(scaled, before, now);
            }
            // While it is suspended, nothing is forgotten.
            None => {
                scale = before.and_then(|before| before.autoscale.clone());
                history = before.map(|before| before.scaling_history.clone()).unwrap_or_default();
            }
        }
    }
    let placed = match checked {
        Ok(checked) => checked.serving.placement.as_ref().map(|placement| match placement {
            _ if available.reason == Reason::Serving => {
                Finding::new(ConditionType::Placed, Reason::Fits, "the pods have their nodes")
            }
            Ok((preflight, _)) => preflight.placement.finding(),
            Err(misfit) => misfit.finding(),
        }),
        Err(_) => None,
    };
    let expected = match checked {
        Ok(Checked { serving, .. }) => match &serving.placement {
            Some(Ok((Preflight { placement, estimate }, _))) => Some(estimate.status(placement, &observed.fleet.table)),
            _ => None,
        },
        Err(_) => None,
    };
    findings.extend(placed);
    findings.push(available);
    let name = resource.name_any();
    let counts = deployment.and_then(|deployment| deployment.status.clone());
    let digests: Vec<&String> = pods
        .iter()
        .filter(|pod| is_ready(pod))
        .filter_map(|pod| digest(pod))
        .collect();
    let one = digests
        .first()
        .filter(|first| digests.iter().all(|digest| digest == *first));
    let selector = labels::serving_selector(&name);
    let selector: Vec<String> = selector.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let address = observed.service.as_ref();
    let makes_place = checked
        .ok()
        .and_then(|checked| makes_place_at(deployment?, &pods, checked.serving.rollout_patience));
    // Nothing else wakes it then.
    let until_room = makes_place.map(|at| Duration::try_from(at.duration_since(now)).unwrap_or_default().max(SOON));
    Outcome {
        requeue: [judged.requeue, until_room].into_iter().flatten().min(),
        status: InferenceServiceStatus {
            run_status: RunStatus {
                placement: expected,
                ..judged.finish(&findings, now)
            },
            url: address.map(|service| {
                let scheme = Scheme::of(service).url();
                format!("{scheme}://{name}.{}.svc", resource.namespace().unwrap_or_default())
            }),
            serving_digest: one.map(|digest| (*digest).clone()),
            replicas: Some(counts.as_ref().and_then(|status| status.replicas).unwrap_or(0)),
            ready_replicas: Some(counts.as_ref().and_then(|status| status.ready_replicas).unwrap_or(0)),
            selector: Some(selector.join(",")),
            autoscale: scale,
            scaling_history: history,
        },
    }
}
