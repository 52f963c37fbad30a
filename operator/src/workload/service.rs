//! The Service in front of the serving pods.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// A Service `http` on port 80, to the pods' port of that name.
pub fn build(metadata: ObjectMeta, owner: &OwnerReference, selector: BTreeMap<String, String>) -> Service {
    Service {
        metadata: ObjectMeta {
            owner_references: Some(vec![owner.clone()]),
            ..metadata
        },
        spec: Some(ServiceSpec {
            selector: Some(selector),
            ports: Some(vec![ServicePort {
                name: Some("http".into()),
                port: 80,
                target_port: Some(IntOrString::String("http".into())),
                protocol: Some("TCP".into()),
                ..ServicePort::default()
            }]),
            type_: Some("ClusterIP".into()),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}
