//! The operator's pods as a test sees them from outside: what they run, and what they count.

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, Client, ResourceExt as _};

use crate::bed::network::http;
use crate::install;

/// The pods, also those that are ending.
///
/// # Errors
/// The API server does not answer.
pub async fn pods(client: &Client) -> Result<Vec<Pod>> {
    let pods = Api::<Pod>::namespaced(client.clone(), install::NAMESPACE);
    let ours = ListParams::default().labels("app.kubernetes.io/name=strata-operator");
    Ok(pods.list(&ours).await?.items)
}

/// `/metrics` of each pod by the pod's name. This machine reaches pods directly.
///
/// # Errors
/// There is no operator, or a pod does not answer.
pub async fn metrics(client: &Client) -> Result<Vec<(String, String)>> {
    let http = http()?;
    let mut all = Vec::new();
    for pod in pods(client).await? {
        let address = pod.status.as_ref().and_then(|status| status.pod_ip.clone());
        let url = format!("http://{}:8080/metrics", address.context("the pod has an address")?);
        all.push((pod.name_any(), http.get(url).send().await?.text().await?));
    }
    ensure!(!all.is_empty(), "there is no operator");
    Ok(all)
}

/// How often the operator has reconciled anything.
///
/// # Errors
/// As [`metrics`].
pub async fn reconciles(client: &Client) -> Result<f64> {
    let pods = metrics(client).await?;
    let counts = pods
        .iter()
        .flat_map(|(_, text)| series(text, "strata_operator_reconciles_total"));
    Ok(counts.sum())
}

/// The values of all series called `name`.
pub fn series<'a>(text: &'a str, name: &'a str) -> impl Iterator<Item = f64> + 'a {
    let ours = move |line: &&str| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
    text.lines()
        .filter(ours)
        .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
}
