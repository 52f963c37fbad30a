//! Accelerators by claim: the template from which Kubernetes makes a ResourceClaim for each pod, and the pod's word for it.

use k8s_openapi::api::core::v1::{PodResourceClaim, PodTemplateSpec, ResourceClaim};
use k8s_openapi::api::resource::v1::{
    CELDeviceSelector, DeviceClaim, DeviceRequest, DeviceSelector, ExactDeviceRequest, ResourceClaimSpec,
    ResourceClaimTemplate, ResourceClaimTemplateSpec,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use strata_contract::hash_canonical;

use crate::placement::device::{Claim, DeviceKind};

/// What the claim is called in the pod, and its one request in it.
const NAME: &str = "accelerators";

/// Name of the template for the serving pods of a service. A template can never change, so that another claim has another name.
pub fn name(service: &str, claim: &Claim) -> String {
    format!("{service}-{}", &hash_canonical(&spec(claim))[..8])
}

/// The template. What is made from it has its labels.
pub fn build(metadata: ObjectMeta, owner: &OwnerReference, claim: &Claim) -> ResourceClaimTemplate {
    ResourceClaimTemplate {
        spec: ResourceClaimTemplateSpec {
            metadata: Some(ObjectMeta {
                labels: metadata.labels.clone(),
                ..ObjectMeta::default()
            }),
            spec: spec(claim),
        },
        metadata: ObjectMeta {
            owner_references: Some(vec![owner.clone()]),
            ..metadata
        },
    }
}

fn spec(claim: &Claim) -> ResourceClaimSpec {
    let selectors: Vec<DeviceSelector> = selectors(&claim.kind)
        .map(|expression| DeviceSelector {
            cel: Some(CELDeviceSelector { expression }),
        })
        .collect();
    let request = DeviceRequest {
        name: NAME.into(),
        exactly: Some(ExactDeviceRequest {
            device_class_name: claim.kind.class.clone(),
            allocation_mode: Some("ExactCount".into()),
            count: Some(claim.count.into()),
            selectors: (!selectors.is_empty()).then_some(selectors),
            ..ExactDeviceRequest::default()
        }),
        ..DeviceRequest::default()
    };
    ResourceClaimSpec {
        devices: Some(DeviceClaim {
            requests: Some(vec![request]),
            ..DeviceClaim::default()
        }),
    }
}

/// Expressions of which each holds for a device of that kind. JSON's texts are texts of CEL too.
fn selectors(kind: &DeviceKind) -> impl Iterator<Item = String> {
    let text = |value: &str| serde_json::Value::from(value).to_string();
    kind.attributes
        .iter()
        .map(move |(name, value)| format!("device.attributes[{}].{name} == {}", text(&kind.driver), text(value)))
}

/// Makes pods of that template claim what is in the claim template.
pub fn bind(pods: &mut PodTemplateSpec, claim_template: &str) {
    let Some(spec) = pods.spec.as_mut() else { return };
    spec.resource_claims.get_or_insert_default().push(PodResourceClaim {
        name: NAME.into(),
        resource_claim_template_name: Some(claim_template.to_owned()),
        ..PodResourceClaim::default()
    });
    // The one that computes; others prepare.
    if let Some(container) = spec.containers.first_mut() {
        let resources = container.resources.get_or_insert_default();
        resources.claims.get_or_insert_default().push(ResourceClaim {
            name: NAME.into(),
            request: None,
        });
    }
}

/// The claim template of pods.
pub fn of(pods: &PodTemplateSpec) -> Option<&str> {
    let claims = pods.spec.as_ref()?.resource_claims.as_ref()?;
    let ours = claims.iter().find(|claim| claim.name == NAME)?;
    ours.resource_claim_template_name.as_deref()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use serde_json::json;

    #[test]
    fn a_claim_says_class_number_and_what_tells_its_devices_apart() {
        let claim = |kind: DeviceKind, count| Claim { kind, count };
        let plain = DeviceKind {
            class: "gpu.example.org".into(),
            driver: "example.org".into(),
            attributes: BTreeMap::new(),
        };
        for (claim, expect) in [
            (
                claim(plain.clone(), 8),
                json!({"deviceClassName": "gpu.example.org", "allocationMode": "ExactCount", "count": 8}),
            ),
            (
                claim(DeviceKind::mig("1g.10gb"), 2),
                json!({"deviceClassName": "mig.nvidia.com", "allocationMode": "ExactCount", "count": 2, "selectors": [
                    {"cel": {"expression": r#"device.attributes["gpu.nvidia.com"].profile == "1g.10gb""#}},
                    {"cel": {"expression": r#"device.attributes["gpu.nvidia.com"].type == "mig""#}},
                ]}),
            ),
        ] {
            let spec = json!(spec(&claim));
            assert_eq!(
                spec,
                json!({"devices": {"requests": [{"name": "accelerators", "exactly": expect}]}})
            );
        }
        let names = [(4, "chat"), (8, "chat"), (4, "other")]
            .map(|(count, service)| name(service, &claim(plain.clone(), count)));
        assert!(
            names[0].starts_with("chat-") && names[0] != names[1] && names[2].starts_with("other-"),
            "{names:?}"
        );
    }
}
