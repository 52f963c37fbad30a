//! What the demo checks on a cluster that is not its own: that it takes nothing over, and removes nothing of others.

use std::collections::BTreeSet;

use anyhow::{Result, bail};
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::{Namespace, Node};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt};
use strata_api::{AlignmentJob, Dataset, InferenceService, PretrainJob};

use super::NAMESPACE;
use super::manifests::LABEL;
use crate::install;
use crate::strata::Kind;
use crate::wait;

/// Refuses a cluster with a Strata that the demo did not install.
///
/// # Errors
/// There is one, or the cluster does not say.
pub(super) async fn refuse_others(client: &Client) -> Result<()> {
    let unlabelled = format!("!{LABEL}");
    let operators = ListParams::default().labels(&format!("app.kubernetes.io/name=strata-operator,{unlabelled}"));
    let others = ListParams::default().labels(&unlabelled);
    let mut found = Vec::new();
    for operator in Api::<Deployment>::all(client.clone()).list(&operators).await? {
        let namespace = operator.namespace().unwrap_or_default();
        found.push(format!("Deployment {namespace}/{}", operator.name_any()));
    }
    for crd in Api::<CustomResourceDefinition>::all(client.clone())
        .list(&others)
        .await?
    {
        if crd.spec.group == "strata.dev" {
            found.push(format!("CustomResourceDefinition {}", crd.name_any()));
        }
    }
    for namespace in Api::<Namespace>::all(client.clone()).list(&others).await? {
        if [NAMESPACE, install::NAMESPACE].contains(&namespace.name_any().as_str()) {
            found.push(format!("Namespace {}", namespace.name_any()));
        }
    }
    if found.is_empty() {
        return Ok(());
    }
    bail!(
        "this cluster has a Strata that the demo did not install ({}): take another cluster, or apply \
         config/samples to what is there (docs/quickstart.md, by hand); what nobody needs, remove first",
        found.join(", ")
    )
}

/// How many nodes take pods of no particular kind.
///
/// # Errors
/// The cluster does not say.
pub(super) async fn nodes(client: &Client) -> Result<usize> {
    let nodes = Api::<Node>::all(client.clone()).list(&ListParams::default()).await?;
    Ok(nodes.iter().filter(|node| takes_pods(node)).count())
}

fn takes_pods(node: &Node) -> bool {
    let spec = node.spec.clone().unwrap_or_default();
    let tainted = spec
        .taints
        .unwrap_or_default()
        .iter()
        .any(|taint| taint.effect != "PreferNoSchedule");
    wait::node_is_ready(Some(node)) && !spec.unschedulable.unwrap_or(false) && !tainted
}

/// Namespaces other than the demo's that have Strata's resources.
///
/// # Errors
/// The cluster does not say.
pub(super) async fn namespaces_in_use(client: &Client) -> Result<BTreeSet<String>> {
    let mut all = namespaces_of::<Dataset>(client).await?;
    all.extend(namespaces_of::<PretrainJob>(client).await?);
    all.extend(namespaces_of::<AlignmentJob>(client).await?);
    all.extend(namespaces_of::<InferenceService>(client).await?);
    all.remove(NAMESPACE);
    Ok(all)
}

async fn namespaces_of<K: Kind>(client: &Client) -> Result<BTreeSet<String>> {
    match Api::<K>::all(client.clone()).list(&ListParams::default()).await {
        Ok(list) => Ok(list.iter().filter_map(ResourceExt::namespace).collect()),
        // The kind is not there at all.
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(BTreeSet::new()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn nodes_that_pods_cannot_use_are_not_counted() {
        let node = |ready: &str, spec: serde_json::Value| -> Node {
            let status = json!({"conditions": [{"type": "Ready", "status": ready}]});
            serde_json::from_value(json!({"metadata": {"name": "n"}, "spec": spec, "status": status})).unwrap()
        };
        let taint = |effect: &str| json!({"taints": [{"key": "k", "effect": effect}]});
        for (node, expected) in [
            (node("True", json!({})), true),
            (node("True", taint("PreferNoSchedule")), true),
            (node("True", taint("NoSchedule")), false),
            (node("True", json!({"unschedulable": true})), false),
            (node("False", json!({})), false),
        ] {
            assert_eq!(takes_pods(&node), expected, "{node:?}");
        }
    }
}
