//! The lineage of an endpoint, from what the resources' statuses say: each input by digest, back to the raw files.

use anyhow::{Context as _, Result};
use kube::{Api, Client};
use strata_api::{AlignmentJob, Dataset, InferenceService, PretrainJob, RunStatus};

use crate::strata::Kind;

/// Longest chain that is followed: a data set, a pretrained model and a few alignments are far less.
const DEPTH_LIMIT: usize = 16;

/// The lineage of the InferenceService `name` as an indented tree.
///
/// # Errors
/// A resource of the chain cannot be read.
pub async fn of_service(client: &Client, namespace: &str, name: &str) -> Result<String> {
    let mut lines = Vec::new();
    // Inputs still to print, deepest last: (depth, what it is to its parent, resource or URI).
    let mut open = vec![(0, String::new(), format!("InferenceService/{name}"), None)];
    while let Some((depth, role, resource, digest)) = open.pop() {
        let role = if role.is_empty() { role } else { format!("{role}: ") };
        let status = match resource
            .split_once('/')
            .filter(|_| depth < DEPTH_LIMIT && !resource.contains("://"))
        {
            Some((kind, name)) => status(client, namespace, kind, name).await?,
            None => None,
        };
        let digest = digest.or_else(|| status.as_ref().and_then(|s| Some(s.artifact.as_ref()?.digest.clone())));
        let digest = digest
            .map(|digest: String| format!("  {}", digest.chars().take(19).collect::<String>()))
            .unwrap_or_default();
        lines.push(format!("{}{role}{resource}{digest}", "  ".repeat(depth)));
        for input in status.into_iter().flat_map(|status| status.inputs).rev() {
            let target = input.resource.unwrap_or(input.uri);
            open.push((depth + 1, input.name, target, input.digest));
        }
    }
    Ok(lines.join("\n"))
}

async fn status(client: &Client, namespace: &str, kind: &str, name: &str) -> Result<Option<RunStatus>> {
    match kind {
        "Dataset" => status_of::<Dataset>(client, namespace, name).await,
        "PretrainJob" => status_of::<PretrainJob>(client, namespace, name).await,
        "AlignmentJob" => status_of::<AlignmentJob>(client, namespace, name).await,
        "InferenceService" => status_of::<InferenceService>(client, namespace, name).await,
        _ => Ok(None),
    }
}

async fn status_of<K: Kind>(client: &Client, namespace: &str, name: &str) -> Result<Option<RunStatus>> {
    let object = Api::<K>::namespaced(client.clone(), namespace).get_opt(name).await;
    let object = object.with_context(|| format!("cannot read {} {name}", K::kind(&())))?;
    Ok(object.and_then(|object| object.run_status().cloned()))
}
