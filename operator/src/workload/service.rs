//! The Service in front of the serving pods.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// What pods speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// HTTP, on port 80.
    Http,
    /// HTTPS, on port 443.
    Https,
}

impl Scheme {
    /// The scheme of a Service that [`build`] made.
    pub fn of(service: &Service) -> Self {
        let ports = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
        match ports.into_iter().any(|port| port.port == Scheme::Https.port()) {
            true => Scheme::Https,
            false => Scheme::Http,
        }
    }

    /// As URLs begin; also the name of the Service's port.
    pub fn url(self) -> &'static str {
        match self {
            Scheme::Http => "http",
            Scheme::Https => "https",
        }
    }

    /// The Service's port.
    pub fn port(self) -> i32 {
        match self {
            Scheme::Http => 80,
            Scheme::Https => 443,
        }
    }
}

/// A Service with the scheme's port, to the pods' port `http`.
pub fn build(
    metadata: ObjectMeta,
    owner: &OwnerReference,
    selector: BTreeMap<String, String>,
    scheme: Scheme,
) -> Service {
    Service {
        metadata: ObjectMeta {
            owner_references: Some(vec![owner.clone()]),
            ..metadata
        },
        spec: Some(ServiceSpec {
            selector: Some(selector),
            ports: Some(vec![ServicePort {
                name: Some(scheme.url().into()),
                port: scheme.port(),
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

/// A Service without an address of its own: the nodes of an attempt find each other by name, also before they are ready.
pub fn of_nodes(metadata: ObjectMeta, owner: &OwnerReference, selector: BTreeMap<String, String>) -> Service {
    Service {
        metadata: ObjectMeta {
            owner_references: Some(vec![owner.clone()]),
            ..metadata
        },
        spec: Some(ServiceSpec {
            selector: Some(selector),
            cluster_ip: Some("None".into()),
            publish_not_ready_addresses: Some(true),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}
